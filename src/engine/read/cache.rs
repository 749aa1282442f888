//! L1: the records of hot users, and what is under way for users right now.
//!
//! The rule is that no reader of this node is ever answered with a version older than one it acknowledged or answered
//! before. Values race: a load may have read before a change and end after it; an entry may have been evicted in between. So
//! the cache compares knowledge. L1 (evictable) holds records only; `under_way` (never evicts) holds, per user, the number of
//! loads and writes in progress and a floor: nothing older is answered or cached while anything is in progress.
//!
//! | event | what happens, under the user's shard lock |
//! |---|---|
//! | a write begins, before the row is locked | writes += 1; when it is acknowledged, writes -= 1 |
//! | COMMIT of version v returned | floor, lag = max(.., v); L1: put v if v >= floor, else drop anything older |
//! | L2 confirmed v | lag = 0 if v >= lag |
//! | hint of v | L1: drop if older than v; if something is under way, floor = max(floor, v) |
//! | a load begins | loads += 1; an answer of L2 below the floor is a miss |
//! | a load ends with v | below the floor: once more, past L2; else into L1, floor = max(.., v), answer v |
//! | loads = writes = lag = 0 | the entry goes |
//!
//! A hit in L1 touches none of this.

use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use moka::policy::EvictionPolicy;

use crate::clock::CompactInstant;
use crate::domain::id::NumberHasher;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::user::UserRecord;
use crate::engine::read::doorkeeper::Doorkeeper;

/// How far the shared cache can be behind: what a node left undone there is repaired within this time.
pub const L2_AGE: Duration = Duration::from_secs(3);
/// Shards of the map of what is under way. Power of two.
const SHARDS: usize = 64;

/// A record and how good the knowledge is.
#[derive(Debug)]
pub struct Entry {
    pub record: UserRecord,
    as_of: CompactInstant,
    /// It came from the shared cache.
    pub from_l2: bool,
    /// The trust number at the start of its load.
    trust: u32,
}

impl Entry {
    fn new(mut record: UserRecord, as_of: Instant, from_l2: bool, trust: u32) -> Self {
        record.routes.shrink_to_fit(); // one route needs no allocation of its own
        Self { record, as_of: as_of.into(), from_l2, trust }
    }

    /// Of a record that is looked at once, and not kept.
    pub fn passing(record: UserRecord, as_of: Instant) -> Self {
        Self { record, as_of: as_of.into(), from_l2: false, trust: 0 }
    }

    /// The record was complete at this instant, or later.
    pub fn as_of(&self) -> Instant {
        self.as_of.into()
    }

    /// When it was asked for, or later.
    pub fn began(&self) -> Instant {
        self.as_of() + if self.from_l2 { L2_AGE } else { Duration::ZERO }
    }
}

#[derive(Debug, Default, PartialEq)]
struct UnderWay {
    loads: u32,
    writes: u32,
    /// The trust number when the first of the writes in progress began.
    write_trust: u32,
    floor: Version,
    /// The newest version that the shared cache is not known to hold; 0: none.
    lag: Version,
}

/// What a load is allowed to do with what it read.
pub enum Loaded {
    /// Answer this. It may be newer than what was read.
    Answer(Arc<Entry>),
    /// What was read is outdated: read once more, from SQL.
    Again(LoadTicket),
}

/// A load in progress. Ends by [`Cache::end_load`], or when it is dropped.
#[must_use]
pub struct LoadTicket {
    cache: Arc<Cache>,
    /// Counted among the user's loads.
    is_open: bool,
    user: UserId,
    /// What was known for sure before the load read anything.
    floor_before: Version,
    trust: u32,
    began: Instant,
}

impl LoadTicket {
    pub fn user(&self) -> UserId {
        self.user
    }

    /// Whether the shared cache's answer may be used; below the floor it is a miss.
    pub fn accepts(&self, version: Version) -> bool {
        version >= self.floor_before
    }
}

impl Drop for LoadTicket {
    fn drop(&mut self) {
        if self.is_open {
            let mut shard = self.cache.shard(self.user);
            if let Some(under_way) = shard.get_mut(&self.user) {
                under_way.loads = under_way.loads.saturating_sub(1);
                tidy_up(&mut shard, self.user);
            }
        }
    }
}

/// Concurrent reads take no lock. What `insert` and `invalidate` did is seen by the next `get` of any thread; only the order of
/// use and evictions follow later, so L1 holds a little more than its capacity for a moment (moka's documentation,
/// "Concurrent behaviors" of `moka::sync::Cache`: <https://docs.rs/moka/latest/moka/sync/struct.Cache.html>). When it is full,
/// the least recently used entry goes, unless the new one was asked for less often lately (TinyLFU): then the new one does. By
/// measurement that finds more users than LRU alone, also beside batches that ask for everybody once. Each `get` counts as asking,
/// `contains_key` does not.
type L1 = moka::sync::Cache<UserId, Arc<Entry>, BuildHasherDefault<NumberHasher>>;

