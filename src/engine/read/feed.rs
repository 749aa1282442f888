//! What this node hears of changes, its own and those of others, for those who watch users.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use tokio::sync::Notify;

use crate::domain::id::UserId;
use crate::domain::id::Version;

/// Changes that may wait, of 16 bytes each. When there are more the reader has to look at everybody.
const QUEUE: usize = 100_000;

/// A user's change, as it is known here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Changed {
    pub user: UserId,
    /// The version of what others are shown.
    pub shown: Version,
}

#[derive(Default)]
struct Waiting {
    changes: Vec<Changed>,
    has_lost: bool,
}

/// One reader takes what many have pushed. Pushing never waits.
#[derive(Default)]
pub struct Feed {
    waiting: Mutex<Waiting>,
    pushed: Notify,
    /// Nobody reads before somebody watches.
    is_read: AtomicBool,
}

impl Feed {
    pub fn push(&self, changes: impl Iterator<Item = (UserId, Version)>) {
        if !self.is_read.load(Ordering::Acquire) {
            return;
        }
        let mut waiting = self.waiting();
        for (user, shown) in changes {
            if waiting.changes.len() >= QUEUE {
                waiting.has_lost = true;
                break;
            }
            waiting.changes.push(Changed { user, shown });
        }
        drop(waiting);
        self.pushed.notify_one();
    }

    /// From now on there is a reader. What was pushed before is not told.
    pub fn begin_reading(&self) {
        self.is_read.store(true, Ordering::Release);
    }

    /// What was pushed since the last call, in its order. True: some of it was lost.
    pub fn take(&self) -> (Vec<Changed>, bool) {
        let Waiting { changes, has_lost } = std::mem::take(&mut *self.waiting());
        (changes, has_lost)
    }

    /// Waits until there may be something to take.
    pub async fn pushed(&self) {
        self.pushed.notified().await;
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(ids: std::ops::Range<i64>) -> impl Iterator<Item = (UserId, Version)> {
        ids.map(|id| (UserId::parse(id).unwrap(), Version(1)))
    }

    #[test]
    fn what_is_pushed_is_taken_once_and_too_much_is_noticed() {
        let feed = Feed::default();
        feed.push(users(1..3));
        assert_eq!(feed.take().0.len(), 0, "nobody reads");
        feed.begin_reading();
        feed.push(users(1..3));
        feed.push(users(3..4));
        let (changes, has_lost) = feed.take();
        assert_eq!((changes.iter().map(|changed| changed.user.get()).collect::<Vec<_>>(), has_lost), (vec![1, 2, 3], false));
        feed.push(users(1..QUEUE as i64 + 2));
        assert_eq!((feed.take().1, feed.take().1), (true, false));
    }
}
