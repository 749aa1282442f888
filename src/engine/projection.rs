//! Showing committed changes to the outside: the record and the keys in Redis, hints to the other nodes, `presence:route`,
//! and kicks.
//!
//! Each lane has a projector that works off its batches in order; the lane never waits for it. What it cannot do in time is
//! left to the outbox row that was written with the batch: any node claims rows that are two seconds old, reads the users
//! *now* from SQL, and shows them unconditionally. Outputs without a version (keys, messages) are made right by looking once
//! more afterwards: messages may repeat, the last one is the truth.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Liveness;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::user::Route;
use crate::domain::user::UserRecord;
use crate::engine::cache::Cache;
use crate::engine::hints::Hints;
use crate::engine::kicks::Kicks;
use crate::engine::kicks::NOTHING_TO_SHOW_AGE;
use crate::engine::l2::L2;
use crate::engine::lives::Lives;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::codec::KickedRoute;
use crate::store::codec::OutboxBody;
use crate::store::codec::StoredNotice;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::Database;
use crate::store::database::Kept;
use crate::store::outbox::OutboxId;
use crate::store::shared::Shown;

/// Batches that may wait for a projector; one more is left to the outbox.
const QUEUE: usize = 64;
/// A batch that is shown later than this after its COMMIT might undo a newer one: it is left to the outbox.
const LATE: Duration = Duration::from_secs(1);
/// A row older than this was left behind.
const REPAIR_AGE: Duration = Duration::from_secs(2);
/// When a change is so old, nothing older is on its way into L2 any more: neither a batch nor what a reader loaded.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// How long a claim keeps other nodes from repairing the same row.
const CLAIM_TERM: Duration = Duration::from_secs(10);
const CLAIM_ROWS: i64 = 100;
/// How often a node looks for rows that were left behind.
pub const REPAIR_INTERVAL: Duration = Duration::from_millis(500);
/// How often one repair follows users who change all the time; their own batches show them too.
const MAX_LOOKS: usize = 5;
/// Users asked of L2 at a time.
const MAX_CONFIRMED: usize = 1_000;
/// How the job of showing everybody a generation is named, before its number.
const SHOW_GENERATION: &str = "show generation ";
/// So many rows left behind are given up for a new generation.
const MAX_ROWS: i64 = 10_000;
/// What nobody waits for has to be told within this time.
const ASIDE_LIMIT: Duration = Duration::from_millis(200);
/// Users that are shown at a time when all are.
const PAGE: i64 = 512;

/// A committed batch.
pub struct Batch {
    pub records: Vec<(UserId, UserRecord)>,
    pub kicks: Vec<KickedRoute>,
    pub stored: Vec<StoredNotice>,
    pub outbox: OutboxId,
    pub committed: Instant,
    /// Told when L2 has it.
    pub in_l2: oneshot::Sender<()>,
}

/// Where changes are shown.
pub struct Outside {
    pub l2: Option<Arc<L2>>,
    pub hints: Option<Arc<Hints>>,
    pub bus: Option<Arc<Bus>>,
    pub kicks: Arc<Kicks>,
    pub cache: Arc<Cache>,
    pub lives: Arc<Lives>,
    pub metrics: Arc<Metrics>,
    pub database: Arc<Database>,
    pub heartbeat_interval: Duration,
}

/// A lane's end of its projector.
pub struct ToProjector {
    batches: mpsc::Sender<Batch>,
    shown: Arc<Shelf>,
}

/// Rows that the projector is done with, for the lane to delete.
#[derive(Default)]
struct Shelf {
    rows: Mutex<Vec<ShownRow>>,
    added: Notify,
}

/// An outbox row with nothing left to show.
pub struct ShownRow {
    pub id: OutboxId,
    pub users: Vec<UserId>,
}

impl ToProjector {
    /// Hands a batch over. If there is no room it is left to the outbox.
    pub fn hand_over(&self, batch: Batch) {
        let _ = self.batches.try_send(batch); // the row stays, and is repaired
    }

