//! How one delivery went, step by step, for an operator who wants to see it. Kept nowhere, and nobody else pays for it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

/// A message to many devices that is tried often makes more; what does not fit is counted.
const MAX_STEPS: usize = 500;

/// The steps of one delivery.
pub struct Steps {
    began: Instant,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    steps: Vec<Step>,
    left_out: usize,
}

/// What happened, and to whom. What a step is not about is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Since the delivery began.
    pub at: Duration,
    pub took: Duration,
    /// As `DeliveryStep.what` in presence.proto.
    pub what: &'static str,
    pub node: String,
    pub gateway: String,
    pub device: String,
    /// For people.
    pub detail: String,
}

impl Steps {
    pub fn begin() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), taken: Mutex::default() })
    }

    /// Adds one that began at `since` and is over.
    pub(super) fn note(&self, what: &'static str, since: Instant, tell: impl FnOnce(&mut Step)) {
        let (at, took) = (since.saturating_duration_since(self.began), since.elapsed());
        let mut taken = self.lock();
        if taken.steps.len() < MAX_STEPS {
            let mut step = Step { at, took, what, ..Step::default() };
            tell(&mut step);
            taken.steps.push(step);
        } else {
            taken.left_out += 1;
        }
    }

    /// By when they began.
    pub fn list(&self) -> Vec<Step> {
        let taken = self.lock();
        let mut steps = taken.steps.clone();
        steps.sort_by_key(|step| step.at);
        if taken.left_out > 0 {
            let at = steps.last().map_or(Duration::ZERO, |step| step.at);
            let detail = format!("{} further steps", taken.left_out);
            steps.push(Step { at, what: "left_out", detail, ..Step::default() });
        }
        steps
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_bounded_and_stand_in_the_order_in_which_they_began() {
        let steps = Steps::begin();
        let (first, second) = (Instant::now(), Instant::now() + Duration::from_millis(1));
        steps.note("acked", second, |_| {});
        steps.note("handed", first, |step| step.gateway = "gw-1:7000".to_owned());
        let whats: Vec<_> = steps.list().iter().map(|step| step.what).collect();
        assert_eq!(whats, ["handed", "acked"], "a device may have it before its node hears that it was handed over");
        for _ in 0..MAX_STEPS {
            steps.note("retried", Instant::now(), |_| {});
        }
        let list = steps.list();
        let last = list.last().unwrap();
        assert_eq!((list.len(), last.what, &*last.detail), (MAX_STEPS + 1, "left_out", "2 further steps"));
    }
}
