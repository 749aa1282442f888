//! How the system is, and each of its nodes, as any node tells it.

use std::time::Duration;

use im_presence::pb;
use serde_json::Value;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;

/// A node is taken for silent after a second.
const SOON: Duration = Duration::from_secs(10);
/// Rates are over the last ten to twenty seconds.
const RATES_WITHIN: Duration = Duration::from_secs(15);

pub async fn get(node: &Node, path: &str) -> Value {
    let (status, body) = node.http(&format!("/api/v1/{path}")).await;
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).expect("JSON")
}

async fn item(node: &Node, node_id: &str) -> Value {
    let nodes = get(node, "nodes").await;
    let found = nodes["items"].as_array().expect("a list").iter().find(|item| item["node_id"] == node_id).cloned();
    found.unwrap_or_else(|| panic!("{node_id} in {nodes}"))
}

async fn pair() -> Cluster {
    let mut cluster = Cluster::with_redis(0, &[]).await;
    for name in ["one", "two"] {
        cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", name), ("NODE__ZONE", "here")]).await;
    }
    let both = async || get(cluster.node(), "nodes").await["items"].as_array().is_some_and(|items| items.len() == 2);
    eventually("both nodes are listed", SOON, both).await;
    cluster
}

#[tokio::test]
async fn each_node_tells_how_all_of_them_are() {
    let cluster = pair().await;
    for node in &cluster.nodes {
        for (name, other) in [("one", &cluster.nodes[0]), ("two", &cluster.nodes[1])] {
            let mut told = Value::Null;
            eventually("it answers", SOON, async || {
                told = item(node, name).await;
                told["ready"] == true
            })
            .await;
            let item = told;
            assert_eq!(item["addr"], other.data.to_string(), "{item}");
            assert_eq!((&item["version"], &item["zone"]), (&Value::from(env!("CARGO_PKG_VERSION")), &Value::from("here")));
            for part in ["sql_ok", "redis_cache_ok", "redis_queue_ok"] {
                assert_eq!(item[part], true, "{part}: {item}");
            }
            assert!(item["up_since_ms"].as_i64().is_some_and(|at| at > 1_700_000_000_000), "{item}");
            assert!(item.get("error").is_none() && item["degraded"] == Value::from(Vec::<String>::new()), "{item}");
            assert_eq!(item["tls"]["data"], "off");
        }
    }
}

#[tokio::test]
async fn a_node_that_is_silent_is_listed_with_its_error_and_named_in_the_verdict() {
    let cluster = pair().await;
    cluster.nodes[1].stop();
    let silent = async || item(cluster.node(), "two").await["error"].as_str().is_some_and(|why| why.contains("no answer"));
    eventually("it is silent", SOON, silent).await;
    let item = item(cluster.node(), "two").await;
    assert_eq!((&item["ready"], &item["version"]), (&Value::Null, &Value::Null), "{item}");
    let summary = get(cluster.node(), "summary").await;
    assert_eq!(summary["verdict"], "degraded", "{summary}");
    assert!(summary["because"].to_string().contains("node two: "), "{summary}");
    let of_two = summary["nodes"].as_array().and_then(|nodes| nodes.iter().find(|node| node["node_id"] == "two")).cloned();
    assert_eq!(of_two, Some(serde_json::json!({ "node_id": "two", "ready": false, "degraded": ["silent"] })));
    let (status, body) = cluster.node().http("/api/v1/nodes/two/streams").await;
    assert_eq!(status, 503, "{body}");
    cluster.nodes[1].cont();
    eventually("it answers again", SOON, async || item_is_ready(cluster.node(), "two").await).await;
    eventually("all is well", SOON, async || get(cluster.node(), "summary").await["verdict"] == "ok").await;
}

async fn item_is_ready(node: &Node, node_id: &str) -> bool {
    item(node, node_id).await["ready"] == true
}

