//! Nonsense is refused, names what is wrong, leaves nothing behind and disturbs nobody.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::QueryRouteReq;
use im_presence::pb::UnbindRouteReq;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::Code;
use tonic::Status;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::node::Node;

/// With others misbehaving, a call of somebody else's still takes no longer.
const UNDISTURBED: Duration = Duration::from_secs(1);
const CHARACTERS: &str = "printable ASCII without spaces";

/// INVALID_ARGUMENT, whose message and details name the field and the limit.
#[track_caller]
pub fn check<T: std::fmt::Debug>(request: &str, answer: Result<T, Status>, field: &str, limit: &str) {
    let status = answer.expect_err(request);
    assert_eq!(status.code(), Code::InvalidArgument, "{request}: {status:?}");
    assert!(status.message().contains(field) && status.message().contains(limit), "{request}: {:?}", status.message());
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    assert!(violations.iter().any(|violation| violation.field == field), "{request}: {violations:?}");
}

/// Each bind that is one past a limit, or nonsense; the field and the limit that the answer names.
fn bad_binds() -> Vec<(BindRouteReq, &'static str, &'static str)> {
    let good = || a_bind(ALICE, PHONE, "c");
    let text = |bytes: usize| "x".repeat(bytes);
    let mut bad = vec![
        (BindRouteReq { user_id: 0, ..good() }, "user_id", "above 0"),
        (BindRouteReq { user_id: -1, ..good() }, "user_id", "above 0"),
        (BindRouteReq { user_id: i64::MIN, ..good() }, "user_id", "above 0"),
        (BindRouteReq { gateway_addr: String::new(), ..good() }, "gateway_addr", "1 to 255"),
        (BindRouteReq { gateway_addr: text(256), ..good() }, "gateway_addr", "1 to 255"),
        (BindRouteReq { device_id: text(129), ..good() }, "device_id", "0 to 128"),
        (BindRouteReq { conn_id: text(129), ..good() }, "conn_id", "0 to 128"),
        (BindRouteReq { client_ip: "1.2.3".to_owned(), ..good() }, "client_ip", "IP address"),
        (BindRouteReq { client_ip: "localhost".to_owned(), ..good() }, "client_ip", "IP address"),
        (BindRouteReq { client_ip: text(100_000), ..good() }, "client_ip", "IP address"),
        (BindRouteReq { client_port: -1, ..good() }, "client_port", "0 to 65535"),
        (BindRouteReq { client_port: 65_536, ..good() }, "client_port", "0 to 65535"),
        (BindRouteReq { platform: 9, ..good() }, "platform", "0 to 8"),
        (BindRouteReq { platform: -1, ..good() }, "platform", "0 to 8"),
    ];
    for nonsense in ["a b", " ", "tab\t", "new\nline", "nul\0", "\u{7f}", "Zürich", "' OR 1=1 --", "\u{202e}"] {
        bad.push((BindRouteReq { gateway_addr: nonsense.to_owned(), ..good() }, "gateway_addr", CHARACTERS));
        bad.push((BindRouteReq { device_id: nonsense.to_owned(), ..good() }, "device_id", CHARACTERS));
        bad.push((BindRouteReq { conn_id: nonsense.to_owned(), ..good() }, "conn_id", CHARACTERS));
    }
    bad
}

fn bad_unbinds() -> Vec<(UnbindRouteReq, &'static str, &'static str)> {
    let by_device = || UnbindRouteReq { user_id: ALICE, gateway_addr: GATEWAY.to_owned(), ..Default::default() };
    let by_key = |key: &str| UnbindRouteReq { user_id: ALICE, route_key: key.to_owned(), ..Default::default() };
    vec![
        (UnbindRouteReq { user_id: 0, ..by_device() }, "user_id", "above 0"),
        (UnbindRouteReq { gateway_addr: String::new(), ..by_device() }, "gateway_addr", "1 to 255"),
        (UnbindRouteReq { gateway_addr: "x".repeat(256), ..by_device() }, "gateway_addr", "1 to 255"),
        (UnbindRouteReq { device_id: "x".repeat(129), ..by_device() }, "device_id", "0 to 128"),
        (UnbindRouteReq { conn_id: "x".repeat(129), ..by_device() }, "conn_id", "0 to 128"),
        (UnbindRouteReq { device_id: "a b".to_owned(), ..by_device() }, "device_id", CHARACTERS),
        (by_key("nonsense"), "route_key", "BindRoute"),
        (by_key("user:route:1"), "route_key", "BindRoute"),
        (by_key("user:route:1:"), "route_key", "BindRoute"),
        (by_key("user:route:1:-5"), "route_key", "BindRoute"),
        (by_key("user:route:1:99999999999999999999999"), "route_key", "BindRoute"),
        (by_key("user:route:2:5"), "route_key", "user_id"),
        (by_key(&"x".repeat(100_000)), "route_key", "BindRoute"),
    ]
}

