//! Nodes that work on the same users, and a node that stands still with users locked.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchBindRouteResp;
use im_presence::pb::Code;
use tokio::task::JoinSet;
use tonic::Response;
use tonic::Status;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::Presence;
use crate::harness::proxy::LAST_BEFORE_COMMIT;
use crate::harness::proxy::Proxy;

/// After this a node that stands still has lost its locks.
const LOCKS_END: Duration = Duration::from_secs(11);
/// Of each caller, however slow the machine.
const BINDS_AT_LEAST: u64 = 1_000;
const OTHERS_WAIT: Duration = Duration::from_secs(2);
const LATE: &str = "late";
const ONE_LANE: &[(&str, &str)] = &[("STORE__LANES", "1")];

/// The lanes of a node fill their batches from many such callers.
async fn keep_binding(mut client: Presence, users: i64, seed: i64, until: Instant) -> (u64, Duration) {
    const BATCH: i64 = 256;
    let (mut bound, mut slowest) = (0, Duration::ZERO);
    let mut at = seed;
    while Instant::now() < until || bound < BINDS_AT_LEAST {
        at += 1;
        let user = |i: i64| (at * 7_919 + i * 1_663) % users + 1;
        let binds = (0..BATCH).map(|i| a_bind(user(i), PHONE, &format!("c-{seed}-{at}"))).collect();
        let began = Instant::now();
        let answer = client.batch_bind_route(BatchBindRouteReq { binds }).await.expect("no error reaches a caller").into_inner();
        slowest = slowest.max(began.elapsed());
        for bind in &answer.results {
            assert_eq!(code(&bind.result), Code::Ok, "no error reaches a caller: {bind:?}");
        }
        bound += answer.results.len() as u64;
    }
    (bound, slowest)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_write_the_same_users_do_not_fail_each_others_callers() {
    const USERS: i64 = 2_000;
    const CALLERS_PER_NODE: i64 = 6;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, &[]).await;
    let until = Instant::now() + if long() { Duration::from_secs(30) } else { Duration::from_secs(5) };
    let mut callers = JoinSet::new();
    for (i, node) in (0i64..).zip(&cluster.nodes) {
        for caller in 0..CALLERS_PER_NODE {
            callers.spawn(keep_binding(node.new_connection(), USERS, i * 1_000_003 + caller * 10_007, until));
        }
    }
    let done = callers.join_all().await;
    let (bound, slowest) = done.into_iter().fold((0, Duration::ZERO), |(n, slow), (m, s)| (n + m, slow.max(s)));
    println!("{bound} binds of {USERS} users through two nodes; slowest batch {slowest:?}");
    for (i, node) in cluster.nodes.iter().enumerate() {
        println!("node {i}: im_presence_lane_retries_total {:?}", node.series("im_presence_lane_retries_total").await);
    }
    assert!(bound > 10_000, "the test was a test");
}

/// Stops a node, whose only lane reaches the database through `proxy`, while that lane holds the rows of all `users`.
async fn stop_in_the_middle_of_a_batch(
    node: &Node,
    proxy: &Proxy,
    users: i64,
) -> tokio::task::JoinHandle<Result<Response<BatchBindRouteResp>, Status>> {
    let send = |binds| {
        let mut client = node.new_connection();
        tokio::spawn(async move { client.batch_bind_route(BatchBindRouteReq { binds }).await })
    };
    proxy.hold_requests(LAST_BEFORE_COMMIT);
    send(vec![a_bind(2 * users, PHONE, "c")]); // while the lane is busy with it, the others queue up: they become one batch
    proxy.struck().await;
    let call = send((1..=users).map(|user| a_bind(user, PHONE, LATE)).collect());
    let are_queued = async || node.metric("im_presence_lane_queue_depth").await == users as f64;
    eventually("they are queued", OTHERS_WAIT, are_queued).await;
    proxy.hold_requests(LAST_BEFORE_COMMIT);
    proxy.struck().await;
    node.stop();
    call
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stopped_in_the_middle_of_a_batch_holds_its_users_for_11_s_at_most_and_nobody_else() {
    const USERS: i64 = 100;
    let _turn = heavy().await;
    let server = MariaDb::start();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::on(&server, 0, &[]).await;
    cluster.add_node_through(&proxy, ONE_LANE).await;
    cluster.add_node(ONE_LANE).await;
    let [stopped, other] = &cluster.nodes[..] else { panic!("two nodes") };
    for node in &cluster.nodes {
        let binds = (1..=USERS).map(|user| a_bind(user, PHONE, "before")).collect();
        node.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds");
    }
    let late_call = stop_in_the_middle_of_a_batch(stopped, &proxy, USERS).await;
    let since = Instant::now();

    // A batch of a locked user and a free one: the free one does not wait for the other.
    let mut client = other.new_connection();
    let binds = vec![a_bind(ALICE, PHONE, "mixed"), a_bind(USERS + 1, PHONE, "mixed")];
    let mixed = tokio::spawn(async move { client.batch_bind_route(BatchBindRouteReq { binds }).await });
    eventually("a user who is free is bound", OTHERS_WAIT, async || other.query_sql(USERS + 1).await.is_online).await;
    println!("free user in a batch with a locked one: bound after {:?}", since.elapsed());

    let (mut slowest, mut stranger) = (Duration::ZERO, USERS + 1);
    let mut locked = JoinSet::new();
    let try_locked = |locked: &mut JoinSet<_>| {
        let mut client = other.new_connection();
        locked.spawn(async move { client.bind_route(a_bind(ALICE + 1, PHONE, "after")).await });
    };
    try_locked(&mut locked);
    loop {
        stranger += 1;
        let began = Instant::now();
        other.bind(a_bind(stranger, PHONE, "c")).await;
        slowest = slowest.max(began.elapsed());
        match locked.try_join_next() {
            Some(Ok(Ok(_))) => break,
            Some(_) => try_locked(&mut locked),
            None => {}
        }
        assert!(since.elapsed() < allowed(LOCKS_END), "the users of the stopped node cannot be bound");
    }
    println!("locked user bound after {:?}; {} others meanwhile, slowest {slowest:?}", since.elapsed(), stranger - USERS - 1);
    assert!(slowest < allowed(OTHERS_WAIT), "{slowest:?}");
    let mixed = mixed.await.expect("the task").expect("half of the batch was done").into_inner();
    assert_eq!(mixed.results.iter().map(|bind| code(&bind.result)).collect::<Vec<_>>(), [Code::Unavailable, Code::Ok]);

    stopped.cont();
    proxy.release();
    let late = late_call.await.expect("the task");
    println!("the stopped node's caller hears {:?}", late.map(|_| "an answer").map_err(|status| status.code()));
    stopped.bind(a_bind(stranger + 1, PHONE, "c")).await; // its only lane has come past the late batch
    let late_routes = cluster.db.number(&format!("SELECT COUNT(*) FROM routes WHERE conn_id = '{LATE}'")).await;
    assert_eq!(late_routes, 0, "nothing is applied late");
    assert_eq!(stopped.query_sql(ALICE + 1).await.routes[0].conn_id, "after");
}
