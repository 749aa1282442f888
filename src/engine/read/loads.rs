//! A caller who waits for users to be loaded: one waiter per user, and one wake-up when all are there.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use tokio::sync::Notify;

use crate::engine::read::cache::Entry;
use crate::error::Error;

/// What came of loading a user.
pub type Load = Result<Arc<Entry>, Error>;

/// What a caller waits for, in the order of its users. Dropping it tells that nobody waits any more.
pub struct Loads(Arc<Shared>);

/// Receives the result of one user's load. Dropped unanswered, the user counts as finished without a result.
pub struct Waiter {
    of: Arc<Shared>,
    index: usize,
}

struct Shared {
    state: Mutex<State>,
    complete: Notify,
    abandoned: AtomicBool,
}

struct State {
    loads: Vec<Option<Load>>,
    missing: usize,
}

impl Loads {
    /// With a waiter for each of `users`.
    pub fn of(users: usize) -> (Self, impl Iterator<Item = Waiter>) {
        let state = Mutex::new(State { loads: vec![None; users], missing: users });
        let shared = Arc::new(Shared { state, complete: Notify::new(), abandoned: AtomicBool::new(false) });
        let of = shared.clone();
        (Self(shared), (0..users).map(move |index| Waiter { of: of.clone(), index }))
    }

    /// Waits until nothing is missing.
    pub async fn complete(&self) {
        while self.0.state().missing > 0 {
            self.0.complete.notified().await;
        }
    }

    /// What is there by now.
    pub fn take(self) -> Vec<Option<Load>> {
        std::mem::take(&mut self.0.state().loads)
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        self.0.abandoned.store(true, Ordering::Relaxed);
    }
}

impl Waiter {
    pub fn is_awaited(&self) -> bool {
        !self.of.abandoned.load(Ordering::Relaxed)
    }

    pub fn answer(self, load: Load) {
        if let Some(waiter) = self.of.state().loads.get_mut(self.index) {
            *waiter = Some(load);
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.of.state();
        state.missing -= 1;
        if state.missing == 0 {
            self.of.complete.notify_one();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
