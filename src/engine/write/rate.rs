//! How often something may happen: a number at once, and so many per second in the long run.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;

/// A token bucket, full at first.
pub struct Rate {
    per_second: u32,
    at_once: u32,
    /// What is left, and as of when.
    left: Mutex<(f64, Instant)>,
}

impl Rate {
    pub fn new(per_second: u32, at_once: u32) -> Self {
        Self { per_second, at_once, left: Mutex::new((at_once.into(), Instant::now())) }
    }

    /// Whether it may happen once more at `now`.
    pub fn allows(&self, now: Instant) -> bool {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let gained = now.saturating_duration_since(left.1).as_secs_f64() * f64::from(self.per_second);
        *left = ((left.0 + gained).min(self.at_once.into()), now.max(left.1));
        let allowed = left.0 >= 1.0;
        if allowed {
            left.0 -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn as_many_at_once_as_allowed_and_then_so_many_per_second() {
        let (rate, begin) = (Rate::new(10, 3), Instant::now() + Duration::from_secs(1));
        let allowed = |at: Instant| (0..10).filter(|_| rate.allows(at)).count();
        assert_eq!((allowed(begin), allowed(begin)), (3, 0));
        assert_eq!(allowed(begin + Duration::from_millis(199)), 1);
        assert_eq!(allowed(begin + Duration::from_millis(200)), 1);
        assert_eq!(allowed(begin + Duration::from_secs(100)), 3);
    }
}
