//! Where users should go. Each node decides by itself, on its copy of the table of lives: what it has handed out since a
//! gateway's last beat it counts as often as there are nodes, because the others hand out, too.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::Guard;

use crate::domain::allocation::Allocation;
use crate::domain::allocation::Ask;
use crate::domain::allocation::Moment;
use crate::domain::allocation::Rules;
use crate::domain::allocation::Why;
use crate::domain::allocation::algorithm::Algorithm;
use crate::domain::allocation::allocate;
use crate::domain::allocation::dice::Dice;
use crate::domain::allocation::field::Field;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::id::GatewayAddr;
use crate::engine::gateways::tally::Tally;
use crate::engine::messages::peers::Peers;
use crate::engine::read::lives::Lives;
use crate::engine::read::lives::SUSPECT_AFTER;
use crate::metrics::Metrics;

/// How often the gateways are made ready anew, if nothing is heard of them.
const READY_FOR: Duration = Duration::from_secs(1);
/// After which time a client should come again if nobody takes it; half of it more or less.
const NOBODY_RETRY: Duration = Duration::from_secs(5);

/// What an operator has said.
pub struct Settings {
    pub rules: Rules,
    /// Connections that a gateway can hold which does not say how many.
    pub default_capacity: u32,
    /// Log-ins per second of a gateway that does not say how many it likes; 0: as many as come.
    pub login_rate: u32,
    /// How long a client may be asked to wait.
    pub max_retry_after: Duration,
    pub heartbeat_interval: Duration,
}

/// Hands out gateways.
pub struct Allocator {
    settings: Settings,
    lives: Arc<Lives>,
    peers: Arc<Peers>,
    metrics: Arc<Metrics>,
    started: Instant,
    ready: ArcSwap<Ready>,
    /// One makes ready at a time.
    preparing: Mutex<()>,
    seeds: AtomicU64,
}

/// The gateways of one state of the table of lives, each with what was handed out of it.
struct Ready {
    table: Arc<LifeTable>,
    at: Instant,
    field: Field,
    tallies: Vec<Arc<Tally>>,
    kept: HashMap<GatewayAddr, Kept>,
}

/// What was handed out of an address outlives its gateway for as long as clients may have been asked to wait: they come, even if
/// it takes nobody new meanwhile, or is another process by then.
#[derive(Clone)]
struct Kept {
    tally: Arc<Tally>,
    forget_at: Instant,
}

/// A gateway that takes a user.
#[derive(Clone, Debug)]
pub struct Offer {
    pub life: Arc<Life>,
    /// Of its capacity, by its weight; 1 is full.
    pub load: f64,
    pub why: Why,
}

/// What comes of an allocation.
#[derive(Clone, Debug)]
pub struct Allocated {
    /// The best first; none: nobody takes the user now.
    pub offers: Vec<Offer>,
    /// When to go to the first, or to ask again.
    pub retry_after: Duration,
    pub algorithm: Algorithm,
    /// Empty: none.
    pub experiment: String,
}

impl Allocator {
    pub fn new(settings: Settings, lives: Arc<Lives>, peers: Arc<Peers>, metrics: Arc<Metrics>) -> Arc<Self> {
        let started = Instant::now();
        let (field, tallies, kept) = (Field::default(), Vec::new(), HashMap::new());
        let ready = Ready { table: Arc::default(), at: started, field, tallies, kept };
        let (ready, seeds) = (ArcSwap::from_pointee(ready), AtomicU64::new(uuid::Uuid::new_v4().as_u128() as u64));
        Arc::new(Self { settings, lives, peers, metrics, started, ready, preparing: Mutex::default(), seeds })
    }

    /// The best gateways for a user, of which the first expects them when `retry_after` has passed.
    pub fn allocate(&self, ask: &Ask) -> Allocated {
        self.allocate_at(ask, Instant::now())
    }

    /// The same at `now`, for tests and simulations.
    pub fn allocate_at(&self, ask: &Ask, now: Instant) -> Allocated {
        self.choose(ask, now, false)
    }

    /// What would come of it: nobody expects the user, and nothing is counted.
    pub fn try_out(&self, ask: &Ask) -> Allocated {
        self.choose(ask, Instant::now(), true)
    }

