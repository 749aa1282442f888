//! Which users are watched, by which streams, and what is shown of them: the node's one copy, however many watch.

use std::cmp::Reverse;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;

use crate::domain::id::Epochs;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::engine::presence::shown::Shown;
use crate::engine::presence::watcher::Watcher;

/// Power of two.
pub const SHARDS: usize = 64;

/// A watched user.
struct Watched {
    /// None: not read yet.
    shown: Option<Arc<Shown>>,
    watchers: Watchers,
}

/// Most users are watched by one stream, and there are millions of them.
enum Watchers {
    One(Arc<Watcher>),
    #[expect(clippy::box_collection, reason = "one word beside the tag, not three")]
    Many(Box<Vec<Arc<Watcher>>>),
}

/// Which users are watched. A hint of anybody else costs one look into it.
pub struct Interest {
    shards: Vec<Mutex<NumberMap<UserId, Watched>>>,
    users: AtomicUsize,
}

/// What came of a reading.
pub struct Settled {
    pub watchers: SmallVec<[Arc<Watcher>; 1]>,
    /// It looks different from before.
    pub is_new: bool,
}

impl Default for Interest {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), users: AtomicUsize::new(0) }
    }
}

impl Interest {
    /// From now on changes of the user are noticed. Returns what is shown, if that is known.
    pub fn register(&self, user: UserId, watcher: &Arc<Watcher>) -> Option<Arc<Shown>> {
        let mut shard = self.shard_of(user);
        match shard.entry(user) {
            Entry::Occupied(mut watched) => {
                watched.get_mut().watchers.push(watcher.clone());
                watched.get().shown.clone()
            }
            Entry::Vacant(free) => {
                self.users.fetch_add(1, Ordering::Relaxed);
                free.insert(Watched { shown: None, watchers: Watchers::One(watcher.clone()) });
                None
            }
        }
    }

    /// The watcher has no interest in the user any more.
    pub fn forget(&self, user: UserId, watcher: &Arc<Watcher>) {
        let mut shard = self.shard_of(user);
        let Some(watched) = shard.get_mut(&user) else { return };
        if watched.watchers.remove(watcher) {
            shard.remove(&user);
            self.users.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub fn shown(&self, user: UserId) -> Option<Arc<Shown>> {
        self.shard_of(user).get(&user)?.shown.clone()
    }

    pub fn is_watched(&self, user: UserId) -> bool {
        self.shard_of(user).contains_key(&user)
    }

    pub fn watchers(&self, user: UserId) -> SmallVec<[Arc<Watcher>; 1]> {
        self.shard_of(user).get(&user).map(|watched| watched.watchers.all().into()).unwrap_or_default()
    }

    /// Takes over what was read. None: nobody watches the user any more.
    pub fn settle(&self, user: UserId, shown: Shown) -> Option<Settled> {
        let mut shard = self.shard_of(user);
        let watched = shard.get_mut(&user)?;
        let is_new = watched.shown.as_ref().is_none_or(|before| before.content != shown.content);
        watched.shown = Some(Arc::new(shown));
        Some(Settled { watchers: watched.watchers.all().into(), is_new })
    }

    /// Users that are watched.
    pub fn len(&self) -> usize {
        self.users.load(Ordering::Relaxed)
    }

    /// All users of one part of [`SHARDS`].
    pub fn users_of(&self, shard: usize) -> Vec<UserId> {
        lock(&self.shards[shard]).keys().copied().collect()
    }

    /// The users of one part who are watched most, and by how many streams, in no order.
    pub fn most_watched(&self, shard: usize, count: usize) -> Vec<(UserId, usize)> {
        let watched = |(user, watched): (&UserId, &Watched)| (*user, watched.watchers.all().len());
        let mut users: Vec<_> = lock(&self.shards[shard]).iter().map(watched).collect();
        if users.len() > count {
            users.select_nth_unstable_by_key(count, |(user, watches)| (Reverse(*watches), *user));
            users.truncate(count);
        }
        users
    }

    /// Users of one part whom the end of one of these lives may concern.
    pub fn users_on(&self, shard: usize, ended: &Epochs) -> Vec<UserId> {
        let is_on = |watched: &Watched| watched.shown.as_ref().is_some_and(|shown| shown.is_on(ended));
        lock(&self.shards[shard]).iter().filter(|(_, watched)| is_on(watched)).map(|(user, _)| *user).collect()
    }

    fn shard_of(&self, user: UserId) -> MutexGuard<'_, NumberMap<UserId, Watched>> {
        lock(&self.shards[usize::try_from(user.hash() >> 32).unwrap_or(0) % SHARDS])
    }
}

impl Watchers {
    fn all(&self) -> &[Arc<Watcher>] {
        match self {
            Self::One(watcher) => std::slice::from_ref(watcher),
            Self::Many(watchers) => watchers,
        }
    }

    fn push(&mut self, watcher: Arc<Watcher>) {
        match self {
            Self::One(first) => *self = Self::Many(Box::new(vec![first.clone(), watcher])),
            Self::Many(watchers) => watchers.push(watcher),
        }
    }

    /// True: nobody watches any more.
    fn remove(&mut self, watcher: &Arc<Watcher>) -> bool {
        match self {
            Self::One(only) => Arc::ptr_eq(only, watcher),
            Self::Many(watchers) => {
                if let Some(place) = watchers.iter().position(|other| Arc::ptr_eq(other, watcher)) {
                    watchers.swap_remove(place);
                }
                watchers.is_empty()
            }
        }
    }
}

/// No code panics while it holds a shard, so a poisoned lock is as good as any.
fn lock(shard: &Mutex<NumberMap<UserId, Watched>>) -> MutexGuard<'_, NumberMap<UserId, Watched>> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}
