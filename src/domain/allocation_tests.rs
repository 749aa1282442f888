use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::domain::gateway::End;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Profile;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;

const BEAT: Duration = Duration::from_secs(5);
const NOW: Timestamp = Timestamp(1_000_000);
const ON_TIME: Timestamp = Timestamp(NOW.0 + 15_000);
const LATE: Timestamp = Timestamp(NOW.0 + 6_000);

fn life(n: u64, profile: Profile) -> Life {
    let gateway = GatewayAddr::parse(&format!("gw-{n}:7000")).unwrap();
    Life { profile: Arc::new(profile), ..Life::begun(Epoch(n + 1), gateway, LifeKind::Managed, ON_TIME) }
}

fn of(region: &str, zone: &str) -> Profile {
    let labels = [("zone", zone)].into_iter().filter(|(_, zone)| !zone.is_empty());
    let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    Profile { region: region.to_owned(), capacity: 1_000, labels, ..Profile::default() }
}

fn rules(algorithm: Algorithm) -> Rules {
    Rules { algorithm, max_load: 0.9, bounded_load: 1.25, regions: BTreeMap::new(), experiments: Vec::new() }
}

/// Gateways, and the users that were sent to each.
struct World {
    field: Field,
    sent: Vec<f64>,
    booked: BTreeSet<usize>,
    is_stale: bool,
}

impl World {
    fn new(lives: impl IntoIterator<Item = Life>) -> Self {
        let mut table = LifeTable::default();
        lives.into_iter().for_each(|life| table.learn(Arc::new(life)));
        let field = Field::of(&table, 10_000, BEAT);
        let sent = vec![0.0; field.gateways.len()];
        Self { field, sent, booked: BTreeSet::new(), is_stale: false }
    }

    fn equal(n: u64, capacity: u32) -> Self {
        Self::new((0..n).map(|n| life(n, Profile { capacity, ..Profile::default() })))
    }

    fn allocate(&self, ask: &Ask, rules: &Rules, seed: u64) -> Allocation {
        let (on_their_way, is_booked) = (|at: usize| self.sent[at], |at: usize| self.booked.contains(&at));
        let moment = Moment { now: NOW, is_stale: self.is_stale, on_their_way: &on_their_way, is_booked: &is_booked, seed };
        allocate(&self.field, ask, rules, &moment)
    }

    /// Addresses and reasons.
    fn told(&self, ask: &Ask, rules: &Rules) -> Vec<(String, Why)> {
        let candidates = self.allocate(ask, rules, 7).candidates.into_iter();
        candidates.map(|one| (self.field.gateways[one.at].life.gateway.to_string(), one.why)).collect()
    }

    /// Sends users 1 to `users` to their best gateways. Returns where each is.
    fn fill(&mut self, users: i64, rules: &Rules) -> Vec<String> {
        let mut homes = Vec::new();
        for user in 1..=users {
            let best = self.allocate(&someone(user), rules, user as u64).candidates[0].at;
            self.sent[best] += 1.0;
            homes.push(self.field.gateways[best].life.gateway.to_string());
        }
        homes
    }

    fn fullest_by_mean(&self) -> f64 {
        let by_share: Vec<f64> = self.sent.iter().zip(&self.field.gateways).map(|(sent, gateway)| sent / gateway.share).collect();
        let mean = self.sent.iter().sum::<f64>() / self.field.gateways.iter().map(|gateway| gateway.share).sum::<f64>();
        by_share.into_iter().fold(0.0, f64::max) / mean
    }
}

fn someone(user: i64) -> Ask {
    Ask::of(UserId::parse(user).unwrap())
}

fn in_region(region: &str) -> Ask {
    Ask { region: region.to_owned(), ..someone(1) }
}

fn addresses(told: &[(String, Why)]) -> Vec<&str> {
    told.iter().map(|(addr, _)| addr.as_str()).collect()
}

