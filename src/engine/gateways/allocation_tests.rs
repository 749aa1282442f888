use std::collections::BTreeMap;

use super::*;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Profile;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::store::cluster::NodeName;

const BEAT: Duration = Duration::from_secs(5);
const LEASE: Duration = Duration::from_secs(15);

fn node(n: usize) -> NodeName {
    NodeName { node_id: format!("n-{n}"), incarnation: format!("i-{n}"), addr: format!("n-{n}:6000"), zone: String::new() }
}

fn settings(login_rate: u32) -> Settings {
    let (regions, experiments) = (BTreeMap::new(), Vec::new());
    let rules = Rules { algorithm: Algorithm::TwoChoices, max_load: 0.9, bounded_load: 1.25, regions, experiments };
    let max_retry_after = Duration::from_secs(60);
    Settings { rules, default_capacity: 1_000_000, login_rate, max_retry_after, heartbeat_interval: BEAT }
}

/// So many nodes that do not talk, each with its own copy of the table.
fn nodes(count: usize, login_rate: u32) -> Vec<Arc<Allocator>> {
    let names: Vec<NodeName> = (0..count).map(node).collect();
    let one = |name: &NodeName| {
        let (peers, _calls) = Peers::new(name.clone());
        peers.set_nodes(&names);
        Allocator::new(settings(login_rate), Lives::new(), peers, Metrics::new())
    };
    names.iter().map(one).collect()
}

fn life(n: u64, weight: u32, connections: u32, beat: Timestamp) -> Arc<Life> {
    let gateway = GatewayAddr::parse(&format!("gw-{n}:7000")).unwrap();
    let profile = Arc::new(Profile { weight, ..Profile::default() });
    let life = Life::begun(Epoch(n + 1), gateway, LifeKind::Managed, beat.plus(LEASE));
    Arc::new(Life { profile, connections, last_beat: beat, ..life })
}

fn ask(user: u64) -> Ask {
    Ask::of(UserId::parse(user as i64 + 1).unwrap())
}

#[test]
fn two_nodes_that_do_not_talk_hand_out_by_weight() {
    const PER_SECOND: u64 = 1_000;
    let (nodes, weights) = (nodes(2, 0), [100, 300]);
    let (mut sent, mut reported, start) = ([0_u32; 2], [0_u32; 2], Instant::now());
    for second in 0..100 {
        let now = start + Duration::from_secs(second);
        // Beats come every five seconds, from each gateway at its own time, and do not know of whoever is sent meanwhile.
        let beat = |n: usize| second.saturating_sub((second + 2 * n as u64) % 5);
        (0..2).filter(|n| beat(*n) == second).for_each(|n| reported[n] = sent[n]);
        let lives = (0..2).map(|n| life(n as u64, weights[n], reported[n], Timestamp(beat(n) as i64 * 1_000)));
        let lives: Vec<_> = lives.collect();
        nodes.iter().for_each(|node| node.lives.replace(lives.clone(), true, now));
        for user in 0..PER_SECOND {
            let now = now + Duration::from_micros(user * 1_000_000 / PER_SECOND);
            let allocated = nodes[user as usize % 2].allocate_at(&ask(second * PER_SECOND + user), now);
            sent[allocated.offers[0].life.epoch.0 as usize - 1] += 1;
        }
        let all = f64::from(sent[0] + sent[1]);
        let share = f64::from(sent[1]) / all;
        assert!(all < 5_000.0 || (0.675..=0.825).contains(&share), "after {all}: {share} of 0.75");
    }
}

#[test]
fn what_is_sent_to_a_gateway_counts_until_it_has_beaten_also_while_the_table_changes() {
    let [node] = &nodes(1, 0)[..] else { panic!("one node") };
    let start = Instant::now();
    for second in 0..4 {
        let now = start + Duration::from_secs(second);
        let lives = [life(0, 100, 100, Timestamp(0)), life(1, 100, 0, Timestamp(0))];
        node.lives.replace(lives.to_vec(), true, now);
        let all = (0..25).all(|user| node.allocate_at(&ask(user), now).offers[0].life.epoch == Epoch(2));
        assert!(all, "the emptier one has less, with what was sent to it");
    }
    let told = node.allocate_at(&ask(0), start + Duration::from_secs(4));
    assert!((told.offers[0].load - told.offers[1].load).abs() < 0.000_01, "a hundred went there: {told:?}");
}

