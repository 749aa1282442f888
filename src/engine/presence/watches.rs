//! Streams that watch users: what they ask for, within limits, and what they are told.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep_until;

use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::engine::presence::interest::Interest;
use crate::engine::presence::interest::SHARDS;
pub use crate::engine::presence::set::Damping;
pub use crate::engine::presence::set::Done;
use crate::engine::presence::set::Next;
use crate::engine::presence::set::Set;
pub use crate::engine::presence::set::Telling;
use crate::engine::presence::watcher::Watcher;
use crate::engine::read::feed::Feed;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::metrics::Metrics;

/// Requests of one stream whose answers may wait, of 64 bytes each. When there are as many, no more are read.
const MAX_UNANSWERED: usize = 4_096;

/// How much may be watched, and how it is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub damping: Damping,
    pub max_users_per_stream: usize,
    pub max_users: usize,
    pub max_streams: usize,
    /// Users per second that are looked at when all have to be.
    pub resync_rate: u32,
}

/// What a caller wants to be told of.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    pub seq: u64,
    /// With the newest version that the caller has; 0: none.
    pub add: Vec<(UserId, u64)>,
    pub remove: Vec<UserId>,
}

/// What a stream is told.
#[derive(Clone, Debug)]
pub enum Told {
    Presence(Telling),
    Done(Done),
}

/// A user who has to be read: they were added, or the caller knows of a newer version than this node.
#[derive(Clone, Copy, Debug)]
pub struct Added {
    pub user: UserId,
    pub floor: u64,
}

/// A stream that has ended, and users that it has watched.
pub struct Ended {
    watcher: Arc<Watcher>,
    users: Vec<UserId>,
}

/// All watches of a node.
pub struct Watches {
    pub interest: Interest,
    pub feed: Arc<Feed>,
    pub lives: Arc<Lives>,
    pub metrics: Arc<Metrics>,
    pub settings: Settings,
    streams: AtomicUsize,
    pairs: AtomicUsize,
    added: Mutex<Vec<Added>>,
    /// Sets of streams that have ended.
    ended: Mutex<Vec<Arc<Watcher>>>,
    pub wake: Notify,
}

/// One stream that watches. Dropping it ends that.
pub struct Watch {
    watches: Arc<Watches>,
    watcher: Arc<Watcher>,
}

