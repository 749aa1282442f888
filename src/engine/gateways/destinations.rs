//! Where users go who are asked to leave a gateway: by allocation, with what was handed out counted until the gateways' own
//! beats tell of it.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::time::Duration;
use std::time::Instant;

use crate::domain::allocation::Allocation;
use crate::domain::allocation::Ask;
use crate::domain::allocation::Moment;
use crate::domain::allocation::Rules;
use crate::domain::allocation::allocate;
use crate::domain::allocation::field::Field;
use crate::domain::allocation::pacing::paced;
use crate::domain::drain::Target;
use crate::domain::gateway::Life;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::engine::read::lives::Lives;
use crate::engine::read::lives::SUSPECT_AFTER;

/// Addresses that a client is told.
const PLACES: usize = 2;
/// By then a client is there, and its gateway has said so; or it does not come.
const ON_THEIR_WAY: Duration = Duration::from_secs(15);

/// How gateways are chosen, as configured.
#[derive(Clone, Debug)]
pub struct Rooms {
    pub rules: Rules,
    /// Of a gateway that does not say what it can hold.
    pub default_capacity: u32,
    /// Log-ins per second of a gateway that does not say; 0: no limit.
    pub login_rate: u32,
    pub heartbeat_interval: Duration,
    /// A gateway where users would have to wait for longer before they log in is passed over as long as there is another.
    pub patience: Duration,
    /// How long a client may be asked to wait.
    pub max_retry_after: Duration,
}

impl Rooms {
    /// Connections that a gateway can hold.
    pub fn capacity_of(&self, life: &Life) -> f64 {
        f64::from(if life.profile.capacity == 0 { self.default_capacity } else { life.profile.capacity })
    }
}

/// Where a client is sent, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Public addresses, the best first; empty: there is no gateway.
    pub to: Vec<String>,
    pub after: Duration,
}

pub struct Destinations {
    rooms: Rooms,
    from: GatewayAddr,
    region: String,
    to: Vec<Target>,
    field: Field,
    /// The rules if nobody has room.
    overfull: Rules,
    now: Timestamp,
    is_stale: bool,
    began: Instant,
    /// By gateway, so that it outlives a look at the lives.
    sent: HashMap<GatewayAddr, Sent>,
}

/// Who is sent somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sending {
    /// So many users, who were sent nowhere before.
    First(u64),
    /// One who was sent before: quotas and loads count such a user already.
    Again,
}

/// What one gateway was sent.
#[derive(Clone, Debug, Default)]
struct Sent {
    users: u64,
    /// Lately, the oldest first.
    lately: VecDeque<(Instant, u64)>,
    /// When its next log-in may come, in microseconds since the beginning.
    next_login: u64,
}

impl Destinations {
    /// For users of the gateway `from`. `to`: only these, which were sent some before; empty: any, those in its region first.
    pub fn of(lives: &Lives, rooms: &Rooms, from: &Life, to: &[Target]) -> Self {
        let before = |target: &Target| (target.gateway.clone(), Sent { users: target.sent, ..Sent::default() });
        let mut destinations = Self {
            rooms: rooms.clone(),
            from: from.gateway.clone(),
            region: from.profile.region.clone(),
            to: to.to_vec(),
            field: Field::default(),
            overfull: Rules { max_load: f64::MAX, ..rooms.rules.clone() },
            now: Timestamp::default(),
            is_stale: false,
            began: Instant::now(),
            sent: to.iter().filter(|target| target.sent > 0).map(before).collect(),
        };
        destinations.look_again(lives, to);
        destinations
    }

    /// Gateways come and go, and beat; and an operator may name others.
    pub fn look_again(&mut self, lives: &Lives, to: &[Target]) {
        let now = Instant::now();
        self.to = to.to_vec();
        self.field = Field::of(&lives.glance(), self.rooms.default_capacity, self.rooms.heartbeat_interval);
        (self.now, self.is_stale) = (lives.clock.now(), lives.age(now) > SUSPECT_AFTER);
        for sent in self.sent.values_mut() {
            while sent.lately.front().is_some_and(|(at, _)| now.duration_since(*at) > ON_THEIR_WAY) {
                sent.lately.pop_front();
            }
        }
    }

    /// The places in the field of those that may be chosen, however full they are.
    fn members(&self) -> impl Iterator<Item = usize> {
        let is_meant = |at: &usize| {
            let gateway = &self.field.gateways[*at].life.gateway;
            *gateway != self.from && (self.to.is_empty() || self.to.iter().any(|target| target.gateway == *gateway))
        };
        (0..self.field.gateways.len()).filter(is_meant)
    }

    /// Whether there is no gateway at all.
    pub fn is_empty(&self) -> bool {
        self.members().next().is_none()
    }

    /// How many users fit.
    pub fn room(&self) -> u64 {
        let free = |at: usize| {
            let free = self.rooms.rules.max_load * self.field.gateways[at].capacity - self.users(at);
            let quota = self.quota(at).map_or(f64::MAX, |(quota, sent)| quota.saturating_sub(sent) as f64);
            free.clamp(0.0, quota) as u64
        };
        self.members().map(free).sum()
    }

