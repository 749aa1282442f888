//! Where a user should connect, in stages: who may be chosen, in which region, by which algorithm, and that a failure does not
//! take all the candidates. Pure: the gateways, the time and the dice come from outside.

pub mod algorithm;
pub mod dice;
pub mod experiment;
pub mod field;
pub mod pacing;
pub mod view;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::domain::allocation::algorithm::Algorithm;
use crate::domain::allocation::dice::Dice;
use crate::domain::allocation::experiment::Experiment;
use crate::domain::allocation::field::Field;
use crate::domain::allocation::field::Tier;
use crate::domain::allocation::view::Ranking;
use crate::domain::allocation::view::View;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;

/// Regions that are farther than the nearest by no more than this are as good.
pub const AS_NEAR: Duration = Duration::from_millis(20);
/// Candidates of one answer, if the caller does not say how many.
pub const CANDIDATES: usize = 3;

/// Where should this user go?
#[derive(Clone, Debug)]
pub struct Ask {
    pub user: UserId,
    /// Empty: anywhere.
    pub region: String,
    /// How far the regions are.
    pub latency_ms: BTreeMap<String, u32>,
    /// Candidates, at most.
    pub count: usize,
    /// Addresses, also public ones, that are not wanted.
    pub exclude: Vec<String>,
    /// Only these addresses; empty: any.
    pub only: Vec<String>,
    /// Only gateways with all of these.
    pub labels: BTreeMap<String, String>,
}

impl Ask {
    /// With no wishes.
    pub fn of(user: UserId) -> Self {
        Self {
            user,
            region: String::new(),
            latency_ms: BTreeMap::new(),
            count: CANDIDATES,
            exclude: Vec::new(),
            only: Vec::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// What an operator has said of allocations.
#[derive(Clone, Debug)]
pub struct Rules {
    pub algorithm: Algorithm,
    /// Of its capacity: a gateway that has so many users takes no more.
    pub max_load: f64,
    /// Of `rendezvous`: how many times the mean a gateway may have.
    pub bounded_load: f64,
    /// Where users of a region go when it takes none. Of a region that is not in it: anywhere.
    pub regions: BTreeMap<String, Vec<String>>,
    pub experiments: Vec<Experiment>,
}

/// What is different for each question.
pub struct Moment<'a> {
    pub now: Timestamp,
    /// The lives are as they were a while ago: nobody knows who has died since.
    pub is_stale: bool,
    /// Users of a gateway whom its last beat could not tell of yet.
    pub on_their_way: &'a dyn Fn(usize) -> f64,
    /// Whether others will log in there for as long as a client can be asked to wait.
    pub is_booked: &'a dyn Fn(usize) -> bool,
    /// What the dice show.
    pub seed: u64,
}

/// Why a gateway is among the candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is in the region that was asked for, or one of the nearest.
    Region,
    /// Others would have been better, if they took users.
    Fallback,
    /// Any region would do.
    Anywhere,
    /// The better ones share one zone.
    OtherZone,
    /// No gateway is on time.
    Late,
    /// Others log in there for as long as a client can be asked to wait.
    Booked,
}

impl Why {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Region => "region",
            Self::Fallback => "fallback",
            Self::Anywhere => "anywhere",
            Self::OtherZone => "other_zone",
            Self::Late => "late",
            Self::Booked => "booked",
        }
    }
}

/// A gateway, by its place in the field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub at: usize,
    pub load: f64,
    pub why: Why,
}

/// The best gateways, the best first; none: nobody takes the user now.
#[derive(Clone, Debug, PartialEq)]
pub struct Allocation {
    pub candidates: Vec<Candidate>,
    pub algorithm: Algorithm,
    /// By its place in the rules.
    pub experiment: Option<usize>,
}

/// The best gateways for a user. Of the experiments the first counts that the user is part of and that has a gateway which takes
/// the user now: late and booked-out gateways are for whoever finds no others anywhere.
pub fn allocate(field: &Field, ask: &Ask, rules: &Rules, moment: &Moment<'_>) -> Allocation {
    let own = rules.experiments.iter().enumerate().filter(|(_, experiment)| experiment.includes(ask.user));
    for (number, experiment) in own {
        let algorithm = experiment.algorithm.unwrap_or(rules.algorithm);
        let candidates = candidates(field, ask, rules, moment, Some(&experiment.labels), algorithm);
        let takes_now = |first: &Candidate| !(moment.is_booked)(first.at) && (moment.is_stale || first.why != Why::Late);
        if candidates.first().is_some_and(takes_now) {
            return Allocation { candidates, algorithm, experiment: Some(number) };
        }
    }
    let candidates = candidates(field, ask, rules, moment, None, rules.algorithm);
    Allocation { candidates, algorithm: rules.algorithm, experiment: None }
}