/// A gateway in any state, with the users on their way to it.
fn any_life() -> impl Strategy<Value = (Life, f64)> {
    let state = (0..8_u8, 0..4_usize, 0..3_usize, 0..=1_000_u32, 0..=1_000_u32);
    (state, 0..3_u32).prop_map(|((state, region, zone, connections, sent), weight)| {
        let profile = Profile { weight: weight * 100, ..of(["", "eu", "us", "ap"][region], ["", "a", "b"][zone]) };
        let mut life = Life { connections, ..life(0, profile) };
        match state {
            0 => life.end = Some(End { at: NOW, reason: EndReason::Expired }),
            1 => life.draining = true,
            2 => life.kind = LifeKind::Unmanaged,
            3 => life.lease_until = LATE,
            _ => {}
        }
        (life, f64::from(sent))
    })
}

proptest! {
    #[test]
    fn a_gateway_is_never_dead_draining_full_or_unwanted_and_late_only_if_nobody_is_on_time(
        lives in prop::collection::vec(any_life(), 0..20),
        algorithm in prop::sample::select(&Algorithm::ALL[..]),
        count in 1..=10_usize,
        (region, nearest, zone) in (0..4_usize, 0..4_usize, 0..3_usize),
        excluded in prop::collection::vec(0..20_u64, 0..5),
        seed in any::<u64>(),
    ) {
        let number = |(n, (life, sent)): (usize, (Life, f64))| {
            let gateway = GatewayAddr::parse(&format!("gw-{n}:7000")).unwrap();
            (Life { epoch: Epoch(n as u64 + 1), gateway, ..life }, sent)
        };
        let lives: Vec<(Life, f64)> = lives.into_iter().enumerate().map(number).collect();
        let mut world = World::new(lives.iter().map(|(life, _)| life.clone()));
        let sent = |life: &Life| lives[life.epoch.0 as usize - 1].1;
        world.sent = world.field.gateways.iter().map(|gateway| sent(&gateway.life)).collect();
        let exclude: Vec<String> = excluded.iter().map(|n| format!("gw-{n}:7000")).collect();
        let zone = ["", "a", "b"][zone];
        let labels: BTreeMap<_, _> = of("", zone).labels;
        let latency_ms = [("eu", 10), ("us", 25), ("ap", 50)].into_iter().take(nearest).map(|(region, ms)| (region.to_owned(), ms));
        let region = ["", "eu", "us", "ap"][region].to_owned();
        let ask = Ask { region, latency_ms: latency_ms.collect(), count, exclude, labels, ..someone(1) };
        let may = |life: &Life| {
            life.is_alive() && life.is_managed() && !life.draining && life.profile.weight > 0
                && f64::from(life.connections) + sent(life) < 900.0
                && !ask.exclude.contains(&life.gateway.to_string())
                && (zone.is_empty() || life.profile.labels.get("zone").is_some_and(|own| own == zone))
        };
        let is_late = |life: &Life| life.lease_until == LATE;
        let on_time = lives.iter().filter(|(life, _)| may(life) && !is_late(life)).count();
        let late = lives.iter().filter(|(life, _)| may(life) && is_late(life)).count();
        let allocation = world.allocate(&ask, &rules(algorithm), seed);
        let chosen: Vec<&Life> = allocation.candidates.iter().map(|one| &*world.field.gateways[one.at].life).collect();
        for life in &chosen {
            prop_assert!(may(life), "{life:?}");
            prop_assert!(!is_late(life) || on_time == 0, "{life:?}");
        }
        prop_assert_eq!(chosen.len(), count.min(if on_time > 0 { on_time } else { late }), "as many as there are");
        let distinct: BTreeSet<Epoch> = chosen.iter().map(|life| life.epoch).collect();
        prop_assert_eq!(distinct.len(), chosen.len());
        prop_assert_eq!(world.allocate(&ask, &rules(algorithm), seed), allocation, "the same dice, the same gateways");
    }
}

