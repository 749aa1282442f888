//! How long to wait before a node is tried again.

use std::time::Duration;
use std::time::Instant;

use tokio::time::sleep;

use crate::jittered;

/// Between attempts to attach: from, to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Pauses that grow as long as nothing succeeds.
pub struct Pauses(Duration);

impl Pauses {
    pub fn new() -> Self {
        Self(PAUSES.0)
    }

    /// It has succeeded.
    pub fn reset(&mut self) {
        self.0 = PAUSES.0;
    }

    /// Waits, unless what has failed was begun long enough ago.
    pub async fn after(&mut self, began: Instant) {
        if began.elapsed() < self.0 {
            let pause = self.0;
            self.0 = (pause * 2).min(PAUSES.1);
            sleep(jittered(pause)).await;
        }
    }
}
