//! How users want to be seen: changes as callers ask for them, within a rate for each user.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use crate::domain::event::Outcome;
use crate::domain::event::SetStatus;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Begun;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::Metrics;

/// Users whose pace is known at the same time, of 32 bytes each.
const MAX_USERS: usize = 200_000;
/// Below so many nobody is looked for whose pace does not matter any more.
const FEW_USERS: usize = 1_024;

/// Changes of status.
pub struct Statuses {
    lanes: Arc<Lanes>,
    pace: Pace,
    metrics: Arc<Metrics>,
    /// Bytes of the longest text.
    pub max_text_bytes: usize,
}

impl Statuses {
    /// `rate`: changes of one user per second in the long run, 0: any number; `burst`: at once.
    pub fn new(lanes: Arc<Lanes>, (rate, burst): (u32, u32), max_text_bytes: usize, metrics: Arc<Metrics>) -> Self {
        Self { lanes, pace: Pace::new(rate, burst), metrics, max_text_bytes }
    }

    /// Takes the change's place in the user's lane.
    ///
    /// # Errors
    /// The user has changed their status too often lately, [`Error::Limited`]; or too many changes wait, [`Error::Overloaded`].
    pub fn begin(&self, user: UserId, set: SetStatus) -> Result<Begun, Error> {
        self.pace.take(user, Instant::now()).map_err(|retry_after| {
            self.metrics.presence.status_refused.inc();
            Error::Limited { what: "the user changes their status more often than they may (status.rate)", retry_after }
        })?;
        self.lanes.begin(user, Change::SetStatus(set))
    }

    /// Waits until the change is durable.
    ///
    /// # Errors
    /// That of `begun`, or as [`Lanes::submit`].
    pub async fn finish(&self, begun: Result<Begun, Error>) -> Result<Outcome, Error> {
        self.lanes.finish(begun?).await
    }
}

/// How fast each user changes: when the changes so far would have been made at the rate. Who is slower is not in it.
struct Pace {
    interval: Duration,
    at_once: Duration,
    users: Mutex<NumberMap<UserId, Instant>>,
}

impl Pace {
    fn new(rate: u32, burst: u32) -> Self {
        let interval = if rate == 0 { Duration::ZERO } else { Duration::from_secs(1) / rate };
        Self { interval, at_once: interval * burst, users: Mutex::default() }
    }

    /// Err: how long to wait.
    fn take(&self, user: UserId, now: Instant) -> Result<(), Duration> {
        if self.interval.is_zero() {
            return Ok(());
        }
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if users.len() >= FEW_USERS && users.len() == users.capacity() || users.len() >= MAX_USERS {
            users.retain(|_, paced| *paced > now);
        }
        if users.len() >= MAX_USERS && !users.contains_key(&user) {
            return Err(self.interval);
        }
        let paced = users.get(&user).copied().unwrap_or(now).max(now) + self.interval;
        match paced.checked_duration_since(now + self.at_once).filter(|wait| !wait.is_zero()) {
            Some(wait) => Err(wait),
            None => {
                users.insert(user, paced);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_changes_some_times_at_once_and_then_at_the_rate_and_holds_up_nobody_else() {
        let (pace, begin) = (Pace::new(2, 3), Instant::now());
        let user = |id| UserId::parse(id).unwrap();
        let taken = |id, at: Instant| (0..10).filter(|_| pace.take(user(id), at).is_ok()).count();
        assert_eq!((taken(1, begin), taken(1, begin), taken(2, begin)), (3, 0, 3));
        assert_eq!(pace.take(user(1), begin), Err(Duration::from_millis(500)));
        assert_eq!(taken(1, begin + Duration::from_millis(499)), 0);
        assert_eq!(taken(1, begin + Duration::from_millis(500)), 1);
        assert_eq!(taken(1, begin + Duration::from_secs(60)), 3);
    }

    #[test]
    fn only_users_who_changed_lately_are_remembered() {
        let (pace, begin) = (Pace::new(1, 1), Instant::now());
        for id in 1..=20_000 {
            pace.take(UserId::parse(id).unwrap(), begin + Duration::from_millis(id as u64 * 10)).unwrap();
        }
        assert!(pace.users.lock().unwrap().len() < 4 * FEW_USERS);
    }
}