pub struct Cache {
    l1: L1,
    capacity: u64,
    doorkeeper: Doorkeeper,
    shards: Vec<Mutex<NumberMap<UserId, UnderWay>>>,
    /// Entries whose load began under a smaller number are not used.
    trust: AtomicU32,
    offers_rejected: AtomicU64,
    went_back: AtomicU64,
    /// Users with older versions may be missing in SQL.
    forgotten: AtomicU64,
}

impl Cache {
    /// Holds up to `capacity` users; with 0 nobody is held.
    pub fn new(capacity: u64) -> Arc<Self> {
        let l1 = moka::sync::Cache::builder().max_capacity(capacity).eviction_policy(EvictionPolicy::tiny_lfu());
        let l1 = l1.build_with_hasher(BuildHasherDefault::default());
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let counter = || AtomicU64::new(0);
        let (trust, offers_rejected, went_back, forgotten) = (AtomicU32::new(0), counter(), counter(), counter());
        let doorkeeper = Doorkeeper::new(capacity);
        Arc::new(Self { l1, capacity, doorkeeper, shards, trust, offers_rejected, went_back, forgotten })
    }

    /// The user's entry in L1, if it is trusted. The caller decides whether it is fresh enough.
    pub fn get(&self, user: UserId) -> Option<Arc<Entry>> {
        self.l1.get(&user).filter(|entry| entry.trust == self.trust.load(Ordering::Acquire))
    }

    /// The user's entry in L1, and whether it is trusted.
    pub fn peek(&self, user: UserId) -> Option<(Arc<Entry>, bool)> {
        let entry = self.l1.get(&user)?;
        let is_trusted = entry.trust == self.trust();
        Some((entry, is_trusted))
    }

    /// Changes whenever what was in memory before is not used any more.
    pub fn trust(&self) -> u32 {
        self.trust.load(Ordering::Acquire)
    }

    /// From now on nothing is used whose load began before this call.
    pub fn distrust(&self) {
        self.trust.fetch_add(1, Ordering::AcqRel);
    }

