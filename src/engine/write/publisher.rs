//! Showing what is committed to the outside: the record and the keys in Redis, hints to the other nodes, `presence:route`,
//! and kicks. Outputs without a version (keys, messages) are made right by looking once more afterwards: messages may repeat,
//! the last one is the truth.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Liveness;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::user::UserRecord;
use crate::engine::read::cache::Cache;
use crate::engine::read::feed::Feed;
use crate::engine::read::hints::Hints;
use crate::engine::read::l2::L2;
use crate::engine::read::lives::Lives;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::codec::ChangedUser;
use crate::store::codec::KickedRoute;
use crate::store::codec::StoredNotice;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;
use crate::store::shared::Shown;

/// Users asked of L2 at a time.
pub const MAX_CONFIRMED: usize = 1_000;
/// How often users who change all the time are shown anew; their own batches show them too.
const MAX_LOOKS: usize = 5;
/// What nobody waits for has to be told within this time.
const NOTICE_TIMEOUT: Duration = Duration::from_millis(200);

/// Of whom nothing is known to have changed.
pub const NOBODY: BTreeSet<UserId> = BTreeSet::new();

/// A user, the record, and what other services are to see of it.
pub type ShownRecord = (UserId, UserRecord, Shown);

/// Some kicks were not sent and will not be repeated: the outbox has to keep them.
#[derive(Debug)]
pub struct NotSent;

/// The way to gateways, which is above this room: it is given at assembly.
pub trait TellGateways: Send + Sync {
    /// Tells gateways to close the connections of routes that other devices' binds removed.
    fn kick<'a>(&'a self, kicks: &'a [KickedRoute]) -> Pin<Box<dyn Future<Output = Result<(), NotSent>> + Send + 'a>>;
}

/// Shows changes to Redis, to the other nodes and to whoever listens.
pub struct Publisher {
    pub l2: Option<Arc<L2>>,
    pub hints: Option<Arc<Hints>>,
    pub bus: Option<Arc<Bus>>,
    pub gateways: Arc<dyn TellGateways>,
    pub cache: Arc<Cache>,
    pub feed: Arc<Feed>,
    pub lives: Arc<Lives>,
    pub metrics: Arc<Metrics>,
    pub database: Arc<Database>,
    pub heartbeat_interval: Duration,
}

impl Publisher {
    /// Whether there is anything to show changes to.
    pub fn is_empty(&self) -> bool {
        self.l2.is_none() && self.bus.is_none()
    }

    /// The generation of which L2 is; to be asked for before what is to be written there is read from SQL.
    pub fn generation(&self) -> u64 {
        self.l2.as_ref().map_or(0, |l2| l2.generation())
    }

    /// Writes records of `generation` into L2. Returns who won, everybody if there is no L2; None: it is not there.
    pub async fn write_l2(&self, records: &[ShownRecord], generation: u64) -> Option<BTreeSet<UserId>> {
        let Some(l2) = &self.l2 else { return Some(records.iter().map(|(user, ..)| *user).collect()) };
        let winners = l2.project(records, generation).await?;
        for (user, record, _) in records {
            self.cache.confirmed(*user, record.version);
        }
        Some(winners.into_iter().collect())
    }

    /// Tells anyone who listens where users are now. Whoever does not listen, or whom a broken queue cuts off, misses it.
    pub async fn announce(&self, records: &[ShownRecord], winners: &BTreeSet<UserId>) {
        let Some(bus) = &self.bus else { return };
        let won = records.iter().filter(|(user, ..)| winners.contains(user));
        let changes: Vec<_> = won.map(|(user, _, shown)| (*user, shown.gateway.as_deref())).collect();
        if !changes.is_empty() && bus.routes_changed(changes.into_iter()).await.is_err() {
            self.metrics.redis_error("queue");
        }
    }

    /// Tells anyone who listens what these users are shown as, as far as they won.
    pub async fn announce_statuses(&self, records: &[ShownRecord], winners: &BTreeSet<UserId>, changed: &BTreeSet<UserId>) {
        let Some(bus) = &self.bus else { return };
        let told = records.iter().filter(|(user, ..)| winners.contains(user) && changed.contains(user));
        let statuses: Vec<_> = told.map(|(user, _, shown)| (*user, shown.status.unwrap_or(Status::Offline))).collect();
        if !statuses.is_empty() && bus.statuses_changed(statuses.into_iter()).await.is_err() {
            self.metrics.redis_error("queue");
        }
    }