#[test]
fn log_ins_are_spread_over_the_gateways_rate_and_nobody_waits_longer_than_may_be() {
    let [node, other] = &nodes(2, 100)[..] else { panic!("two nodes") };
    let now = Instant::now();
    for node in [node, other] {
        node.lives.replace(vec![life(0, 100, 0, Timestamp(0))], true, now);
    }
    let waits: Vec<u128> = (0..5).map(|user| node.allocate_at(&ask(user), now).retry_after.as_millis()).collect();
    assert_eq!(waits, [0, 20, 40, 60, 80], "both nodes send 50 a second");
    for user in 5..3_001 {
        assert!(node.allocate_at(&ask(user), now).retry_after <= Duration::from_secs(60));
    }
    let refused = node.allocate_at(&ask(3_001), now);
    assert!(refused.offers.is_empty(), "{refused:?}");
    assert!((20..=60).contains(&refused.retry_after.as_secs()), "{refused:?}");
    assert_eq!(other.allocate_at(&ask(3_001), now).retry_after, Duration::ZERO, "nodes do not talk");
}

#[test]
fn without_gateways_nobody_is_sent_and_told_when_to_ask_again() {
    let [node] = &nodes(1, 0)[..] else { panic!("one node") };
    let waits: Vec<u128> = (0..100).map(|user| node.allocate(&ask(user)).retry_after.as_millis()).collect();
    assert!(waits.iter().all(|ms| (2_500..=7_500).contains(ms)), "{waits:?}");
    assert!(waits.iter().max() > waits.iter().min(), "not all at the same time");
}

#[test]
fn a_gateway_that_comes_back_still_expects_whom_it_was_told_of() {
    let [node] = &nodes(1, 100)[..] else { panic!("one node") };
    let start = Instant::now();
    let field = |second: u64, gateway: Option<(u64, u32)>| {
        let told = |(epoch, weight)| {
            let beat = Timestamp(second as i64 * 1_000);
            Arc::new(Life { epoch: Epoch(epoch), ..(*life(0, weight, 0, beat)).clone() })
        };
        let now = start + Duration::from_secs(second);
        node.lives.replace(gateway.map(told).into_iter().collect(), true, now);
        node.allocate_at(&ask(1), now)
    };
    let waits = |allocated: Allocated| (allocated.offers.len(), allocated.retry_after.as_millis());
    assert_eq!(waits(field(0, Some((1, 100)))), (1, 0));
    (0..1_999).for_each(|user| _ = node.allocate_at(&ask(user), start));
    assert_eq!(field(2, Some((1, 0))).offers.len(), 0, "it takes nobody new");
    assert_eq!(waits(field(4, Some((1, 100)))), (1, 16_000), "20 s of log-ins were handed out 4 s ago");
    assert_eq!(field(6, None).offers.len(), 0, "it is gone");
    assert_eq!(waits(field(8, Some((2, 100)))), (1, 12_010), "another process under its address");
}

/// Twenty gateways, the first `new` of them empty, and 2,000 log-ins a second through four nodes that do not talk. Returns the most
/// that one got in all, and in one second, both by the mean.
fn of_twenty(new: u64) -> (f64, f64) {
    const PER_SECOND: u64 = 2_000;
    const SECONDS: u64 = 20;
    let (nodes, start) = (nodes(4, 0), Instant::now());
    (0..).zip(&nodes).for_each(|(n, node)| node.seeds.store(n * 1_000_000, Ordering::Relaxed));
    let mut sent: Vec<u32> = (0..20).map(|n| if n < new { 0 } else { 100_000 }).collect();
    let (mut reported, began, mut worst) = (sent.clone(), sent.clone(), 0);
    for second in 0..SECONDS {
        let now = start + Duration::from_secs(second);
        let beat = |n: u64| second.saturating_sub((second + n) % 5);
        let before = sent.clone();
        (0..20).filter(|n| beat(*n) == second).for_each(|n| reported[n as usize] = sent[n as usize]);
        let lives: Vec<_> = (0..20).map(|n| life(n, 100, reported[n as usize], Timestamp(beat(n) as i64 * 1_000))).collect();
        nodes.iter().for_each(|node| node.lives.replace(lives.clone(), true, now));
        for user in 0..PER_SECOND {
            let now = now + Duration::from_micros(user * 1_000_000 / PER_SECOND);
            let allocated = nodes[user as usize % 4].allocate_at(&ask(second * PER_SECOND + user), now);
            sent[allocated.offers[0].life.epoch.0 as usize - 1] += 1;
        }
        worst = sent.iter().zip(before).map(|(after, before)| after - before).chain([worst]).max().unwrap();
    }
    let most = sent.iter().zip(began).map(|(after, before)| after - before).max().unwrap();
    let mean = (PER_SECOND / 20) as f64;
    (f64::from(most) / (mean * SECONDS as f64), f64::from(worst) / mean)
}

#[test]
fn nodes_that_do_not_talk_keep_gateways_even_and_do_not_overrun_new_ones() {
    let (most, worst) = of_twenty(0);
    assert!(most <= 1.02 && worst <= 2.5, "{most} {worst}");
    let (_, worst) = of_twenty(2);
    assert!(worst <= 2.5, "{worst}");
}
