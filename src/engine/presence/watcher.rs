//! One stream's set, shared with whoever fills it.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Instant;

use tokio::sync::Notify;

use crate::domain::id::UserId;
use crate::engine::presence::set::Set;

/// One stream's set, shared with whoever fills it.
pub struct Watcher {
    set: Mutex<Set>,
    changed: Notify,
}

impl Watcher {
    pub fn new(began: Instant) -> Self {
        Self { set: Mutex::new(Set::new(began)), changed: Notify::new() }
    }

    /// Something has changed that the stream has to look at.
    pub fn wake(&self) {
        self.changed.notify_one();
    }

    /// Waits for that; also if it was before.
    pub async fn woken(&self) {
        self.changed.notified().await;
    }

    pub fn set(&self) -> MutexGuard<'_, Set> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the stream look at a user. False: it was to do so already.
    pub fn mark(&self, user: UserId, certain: Option<u64>) -> bool {
        let is_first = self.set().mark(user, certain);
        self.wake();
        is_first
    }

    pub fn give_up(&self, user: UserId) {
        self.set().give_up(user);
        self.wake();
    }
}
