//! How one delivery went, step by step, as an operator is shown it.

use std::time::Duration;

use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::DeliverResp;
use im_presence::pb::DeliveryStep;
use tonic::Request;

use crate::deliver::a_message;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::node::Node;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;

/// Of devices that do answer, on a machine that builds something else meanwhile.
const PATIENCE_MS: u32 = 5_000;
/// Of those that do not.
const IMPATIENCE_MS: u32 = 200;
/// First at once, then after a pause.
const TWO_RETRIES: [(&str, &str); 2] = [("ROUTE__MAX_RETRIES", "2"), ("ROUTE__RETRY_INTERVAL", "50")];

/// The call of an operator who wants to see the steps.
pub fn traced(message: DeliverReq) -> Request<DeliverReq> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("im-trace", "1".parse().expect("a number"));
    request
}

async fn steps_of(node: &Node, message: DeliverReq) -> DeliverResp {
    let answer = node.presence().deliver(traced(message)).await.expect("a delivery").into_inner();
    assert!(answer.steps.is_sorted_by_key(|step| step.at_us), "{answer:#?}");
    answer
}

fn whats(answer: &DeliverResp) -> Vec<&str> {
    answer.steps.iter().map(|step| step.what.as_str()).collect()
}

#[track_caller]
fn the<'a>(answer: &'a DeliverResp, what: &str) -> &'a DeliveryStep {
    answer.steps.iter().find(|step| step.what == what).unwrap_or_else(|| panic!("no {what}: {answer:#?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_through_another_node_is_followed_until_the_device_has_it() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = TestGateway::at(vec![two.data.to_string()], GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let message = || DeliverReq { ack_timeout_ms: PATIENCE_MS, message_id: "m".into(), ..a_message(ALICE, "hello") };
    let answer = steps_of(one, message()).await;
    let seen = whats(&answer);
    let order = ["turn", "looked_up", "route", "handed", "acked"];
    let places: Vec<_> = order.iter().map(|what| seen.iter().rposition(|seen| seen == what)).collect();
    assert!(places.is_sorted() && places.iter().all(Option::is_some) && seen.contains(&"waiting"), "{answer:#?}");
    let (route, handed, acked) = (the(&answer, "route"), the(&answer, "handed"), the(&answer, "acked"));
    let own = answer.delivery_id.rsplit_once('-').expect("an id names its node").0;
    assert!(!route.node_id.is_empty() && route.node_id != own, "{route:?}");
    assert_eq!((&*route.gateway_addr, &*route.device_id), (GATEWAY, PHONE));
    assert_eq!((&handed.node_id, &*handed.gateway_addr), (&route.node_id, GATEWAY));
    assert!(handed.took_us > 0 && acked.device_id == PHONE && acked.at_us >= handed.at_us, "{answer:#?}");
    assert!(the(&answer, "looked_up").detail.contains(" from "), "{answer:#?}");

    let again = steps_of(one, message()).await;
    assert_eq!((whats(&again), again.delivered), (vec!["repeat"], true));
    assert!(one.deliver(message()).await.steps.is_empty(), "nobody asked");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_says_how_many_received_it_and_why_it_is_tried_again() {
    let cluster = Cluster::with_redis(1, &TWO_RETRIES).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let nobody = steps_of(node, a_message(ALICE, "hello")).await;
    let published: Vec<_> = nobody.steps.iter().filter(|step| step.what == "published").collect();
    assert!(published.len() == 3 && published.iter().all(|step| step.detail == "receivers: 0"), "{nobody:#?}");
    let retried: Vec<_> = nobody.steps.iter().filter(|step| step.what == "retried").map(|step| &*step.detail).collect();
    let why = |ms| format!("no gateway took it: again in {ms} ms, past every cache");
    assert_eq!(retried, [why(0), why(50)]);
    assert!(nobody.steps.iter().any(|step| step.detail.contains("from the database, live routes: 1")), "{nobody:#?}");
    assert!(the(&nobody, "route").detail.contains("without a stream"), "{nobody:#?}");

    let _subscriber = cluster.queue().subscribe(&["user:1"]).await;
    let heard = steps_of(node, a_message(ALICE, "hello")).await;
    assert_eq!((whats(&heard), heard.receivers), (vec!["turn", "looked_up", "route", "published"], 1));
    let offline = steps_of(node, a_message(BOB, "hello")).await;
    assert_eq!((whats(&offline), code(&offline.result)), (vec!["turn", "looked_up", "looked_up"], Code::NotFound));
    assert!(the(&offline, "looked_up").detail.ends_with("live routes: 0"), "{offline:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_cannot_be_published_to_is_named_with_the_reason() {
    let cluster = Cluster::sqlite(&TWO_RETRIES).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    let answer = steps_of(cluster.node(), a_message(ALICE, "hello")).await;
    assert_eq!(code(&answer.result), Code::Undelivered);
    assert!(the(&answer, "not_published").detail.contains("no [redis_queue] is configured"), "{answer:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_device_one_that_has_gone_and_the_inbox_are_told_apart() {
    let more = [("ROUTE__MAX_RETRIES", "0"), ("DELIVERY__INBOX_MAX_MESSAGES", "1")];
    let cluster = Cluster::sqlite(&more).await;
    let node = cluster.node();
    let silent = TestGateway::start(&cluster.nodes, GATEWAY, Devices::AreSilent).await;
    silent.bind(ALICE, PHONE, "c").await;
    let gone = TestGateway::start(&cluster.nodes, "gw-2:7000", Devices::AreNotHere).await;
    gone.bind(BOB, PHONE, "c").await;

    let to = |user| DeliverReq { ack_timeout_ms: IMPATIENCE_MS, store_offline: true, ..a_message(user, "hello") };
    let answer = steps_of(node, to(ALICE)).await;
    assert_eq!((&*the(&answer, "not_acked").device_id, answer.stored), (PHONE, true), "{answer:#?}");
    assert!(the(&answer, "retried").detail.starts_with("no device acknowledged it in time"), "{answer:#?}");
    assert!(the(&answer, "stored").detail.ends_with(" in the inbox"), "{answer:#?}");
    let answer = steps_of(node, to(ALICE)).await;
    assert_eq!(code(&answer.result), Code::Undelivered, "{answer:#?}");
    assert!(whats(&answer).ends_with(&["behind", "inbox_full"]), "{answer:#?}");

    let answer = steps_of(node, DeliverReq { ack_timeout_ms: PATIENCE_MS, ..a_message(BOB, "hello") }).await;
    assert_eq!(the(&answer, "device_gone").device_id, PHONE);
    assert!(!whats(&answer).contains(&"not_acked"), "nobody waits for it: {answer:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_does_not_read_and_a_node_that_stands_still_are_named() {
    let cluster = Cluster::mariadb(2, &[("ROUTE__MAX_RETRIES", "0")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut stream, _) = RawStream::attach(one, GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    let large = "x".repeat(60_000);
    let mut full = None;
    for _ in 0..500 {
        let answer = steps_of(one, a_message(ALICE, &large)).await;
        if !answer.delivered {
            full = Some(answer);
            break;
        }
    }
    let full = full.expect("its queue is bounded");
    assert_eq!((&*the(&full, "queue_full").gateway_addr, full.receivers), (GATEWAY, 0), "{full:#?}");

    let gateway = TestGateway::at(vec![two.data.to_string()], "gw-2:7000", Devices::Acknowledge).await;
    gateway.bind(BOB, PHONE, "c").await;
    assert!(steps_of(one, a_message(BOB, "hello")).await.delivered, "the way is known");
    two.stop();
    let mut request = traced(a_message(BOB, "hello"));
    request.set_timeout(Duration::from_secs(10));
    let answer = one.presence().deliver(request).await.expect("an answer").into_inner();
    two.cont();
    let not_here = the(&answer, "not_here");
    assert_eq!((&*not_here.gateway_addr, answer.delivered), ("gw-2:7000", false), "{answer:#?}");
    assert!(!not_here.node_id.is_empty() && not_here.took_us >= 900_000, "it was waited for: {answer:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_shell_the_steps_are_a_table() {
    let cluster = Cluster::sqlite(&[]).await;
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let words = ["deliver", "1", "hello", "--ack-timeout-ms", "5000"];
    let (exit, plain) = cluster.node().ctl(&words);
    assert!(exit == 0 && plain.lines().count() == 1, "{plain}");
    let (exit, shown) = cluster.node().ctl(&[&words[..], &["--trace"]].concat());
    println!("{shown}");
    let lines: Vec<&str> = shown.lines().collect();
    assert!(exit == 0 && lines[0].contains("delivered to 1 receiver") && lines[1].starts_with("AT MS"), "{shown}");
    for what in ["looked_up", "route", "handed", "waiting", "acked"] {
        assert!(lines[2..].iter().any(|line| line.contains(what)), "{what}: {shown}");
    }
}
