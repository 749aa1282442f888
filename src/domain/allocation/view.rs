//! Who may be chosen at all, and how loaded they are.

use std::time::Duration;

use smallvec::SmallVec;

use crate::domain::allocation::Ask;
use crate::domain::allocation::Moment;
use crate::domain::allocation::Rules;
use crate::domain::allocation::field::Field;
use crate::domain::gateway::DEFAULT_WEIGHT;

/// Gateways one after the other, the best first.
pub type Ranking = SmallVec<[usize; 4]>;

/// The field, as one question sees it.
pub struct View<'a> {
    pub field: &'a Field,
    pub ask: &'a Ask,
    pub rules: &'a Rules,
    pub moment: &'a Moment<'a>,
    /// A gateway must have all of these: the question's, and an experiment's.
    pub labels: Vec<(&'a String, &'a String)>,
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
        self.users_if_taken(at).is_some()
    }

    /// Its users, if it may be chosen.
    pub fn users_if_taken(&self, at: usize) -> Option<f64> {
        let (gateway, users) = (&self.field.gateways[at], self.users(at));
        let is_wanted = users < self.rules.max_load * gateway.capacity
            && (self.takes_late || self.moment.now < gateway.late_at)
            && (self.takes_booked || !(self.moment.is_booked)(at))
            && self.but_zone != Some(gateway.zone)
            && !self.taken.contains(&at)
            && self.labels.iter().all(|(name, value)| gateway.life.profile.labels.get(*name) == Some(*value))
            && (self.ask.only.is_empty() || self.ask.only.iter().any(|addr| gateway.is_called(addr)))
            && !self.ask.exclude.iter().any(|addr| gateway.is_called(addr));
        is_wanted.then_some(users)
    }

    /// Users it has, and those on their way.
    pub fn users(&self, at: usize) -> f64 {
        self.field.gateways[at].connections + (self.moment.on_their_way)(at)
    }

    /// How loaded it is with so many users, by what it can hold and its weight; 1 is full.
    pub fn load_with(&self, users: f64, at: usize) -> f64 {
        users * f64::from(DEFAULT_WEIGHT) / self.field.gateways[at].share
    }

    /// How loaded it is.
    pub fn load(&self, at: usize) -> f64 {
        self.load_with(self.users(at), at)
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