#[test]
fn a_client_goes_to_its_region_then_where_its_region_leads_then_anywhere_unless_the_order_ends() {
    let order = |to: &[&str]| BTreeMap::from([("eu".to_owned(), to.iter().map(|region| (*region).to_owned()).collect())]);
    let world = World::new([life(0, of("eu", "")), life(1, of("us", "")), life(2, of("ap", ""))]);
    let told = |regions, ask: &Ask| world.told(ask, &Rules { regions, ..rules(Algorithm::LeastLoad) });
    let first = |told: &[(String, Why)]| told.first().cloned();
    let own = Some(("gw-0:7000".to_owned(), Why::Region));
    assert_eq!(first(&told(BTreeMap::new(), &in_region("eu"))), own);
    let eu_is_gone = Ask { exclude: vec!["gw-0:7000".to_owned()], ..in_region("eu") };
    assert_eq!(addresses(&told(order(&["ap", "us"]), &eu_is_gone)), ["gw-2:7000", "gw-1:7000"]);
    assert_eq!(addresses(&told(order(&["us"]), &eu_is_gone)), ["gw-1:7000"], "and nowhere else");
    assert_eq!(addresses(&told(order(&[]), &eu_is_gone)), [""; 0]);
    let anywhere = told(BTreeMap::new(), &eu_is_gone);
    assert_eq!((anywhere.len(), anywhere[0].1), (2, Why::Fallback));
    assert_eq!(told(BTreeMap::new(), &someone(1)).iter().filter(|(_, why)| *why == Why::Anywhere).count(), 3);
}

#[test]
fn a_client_that_has_measured_goes_to_the_nearest_region_and_those_within_20_ms_that_take_users() {
    let full = Life { connections: 900, ..life(0, of("a", "")) };
    let world = World::new([full, life(1, of("b", "")), life(2, of("c", "")), life(3, of("d", ""))]);
    let latency = [("a", 5), ("b", 30), ("c", 50), ("d", 51), ("nowhere", 1)];
    let latency_ms = latency.into_iter().map(|(region, ms)| (region.to_owned(), ms)).collect();
    let ask = Ask { latency_ms, ..in_region("d") };
    let mut firsts = BTreeSet::new();
    for seed in 0..100 {
        let candidates = world.allocate(&ask, &rules(Algorithm::TwoChoices), seed).candidates;
        assert_eq!(candidates.len(), 3);
        assert_eq!(candidates[2].at, 3, "it is 21 ms farther than the nearest that takes users");
        firsts.insert(candidates[0].at);
    }
    assert_eq!(firsts, BTreeSet::from([1, 2]), "both are as near");
}

#[test]
fn candidates_are_in_two_zones_if_there_are_two() {
    for algorithm in Algorithm::ALL {
        let world = World::new((0..20).map(|n| life(n, of("eu", if n == 13 { "b" } else { "a" }))));
        for user in 1..50 {
            let candidates = world.allocate(&someone(user), &rules(algorithm), user as u64).candidates;
            assert_eq!(candidates.len(), 3);
            assert!(candidates.iter().any(|one| one.at == 13), "{algorithm:?} {candidates:?}");
        }
        let one = world.allocate(&Ask { count: 1, ..someone(1) }, &rules(algorithm), 1);
        assert_eq!(one.candidates.len(), 1);
    }
}

#[test]
fn without_gateways_that_are_on_time_those_that_are_late_are_told_and_said_to_be_so() {
    let late = |n| Life { lease_until: LATE, ..life(n, of("eu", "")) };
    let world = World::new([late(0), life(1, of("us", ""))]);
    assert_eq!(world.told(&in_region("eu"), &rules(Algorithm::TwoChoices)), [("gw-1:7000".to_owned(), Why::Fallback)]);
    let world = World::new([late(0)]);
    assert_eq!(world.told(&in_region("eu"), &rules(Algorithm::TwoChoices)), [("gw-0:7000".to_owned(), Why::Late)]);
    let mut world = World::new([life(0, of("eu", ""))]);
    world.is_stale = true;
    assert_eq!(world.told(&in_region("eu"), &rules(Algorithm::TwoChoices)), [("gw-0:7000".to_owned(), Why::Late)]);
}