impl Watches {
    pub fn new(settings: Settings, feed: Arc<Feed>, lives: Arc<Lives>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self {
            interest: Interest::default(),
            feed,
            lives,
            metrics,
            settings,
            streams: AtomicUsize::new(0),
            pairs: AtomicUsize::new(0),
            added: Mutex::default(),
            ended: Mutex::default(),
            wake: Notify::new(),
        })
    }

    /// # Errors
    /// As many streams as may watch already: [`Error::Overloaded`].
    pub fn open(self: &Arc<Self>) -> Result<Watch, Error> {
        if self.streams.fetch_add(1, Ordering::Relaxed) >= self.settings.max_streams {
            self.streams.fetch_sub(1, Ordering::Relaxed);
            self.metrics.shed("watches");
            return Err(Error::overloaded("as many streams watch on this node as may (watch.max_streams)"));
        }
        self.feed.begin_reading();
        let watcher = Arc::new(Watcher::new(Instant::now()));
        Ok(Watch { watches: self.clone(), watcher })
    }

    pub fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Users of all streams, each as often as it is watched.
    pub fn pairs(&self) -> usize {
        self.pairs.load(Ordering::Relaxed)
    }

    /// The users who are watched most, and by how many streams. Others have their turn in between.
    pub async fn most_watched(&self, count: usize) -> Vec<(UserId, usize)> {
        let mut most = Vec::new();
        for shard in 0..SHARDS {
            most.extend(self.interest.most_watched(shard, count));
            most.sort_unstable_by_key(|(user, watches)| (Reverse(*watches), *user));
            most.truncate(count);
            yield_now().await;
        }
        most
    }

    /// Users that were added since the last call.
    pub fn take_added(&self) -> Vec<Added> {
        std::mem::take(&mut *self.added.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A stream that has ended, and the users that it watched, if there is one.
    pub fn take_ended(&self) -> Option<Ended> {
        let watcher = self.ended.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        let users = watcher.set().take_all();
        Some(Ended { watcher, users })
    }

    /// Forgets some of the users of a stream that has ended. False: there are more.
    pub fn forget(&self, ended: &mut Ended) -> bool {
        /// Users forgotten before others have their turn.
        const PART: usize = 1_000;
        let part = ended.users.split_off(ended.users.len().saturating_sub(PART));
        part.iter().for_each(|user| self.interest.forget(*user, &ended.watcher));
        self.pairs.fetch_sub(part.len(), Ordering::Relaxed);
        ended.users.is_empty()
    }

    fn take_place(&self, users: usize) -> bool {
        let is_there = self.pairs.fetch_add(users, Ordering::Relaxed) + users <= self.settings.max_users;
        if !is_there {
            self.pairs.fetch_sub(users, Ordering::Relaxed);
        }
        is_there
    }
}

impl Watch {
    /// Changes the set. What came of it is told in its turn.
    pub fn change(&self, wanted: &Wanted) {
        let (watches, mut set) = (&*self.watches, self.watcher.set());
        self.remove(&mut set, &wanted.remove);
        let mut fresh: Vec<UserId> = wanted.add.iter().map(|(user, _)| *user).filter(|user| !set.contains(*user)).collect();
        fresh.sort_unstable();
        fresh.dedup();
        if let Some(why) = self.over_limit(set.len(), fresh.len()) {
            set.refuse(wanted.seq, why);
        } else {
            set.begin(wanted.seq);
            let mut to_read = Vec::new();
            for (user, known) in &wanted.add {
                let is_fresh = !set.contains(*user);
                set.add(*user, *known);
                let shown =
                    if is_fresh { watches.interest.register(*user, &self.watcher) } else { watches.interest.shown(*user) };
                match shown.filter(|shown| shown.token >= *known) {
                    Some(_) => _ = set.mark(*user, None),
                    None => to_read.push(Added { user: *user, floor: *known }),
                }
            }
            watches.added.lock().unwrap_or_else(PoisonError::into_inner).extend(to_read);
        }
        drop(set);
        watches.wake.notify_one();
        self.watcher.wake();
    }

    /// A request that may not add anybody; its removals are done.
    pub fn refuse(&self, wanted: &Wanted, why: String) {
        let mut set = self.watcher.set();
        self.remove(&mut set, &wanted.remove);
        set.refuse(wanted.seq, why);
        drop(set);
        self.watcher.wake();
    }

    fn remove(&self, set: &mut Set, users: &[UserId]) {
        for user in users {
            if set.remove(*user) {
                self.watches.interest.forget(*user, &self.watcher);
                self.watches.pairs.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether more requests may come: a caller who reads no answers asks nothing more.
    pub fn takes_more(&self) -> bool {
        self.watcher.set().unanswered() < MAX_UNANSWERED
    }

    fn over_limit(&self, has: usize, more: usize) -> Option<String> {
        let Settings { max_users_per_stream, max_users, .. } = self.watches.settings;
        if has + more > max_users_per_stream {
            return Some(format!(
                "a stream may watch {max_users_per_stream} users (watch.max_users_per_stream), not {}",
                has + more
            ));
        }
        let is_there = self.watches.take_place(more);
        (!is_there).then(|| format!("all streams of this node may watch {max_users} users (watch.max_users): try another node"))
    }

    /// What the stream is to be told next. Nothing is lost if this is given up.
    pub async fn next(&self) -> Told {
        loop {
            let next = {
                let (interest, damping) = (&self.watches.interest, &self.watches.settings.damping);
                let mut set = self.watcher.set();
                let next = set.next(Instant::now(), damping, |user| interest.shown(user));
                self.watches.metrics.presence.watch_damped.inc_by(set.take_damped());
                next
            };
            match next {
                Next::Tell(telling) => {
                    self.count(&telling);
                    return Told::Presence(telling);
                }
                Next::Done(done) => return Told::Done(done),
                Next::Wait(None) => self.watcher.woken().await,
                Next::Wait(Some(due)) => tokio::select! {
                    () = self.watcher.woken() => {}
                    () = sleep_until(due.into()) => {}
                },
            }
        }
    }

    fn count(&self, telling: &Telling) {
        let metrics = &self.watches.metrics.presence;
        metrics.watch_told.inc();
        if telling.is_direct {
            // A version is the database's time, in microseconds.
            let changed = Timestamp(i64::try_from(telling.shown.token / 1_000).unwrap_or(i64::MAX));
            metrics.watch_lag_seconds.observe(self.watches.lives.clock.now().since(changed).as_secs_f64());
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watches.streams.fetch_sub(1, Ordering::Relaxed);
        self.watches.ended.lock().unwrap_or_else(PoisonError::into_inner).push(self.watcher.clone());
        self.watches.wake.notify_one();
    }
}
