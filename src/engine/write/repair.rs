//! Showing what others, or this node, have left behind: rows of the outbox, everybody after the generation was raised, keys
//! that Redis has evicted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::engine::read::l2::L2;
use crate::engine::write::publisher::MAX_CONFIRMED;
use crate::engine::write::publisher::NOBODY;
use crate::engine::write::publisher::Publisher;
use crate::store::batch::Cursor;
use crate::store::codec::OutboxBody;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::outbox::OutboxId;

/// How often a node looks for rows that were left behind.
pub const REPAIR_INTERVAL: Duration = Duration::from_millis(500);
/// A row older than this was left behind.
const REPAIR_AGE: Duration = Duration::from_secs(2);
/// A node that shows nothing to anybody waits for this long before it repairs rows of others, so that nodes with Redis do.
pub const NOTHING_TO_SHOW_AGE: Duration = Duration::from_secs(60);
/// When a change is so old, nothing older is on its way into L2 any more: neither a batch nor what a reader loaded.
const SETTLED_AFTER: Duration = Duration::from_secs(3);
/// How long a claim keeps other nodes from repairing the same row.
const CLAIM_TERM: Duration = Duration::from_secs(10);
const CLAIM_ROWS: i64 = 100;
/// How the job of showing everybody a generation is named, before its number.
const SHOW_GENERATION: &str = "show generation ";
/// So many rows left behind are given up for a new generation.
const MAX_ROWS: i64 = 10_000;
/// Users that are shown at a time when all are.
const PAGE: i64 = 512;

/// Shows what others, or this node, have left behind.
pub struct Repair {
    publisher: Arc<Publisher>,
    /// This process, as its claims name it.
    pub claimant: String,
    slot: ConnectionSlot,
    /// The generation of which everybody was shown, as far as this node knows.
    all_shown: u64,
    /// Where the search for missing keys goes on.
    missing_after: i64,
}

impl Repair {
    pub fn new(publisher: Arc<Publisher>, claimant: &str) -> Self {
        Self {
            slot: ConnectionSlot::new(publisher.database.clone()),
            publisher,
            claimant: claimant.to_owned(),
            all_shown: 0,
            missing_after: 0,
        }
    }

    /// Repairs every row that was left behind. Returns how many.
    pub async fn step(&mut self) -> Result<usize, SqlError> {
        let mut connection = self.slot.take().await?;
        let waiting = connection.count_outbox().await?;
        self.publisher.metrics.outbox_rows.set(waiting);
        if waiting > MAX_ROWS {
            let cluster = connection.read_cluster().await?;
            connection.raise_generation(cluster.generation).await?;
            connection.void_outbox(cluster.clock.now()).await?;
            warn!(rows = waiting, "too many outbox rows wait to be published: they are dropped, and the caches start empty");
        }
        if let Some(l2) = self.publisher.l2.clone() {
            if !l2.is_usable() {
                self.slot.give_back(connection);
                return Ok(0); // the rows wait until L2 is back, or is given up
            }
            self.show_everybody(&mut connection, &l2).await?;
            self.confirm_lagging(&l2).await;
            if l2.may_lack_keys() {
                self.show_missing(&mut connection, &l2).await?;
            }
        }
        let age = if self.publisher.is_empty() { NOTHING_TO_SHOW_AGE } else { REPAIR_AGE };
        let mut repaired = 0;
        loop {
            let rows = connection.claim_outbox(&self.claimant, age, CLAIM_TERM, CLAIM_ROWS).await?;
            if rows.is_empty() {
                break;
            }
            repaired += rows.len();
            if let Err(error) = self.repair(&mut connection, rows).await {
                connection.release_claimed(&self.claimant).await?;
                return Err(error);
            }
        }
        self.slot.give_back(connection);
        Ok(repaired)
    }

    /// A user in many rows is shown once.
    async fn repair(&mut self, connection: &mut Connection, rows: Vec<(OutboxId, OutboxBody)>) -> Result<(), SqlError> {
        let users: BTreeSet<UserId> = rows.iter().flat_map(|(_, body)| body.users()).collect();
        let seen = rows.iter().flat_map(|(_, body)| &body.shown).filter_map(|raw| UserId::parse(*raw).ok()).collect();
        for page in users.into_iter().collect::<Vec<_>>().chunks(MAX_CONFIRMED) {
            self.publisher.show_on(connection, page, &seen).await?;
        }
        for (id, body) in rows {
            let told =
                self.publisher.kick(&body.kicks).await.is_some() && self.publisher.notify_stored(&body.stored).await.is_some();
            if !told {
                return Err(SqlError::Lost("Redis (queue) cannot be reached".to_owned()));
            }
            let ended: Vec<Epoch> = body.ended.iter().copied().map(Epoch).collect();
            if !ended.is_empty() && self.publisher.tell_ended(&ended).await.is_none() {
                return Err(SqlError::Lost("Redis cannot be reached".to_owned()));
            }
            connection.delete_claimed(&id, &self.claimant).await?;
            self.publisher.metrics.outbox_repaired.inc();
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
            self.publisher.show_on(connection, &users, &NOBODY).await?;
            connection.claim_job(&job, &self.claimant, CLAIM_TERM).await?;
        }
        let mut cursor = Some(Cursor::default());
        while let Some(at) = cursor {
            let page = l2.shared().scan_routes(at).await.map_err(|error| SqlError::Lost(error.to_string()))?;
            self.publisher.show_on(connection, &page.1, &NOBODY).await?;
            connection.claim_job(&job, &self.claimant, CLAIM_TERM).await?;
            cursor = page.0;
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
        self.publisher.show_on(connection, &missing, &NOBODY).await
    }

    /// What this node could not write into L2 itself may have been written by others, or made void: that shows when nothing
    /// older can come there any more.
    async fn confirm_lagging(&mut self, l2: &L2) {
        let lagging = self.publisher.cache.lagging();
        let settled = Version::at(self.publisher.lives.clock.now().minus(SETTLED_AFTER));
        for page in lagging.chunks(MAX_CONFIRMED) {
            let users: Vec<UserId> = page.iter().map(|(user, _)| *user).collect();
            let known = l2.versions(&users).await;
            if !l2.is_usable() {
                return;
            }
            for (user, lag) in page {
                let void = (*lag < settled).then_some(*lag);
                if let Some(version) = known.get(user).copied().or(void) {
                    self.publisher.cache.confirmed(*user, version);
                }
            }
        }
    }
}

pub fn log_repair(done: Result<usize, SqlError>) {
    match done {
        Ok(0) => {}
        Ok(rows) => warn!(rows, "published outbox rows that a node left behind when it died or could not reach Redis"),
        Err(error) => warn!(%error, "outbox rows that were left behind cannot be published yet"),
    }
}
