//! Removes routes that are over: those of dead gateways, and those on unmanaged lives whose time is up. They are offline the
//! moment that is so; this is tidying up, done by one node at a time, through the lanes, which look at each route again under
//! its user's lock. It gives way to callers.
//!
//! A bind may still commit while its life ends. So a life is only done with when a pass that began well after its end found
//! nothing: longer after than any transaction can live.

use std::collections::BTreeSet;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::time::sleep;
use tracing::debug;
use tracing::info;
use tracing::warn;

use crate::domain::event::Outcome;
use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::time::CLOCK_SLACK;
use crate::domain::time::Timestamp;
use crate::engine::write::change::Change;
use crate::engine::write::change::LaneContext;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::ByGateway;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;

/// How often a node looks whether there is something to remove.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long a node that stops keeps the others from going on.
const TERM: Duration = Duration::from_secs(10);
/// Users at a time.
const PAGE: i64 = 1024;
/// Rests between pages while callers are served, in lengths of the page before: the sweep takes a quarter of the time.
const REST: u32 = 3;
/// Calls since the page before from which on callers are being served.
const BUSY: u64 = 16;
/// No transaction lives longer than this: neither on the server (wait_timeout, 10 s) nor here.
const STRAGGLERS: Duration = Duration::from_secs(20);
/// Nodes, and lives that were swept, are remembered for this long.
const MEMORY: Duration = Duration::from_secs(3600);
/// Another node that forgets users is ahead of this one by less.
const OTHERS_AHEAD: Duration = Duration::from_secs(86_400);
/// Looks for unused lives within the life of a route.
const UNUSED_LOOKS: u32 = 4;
/// An erased user's last version is kept for so long: by then nobody knows a newer one.
const ERASED_FOR: Duration = Duration::from_secs(86_400);
/// Users of one page when those to be forgotten are looked for.
const USERS_PAGE: i64 = 10_000;
/// How often a node looks for what nobody expects, and counts users and outbox rows.
pub const CENSUS_INTERVAL: Duration = Duration::from_secs(60);

pub struct Sweep {
    pub tools: Arc<LaneContext>,
    pub lanes: Arc<Lanes>,
    slot: ConnectionSlot,
    /// Ended lives of which a pass has found nothing, perhaps too early to be sure.
    empty: HashSet<Epoch>,
    served: u64,
    unused_looked_at: Option<Instant>,
    /// Where the search for users to be forgotten goes on.
    users_after: i64,
    /// Gateways in the metrics.
    shown: HashSet<ByGateway>,
}

/// What one pass over the routes of a life came to.
#[derive(Default)]
struct Pass {
    removed: usize,
    left: i64,
}

impl Sweep {
    pub fn new(tools: Arc<LaneContext>, lanes: Arc<Lanes>) -> Self {
        let slot = ConnectionSlot::new(tools.database.clone());
        Self {
            slot,
            tools,
            lanes,
            empty: HashSet::new(),
            served: 0,
            unused_looked_at: None,
            users_after: 0,
            shown: HashSet::new(),
        }
    }

    /// Removes what is over, if it is this node's turn. Returns how many routes.
    pub async fn step(&mut self) -> Result<usize, SqlError> {
        let done = self.take_turn().await;
        if done.is_err() {
            self.show_gateways(false); // another may take its turn
        }
        done
    }

    async fn take_turn(&mut self) -> Result<usize, SqlError> {
        let mut connection = self.slot.take().await?;
        let steady = self.tools.lives.clock.is_steady();
        let mut removed = if steady { self.expired(&mut connection).await? } else { 0 };
        let is_its_turn = connection.claim_job("sweep", &self.tools.claimant, TERM).await?;
        self.show_gateways(is_its_turn);
        if is_its_turn {
            let latest = self.tools.lives.clock.now().plus(self.tools.settings.route_ttl + 2 * CLOCK_SLACK);
            let too_late = connection.users_who_expire_after(latest, PAGE).await?;
            removed += self.sweep(too_late).await;
            let lives = connection.unswept_lives().await?;
            self.tools.lives.learn(&lives); // the lanes judge by what is known here
            let unswept: HashSet<Epoch> = lives.iter().map(|life| life.epoch).collect();
            self.empty.retain(|epoch| unswept.contains(epoch));
            let mut left = 0;
            for life in lives {
                let pass = self.life(&mut connection, &life).await?;
                removed += pass.removed;
                left += pass.left;
            }
            self.tools.metrics.sweep_backlog.set(left);
        }
        if steady {
            self.end_unused(&mut connection).await?;
        }
        self.slot.give_back(connection);
        Ok(removed)
    }

    /// How many connections each gateway says it has: all nodes know the same, so one of them tells.
    fn show_gateways(&mut self, is_its_turn: bool) {
        let (metrics, table) = (&self.tools.metrics, self.tools.lives.table());
        let mut named = HashSet::new();
        for life in table.iter().filter(|life| is_its_turn && life.is_managed() && life.is_alive()) {
            let gateway = ByGateway { gateway: life.gateway.to_string() };
            metrics.gateway_users.get_or_create(&gateway).set(i64::from(life.connections));
            named.insert(gateway);
        }
        for gone in self.shown.difference(&named) {
            metrics.gateway_users.remove(gone);
        }
        self.shown = named;
        if !is_its_turn {
            metrics.sweep_backlog.set(0);
        }
    }

