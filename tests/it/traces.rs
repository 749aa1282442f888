//! Traces: what a collector is told of calls whose callers keep a trace, and that nobody waits for it.

use std::time::Duration;

use futures_util::future::join_all;
use im_presence::client::caller::Caller;
use im_presence::client::caller::traced;
use im_presence::pb::BatchDeliverReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::DeliverReq;
use im_presence::pb::Delivery;
use im_presence::pb::QueryRouteReq;
use im_presence::pb::UnbindRouteReq;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;
use tonic::Request;

use crate::deliver::a_message;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::collector::Collector;
use crate::harness::collector::Seen;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;

const SOON: Duration = Duration::from_secs(5);
/// The span of the service that calls.
const SERVICE: &str = "00f067aa0ba902b7";
const QUERY: &str = "mpim.PresenceService/QueryRoute";
const DELIVER: &str = "mpim.PresenceService/Deliver";
const BIND: &str = "mpim.PresenceService/BindRoute";

fn trace_id(number: u32) -> String {
    format!("{number:032x}")
}

/// A call with this `traceparent`.
fn with<T>(traceparent: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("traceparent", traceparent.parse().expect("a header"));
    request
}

/// A call of a service that keeps the trace of this number.
fn in_trace<T>(number: u32, message: T) -> Request<T> {
    with(&format!("00-{}-{SERVICE}-01", trace_id(number)), message)
}

fn of(user: i64, max_staleness_ms: Option<u32>) -> QueryRouteReq {
    QueryRouteReq { user_id: user, max_staleness_ms }
}

async fn query(node: &Node, request: Request<QueryRouteReq>) {
    node.presence().query_route(request).await.expect("an answer");
}

#[track_caller]
fn the<'a>(spans: &'a [Seen], name: &str) -> &'a Seen {
    spans.iter().rfind(|seen| seen.span.name == name).unwrap_or_else(|| panic!("no {name}: {spans:#?}"))
}

