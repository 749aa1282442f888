//! L2 as this node may use it: whether it can be believed now, and in which generation.
//!
//! A connection is believed once the server's identity was compared with the one that the generation belongs to, and for as
//! long as that was done lately. A server with another identity may hold old data: then the generation is raised, which
//! makes every record it holds a miss, and empties the memory of all nodes.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU8;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing::warn;

use crate::clock::AtomicInstant;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::domain::user::UserRecord;
use crate::engine::read::cache::Cache;
use crate::engine::read::cache::L2_AGE;
use crate::engine::read::hints::Hints;
use crate::metrics::Metrics;
use crate::store::cluster::ClusterRow;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;
use crate::store::link_error::LinkError;
use crate::store::shared::Owner;
use crate::store::shared::SharedCache;
use crate::store::shared::Shown;
use crate::store::shared::Versions;
use crate::store::users::Records;

/// How long a reader waits for L2 before it asks SQL.
const READ_BUDGET: Duration = Duration::from_millis(50);
/// Reads in a row without an answer after which L2 is left out until the next check succeeds.
const MAX_TIMEOUTS: u32 = 3;
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const CHECK_LIMIT: Duration = Duration::from_millis(500);
/// How long a check is good for.
const CHECKED_FOR: Duration = Duration::from_secs(3);
/// The store's name is there for longer after it was written.
const CLAIMED_FOR: Duration = Duration::from_secs(5);
/// Of two searches that end after the server was last seen to evict, one has begun after that.
const SEARCHES: u8 = 2;
/// A change that waits for longer to be shown there is a sign that something is wrong.
const BEHIND_AFTER: Duration = Duration::from_secs(5);
const EVICTION_WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// A fill whose load is older than this might undo something.
const FILL_LIMIT: Duration = Duration::from_secs(1);
/// After this long without L2 what waits in the outbox is given up for a new generation.
const AWAY_LIMIT: Duration = Duration::from_secs(30);

pub struct L2 {
    shared: SharedCache,
    generation: AtomicU64,
    /// The connection whose server was checked; 0: none.
    checked: AtomicU64,
    checked_at: AtomicInstant,
    timeouts: AtomicU32,
    /// Nothing is missing there for longer than answers say, and nothing that this node has answered.
    complete: AtomicBool,
    /// How often everybody's keys have to be looked for: the server removes, or has removed, keys that have to stay.
    searches: AtomicU8,
    metrics: Arc<Metrics>,
}

