//! Who may be chosen at all, and how loaded they are.

use std::collections::BTreeMap;
use std::time::Duration;

use smallvec::SmallVec;

use crate::domain::allocation::Ask;
use crate::domain::allocation::Moment;
use crate::domain::allocation::Rules;
use crate::domain::allocation::field::Field;
use crate::domain::gateway::DEFAULT_WEIGHT;
use crate::domain::gateway::Liveness;

/// Gateways one after the other, the best first.
pub type Ranking = SmallVec<[usize; 4]>;

/// The field, as one question sees it.
pub struct View<'a> {
    pub field: &'a Field,
    pub ask: &'a Ask,
    pub rules: &'a Rules,
    pub moment: &'a Moment<'a>,
    /// Besides those of the question.
    pub labels: &'a BTreeMap<String, String>,
    /// Gateways that are late are better than none.
    pub takes_late: bool,
    /// So are gateways that are booked out.
    pub takes_booked: bool,
    /// Who is chosen already.
    pub taken: Ranking,
    /// Not those of this zone.
    pub but_zone: Option<u32>,
}

impl View<'_> {
    /// Whether it may be chosen.
    pub fn takes(&self, at: usize) -> bool {
        let gateway = &self.field.gateways[at];
        !self.taken.contains(&at)
            && self.but_zone != Some(gateway.zone)
            && self.users(at) < self.rules.max_load * gateway.capacity
            && (self.takes_late || !self.is_late(at))
            && (self.takes_booked || !(self.moment.is_booked)(at))
            && self.ask.labels.iter().chain(self.labels).all(|(name, value)| gateway.life.profile.labels.get(name) == Some(value))
            && (self.ask.only.is_empty() || self.ask.only.iter().any(|addr| gateway.is_called(addr)))
            && !self.ask.exclude.iter().any(|addr| gateway.is_called(addr))
    }

    /// Nobody knows whether it still lives: it has missed beats, or this node has not heard the database for a while.
    pub fn is_late(&self, at: usize) -> bool {
        let is_late =
            || self.field.gateways[at].life.liveness(self.moment.now, self.field.heartbeat_interval) != Liveness::OnTime;
        self.moment.is_stale || is_late()
    }

    /// Users it has, and those on their way.
    pub fn users(&self, at: usize) -> f64 {
        f64::from(self.field.gateways[at].life.connections) + (self.moment.on_their_way)(at)
    }

    /// Users by what it can hold and its weight; 1 is full.
    pub fn load(&self, at: usize) -> f64 {
        let gateway = &self.field.gateways[at];
        self.users(at) * f64::from(DEFAULT_WEIGHT) / gateway.share
    }

    /// Whether anybody of these regions may be chosen.
    pub fn takes_any_of(&self, region: &str) -> bool {
        self.field.regions.get(region).is_some_and(|pool| pool.members.iter().any(|at| self.takes(*at)))
    }

    /// Regions with gateways that may be chosen, the nearest first, as the client has measured.
    pub fn by_distance(&self) -> Vec<(Duration, &str)> {
        let measured = self.ask.latency_ms.iter().filter(|(region, _)| self.takes_any_of(region));
        let mut near: Vec<_> = measured.map(|(region, ms)| (Duration::from_millis((*ms).into()), region.as_str())).collect();
        near.sort_unstable();
        near
    }
}
