//! The database is a Galera cluster: members die, part, join, and refuse each other's changes.

use std::time::Duration;
use std::time::Instant;

use im_presence::store::connection::Connection;
use im_presence::store::connection::Engine;
use im_presence::store::connection::Opening;
use im_presence::store::connection::Purpose;
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::galera::Door;
use crate::harness::galera::Galera;
use crate::harness::galera::is_ready;
use crate::harness::galera::isolate;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::node::Node;
use crate::harness::node::settings;
use crate::harness::percentile;
use crate::harness::proxy::Proxy;
use crate::harness::replicas::run;
use crate::harness::traffic::Traffic;

const USERS: i64 = 400;
const CALLERS: i64 = 8;
/// Members wait for 5 s before they give another up, and up to 15 s if it is in doubt.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(25);
const BACK_AGAIN: Duration = Duration::from_secs(15);
const ROUNDS: usize = 8;
const ROUND: Duration = Duration::from_secs(3);
const BINDERS: i64 = 32;

/// Nodes on a database of all members, each beginning with another one.
async fn one_node_each(galera: &Galera) -> Cluster {
    let mut cluster = Cluster::on(&galera.members[0], 0, &[]).await;
    for first in 0..galera.members.len() {
        let url = galera.url(cluster.db.name(), first);
        cluster.add_node_at(&url, &[]).await;
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_another_member_has_overtaken_is_made_again_and_no_caller_hears_of_it() {
    let _turn = heavy().await; // members that get no time leave
    let galera = Galera::start(2).await;
    let [first, second] = &galera.members[..] else { panic!("two members") };
    let (db, proxy) = (TestDb::mariadb(first).await, Proxy::start(first.port).await);
    let behind = Node::start(db.settings_through(&proxy, &[("STORE__LANES", "1")])).await;
    let other = Node::start(settings(&[("STORE__URL", &second.url(db.name()))])).await;
    behind.bind(a_bind(ALICE, PHONE, "c-1")).await;
    proxy.hold_commit();
    let mut client = behind.presence();
    let call = tokio::spawn(async move { client.bind_route(a_bind(ALICE, PHONE, "c-2")).await });
    proxy.struck().await;
    let overtook = other.bind(a_bind(ALICE, PHONE, "c-3")).await;
    proxy.release();
    let bound = call.await.expect("the task").expect("a bind").into_inner();
    assert!(bound.version > overtook.version, "it was made again, after the other: {bound:?}, {overtook:?}");
    for node in [&behind, &other] {
        assert_eq!(node.query_sql(ALICE).await.routes[0].conn_id, "c-2");
    }
    let retries = behind.series("im_presence_lane_retries_total").await;
    assert!(retries.iter().any(|(cause, n)| cause.contains("deadlock") && *n >= 1.0), "{retries:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_member_has_acknowledged_the_next_read_on_another_finds() {
    let _turn = heavy().await; // members that get no time leave
    let galera = Galera::start(2).await;
    for member in &galera.members {
        run(member, "SET GLOBAL wsrep_dirty_reads = 1").await; // a server's own defaults may be anything
    }
    let cluster = one_node_each(&galera).await;
    let [one, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let of_cluster = async |what: &str| cluster.db.number(&format!("SELECT {what} FROM cluster")).await;
    let (generation, began) = (of_cluster("generation").await, of_cluster("last_beat").await);
    for n in 0..200 {
        let bound = one.bind(a_bind(ALICE, PHONE, &format!("c-{n}"))).await;
        assert_eq!(other.query_sql(ALICE).await.version, bound.version, "after {n} binds");
    }
    let beats = async || of_cluster("last_beat").await > began + 3_000;
    eventually("both have beaten", BACK_AGAIN, beats).await;
    assert_eq!(of_cluster("generation").await, generation, "another member is no other database");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_not_ready_is_left_for_another_or_waited_for() {
    let _turn = heavy().await;
    let galera = Galera::start(3).await;
    let member = &galera.members[0];
    run(member, "SET GLOBAL wsrep_dirty_reads = 1").await; // which nodes do not take over
    let db = TestDb::mariadb(member).await;
    let bound_to_it = Node::start(db.settings(&[])).await;
    let free = Node::start(settings(&[("STORE__URL", &galera.url(db.name(), 0))])).await;
    for node in [&bound_to_it, &free] {
        node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    }
    isolate(member, true).await;
    let since = Instant::now();
    eventually("it is not ready", GIVEN_UP_WITHIN, async || !is_ready(member).await).await;
    println!("a member that is alone says so after {:?}", since.elapsed());
    eventually("binds go to another", BACK_AGAIN, async || free.try_bind(a_bind(ALICE, PHONE, "c-2")).await.is_ok()).await;
    println!("binds go to another after {:?}", since.elapsed());
    let refused = bound_to_it.try_bind(a_bind(ALICE, PHONE, "refused")).await.expect_err("there is no other");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert!(retry_delay(&refused).is_some(), "{refused:?}");
    let read = bound_to_it.try_query(ALICE, Some(0)).await.expect_err("nobody knows what the others have");
    assert_eq!(read.code(), Code::Unavailable, "{read:?}");
    isolate(member, false).await;
    eventually("it is back", GIVEN_UP_WITHIN, async || is_ready(member).await).await;
    eventually("binds work", BACK_AGAIN, async || bound_to_it.try_bind(a_bind(ALICE, PHONE, "c-3")).await.is_ok()).await;
    assert_eq!(free.query_sql(ALICE).await.routes[0].conn_id, "c-3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_die_part_and_join_lose_nothing_that_was_acknowledged_and_callers_hear_only_unavailable() {
    let _turn = heavy().await;
    let mut galera = Galera::start(3).await;
    let mut cluster = one_node_each(&galera).await;
    let traffic = Traffic::start_with(&cluster, USERS, CALLERS);
    traffic.goes_on(1_000).await;

    let at = Instant::now();
    galera.members[0].kill();
    every_node_binds(&cluster, "after the death of a member").await;
    println!("every node binds again {:?} after the death of a member", at.elapsed());
    traffic.goes_on(1_000).await;

    let at = Instant::now();
    galera.join().await;
    println!("another has joined after {:?}", at.elapsed());
    traffic.goes_on(1_000).await;

    let at = Instant::now();
    isolate(&galera.members[1], true).await;
    eventually("it is not ready", GIVEN_UP_WITHIN, async || !is_ready(&galera.members[1]).await).await;
    every_node_binds(&cluster, "after a member was parted").await;
    println!("every node binds again {:?} after a member was parted", at.elapsed());
    traffic.goes_on(1_000).await;
    isolate(&galera.members[1], false).await;
    eventually("it is back", GIVEN_UP_WITHIN, async || is_ready(&galera.members[1]).await).await;
    traffic.goes_on(1_000).await;

    let acknowledged = traffic.acknowledged();
    println!("{} users were bound by {CALLERS} callers", acknowledged.iter().filter(|(_, version)| *version > 0).count());
    let (written, seen) = traffic.stop().await;
    let refused = written.refused.iter().chain(seen.iter().flat_map(|reader| &reader.refused));
    let others: Vec<&String> = refused.filter(|refused| !refused.contains("Unavailable")).collect();
    assert!(others.is_empty(), "{others:#?}");
    cluster.db.url = galera.members[3].url(cluster.db.name());
    for (user, version) in acknowledged {
        let there = cluster.db.number(&format!("SELECT version FROM users WHERE user_id = {user}")).await;
        assert!(there as u64 >= version, "user {user}: {version} was acknowledged, {there} is there");
    }
}

/// Each node, for a user of its own.
async fn every_node_binds(cluster: &Cluster, when: &str) {
    for (node, user) in cluster.nodes.iter().zip(USERS + 1..) {
        eventually(when, GIVEN_UP_WITHIN, async || node.try_bind(a_bind(user, PHONE, "c")).await.is_ok()).await;
    }
}

/// Two nodes on one member, whose sessions wait for what the other members have acknowledged, and do not; in turn. Then what it
/// costs to ask a server who it is, as each node does once a second and each new connection once. Prints, and asserts nothing of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_it_costs_to_wait_for_the_other_members_and_to_ask_who_a_server_is() {
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let galera = Galera::start(3).await;
    let db = TestDb::mariadb(&galera.members[0]).await;
    let doors = [Door::start(&galera.members[0], true).await, Door::start(&galera.members[0], false).await];
    let mut nodes = Vec::new();
    for door in &doors {
        let url = format!("mysql://root@127.0.0.1:{}/{}", door.port, db.name());
        nodes.push(Node::start(settings(&[("STORE__URL", &url)])).await);
    }
    let (mut binds, mut queries) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..ROUNDS {
        for side in [round % 2, 1 - round % 2] {
            binds[side].push(binds_per_second(&nodes[side]).await);
            queries[side].extend(query_times(&nodes[side]).await);
        }
    }
    assert!(doors[0].changed() == 0 && doors[1].changed() > 0, "sessions of the second node do not wait");
    for (side, name) in ["wsrep_sync_wait = 7", "wsrep_sync_wait = 0"].iter().enumerate() {
        binds[side].sort_unstable_by(f64::total_cmp);
        let (p50, p99) = (percentile(&mut queries[side], 0.5), percentile(&mut queries[side], 0.99));
        println!("{name}: {:.0} binds/s (median of {ROUNDS}), a query of SQL p50 {p50:?}, p99 {p99:?}", binds[side][ROUNDS / 2]);
    }
    let ratio = binds[0][ROUNDS / 2] / binds[1][ROUNDS / 2];
    println!("binds with waiting are {ratio:.2} of those without");
    let opening = Opening { engine: Engine::MySql, purpose: Purpose::General, limit: BACK_AGAIN, deadline: BACK_AGAIN };
    let mut connection = Connection::open(&db.url, opening).await.expect("a connection");
    let mut took = Vec::new();
    for _ in 0..1_000 {
        let began = Instant::now();
        connection.look_at_server().await.expect("its variables");
        took.push(began.elapsed());
    }
    println!("to ask who a server is: p50 {:?}, p99 {:?}", percentile(&mut took, 0.5), percentile(&mut took, 0.99));
}

/// Of callers that bind users of their own.
async fn binds_per_second(node: &Node) -> f64 {
    let (mut callers, began) = (JoinSet::new(), Instant::now());
    for caller in 0..BINDERS {
        let mut client = node.presence();
        callers.spawn(async move {
            let mut binds = 0;
            while began.elapsed() < ROUND {
                client.bind_route(a_bind(1_000 * caller + binds % 100 + 1, PHONE, "c")).await.expect("a bind");
                binds += 1;
            }
            binds
        });
    }
    callers.join_all().await.into_iter().sum::<i64>() as f64 / began.elapsed().as_secs_f64()
}

async fn query_times(node: &Node) -> Vec<Duration> {
    let mut took = Vec::new();
    for user in 1..=100 {
        let began = Instant::now();
        node.query_sql(user).await;
        took.push(began.elapsed());
    }
    took
}