/// As people read it.
fn tree(spans: &[Seen], parent: &str, depth: usize) -> String {
    let mut children: Vec<&Seen> = spans.iter().filter(|seen| seen.parent() == parent).collect();
    children.sort_by_key(|seen| seen.span.start_time_unix_nano);
    let began = spans.iter().map(|seen| seen.span.start_time_unix_nano).min().unwrap_or_default();
    let ms = |ns: u64| ns as f64 / 1e6;
    let lines = children.into_iter().map(|seen| {
        let Seen { node, span } = seen;
        let (at, took) = (span.start_time_unix_nano - began, span.end_time_unix_nano - span.start_time_unix_nano);
        let name = format!("{:indent$}{}", "", span.name, indent = 2 * depth);
        let line = format!("{name:36} at {:7.3} ms for {:7.3} ms on {node}\n", ms(at), ms(took));
        line + &tree(spans, &seen.id(), depth + 1)
    });
    lines.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_is_followed_from_its_service_through_two_nodes_to_the_gateway_and_back() {
    let collector = Collector::start().await;
    let cluster = Cluster::mariadb(2, &[("TRACE__ENDPOINT", &collector.endpoint())]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = TestGateway::at(vec![two.data.to_string()], GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let message = DeliverReq { ack_timeout_ms: 5_000, ..a_message(ALICE, "hello") };
    let service = Caller::new(&[&one.data.to_string()], allowed(SOON)).expect("an address");
    let call = service.deliver(message);
    let answer = traced(&format!("00-{}-{SERVICE}-01", trace_id(7)), call).await.expect("an answer");
    assert!(answer.delivered, "{answer:?}");
    let spans = collector.trace(&trace_id(7), &[DELIVER, "hand over"]).await;
    println!("{}", tree(&spans, SERVICE, 0));

    let (call, lookup, forward) = (the(&spans, DELIVER), the(&spans, "lookup"), the(&spans, "forward"));
    let (hand_over, wait) = (the(&spans, "hand over"), the(&spans, "wait for acknowledgement"));
    let own = answer.delivery_id.rsplit_once('-').expect("an id names its node").0;
    for (span, parent, node) in
        [(call, SERVICE, own), (lookup, &call.id(), own), (forward, &call.id(), own), (wait, &call.id(), own)]
    {
        assert_eq!((&*span.parent(), &*span.node), (parent, node), "{span:?}");
        let within = |inner: &Seen, outer: &Seen| {
            inner.span.start_time_unix_nano + 1_000_000 >= outer.span.start_time_unix_nano
                && inner.span.end_time_unix_nano <= outer.span.end_time_unix_nano + 1_000_000
        };
        assert!(within(span, call), "the clock is read when a span ends, so to a millisecond: {span:?}, {call:?}");
    }
    assert_eq!((hand_over.parent(), &hand_over.node), (forward.id(), &forward.attribute("im_presence.node")));
    assert_eq!(forward.attribute("im_presence.gateway"), GATEWAY);
    let kinds = [call, forward, hand_over, wait].map(|seen| seen.span.kind());
    assert_eq!(kinds, [SpanKind::Server, SpanKind::Client, SpanKind::Server, SpanKind::Internal]);
    let rpc = ["rpc.system", "rpc.service", "rpc.method", "rpc.grpc.status_code"].map(|key| call.attribute(key));
    assert_eq!(rpc, ["grpc", "mpim.PresenceService", "Deliver", "0"]);
    assert_eq!((wait.attribute("im_presence.acked"), &wait.span.status), ("1".to_owned(), &None));
    let told = &gateway.deliveries()[0].traceparent;
    assert_eq!(*told, format!("00-{}-{}-01", trace_id(7), hand_over.id()), "the gateway goes on from there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_traces_nothing_hands_the_trace_on_and_subscribers_find_it_in_the_envelope() {
    let collector = Collector::start().await;
    let (endpoint, envelope) = (collector.endpoint(), ("DELIVERY__PAYLOAD", "envelope"));
    let mut cluster = Cluster::with_redis(1, &[("TRACE__ENDPOINT", &endpoint), envelope]).await;
    cluster.add_node(&[envelope]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = TestGateway::at(vec![two.data.to_string()], GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    assert!(one.presence().deliver(in_trace(1, a_message(ALICE, "hello"))).await.expect("an answer").get_ref().delivered);
    let spans = collector.trace(&trace_id(1), &[DELIVER]).await;
    gateway.hears(1).await;
    let told = |span: &Seen| format!("00-{}-{}-01", span.trace(), span.id());
    assert_eq!(gateway.deliveries()[0].traceparent, told(the(&spans, "forward")));

    for (number, users) in [(11, 16), (12, 17)] {
        for user in 1..=users {
            gateway.bind(user, PHONE, &format!("c-{user}")).await;
        }
        let request = BatchDeliverReq { user_ids: (1..=users).collect(), message: "hello".into(), ..Default::default() };
        one.presence().batch_deliver(in_trace(number, request)).await.expect("an answer");
        let spans = collector.trace(&trace_id(number), &["lookup", "mpim.PresenceService/BatchDeliver"]).await;
        let forwards = spans.iter().filter(|seen| seen.span.name == "forward").count();
        let is_right = if users == 16 { forwards >= 16 } else { forwards == 0 };
        assert!(is_right, "a message to many has no span for each: {forwards} for {users} users");
    }

    one.bind(BindRouteReq { gateway_addr: "gw-2:7000".into(), ..a_bind(99, PHONE, "c") }).await;
    let mut subscriber = cluster.queue().subscribe(&["user:99"]).await;
    one.presence().deliver(in_trace(2, a_message(99, "hello"))).await.expect("an answer");
    let (_, body) = subscriber.next(allowed(SOON)).await.expect("the message");
    let spans = collector.trace(&trace_id(2), &[DELIVER]).await;
    let publish = the(&spans, "publish");
    assert_eq!(Delivery::decode(&*body).expect("a Delivery").traceparent, told(publish));
    assert_eq!((publish.parent(), publish.attribute("im_presence.receivers")), (the(&spans, DELIVER).id(), "1".to_owned()));
    one.deliver(a_message(99, "hello")).await;
    let (_, body) = subscriber.next(allowed(SOON)).await.expect("the message");
    assert_eq!(Delivery::decode(&*body).expect("a Delivery").traceparent, "", "nobody keeps it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_calls_whose_callers_keep_no_trace_nothing_is_sent() {
    let collector = Collector::start().await;
    let cluster = Cluster::sqlite(&[("TRACE__ENDPOINT", &collector.endpoint())]).await;
    let node = cluster.node();
    node.query(ALICE).await;
    for nothing in [format!("00-{}-{SERVICE}-00", trace_id(1)), "nonsense".to_owned()] {
        query(node, with(&nothing, of(ALICE, None))).await;
    }
    // What is sent is sent in its order.
    query(node, in_trace(2, of(ALICE, None))).await;
    collector.trace(&trace_id(2), &[QUERY, "lookup"]).await;
    assert!(collector.all().iter().all(|seen| seen.trace() == trace_id(2)), "{:#?}", collector.all());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_share_calls_without_a_trace_begin_one_and_streams_beats_and_probes_do_not() {
    let collector = Collector::start().await;
    let more = [("TRACE__ENDPOINT", &*collector.endpoint()), ("TRACE__SAMPLE", "1.0"), ("GATEWAY__HEARTBEAT_INTERVAL", "50")];
    let cluster = Cluster::sqlite(&more).await;
    let node = cluster.node();
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    query(node, with(&format!("00-{}-{SERVICE}-00", trace_id(1)), of(ALICE, None))).await;
    node.query(ALICE).await;
    let is_there = async || collector.all().iter().any(|seen| seen.span.name == QUERY);
    eventually("the call is traced", SOON, is_there).await;
    let all = collector.all();
    let names: Vec<&str> = all.iter().map(|seen| &*seen.span.name).collect();
    assert_eq!(names, ["lookup", QUERY], "{all:#?}");
    assert_eq!((all[1].parent(), all[0].parent()), (String::new(), all[1].id()), "its own caller has decided about the other");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bind_says_how_long_it_waited_for_its_lane_the_commit_and_redis_and_a_query_which_tier_knew() {
    let collector = Collector::start().await;
    let cluster = Cluster::with_redis(1, &[("TRACE__ENDPOINT", &collector.endpoint())]).await;
    let node = cluster.node();
    let bound = node.presence().bind_route(in_trace(1, a_bind(ALICE, PHONE, "c"))).await.expect("a bind").into_inner();
    let spans = collector.trace(&trace_id(1), &[BIND]).await;
    println!("{}", tree(&spans, SERVICE, 0));
    let (wait, commit, show) = (the(&spans, "lane wait"), the(&spans, "commit"), the(&spans, "show in Redis"));
    assert!([wait, commit, show].iter().all(|span| span.parent() == the(&spans, BIND).id()), "{spans:#?}");
    assert_eq!(commit.attribute("im_presence.batch"), "1");
    let starts = [wait, commit, show].map(|span| span.span.start_time_unix_nano);
    assert!(starts.is_sorted(), "{spans:#?}");

    for (number, bound, tier) in [(2, None, "memory"), (3, Some(0), "the database")] {
        query(node, in_trace(number, of(ALICE, bound))).await;
        let spans = collector.trace(&trace_id(number), &[QUERY]).await;
        assert_eq!(the(&spans, "lookup").attribute("im_presence.tier"), tier, "{spans:#?}");
    }
    let unbind = UnbindRouteReq { user_id: ALICE, route_key: bound.route_key, ..Default::default() };
    node.presence().unbind_route(in_trace(4, unbind)).await.expect("an unbind");
    collector.trace(&trace_id(4), &["lane wait", "commit", "mpim.PresenceService/UnbindRoute"]).await;

    node.presence().bind_route(in_trace(5, a_bind(0, PHONE, "c"))).await.expect_err("0 is no user");
    let spans = collector.trace(&trace_id(5), &[BIND]).await;
    let call = the(&spans, BIND);
    assert_eq!((call.attribute("rpc.grpc.status_code"), &call.span.status), ("3".to_owned(), &None), "the caller's fault");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_stands_still_holds_up_nobody_and_each_span_is_sent_or_counted() {
    const CALLS: u32 = 2_000;
    /// At once: what the collector takes in a second must not be most of it.
    const CALLERS: u32 = 16;
    let collector = Collector::start().await;
    let more = [("TRACE__QUEUE", "1024"), ("TRACE__BATCH", "64"), ("TRACE__TIMEOUT", "1000")];
    let cluster = Cluster::sqlite(&[&[("TRACE__ENDPOINT", &*collector.endpoint())], &more[..]].concat()).await;
    let node = cluster.node();
    collector.hold(true);
    let caller = async |_| {
        for _ in 0..CALLS / CALLERS {
            query(node, in_trace(1, of(ALICE, None))).await;
        }
    };
    join_all((0..CALLERS).map(caller)).await;
    let counted = async |result: &str| {
        let label = format!("result=\"{result}\"");
        let series = node.series("im_presence_spans_total").await;
        series.iter().filter(|(labels, _)| labels.contains(&label)).map(|(_, n)| n).sum::<f64>()
    };
    assert!(counted("dropped").await > f64::from(CALLS), "most of what does not fit is dropped");
    eventually("what was sent to it is given up", SOON, async || counted("failed").await > 0.0).await;
    collector.hold(false);
    let all = async || counted("dropped").await + counted("sent").await + counted("failed").await;
    eventually("each span is counted once", SOON, async || all().await == f64::from(2 * CALLS)).await;
    query(node, in_trace(2, of(ALICE, None))).await;
    collector.trace(&trace_id(2), &[QUERY]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_sends_its_last_spans_but_waits_for_no_collector_that_stands_still() {
    let collector = Collector::start().await;
    for holds in [false, true] {
        let mut cluster = Cluster::sqlite(&[("TRACE__ENDPOINT", &collector.endpoint())]).await;
        collector.hold(holds);
        let number = 1 + u32::from(holds);
        query(cluster.node(), in_trace(number, of(ALICE, None))).await;
        cluster.node().terminate();
        assert!(cluster.nodes[0].ended().await.success());
        let sent = collector.all().iter().any(|seen| seen.trace() == trace_id(number));
        let lost = cluster.node().log().iter().any(|line| line.contains("the last spans are lost"));
        assert_eq!((sent || holds, lost), (true, holds), "{:?}", cluster.node().log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_may_come_later_than_the_node() {
    let addr = Collector::start().await.addr;
    let cluster = Cluster::sqlite(&[("TRACE__ENDPOINT", &format!("http://{addr}"))]).await;
    let node = cluster.node();
    query(node, in_trace(1, of(ALICE, None))).await;
    let spans = async || node.series("im_presence_spans_total").await;
    let failed = async || spans().await.iter().any(|(labels, n)| labels.contains("failed") && *n > 0.0);
    eventually("it is tried, and counted", SOON, failed).await;
    let told = node.log().iter().any(|line| line.contains("spans could not be sent"));
    assert!(told && node.degraded().await.is_empty(), "a warning, and nothing more");
    let collector = Collector::at(addr).await;
    query(node, in_trace(2, of(ALICE, None))).await;
    collector.trace(&trace_id(2), &[QUERY, "lookup"]).await;
}