    pub fn take_shown(&self) -> Vec<ShownRow> {
        std::mem::take(&mut *lock(&self.shown.rows))
    }

    /// Waits until there may be something to take.
    pub async fn has_shown(&self) {
        self.shown.added.notified().await;
    }
}

impl Outside {
    /// Whether there is anything to show changes to.
    pub fn is_empty(&self) -> bool {
        self.l2.is_none() && self.bus.is_none()
    }

    /// Starts a projector. It ends when its lane does, after the last batch.
    pub fn projector(self: &Arc<Self>, tasks: &mut tokio::task::JoinSet<()>, stop: &CancellationToken) -> ToProjector {
        let (batches, mut queue) = mpsc::channel::<Batch>(QUEUE);
        let (outside, shown) = (self.clone(), Arc::<Shelf>::default());
        let (done, stop) = (Arc::clone(&shown), stop.clone());
        tasks.spawn(async move {
            let _stop_node_on_panic = stop.drop_guard();
            let mut kept = Kept::new(outside.database.clone());
            while let Some(batch) = queue.recv().await {
                if let Some(row) = outside.project(batch, &mut kept).await {
                    lock(&done.rows).push(row);
                    done.added.notify_one();
                }
            }
        });
        ToProjector { batches, shown }
    }

    /// Shows a batch. Returns its row if there is nothing left to do.
    async fn project(&self, batch: Batch, kept: &mut Kept) -> Option<ShownRow> {
        if batch.committed.elapsed() > LATE {
            return None;
        }
        let versions: Vec<(UserId, Version)> = batch.records.iter().map(|(user, record)| (*user, record.version)).collect();
        let records: Vec<_> = batch.records.into_iter().map(|(user, record)| self.shown(user, record)).collect();
        let winners = self.write_l2(&records).await;
        if winners.is_some() {
            let _ = batch.in_l2.send(()); // the callers may have been answered already
        }
        if let Some(hints) = &self.hints {
            hints.tell(&versions).await;
        }
        let kicked = self.kick(&batch.kicks).await; // gateways that attach hear it whatever is missing
        let winners = winners?;
        self.announce(&records, &winners).await;
        kicked?;
        self.notify_stored(&batch.stored).await?;
        let overtaken = self.overtaken(&records, &winners, kept).await.ok()?;
        if !overtaken.is_empty() {
            self.show_kept(kept, &overtaken).await.ok()?;
        }
        Some(ShownRow { id: batch.outbox, users: versions.into_iter().map(|(user, _)| user).collect() })
    }

    /// Writes records into L2. Returns who won, everybody if there is no L2; None: it is not there.
    async fn write_l2(&self, records: &[(UserId, UserRecord, Shown)]) -> Option<BTreeSet<UserId>> {
        let Some(l2) = &self.l2 else { return Some(records.iter().map(|(user, ..)| *user).collect()) };
        let winners = l2.project(records).await?;
        for (user, record, _) in records {
            self.cache.confirmed(*user, record.version);
        }
        Some(winners.into_iter().collect())
    }

    /// Tells anyone who listens where users are now. Whoever does not listen, or whom a broken queue cuts off, misses it.
    async fn announce(&self, records: &[(UserId, UserRecord, Shown)], winners: &BTreeSet<UserId>) {
        let Some(bus) = &self.bus else { return };
        let won = records.iter().filter(|(user, ..)| winners.contains(user));
        let changes: Vec<_> = won.map(|(user, _, shown)| (*user, shown.gateway.as_deref())).collect();
        if !changes.is_empty() && bus.routes_changed(changes.into_iter()).await.is_err() {
            self.metrics.redis_error("queue");
        }
    }

    /// Tells gateways to close the connections of routes that other devices' binds removed.
    async fn kick(&self, kicks: &[KickedRoute]) -> Option<()> {
        self.kicks.send(kicks).await.ok()
    }