    fn choose(&self, ask: &Ask, now: Instant, is_trial: bool) -> Allocated {
        let (nodes, micros) = (self.peers.count(), self.micros(now));
        let ready = self.ready(now, nodes);
        let limit = u64::try_from(self.settings.max_retry_after.as_micros()).unwrap_or(u64::MAX);
        let moment = Moment {
            now: self.lives.clock.at(now),
            is_stale: self.lives.age(now) > SUSPECT_AFTER,
            on_their_way: &|at| ready.tallies[at].on_their_way(nodes),
            is_booked: &|at| ready.tallies[at].wait_micros(micros) > limit,
            seed: self.seeds.fetch_add(1, Ordering::Relaxed),
        };
        let allocation = allocate(&ready.field, ask, &self.settings.rules, &moment);
        let seed = moment.seed;
        let (result, retry_after) = match allocation.candidates.first() {
            None => ("none", spread(NOBODY_RETRY, seed)),
            Some(first) if first.why == Why::Booked || ready.tallies[first.at].wait_micros(micros) > limit => {
                ("booked", spread(self.settings.max_retry_after.mul_f64(2.0 / 3.0), seed))
            }
            Some(first) => {
                let (tally, rate) = (&ready.tallies[first.at], self.rate(&ready.field.gateways[first.at].life));
                let wait = match is_trial {
                    true => Duration::from_micros(tally.wait_micros(micros)),
                    false => tally.hand_out(micros, nodes, rate),
                };
                (if first.why == Why::Late { "late" } else { "ok" }, wait)
            }
        };
        let allocated = self.answer(&ready, allocation, result, retry_after);
        if !is_trial {
            self.metrics.allocation.count(allocated.algorithm.name(), &allocated.experiment, result);
            if !allocated.offers.is_empty() {
                self.metrics.allocation.wait_seconds.observe(retry_after.as_secs_f64());
            }
        }
        allocated
    }

    /// Log-ins per second; 0: as many as come.
    fn rate(&self, life: &Life) -> u32 {
        match life.profile.login_rate {
            0 => self.settings.login_rate,
            rate => rate,
        }
    }

    fn answer(&self, ready: &Ready, allocation: Allocation, result: &'static str, retry_after: Duration) -> Allocated {
        let Allocation { candidates, algorithm, experiment } = allocation;
        let experiment = experiment.map(|at| self.settings.rules.experiments[at].name.clone()).unwrap_or_default();
        let offer = |at: usize| ready.field.gateways[at].life.clone();
        let offers = match result {
            "booked" => Vec::new(),
            _ => candidates.iter().map(|one| Offer { life: offer(one.at), load: one.load, why: one.why }).collect(),
        };
        Allocated { offers, retry_after, algorithm, experiment }
    }

    /// The gateways as they are known now.
    fn ready(&self, now: Instant, nodes: u32) -> Guard<Arc<Ready>> {
        let is_current = |ready: &Ready| {
            std::ptr::eq(&**self.lives.glance(), &*ready.table) && now.saturating_duration_since(ready.at) < READY_FOR
        };
        let ready = self.ready.load();
        if is_current(&ready) {
            return ready;
        }
        let _turn = self.preparing.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.ready.load();
        if !is_current(&known) {
            self.ready.store(Arc::new(self.prepare(&known, now, nodes)));
        }
        self.ready.load()
    }

    fn prepare(&self, known: &Ready, now: Instant, nodes: u32) -> Ready {
        let table = self.lives.table();
        let field = Field::of(&table, self.settings.default_capacity, self.settings.heartbeat_interval);
        let (micros, forget_at) = (self.micros(now), now + self.settings.max_retry_after);
        let still_kept = known.kept.iter().filter(|(_, kept)| now < kept.forget_at);
        let mut kept: HashMap<_, _> = still_kept.map(|(addr, kept)| (addr.clone(), kept.clone())).collect();
        let mut tally = |life: &Life| {
            let kept = kept.entry(life.gateway.clone());
            let kept = kept.or_insert_with(|| Kept { tally: Arc::new(Tally::new(life, micros)), forget_at });
            kept.forget_at = forget_at;
            kept.tally.look(life, nodes, self.rate(life), micros);
            kept.tally.clone()
        };
        let tallies = field.gateways.iter().map(|gateway| tally(&gateway.life)).collect();
        Ready { table, at: now, field, tallies, kept }
    }

    fn micros(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.started).as_micros()).unwrap_or(u64::MAX)
    }
}

/// Half of it more or less: clients that were turned away together must not come back together.
fn spread(time: Duration, seed: u64) -> Duration {
    time.mul_f64(0.5 + Dice::new(seed).fraction())
}

#[cfg(test)]
#[path = "allocation_tests.rs"]
mod tests;
