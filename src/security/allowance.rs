//! What one caller may use of this node, over however many connections.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::metrics::HotCounter;

/// What may be used at once beyond the rate: as much as comes together in so long.
const BURST: Duration = Duration::from_secs(1);

/// Denied calls of one caller per second that are taken down: whoever tries for ever must not fill the log.
const DENIALS_PER_S: u32 = 10;

/// Limits of one caller; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub calls_per_s: u32,
    pub users_per_s: u32,
    pub streams: usize,
}

pub struct Allowance {
    /// How many calls were let in so far.
    counted: HotCounter,
    calls: Pace,
    users: Pace,
    denials: Pace,
    streams: AtomicUsize,
    max_streams: AtomicUsize,
}

/// One of a caller's streams, until it is dropped.
pub struct StreamSlot(Arc<Allowance>);

/// So many units per second (a generic cell rate algorithm): one number, no lock.
struct Pace {
    began: Instant,
    /// Nanoseconds that one unit takes; 0: no limit.
    cost: AtomicU64,
    /// When all that was taken is paid for, in nanoseconds after `began`.
    paid_until: AtomicU64,
}

impl Allowance {
    pub fn new(limits: Limits, counted: HotCounter) -> Arc<Self> {
        let Limits { calls_per_s, users_per_s, streams } = limits;
        let (calls, users, denials) = (Pace::new(calls_per_s), Pace::new(users_per_s), Pace::new(DENIALS_PER_S));
        let (open, max_streams) = (AtomicUsize::new(0), AtomicUsize::new(streams));
        Arc::new(Self { counted, calls, users, denials, streams: open, max_streams })
    }

    /// From now on these limits hold.
    pub fn set(&self, limits: Limits) {
        let Limits { calls_per_s, users_per_s, streams } = limits;
        self.calls.cost.store(cost(calls_per_s), Ordering::Relaxed);
        self.users.cost.store(cost(users_per_s), Ordering::Relaxed);
        self.max_streams.store(streams, Ordering::Relaxed);
    }

    pub fn count_call(&self) {
        self.counted.inc();
    }

    /// # Errors
    /// After which time the caller may call again.
    pub fn take_call(&self) -> Result<(), Duration> {
        self.calls.take(1)
    }

    /// A batch is done as a whole, however large: what it takes beyond the rate is paid for by those that follow.
    ///
    /// # Errors
    /// After which time the caller may name users again.
    pub fn take_users(&self, users: usize) -> Result<(), Duration> {
        self.users.take(users as u64)
    }

    /// Whether one more denied call is taken down.
    pub fn take_denial(&self) -> bool {
        self.denials.take(1).is_ok()
    }

    /// None: it has as many as it may.
    pub fn open_stream(self: &Arc<Self>) -> Option<StreamSlot> {
        let open = self.streams.fetch_add(1, Ordering::Relaxed);
        let slot = StreamSlot(self.clone());
        let most = self.max_streams.load(Ordering::Relaxed);
        (most == 0 || open < most).then_some(slot)
    }
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pace {
    fn new(per_second: u32) -> Self {
        let cost = AtomicU64::new(cost(per_second));
        Self { began: Instant::now(), cost, paid_until: AtomicU64::new(0) }
    }

    fn take(&self, units: u64) -> Result<(), Duration> {
        if self.cost.load(Ordering::Relaxed) == 0 {
            return Ok(());
        }
        self.take_at(units, u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn take_at(&self, units: u64, now: u64) -> Result<(), Duration> {
        let (cost, burst) = (self.cost.load(Ordering::Relaxed), BURST.as_nanos() as u64);
        let latest = now + burst - cost.min(burst);
        let next = |paid: u64| (paid <= latest).then(|| paid.max(now).saturating_add(units.saturating_mul(cost)));
        match self.paid_until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
            Ok(_) => Ok(()),
            Err(paid) => Err(Duration::from_nanos(paid - latest)),
        }
    }
}

/// Nanoseconds of one unit.
fn cost(per_second: u32) -> u64 {
    if per_second == 0 { 0 } else { 1_000_000_000 / u64::from(per_second) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_second_of_calls_at_once_and_then_the_rate() {
        let pace = Pace::new(100);
        let at_once = (0..1_000).take_while(|_| pace.take_at(1, SECOND).is_ok()).count();
        assert_eq!(at_once, 100);
        let wait = pace.take_at(1, SECOND).unwrap_err();
        assert_eq!(wait, Duration::from_millis(10));
        assert!(pace.take_at(1, SECOND + 10_000_000).is_ok());
        assert!(pace.take_at(1, SECOND + 10_000_000).is_err());
        let later = (0..1_000).take_while(|_| pace.take_at(1, 10 * SECOND).is_ok()).count();
        assert_eq!(later, 100, "what was not used is not saved up");
    }

    #[test]
    fn a_large_batch_is_done_and_paid_for_later() {
        let pace = Pace::new(1_000);
        assert!(pace.take_at(10_000, SECOND).is_ok());
        let wait = pace.take_at(1, SECOND).unwrap_err();
        assert!(wait > Duration::from_secs(8), "{wait:?}");
        assert!(Pace::new(0).take(u64::MAX).is_ok(), "no limit");
    }

    #[test]
    fn a_stream_that_ends_makes_room() {
        let allowance = Allowance::new(Limits { streams: 2, ..Limits::default() }, HotCounter::default());
        let (first, _second) = (allowance.open_stream(), allowance.open_stream());
        assert!(first.is_some() && allowance.open_stream().is_none());
        drop(first);
        assert!(allowance.open_stream().is_some());
    }
}