#[tokio::test]
async fn each_input_past_a_limit_is_refused_by_name_and_leaves_nothing_behind() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let mut client = node.presence();
    for (request, field, limit) in bad_binds() {
        let shown = format!("{request:.200?}");
        check(&shown, node.try_bind(request.clone()).await, field, limit);
        // One bad item spoils its batch: nobody has to find out which ones were bound.
        let batch = BatchBindRouteReq { binds: vec![a_bind(ALICE, PHONE, "c"), request] };
        check(&shown, client.batch_bind_route(batch).await, field, limit);
    }
    for (request, field, limit) in bad_unbinds() {
        check(&format!("{request:.200?}"), client.unbind_route(request).await, field, limit);
    }
    for user_id in [0, -1, i64::MIN] {
        let request = QueryRouteReq { user_id, max_staleness_ms: None };
        check("a query", client.query_route(request).await, "user_id", "above 0");
        let request = BatchQueryRouteReq { user_ids: vec![ALICE, user_id], ..Default::default() };
        check("a batch of queries", client.batch_query_route(request).await, "user_ids", "above 0");
    }
    for table in ["users", "routes", "lives"] {
        assert_eq!(cluster.db.number(&format!("SELECT COUNT(*) FROM {table}")).await, 0, "{table}");
    }
}

#[tokio::test]
async fn what_is_just_within_the_limits_is_taken() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let request = BindRouteReq {
        user_id: i64::MAX,
        gateway_addr: "g".repeat(255),
        client_ip: "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255".to_owned(),
        client_port: 65_535,
        device_id: "~".repeat(128),
        platform: 8,
        gateway_epoch: 0,
        conn_id: "!".repeat(128),
        connected_ms_ago: u32::MAX,
        idle: false,
    };
    let bound = node.bind(request.clone()).await;
    let answer = node.query_sql(i64::MAX).await;
    let route = &answer.routes[0];
    assert_eq!((&route.device_id, &route.conn_id), (&request.device_id, &request.conn_id));
    assert_eq!((&route.gateway_addr, &route.route_key), (&request.gateway_addr, &bound.route_key));
}

#[tokio::test]
async fn batches_are_limited_to_what_the_interface_says() {
    let cluster = Cluster::sqlite(&[]).await;
    let mut client = cluster.node().presence();
    let query = |users: i64, with_routes: bool| {
        let user_ids = (1..=users).collect();
        BatchQueryRouteReq { user_ids, with_routes, ..Default::default() }
    };
    check("10,001 users", client.batch_query_route(query(10_001, false)).await, "user_ids", "10000");
    check("2,001 users with routes", client.batch_query_route(query(2_001, true)).await, "user_ids", "2000");
    let binds = |count: i64| BatchBindRouteReq { binds: (1..=count).map(|user| a_bind(user, "", "")).collect() };
    check("10,001 binds", client.batch_bind_route(binds(10_001)).await, "binds", "10000");
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM users").await, 0);

    assert_eq!(client.batch_query_route(query(10_000, false)).await.expect("10,000 users").into_inner().users.len(), 10_000);
    assert_eq!(client.batch_query_route(query(2_000, true)).await.expect("2,000 users").into_inner().users.len(), 2_000);
    let bound = client.batch_bind_route(binds(10_000)).await.expect("10,000 binds").into_inner();
    assert!(bound.results.iter().all(|bind| code(&bind.result) == im_presence::pb::Code::Ok));
    assert!(client.batch_query_route(query(0, true)).await.expect("nobody").into_inner().users.is_empty());
    assert!(client.batch_bind_route(binds(0)).await.expect("nothing").into_inner().results.is_empty());
}

#[tokio::test]
async fn a_request_above_4_mib_is_refused_unread() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let request = BindRouteReq { conn_id: "x".repeat(4 * 1024 * 1024), ..a_bind(ALICE, PHONE, "") };
    let refused = node.try_bind(request).await.expect_err("too large");
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    node.bind(a_bind(ALICE, PHONE, "c")).await; // the connection goes on
}

