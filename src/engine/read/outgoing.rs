//! What this node has to tell the others, as numbered messages of which one at a time is under way. Whoever changes meanwhile
//! goes with the next one: the slower the queue is, the more users share a message, and nobody waits for more than two.
//!
//! A message says when it was made, and whoever hears it takes for known what had been noted by then. So each takes all who wait,
//! a beat too, and its time is from before they were looked at.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Instant;

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

/// What goes out.
pub struct Message {
    pub number: u64,
    /// Everybody is in it, or in one before, who was noted by then.
    pub made: Instant,
    pub users: Vec<ChangedUser>,
}

impl Outgoing {
    /// These go with the next message. Before a change is acknowledged its users are noted here, or in a cache that all share.
    pub fn note(&self, users: Vec<ChangedUser>) {
        self.waiting().extend(users);
    }

    /// Returns when a message with all who were noted has been sent, or could not be, by this caller or another. A caller that
    /// gives up leaves them to the next. If the queue is not `up` they are left out, and missed.
    pub async fn tell(&self, up: impl FnOnce() -> bool, send: impl AsyncFnOnce(Message)) {
        let mut sent = self.sent.lock().await;
        let (made, users) = (Instant::now(), self.waiting().clone());
        if users.is_empty() {
            return;
        }
        let count = users.len();
        if up() {
            *sent += 1 + self.skipped.swap(0, Ordering::Relaxed);
            send(Message { number: *sent, made, users }).await;
        } else {
            self.skipped.fetch_add(1, Ordering::Relaxed);
        }
        self.waiting().drain(..count);
    }

    /// Sends a message in any case. Without users it has the number of the last one with some.
    pub async fn beat<T>(&self, send: impl AsyncFnOnce(Message) -> T) -> T {
        let mut sent = self.sent.lock().await;
        let (made, users) = (Instant::now(), self.waiting().clone());
        let count = users.len();
        *sent += u64::from(count > 0) + self.skipped.swap(0, Ordering::Relaxed);
        let done = send(Message { number: *sent, made, users }).await;
        self.waiting().drain(..count);
        done
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

    fn log(log: &Log, message: &Message) {
        let versions = message.users.iter().map(|user| user.version).collect();
        log.lock().expect("a test").push((message.number, versions));
    }

    #[tokio::test]
    async fn who_changes_while_a_message_is_under_way_goes_with_the_next_one() {
        let (outgoing, sent, arrived) = (Outgoing::default(), &Log::default(), &Notify::new());
        let tell = async |version| {
            outgoing.note(changed(version));
            outgoing.tell(|| true, async |message| log(sent, &message)).await;
        };
        let slow = async {
            outgoing.note(changed(1));
            let send = async |message: Message| {
                arrived.notified().await;
                log(sent, &message);
            };
            outgoing.tell(|| true, send).await;
        };
        tokio::join!(biased; slow, tell(2), tell(3), tell(4), async { arrived.notify_one() });
        outgoing.beat(async |message| log(sent, &message)).await;
        assert_eq!(*sent.lock().expect("a test"), [(1, vec![1]), (2, vec![2, 3, 4]), (2, vec![])]);
    }

    #[tokio::test]
    async fn whoever_gives_up_leaves_its_users_to_the_next_and_a_queue_that_is_down_leaves_a_gap() {
        let (outgoing, sent) = (Outgoing::default(), &Log::default());
        let tell = async |version, up| {
            outgoing.note(changed(version));
            outgoing.tell(|| up, async |message| log(sent, &message)).await;
        };
        outgoing.note(changed(1));
        let lost = outgoing.tell(|| true, async |_| std::future::pending().await);
        timeout(Duration::from_millis(1), lost).await.expect_err("it never arrives");
        tell(2, true).await;
        tell(3, false).await;
        tell(4, true).await;
        assert_eq!(*sent.lock().expect("a test"), [(2, vec![1, 2]), (4, vec![4])]);
        tell(5, false).await;
        outgoing.beat(async |message| log(sent, &message)).await;
        assert_eq!(sent.lock().expect("a test").last(), Some(&(5, vec![])));
    }

    #[tokio::test]
    async fn a_beat_takes_along_who_waits_and_says_nothing_of_who_is_noted_after_it_was_made() {
        let (outgoing, sent) = (Outgoing::default(), &Log::default());
        outgoing.note(changed(1));
        let noted = outgoing.beat(async |message| {
            log(sent, &message);
            outgoing.note(changed(2));
            Instant::now() > message.made
        });
        assert!(noted.await, "whoever is noted now is not spoken of");
        outgoing.beat(async |message| log(sent, &message)).await;
        outgoing.beat(async |message| log(sent, &message)).await;
        assert_eq!(*sent.lock().expect("a test"), [(1, vec![1]), (2, vec![2]), (2, vec![])]);
    }
}
