//! An old record never comes back.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code;
use im_presence::pb::QueryRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;

/// Only what reads users for queries says this on a connection that is not a lane's.
const LOAD: &str = "FROM users u";
/// What is changed behind the daemon's back shows within a second; the rest is for the machine.
const SHOWS_WITHIN: Duration = Duration::from_millis(1_500);

/// A node that reads over a single connection, through a proxy.
async fn node_behind(more: &[(&str, &str)]) -> (Proxy, Node, TestDb) {
    let server = MariaDb::shared();
    let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
    let settings = [&[("STORE__CONNECTIONS", "1"), ("STORE__LANES", "1")], more].concat();
    let node = Node::start(db.settings_through(&proxy, &settings)).await;
    (proxy, node, db)
}

/// A load that has read the old record is held; then the user is changed; then the load arrives.
async fn race(proxy: &Proxy, node: &Node, between: impl AsyncFnOnce()) {
    let old = node.bind(a_bind(ALICE, PHONE, "old")).await;
    assert_eq!(node.query_sql(ALICE).await.version, old.version);
    proxy.hold_answers(Kind::Reader, LOAD);
    let mut client = node.presence();
    let request = QueryRouteReq { user_id: ALICE, max_staleness_ms: Some(0) };
    let load = tokio::spawn(async move { client.query_route(request).await });
    proxy.struck().await;
    let new = node.bind(a_bind(ALICE, PHONE, "new")).await;
    between().await;
    proxy.release();
    let answered = load.await.expect("the task").expect("a query").into_inner();
    assert!(answered.version >= old.version, "{answered:?}");
    for _ in 0..10 {
        let answer = node.query(ALICE).await;
        assert_eq!((answer.version, answer.routes[0].conn_id.as_str()), (new.version, "new"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_began_before_a_change_does_not_bring_the_old_record_back() {
    let (proxy, node, _db) = node_behind(&[]).await;
    race(&proxy, &node, async || {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_even_when_the_user_has_been_evicted_from_memory_meanwhile() {
    let (proxy, node, _db) = node_behind(&[("ROUTE__L1_CAPACITY", "1")]).await;
    race(&proxy, &node, async || {
        let others = (1_000..2_000).map(|user| a_bind(user, PHONE, "c")).collect();
        node.presence().batch_bind_route(BatchBindRouteReq { binds: others }).await.expect("binds");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_load_that_began_before_changes_does_not_bring_old_records_back() {
    const USERS: i64 = 100;
    let (proxy, node, _db) = node_behind(&[]).await;
    let mut client = node.presence();
    let bind_all = |conn: &str| BatchBindRouteReq { binds: (1..=USERS).map(|user| a_bind(user, PHONE, conn)).collect() };
    client.batch_bind_route(bind_all("old")).await.expect("binds");
    let query = BatchQueryRouteReq {
        user_ids: (1..=USERS).collect(),
        with_routes: true,
        max_staleness_ms: Some(0),
        ..Default::default()
    };
    proxy.hold_answers(Kind::Reader, LOAD);
    let (mut reader, request) = (node.presence(), query.clone());
    let load = tokio::spawn(async move { reader.batch_query_route(request).await });
    proxy.struck().await;
    client.batch_bind_route(bind_all("new")).await.expect("binds");
    proxy.release();
    load.await.expect("the task").expect("a batch of queries");
    let any_tier = BatchQueryRouteReq { max_staleness_ms: None, ..query };
    let answer = client.batch_query_route(any_tier).await.expect("a batch of queries").into_inner();
    assert!(answer.users.iter().all(|user| user.routes[0].conn_id == "new"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_joins_a_load_that_is_under_way_is_told_how_long_it_has_been() {
    let (proxy, node, db) = node_behind(&[("ROUTE__L1_CAPACITY", "0")]).await;
    let other = Node::start(db.settings(&[])).await;
    other.bind(a_bind(ALICE, PHONE, "old")).await;
    let ask = |max_staleness_ms| {
        let mut client = node.presence();
        tokio::spawn(async move { client.query_route(QueryRouteReq { user_id: ALICE, max_staleness_ms }).await })
    };
    proxy.hold_answers(Kind::Reader, LOAD);
    let first = ask(None);
    proxy.struck().await;
    let new = other.bind(a_bind(ALICE, PHONE, "new")).await;
    let acknowledged = Instant::now();
    tokio::time::sleep(Duration::from_millis(100)).await; // the age of what is joined
    let behind = acknowledged.elapsed();
    let (second, bounded) = (ask(None), ask(Some(60_000)));
    eventually("all wait", SHOWS_WITHIN, async || node.metric("im_presence_l1_misses_total").await >= 3.0).await;
    proxy.release();
    for (query, at_least) in [(first, Duration::ZERO), (second, behind)] {
        let answer = query.await.expect("the task").expect("a query").into_inner();
        let age = Duration::from_millis(u64::from(answer.age_ms));
        assert!(answer.version < new.version, "the load had read the old record: {answer:?}");
        assert!(age + Duration::from_millis(1) >= at_least, "{answer:?} is {at_least:?} behind at least");
    }
    let answer = bounded.await.expect("the task").expect("a query").into_inner();
    assert_eq!(answer.version, new.version, "whoever names a bound waits for a load that begins later");
}

#[tokio::test]
async fn a_user_whose_row_is_deleted_is_gone_within_a_second_and_comes_back_newer() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let before = node.bind(a_bind(ALICE, PHONE, "before")).await;
    other.query(ALICE).await;
    cluster.db.run(&format!("DELETE FROM routes WHERE user_id = {ALICE}")).await;
    cluster.db.run(&format!("DELETE FROM users WHERE user_id = {ALICE}")).await;
    let since = Instant::now();
    for node in &cluster.nodes {
        let gone = async || code(&node.query(ALICE).await.result) == Code::NotFound;
        eventually("the user is gone", SHOWS_WITHIN.saturating_sub(since.elapsed()), gone).await;
    }
    println!("gone after {:?}", since.elapsed());
    let again = other.bind(a_bind(ALICE, PHONE, "again")).await;
    assert!(again.version > before.version, "versions grow past the deleted row: {again:?}");
    eventually("the new row shows", SHOWS_WITHIN, async || node.query(ALICE).await.version == again.version).await;
}

#[tokio::test]
async fn a_user_who_is_deleted_and_made_again_at_once_is_seen_anew_within_a_second() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    node.bind(a_bind(ALICE, PHONE, "before")).await;
    cluster.db.run(&format!("DELETE FROM routes WHERE user_id = {ALICE}")).await;
    cluster.db.run(&format!("DELETE FROM users WHERE user_id = {ALICE}")).await;
    let again = other.bind(a_bind(ALICE, PHONE, "again")).await;
    assert!(again.kicked.is_empty(), "{again:?}");
    eventually("the new row shows", SHOWS_WITHIN, async || node.query(ALICE).await.version == again.version).await;
    assert_eq!(node.query(ALICE).await.routes[0].conn_id, "again");
}

#[tokio::test]
async fn a_database_set_back_to_a_backup_leaves_no_newer_answer_beyond_a_second() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let backed_up = node.bind(a_bind(ALICE, PHONE, "backed-up")).await;
    cluster.db.run("CREATE TABLE old_users AS SELECT * FROM users; CREATE TABLE old_routes AS SELECT * FROM routes").await;
    let lost = node.bind(a_bind(ALICE, PHONE, "lost")).await;
    assert_eq!(other.query(ALICE).await.version, lost.version);
    cluster
        .db
        .run("BEGIN; REPLACE INTO users SELECT * FROM old_users; REPLACE INTO routes SELECT * FROM old_routes; COMMIT")
        .await;
    let since = Instant::now();
    for node in &cluster.nodes {
        let set_back = async || node.query(ALICE).await.version == backed_up.version;
        eventually("the backup shows", SHOWS_WITHIN.saturating_sub(since.elapsed()), set_back).await;
        assert_eq!(node.query(ALICE).await.routes[0].conn_id, "backed-up");
    }
    println!("set back after {:?}", since.elapsed());
    let next = other.bind(a_bind(ALICE, PHONE, "next")).await;
    assert!(next.version > lost.version, "no version is used twice: {next:?}");
    eventually("the new bind shows", SHOWS_WITHIN, async || node.query(ALICE).await.version == next.version).await;
}