#[tokio::test]
async fn the_health_service_says_serving() {
    let cluster = Cluster::sqlite(&[]).await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", cluster.node().data)).expect("an address");
    let mut health = HealthClient::new(endpoint.connect().await.expect("connect"));
    for service in ["", "mpim.PresenceService"] {
        let answer = health.check(HealthCheckRequest { service: service.to_owned() }).await.expect(service).into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
}

/// A bind and a query on a fresh connection, in time.
async fn others_are_served(node: &Node, user: i64) {
    let (mut client, began) = (node.new_connection(), Instant::now());
    client.bind_route(a_bind(user, PHONE, "c")).await.expect("a bind");
    client.query_route(QueryRouteReq { user_id: user, max_staleness_ms: Some(0) }).await.expect("a query");
    assert!(began.elapsed() < allowed(UNDISTURBED), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_half_open_connections_and_slow_readers_disturb_nobody() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let _turn = heavy().await;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let connect = async || TcpStream::connect(node.data).await.expect("connect");

    // Random bytes: xorshift, so that a failure can be repeated.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for size in [1, 9, 100, 10_000, 1_000_000] {
        for preface in [&b""[..], PREFACE] {
            let noise = (0..size).map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            });
            let bytes: Vec<u8> = preface.iter().copied().chain(noise).collect();
            let mut stream = connect().await;
            let _ = stream.write_all(&bytes).await; // it may be cut off before the end
            others_are_served(node, ALICE).await;
        }
    }

    let mut half_open = Vec::new();
    for i in 0..100 {
        let mut stream = connect().await;
        stream.write_all(&PREFACE[..i % PREFACE.len()]).await.expect("say half a sentence");
        half_open.push(stream);
    }
    others_are_served(node, ALICE).await;

    // Large answers are asked for, and nobody reads them.
    let binds = (1..=2_000).map(|user| a_bind(user, &"d".repeat(128), "c")).collect();
    node.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds");
    let before = node.rss_bytes();
    let mut slow = slow_reader(node).await;
    for user in 1..=20 {
        others_are_served(node, user).await;
    }
    let growth = node.rss_bytes().saturating_sub(before);
    assert!(growth < 100 * 1024 * 1024, "answers nobody reads pile up: {growth} bytes");
    let mut byte = [0];
    assert_eq!(slow.read(&mut byte).await.expect("it is still served"), 1);
    drop(half_open);
    others_are_served(node, ALICE).await;
}

#[tokio::test]
async fn connections_that_never_speak_do_not_keep_others_out_for_long() {
    const PLACES: usize = 10;
    /// A connection has 10 s to begin.
    const FREED_WITHIN: Duration = Duration::from_secs(13);
    let cluster = Cluster::sqlite(&[("PRESENCE_SERVICE__MAX_CONNECTIONS", "10")]).await;
    let node = cluster.node();
    let mut silent = Vec::new();
    for _ in 0..PLACES {
        silent.push(TcpStream::connect(node.data).await.expect("connect"));
    }
    let served = async || node.new_connection().bind_route(a_bind(ALICE, PHONE, "c")).await.is_ok();
    eventually("a place is free again", FREED_WITHIN, served).await;
}

/// A connection on which 200 large answers were asked for, none of which is read: raw HTTP/2 with small windows.
async fn slow_reader(node: &Node) -> TcpStream {
    use im_presence::pb::presence_service_client::PresenceServiceClient;
    let proxy = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
    let port = proxy.local_addr().expect("an address").port();
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://127.0.0.1:{port}")).expect("an address");
    let mut client = PresenceServiceClient::new(endpoint.connect_lazy());
    tokio::spawn(async move {
        let request = BatchQueryRouteReq { user_ids: (1..=2_000).collect(), with_routes: true, ..Default::default() };
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..200 {
            let (mut client, request) = (client.clone(), request.clone());
            calls.spawn(async move { client.batch_query_route(request).await.is_ok() });
        }
        let _ = client.query_route(QueryRouteReq::default()).await; // never answered either
        calls.join_all().await
    });
    let (mut from, _) = proxy.accept().await.expect("the slow client");
    let mut to = TcpStream::connect(node.data).await.expect("connect");
    // Requests pass for a moment, answers never do.
    let mut bytes = vec![0; 64 * 1024];
    let (mut passed, mut quiet) = (0, 0);
    while quiet < 3 {
        match tokio::time::timeout(Duration::from_millis(100), from.read(&mut bytes)).await {
            Ok(Ok(n)) if n > 0 => {
                to.write_all(&bytes[..n]).await.expect("ask");
                passed += n;
                quiet = 0;
            }
            _ => quiet += 1,
        }
    }
    assert!(passed > 10_000, "the requests were sent: {passed} bytes");
    tokio::spawn(async move { drop((from.readable().await, std::future::pending::<()>().await)) });
    to
}
