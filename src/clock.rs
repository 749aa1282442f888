//! Time. What is stored or compared between nodes is the database's clock; what is measured here is this node's monotonic one.

use std::sync::LazyLock;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use crate::domain::time::Timestamp;

/// A difference between the database's clock and this node's that no slow answer explains.
const STEP: Duration = Duration::from_secs(1);
/// Over so long a clock that runs too fast or too slow shows, as does one that is set.
const ANCHOR_FOR: Duration = Duration::from_secs(60);
/// How long a step is worth a warning to those who ask how the node is.
const STEP_SHOWN_FOR: Duration = Duration::from_secs(60);
/// Nothing is deleted for its age before the database's clock has gone on for so long without a gap or a step: a clock that is
/// days ahead for a moment must cost nothing that cannot be had back.
const STEADY_AFTER: Duration = Duration::from_secs(600);

/// Tells the database's time without asking the database: its offset to this node's monotonic clock, learnt once a second.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    /// Database milliseconds at `started`, at most.
    offset_ms: AtomicI64,
    /// How much less it may have been: the answer was under way so long.
    doubt_ms: AtomicI64,
    stepped: AtomicInstant,
    /// What the database said when, up to [`ANCHOR_FOR`] ago.
    anchor: Mutex<Option<(Timestamp, Instant)>>,
    /// How much too old what was stored before the last step forward seems, and until when such things may be there.
    slack_ms: AtomicI64,
    slack_until_ms: AtomicI64,
    /// Since when the database has taken a beat each second, on its own clock.
    continuous_since_ms: AtomicI64,
    /// What it showed when it had been set last, either way.
    set_at_ms: AtomicI64,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            offset_ms: AtomicI64::new(0),
            doubt_ms: AtomicI64::new(0),
            stepped: AtomicInstant::never(),
            anchor: Mutex::default(),
            slack_ms: AtomicI64::new(0),
            slack_until_ms: AtomicI64::new(0),
            continuous_since_ms: AtomicI64::new(i64::MAX),
            set_at_ms: AtomicI64::new(0),
        }
    }
}

impl Clock {
    /// The database said `now` to a question that was sent at `asked` and was answered at `answered`. Returns how far its clock
    /// has stepped lately, if it did, or how far it has run away from this node's.
    pub fn learn(&self, now: Timestamp, asked: Instant, answered: Instant) -> Option<i64> {
        self.offset_ms.store(now.0 - self.elapsed_ms(asked), Ordering::Relaxed);
        self.doubt_ms.store(self.elapsed_ms(answered) - self.elapsed_ms(asked) + 1, Ordering::Relaxed);
        let mut anchor = self.anchor.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((then, at)) = *anchor else {
            *anchor = Some((now, asked));
            return None;
        };
        let (earliest, latest) = (then.plus(asked.duration_since(at)), then.plus(answered.duration_since(at)));
        let step = if now < earliest { now.0 - earliest.0 } else { (now.0 - latest.0).max(0) };
        let is_step = step.unsigned_abs() > STEP.as_millis() as u64;
        if is_step || asked.duration_since(at) > ANCHOR_FOR {
            *anchor = Some((now, asked));
        }
        if is_step {
            self.set_at_ms.store(now.0, Ordering::Relaxed);
            self.stepped.set(answered);
        }
        is_step.then_some(step)
    }

    /// The clock was set forward by `ms` at `at`. What was stored before it may be there for `longest`.
    pub fn learn_step(&self, ms: i64, at: Timestamp, longest: Duration) {
        self.slack_ms.store(ms, Ordering::Relaxed);
        self.slack_until_ms.store(at.plus(longest).0, Ordering::Relaxed);
        self.set_at_ms.fetch_max(at.0, Ordering::Relaxed);
    }

    /// When the clock was set last, by what it said then: of what began before, nobody knows how long it took.
    pub fn set_at(&self) -> Timestamp {
        Timestamp(self.set_at_ms.load(Ordering::Relaxed))
    }

    /// What ends by then is over.
    pub fn over_by(&self) -> Timestamp {
        let now = self.now();
        now.minus(self.slack(now))
    }

    /// How much longer than it says something may last, when it is `now`: it may seem too old since the clock was set forward.
    pub fn slack(&self, now: Timestamp) -> Duration {
        let has_slack = now.0 < self.slack_until_ms.load(Ordering::Relaxed);
        let ms = if has_slack { self.slack_ms.load(Ordering::Relaxed) } else { 0 };
        Duration::from_millis(u64::try_from(ms).unwrap_or(0))
    }

    /// Since when beats were recorded without a gap, as the database has it.
    pub fn learn_continuous(&self, since: Timestamp) {
        self.continuous_since_ms.store(since.0, Ordering::Relaxed);
    }

    /// Whether the clock has stepped lately.
    pub fn has_stepped(&self) -> bool {
        self.stepped.age(Instant::now()) < STEP_SHOWN_FOR
    }