    /// Tells gateways to close the connections of routes that other devices' binds removed.
    pub async fn kick(&self, kicks: &[KickedRoute]) -> Option<()> {
        self.gateways.kick(kicks).await.ok()
    }

    /// Tells push services of stored messages.
    pub async fn notify_stored(&self, stored: &[StoredNotice]) -> Option<()> {
        let Some(bus) = self.bus.as_ref().filter(|_| !stored.is_empty()) else { return Some(()) };
        let channel = bus.channels.presence_offline();
        let notices: Vec<_> = stored.iter().map(|notice| (channel.clone(), notice.as_json().into())).collect();
        bus.publish(&notices, bus.link.timeout()).await.ok().map(|_| ())
    }

    /// Tells other services that gateways live. They see it with the next beat if it is lost.
    pub async fn beaten(&self, lives: &[Arc<Life>], lease: Duration) {
        if let Some(l2) = self.l2.as_ref().filter(|l2| l2.is_usable() && !lives.is_empty()) {
            let _ = l2.shared().gateways_live(lives, lease, NOTICE_TIMEOUT).await;
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
            told &= l2.is_usable() && l2.shared().gateways_over(&lives, NOTICE_TIMEOUT).await.is_ok();
        }
        told.then_some(())
    }

    /// Shows `users` as SQL has them now, and looks again until nothing has changed meanwhile.
    pub async fn show_now(&self, users: &[UserId]) -> Result<(), SqlError> {
        self.show_with(&mut ConnectionSlot::new(self.database.clone()), users, &NOBODY).await
    }

    pub async fn show_with(&self, slot: &mut ConnectionSlot, users: &[UserId], seen: &BTreeSet<UserId>) -> Result<(), SqlError> {
        let mut connection = slot.take().await?;
        self.show_on(&mut connection, users, seen).await?;
        slot.give_back(connection);
        Ok(())
    }

    /// The same on one connection. `seen`: of these, also what they are shown as may have changed.
    pub async fn show_on(&self, connection: &mut Connection, users: &[UserId], seen: &BTreeSet<UserId>) -> Result<(), SqlError> {
        let mut users = users.to_vec();
        for _ in 0..MAX_LOOKS {
            if users.is_empty() {
                break;
            }
            let generation = self.generation();
            if !self.database.is_current(connection) {
                return Err(SqlError::Lost("another database server is written to now".to_owned()));
            }
            let records = self.read(connection, &users).await?;
            // Whoever has left this behind has not told this node, either.
            records.iter().for_each(|(user, record, _)| self.cache.hint(*user, record.version));
            self.feed.push(records.iter().map(|(user, record, _)| (*user, record.shown().version)));
            if self.is_empty() {
                break;
            }
            if self.write_l2(&records, generation).await.is_none() {
                return Err(SqlError::Lost("Redis (cache) cannot be reached".to_owned()));
            }
            if let Some(hints) = &self.hints {
                hints.tell(records.iter().map(|(user, record, _)| ChangedUser::of(*user, record)).collect()).await;
            }
            let everybody = users.iter().copied().collect();
            self.announce(&records, &everybody).await;
            self.announce_statuses(&records, &everybody, seen).await;
            let shown: HashMap<UserId, Version> = records.into_iter().map(|(user, record, _)| (user, record.version)).collect();
            let now = connection.load_users(&users).await?.records;
            users.retain(|user| now.get(user).map(|record| record.version) != shown.get(user).copied());
        }
        Ok(())
    }

    async fn read(&self, connection: &mut Connection, users: &[UserId]) -> Result<Vec<ShownRecord>, SqlError> {
        let (records, lives) = connection.load_users_with_lives(users).await?;
        self.lives.learn(&lives);
        Ok(records.into_iter().map(|(user, record)| self.shown(user, record)).collect())
    }

    /// What other services are to see of a record.
    pub fn shown(&self, user: UserId, record: UserRecord) -> ShownRecord {
        let (table, now) = (self.lives.table(), self.lives.clock.now());
        let slack = self.lives.clock.slack(now);
        let is_live = |route: &&Route| route.liveness(&table, now, slack, self.heartbeat_interval) != Liveness::Over;
        let live = || record.routes.iter().filter(is_live);
        let newest = live().max_by_key(|route| route.bound_version).and_then(|route| table.get(route.epoch));
        let status = record.wanted().shown(activity(live()));
        let shown = Shown {
            gateway: newest.map(|life| life.gateway.to_string()),
            status: (!record.is_erased()).then_some(status),
            unmanaged: newest.is_some_and(|life| life.kind == LifeKind::Unmanaged),
        };
        (user, record, shown)
    }
}
