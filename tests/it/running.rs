//! Starting, stopping, and what an operator sees.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::process::ExitStatus;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use tokio::task::JoinSet;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Process;
use crate::harness::node::Settings;
use crate::harness::node::settings;
use crate::harness::proxy::Proxy;

const STOPS_WITHIN: Duration = Duration::from_secs(10);
/// 10 s of patience with the database, and the time to start.
const GIVES_UP_WITHIN: Duration = Duration::from_secs(15);

/// Runs the daemon to its end.
async fn run(settings: &Settings) -> (ExitStatus, Vec<String>) {
    let mut process = Process::start(settings);
    let status = process.ended(GIVES_UP_WITHIN).await;
    (status, process.log())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_finishes_calls_in_flight_and_loses_no_acknowledged_bind() {
    const CALLERS: i64 = 32;
    let _turn = heavy().await;
    for mut cluster in [Cluster::sqlite(&[]).await, Cluster::mariadb(1, &[]).await] {
        let node = &mut cluster.nodes[0];
        let (acknowledged, first_acknowledged) = tokio::sync::watch::channel(0u64);
        let mut callers = JoinSet::new();
        for caller in 1..=CALLERS {
            let (mut client, acknowledged) = (node.new_connection(), acknowledged.clone());
            callers.spawn(async move {
                let mut bound = Vec::new();
                for i in 0.. {
                    let user = caller * 1_000_000 + i;
                    let Ok(bind) = client.bind_route(a_bind(user, PHONE, "c")).await else { break };
                    bound.push((user, bind.into_inner().version));
                    acknowledged.send_modify(|binds| *binds += 1);
                }
                bound
            });
        }
        let mut under_load = first_acknowledged;
        let load = tokio::time::timeout(Duration::from_secs(20), under_load.wait_for(|binds| *binds > 1_000)).await;
        assert!(load.is_ok_and(|load| load.is_ok()), "the node is under load");
        let began = Instant::now();
        node.terminate();
        let status = node.ended().await;
        println!("{}: ended after {:?}", cluster.db.url, began.elapsed());
        assert!(status.success(), "{status}");
        assert!(began.elapsed() < allowed(STOPS_WITHIN), "{:?}", began.elapsed());

        let bound = callers.join_all().await.concat();
        cluster.nodes[0].restart().await;
        for (user, version) in &bound {
            assert_eq!(cluster.nodes[0].query_sql(*user).await.version, *version, "user {user} was acknowledged");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bind_in_the_middle_of_its_commit_is_finished_before_the_node_ends() {
    let server = MariaDb::shared();
    let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
    let mut node = Node::start(db.settings_through(&proxy, &[])).await;
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    proxy.hold_commit();
    let mut client = node.presence();
    let call = tokio::spawn(async move { client.bind_route(a_bind(ALICE, PHONE, "c-2")).await });
    proxy.struck().await;
    node.terminate();
    let draining = async || node.http("/readyz").await.0 == 503;
    eventually("it leaves the load balancer", Duration::from_secs(2), draining).await;
    assert!(!call.is_finished());
    proxy.release();
    let bound = call.await.expect("the task").expect("the call is finished").into_inner();
    assert!(node.ended().await.success());
    node.restart().await;
    assert_eq!(node.query_sql(ALICE).await.version, bound.version);
}

#[tokio::test]
async fn an_idle_node_stops_at_once_even_with_clients_connected() {
    let mut cluster = Cluster::mariadb(1, &[]).await;
    let node = &mut cluster.nodes[0];
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let began = Instant::now();
    node.terminate();
    assert!(node.ended().await.success());
    assert!(began.elapsed() < allowed(Duration::from_secs(2)), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_node_that_has_called_another_waits_for_nothing_when_it_stops() {
    let mut cluster = Cluster::mariadb(2, &[]).await;
    let node = &mut cluster.nodes[0];
    let hears_the_other = async || {
        let request = pb::ExplainRouteReq { user_id: ALICE, this_node_only: false };
        let it = node.operator().explain_route(request).await.expect("an explanation").into_inner();
        it.tiers.iter().any(|tier| !tier.node_id.is_empty() && tier.node_id != it.node_id)
    };
    eventually("the other node is called", Duration::from_secs(5), hears_the_other).await;
    node.terminate();
    assert!(node.ended().await.success());
    let waited_in_vain: Vec<String> = node.log().into_iter().filter(|line| line.contains("too long")).collect();
    assert!(waited_in_vain.is_empty(), "{waited_in_vain:?}");
}

#[tokio::test]
async fn a_node_that_stops_serves_as_long_as_load_balancers_take_to_notice() {
    const DRAIN: Duration = Duration::from_secs(8);
    let mut cluster = Cluster::sqlite(&[("PRESENCE_SERVICE__DRAIN_MS", "8000")]).await;
    let node = &mut cluster.nodes[0];
    let began = Instant::now();
    node.terminate();
    let says_so = async || node.http("/readyz").await.0 == 503;
    eventually("it says that it stops", Duration::from_secs(2), says_so).await;
    let late = node.new_connection().bind_route(a_bind(ALICE, PHONE, "c")).await;
    assert!(late.is_ok(), "a client that was not told yet is served: {late:?}");
    assert!(node.ended().await.success());
    assert!(began.elapsed() >= DRAIN, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_service_manager_is_told_when_a_node_listens_and_when_it_stops() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("notify");
    let manager = UnixDatagram::bind(&path).expect("a socket");
    manager.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
    let told = || {
        let mut text = [0; 256];
        manager.recv(&mut text).map(|n| String::from_utf8_lossy(&text[..n]).into_owned())
    };
    let program = || vec!["env".to_owned(), format!("NOTIFY_SOCKET={}", path.display()), PROGRAM.to_owned()];
    let db = TestDb::sqlite();
    let mut node = Node::start_as(program(), db.settings(&[])).await;
    assert_eq!(told().expect("a word"), "READY=1");

    let (another, port) = (TestDb::sqlite(), node.data.port().to_string());
    let mut late = Process::start_as(&program(), &another.settings(&[("PRESENCE_SERVICE__PORT", &port)]));
    let taken = late.ended(GIVES_UP_WITHIN).await;
    assert_eq!(taken.code(), Some(1), "its port is taken");
    manager.set_nonblocking(true).expect("a socket");
    assert_eq!(told().expect_err("nothing").kind(), io::ErrorKind::WouldBlock, "one that does not listen is not ready");

    manager.set_nonblocking(false).expect("a socket");
    node.terminate();
    assert_eq!(told().expect("a word"), "STOPPING=1\nEXTEND_TIMEOUT_USEC=9500000");
    assert!(node.ended().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stops_in_time_though_the_database_stands_still() {
    let server = MariaDb::start();
    let mut cluster = Cluster::on(&server, 1, &[]).await;
    let node = &mut cluster.nodes[0];
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    server.stop();
    let mut client = node.presence();
    let call = tokio::spawn(async move { client.bind_route(a_bind(ALICE, PHONE, "c-2")).await });
    let waits = async || node.metric("im_presence_lane_queue_depth").await == 0.0 && !call.is_finished();
    eventually("the lane has the bind", Duration::from_secs(2), waits).await;
    let began = Instant::now();
    node.terminate();
    let status = node.ended().await;
    assert!(status.success() && began.elapsed() < allowed(STOPS_WITHIN), "{status} after {:?}", began.elapsed());
    assert!(call.await.expect("the task").is_err(), "what could not be stored is not acknowledged");
}

#[tokio::test]
async fn a_second_node_on_the_same_file_refuses_in_one_clear_line() {
    let cluster = Cluster::sqlite(&[]).await;
    let began = Instant::now();
    let (status, log) = run(&cluster.db.settings(&[])).await;
    assert_eq!(status.code(), Some(1));
    let [line] = &log[..] else { panic!("one line: {log:#?}") };
    assert!(line.contains("another process uses") && line.contains("presence.db") && line.contains("mysql://"), "{line}");
    assert!(began.elapsed() < allowed(Duration::from_secs(5)), "{:?}", began.elapsed());
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await; // the first one is not disturbed
}

#[tokio::test]
async fn a_database_that_is_not_there_is_one_clear_line_and_exit_1() {
    let url = format!("mysql://root:secret@127.0.0.1:{}/im", free_port());
    let began = Instant::now();
    let (status, log) = run(&settings(&[("STORE__URL", &url)])).await;
    assert_eq!(status.code(), Some(1));
    let [line] = &log[..] else { panic!("one line: {log:#?}") };
    assert!(line.contains("127.0.0.1") && line.contains("not reachable") && line.contains("10 s"), "{line}");
    assert!(!line.contains("secret"), "the password stays secret: {line}");
    assert!(began.elapsed() >= Duration::from_secs(9), "it was given some time: {:?}", began.elapsed());
}

#[tokio::test]
async fn a_database_that_comes_up_late_is_waited_for() {
    let server = MariaDb::start();
    let db = TestDb::mariadb(&server).await;
    server.stop();
    let start = Node::start(db.settings(&[]));
    let late = async {
        tokio::time::sleep(Duration::from_secs(2)).await; // how late it is
        server.cont();
    };
    let (node, ()) = tokio::join!(start, late);
    node.bind(a_bind(ALICE, PHONE, "c")).await;
}

#[tokio::test]
async fn a_key_nobody_knows_is_exit_2_and_named() {
    let cases = [
        (("ROUTE__MAX_DEVICE", "5"), "max_device"),
        (("ROUTE__MAX_DEVICES", "many"), "max_devices"),
        (("ROUTE__ROUTE_TTL", "0"), "route_ttl"),
        (("STORE__URL", "postgres://x"), "url"),
    ];
    for (setting, named) in cases {
        let (status, log) = run(&settings(&[setting])).await;
        assert_eq!(status.code(), Some(2), "{setting:?}: {log:#?}");
        assert!(log.iter().any(|line| line.contains(named)), "{setting:?}: {log:#?}");
    }
}

#[tokio::test]
async fn a_path_the_admin_port_does_not_know_is_not_found() {
    let cluster = Cluster::sqlite(&[]).await;
    for path in ["/index", "/ready", "/health", "/readyz/"] {
        // A load balancer with a mistyped path must not take this node for healthy.
        assert_eq!(cluster.node().http(path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn the_admin_port_says_how_the_node_is() {
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    node.query_sql(ALICE).await;
    assert_eq!(node.http("/livez").await.0, 200);
    for path in ["/readyz", "/healthz"] {
        let (status, body) = node.http(path).await;
        assert_eq!(status, 200, "{path}: {body}");
    }
    assert_eq!(node.metric("im_presence_binds_total").await, 1.0);
    assert_eq!(node.metric("im_presence_queries_total").await, 1.0);
    assert_eq!(node.metric("im_presence_store_up").await, 1.0);

    server.kill();
    let unhealthy = async || node.http("/healthz").await.0 == 503;
    eventually("the loss of the database shows", Duration::from_secs(10), unhealthy).await;
    let (status, body) = node.http("/readyz").await;
    assert_eq!(status, 200, "every node has lost it: that must not empty the load balancer");
    assert!(body.contains("store"), "what is missing is named: {body}");
    assert_eq!(node.http("/livez").await.0, 200);
    server.restart();
    let healthy = async || node.http("/healthz").await.0 == 200;
    eventually("and its return", Duration::from_secs(10), healthy).await;
}