    /// Log-ins per second that all of them like. None: as many as there are.
    pub fn log_in_rate(&self) -> Option<u32> {
        let rates: Vec<u32> = self.members().map(|at| self.login_rate(at)).collect();
        (!rates.is_empty() && !rates.contains(&0)).then(|| rates.into_iter().fold(0, u32::saturating_add))
    }

    /// Where the next user goes, or so many together. If none has room, the best that there is: whoever is asked has to go
    /// somewhere.
    pub fn choose(&mut self, user: UserId, sending: Sending) -> Place {
        self.choose_at(user, sending, self.began.elapsed())
    }

    /// The same, that long after the beginning.
    pub fn choose_at(&mut self, user: UserId, sending: Sending, at: Duration) -> Place {
        let micros = u64::try_from(at.as_micros()).unwrap_or(u64::MAX);
        let candidates = self.candidates(user, micros);
        let public = |at: &usize| self.field.gateways[*at].life.public_addr().to_owned();
        let to = candidates.iter().map(public).collect();
        let Some(first) = candidates.first() else { return Place::default() };
        let (rate, now) = (self.login_rate(*first), Instant::now());
        let sent = self.sent.entry(self.field.gateways[*first].life.gateway.clone()).or_default();
        let users = if let Sending::First(users) = sending { users } else { 0 };
        sent.users += users;
        match sent.lately.back_mut().filter(|(at, _)| now.duration_since(*at) < Duration::from_secs(1)) {
            Some((_, count)) => *count += users,
            None => sent.lately.push_back((now, users)),
        }
        if rate == 0 {
            return Place { to, after: Duration::ZERO };
        }
        let together = u32::try_from(users.max(1)).unwrap_or(u32::MAX);
        let (after, next) = paced(sent.next_login, micros, together, rate);
        sent.next_login = next;
        Place { to, after: after.min(self.rooms.max_retry_after) }
    }

    /// Takes down how many users each of these was sent.
    pub fn note(&self, to: &mut [Target]) {
        for target in to {
            target.sent = self.sent.get(&target.gateway).map_or(0, |sent| sent.users);
        }
    }

    /// How many users each was sent.
    pub fn plan(&self) -> BTreeMap<GatewayAddr, u64> {
        self.sent.iter().map(|(gateway, sent)| (gateway.clone(), sent.users)).collect()
    }

    fn candidates(&self, user: UserId, micros: u64) -> Vec<usize> {
        let addr = |target: &Target| target.gateway.to_string();
        let mut ask = Ask { count: PLACES, exclude: vec![self.from.to_string()], ..Ask::of(user) };
        ask.only = self.to.iter().map(addr).collect();
        if self.to.is_empty() {
            ask.region.clone_from(&self.region);
        }
        let mut found = self.allocate(&ask, &self.rooms.rules, micros);
        if found.candidates.is_empty() {
            ask.region.clear();
            found = self.allocate(&ask, &self.overfull, micros);
        }
        found.candidates.into_iter().map(|candidate| candidate.at).collect()
    }

    fn allocate(&self, ask: &Ask, rules: &Rules, micros: u64) -> Allocation {
        let on_their_way = |at| self.on_their_way(at);
        let latest = micros.saturating_add(u64::try_from(self.rooms.patience.as_micros()).unwrap_or(u64::MAX));
        let is_booked = |at| {
            let has_its_own = self.quota(at).is_some_and(|(quota, sent)| sent >= quota);
            has_its_own || self.sent(at).is_some_and(|sent| sent.next_login > latest)
        };
        let moment = Moment {
            now: self.now,
            is_stale: self.is_stale,
            on_their_way: &on_their_way,
            is_booked: &is_booked,
            seed: ask.user.hash(),
        };
        allocate(&self.field, ask, rules, &moment)
    }

    fn users(&self, at: usize) -> f64 {
        self.field.gateways[at].connections + self.on_their_way(at)
    }

    fn sent(&self, at: usize) -> Option<&Sent> {
        self.sent.get(&self.field.gateways[at].life.gateway)
    }

    fn on_their_way(&self, at: usize) -> f64 {
        self.sent(at).map_or(0.0, |sent| sent.lately.iter().map(|(_, users)| *users as f64).sum())
    }

    /// How many it may be sent, if that is said, and how many it was.
    fn quota(&self, at: usize) -> Option<(u64, u64)> {
        let gateway = &self.field.gateways[at].life.gateway;
        let target = self.to.iter().find(|target| target.gateway == *gateway && target.quota > 0)?;
        Some((target.quota, self.sent(at).map_or(0, |sent| sent.users)))
    }

    fn login_rate(&self, at: usize) -> u32 {
        match self.field.gateways[at].life.profile.login_rate {
            0 => self.rooms.login_rate,
            rate => rate,
        }
    }
}

#[cfg(test)]
#[path = "destinations_tests.rs"]
mod tests;
