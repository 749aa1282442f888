//! Whether changes can be stored now, as the write path itself knows it: a database may answer queries and take no write.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::clock::AtomicInstant;

/// For how long a change that was refused for lack of room, or dropped for its age, is held against the store.
const REFUSED_FOR: Duration = Duration::from_secs(3);

/// Shared by all lanes of a node.
#[derive(Debug)]
pub struct WriteHealth {
    failing: AtomicUsize,
    refused_at: AtomicInstant,
}

impl Default for WriteHealth {
    fn default() -> Self {
        Self { failing: AtomicUsize::new(0), refused_at: AtomicInstant::never() }
    }
}

impl WriteHealth {
    /// Every lane has committed since it failed last, and lately no change was turned away.
    pub fn is_good(&self) -> bool {
        self.failing.load(Ordering::Relaxed) == 0 && self.refused_at.age(Instant::now()) > REFUSED_FOR
    }

    /// A change was refused because a queue was full, or dropped because it had waited for too long.
    pub fn note_refused(&self) {
        self.refused_at.set(Instant::now());
    }

    /// A lane fails from now on.
    pub(super) fn begin_failing(&self) {
        self.failing.fetch_add(1, Ordering::Relaxed);
    }

    /// A lane that failed has committed again.
    pub(super) fn end_failing(&self) {
        self.failing.fetch_sub(1, Ordering::Relaxed);
    }
}
