//! The database fails, at the worst moments.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code as ResultCode;
use im_presence::pb::RouteState;
use im_presence::pb::Source;
use sqlx::AssertSqlSafe;
use sqlx::Row;
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::Presence;
use crate::harness::percentile;
use crate::harness::proxy::Proxy;

/// Within this all nodes agree again after a COMMIT whose outcome nobody knew.
const AGREE: Duration = Duration::from_secs(3);
/// A change waits 5 s for the database (store.max_event_age), then its caller is told.
const REFUSED_WITHIN: Duration = Duration::from_secs(6);
/// Lanes find the database again by themselves.
const BACK_AGAIN: Duration = Duration::from_secs(10);

/// A node behind a proxy that fails on demand, and one that reaches the database directly.
struct Pair {
    proxy: Proxy,
    behind: Node,
    direct: Node,
    db: TestDb,
}

impl Pair {
    async fn start() -> Self {
        let server = MariaDb::shared();
        let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
        let behind = Node::start(db.settings_through(&proxy, &[("STORE__LANES", "1")])).await;
        let direct = Node::start(db.settings(&[])).await;
        Self { proxy, behind, direct, db }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_answer_to_commit_is_lost_the_caller_is_told_and_nothing_is_applied_twice() {
    let pair = Pair::start().await;
    let before = pair.behind.bind(a_bind(ALICE, PHONE, "c-1")).await;
    assert_eq!(pair.direct.query(ALICE).await.version, before.version);

    pair.proxy.cut_after_commit();
    let unsure = pair.behind.try_bind(a_bind(ALICE, PHONE, "c-2")).await.expect_err("nobody knows whether it was done");
    assert_eq!(unsure.code(), Code::Unavailable, "{unsure:?}");
    assert!(retry_delay(&unsure).is_some(), "{unsure:?}");

    let since = Instant::now();
    for node in [&pair.behind, &pair.direct] {
        eventually("all nodes agree", AGREE, async || {
            let answer = node.query(ALICE).await;
            answer.routes.iter().all(|route| route.conn_id == "c-2") && answer.version > before.version
        })
        .await;
    }
    println!("all nodes agree after {:?}", since.elapsed());
    let committed = pair.direct.query_sql(ALICE).await;
    let repeated = pair.behind.bind(a_bind(ALICE, PHONE, "c-2")).await;
    assert_eq!((repeated.version, &repeated.route_key), (committed.version, &committed.routes[0].route_key));
    assert!(repeated.kicked.is_empty(), "{repeated:?}");
    assert_eq!(pair.db.number("SELECT COUNT(*) FROM routes").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_commit_itself_is_lost_the_caller_is_told_and_may_repeat_it() {
    let pair = Pair::start().await;
    let before = pair.behind.bind(a_bind(ALICE, PHONE, "c-1")).await;
    pair.proxy.cut_at_commit();
    let unsure = pair.behind.try_bind(a_bind(ALICE, PHONE, "c-2")).await.expect_err("nobody knows whether it was done");
    assert_eq!(unsure.code(), Code::Unavailable, "{unsure:?}");
    for node in [&pair.behind, &pair.direct] {
        eventually("all nodes agree", AGREE, async || node.query(ALICE).await.version == before.version).await;
    }
    let repeated = pair.behind.bind(a_bind(ALICE, PHONE, "c-2")).await;
    assert_eq!(repeated.kicked.len(), 1, "{repeated:?}");
    assert_eq!(pair.direct.query_sql(ALICE).await.version, repeated.version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_lost_before_commit_costs_the_caller_nothing() {
    let pair = Pair::start().await;
    pair.behind.bind(a_bind(ALICE, PHONE, "c-1")).await;
    pair.proxy.cut_before_commit();
    let bound = pair.behind.bind(a_bind(ALICE, PHONE, "c-2")).await;
    pair.proxy.struck().await;
    assert_eq!(bound.kicked.len(), 1, "it was done once: {bound:?}");
    assert_eq!(pair.direct.query_sql(ALICE).await.version, bound.version);
    assert_eq!(pair.behind.metric("im_presence_lane_retries_total").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_late_is_not_acknowledged_before_it_is_done() {
    let pair = Pair::start().await;
    pair.behind.bind(a_bind(ALICE, PHONE, "c-1")).await;
    pair.proxy.hold_commit();
    let mut client = pair.behind.presence();
    let call = tokio::spawn(async move { client.bind_route(a_bind(ALICE, PHONE, "c-2")).await });
    pair.proxy.struck().await;
    assert!(!call.is_finished(), "nobody is told before the commit");
    assert_eq!(pair.direct.query_sql(ALICE).await.routes[0].conn_id, "c-1");
    pair.proxy.release();
    let bound = call.await.expect("the task").expect("a bind").into_inner();
    assert_eq!(pair.direct.query_sql(ALICE).await.version, bound.version);
}

/// Binds one user again and again, whatever comes of it. Returns the user and the newest version that was acknowledged.
async fn keep_binding(mut client: Presence, user: i64, done: Arc<AtomicBool>) -> (i64, u64) {
    let mut acknowledged = 0;
    for i in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        match client.bind_route(a_bind(user, PHONE, &format!("c-{i}"))).await {
            Ok(bind) => acknowledged = bind.into_inner().version,
            Err(refused) => assert_eq!(refused.code(), Code::Unavailable, "{refused:?}"),
        }
    }
    (user, acknowledged)
}

/// Binds of each of `users` at once; all of them are refused in time, and told when to come again.
async fn binds_are_refused_in_time(node: &Node, users: std::ops::Range<i64>, conn: &str) {
    let began = Instant::now();
    let mut binds = JoinSet::new();
    for user in users {
        let (mut client, request) = (node.presence(), a_bind(user, PHONE, conn));
        binds.spawn(async move { client.bind_route(request).await });
    }
    for bind in binds.join_all().await {
        let refused = bind.expect_err("the database stands still");
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        assert!(retry_delay(&refused).is_some(), "{refused:?}");
    }
    println!("binds refused after {:?}", began.elapsed());
    assert!(began.elapsed() < allowed(REFUSED_WITHIN), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_database_stands_still_known_users_are_answered_with_their_age_and_late_events_change_nothing() {
    const LATE: std::ops::Range<i64> = 100..200;
    let _turn = heavy().await;
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    other.bind(a_bind(BOB, PHONE, "c")).await;
    let bound = node.bind(a_bind(ALICE, PHONE, "c")).await;
    let (mut load, done) = (JoinSet::new(), Arc::new(AtomicBool::new(false)));
    for caller in 0..16 {
        load.spawn(keep_binding(node.new_connection(), 10_000 + caller, done.clone()));
    }
    eventually("there is load", BACK_AGAIN, async || node.metric("im_presence_binds_total").await > 500.0).await;
    assert_eq!(node.query_sql(ALICE).await.version, bound.version);
    server.stop();

    let binds = binds_are_refused_in_time(node, LATE, "late");
    let queries = async {
        eventually("a user who is known is answered, but as suspect", REFUSED_WITHIN, async || {
            let answer = node.query(ALICE).await;
            assert_eq!((answer.version, answer.source()), (bound.version, Source::Local));
            answer.routes[0].state() == RouteState::Suspect && answer.age_ms > 1_000
        })
        .await;
        let too_old = node.try_query(ALICE, Some(500)).await.expect_err("it is older than the caller allows");
        let unknown = node.try_query(CAROL, None).await.expect_err("nothing is known");
        let elsewhere = node.try_query(BOB, None).await.expect_err("only the other node knows this user");
        for refused in [too_old, unknown, elsewhere] {
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
            assert!(retry_delay(&refused).is_some(), "{refused:?}");
        }
    };
    tokio::join!(binds, queries);

    server.cont();
    let elsewhere = |user: i64| BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(user, PHONE, "elsewhere") };
    eventually("binds work again", BACK_AGAIN, async || other.try_bind(a_bind(CAROL, PHONE, "c")).await.is_ok()).await;
    for user in LATE {
        let bound = other.bind(elsewhere(user)).await;
        assert!(bound.kicked.is_empty(), "a late event came before: {bound:?}");
    }
    eventually("without a restart", BACK_AGAIN, async || node.try_bind(a_bind(CAROL, PHONE, "c")).await.is_ok()).await;
    binds_of_every_lane(node).await;
    for user in LATE {
        let answer = node.query_sql(user).await;
        assert_eq!((answer.routes.len(), answer.routes[0].conn_id.as_str()), (1, "elsewhere"), "user {user}");
    }
    done.store(true, Ordering::Relaxed);
    for (user, acknowledged) in load.join_all().await {
        let answer = other.query_sql(user).await;
        assert!(answer.version >= acknowledged, "user {user}: {acknowledged} was acknowledged, but {answer:?}");
    }
    eventually("nothing is suspect any more", BACK_AGAIN, async || {
        let answer = node.query(ALICE).await;
        answer.routes[0].state() == RouteState::Live && answer.version == bound.version
    })
    .await;
}

/// When these are done, every lane has come past what it had before.
async fn binds_of_every_lane(node: &Node) {
    for user in 1_000_000..1_000_032 {
        eventually("the lane works", BACK_AGAIN, async || node.try_bind(a_bind(user, PHONE, "c")).await.is_ok()).await;
    }
}

/// What one offered bind came to, and how long that took.
#[derive(Clone)]
struct Offered {
    code: Option<Code>,
    has_retry_info: bool,
    took: Duration,
}

/// Offers binds one after the other, but does not wait for those that the node has taken: they hang as long as the database.
async fn offer(client: Presence, next: Arc<AtomicI64>, last: i64) -> Vec<Offered> {
    const TAKEN_AFTER: Duration = Duration::from_millis(20);
    let (mut done, mut hanging) = (Vec::new(), JoinSet::new());
    loop {
        let user = next.fetch_add(1, Ordering::Relaxed);
        if user > last {
            break;
        }
        let mut client = client.clone();
        hanging.spawn(async move {
            let began = Instant::now();
            let refused = client.bind_route(a_bind(user, PHONE, "offered")).await.err();
            let has_retry_info = refused.as_ref().is_some_and(|status| retry_delay(status).is_some());
            Offered { code: refused.map(|status| status.code()), has_retry_info, took: began.elapsed() }
        });
        let answered = tokio::time::timeout(TAKEN_AFTER, hanging.join_next()).await;
        done.extend(answered.ok().flatten().map(|bind| bind.expect("the task")));
    }
    done.extend(hanging.join_all().await);
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_binds_than_fit_are_refused_at_once_and_never_applied() {
    const GROWTH: u64 = 200 * 1024 * 1024;
    /// The bucket of the node's own histogram that comes nearest to 50 ms.
    const AT_ONCE: &str = "le=\"0.0512\"";
    const CALLERS_PER_CONNECTION: usize = 4;
    let _turn = heavy().await;
    // In the short form fewer are offered, so less must fit.
    let (binds, connections, queue) = if long() { (100_000, 64, "8192") } else { (20_000, 16, "2048") };
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[("STORE__QUEUE", queue)]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let clients: Vec<_> = (0..connections).map(|_| node.new_connection()).collect();
    for client in &clients {
        let mut client = client.clone();
        client.query_route(im_presence::pb::QueryRouteReq { user_id: ALICE, max_staleness_ms: None }).await.expect("connected");
    }
    let rss = node.rss_bytes();
    server.stop();

    let next = Arc::new(AtomicI64::new(1));
    let mut callers = JoinSet::new();
    for i in 0..clients.len() * CALLERS_PER_CONNECTION {
        callers.spawn(offer(clients[i % clients.len()].clone(), next.clone(), binds));
    }
    let offered = callers.join_all().await.concat();
    let growth = node.rss_bytes().saturating_sub(rss);
    let quick = node.series("im_presence_bind_seconds_bucket").await;
    let quick = quick.iter().find(|(labels, _)| labels.contains(AT_ONCE)).map_or(0.0, |(_, binds)| *binds);
    server.cont();
    binds_of_every_lane(node).await;

    assert!(offered.iter().all(|bind| bind.has_retry_info), "nobody could be served, everybody is told when to come again");
    let refused: Vec<&Offered> = offered.iter().filter(|bind| bind.code == Some(Code::ResourceExhausted)).collect();
    let others = offered.iter().filter(|bind| bind.code == Some(Code::Unavailable)).count();
    assert_eq!(refused.len() + others, offered.len());
    let mut took: Vec<Duration> = refused.iter().map(|bind| bind.took).collect();
    let (p50, p99, max) = (percentile(&mut took, 0.5), percentile(&mut took, 0.99), percentile(&mut took, 1.0));
    println!("{} of {binds} refused at once: p50 {p50:?}, p99 {p99:?}, max {max:?}; grew by {growth} bytes", refused.len());
    assert!(refused.len() > binds as usize / 4, "the test was a test");
    assert!(growth < GROWTH, "grew by {growth} bytes");
    println!("within the node, {quick} binds were answered in 51 ms");
    assert!(quick >= refused.len() as f64, "only {quick} of {} refusals took the node less than 51 ms", refused.len());
    assert!(long() || p99 < allowed(Duration::from_millis(500)), "{p99:?}");

    let applied = cluster.db.number("SELECT COUNT(*) FROM routes WHERE conn_id = 'offered'").await;
    assert_eq!(applied, 0, "everybody was told that it was not done, so nothing of it is done afterwards");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_change_that_cannot_be_stored_costs_its_own_caller_and_no_other() {
    const BINDS: i64 = 200;
    const POISONED: i64 = 77;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let trigger = "CREATE TRIGGER poison BEFORE INSERT ON routes FOR EACH ROW \
        IF NEW.device_id = 'poison' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'poison'; END IF";
    cluster.db.run(trigger).await;
    let mut binds = JoinSet::new();
    for user in 1..=BINDS {
        let (mut client, device) = (node.presence(), if user == POISONED { "poison" } else { PHONE });
        binds.spawn(async move { (user, client.bind_route(a_bind(user, device, "c")).await) });
    }
    for (user, bind) in binds.join_all().await {
        match bind {
            Ok(bind) => assert_eq!((user != POISONED, code(&bind.into_inner().result)), (true, ResultCode::Ok)),
            Err(status) => assert_eq!((user, status.code()), (POISONED, Code::Internal), "{status:?}"),
        }
    }
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes").await, BINDS - 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_the_server_ends_cost_no_caller_an_error() {
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let mut connection = cluster.db.connect().await;
    let sessions = "SELECT id FROM information_schema.PROCESSLIST WHERE db = DATABASE() AND id <> CONNECTION_ID()";
    for round in 0..3 {
        node.bind(a_bind(ALICE, PHONE, &format!("before-{round}"))).await;
        node.query_sql(ALICE).await;
        let rows = sqlx::query(sessions).fetch_all(&mut connection).await.expect("list the sessions");
        assert!(rows.len() > 1, "the node has sessions");
        for row in rows {
            // One that has ended by itself meanwhile is as good.
            let _ = sqlx::raw_sql(AssertSqlSafe(format!("KILL {}", row.get::<i64, _>(0)))).execute(&mut connection).await;
        }
        let bound = node.bind(a_bind(ALICE, PHONE, &format!("after-{round}"))).await;
        assert_eq!(node.query_sql(ALICE).await.version, bound.version);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deadlock_with_somebody_elses_transaction_reaches_no_caller() {
    let _turn = heavy().await;
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[("STORE__LANES", "1")]).await;
    let node = cluster.node();
    // The other transaction has changed more, so the lane is the victim.
    cluster.db.run("CREATE TABLE weight (n INT PRIMARY KEY)").await;
    let mut deadlocks = 0.0;
    // There is none if the lane has taken the first user in a transaction of its own, or has waited for longer than it will.
    for _ in 0..10 {
        answer_binds_in_spite_of_a_deadlock(&cluster).await;
        let retries = node.series("im_presence_lane_retries_total").await;
        println!("im_presence_lane_retries_total {retries:?}");
        deadlocks = retries.iter().filter(|(labels, _)| labels.contains("deadlock")).map(|(_, count)| count).sum();
        if deadlocks >= 1.0 {
            break;
        }
    }
    assert!(deadlocks >= 1.0);
}

/// Has the only lane lock users in the order of their ids while another transaction locks the last of them, then the first.
async fn answer_binds_in_spite_of_a_deadlock(cluster: &Cluster) {
    const USERS: i64 = 5;
    let node = cluster.node();
    let binds = |conn: &str| BatchBindRouteReq { binds: (1..=USERS).map(|user| a_bind(user, PHONE, conn)).collect() };
    node.presence().batch_bind_route(binds("before")).await.expect("binds");
    let mut other = cluster.db.connect().await;
    let heavy = "BEGIN; INSERT INTO weight SELECT seq FROM seq_1_to_1000; SELECT version FROM users WHERE user_id = 5 FOR UPDATE";
    sqlx::raw_sql(heavy).execute(&mut other).await.expect("lock the last user");
    let (mut client, request) = (node.presence(), binds("after"));
    let call = tokio::spawn(async move { client.batch_bind_route(request).await });
    eventually("the lane waits", AGREE, async || cluster.db.waiting_for_a_row().await > 0).await;
    let first = "SELECT version FROM users WHERE user_id = 1 FOR UPDATE";
    sqlx::raw_sql(first).execute(&mut other).await.expect("lock the first user, which the lane holds");
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.expect("free them");
    let answer = call.await.expect("the task").expect("an answer").into_inner();
    assert!(answer.results.iter().all(|bind| code(&bind.result) == ResultCode::Ok), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_another_program_has_locked_is_waited_for_and_then_binds_are_told_to_come_again() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let mut other = cluster.db.connect().await;
    sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut other).await.expect("lock the file");
    binds_are_refused_in_time(node, 1..20, "late").await;
    assert_eq!(node.query_sql(ALICE).await.routes[0].conn_id, "c-1", "reading goes on");
    sqlx::raw_sql("ROLLBACK").execute(&mut other).await.expect("unlock the file");
    eventually("binds work again", BACK_AGAIN, async || node.try_bind(a_bind(BOB, PHONE, "c")).await.is_ok()).await;
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes WHERE conn_id = 'late'").await, 0);
}