impl L2 {
    pub fn new(shared: SharedCache, metrics: Arc<Metrics>) -> Arc<Self> {
        let (generation, checked, timeouts) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU32::new(0));
        let (complete, searches) = (AtomicBool::new(false), AtomicU8::new(0));
        let checked_at = AtomicInstant::never();
        Arc::new(Self { shared, generation, checked, checked_at, timeouts, complete, searches, metrics })
    }

    /// The generation whose records callers may be answered with. It is looked at first: a new one begins incomplete.
    pub fn believed(&self) -> Option<u64> {
        let generation = self.generation();
        (self.is_usable() && self.complete.load(Ordering::Acquire)).then_some(generation)
    }

    /// Whether it answers, and is the server it should be.
    pub fn is_usable(&self) -> bool {
        self.checked.load(Ordering::Acquire) != 0
            && self.checked_at.age(Instant::now()) < CHECKED_FOR
            && self.timeouts.load(Ordering::Relaxed) < MAX_TIMEOUTS
    }

    /// The records it has of `users` in `generation`, for readers. Nothing if it is not usable, or takes too long.
    pub async fn read(&self, users: &[UserId], generation: u64) -> Records {
        if users.is_empty() || !self.is_usable() {
            return Records::default();
        }
        let found = self.shared.read(users, generation, READ_BUDGET).await;
        match self.answered(found.map(|found| (found.connection, found))) {
            Some(found) => {
                self.metrics.l2_hits.inc_by(found.records.len() as u64);
                self.metrics.l2_misses.inc_by((users.len() - found.records.len()) as u64);
                self.metrics.rejected("l2", found.outdated);
                self.metrics.rejected("another_store", found.foreign);
                found.records
            }
            None => Records::default(),
        }
    }

    /// Why nobody is answered from it. None: it is believed.
    pub fn doubt(&self) -> Option<&'static str> {
        match (self.is_usable(), self.complete.load(Ordering::Acquire)) {
            (true, true) => None,
            (true, false) => Some("changes may be missing there"),
            (false, _) => Some("it does not answer, or was not checked lately"),
        }
    }

    /// The versions it has of `users`. Nothing if it is not usable, or takes too long.
    pub async fn versions(&self, users: &[UserId]) -> Versions {
        if users.is_empty() || !self.is_usable() {
            return Versions::default();
        }
        self.answered(self.shared.versions(users, self.generation(), READ_BUDGET).await).unwrap_or_default()
    }

    /// What a connection said, if its server was checked.
    fn answered<T>(&self, said: Result<(u64, T), LinkError>) -> Option<T> {
        match said {
            Ok((connection, found)) if connection == self.checked.load(Ordering::Acquire) => {
                self.timeouts.store(0, Ordering::Relaxed);
                Some(found)
            }
            Ok(_) => None, // a new connection, to who knows which server
            Err(LinkError::NoAnswer(_)) => {
                // Slow is not wrong: it is left out only when it is slow again and again.
                self.timeouts.fetch_add(1, Ordering::Relaxed);
                self.metrics.redis_error("cache");
                None
            }
            Err(_) => {
                self.distrust();
                None
            }
        }
    }

    /// Copies what was loaded from SQL by a load that began at `began`, in the generation of that moment: who read before the
    /// generation was raised may have missed a change that was shown before, and is void now.
    pub async fn fill(&self, records: &[(UserId, UserRecord)], began: Instant, generation: u64) {
        if records.is_empty() || !self.is_usable() || began.elapsed() > FILL_LIMIT {
            return;
        }
        // What was answered and may be missing there must not be followed by something older from there.
        if self.shared.fill(records, generation, READ_BUDGET).await.is_err() {
            self.distrust();
        }
    }

    /// Shows committed records, in the generation in which SQL was asked: another may have begun because SQL is a server now that
    /// has never heard of them. Returns who was written; the others have a newer record there. None: it cannot be reached, or
    /// another server than the checked one has them now, or another generation has begun: they may count for nothing.
    pub async fn project(&self, records: &[(UserId, UserRecord, Shown)], generation: u64) -> Option<Vec<UserId>> {
        if !self.is_usable() || generation != self.generation() {
            return None;
        }
        match self.shared.project(records, generation).await {
            Ok(done) if !done.outdated => {
                let counts = done.connection == self.checked.load(Ordering::Acquire) && generation == self.generation();
                counts.then_some(done.winners)
            }
            _ => {
                self.distrust();
                None
            }
        }
    }

    /// The generation that is written now; 0: not known yet.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Whether keys may be missing there that were written.
    pub fn may_lack_keys(&self) -> bool {
        self.searches.load(Ordering::Relaxed) > 0
    }

    /// Everybody's keys have been looked for.
    pub fn searched(&self) {
        let _ = self.searches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
    }

    pub fn shared(&self) -> &SharedCache {
        &self.shared
    }

    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Release);
    }

    /// Not to be used until its server was checked again.
    fn distrust(&self) {
        self.metrics.redis_error("cache");
        self.checked.store(0, Ordering::Release);
        self.complete.store(false, Ordering::Release);
    }
}

/// Checks once a second who the server is.
pub struct L2Check {
    l2: Arc<L2>,
    slot: ConnectionSlot,
    cache: Arc<Cache>,
    hints: Option<Arc<Hints>>,
    metrics: Arc<Metrics>,
    away_since: Option<Instant>,
    /// Connection and identity of the last comparison that held.
    compared: Option<(u64, String)>,
    /// Since when every answer from SQL has also been copied there. None: nobody was answered before the first check.
    usable_since: Option<Timestamp>,
    has_checked: bool,
    /// Whose the server was, which it was, and when that was asked last.
    claimed: Option<(Owner, String, Instant)>,
    /// What was there is gone.
    emptied: bool,
    /// A change waits to be shown there for too long.
    is_behind: bool,
    /// When it was last said that the server removes keys it should keep.
    warned_at: Option<Instant>,
}

