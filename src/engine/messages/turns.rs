//! Turns: who has the same key waits for whoever has it now. A key is there as long as somebody holds it or waits for it, and
//! no longer, so no cache can forget it meanwhile and let two in at a time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::sync::OwnedMutexGuard;

type Lock = Arc<tokio::sync::Mutex<()>>;

pub struct Turns<K>(Mutex<HashMap<K, Lock>>);

/// The turn of one key, until it is dropped.
pub struct Turn<K: Eq + Hash> {
    turns: Arc<Turns<K>>,
    key: K,
    /// None: another caller still has it.
    guard: Option<OwnedMutexGuard<()>>,
}

impl<K: Clone + Eq + Hash> Turns<K> {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::default()))
    }

    /// Waits for the turn, in the order of those who ask. Whoever gives up waiting leaves nothing behind.
    pub async fn take(self: &Arc<Self>, key: K) -> Turn<K> {
        let lock = self.lock().entry(key.clone()).or_default().clone();
        let mut turn = Turn { turns: self.clone(), key, guard: None };
        turn.guard = Some(lock.lock_owned().await);
        turn
    }

    /// Whether somebody has this key's turn.
    pub fn is_taken(&self, key: &K) -> bool {
        self.lock().contains_key(key)
    }
}

impl<K> Turns<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Lock>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Turn<K> {
    fn drop(&mut self) {
        let mut turns = self.turns.lock();
        self.guard = None;
        // Others who hold or wait have a copy of the lock each; they get one only while the map is locked.
        if turns.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            turns.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn one_has_the_turn_and_the_next_in_order_and_nothing_is_left() {
        let turns = Turns::new();
        let first = turns.take(1).await;
        let other_key = turns.take(2).await;
        assert!(timeout(SOON, turns.take(1)).await.is_err(), "it is taken");
        let (a, b) = (turns.clone(), turns.clone());
        let second = tokio::spawn(async move { a.take(1).await });
        tokio::task::yield_now().await;
        let third = tokio::spawn(async move { b.take(1).await });
        tokio::task::yield_now().await;
        drop(first);
        let second = second.await.unwrap();
        assert!(!third.is_finished());
        drop(second);
        drop(third.await.unwrap());
        assert!(!turns.is_taken(&1) && turns.is_taken(&2));
        drop(other_key);
        assert_eq!(turns.lock().len(), 0);
    }

    #[tokio::test]
    async fn however_many_keys_are_held_each_stays_held() {
        let turns = Turns::new();
        let mut held = Vec::new();
        for key in 0..300_000 {
            held.push(turns.take(key).await);
        }
        assert!((0..300_000).all(|key| turns.is_taken(&key)));
        assert!(timeout(SOON, turns.take(0)).await.is_err());
    }
}
