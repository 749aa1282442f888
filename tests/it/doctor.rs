//! What is wrong, found by `ctl doctor` on real servers: each fault is planted, and has to be named.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::copy;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::allowed;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Process;
use crate::harness::pki::Pki;
use crate::harness::pki::text;
use crate::harness::redis::RedisServer;
use crate::nodes::get;

/// Nodes have seen each other, and the caches know their server.
const SETTLED: Duration = Duration::from_secs(15);
const REFUSES_WITHIN: Duration = Duration::from_secs(10);
/// What the sessions of the nodes ask for, and something of the same length that is not it.
const GOOD_LEVEL: &[u8] = b"READ-COMMITTED";
const OTHER_LEVEL: &[u8] = b"READ-UNCOMMITT";

/// The checks that failed, as `ctl doctor` says it.
fn failed(node: &Node) -> Vec<String> {
    let (checked, ill) = doctor(node);
    let is_told_by_sql = !ill.iter().any(|check| check == "database"); // much of it is
    assert!(checked.len() >= if is_told_by_sql { 12 } else { 11 }, "{checked:?}");
    ill
}

/// What `ctl doctor` has looked at, and what of it failed; each of these has a hint.
fn doctor(node: &Node) -> (Vec<String>, Vec<String>) {
    let (exit, said) = node.ctl(&["doctor", "--json", "--timeout", "30000"]);
    let said: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"));
    let checks = said["items"].as_array().expect("a list");
    let ill: Vec<&Value> = checks.iter().filter(|check| check["ok"] != true).collect();
    assert_eq!(exit, i32::from(!ill.is_empty()), "{said}");
    assert!(ill.iter().all(|check| check["hint"].as_str().is_some_and(|hint| !hint.is_empty())), "{said}");
    let name = |check: &Value| check["check"].as_str().expect("a name").to_owned();
    (checks.iter().map(name).collect(), ill.into_iter().map(name).collect())
}

/// Waits until the doctor names this and nothing else.
async fn names_only(node: &Node, check: &str) {
    eventually(&format!("the doctor names {check} and nothing else"), SETTLED, async || failed(node) == [check]).await;
}