#[tokio::test]
async fn streams_are_told_by_any_node_and_the_longest_queue_comes_first() {
    let cluster = pair().await;
    let (one, two) = (&cluster.nodes[0], &cluster.nodes[1]);
    let quick = TestGateway::start(std::slice::from_ref(two), "gw-quick:7000", Devices::Acknowledge).await;
    let (mut slow, epoch) = RawStream::attach(two, "gw-slow:7000", 0).await;
    quick.bind(ALICE, PHONE, "c1").await;
    slow.bind(2, PHONE, "c2").await;
    let request = pb::DeliverReq { user_id: ALICE, message: "hello".into(), ..Default::default() };
    two.presence().deliver(request).await.expect("a delivery");
    let told = async || get(one, "nodes/two/streams?sort=queue").await["items"].as_array().map(Vec::len) == Some(2);
    eventually("both streams are told", SOON, told).await;
    let streams = get(one, "nodes/two/streams?sort=queue").await;
    let of = |addr: &str| streams["items"].as_array().and_then(|all| all.iter().find(|one| one["gateway_addr"] == addr)).cloned();
    let (quick, slow) = (of("gw-quick:7000").expect("a stream"), of("gw-slow:7000").expect("a stream"));
    assert_eq!(quick["delivered"], 1, "{quick}");
    assert_eq!((&slow["epoch"], &slow["delivered"]), (&Value::from(epoch.to_string()), &Value::from(0)), "{slow}");
    assert!(slow["queue_max"].as_u64().is_some_and(|max| max > 0) && slow["since_ms"].as_i64().is_some(), "{slow}");
    assert_eq!(get(one, "nodes/two/streams?limit=1").await["items"].as_array().map(Vec::len), Some(1));
    let (status, body) = one.http("/api/v1/nodes/three/streams").await;
    assert_eq!(status, 404, "{body}");
}

#[tokio::test]
async fn the_summary_has_what_the_first_page_needs() {
    let cluster = pair().await;
    let node = cluster.node();
    let epoch = node.register("gw-1:7000").await;
    node.try_beat("gw-1:7000", epoch).await.expect("a beat");
    node.bind(pb::BindRouteReq { gateway_epoch: epoch, ..a_bind(ALICE, PHONE, "c1") }).await;
    node.query(ALICE).await;
    let lives = async || get(&cluster.nodes[1], "summary").await["gateways"]["alive"] == 1;
    eventually("the gateway is counted", SOON, lives).await;
    let rates = async || get(&cluster.nodes[1], "summary").await["rates"]["binds"].as_f64().is_some_and(|rate| rate > 0.0);
    eventually("the rates of the other node are in it", RATES_WITHIN, rates).await;
    let summary = get(&cluster.nodes[1], "summary").await;
    for (key, want) in [("version", env!("CARGO_PKG_VERSION")), ("system", cluster.db.name()), ("verdict", "ok")] {
        assert_eq!(summary[key], want, "{summary}");
    }
    assert_eq!((&summary["hold"], &summary["drains"]), (&Value::Null, &Value::from(0)), "{summary}");
    let share = &summary["hit_share"];
    let sum: f64 = ["memory", "redis", "sql"].iter().filter_map(|tier| share[tier].as_f64()).sum();
    assert!((sum - 1.0).abs() < 1e-9, "{summary}");
    assert!(summary["latency_ms"]["bind_p99"].as_f64().is_some_and(|ms| ms > 0.0), "{summary}");
    let metrics = get(&cluster.nodes[1], "metrics?node=one").await;
    let of = |name: &str| metrics["items"].as_array().and_then(|all| all.iter().find(|one| one["name"] == name)).cloned();
    assert_eq!(of("binds").expect("a number")["value"], 1.0, "{metrics}");
    let (status, _) = node.http("/api/v1/metrics?node=three").await;
    assert_eq!(status, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_database_stands_still_every_node_says_so_and_that_nothing_can_be_stored() {
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 2, &[]).await;
    server.stop();
    for node in &cluster.nodes {
        let down = async || get(node, "summary").await["verdict"] == "down";
        eventually("the verdict is down", SOON, down).await;
        let summary = get(node, "summary").await;
        assert!(summary["because"].to_string().contains("the database does not answer"), "{summary}");
    }
    server.cont();
    eventually("all is well again", SOON, async || get(cluster.node(), "summary").await["verdict"] == "ok").await;
}