    /// Tells push services of stored messages.
    async fn notify_stored(&self, stored: &[StoredNotice]) -> Option<()> {
        let Some(bus) = self.bus.as_ref().filter(|_| !stored.is_empty()) else { return Some(()) };
        let channel = bus.channels.presence_offline();
        let notices: Vec<_> = stored.iter().map(|notice| (channel.clone(), notice.as_json().into())).collect();
        bus.publish(&notices, bus.link.timeout()).await.ok().map(|_| ())
    }

    /// Tells other services that gateways live. They see it with the next beat if it is lost.
    pub async fn beaten(&self, lives: &[Arc<Life>], lease: Duration) {
        if let Some(l2) = self.l2.as_ref().filter(|l2| l2.is_usable() && !lives.is_empty()) {
            let _ = l2.shared().gateways_live(lives, lease, ASIDE_LIMIT).await;
        }
    }

    /// Tells nodes and other services that lives are over. None: it could not be told to all.
    pub async fn tell_ended(&self, epochs: &[Epoch]) -> Option<()> {
        let (table, mut told) = (self.lives.table(), true);
        if let Some(hints) = &self.hints {
            told &= hints.tell_ended(epochs).await;
        }
        if let Some(l2) = &self.l2 {
            let lives: Vec<_> = epochs.iter().filter_map(|epoch| table.get(*epoch).cloned()).collect();
            told &= l2.is_usable() && l2.shared().gateways_over(&lives, ASIDE_LIMIT).await.is_ok();
        }
        told.then_some(())
    }

    /// Which of the winners have a newer record by now: what was said of them may have crossed what others said.
    async fn overtaken(
        &self,
        records: &[(UserId, UserRecord, Shown)],
        winners: &BTreeSet<UserId>,
        kept: &mut Kept,
    ) -> Result<Vec<UserId>, SqlError> {
        let users: Vec<UserId> = winners.iter().copied().collect();
        if users.is_empty() || self.is_empty() {
            return Ok(Vec::new());
        }
        let now = match &self.l2 {
            Some(l2) => l2.versions(&users).await,
            None => {
                let mut connection = kept.take().await?;
                let records = connection.load_users(&users).await?.records;
                kept.give_back(connection);
                records.into_iter().map(|(user, record)| (user, record.version)).collect()
            }
        };
        let newer = |(user, record, _): &(UserId, UserRecord, Shown)| {
            (winners.contains(user) && now.get(user).is_none_or(|now| *now > record.version)).then_some(*user)
        };
        Ok(records.iter().filter_map(newer).collect())
    }

    /// Shows `users` as SQL has them now, and looks again until nothing has changed meanwhile.
    pub async fn show_now(&self, users: &[UserId]) -> Result<(), SqlError> {
        self.show_kept(&mut Kept::new(self.database.clone()), users).await
    }

    async fn show_kept(&self, kept: &mut Kept, users: &[UserId]) -> Result<(), SqlError> {
        let mut connection = kept.take().await?;
        self.show_on(&mut connection, users).await?;
        kept.give_back(connection);
        Ok(())
    }

    async fn show_on(&self, connection: &mut Connection, users: &[UserId]) -> Result<(), SqlError> {
        let mut users = if self.is_empty() { Vec::new() } else { users.to_vec() };
        for _ in 0..MAX_LOOKS {
            if users.is_empty() {
                break;
            }
            let records = self.read(connection, &users).await?;
            if self.write_l2(&records).await.is_none() {
                return Err(SqlError::Lost("Redis (cache) cannot be reached".to_owned()));
            }
            if let Some(hints) = &self.hints {
                hints.tell(&records.iter().map(|(user, record, _)| (*user, record.version)).collect::<Vec<_>>()).await;
            }
            let everybody = users.iter().copied().collect();
            self.announce(&records, &everybody).await;
            let shown: HashMap<UserId, Version> = records.into_iter().map(|(user, record, _)| (user, record.version)).collect();
            let now = connection.load_users(&users).await?.records;
            users.retain(|user| now.get(user).map(|record| record.version) != shown.get(user).copied());
        }
        Ok(())
    }

