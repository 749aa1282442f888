//! Time. What is stored or compared between nodes is the database's clock; what is measured here is this node's monotonic one.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use crate::domain::time::Timestamp;

/// A difference between the database's clock and this node's that no slow answer explains.
const STEP: Duration = Duration::from_secs(1);
/// How long a step is worth a warning to those who ask how the node is.
const STEP_SHOWN_FOR: Duration = Duration::from_secs(60);
/// Nothing is deleted for its age before the database's clock has gone on for so long without a gap or a step: a clock that is
/// days ahead for a moment must cost nothing that cannot be had back.
const STEADY_AFTER: Duration = Duration::from_secs(600);

/// Tells the database's time without asking the database: its offset to this node's monotonic clock, learnt once a second.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    /// Database milliseconds at `started`.
    offset_ms: AtomicI64,
    is_learnt: AtomicBool,
    stepped: AtomicInstant,
    /// Since when the database has taken a beat each second, on its own clock.
    continuous_since_ms: AtomicI64,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            offset_ms: AtomicI64::new(0),
            is_learnt: AtomicBool::new(false),
            stepped: AtomicInstant::never(),
            continuous_since_ms: AtomicI64::new(i64::MAX),
        }
    }
}

impl Clock {
    /// The database said `now` to a question that was sent at `asked` and has just been answered. Returns how far its clock
    /// has stepped since it was asked last, if it did.
    pub fn learn(&self, now: Timestamp, asked: Instant) -> Option<i64> {
        let (earliest, latest) = (self.at(asked), self.now());
        self.offset_ms.store(now.0 - self.elapsed_ms(asked), Ordering::Relaxed);
        let tolerance = i64::try_from(STEP.as_millis()).unwrap_or(i64::MAX);
        let step = if now < earliest { now.0 - earliest.0 } else { (now.0 - latest.0).max(0) };
        if !self.is_learnt.swap(true, Ordering::Relaxed) || step.abs() <= tolerance {
            return None;
        }
        self.stepped.set(Instant::now());
        Some(step)
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

    fn elapsed_ms(&self, instant: Instant) -> i64 {
        i64::try_from(instant.saturating_duration_since(self.started).as_millis()).unwrap_or(i64::MAX)
    }
}

/// This machine's own clock, in Unix milliseconds: for what is shown to people, never for what is stored or compared.
#[allow(clippy::disallowed_methods)] // here is where it is asked
pub fn unix_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// An instant that threads share without a lock. Freshness is a time compared when reading, never a flag that a task sets: a
/// process that stood still must not answer from before its tasks ran again.
#[derive(Debug)]
pub struct AtomicInstant {
    origin: Instant,
    nanos: AtomicI64,
}

impl AtomicInstant {
    /// Long ago.
    pub fn never() -> Self {
        Self { origin: Instant::now(), nanos: AtomicI64::new(i64::MIN) }
    }

    pub fn now() -> Self {
        Self { origin: Instant::now(), nanos: AtomicI64::new(0) }
    }

    pub fn set(&self, instant: Instant) {
        let nanos = instant.saturating_duration_since(self.origin).as_nanos();
        self.nanos.fetch_max(i64::try_from(nanos).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// As if it had never been.
    pub fn clear(&self) {
        self.nanos.store(i64::MIN, Ordering::Relaxed);
    }

    /// How long ago it was, at `now`.
    pub fn age(&self, now: Instant) -> Duration {
        let nanos = self.nanos.load(Ordering::Relaxed);
        match u64::try_from(nanos) {
            Ok(nanos) => now.saturating_duration_since(self.origin + Duration::from_nanos(nanos)),
            Err(_) => Duration::MAX,
        }
    }
}
