//! Nodes in several zones: callers and gateways stay in their own, as long as a node there answers.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use im_presence::client::caller::Caller;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Gateway;
use im_presence::client::gateway::Options;
use im_presence::client::security::Security;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code;
use im_presence::pb::QueryRouteReq;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::stream::connection;

const USERS: i64 = 20;
const SOON: Duration = Duration::from_secs(15);

/// Two nodes, of which the first is in the zone that the others here are in.
async fn two_zones() -> Cluster {
    let mut cluster = Cluster::with_redis(0, &[]).await;
    for zone in ["here", "there"] {
        cluster.add_node(&[("NODE__ZONE", zone)]).await;
    }
    cluster
}

/// Queries that a node has answered.
async fn asked(node: &Node) -> f64 {
    node.series("im_presence_calls_total").await.iter().filter(|(labels, _)| labels.contains("Query")).map(|(_, n)| n).sum()
}

/// Asks for everybody, one by one and together.
async fn ask(caller: &Caller) {
    for user_id in 1..=USERS {
        caller.query(QueryRouteReq { user_id, max_staleness_ms: None }).await.expect("an answer");
        let request = BatchQueryRouteReq { user_ids: vec![user_id], ..Default::default() };
        caller.query_many(request).await.expect("an answer");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_stay_in_the_zone_as_long_as_a_node_there_answers_and_come_back() {
    let mut cluster = two_zones().await;
    let [near, far] = [0, 1].map(|n: usize| cluster.nodes[n].data.to_string());
    let caller = Caller::in_zone(&[&near], &[&far], allowed(SOON), &Security::default()).expect("addresses");
    let listed = async || caller.nodes().await.expect("an answer").nodes;
    eventually("each says where it is", SOON, async || listed().await.len() == 2).await;
    let own = listed().await.into_iter().filter(|node| node.zone == "here").map(|node| node.addr);
    assert_eq!(own.collect::<Vec<_>>(), [&*near], "so a caller finds its own");
    assert!((1..=USERS).all(|user| caller.home_of(user) == near));
    ask(&caller).await;
    assert_eq!((asked(&cluster.nodes[0]).await, asked(&cluster.nodes[1]).await), (2.0 * USERS as f64, 0.0));
    cluster.nodes[0].kill();
    ask(&caller).await;
    assert_eq!(asked(&cluster.nodes[1]).await, 2.0 * USERS as f64);
    cluster.nodes[0].restart().await;
    let is_back = async || {
        ask(&caller).await;
        asked(&cluster.nodes[0]).await > 0.0
    };
    eventually("calls come back", SOON, is_back).await;
    let before = asked(&cluster.nodes[1]).await;
    ask(&caller).await;
    assert_eq!(asked(&cluster.nodes[1]).await, before, "they stay");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_attaches_in_its_zone_and_elsewhere_only_while_nobody_is_there() {
    let mut cluster = two_zones().await;
    let [near, far] = [0, 1].map(|n: usize| cluster.nodes[n].data.to_string());
    let (nodes, other_zones) = (vec![near], vec![far]);
    let options = Options { nodes, other_zones, gateway_addr: GATEWAY.to_owned(), ..Options::default() };
    let lives = Arc::new(AtomicU64::new(0));
    let begun = lives.clone();
    let gateway = Gateway::start(options, move |event| {
        if let Event::Attached { epoch } = event {
            begun.fetch_max(epoch, Ordering::Relaxed);
        }
    });
    let gateway = gateway.expect("addresses");
    let bound = gateway.bind(connection(ALICE, PHONE, "c")).await.expect("it runs");
    assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    let life = lives.load(Ordering::Relaxed);
    let has_stream = async |node: &Node| node.metric("im_presence_streams").await == 1.0;
    assert!(has_stream(&cluster.nodes[0]).await, "it is in its zone");
    cluster.nodes[0].kill();
    eventually("it is elsewhere", SOON, async || has_stream(&cluster.nodes[1]).await).await;
    cluster.nodes[0].restart().await;
    cluster.nodes[1].kill();
    eventually("it is back", SOON, async || has_stream(&cluster.nodes[0]).await).await;
    assert_eq!(lives.load(Ordering::Relaxed), life, "it is the same life");
    assert!(cluster.nodes[0].query_sql(ALICE).await.is_online);
}
