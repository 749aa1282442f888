//! The database is a Galera cluster: members die, part, join, and refuse each other's changes.

use std::time::Duration;
use std::time::Instant;

use tonic::Code;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::galera::Galera;
use crate::harness::galera::is_ready;
use crate::harness::galera::isolate;
use crate::harness::heavy;
use crate::harness::node::Node;
use crate::harness::node::settings;
use crate::harness::proxy::Proxy;
use crate::harness::traffic::Traffic;

const USERS: i64 = 400;
const CALLERS: i64 = 8;
/// Members wait for 5 s before they give another up, and up to 15 s if it is in doubt.
const GIVEN_UP_WITHIN: Duration = Duration::from_secs(25);
const BACK_AGAIN: Duration = Duration::from_secs(15);

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
    let cluster = one_node_each(&galera).await;
    let [one, other] = &cluster.nodes[..] else { panic!("two nodes") };
    for n in 0..200 {
        let bound = one.bind(a_bind(ALICE, PHONE, &format!("c-{n}"))).await;
        assert_eq!(other.query_sql(ALICE).await.version, bound.version, "after {n} binds");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_not_ready_is_left_for_another_or_waited_for() {
    let _turn = heavy().await;
    let galera = Galera::start(3).await;
    let member = &galera.members[0];
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
