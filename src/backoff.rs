//! How long to wait before the next attempt at something that failed: longer each time, and never the same for all who wait.

use std::time::Duration;

/// Doubles the pause with each failure, up to a limit, and takes half to all of it by chance.
#[derive(Debug)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    pub const fn new(first: Duration, limit: Duration) -> Self {
        Self { first, limit, failures: 0 }
    }

    /// The pause after one more failure. The first failure is followed by an attempt at once: most often a connection broke,
    /// and nothing else.
    pub fn pause(&mut self) -> Duration {
        let doublings = self.failures.checked_sub(1);
        self.failures = self.failures.saturating_add(1);
        let Some(doublings) = doublings else { return Duration::ZERO };
        let longest = self.first.saturating_mul(2_u32.saturating_pow(doublings)).min(self.limit);
        longest.mul_f64(0.5 + f64::from(random()) / 512.0)
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

fn random() -> u8 {
    uuid::Uuid::new_v4().as_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_the_limit_and_begin_anew_after_a_success() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        assert_eq!(backoff.pause(), Duration::ZERO);
        for longest in [100, 200, 400, 800, 1_600, 2_000, 2_000, 2_000] {
            let pause = backoff.pause().as_millis();
            assert!((longest / 2..=longest).contains(&pause), "{pause} ms, at most {longest}");
        }
        backoff.reset();
        assert_eq!(backoff.pause(), Duration::ZERO);
    }
}