#[test]
fn who_is_booked_out_comes_last() {
    let mut world = World::equal(3, 1_000);
    world.booked = BTreeSet::from([0, 2]);
    let told = world.told(&someone(1), &rules(Algorithm::LeastLoad));
    assert_eq!(told.iter().map(|(_, why)| *why).collect::<Vec<_>>(), [Why::Anywhere, Why::Booked, Why::Booked]);
    assert_eq!(told[0].0, "gw-1:7000");
}

#[test]
fn only_and_exclude_take_either_address() {
    let public = Profile { public_addr: "wss://one".to_owned(), ..of("", "") };
    let world = World::new([life(0, public), life(1, of("", "")), life(2, of("", ""))]);
    let two = vec!["wss://one".to_owned(), "gw-1:7000".to_owned()];
    for addr in ["wss://one", "gw-0:7000"] {
        let ask = Ask { only: two.clone(), exclude: vec![addr.to_owned()], ..someone(1) };
        assert_eq!(addresses(&world.told(&ask, &rules(Algorithm::TwoChoices))), ["gw-1:7000"]);
    }
}

#[test]
fn what_is_handed_out_follows_weight_and_capacity_with_every_algorithm() {
    for algorithm in Algorithm::ALL {
        let sizes = (0..20).map(|n| Profile { weight: 100 + 200 * (n % 2), capacity: 4_000 + 2_000 * (n % 3), ..of("", "") });
        let mut world = World::new((0..).zip(sizes).map(|(n, profile)| life(n, profile)));
        world.fill(20_000, &rules(algorithm));
        let worst = world.fullest_by_mean();
        let most = if algorithm == Algorithm::Rendezvous { 1.25 } else { 1.02 };
        assert!(worst <= most, "{algorithm:?}: {worst}");
    }
}

#[test]
fn with_two_choices_no_gateway_of_many_has_more_than_a_tenth_above_the_mean() {
    let mut world = World::equal(100, 1_000_000);
    world.fill(100_000, &rules(Algorithm::TwoChoices));
    let worst = world.fullest_by_mean();
    assert!(worst <= 1.1, "{worst}");
}

#[test]
fn a_gateway_that_comes_or_goes_moves_only_its_part_of_the_users() {
    const USERS: i64 = 20_000;
    let rules = rules(Algorithm::Rendezvous);
    for n in [3, 10, 30] {
        let mut world = World::equal(n, 1_000_000);
        let before = world.fill(USERS, &rules);
        assert!(world.fullest_by_mean() <= 1.25, "{n}: {}", world.fullest_by_mean());
        for others in [n - 1, n + 1] {
            let mut world = World::equal(others, 1_000_000);
            let after = world.fill(USERS, &rules);
            let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
            let most = 1.3 / n.min(others) as f64 * USERS as f64;
            assert!((moved as f64) <= most, "{n} to {others}: {moved} of {USERS}, at most {most}");
            assert!(world.fullest_by_mean() <= 1.25, "{others}: {}", world.fullest_by_mean());
        }
    }
}

#[test]
fn with_rendezvous_a_gateway_that_is_much_fuller_than_others_is_passed_over_and_only_its_users_go_elsewhere() {
    let (rules, mut world) = (rules(Algorithm::Rendezvous), World::equal(4, 100_000));
    let homes =
        |world: &World| (1..=200).map(|user| world.allocate(&someone(user), &rules, 7).candidates[0].at).collect::<Vec<_>>();
    let before = homes(&world);
    world.sent[0] = 1_000.0;
    let after = homes(&world);
    assert!(before.contains(&0) && !after.contains(&0));
    assert!(before.iter().zip(&after).all(|(before, after)| *before == 0 || before == after));
}

