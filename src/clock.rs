//! Time. What is stored or compared between nodes is the database's clock; what is measured here is this node's monotonic one.

use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;
use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use crate::domain::time::Timestamp;

/// Tells the database's time without asking the database: its offset to this node's monotonic clock, learnt once a second.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    /// Database milliseconds at `started`.
    offset_ms: AtomicI64,
}

impl Default for Clock {
    fn default() -> Self {
        Self { started: Instant::now(), offset_ms: AtomicI64::new(0) }
    }
}

impl Clock {
    /// The database said `now` to a question sent at `asked`.
    pub fn learn(&self, now: Timestamp, asked: Instant) {
        self.offset_ms.store(now.0 - self.elapsed_ms(asked), Ordering::Relaxed);
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
