//! What callers send, and do not read, takes memory within a bound: in sum, not only per call.

use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future::join_all;
use h2::client::ResponseFuture;
use h2::client::SendRequest;
use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::ListGatewaysReq;
use im_presence::pb::QueryRouteReq;
use prost::Message;
use tokio::net::TcpStream;
use tonic::Code as Grpc;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::node::Node;
use crate::harness::stream::RawStream;

const MIB: u64 = 1024 * 1024;
/// What most clients take of an answer, and what ours have at most.
const DEFAULT_CLIENT_BYTES: usize = 4 * 1024 * 1024;
const ANSWER_BYTES: usize = 3_584 * 1024;
/// How long a message may take to arrive.
const MESSAGE_LIMIT: Duration = Duration::from_secs(10);
const QUERY: &str = "/mpim.PresenceService/BatchQueryRoute";
const FORWARD: &str = "/mpim.NodeService/Forward";
const FORWARD_ACKS: &str = "/mpim.NodeService/ForwardAcks";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// An HTTP/2 client that does only what it is told.
struct Http2 {
    send: SendRequest<Bytes>,
    addr: String,
}

/// A call that has been begun.
struct Begun {
    answer: ResponseFuture,
    body: h2::SendStream<Bytes>,
}

impl Http2 {
    /// `window`: what the server may send of all answers before one is read.
    async fn connect(node: &Node, window: u32) -> Self {
        let socket = TcpStream::connect(node.data).await.expect("connect");
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).max_concurrent_reset_streams(4_096);
        let (send, connection) = builder.handshake(socket).await.expect("shake hands");
        tokio::spawn(connection);
        Self { send, addr: node.data.to_string() }
    }

    async fn begin(&self, path: &str, headers: &[(&'static str, &str)]) -> Begun {
        let mut request = http::Request::post(format!("http://{}{path}", self.addr)).header("content-type", "application/grpc");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut send = self.send.clone().ready().await.expect("the connection stands");
        let (answer, body) =
            send.send_request(request.header("te", "trailers").body(()).expect("a request"), false).expect("a call");
        Begun { answer, body }
    }
}

impl Begun {
    fn send(&mut self, bytes: impl Into<Bytes>, end: bool) {
        self.body.send_data(bytes.into(), end).expect("the call is open");
    }

    /// The status of an answer that has nothing but one.
    async fn status(self) -> Grpc {
        let answer = self.answer.await.expect("an answer");
        let (mut headers, mut body) = (answer.headers().clone(), answer.into_body());
        if !headers.contains_key("grpc-status") {
            while let Some(data) = body.data().await {
                let _ = body.flow_control().release_capacity(data.expect("data").len());
            }
            headers = body.trailers().await.expect("the end").expect("trailers");
        }
        Grpc::from_bytes(headers["grpc-status"].as_bytes())
    }
}

fn framed(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    [&[0][..], &u32::try_from(message.len()).expect("a length").to_be_bytes(), &message].concat().into()
}

/// The head of a message of so many bytes.
fn announced(bytes: u32) -> Bytes {
    [&[0][..], &bytes.to_be_bytes()].concat().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_are_announced_and_do_not_come_take_no_memory_and_end() {
    const STREAMS: usize = 1_000;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let client = Http2::connect(node, 1 << 16).await;
    for path in [FORWARD, QUERY, "/mpim.PresenceService/BatchBindRoute", "/mpim.GatewayService/Attach", REFLECTION] {
        let before = node.rss_bytes();
        let began = Instant::now();
        let mut calls = Vec::new();
        for _ in 0..STREAMS {
            let mut call = client.begin(path, &[]).await;
            call.send(announced(4 * MIB as u32), false);
            calls.push(call);
        }
        assert!(node.query(ALICE).await.is_online, "others are served");
        let grown = node.rss_bytes().saturating_sub(before);
        assert!(grown < 64 * MIB, "{path}: {grown} bytes for {STREAMS} heads of 5");
        let ended = join_all(calls.into_iter().map(Begun::status)).await;
        let expected = if path == REFLECTION { Grpc::Ok } else { Grpc::DeadlineExceeded }; // its library says nothing
        assert!(ended.iter().all(|status| *status == expected), "{path}: {:?}", ended[0]);
        assert!(began.elapsed() < allowed(MESSAGE_LIMIT + Duration::from_secs(2)), "{path}: {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_arrived_is_bounded_in_sum_and_leases_and_small_calls_go_on() {
    const PARTS: usize = 69; // of what calls may take, fifteen sixteenths of 64 MiB
    const PART_BYTES: usize = 900_000;
    let cluster = Cluster::sqlite(&[("LIMITS__MEMORY_BYTES", "67108864")]).await;
    let node = cluster.node();
    let epoch = node.register(GATEWAY).await;
    node.bind(on(GATEWAY, epoch, a_bind(ALICE, PHONE, "c"))).await;
    let client = Http2::connect(node, 1 << 16).await;
    let held = async || node.metric("im_presence_held_bytes").await;
    let mut calls = Vec::new();
    for _ in 0..PARTS {
        let mut call = client.begin("/mpim.PresenceService/BatchBindRoute", &[]).await;
        call.send(announced(4 * MIB as u32), false);
        call.send(vec![0; PART_BYTES], false);
        calls.push(call);
    }
    eventually("all has arrived", allowed(Duration::from_secs(2)), async || held().await >= (PARTS * PART_BYTES) as f64).await;
    let large = || BatchBindRouteReq { binds: (0..2_500).map(|n| long_bind(1_000 + n, 1, "c")).collect() };
    let status = node.presence().batch_bind_route(large()).await.expect_err("there is no room");
    assert_eq!(status.code(), Grpc::ResourceExhausted, "{status:?}");
    assert!(retry_delay(&status).is_some() && status.message().contains("limits.memory_bytes"), "{status:?}");
    assert!(node.metric("im_presence_shed_total{what=\"memory\"}").await > 0.0);
    assert_eq!(node.beat(GATEWAY, epoch).await, Code::Ok, "a lease is the last to be refused");
    assert!(node.query(ALICE).await.is_online);
    drop((calls, client));
    eventually("it is given back", allowed(Duration::from_secs(5)), async || held().await < 1e6).await;
    node.presence().batch_bind_route(large()).await.expect("there is room");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_from_a_node_of_another_store_is_refused_before_its_body() {
    let cluster = Cluster::sqlite(&[]).await;
    let client = Http2::connect(cluster.node(), 1 << 16).await;
    for path in [FORWARD, FORWARD_ACKS] {
        let call = client.begin(path, &[("im-presence-store", "another")]).await;
        let status = tokio::time::timeout(allowed(Duration::from_secs(1)), call.status()).await.expect("at once");
        assert_eq!(status, Grpc::FailedPrecondition);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_last_release_may_hand_over_more_at_once_than_one_that_names_its_store() {
    let cluster = Cluster::sqlite(&[]).await;
    let mut connection = cluster.db.connect().await;
    let store_id: String =
        sqlx::query_scalar("SELECT store_id FROM cluster").fetch_one(&mut connection).await.expect("the store");
    let delivery = im_presence::pb::Delivery { message: "x".repeat(60_000), ..Default::default() };
    let order = im_presence::pb::Order {
        gateway_epoch: 7,
        body: Some(im_presence::pb::order::Body::Delivery(delivery)),
        ..Default::default()
    };
    let request = im_presence::pb::ForwardReq {
        store_id: store_id.clone(),
        sent_at_ms: i64::MAX / 2,
        orders: vec![order; 150],
        ..Default::default()
    };
    let client = Http2::connect(cluster.node(), 1 << 16).await;
    for (headers, expected) in [(vec![], Grpc::Ok), (vec![("im-presence-store", &*store_id)], Grpc::OutOfRange)] {
        let mut call = client.begin(FORWARD, &headers).await;
        call.send(framed(&request), true);
        assert_eq!(call.status().await, expected, "{headers:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_that_do_not_read_take_four_mib_each() {
    const GATEWAYS: usize = 20;
    const EACH: usize = 120;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let mut silent = Vec::new();
    for n in 0..GATEWAYS {
        let (mut stream, _) = RawStream::attach(node, &format!("gw-{n}:7000"), 0).await;
        stream.bind(ALICE + n as i64, PHONE, "c").await;
        silent.push(stream);
    }
    let before = node.rss_bytes();
    let deliver = async |n: usize| {
        let (connection, mut taken) = (node.new_connection(), 0);
        for _ in 0..EACH {
            let request = DeliverReq { user_id: ALICE + n as i64, message: "x".repeat(65_536), ..Default::default() };
            let mut request = tonic::Request::new(request);
            request.set_timeout(Duration::from_millis(300));
            let answer = connection.clone().deliver(request).await;
            taken += usize::from(answer.is_ok_and(|answer| answer.into_inner().delivered));
        }
        taken
    };
    let taken: usize = join_all((0..GATEWAYS).map(deliver)).await.into_iter().sum();
    let grown = node.rss_bytes().saturating_sub(before);
    assert!((60 * GATEWAYS..110 * GATEWAYS).contains(&taken), "each takes what fits: {taken}");
    assert!(grown < (GATEWAYS as u64 * 6 + 60) * MIB, "{grown} bytes");
    drop(silent);
    let free = async || node.metric("im_presence_held_bytes").await < 1e6;
    eventually("what they left is given back", allowed(Duration::from_secs(20)), free).await;
}

/// A node on which Alice has `devices` devices with the longest names.
async fn with_long_names(devices: usize, more: &[(&str, &str)]) -> Cluster {
    let settings: Vec<_> = [("ROUTE__MAX_DEVICES", "1000")].into_iter().chain(more.iter().copied()).collect();
    let cluster = Cluster::sqlite(&settings).await;
    let binds = (0..devices).map(|n| long_bind(ALICE, n, "c")).collect();
    let bound = cluster.node().presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
    assert!(bound.results.iter().all(|bound| code(&bound.result) == Code::Ok));
    cluster
}

fn long_bind(user: i64, device: usize, conn: &str) -> im_presence::pb::BindRouteReq {
    let gateway = format!("{}:7000", "g".repeat(250));
    on(&gateway, 0, a_bind(user, &format!("{device:0>128}"), &format!("{conn:c>128}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_is_cut_where_clients_would_refuse_it_and_says_so() {
    let cluster = with_long_names(20, &[]).await;
    let node = cluster.node();
    let request = BatchQueryRouteReq { user_ids: vec![ALICE; 2_000], with_routes: true, ..Default::default() };
    let answer = node.presence().batch_query_route(request.clone()).await.expect("fits into 4 MiB").into_inner();
    assert!((ANSWER_BYTES - 20_000..=ANSWER_BYTES).contains(&answer.encoded_len()), "{}", answer.encoded_len());
    let told = answer.users.iter().take_while(|user| user.routes.len() == 20).count();
    assert!(told > 200 && answer.users.len() == 2_000, "{told}");
    let rest = &answer.users[told..];
    assert!(rest.iter().all(|user| user.code == i32::from(Code::TooLarge) && user.user_id == ALICE && user.routes.is_empty()));
    let few = BatchQueryRouteReq { user_ids: vec![ALICE; 200], ..request };
    let few = node.presence().batch_query_route(few).await.expect("an answer").into_inner();
    assert!(few.users.iter().all(|user| user.code == i32::from(Code::Ok) && user.routes.len() == 20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_binds_says_what_was_bound_even_where_it_cannot_say_what_was_kicked() {
    const BINDS: i64 = 7_000;
    let cluster = with_long_names(0, &[]).await;
    let bind_all = async |conn| {
        let binds = (1..=BINDS).map(|user| long_bind(user, 1, conn)).collect();
        let answer = cluster.node().presence().batch_bind_route(BatchBindRouteReq { binds }).await;
        answer.expect("fits into 4 MiB").into_inner()
    };
    bind_all("first").await;
    let again = bind_all("second").await;
    assert!(again.encoded_len() <= ANSWER_BYTES && again.encoded_len() > ANSWER_BYTES / 2, "{}", again.encoded_len());
    let (told, left_out): (Vec<_>, Vec<_>) = again.results.iter().partition(|bound| bound.kicked.len() == 1);
    assert!(told.len() > 1_000 && left_out.len() > 100, "{} {}", told.len(), left_out.len());
    let says_so = |bound: &&im_presence::pb::BindRouteResp| {
        let result = bound.result.clone().unwrap_or_default();
        !bound.route_key.is_empty() && result.code == 0 && result.msg.contains("kicked is left out")
    };
    assert!(left_out.iter().all(says_so), "{:?}", left_out[0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_reads_are_bounded_in_sum() {
    const CALLS: usize = 500;
    let cluster = with_long_names(20, &[("LIMITS__MEMORY_BYTES", "67108864")]).await;
    let node = cluster.node();
    let client = Http2::connect(node, 1).await;
    let request = framed(&BatchQueryRouteReq { user_ids: vec![ALICE; 300], with_routes: true, ..Default::default() });
    let before = node.rss_bytes();
    let mut calls = Vec::new();
    for _ in 0..CALLS {
        let mut call = client.begin(QUERY, &[]).await;
        call.send(request.clone(), true);
        calls.push(call);
    }
    let refused = async || {
        let shed = node.series("im_presence_shed_total").await;
        let shed = shed.iter().find(|(labels, _)| labels.contains("memory")).map_or(0.0, |(_, calls)| *calls);
        shed > CALLS as f64 / 2.0 && node.metric("im_presence_held_bytes").await > 50e6
    };
    eventually("some answers wait to be read, and most are not made", allowed(Duration::from_secs(20)), refused).await;
    assert!(node.query(ALICE).await.is_online, "small answers go on");
    let grown = node.rss_bytes().saturating_sub(before);
    assert!(grown < 300 * MIB, "{grown} bytes for {CALLS} answers of 3 MiB");
    drop((calls, client));
    let free = async || node.metric("im_presence_held_bytes").await < 1e6;
    eventually("it is given back", allowed(Duration::from_secs(10)), free).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inbox_is_pulled_in_answers_that_clients_take() {
    let cluster = Cluster::sqlite(&[("DELIVERY__MAX_MESSAGE_BYTES", "1048576"), ("DELIVERY__INBOX_MAX_BYTES", "16777216")]).await;
    let node = cluster.node();
    for n in 0..10 {
        let message = format!("{n}{}", "x".repeat(1_000_000));
        let request = DeliverReq { user_id: ALICE, message, store_offline: true, ..Default::default() };
        assert!(node.presence().deliver(request).await.expect("an answer").into_inner().stored);
    }
    let (mut seen, mut after_seq) = (Vec::new(), 0);
    loop {
        let request = im_presence::pb::PullInboxReq { user_id: ALICE, after_seq, limit: 50, device_id: PHONE.to_owned() };
        let page = node.gateways().pull_inbox(request).await.expect("fits into 4 MiB").into_inner();
        assert!(page.encoded_len() < DEFAULT_CLIENT_BYTES);
        after_seq = page.deliveries.last().expect("one at least").inbox_seq;
        seen.extend(page.deliveries.iter().map(|stored| stored.message[..1].to_owned()));
        if !page.more {
            break;
        }
    }
    assert_eq!(seen.concat(), "0123456789");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_are_listed_in_pages_and_ctl_shows_all() {
    const LIVES: usize = 900;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let labels = (0..16).map(|n| (format!("{n:a>63}"), "v".repeat(255))).collect::<std::collections::HashMap<_, _>>();
    for n in 0..LIVES {
        let request = im_presence::pb::RegisterGatewayReq {
            gateway_addr: format!("gw-{n:0>4}:7000"),
            labels: labels.clone(),
            ..Default::default()
        };
        node.gateways().register_gateway(request).await.expect("a life");
    }
    let page = async |page_size, page_token: &str| {
        let request = ListGatewaysReq { page_size, page_token: page_token.to_owned(), ..Default::default() };
        node.operator().list_gateways(request).await.expect("fits into 4 MiB").into_inner()
    };
    let first = page(0, "").await;
    assert!(first.encoded_len() <= ANSWER_BYTES && first.lives.len() < LIVES && !first.next_page_token.is_empty());
    let (mut all, mut token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let next = page(400, &token).await;
        all.extend(next.lives.into_iter().map(|life| life.gateway_addr));
        pages += 1;
        token = next.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    let expected: Vec<String> = (0..LIVES).map(|n| format!("gw-{n:0>4}:7000")).collect();
    assert_eq!((all, pages), (expected, 3));
    let (exit, text) = node.ctl(&["gateways", "--admin", &node.admin.to_string()]);
    assert_eq!((exit, text.matches("gw-").count()), (0, LIVES));
    let wrong = node.operator().list_gateways(ListGatewaysReq { page_token: "x".to_owned(), ..Default::default() }).await;
    let status = wrong.expect_err("no token");
    assert!(status.code() == Grpc::InvalidArgument && status.message().contains("page_token"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_comes_in_pieces_is_read_like_any_other() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let client = Http2::connect(node, 1 << 20).await;
    let query = framed(&QueryRouteReq { user_id: ALICE, ..Default::default() });
    for cut in 0..=query.len() {
        let mut call = client.begin("/mpim.PresenceService/QueryRoute", &[]).await;
        call.send(query.slice(..cut), false);
        tokio::time::sleep(Duration::from_millis(2)).await;
        call.send(query.slice(cut..), true);
        assert_eq!(call.status().await, Grpc::Ok, "cut after {cut} bytes");
    }
    let mut call = client.begin("/mpim.PresenceService/QueryRoute", &[]).await;
    call.send(query.slice(..query.len() - 1), true);
    assert_eq!(call.status().await, Grpc::InvalidArgument, "it ends within the message");
}
