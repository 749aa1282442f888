//! Users whose stored messages are to be delivered: each by one task at a time, and again if more came meanwhile.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::sync::Notify;

use crate::domain::id::UserId;

/// Users that may wait; further ones are found by the next regular look.
const QUEUE: usize = 100_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Busy,
    /// Busy, and asked for again meanwhile.
    BusyAgain,
}

#[derive(Default)]
struct Users {
    order: VecDeque<UserId>,
    states: HashMap<UserId, State>,
}

/// Users whose stored messages are to be delivered. Writing fills it, the inbox empties it.
#[derive(Default)]
pub struct InboxQueue {
    users: Mutex<Users>,
    wake: Notify,
}

impl InboxQueue {
    /// Has a user's messages delivered soon. If the queue is full the next regular look finds the user.
    pub fn wake(&self, user: UserId) {
        let mut users = self.lock();
        match users.states.get(&user) {
            Some(State::Waiting | State::BusyAgain) => return,
            Some(State::Busy) => {
                users.states.insert(user, State::BusyAgain);
                return;
            }
            None if users.order.len() >= QUEUE => return,
            None => users.enqueue(user),
        }
        drop(users);
        self.wake.notify_one();
    }

    /// Waits for the next user, who is then this caller's until [`InboxQueue::done`].
    pub async fn next(&self) -> UserId {
        loop {
            if let Some(user) = self.take() {
                return user;
            }
            self.wake.notified().await;
        }
    }

    pub fn take(&self) -> Option<UserId> {
        let mut users = self.lock();
        let user = users.order.pop_front()?;
        users.states.insert(user, State::Busy);
        if !users.order.is_empty() {
            self.wake.notify_one();
        }
        Some(user)
    }

    /// The user's messages were delivered, as far as that went.
    pub fn done(&self, user: UserId) {
        let mut users = self.lock();
        if users.states.remove(&user) == Some(State::BusyAgain) {
            users.enqueue(user);
            self.wake.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Users {
    fn enqueue(&mut self, user: UserId) {
        self.states.insert(user, State::Waiting);
        self.order.push_back(user);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(id: i64) -> UserId {
        UserId::parse(id).unwrap()
    }

    #[test]
    fn a_user_is_drained_by_one_at_a_time_and_again_if_asked_for_meanwhile() {
        let queue = InboxQueue::default();
        queue.wake(user(1));
        queue.wake(user(1));
        queue.wake(user(2));
        assert_eq!(queue.take(), Some(user(1)));
        assert_eq!(queue.take(), Some(user(2)));
        queue.wake(user(1)); // while it is being drained
        queue.wake(user(1));
        assert_eq!(queue.take(), None);
        queue.done(user(2));
        queue.done(user(1));
        assert_eq!(queue.take(), Some(user(1)));
        queue.done(user(1));
        assert_eq!(queue.take(), None);
        assert!(queue.lock().states.is_empty());
    }
}
