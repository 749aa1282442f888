//! Connections that have not said yet what they want. They are few: when one more comes than may wait, the oldest has had
//! its chance and is closed. So those who say nothing keep nobody out who does.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio_util::sync::CancellationToken;

pub struct Newcomers {
    limit: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    last: u64,
    by_arrival: BTreeMap<u64, CancellationToken>,
}

/// One of them, until it is dropped or has settled.
pub struct Newcomer {
    newcomers: Arc<Newcomers>,
    number: u64,
    closed: CancellationToken,
}

impl Newcomers {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, waiting: Mutex::default() })
    }

    pub fn enter(self: &Arc<Self>) -> Newcomer {
        let (mut waiting, closed) = (self.lock(), CancellationToken::new());
        waiting.last += 1;
        let number = waiting.last;
        waiting.by_arrival.insert(number, closed.clone());
        if waiting.by_arrival.len() > self.limit
            && let Some((_, oldest)) = waiting.by_arrival.pop_first()
        {
            oldest.cancel();
        }
        Newcomer { newcomers: self.clone(), number, closed }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Newcomer {
    /// It has said what it wants, and makes room for nobody any more.
    pub fn settle(&self) {
        self.newcomers.lock().by_arrival.remove(&self.number);
    }

    /// Waits until it has to make room.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_has_said_nothing_makes_room() {
        let newcomers = Newcomers::new(2);
        let (first, second) = (newcomers.enter(), newcomers.enter());
        first.settle();
        let third = newcomers.enter();
        assert!(![&first, &second, &third].iter().any(|one| one.closed.is_cancelled()));
        let _fourth = newcomers.enter();
        assert!(second.closed.is_cancelled() && !first.closed.is_cancelled() && !third.closed.is_cancelled());
        drop(third);
        let _fifth = newcomers.enter();
        assert_eq!(newcomers.lock().by_arrival.len(), 2);
    }
}