    async fn read(&self, connection: &mut Connection, users: &[UserId]) -> Result<Vec<(UserId, UserRecord, Shown)>, SqlError> {
        let (records, lives) = connection.load_users_with_lives(users).await?;
        self.lives.learn(&lives);
        Ok(records.into_iter().map(|(user, record)| self.shown(user, record)).collect())
    }

    /// What other services are to see of a record.
    fn shown(&self, user: UserId, record: UserRecord) -> (UserId, UserRecord, Shown) {
        let (table, now) = (self.lives.table(), self.lives.clock.now());
        let slack = self.lives.clock.slack(now);
        let is_live = |route: &&Route| route.liveness(&table, now, slack, self.heartbeat_interval) != Liveness::Over;
        let live = record.routes.iter().filter(is_live);
        let newest = live.max_by_key(|route| route.bound_version).and_then(|route| table.get(route.epoch));
        let shown = Shown {
            gateway: newest.map(|life| life.gateway.to_string()),
            status: record.status.shown(newest.is_some()),
            unmanaged: newest.is_some_and(|life| life.kind == LifeKind::Unmanaged),
        };
        (user, record, shown)
    }
}

/// Shows what others, or this node, have left behind.
pub struct Repair {
    pub outside: Arc<Outside>,
    /// This process, as its claims name it.
    pub claimant: String,
    kept: Kept,
    /// The generation of which everybody was shown, as far as this node knows.
    all_shown: u64,
    /// Where the search for missing keys goes on.
    missing_after: i64,
}

impl Repair {
    pub fn new(outside: Arc<Outside>, claimant: &str) -> Self {
        Self { kept: Kept::new(outside.database.clone()), outside, claimant: claimant.to_owned(), all_shown: 0, missing_after: 0 }
    }

    /// Repairs every row that was left behind. Returns how many.
    pub async fn step(&mut self) -> Result<usize, SqlError> {
        let mut connection = self.kept.take().await?;
        let waiting = connection.count_outbox().await?;
        self.outside.metrics.outbox_rows.set(waiting);
        if waiting > MAX_ROWS {
            let cluster = connection.read_cluster().await?;
            connection.raise_generation(cluster.generation).await?;
            connection.void_outbox(cluster.clock.now()).await?;
            warn!(rows = waiting, "too many changes wait to be shown: they are given up, and the caches start anew");
        }
        if let Some(l2) = self.outside.l2.clone() {
            if !l2.is_usable() {
                self.kept.give_back(connection);
                return Ok(0); // the rows wait until L2 is back, or is given up
            }
            self.show_everybody(&mut connection, &l2).await?;
            self.confirm_lagging(&l2).await;
            if l2.may_lack_keys() {
                self.show_missing(&mut connection, &l2).await?;
            }
        }
        let age = if self.outside.is_empty() { NOTHING_TO_SHOW_AGE } else { REPAIR_AGE };
        let mut repaired = 0;
        loop {
            let rows = connection.claim_outbox(&self.claimant, age, CLAIM_TERM, CLAIM_ROWS).await?;
            if rows.is_empty() {
                break;
            }
            repaired += rows.len();
            self.repair(&mut connection, rows).await?;
        }
        self.kept.give_back(connection);
        Ok(repaired)
    }