    /// Whether something may be deleted for its age.
    pub fn is_steady(&self) -> bool {
        self.is_steady_at(self.now())
    }

    /// The same, for a transaction in which the database says that it is `now`.
    pub fn is_steady_at(&self, now: Timestamp) -> bool {
        let since = Timestamp(self.continuous_since_ms.load(Ordering::Relaxed));
        let here = self.now();
        let agree = now.since(here).max(here.since(now)) <= STEP;
        agree && since <= now && now.since(since) >= STEADY_AFTER && self.stepped.age(Instant::now()) >= STEADY_AFTER
    }

    /// The database's time now, to a round trip.
    pub fn now(&self) -> Timestamp {
        self.at(Instant::now())
    }

    pub fn at(&self, instant: Instant) -> Timestamp {
        Timestamp(self.offset_ms.load(Ordering::Relaxed) + self.elapsed_ms(instant))
    }

    /// What it had reached for sure by `instant`.
    pub fn earliest(&self, instant: Instant) -> Timestamp {
        Timestamp(self.at(instant).0 - self.doubt_ms.load(Ordering::Relaxed))
    }

    fn elapsed_ms(&self, instant: Instant) -> i64 {
        i64::try_from(instant.saturating_duration_since(self.started).as_millis()).unwrap_or(i64::MAX)
    }
}

/// This machine's own clock, in Unix milliseconds: for what is shown to people, and for what is dated by the clocks of others,
/// certificates and tokens; never for what is stored, or compared between nodes.
#[allow(clippy::disallowed_methods)] // here is where it is asked
pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The same in nanoseconds, for what is measured and shown beside what other machines measure.
#[allow(clippy::disallowed_methods)] // here is where it is asked
pub fn unix_nanos() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The same in seconds.
pub fn unix_s() -> u64 {
    u64::try_from(unix_ms() / 1_000).unwrap_or(0)
}

/// An instant in eight bytes, for what there are millions of: nanoseconds since this process first asked, or before that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CompactInstant(i64);

static ORIGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

impl From<Instant> for CompactInstant {
    fn from(instant: Instant) -> Self {
        let nanos = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
        match instant.checked_duration_since(*ORIGIN) {
            Some(after) => Self(nanos(after)),
            None => Self(-nanos(ORIGIN.duration_since(instant))),
        }
    }
}

impl From<CompactInstant> for Instant {
    fn from(CompactInstant(nanos): CompactInstant) -> Self {
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        if nanos < 0 { ORIGIN.checked_sub(distance).unwrap_or(*ORIGIN) } else { *ORIGIN + distance }
    }
}

/// An instant that threads share without a lock. Freshness is a time compared when reading, never a flag that a task sets: a
/// process that stood still must not answer from before its tasks ran again.
#[derive(Debug)]
pub struct AtomicInstant(AtomicI64);

/// As a [`CompactInstant`].
const NEVER: i64 = i64::MIN;

impl AtomicInstant {
    /// Long ago.
    pub fn never() -> Self {
        Self(AtomicI64::new(NEVER))
    }

    pub fn now() -> Self {
        let now = Self::never();
        now.set(Instant::now());
        now
    }

    /// An earlier instant than the one it has changes nothing.
    pub fn set(&self, instant: Instant) {
        self.0.fetch_max(CompactInstant::from(instant).0, Ordering::Relaxed);
    }

    /// As if it had never been.
    pub fn clear(&self) {
        self.0.store(NEVER, Ordering::Relaxed);
    }

    /// How long ago it was, at `now`.
    pub fn age(&self, now: Instant) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            NEVER => Duration::MAX,
            nanos => now.saturating_duration_since(CompactInstant(nanos).into()),
        }
    }
}

impl Clone for AtomicInstant {
    fn clone(&self) -> Self {
        Self(AtomicI64::new(self.0.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_what_the_clock_shows_and_what_it_had_reached_for_sure_lies_the_way_of_its_answer() {
        let clock = Clock::default();
        let asked = clock.started + Duration::from_millis(50);
        clock.learn(Timestamp(10_000), asked, asked + Duration::from_millis(300));
        let later = asked + Duration::from_secs(1);
        assert_eq!(clock.at(later), Timestamp(11_000));
        assert_eq!(clock.earliest(later), Timestamp(10_699)); // and a millisecond for what was cut off
    }

    #[test]
    fn an_instant_of_before_it_was_first_spoken_of_is_not_taken_for_a_later_one() {
        let (now, instant) = (Instant::now(), AtomicInstant::never());
        assert_eq!(instant.age(now), Duration::MAX);
        let minute = Duration::from_secs(60);
        instant.set(now.checked_sub(minute).expect("a machine that has been up for a minute"));
        assert_eq!(instant.age(now), minute);
        instant.set(now.checked_sub(2 * minute).expect("two minutes"));
        assert_eq!(instant.clone().age(now), minute);
        instant.clear();
        assert_eq!(instant.age(now), Duration::MAX);
    }
}