impl L2Check {
    pub fn new(
        l2: Arc<L2>,
        database: Arc<Database>,
        cache: Arc<Cache>,
        hints: Option<Arc<Hints>>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (slot, away_since, compared, usable_since) = (ConnectionSlot::new(database), None, None, None);
        let (has_checked, claimed, emptied, is_behind, warned_at) = (false, None, false, false, None);
        Self {
            l2,
            slot,
            cache,
            hints,
            metrics,
            away_since,
            compared,
            usable_since,
            has_checked,
            claimed,
            emptied,
            is_behind,
            warned_at,
        }
    }

    pub async fn keep_checking(mut self, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            stop.run_until_cancelled(self.step()).await;
        }
    }

    /// Compares the server with the one the generation belongs to, and raises the generation if it is another.
    pub async fn step(&mut self) {
        let asked = Instant::now();
        let reached = self.reach().await;
        let done = match &reached {
            Ok((number, identity)) => self.compare(*number, identity, asked).await,
            Err(error) => self.note_away(&error.to_string()).await,
        };
        // Changes also wait while the queue cannot be reached; that is said of the queue.
        let is_behind = self.is_behind && self.metrics.is_redis_up("queue") != Some(false);
        self.metrics.redis_up("cache", reached.is_ok() && !is_behind);
        self.has_checked = true;
        if done.is_err() {
            // Without SQL nobody can compare, but the same server on the same connection is as good as it was.
            if reached.ok().is_some_and(|now| self.compared.as_ref() == Some(&now)) {
                self.l2.checked_at.set(asked);
            }
        }
    }

    /// Which server it is, if it takes writes: one that does not is as good as none.
    async fn reach(&mut self) -> Result<(u64, String), LinkError> {
        let (number, server) = self.l2.shared.look_at_servers(CHECK_LIMIT).await?;
        self.metrics.redis_memory("cache", server.used_memory);
        if server.evicts_keys {
            self.l2.searches.store(SEARCHES, Ordering::Relaxed);
            if self.warned_at.is_none_or(|at| at.elapsed() > EVICTION_WARNING_INTERVAL) {
                self.warned_at = Some(Instant::now());
                warn!(
                    "Redis (cache) removes keys without a TTL when its memory is full (maxmemory-policy allkeys-*): users who are \
                     online look offline to who reads the keys; use volatile-lru, or noeviction"
                );
            }
        }
        self.claim(&server.identity).await?;
        Ok((number, server.identity))
    }

    /// Says that this store uses the server, warns of others that do, and notices if all that was there is gone.
    async fn claim(&mut self, identity: &str) -> Result<(), LinkError> {
        let owner = self.l2.shared.claim(CHECK_LIMIT).await?;
        let before = self.claimed.replace((owner.clone(), identity.to_owned(), Instant::now()));
        let was_ours = |(owner, of, at): &(Owner, String, Instant)| {
            !matches!(owner, Owner::Another(_)) && of == identity && at.elapsed() < CLAIMED_FOR
        };
        self.emptied |= owner == Owner::Nobody && before.as_ref().is_some_and(was_ours);
        if let Owner::Another(store) = &owner
            && before.is_none_or(|(before, ..)| before != owner)
        {
            warn!(
                store.id = store,
                "another store uses this Redis (cache) too: its records are ignored, but the keys of both mix: \
                 give one of them another redis_cache.database or key_prefix"
            );
        }
        Ok(())
    }

    async fn compare(&mut self, number: u64, identity: &str, asked: Instant) -> Result<(), SqlError> {
        let mut connection = self.slot.take().await?;
        let cluster = self.settle(&mut connection, identity).await?;
        if cluster.cache_identity != identity {
            self.slot.give_back(connection);
            return Ok(()); // another node sees another server; the next check will tell
        }
        let mut now = cluster.clock.now();
        let anew = self.l2.generation() != cluster.generation;
        if anew {
            self.begin(cluster.generation);
            now = connection.read_cluster().await?.clock.now();
        }
        let complete = self.is_complete(&mut connection, now, anew).await?;
        self.slot.give_back(connection);
        self.compared = Some((number, identity.to_owned()));
        self.l2.complete.store(complete, Ordering::Release);
        self.l2.checked.store(number, Ordering::Release);
        self.l2.checked_at.set(asked);
        self.l2.timeouts.store(0, Ordering::Relaxed);
        if let Some(since) = self.away_since.take() {
            info!(duration_ms = since.elapsed().as_millis() as u64, "Redis (cache) answers");
        }
        Ok(())
    }

    /// Raises the generation if this is another server, or an empty one. Returns what is so now.
    async fn settle(&mut self, connection: &mut Connection, identity: &str) -> Result<ClusterRow, SqlError> {
        let mut cluster = connection.read_cluster().await?;
        let first = cluster.cache_identity.is_empty();
        if cluster.cache_identity != identity {
            connection.adopt_cache(&cluster, identity).await?;
            cluster = connection.read_cluster().await?;
            let generation = cluster.generation;
            if first {
                info!(generation, "Redis (cache) holds nothing of ours yet: records begin with generation {generation}");
            } else {
                warn!(generation, "Redis (cache) is another server than before, or has other data: the caches start anew");
            }
        }
        if std::mem::take(&mut self.emptied) {
            connection.raise_generation(cluster.generation).await.inspect_err(|_| self.emptied = true)?;
            cluster = connection.read_cluster().await?;
            warn!(generation = cluster.generation, "Redis (cache) was emptied: all users are written there again");
        }
        Ok(cluster)
    }

    /// From now on records are of another generation. Nothing of it is believed yet: see [`L2::believed`].
    fn begin(&self, generation: u64) {
        self.l2.complete.store(false, Ordering::Release);
        self.l2.set_generation(generation);
        self.cache.distrust();
        if let Some(hints) = &self.hints {
            hints.set_generation(generation);
        }
    }

    /// Whether nothing is missing there for longer than answers say, nor anything this node acknowledged or answered while it
    /// could not show it there. That includes what it showed in a former generation: it counts for nothing `anew`, and
    /// whatever older is still being shown by others has its row until a newer record was looked for.
    async fn is_complete(&mut self, connection: &mut Connection, now: Timestamp, anew: bool) -> Result<bool, SqlError> {
        if self.has_checked && (anew || !self.l2.is_usable()) {
            self.usable_since = Some(now);
        }
        // What nodes could not show while they were cut off is missing, however fresh the rest may be.
        let allowed = now.minus(L2_AGE.saturating_sub(CHECK_INTERVAL));
        let shown_until = self.usable_since.map_or(allowed, |since| since.max(allowed));
        let complete = !connection.has_outbox_before(shown_until).await?;
        self.is_behind = !complete && connection.has_outbox_before(now.minus(BEHIND_AFTER)).await?;
        Ok(complete)
    }

    /// Without L2 for long, updates that wait for it are dropped: a new generation makes all it holds void.
    async fn note_away(&mut self, error: &str) -> Result<(), SqlError> {
        self.l2.distrust();
        let since = *self.away_since.get_or_insert_with(|| {
            warn!(%error, "Redis (cache) does not answer: reads go to SQL");
            Instant::now()
        });
        if since.elapsed() < AWAY_LIMIT {
            return Ok(());
        }
        let mut connection = self.slot.take().await?;
        let cluster = connection.read_cluster().await?;
        let old = cluster.clock.now().minus(AWAY_LIMIT);
        // Rows that old say that no other node reaches it either.
        if connection.has_outbox_before(old).await? {
            if !cluster.cache_identity.is_empty() {
                connection.adopt_cache(&cluster, "").await?;
                warn!("Redis (cache) has been away for {AWAY_LIMIT:?}: updates that wait for it are dropped");
            }
            connection.void_outbox_without_cache(old).await?;
        }
        self.slot.give_back(connection);
        Ok(())
    }
}