    /// Lives of gateways that never registered end when they have had no route for as long as a route lives.
    async fn end_unused(&mut self, connection: &mut Connection) -> Result<(), SqlError> {
        let ttl = self.tools.settings.route_ttl;
        let interval = (ttl / UNUSED_LOOKS).clamp(SWEEP_INTERVAL, CENSUS_INTERVAL);
        if self.unused_looked_at.is_some_and(|at| at.elapsed() < interval)
            || !connection.claim_job("sweep", &self.tools.claimant, TERM).await?
        {
            return Ok(());
        }
        self.unused_looked_at = Some(Instant::now());
        let lives = connection.end_unused_lives(ttl, STRAGGLERS).await?;
        if lives > 0 {
            info!(lives, "lives ended of gateways that never registered and have no route");
        }
        Ok(())
    }

    /// Routes on unmanaged lives.
    async fn expired(&mut self, connection: &mut Connection) -> Result<usize, SqlError> {
        let mut removed = 0;
        while connection.claim_job("sweep", &self.tools.claimant, TERM).await? {
            let began = Instant::now();
            let users = connection.expired_users(self.tools.lives.clock.over_by(), PAGE).await?;
            let last = users.len() < PAGE as usize;
            let swept = self.sweep(users).await;
            removed += swept;
            if last || swept == 0 {
                break; // what could not be removed now is not asked for again at once
            }
            self.rest(began).await;
        }
        if removed > 0 {
            debug!(routes = removed, "expired routes removed");
        }
        Ok(removed)
    }

    /// One pass over the routes of a life that is over.
    async fn life(&mut self, connection: &mut Connection, life: &Life) -> Result<Pass, SqlError> {
        let (epoch, now) = (life.epoch, self.tools.lives.clock.now());
        let sure = life.end.is_some_and(|end| now.since(end.at) >= STRAGGLERS);
        if !sure && self.empty.contains(&epoch) {
            return Ok(Pass::default());
        }
        let (mut after, mut pass, began) = (0, Pass::default(), Instant::now());
        loop {
            if !connection.claim_job("sweep", &self.tools.claimant, TERM).await? {
                return Ok(pass); // another node goes on; this pass says nothing
            }
            let began = Instant::now();
            let users = connection.users_of_life(epoch, after, PAGE).await?;
            let Some(last) = users.last() else { break };
            if after == 0 {
                pass.left = connection.count_routes_of(epoch).await?;
                self.tools.metrics.sweep_backlog.set(pass.left);
            }
            after = last.get();
            let swept = self.sweep(users).await;
            pass.removed += swept;
            pass.left = (pass.left - i64::try_from(swept).unwrap_or(0)).max(0); // somebody may have come meanwhile
            self.tools.metrics.sweep_backlog.set(pass.left);
            self.rest(began).await;
        }
        if after > 0 {
            let (gateway, removed, duration_ms) = (&life.gateway, pass.removed, began.elapsed().as_millis() as u64);
            info!(gateway.addr = %gateway, gateway.epoch = epoch.0, routes = removed, duration_ms, "routes of a dead gateway removed");
        } else if sure {
            connection.mark_swept(epoch).await?;
        } else {
            self.empty.insert(epoch);
        }
        Ok(pass)
    }

    async fn sweep(&mut self, users: Vec<UserId>) -> usize {
        let users: BTreeSet<UserId> = users.into_iter().collect();
        let outcomes = self.lanes.submit_all_in_background(users, || Change::Sweep).await;
        let routes = |outcome: &Result<Outcome, Error>| if let Ok(Outcome::Swept { routes }) = outcome { *routes } else { 0 };
        let removed: usize = outcomes.iter().map(routes).sum();
        self.tools.metrics.swept_routes.inc_by(removed as u64);
        removed
    }

    /// Leaves most of the time to callers, if there are any.
    async fn rest(&mut self, began: Instant) {
        let served = self.tools.metrics.l1_hits.get() + self.tools.metrics.l1_misses.get() + self.lanes.taken();
        if served - std::mem::replace(&mut self.served, served) >= BUSY {
            sleep(began.elapsed() * REST).await;
        }
    }

    /// One page of users: those go who have nothing and whose last change was before `before`, and those who were erased.
    async fn forget_users(&mut self, connection: &mut Connection, before: Timestamp) -> Result<(), SqlError> {
        let erased = Version::at(self.tools.lives.clock.over_by().minus(ERASED_FOR));
        let (forgotten, last) = connection.forget_users(self.users_after, Version::at(before), erased, USERS_PAGE).await?;
        if forgotten > 0 {
            info!(users = forgotten, "users forgotten who were erased, or not there for store.forget_users_after");
        }
        self.users_after = last.unwrap_or(0);
        Ok(())
    }

    /// Counts users online and rows in the outbox, and looks for what nobody expects.
    pub async fn census(&mut self) -> Result<(), SqlError> {
        let mut connection = self.slot.take().await?;
        self.tools.metrics.outbox_rows.set(connection.count_outbox().await?);
        let forget_after = self.tools.settings.forget_users_after;
        let forgotten = forget_after.map(|after| self.tools.lives.clock.over_by().minus(after));
        if let Some(before) = forgotten {
            self.tools.cache.may_be_forgotten(Version::at(before.plus(OTHERS_AHEAD))); // whichever node forgets them
        }
        if connection.claim_job("orphans", &self.tools.claimant, CENSUS_INTERVAL / 2).await? {
            let users = connection.count_users_online(&[]).await?;
            connection.note_users_online(users).await?;
            if self.tools.lives.clock.is_steady() {
                connection.forget_lives(MEMORY).await?;
                connection.forget_nodes(MEMORY).await?;
                self.forget_users(&mut connection, forgotten.unwrap_or_default()).await?;
            }
            match connection.reopen_orphaned_lives().await? {
                0 => {}
                lives => {
                    warn!(lives, "routes name lives that nobody knows: the database was changed from outside; they are removed")
                }
            }
        }
        self.slot.give_back(connection);
        Ok(())
    }
}