#[test]
fn an_experiment_has_its_share_of_the_users_and_always_the_same_ones() {
    let experiment = |name: &str, share| Experiment { name: name.to_owned(), share, algorithm: None, labels: BTreeMap::new() };
    let users = |experiment: &Experiment| {
        (1..=100_000).filter(|user| experiment.includes(UserId::parse(*user).unwrap())).collect::<BTreeSet<i64>>()
    };
    let canary = users(&experiment("canary", 0.05));
    assert!((4_700..=5_300).contains(&canary.len()), "{}", canary.len());
    // What they are is a promise: another build must not treat other users differently.
    assert_eq!(canary.iter().take(3).copied().collect::<Vec<_>>(), [68, 77, 97]);
    assert!(canary.is_subset(&users(&experiment("canary", 0.1))), "a share that grows keeps whom it has");
    let both = canary.intersection(&users(&experiment("other", 0.05))).count();
    assert!((150..=350).contains(&both), "another name, other users: {both} of 5,000 in both");
    assert_eq!((users(&experiment("none", 0.0)).len(), users(&experiment("all", 1.0)).len()), (0, 100_000));
}

#[test]
fn an_experiment_counts_as_long_as_its_labels_leave_a_gateway() {
    let labels = |value: &str| BTreeMap::from([("version".to_owned(), value.to_owned())]);
    let version = |n, value| life(n, Profile { labels: labels(value), ..of("", "") });
    let experiment = |name: &str, value| Experiment {
        name: name.to_owned(),
        share: 1.0,
        algorithm: Some(Algorithm::Rendezvous),
        labels: labels(value),
    };
    let rules = Rules { experiments: vec![experiment("newer", "3"), experiment("new", "2")], ..rules(Algorithm::LeastLoad) };
    let world = World::new([version(0, "1"), version(1, "2")]);
    let allocation = world.allocate(&someone(1), &rules, 1);
    assert_eq!((allocation.experiment, allocation.algorithm), (Some(1), Algorithm::Rendezvous));
    assert_eq!(allocation.candidates.iter().map(|one| one.at).collect::<Vec<_>>(), [1]);
    let allocation = World::new([version(0, "1")]).allocate(&someone(1), &rules, 1);
    assert_eq!((allocation.experiment, allocation.algorithm, allocation.candidates.len()), (None, Algorithm::LeastLoad, 1));
}

#[test]
fn an_experiment_keeps_nobody_with_gateways_that_are_late_or_booked_out_while_others_are_not() {
    let canary = Profile { labels: BTreeMap::from([("version".to_owned(), "2".to_owned())]), ..of("", "") };
    let experiment = Experiment { name: "canary".to_owned(), share: 1.0, algorithm: None, labels: canary.labels.clone() };
    let rules = Rules { experiments: vec![experiment], ..rules(Algorithm::LeastLoad) };
    let late = Life { lease_until: LATE, ..life(1, canary.clone()) };
    let first = |world: &World| {
        let allocation = world.allocate(&someone(1), &rules, 1);
        (allocation.candidates[0].at, allocation.candidates[0].why, allocation.experiment)
    };
    assert_eq!(first(&World::new([life(0, of("", "")), late.clone()])), (0, Why::Anywhere, None));
    let mut world = World::new([life(0, of("", "")), life(1, canary)]);
    assert_eq!(first(&world), (1, Why::Anywhere, Some(0)));
    world.is_stale = true;
    assert_eq!(first(&world), (1, Why::Late, Some(0)), "then all are late");
    world.booked = BTreeSet::from([1]);
    assert_eq!(first(&world), (0, Why::Late, None));
    world.is_stale = false;
    assert_eq!(first(&world), (0, Why::Anywhere, None));
    assert_eq!(first(&World::new([late])), (0, Why::Late, None), "better than none");
}
