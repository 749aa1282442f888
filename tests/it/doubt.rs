//! When many gateways fall silent at once nobody is declared dead for a while, and operators are told. A few are.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::HoldGatewaysReq;
use im_presence::pb::PurgeGatewaysReq;
use im_presence::pb::RouteState;

use crate::bad_input::check;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;

const LEASE: Duration = Duration::from_secs(5);
const BEAT: Duration = Duration::from_secs(1);
const HOLD: Duration = Duration::from_secs(8);
const SETTINGS: &[(&str, &str)] =
    &[("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "5000"), ("GATEWAY__DOUBT_FOR", "8000")];
const LONG_HOLD: &[(&str, &str)] =
    &[("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "5000"), ("GATEWAY__DOUBT_FOR", "3600000")];
/// After a lease, or a hold, is over.
const DEAD_WITHIN: Duration = Duration::from_millis(1_500);
const DEAD: &str = "SELECT COUNT(*) FROM lives WHERE alive = 0";
/// What a node says when it begins a hold.
const BEGUN: &str = "fell silent within a lease";

/// So many gateways, with beats spread over the interval and over the nodes, each with a user of the same number.
async fn fleet(cluster: &Cluster, count: i64) -> Vec<Gateway> {
    let nodes: Vec<&Node> = cluster.nodes.iter().collect();
    let mut fleet = Vec::new();
    for user in 1..=count {
        let mut order = nodes.clone();
        order.rotate_left(user as usize % nodes.len());
        let gateway = Gateway::start(&format!("gw-{user}:7000"), &order, BEAT).await;
        order[0].bind_all([user], &gateway.addr, gateway.epoch).await;
        fleet.push(gateway);
        tokio::time::sleep(BEAT / count as u32).await; // spreads the beats
    }
    fleet
}

async fn dead(cluster: &Cluster) -> i64 {
    cluster.db.number(DEAD).await
}

/// No node has ever begun a hold.
fn was_never_held(cluster: &Cluster) {
    for node in &cluster.nodes {
        let said: Vec<String> = node.log().into_iter().filter(|line| line.contains(BEGUN)).collect();
        assert!(said.is_empty(), "{said:#?}");
    }
}

/// Whether this node says everywhere that a hold is on.
async fn shows_a_hold(node: &Node) -> bool {
    let listed = node.list_gateways(false).await;
    node.degraded().await == ["hold"] && node.metric("im_presence_hold").await == 1.0 && listed.hold
}

async fn deaths(cluster: &Cluster, cause: &str) -> f64 {
    let mut deaths = 0.0;
    for node in &cluster.nodes {
        let series = node.series("im_presence_gateway_deaths_total").await;
        deaths += series.iter().filter(|(labels, _)| labels.contains(cause)).map(|(_, count)| count).sum::<f64>();
    }
    deaths
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twelve_of_twenty_silent_gateways_are_held_and_suspect_until_the_hold_ends_by_itself_and_then_they_are_dead() {
    let _turn = heavy().await;
    let mut cluster = Cluster::mariadb(2, SETTINGS).await;
    let fleet = fleet(&cluster, 20).await;
    let silent = Instant::now();
    fleet[..12].iter().for_each(Gateway::falls_silent);
    cluster.nodes[1].kill();
    cluster.nodes[1].restart().await;
    for node in &cluster.nodes {
        eventually("every node shows the hold", LEASE, async || shows_a_hold(node).await).await;
    }
    println!("held on both nodes {:?} after they fell silent, of which one was restarted", silent.elapsed());
    assert_eq!(dead(&cluster).await, 0, "none is dead before the hold");
    let listed = cluster.node().list_gateways(false).await;
    assert!(listed.hold_reason.contains("gateways fell silent"), "{listed:?}");
    for node in &cluster.nodes {
        let all_late = async || {
            let users = node.query_all(1..=20).await;
            users.iter().all(|user| {
                let expected = if user.user_id <= 12 { RouteState::Suspect } else { RouteState::Live };
                user.is_online && user.routes[0].state() == expected
            })
        };
        eventually("the silent ones are suspect, the others are not", LEASE, all_late).await;
        assert_eq!(node.list_gateways(false).await.lives.iter().filter(|life| life.held).count(), 12);
    }
    let mut left = listed.hold_left_ms;
    while left > 0 {
        assert_eq!(dead(&cluster).await, 0, "none is dead during the hold");
        assert_eq!(cluster.node().online(1..=20).await, 20);
        tokio::time::sleep(BEAT / 5).await;
        left = cluster.node().list_gateways(false).await.hold_left_ms;
    }
    assert!(silent.elapsed() > HOLD, "it lasts as long as configured: {:?}", silent.elapsed());
    for node in &cluster.nodes {
        eventually("then they are dead", DEAD_WITHIN, async || node.online(1..=20).await == 8).await;
        eventually("and the hold is over", DEAD_WITHIN, async || node.degraded().await.is_empty()).await;
    }
    println!("dead {:?} after they fell silent; hold {HOLD:?}", silent.elapsed());
    assert_eq!((dead(&cluster).await, deaths(&cluster, "held").await), (12, 12.0));
    assert!(fleet[12..].iter().all(|gateway| gateway.failed().iter().all(|why| !why.contains("epoch"))));
    assert_eq!(cluster.node().online(13..=20).await, 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_who_knows_better_ends_a_hold_at_once() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, LONG_HOLD).await;
    let fleet = fleet(&cluster, 20).await;
    fleet[..12].iter().for_each(Gateway::falls_silent);
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    eventually("a hold begins", LEASE, async || shows_a_hold(node).await).await;
    let leases_are_over =
        async || node.list_gateways(false).await.lives.iter().filter(|life| life.lease_left_ms < 0).count() == 12;
    eventually("their leases are over", LEASE, leases_are_over).await;
    let (exit, text) = node.ctl(&["gateways"]);
    assert_eq!((exit, text.matches(" held ").count(), text.contains("HOLD for")), (0, 12, true), "{text}");
    println!("{text}");
    assert_eq!(dead(&cluster).await, 0);
    let (exit, text) = node.ctl(&["gateways", "purge", "--held"]);
    assert_eq!((exit, text.trim()), (0, "12 lives declared dead"), "{text}");
    assert_eq!(node.online(1..=20).await, 8, "at once on the node that was told");
    eventually("and on the other", DEAD_WITHIN, async || other.online(1..=20).await == 8).await;
    for node in &cluster.nodes {
        eventually("the hold is over", DEAD_WITHIN, async || node.degraded().await.is_empty()).await;
    }
    assert_eq!(deaths(&cluster, "operator").await, 12.0);
    let (exit, text) = node.ctl(&["gateways", "purge", "--held"]);
    assert_eq!((exit, text.contains("no hold is on")), (3, true), "{text}");
    tokio::time::sleep(LEASE).await;
    assert_eq!(cluster.node().online(1..=20).await, 8, "and no other one begins over those that are left");
    assert!(cluster.node().degraded().await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_ends_early_when_the_gateways_are_heard_again_and_none_has_lost_its_life() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, LONG_HOLD).await;
    let fleet = fleet(&cluster, 6).await;
    let nodes: Vec<&Node> = cluster.nodes.iter().collect();
    fleet.iter().for_each(Gateway::falls_silent);
    eventually("a hold begins", LEASE, async || shows_a_hold(nodes[0]).await).await;
    tokio::time::sleep(LEASE).await; // all leases are over
    let again: Vec<Gateway> = fleet.iter().map(|it| Gateway::go_on(&it.addr, it.epoch, &nodes, BEAT)).collect();
    for node in &cluster.nodes {
        eventually("the hold ends", 3 * BEAT + DEAD_WITHIN, async || node.degraded().await.is_empty()).await;
    }
    assert_eq!((dead(&cluster).await, nodes[1].online(1..=6).await), (0, 6));
    assert!(again.iter().all(|gateway| gateway.failed().is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_time_before_a_hold_does_not_count_towards_its_early_end() {
    const BEAT: Duration = Duration::from_secs(4);
    const CLOCK: &str = "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)";
    let cluster = Cluster::mariadb(2, &[("GATEWAY__HEARTBEAT_INTERVAL", "4000"), ("GATEWAY__LEASE", "12000")]).await;
    // All has been normal for longer than an interval: two nodes that see it begin by the doubt of a third must not end it.
    tokio::time::sleep(BEAT + DEAD_WITHIN).await;
    let hold = format!("hold_until = {CLOCK} + 3600000, hold_rearm = {CLOCK} + 3600000, hold_reason = 'doubt: of another node'");
    let before = cluster.db.number(&format!("SELECT {CLOCK}")).await;
    cluster.db.run(&format!("UPDATE cluster SET {hold} WHERE id = 1")).await;
    let is_over = async || cluster.db.number("SELECT hold_until FROM cluster").await == 0;
    eventually("it ends early", 2 * BEAT, is_over).await;
    let lasted = cluster.db.number(&format!("SELECT {CLOCK}")).await - before;
    println!("the hold lasted {lasted} ms at most");
    assert!(lasted >= 4_000, "normal for one interval from its begin: {lasted} ms");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_gateways_dies_and_so_do_several_one_after_the_other_without_a_hold() {
    let _turn = heavy().await;
    for (count, dying) in [(2, 1), (8, 3)] {
        let cluster = Cluster::mariadb(2, SETTINGS).await;
        let fleet = fleet(&cluster, count).await;
        tokio::time::sleep(LEASE).await; // deaths may be declared from now on
        for (number, gateway) in (1..).zip(&fleet[..dying]) {
            gateway.falls_silent();
            let silent = Instant::now();
            for node in &cluster.nodes {
                let left = (LEASE + DEAD_WITHIN).saturating_sub(silent.elapsed());
                eventually("it is dead", left, async || !node.query(number).await.is_online).await;
            }
            println!("{number} of {count}: dead {:?} after it fell silent", silent.elapsed());
            assert_eq!(dead(&cluster).await, number);
            tokio::time::sleep(LEASE.saturating_sub(silent.elapsed())).await; // a lease between two
        }
        was_never_held(&cluster);
        assert_eq!(deaths(&cluster, "expired").await, dying as f64);
        assert!(fleet[dying..].iter().all(|gateway| gateway.failed().is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_healthy_gateways_are_never_held_and_none_dies() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, SETTINGS).await;
    let fleet = fleet(&cluster, 100).await;
    let began = Instant::now();
    while began.elapsed() < LEASE * if long() { 10 } else { 2 } {
        for node in &cluster.nodes {
            assert!(node.degraded().await.is_empty());
            assert!(node.query_all(1..=100).await.iter().all(|user| user.routes[0].state() == RouteState::Live));
        }
        tokio::time::sleep(BEAT / 5).await;
    }
    was_never_held(&cluster);
    assert_eq!(dead(&cluster).await, 0);
    assert!(fleet.iter().all(|gateway| gateway.failed().is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_that_deregister_together_are_no_reason_for_doubt_whenever_a_node_hears_of_it() {
    /// What only the reading of the whole table of lives says.
    const TABLE: &str = "swept_at = 0 OR ended_at";
    const READ_CLUSTER: &str = "hold_reason, server FROM cluster";
    let _turn = heavy().await;
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::with_redis(1, SETTINGS).await;
    cluster.add_node_through(&proxy, SETTINGS).await;
    let fleet = fleet(&cluster, 10).await;
    let [node, reads] = &cluster.nodes[..] else { panic!("two nodes") };
    // The node has read that all ten live, and the answer is on its way, when it hears that eight do not.
    assert_eq!(reads.online(1..=10).await, 10);
    proxy.hold_answers(Kind::Lane, TABLE);
    proxy.struck().await;
    for gateway in &fleet[..8] {
        gateway.falls_silent();
        node.deregister(&gateway.addr, gateway.epoch).await;
    }
    eventually("it has heard", DEAD_WITHIN, async || reads.online(1..=10).await == 2).await;
    proxy.hold_requests(READ_CLUSTER); // that answer arrives; the next look is held at its begin
    proxy.struck().await;
    proxy.release();
    was_never_held(&cluster);
    assert!(reads.degraded().await.is_empty());
    assert_eq!(reads.online(1..=10).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_holds_deaths_and_calls_it_off_and_declares_a_single_life_dead() {
    let cluster = Cluster::mariadb(2, SETTINGS).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let silent = Gateway::start(GATEWAY, &[node], BEAT).await;
    let lives_on = Gateway::start(OTHER_GATEWAY, &[other], BEAT).await;
    node.bind_all([1], GATEWAY, silent.epoch).await;
    other.bind_all([2], OTHER_GATEWAY, lives_on.epoch).await;
    let (exit, text) = node.ctl(&["gateways", "hold", "10m", "--reason", "switch maintenance"]);
    assert_eq!(exit, 0, "{text}");
    silent.falls_silent();
    let since = Instant::now();
    for node in &cluster.nodes {
        eventually("every node shows it", DEAD_WITHIN, async || shows_a_hold(node).await).await;
        assert_eq!(node.list_gateways(false).await.hold_reason, "operator: switch maintenance");
    }
    while since.elapsed() < LEASE + DEAD_WITHIN {
        assert_eq!((dead(&cluster).await, node.online([1, 2]).await), (0, 2));
        tokio::time::sleep(BEAT / 5).await;
    }
    let (exit, text) = other.ctl(&["gateways", "hold", "0"]);
    assert_eq!(exit, 0, "{text}");
    for node in &cluster.nodes {
        eventually("then it is dead", DEAD_WITHIN, async || node.online([1, 2]).await == 1).await;
    }
    let listed = other.list_gateways(false).await;
    assert_eq!((listed.hold, listed.hold_left_ms, &*listed.hold_reason), (false, 0, ""));
    let (epoch, dead_before) = (lives_on.epoch.to_string(), silent.epoch.to_string());
    let (exit, text) = other.ctl(&["gateways", "purge", &dead_before, &epoch]);
    assert_eq!((exit, text.trim()), (0, "1 life declared dead"), "{text}");
    assert_eq!(other.online([1, 2]).await, 0, "whatever its lease says");
    assert_eq!(other.ctl(&["gateways", "purge", &epoch]).0, 3, "it is over already");
    assert_eq!(other.ctl(&["gateways", "purge", "12345"]).0, 3, "nobody has that epoch");
    assert_eq!(other.ctl(&["gateways", "purge"]).0, 2, "whom?");
    let (exit, text) = other.ctl(&["gateways", "list", "--dead"]);
    assert_eq!((exit, text.matches(" dead ").count()), (0, 2), "{text}");
    let (exit, text) = other.ctl(&["--json", "gateways", "list", "--dead"]);
    let listed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((exit, listed["lives"].as_array().map(Vec::len)), (0, Some(2)), "{text}");
    let nobody = PurgeGatewaysReq::default();
    check("purge nobody", other.operator().purge_gateways(nobody).await, "epochs", "must be given");
    let many = PurgeGatewaysReq { epochs: vec![1; 10_001], held: false, ..Default::default() };
    check("purge many", other.operator().purge_gateways(many).await, "epochs", "10000");
    let talk = HoldGatewaysReq { for_ms: 1, reason: "x".repeat(201) };
    check("hold", other.operator().hold_gateways(talk).await, "reason", "200");
}
