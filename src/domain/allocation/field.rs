//! The gateways that take users, made ready: an allocation draws from them without looking at each.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use crate::domain::allocation::dice::Dice;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::time::Timestamp;

/// Says in which zone a gateway stands: what fails together.
pub const ZONE_LABEL: &str = "zone";
/// How often a drawing hits somebody who is not wanted before it looks at all.
const DRAWS: usize = 8;

/// A gateway that takes users: registered, alive, not draining, with a weight.
pub struct Gateway {
    pub life: Arc<Life>,
    /// Its part of what is handed out, next to others: weight x capacity.
    pub share: f64,
    /// Connections it can hold.
    pub capacity: f64,
    /// Those it had at its last beat.
    pub connections: f64,
    /// From then on it has missed beats, if none comes.
    pub late_at: Timestamp,
    /// Of its address, which a restart does not change.
    pub hash: u64,
    /// Numbers the zones; 0: it does not say.
    pub zone: u32,
}

impl Gateway {
    fn new(life: &Arc<Life>, default_capacity: u32, heartbeat_interval: Duration, zone: u32) -> Self {
        let profile = &life.profile;
        let capacity = f64::from(if profile.capacity == 0 { default_capacity } else { profile.capacity });
        let hash = xxh3_64(life.gateway.as_str().as_bytes());
        let (share, connections) = (f64::from(profile.weight) * capacity, f64::from(life.connections));
        let late_at = life.late_at(heartbeat_interval);
        Self { life: life.clone(), share, capacity, connections, late_at, hash, zone }
    }

    /// By either address.
    pub fn is_called(&self, addr: &str) -> bool {
        self.life.gateway.as_str() == addr || self.life.public_addr() == addr
    }
}

/// Some of the gateways, by their place in the field, with the running sum of their shares.
#[derive(Default)]
pub struct Pool {
    pub members: Vec<usize>,
    sums: Vec<f64>,
}

impl Pool {
    fn add(&mut self, at: usize, share: f64) {
        self.members.push(at);
        self.sums.push(self.total() + share);
    }

    fn total(&self) -> f64 {
        self.sums.last().copied().unwrap_or(0.0)
    }
}

/// All gateways that take users.
#[derive(Default)]
pub struct Field {
    pub gateways: Vec<Gateway>,
    pub all: Pool,
    pub regions: BTreeMap<String, Pool>,
    pub zones: u32,
}

impl Field {
    /// Of the lives that a node knows. A gateway that does not say what it can hold counts as if it held `default_capacity`.
    pub fn of(table: &LifeTable, default_capacity: u32, heartbeat_interval: Duration) -> Self {
        let takes_users = |life: &&Arc<Life>| life.is_managed() && life.is_alive() && !life.draining && life.profile.weight > 0;
        let mut lives: Vec<&Arc<Life>> = table.iter().filter(takes_users).collect();
        lives.sort_unstable_by_key(|life| life.epoch);
        let (mut field, mut zones) = (Self::default(), HashMap::new());
        for (at, life) in lives.into_iter().enumerate() {
            let zone = life.profile.labels.get(ZONE_LABEL).map_or(0, |zone| {
                let next = zones.len() as u32 + 1;
                *zones.entry(zone.as_str()).or_insert(next)
            });
            let gateway = Gateway::new(life, default_capacity, heartbeat_interval, zone);
            field.all.add(at, gateway.share);
            field.regions.entry(life.profile.region.clone()).or_default().add(at, gateway.share);
            field.gateways.push(gateway);
        }
        field.zones = zones.len() as u32;
        field
    }
}

/// Pools that are as good as each other.
#[derive(Clone, Default)]
pub struct Tier<'a> {
    pub pools: Vec<&'a Pool>,
}

impl Tier<'_> {
    pub fn members(&self) -> impl Iterator<Item = usize> {
        self.pools.iter().flat_map(|pool| pool.members.iter().copied())
    }

    /// Draws one of those whom `is_wanted` names, by their shares.
    pub fn draw(&self, field: &Field, dice: &mut Dice, is_wanted: impl Fn(usize) -> bool) -> Option<usize> {
        let total: f64 = self.pools.iter().map(|pool| pool.total()).sum();
        let drawn = (0..DRAWS).find_map(|_| self.at(dice.fraction() * total).filter(|at| is_wanted(*at)));
        drawn.or_else(|| {
            let wanted = || self.members().filter(|at| is_wanted(*at));
            let share = |at: usize| field.gateways[at].share;
            let mut left = dice.fraction() * wanted().map(share).sum::<f64>();
            wanted().find(|at| {
                left -= share(*at);
                left < 0.0
            })
        })
    }

    /// Who holds this point of the sum of all shares.
    fn at(&self, mut point: f64) -> Option<usize> {
        for pool in &self.pools {
            if point < pool.total() {
                return pool.members.get(pool.sums.partition_point(|sum| *sum <= point)).copied();
            }
            point -= pool.total();
        }
        None
    }
}