    /// Entries in L1.
    pub fn len(&self) -> u64 {
        self.l1.run_pending_tasks();
        self.l1.entry_count()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Users with something under way.
    pub fn under_way(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// How often an outdated record was kept out.
    pub fn offers_rejected(&self) -> u64 {
        self.offers_rejected.load(Ordering::Relaxed)
    }

    /// How often SQL was seen to hold less than it had acknowledged.
    pub fn went_back(&self) -> u64 {
        self.went_back.load(Ordering::Relaxed)
    }

    /// SQL forgets users whose last change is older than `version`.
    pub fn may_be_forgotten(&self, version: Version) {
        self.forgotten.fetch_max(version.0, Ordering::Relaxed);
    }

    /// Users whose newest version the shared cache is not known to hold, with that version.
    pub fn lagging(&self) -> Vec<(UserId, Version)> {
        let lagging = |shard: &Mutex<NumberMap<UserId, UnderWay>>| {
            let shard = lock(shard);
            shard.iter().filter(|(_, it)| it.lag > Version::NONE).map(|(user, it)| (*user, it.lag)).collect::<Vec<_>>()
        };
        self.shards.iter().flat_map(lagging).collect()
    }

    /// To be called before the user's row is locked, until the change is acknowledged or known to have failed.
    pub fn begin_write(self: &Arc<Self>, user: UserId) -> WriteGuard {
        let trust = self.trust.load(Ordering::Acquire);
        let mut shard = self.shard(user);
        let under_way = shard.entry(user).or_default();
        if under_way.writes == 0 {
            under_way.write_trust = trust;
        }
        under_way.writes += 1;
        drop(shard);
        WriteGuard { cache: self.clone(), user }
    }

    /// To be called first thing after COMMIT, in the order of the commits. `complete_at`: an instant before COMMIT was sent.
    /// `lagging`: the shared cache does not have it yet.
    pub fn committed(&self, user: UserId, record: UserRecord, complete_at: Instant, lagging: bool) {
        let version = record.version;
        let mut shard = self.shard(user);
        let under_way = shard.entry(user).or_default();
        let trust = if under_way.writes > 0 { under_way.write_trust } else { self.trust.load(Ordering::Acquire) };
        under_way.floor = under_way.floor.max(version);
        if lagging {
            under_way.lag = under_way.lag.max(version);
        }
        if version >= under_way.floor {
            self.l1.insert(user, Arc::new(Entry::new(record, complete_at, false, trust)));
        } else {
            self.drop_older(user, under_way.floor);
        }
        tidy_up(&mut shard, user);
    }

    /// The shared cache holds `version` or a newer one.
    pub fn confirmed(&self, user: UserId, version: Version) {
        let mut shard = self.shard(user);
        if let Some(under_way) = shard.get_mut(&user) {
            if version >= under_way.lag {
                under_way.lag = Version::NONE;
            }
            tidy_up(&mut shard, user);
        }
    }

    /// Another node says that `version` is committed.
    pub fn hint(&self, user: UserId, version: Version) {
        let mut shard = self.shard(user);
        self.drop_older(user, version);
        if let Some(under_way) = shard.get_mut(&user) {
            under_way.floor = under_way.floor.max(version);
        }
    }

    /// A change of `user` may have been committed or not: what L1 holds may be outdated.
    pub fn forget(&self, user: UserId) {
        let _shard = self.shard(user);
        self.l1.invalidate(&user);
    }

    /// To be called before anything is read.
    pub fn begin_load(self: &Arc<Self>, user: UserId) -> LoadTicket {
        let began = Instant::now();
        let trust = self.trust.load(Ordering::Acquire);
        let mut shard = self.shard(user);
        let under_way = shard.entry(user).or_default();
        under_way.loads += 1;
        if let Some(entry) = self.known(user).filter(|entry| entry.trust == trust) {
            under_way.floor = under_way.floor.max(entry.record.version);
        }
        LoadTicket { cache: self.clone(), is_open: true, user, floor_before: under_way.floor, trust, began }
    }

    /// A load read `record`. SQL below a floor that was known before the load began proves that the database went back in
    /// time, unless the user was forgotten: it is believed, and the caller learns of it by [`Cache::went_back`]. Not if the
    /// floor rose meanwhile: what was committed since is there.
    pub fn end_load(&self, mut ticket: LoadTicket, record: UserRecord, from_sql: bool) -> Loaded {
        let (user, version) = (ticket.user, record.version);
        let mut shard = self.shard(user);
        let under_way = shard.entry(user).or_default();
        if from_sql && version < ticket.floor_before && under_way.floor == ticket.floor_before {
            let was_erased = || self.l1.get(&user).is_some_and(|entry| entry.record.is_erased());
            let is_old = ticket.floor_before.0 < self.forgotten.load(Ordering::Relaxed);
            let is_forgotten = version == Version::NONE && (is_old || was_erased());
            if !is_forgotten && ticket.trust == self.trust.load(Ordering::Acquire) {
                self.went_back.fetch_add(1, Ordering::Relaxed);
                self.distrust();
                ticket.trust = self.trust.load(Ordering::Acquire);
            }
            *under_way = UnderWay { floor: version, lag: Version::NONE, ..*under_way };
            self.l1.invalidate(&user);
        }
        if version < under_way.floor {
            self.offers_rejected.fetch_add(1, Ordering::Relaxed);
            ticket.floor_before = under_way.floor;
            ticket.began = Instant::now();
            ticket.trust = self.trust.load(Ordering::Acquire);
            return Loaded::Again(ticket);
        }
        let as_of = if from_sql { ticket.began } else { ticket.began.checked_sub(L2_AGE).unwrap_or(ticket.began) };
        under_way.floor = version;
        under_way.loads = under_way.loads.saturating_sub(1);
        ticket.is_open = false;
        let entry = self.keep_newest(user, Entry::new(record, as_of, !from_sql, ticket.trust));
        tidy_up(&mut shard, user);
        Loaded::Answer(entry)
    }

    /// Puts `offered` into L1, unless L1 holds a newer version, or the same with fresher knowledge, or is full and the user is new.
    fn keep_newest(&self, user: UserId, offered: Entry) -> Arc<Entry> {
        let rank = |entry: &Entry| (entry.trust, entry.record.version, entry.as_of);
        let known = self.known(user);
        if let Some(newer) = known.as_ref().filter(|known| rank(known) > rank(&offered)) {
            return newer.clone();
        }
        let offered = Arc::new(offered);
        if known.is_some() || self.l1.entry_count() < self.capacity || self.doorkeeper.knows(user) {
            self.l1.insert(user, offered.clone());
        }
        offered
    }

    /// What L1 holds of a user who most often is not there, and has been asked for once already.
    fn known(&self, user: UserId) -> Option<Arc<Entry>> {
        if self.l1.contains_key(&user) { self.l1.get(&user) } else { None }
    }

    fn drop_older(&self, user: UserId, version: Version) {
        if self.known(user).is_some_and(|entry| entry.record.version < version) {
            self.offers_rejected.fetch_add(1, Ordering::Relaxed);
            self.l1.invalidate(&user);
        }
    }

    fn shard(&self, user: UserId) -> MutexGuard<'_, NumberMap<UserId, UnderWay>> {
        let number = usize::try_from(user.hash() >> 32).unwrap_or(0) % SHARDS;
        lock(&self.shards[number])
    }
}

/// A change of a user in progress.
#[must_use]
pub struct WriteGuard {
    cache: Arc<Cache>,
    user: UserId,
}

impl Drop for WriteGuard {
    fn drop(&mut self) {
        let mut shard = self.cache.shard(self.user);
        if let Some(under_way) = shard.get_mut(&self.user) {
            under_way.writes = under_way.writes.saturating_sub(1);
            tidy_up(&mut shard, self.user);
        }
    }
}

fn tidy_up(shard: &mut NumberMap<UserId, UnderWay>, user: UserId) {
    if shard.get(&user).is_some_and(|it| it.loads == 0 && it.writes == 0 && it.lag == Version::NONE) {
        shard.remove(&user);
    }
}

/// No code panics while it holds a shard, and each change of a shard is whole, so a poisoned lock is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