fn candidates(
    field: &Field,
    ask: &Ask,
    rules: &Rules,
    moment: &Moment<'_>,
    labels: Option<&BTreeMap<String, String>>,
    algorithm: Algorithm,
) -> Vec<Candidate> {
    let labels = ask.labels.iter().chain(labels.into_iter().flatten()).collect();
    let (takes_late, takes_booked, taken, but_zone) = (moment.is_stale, false, Ranking::new(), None);
    let mut view = View { field, ask, rules, moment, labels, takes_late, takes_booked, taken, but_zone };
    let mut dice = Dice::new(moment.seed);
    let mut candidates = chosen(&mut view, algorithm, &mut dice);
    if candidates.is_empty() && !view.takes_late {
        view.takes_late = true;
        candidates = chosen(&mut view, algorithm, &mut dice);
    }
    if view.takes_late {
        candidates.iter_mut().for_each(|candidate| candidate.why = Why::Late);
    }
    candidates
}

/// Those who are not booked out, and then, if there are too few, those who are.
fn chosen(view: &mut View<'_>, algorithm: Algorithm, dice: &mut Dice) -> Vec<Candidate> {
    let mut chosen = Vec::with_capacity(view.ask.count);
    for takes_booked in [false, true] {
        view.takes_booked = takes_booked;
        let tiers = tiers(view);
        for (tier, why) in &tiers {
            let why = if takes_booked { Why::Booked } else { *why };
            let best = algorithm.best(view.ask.count - chosen.len(), tier, view, dice);
            chosen.extend(best.iter().map(|at| Candidate { at: *at, load: view.load(*at), why }));
            view.taken.extend(best);
            if chosen.len() == view.ask.count {
                spread(&mut chosen, tier, view, algorithm, dice);
                return chosen;
            }
        }
    }
    chosen
}

/// What fails together must not take all candidates: if all are in one zone, the last gives way to one of another.
fn spread(chosen: &mut [Candidate], tier: &Tier<'_>, view: &mut View<'_>, algorithm: Algorithm, dice: &mut Dice) {
    let zone = |candidate: &Candidate| view.field.gateways[candidate.at].zone;
    let [first, others @ ..] = &*chosen else { return };
    let own = zone(first);
    if others.is_empty() || own == 0 || view.field.zones < 2 || others.iter().any(|other| zone(other) != own) {
        return;
    }
    view.but_zone = Some(own);
    if let (Some(at), Some(last)) = (algorithm.best(1, tier, view, dice).first(), chosen.last_mut()) {
        *last = Candidate { at: *at, load: view.load(*at), why: Why::OtherZone };
    }
}

/// The regions in question, the best first; and why a gateway of it is a candidate.
fn tiers<'a>(view: &View<'a>) -> Vec<(Tier<'a>, Why)> {
    let (field, ask, mut tiers) = (view.field, view.ask, Vec::new());
    let near = view.by_distance();
    let limit = near.first().map(|(nearest, _)| *nearest + AS_NEAR);
    let pools =
        |regions: &mut dyn Iterator<Item = &str>| Tier { pools: regions.filter_map(|name| field.regions.get(name)).collect() };
    let (as_near, farther) = near.split_at(near.partition_point(|(distance, _)| Some(*distance) <= limit));
    if !as_near.is_empty() {
        tiers.push((pools(&mut as_near.iter().map(|(_, region)| *region)), Why::Region));
        tiers.extend(farther.iter().map(|(_, region)| (pools(&mut [*region].into_iter()), Why::Fallback)));
    }
    let anywhere = || Tier { pools: vec![&field.all] };
    if ask.region.is_empty() {
        tiers.push((anywhere(), if tiers.is_empty() { Why::Anywhere } else { Why::Fallback }));
        return tiers;
    }
    let why = if tiers.is_empty() { Why::Region } else { Why::Fallback };
    tiers.push((pools(&mut [ask.region.as_str()].into_iter()), why));
    match view.rules.regions.get(&ask.region) {
        Some(order) => tiers.extend(order.iter().map(|region| (pools(&mut [region.as_str()].into_iter()), Why::Fallback))),
        None => tiers.push((anywhere(), Why::Fallback)),
    }
    tiers
}

#[cfg(test)]
#[path = "allocation_tests.rs"]
mod tests;