    /// A user in many rows is shown once.
    async fn repair(&mut self, connection: &mut Connection, rows: Vec<(OutboxId, OutboxBody)>) -> Result<(), SqlError> {
        let named = rows.iter().flat_map(|(_, body)| body.users());
        let users: BTreeSet<UserId> = named.filter_map(|raw| UserId::parse(raw).ok()).collect();
        for page in users.into_iter().collect::<Vec<_>>().chunks(MAX_CONFIRMED) {
            self.outside.show_on(connection, page).await?;
        }
        for (id, body) in rows {
            let told = self.outside.kick(&body.kicks).await.is_some() && self.outside.notify_stored(&body.stored).await.is_some();
            if !told {
                return Err(SqlError::Lost("Redis (queue) cannot be reached".to_owned()));
            }
            let ended: Vec<Epoch> = body.ended.iter().copied().map(Epoch).collect();
            if !ended.is_empty() && self.outside.tell_ended(&ended).await.is_none() {
                return Err(SqlError::Lost("Redis cannot be reached".to_owned()));
            }
            connection.delete_claimed(&id, &self.claimant).await?;
            self.outside.metrics.outbox_repaired.inc();
        }
        Ok(())
    }

    /// After the generation was raised, Redis may hold keys of long ago, or none: one node shows every user who has a route or
    /// a key. Its claim ends by itself, so another goes on if it dies; a claim for ever says that it is done.
    async fn show_everybody(&mut self, connection: &mut Connection, l2: &L2) -> Result<(), SqlError> {
        let generation = l2.generation();
        let job = format!("{SHOW_GENERATION}{generation}");
        if self.all_shown == generation || !connection.claim_job(&job, &self.claimant, CLAIM_TERM).await? {
            return Ok(());
        }
        let mut after = 0;
        loop {
            let users = connection.users_with_routes(after, PAGE).await?;
            let Some(last) = users.last() else { break };
            after = last.get();
            self.outside.show_on(connection, &users).await?;
            connection.claim_job(&job, &self.claimant, CLAIM_TERM).await?;
        }
        let mut cursor = 0;
        loop {
            let page = l2.shared().scan_routes(cursor).await.map_err(|error| SqlError::Lost(error.to_string()))?;
            self.outside.show_on(connection, &page.1).await?;
            connection.claim_job(&job, &self.claimant, CLAIM_TERM).await?;
            cursor = page.0;
            if cursor == 0 {
                break;
            }
        }
        connection.finish_job(&job, SHOW_GENERATION).await?;
        self.all_shown = generation;
        Ok(())
    }

    /// A server that evicts may have removed keys of users who are online: a page at a time, for ever, they are looked for and
    /// set again.
    async fn show_missing(&mut self, connection: &mut Connection, l2: &L2) -> Result<(), SqlError> {
        if !connection.claim_job("missing keys", &self.claimant, CLAIM_TERM).await? {
            return Ok(());
        }
        let users = connection.users_with_routes(self.missing_after, PAGE).await?;
        self.missing_after = users.last().map_or(0, |last| last.get());
        if users.is_empty() {
            l2.searched();
        }
        let missing = l2.shared().without_keys(&users).await.map_err(|error| SqlError::Lost(error.to_string()))?;
        self.outside.show_on(connection, &missing).await
    }

    /// What this node could not write into L2 itself may have been written by others, or made void: that shows when nothing
    /// older can come there any more.
    async fn confirm_lagging(&mut self, l2: &L2) {
        let lagging = self.outside.cache.lagging();
        let settled = Version::at(self.outside.lives.clock.now().minus(SETTLED_AFTER));
        for page in lagging.chunks(MAX_CONFIRMED) {
            let users: Vec<UserId> = page.iter().map(|(user, _)| *user).collect();
            let known = l2.versions(&users).await;
            if !l2.is_usable() {
                return;
            }
            for (user, lag) in page {
                let void = (*lag < settled).then_some(*lag);
                if let Some(version) = known.get(user).copied().or(void) {
                    self.outside.cache.confirmed(*user, version);
                }
            }
        }
    }
}

pub fn log_repair(done: Result<usize, SqlError>) {
    match done {
        Ok(0) => {}
        Ok(rows) => warn!(rows, "showed changes that were left behind by a node that died or could not reach Redis"),
        Err(error) => warn!(%error, "changes that were left behind cannot be shown yet"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