async fn names(node: &Node, check: &str) {
    let named = async || failed(node).iter().any(|name| name == check);
    eventually(&format!("the doctor names {check}"), SETTLED, named).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_healthy_pair_of_nodes_passes_all_checks() {
    let cluster = Cluster::with_redis(2, &[]).await;
    for node in &cluster.nodes {
        eventually("all is well", SETTLED, async || failed(node).is_empty()).await;
        let (exit, said) = node.ctl(&["doctor"]);
        assert!(exit == 0 && said.contains("checks are well") && !said.contains("FAIL"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_an_hour_ahead_is_named() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let _right = Node::start(db.settings(&[])).await;
    let Some(wrong) = Node::start_with_clock("+1h", db.settings(&[])).await else {
        println!("skipped: libfaketime is not installed");
        return;
    };
    names_only(&wrong, "clock").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolation_level_that_somebody_changes_is_named() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let server: u16 =
        db.url.rsplit(':').next().and_then(|rest| rest.split('/').next()).expect("a port").parse().expect("a number");
    let liar = Liar::start(server).await;
    let url = format!("mysql://root@127.0.0.1:{}/{}", liar.port, db.name());
    let mut settings = db.settings(&[("STORE__TLS", "disabled")]); // else nobody stands between
    settings.push(("STORE__URL".to_owned(), url));
    let node = Node::start(settings).await;
    assert!(!failed(&node).contains(&"isolation_level".to_owned()));
    liar.lies.store(true, Ordering::Relaxed);
    names(&node, "isolation_level").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_with_the_same_node_id_is_named() {
    let settings = [("PRESENCE_SERVICE__NODE_ID", "one")];
    let mut cluster = Cluster::mariadb(1, &settings).await;
    cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", "two")]).await;
    let mut twin = Process::start(&cluster.db.settings(&settings));
    assert_eq!(twin.ended(allowed(REFUSES_WITHIN)).await.code(), Some(1));
    names_only(cluster.node(), "node_id").await;
    assert!(!failed(&cluster.nodes[1]).contains(&"node_id".to_owned()), "it is about another node");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_advertised_address_that_leads_nowhere_is_named_by_both_nodes() {
    let mut cluster = Cluster::mariadb(1, &[]).await;
    let nowhere = format!("127.0.0.1:{}", free_port());
    cluster.add_node(&[("PRESENCE_SERVICE__ADVERTISE", &nowhere)]).await;
    let both = async || failed(&cluster.nodes[1]) == ["peers", "advertise"];
    eventually("the doctor of the node names its address, and that nobody reaches it", SETTLED, both).await;
    names_only(&cluster.nodes[0], "peers").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_removes_keys_of_its_own_accord_is_named() {
    let options = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"].map(str::to_owned).to_vec();
    let cluster = Cluster::with_cache(2, &[], RedisServer::start_with(options)).await;
    names_only(cluster.node(), "redis_policy").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_others_on_a_shared_store_is_named_and_so_is_one_that_is_silent() {
    let mut cluster = Cluster::mariadb(1, &[]).await;
    names_only(cluster.node(), "peers").await;
    cluster.add_node(&[]).await;
    eventually("all is well", SETTLED, async || failed(cluster.node()).is_empty()).await;
    cluster.nodes[1].stop();
    names(cluster.node(), "peers").await;
    cluster.nodes[1].cont();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_of_an_older_release_are_named() {
    let cluster = Cluster::mariadb(2, &[]).await;
    cluster.db.run("DELETE FROM schema_steps WHERE version = 6").await;
    names_only(cluster.node(), "schema").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_open_files_that_is_too_low_is_named() {
    let db = TestDb::sqlite();
    let program = ["sh", "-c", "ulimit -n 400 && exec \"$0\"", PROGRAM].map(str::to_owned).to_vec();
    let node = Node::start_as(program, db.settings(&[])).await;
    names_only(&node, "file_limit").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_ends_in_three_days_is_named() {
    let pki = Pki::new();
    let ca = pki.ca("ca");
    let pair = ca.issue_for("node", &["127.0.0.1"], Duration::from_secs(3 * 86_400));
    let settings = [("TLS__CERT_FILE", text(&pair.cert)), ("TLS__KEY_FILE", text(&pair.key)), ("PEER__CA_FILE", text(&ca.file))];
    let cluster = Cluster::sqlite(&settings).await;
    names_only(cluster.node(), "certificates").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_configuration_that_differs_between_nodes_is_named_and_shown() {
    let mut cluster = Cluster::mariadb(1, &[("PRESENCE_SERVICE__NODE_ID", "one")]).await;
    cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", "two"), ("GATEWAY__DOUBT_SHARE", "0.4"), ("LOG__LEVEL", "debug")]).await;
    names_only(cluster.node(), "configuration").await;
    let differences = get(cluster.node(), "config/diff").await;
    let keys: Vec<&str> = differences["items"].as_array().expect("a list").iter().filter_map(|one| one["key"].as_str()).collect();
    assert_eq!(keys, ["gateway.doubt_share", "log.level"], "{differences}");
    let two = get(cluster.node(), "config?node=two").await;
    let share = &two["sections"]["gateway"]["doubt_share"];
    let want = serde_json::json!({ "value": 0.4, "default": false, "source": "env:IM_PRESENCE__GATEWAY__DOUBT_SHARE" });
    assert_eq!(*share, want, "{two}");
    let (exit, shown) = cluster.node().ctl(&["config", "--diff"]);
    let line = "gateway.doubt_share  two   0.4    env:IM_PRESENCE__GATEWAY__DOUBT_SHARE";
    assert!(exit == 0 && shown.lines().any(|shown| shown.trim_end() == line), "{shown}");
    let (exit, shown) = cluster.node().ctl(&["config", "--node", "two"]);
    assert!(exit == 0 && shown.contains("gateway.doubt_share") && !shown.contains("built-in"), "{shown}");
    assert!(cluster.node().ctl(&["config", "--all"]).1.contains("built-in"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_ask_where_nodes_differ_each_node_is_asked_once_in_two_seconds() {
    const ASKED_AGAIN_AFTER_S: f64 = 2.0;
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    eventually("both nodes know each other", SETTLED, async || failed(one).is_empty() && failed(two).is_empty()).await;
    let asked = async || {
        let calls = two.series("im_presence_calls_total").await;
        let others = calls.iter().filter(|(labels, _)| labels.contains("\"other\""));
        others.map(|(_, count)| count).sum::<f64>()
    };
    let (before, began) = (asked().await, Instant::now());
    for _ in 0..20 {
        for path in ["config/diff", "doctor"] {
            get(one, path).await;
        }
    }
    let times = 1.0 + began.elapsed().as_secs_f64() / ASKED_AGAIN_AFTER_S;
    // For its configuration, and whether it reaches this one; and a node that looks for others asks who is there.
    let questions = asked().await - before;
    assert!(questions <= 3.0 * times, "{questions} questions, {times}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_stands_still_is_named_before_whoever_asks_has_lost_patience() {
    // The others are of what only the database tells.
    const LEFT: [&str; 10] = [
        "database",
        "node_id",
        "hint_echo",
        "peers",
        "advertise",
        "redis_cache",
        "redis_queue",
        "file_limit",
        "certificates",
        "configuration",
    ];
    let server = MariaDb::start();
    // The doctor's own patience counts, not that of the node.
    let cluster = Cluster::on(&server, 2, &[("STORE__TIMEOUT", "60000")]).await;
    eventually("all is well", SETTLED, async || failed(cluster.node()).is_empty()).await;
    server.stop();
    let is_named = async || {
        let (checked, ill) = doctor(cluster.node());
        checked == LEFT && ["database", "node_id"].iter().all(|check| ill.iter().any(|name| name == check))
    };
    eventually("the doctor says so, however long the node itself would wait", SETTLED, is_named).await;
    server.cont();
}

/// Stands before MariaDB, and once it lies, says of another isolation level.
struct Liar {
    port: u16,
    lies: Arc<AtomicBool>,
    _connections: JoinSet<()>,
}

impl Liar {
    async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let lies = Arc::new(AtomicBool::new(false));
        let (mut connections, says) = (JoinSet::new(), lies.clone());
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                links.spawn(relay(client, server, says.clone()));
            }
        });
        Self { port, lies, _connections: connections }
    }
}

async fn relay(client: TcpStream, server: u16, lies: Arc<AtomicBool>) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.into_split(), server.into_split());
    let answers = async {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from_server.read(&mut bytes).await {
            let answer = &mut bytes[..count];
            if lies.load(Ordering::Relaxed)
                && let Some(at) = answer.windows(GOOD_LEVEL.len()).position(|window| window == GOOD_LEVEL)
            {
                answer[at..at + OTHER_LEVEL.len()].copy_from_slice(OTHER_LEVEL);
            }
            if to_client.write_all(answer).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        _ = copy(&mut from_client, &mut to_server) => {}
        () = answers => {}
    }
}
