//! What this node has to tell the others, as numbered messages of which one at a time is under way. Whoever changes meanwhile
//! goes with the next one: the slower the queue is, the more users share a message, and nobody waits for more than two.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::store::codec::ChangedUser;

#[derive(Default)]
pub struct Outgoing {
    /// The number of the last message with users. Held while sending: numbers have to go out in order.
    sent: tokio::sync::Mutex<u64>,
    /// Messages that were not even tried because the queue is down; they count, so that others see the gap.
    skipped: AtomicU64,
    /// Who is in no message that has gone out.
    waiting: Mutex<Vec<ChangedUser>>,
}

impl Outgoing {
    /// Returns when a message with `users` has been sent, or could not be, by this caller or another. A caller that gives up
    /// while sending leaves them to the next. If the queue is not `up` they are left out, and missed.
    pub async fn tell(&self, users: Vec<ChangedUser>, up: impl FnOnce() -> bool, send: impl AsyncFnOnce(u64, Vec<ChangedUser>)) {
        self.waiting().extend(users);
        let mut sent = self.sent.lock().await;
        let users = self.waiting().clone();
        if users.is_empty() {
            return;
        }
        let count = users.len();
        if up() {
            *sent += 1 + self.skipped.swap(0, Ordering::Relaxed);
            send(*sent, users).await;
        } else {
            self.skipped.fetch_add(1, Ordering::Relaxed);
        }
        self.waiting().drain(..count);
    }

    /// Sends a message without users, which has the number of the last one with some.
    pub async fn beat<T>(&self, send: impl AsyncFnOnce(u64) -> T) -> T {
        let mut sent = self.sent.lock().await;
        *sent += self.skipped.swap(0, Ordering::Relaxed);
        send(*sent).await
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<ChangedUser>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;
    use tokio::time::Duration;
    use tokio::time::timeout;

    use super::*;

    /// What went out: numbers, and users by their versions.
    type Log = Mutex<Vec<(u64, Vec<u64>)>>;

    fn changed(version: u64) -> Vec<ChangedUser> {
        vec![ChangedUser { version, ..ChangedUser::default() }]
    }

    fn note(log: &Log, number: u64, users: &[ChangedUser]) {
        log.lock().expect("a test").push((number, users.iter().map(|user| user.version).collect()));
    }

    #[tokio::test]
    async fn who_changes_while_a_message_is_under_way_goes_with_the_next_one() {
        let (outgoing, log, arrived) = (Outgoing::default(), &Log::default(), &Notify::new());
        let tell = |version| outgoing.tell(changed(version), || true, async move |number, users| note(log, number, &users));
        let slow = outgoing.tell(
            changed(1),
            || true,
            async move |number, users| {
                arrived.notified().await;
                note(log, number, &users);
            },
        );
        tokio::join!(biased; slow, tell(2), tell(3), tell(4), async { arrived.notify_one() });
        outgoing.beat(async |number| note(log, number, &[])).await;
        assert_eq!(*log.lock().expect("a test"), [(1, vec![1]), (2, vec![2, 3, 4]), (2, vec![])]);
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_its_users_to_the_next_and_a_queue_that_is_down_leaves_a_gap() {
        let (outgoing, log) = (Outgoing::default(), &Log::default());
        let note = |number, users: &[ChangedUser]| note(log, number, users);
        let tell = |version, up| outgoing.tell(changed(version), move || up, async move |number, users| note(number, &users));
        let lost = outgoing.tell(changed(1), || true, async |_, _| std::future::pending().await);
        timeout(Duration::from_millis(1), lost).await.expect_err("it never arrives");
        tell(2, true).await;
        tell(3, false).await;
        tell(4, true).await;
        assert_eq!(*log.lock().expect("a test"), [(2, vec![1, 2]), (4, vec![4])]);
        tell(5, false).await;
        outgoing.beat(async |number| note(number, &[])).await;
        assert_eq!(log.lock().expect("a test").last(), Some(&(5, vec![])));
    }
}
