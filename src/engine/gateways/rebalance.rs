//! Levels the loads of gateways: who gives and who takes follows from how many users each has, and is carried out as a drain of a
//! share of the users for each that gives.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::domain::drain::Drain;
use crate::domain::drain::DrainTerms;
use crate::domain::drain::Target;
use crate::domain::drain::place;
use crate::domain::gateway::Life;
use crate::domain::gateway::Liveness;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::rebalancing::Load;
use crate::domain::rebalancing::Move;
use crate::domain::rebalancing::plan;
use crate::engine::gateways::drains::Drains;
use crate::engine::gateways::drains::busy;
use crate::engine::gateways::drains::new_drain;
use crate::engine::gateways::drains::unavailable;
use crate::error::Error;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::drains::Placed;

/// Users that one statement reads.
const PAGE: i64 = 4_096;

/// Which gateways are to be levelled, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct RebalanceOrder {
    /// Empty: those of each region among each other.
    pub region: String,
    /// Only gateways with all of these.
    pub labels: BTreeMap<String, String>,
    /// Of the mean, 0 to 1.
    pub tolerance: f64,
    /// Users per second and gateway. None: as configured.
    pub rate: Option<u32>,
    pub reason: String,
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Levelled {
    /// Users who move, from where to where.
    pub moves: Vec<(GatewayAddr, GatewayAddr, u64)>,
    pub drains: Vec<Drain>,
    /// What speaks against it. Then nothing was ordered; or, if somebody else ordered something meanwhile, less than planned.
    pub against: Option<String>,
}

impl Drains {
    /// Says who moves, and orders it unless that is all that is wanted.
    pub async fn rebalance(&self, order: &RebalanceOrder, dry_run: bool) -> Result<Levelled, Error> {
        let mut connection = self.connect().await?;
        self.level(&mut connection, order, dry_run).await.map_err(|error| unavailable(&error))
    }

    async fn level(&self, connection: &mut Connection, order: &RebalanceOrder, dry_run: bool) -> Result<Levelled, SqlError> {
        let mut regions: BTreeMap<String, Vec<Arc<Life>>> = BTreeMap::new();
        for life in self.levelled(order) {
            regions.entry(life.profile.region.clone()).or_default().push(life);
        }
        let is_levelled = |drain: &&Drain| regions.values().flatten().any(|life| life.epoch == drain.epoch);
        let against = connection.active_drains().await?.iter().find(is_levelled).map(busy);
        let only_plan = dry_run || against.is_some();
        let mut levelled = Levelled { against, ..Levelled::default() };
        for lives in regions.values() {
            let epochs: Vec<Epoch> = lives.iter().map(|life| life.epoch).collect();
            let users = connection.count_users_of(&epochs).await?;
            let load = |life: &Arc<Life>| Load {
                users: users.get(&life.epoch).copied().unwrap_or(0),
                weight: f64::from(life.profile.weight) * self.mover.rooms.capacity_of(life),
            };
            let loads: Vec<Load> = lives.iter().map(load).collect();
            let steps = plan(&loads, order.tolerance);
            for (from, life) in lives.iter().enumerate() {
                let own: Vec<&Move> = steps.iter().filter(|step| step.from == from).collect();
                levelled.moves.extend(own.iter().map(|step| (life.gateway.clone(), lives[step.to].gateway.clone(), step.users)));
                if !own.is_empty() && !only_plan {
                    let to = |step: &&Move| Target { gateway: lives[step.to].gateway.clone(), quota: step.users, sent: 0 };
                    match self.give(connection, order, life, own.iter().map(to).collect()).await? {
                        Placed::Active(drain) => levelled.drains.push(drain),
                        Placed::Busy(other) => levelled.against = Some(busy(&other)),
                        Placed::Over => {} // its users log in where there is room
                    }
                }
            }
        }
        Ok(levelled)
    }

    /// The gateways in question, always in the same order.
    fn levelled(&self, order: &RebalanceOrder) -> Vec<Arc<Life>> {
        let (now, beat) = (self.mover.lives.clock.now(), self.mover.settings.heartbeat_interval);
        let is_meant = |life: &&Arc<Life>| {
            let profile = &life.profile;
            life.is_managed()
                && life.liveness(now, beat) == Liveness::OnTime
                && !life.draining
                && profile.weight > 0
                && (order.region.is_empty() || profile.region == order.region)
                && order.labels.iter().all(|(name, value)| profile.labels.get(name) == Some(value))
        };
        let mut lives: Vec<Arc<Life>> = self.mover.lives.table().iter().filter(is_meant).cloned().collect();
        lives.sort_unstable_by_key(|life| life.epoch);
        lives
    }

    /// Orders that as many users leave this gateway as the others are to take.
    async fn give(
        &self,
        connection: &mut Connection,
        order: &RebalanceOrder,
        life: &Life,
        to: Vec<Target>,
    ) -> Result<Placed, SqlError> {
        let (now, settings) = (self.mover.lives.clock.now(), &self.mover.settings);
        let users = to.iter().map(|target| target.quota).sum();
        let terms = DrainTerms {
            rate: order.rate.unwrap_or(settings.rate),
            starts_at: now,
            deadline: None,
            settle: settings.settle,
            share: 1.0,
            to,
            force: false,
            reason: order.reason.clone(),
        };
        let mut drain = new_drain(life, terms, now);
        drain.terms.share = share_of(connection, &drain, users).await?;
        (drain.users, drain.left) = (users, users);
        self.mover.connect_to_lock().await?.order_drain(&drain).await
    }
}

/// The share of its users that is exactly so many of those who are there now.
async fn share_of(connection: &mut Connection, drain: &Drain, users: u64) -> Result<f64, SqlError> {
    let (mut after, mut places) = (0, Vec::new());
    loop {
        let page = connection.users_of_life(drain.epoch, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.get();
        places.extend(page.into_iter().map(|user| place(&drain.id, user)));
    }
    let nth = usize::try_from(users).unwrap_or(usize::MAX).min(places.len().saturating_sub(1));
    if places.is_empty() {
        return Ok(0.0);
    }
    Ok(*places.select_nth_unstable_by(nth, f64::total_cmp).1)
}
