//! Who may make which call.

use std::path::PathBuf;
use std::time::Duration;

use im_presence::api::access::RULES;
use im_presence::api::access::Rule;
use im_presence::client::security::Link;
use im_presence::client::security::Security;
use im_presence::domain::caller::Role;
use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::admin_service_client::AdminServiceClient;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use im_presence::pb::presence_service_client::PresenceServiceClient;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_stream::iter;
use tonic::Request;
use tonic::Status;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use crate::deliver::a_message;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::pki::Pki;
use crate::harness::pki::bears;
use crate::harness::pki::link;
use crate::harness::pki::token;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;
use crate::steps::traced;

/// A node that asks for tokens, and a token of each kind.
struct Guarded {
    pki: Pki,
    cluster: Cluster,
}

impl Guarded {
    async fn start(entries: &str, more: &[(&str, &str)]) -> Self {
        let pki = Pki::new();
        let mut all = entries.to_owned();
        for role in Role::ALL {
            let gateways = if role == Role::Gateway { format!("gateways = [\"{GATEWAY}\"]") } else { String::new() };
            let (token, entry) = token(role.name(), role.name(), &gateways);
            pki.write(role.name(), &format!("{token}\n"));
            all.push_str(&entry);
        }
        let file = pki.write("tokens.toml", &all);
        let settings = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", file.to_str().expect("a path"))];
        let cluster = Cluster::sqlite(&[&settings, more].concat()).await;
        Self { pki, cluster }
    }

    fn node(&self) -> &Node {
        self.cluster.node()
    }

    fn bearer(&self, name: &str) -> Security {
        bears(&self.pki.path(name))
    }

    fn presence(&self, name: &str) -> PresenceServiceClient<Link> {
        PresenceServiceClient::new(link(&self.bearer(name), self.node().data))
    }

    fn gateways(&self, name: &str) -> GatewayServiceClient<Link> {
        GatewayServiceClient::new(link(&self.bearer(name), self.node().data))
    }
}

/// What a caller with these credentials is told: of a gRPC call with an empty message, or of a page.
async fn told(node: &Node, rule: &Rule, security: &Security, header: Option<&str>) -> tonic::Code {
    if let Some((method, path)) = rule.call.split_once(' ') {
        let path = path.replace('*', "nothing-there");
        let token = security.token_file.as_ref().map(|file| std::fs::read_to_string(file).expect("a token"));
        let header = token.map(|token| format!("Bearer {}", token.trim_end())).or(header.map(str::to_owned));
        let headers: Vec<_> = header.as_deref().map(|value| ("Authorization", value)).into_iter().collect();
        return match node.ask(method, &path, &headers, "").await.status {
            200 | 404 | 415 => tonic::Code::Ok, // it was let in
            401 => tonic::Code::Unauthenticated,
            403 => tonic::Code::PermissionDenied,
            other => panic!("{path}: {other}"),
        };
    }
    let addr = if rule.call.contains("AdminService") { node.admin } else { node.data };
    let mut grpc = Grpc::new(link(security, addr));
    grpc.ready().await.expect("a node");
    let mut request = Request::new(iter([pb::QueryRouteReq::default()]));
    if let Some(header) = header {
        request.metadata_mut().insert("authorization", header.parse().expect("a header"));
    }
    let codec = ProstCodec::<pb::QueryRouteReq, pb::QueryRouteReq>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(rule.call);
    match grpc.streaming(request, path, codec).await {
        Ok(answers) => match answers.into_inner().message().await {
            Ok(_) => tonic::Code::Ok,
            Err(status) => status.code(),
        },
        Err(status) => status.code(),
    }
}

#[tokio::test]
async fn every_call_asks_for_the_role_that_the_table_says() {
    let (expired, entry) = token("former", "operator", "expires = \"2020-01-01T00:00:00Z\"");
    for metrics in ["open", "viewer"] {
        let guarded = Guarded::start(&entry, &[("AUTH__METRICS", metrics)]).await;
        let nobody = Security::default();
        for rule in &RULES {
            let is_open = rule.is_open() || (rule.call == "GET /metrics" && metrics == "open");
            let strangers = [None, Some("Bearer imp_wrong"), Some("Basic b3BlcmF0b3I6"), Some(&*format!("Bearer {expired}"))];
            for header in strangers {
                let told = told(guarded.node(), rule, &nobody, header).await;
                assert_eq!(told == tonic::Code::Unauthenticated, !is_open, "{rule:?} {header:?}: {told:?}");
            }
            for role in Role::ALL {
                let told = told(guarded.node(), rule, &guarded.bearer(role.name()), None).await;
                // Its empty request is a whole one, which changes something.
                let is_whole = rule.call.ends_with("/RebalanceGateways") && role == Role::Viewer;
                let is_denied = told == tonic::Code::PermissionDenied && !is_whole;
                assert!(told != tonic::Code::Unauthenticated, "{rule:?} {role:?}");
                assert_eq!(is_denied, !is_open && !rule.allows(role), "{rule:?} {role:?}: {told:?}");
            }
        }
        assert!(guarded.node().metric("im_presence_auth_failures_total").await > 0.0 || metrics == "viewer");
    }
}

#[tokio::test]
async fn a_viewer_sees_what_a_change_would_do_and_changes_nothing() {
    let guarded = Guarded::start("", &[]).await;
    let hello = pb::RegisterGatewayReq { gateway_addr: GATEWAY.to_owned(), ..Default::default() };
    guarded.gateways("gateway").register_gateway(hello).await.expect("a life");
    guarded.presence("operator").bind_route(a_bind(ALICE, PHONE, "c")).await.expect("bound");
    let db = &guarded.cluster.db;
    let state = async || {
        let mut state = Vec::new();
        for number in
            ["SUM(version) FROM users", "SUM(banned_until_ms) FROM users", "COUNT(*) FROM routes", "COUNT(*) FROM drains"]
        {
            state.push(db.number(&format!("SELECT {number}")).await);
        }
        state
    };
    let before = state().await;
    let mut viewer = AdminServiceClient::new(link(&guarded.bearer("viewer"), guarded.node().admin));
    let (user_id, device_id, gateway_addr) = (ALICE, PHONE.to_owned(), GATEWAY.to_owned());
    for dry_run in [false, true] {
        let kick = pb::KickDeviceReq { user_id, device_id: device_id.clone(), dry_run, ..Default::default() };
        let force = pb::ForceOfflineReq { user_id, ban_for_s: 60, dry_run, ..Default::default() };
        let drain = pb::DrainGatewayReq { gateway_addr: gateway_addr.clone(), dry_run, ..Default::default() };
        let rebalance = pb::RebalanceGatewaysReq { dry_run, ..Default::default() };
        let migrate = pb::MigrateUserReq { user_id, dry_run, ..Default::default() };
        let told = [
            ("kick", viewer.kick_device(kick).await.map(drop)),
            ("force", viewer.force_offline(force).await.map(drop)),
            ("drain", viewer.drain_gateway(drain).await.map(drop)),
            ("rebalance", viewer.rebalance_gateways(rebalance).await.map(drop)),
            ("migrate", viewer.migrate_user(migrate).await.map(drop)),
            ("forget", viewer.forget_user(pb::ForgetUserReq { user_id, dry_run }).await.map(drop)),
        ];
        for (what, told) in told {
            match told {
                Ok(()) => assert!(dry_run, "{what}"),
                Err(status) => {
                    let denied = status.code() == tonic::Code::PermissionDenied && status.message().contains("dry_run");
                    assert!(!dry_run && denied, "{what}: {status:?}");
                }
            }
        }
    }
    assert_eq!(state().await, before);
}

#[tokio::test]
async fn what_is_not_in_the_table_is_offered_to_nobody() {
    let guarded = Guarded::start("", &[]).await;
    let token = std::fs::read_to_string(guarded.pki.path("operator")).expect("a token");
    let header = format!("Bearer {}", token.trim_end());
    for path in [
        "/web/nothing",
        "/console",
        "/api/v1/nothing-there",
        "/api/v2/gateways",
        "/metrics/",
        "/debug",
        "/mpim.AdminService/Nothing",
    ] {
        let kind = if path.starts_with("/mpim.") { "application/grpc" } else { "text/plain" };
        let headers = [("Authorization", &*header), ("Content-Type", kind)];
        let status = guarded.node().ask("GET", path, &headers, "").await.status;
        assert!([404, 200].contains(&status), "{path}: {status}");
        if status == 200 {
            assert!(path.starts_with("/mpim."), "{path}"); // gRPC says it in a trailer
        }
    }
}

fn is_denied<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = answer.expect_err("it is somebody else's gateway");
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status:?}");
    assert!(status.message().contains("gateway"), "{status:?}");
}

#[tokio::test]
async fn a_web_page_gives_no_orders_by_grpc_to_whom_it_may_send_without_asking() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    // A hold of 60 s, as a page can send it to any address: without a question before.
    let order = "\0\0\0\0\u{4}\u{8}\u{60}\u{54}\u{3}";
    for headers in [&[("Content-Type", "text/plain")][..], &[("Content-Type", "application/x-www-form-urlencoded")], &[]] {
        let answer = node.ask("POST", "/mpim.AdminService/HoldGateways", headers, order).await;
        assert_eq!(answer.status, 415, "{headers:?}: {}", answer.body);
    }
    assert!(!node.degraded().await.contains(&"hold".to_owned()));

    let socket = TcpStream::connect(node.data).await.expect("connect");
    let (send, connection) = h2::client::handshake(socket).await.expect("shake hands");
    tokio::spawn(connection);
    let request = http::Request::post(format!("http://{}/mpim.PresenceService/SetStatus", node.data));
    let request = request.header("content-type", "text/plain").body(()).expect("a request");
    let (answer, _) = send.ready().await.expect("it stands").send_request(request, true).expect("a call");
    assert_eq!(answer.await.expect("an answer").status(), 415);
}

#[tokio::test]
async fn a_gateway_speaks_for_its_own_addresses_only() {
    let (other, entry) = token("other", "gateway", &format!("gateways = [\"{OTHER_GATEWAY}\"]"));
    let guarded = Guarded::start(&entry, &[]).await;
    guarded.pki.write("other", &other);
    let (mut own, mut others) = (guarded.gateways("gateway"), guarded.gateways("other"));
    let hello = |addr: &str| pb::RegisterGatewayReq { gateway_addr: addr.to_owned(), ..Default::default() };
    let other_epoch = others.register_gateway(hello(OTHER_GATEWAY)).await.expect("a life").into_inner().gateway_epoch;
    own.register_gateway(hello(GATEWAY)).await.expect("a life");
    let on = |user, addr: &str| pb::BindRouteReq { gateway_addr: addr.to_owned(), ..a_bind(user, PHONE, "c") };
    let bound = guarded.presence("other").bind_route(on(BOB, OTHER_GATEWAY)).await.expect("a bind").into_inner();
    assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    let query = |user_id| pb::QueryRouteReq { user_id, max_staleness_ms: Some(0) };
    let mut service = guarded.presence("service");
    let before = service.query_route(query(BOB)).await.expect("a query").into_inner();

    let mut presence = guarded.presence("gateway");
    is_denied(own.register_gateway(hello(OTHER_GATEWAY)).await);
    let addr = OTHER_GATEWAY.to_owned();
    let beat = pb::HeartbeatReq { gateway_addr: addr.clone(), gateway_epoch: other_epoch, ..Default::default() };
    is_denied(own.heartbeat(beat).await);
    let leave = pb::DeregisterGatewayReq { gateway_addr: addr.clone(), gateway_epoch: other_epoch };
    is_denied(own.deregister_gateway(leave).await);
    is_denied(presence.bind_route(on(ALICE, OTHER_GATEWAY)).await);
    let both = pb::BatchBindRouteReq { binds: vec![on(ALICE, GATEWAY), on(ALICE, OTHER_GATEWAY)] };
    is_denied(presence.batch_bind_route(both).await);
    is_denied(presence.allocate_gateway(pb::AllocateGatewayReq { user_id: ALICE, ..Default::default() }).await);
    let by_device = pb::UnbindRouteReq { user_id: BOB, device_id: PHONE.to_owned(), gateway_addr: addr, ..Default::default() };
    is_denied(presence.unbind_route(by_device).await);
    is_denied(own.pull_inbox(pb::PullInboxReq { user_id: BOB, ..Default::default() }).await);
    is_denied(own.ack_inbox(pb::AckInboxReq { user_id: BOB, ..Default::default() }).await);
    let frames = iter([pb::GatewayFrame { seq: 1, body: Some(pb::gateway_frame::Body::Hello(hello(OTHER_GATEWAY))) }]);
    let mut stream = own.attach(frames).await.expect("a stream").into_inner();
    is_denied(stream.message().await);

    // A route_key names a route without its gateway. It is as if the route had gone.
    let by_key = pb::UnbindRouteReq { user_id: BOB, route_key: bound.route_key, ..Default::default() };
    let answer = presence.unbind_route(by_key.clone()).await.expect("an answer").into_inner();
    assert!(!answer.unbound, "{answer:?}");
    let claimed = pb::UnbindRouteReq { gateway_addr: GATEWAY.to_owned(), ..by_key.clone() };
    let answer = presence.unbind_route(claimed).await.expect("an answer").into_inner();
    assert!(!answer.unbound, "{answer:?}");

    let after = service.query_route(query(BOB)).await.expect("a query").into_inner();
    assert_eq!((after.version, after.is_online), (before.version, true), "nothing has changed");
    let alice = service.query_route(query(ALICE)).await.expect("a query").into_inner();
    assert!(!alice.is_online, "nor was half a batch bound");

    let answer = guarded.presence("other").unbind_route(by_key).await.expect("an answer").into_inner();
    assert!(answer.unbound, "its own gateway may: {answer:?}");
}

/// It learns the delivery's id, because another device of the user is on it.
#[tokio::test]
async fn a_gateway_acknowledges_only_what_was_handed_to_it_for_that_device() {
    let (other, entry) = token("other", "gateway", &format!("gateways = [\"{OTHER_GATEWAY}\"]"));
    let guarded = Guarded::start(&entry, &[]).await;
    guarded.pki.write("other", &other);
    let nodes = || vec![guarded.node().data.to_string()];
    let own = TestGateway::showing(&guarded.bearer("gateway"), nodes(), GATEWAY, Devices::AreSilent).await;
    let others = TestGateway::showing(&guarded.bearer("other"), nodes(), OTHER_GATEWAY, Devices::AreSilent).await;
    own.bind(BOB, LAPTOP, "c1").await;
    others.bind(BOB, PHONE, "c2").await;
    let query = pb::QueryRouteReq { user_id: BOB, max_staleness_ms: Some(0) };
    let mut asking = guarded.presence("service");
    let before = asking.query_route(query).await.expect("a query").into_inner().version;
    for text in ["once", "twice"] {
        let mut service = guarded.presence("service");
        let message = pb::DeliverReq { user_id: BOB, message: text.to_owned(), ack_timeout_ms: 1_000, ..Default::default() };
        let delivered = tokio::spawn(async move { service.deliver(message).await });
        let heard = || own.deliveries().into_iter().find(|delivery| delivery.message == text);
        eventually("it is handed over", Duration::from_secs(5), async || heard().is_some()).await;
        let delivery_id = heard().expect("a delivery").delivery_id;
        for not_here in [true, false] {
            let (device_id, delivery_id) = (PHONE.to_owned(), delivery_id.clone());
            let ack = pb::DeliveryAck { delivery_id, user_id: BOB, device_id, not_here };
            is_denied(guarded.gateways("gateway").ack_delivery(pb::AckDeliveryReq { acks: vec![ack] }).await);
        }
        let report = delivered.await.expect("a caller").expect("an answer").into_inner();
        assert!(!report.delivered && report.acked_devices.is_empty(), "{report:?}");
    }
    let after = asking.query_route(query).await.expect("a query").into_inner();
    assert_eq!((after.version, after.routes.len()), (before, 2), "nothing was unbound");
}

#[tokio::test]
async fn a_gateway_reads_the_inboxes_of_users_that_are_bound_to_it() {
    let guarded = Guarded::start("", &[]).await;
    let mut gateways = guarded.gateways("gateway");
    let hello = pb::RegisterGatewayReq { gateway_addr: GATEWAY.to_owned(), ..Default::default() };
    gateways.register_gateway(hello).await.expect("a life");
    let pull = pb::PullInboxReq { user_id: ALICE, device_id: PHONE.to_owned(), ..Default::default() };
    is_denied(gateways.pull_inbox(pull.clone()).await);
    guarded.presence("gateway").bind_route(a_bind(ALICE, PHONE, "c")).await.expect("a bind");
    let pulled = gateways.pull_inbox(pull).await.expect("its own user's inbox").into_inner();
    assert_eq!(code(&pulled.result), Code::Ok);
}

#[tokio::test]
async fn a_caller_is_limited_by_its_name_and_leases_are_not() {
    let (slow, entry) = token("slow", "gateway", &format!("gateways = [\"{GATEWAY}\"]\ncalls_per_s = 20"));
    let guarded = Guarded::start(&entry, &[("LIMITS__USERS_PER_S", "100"), ("LIMITS__STREAMS", "1")]).await;
    guarded.pki.write("slow", &slow);
    let query = pb::QueryRouteReq { user_id: ALICE, max_staleness_ms: None };
    // Two connections of one caller.
    let clients = [guarded.presence("slow"), guarded.presence("slow")];
    let calls = clients.iter().cycle().take(200).map(|client| {
        let mut client = client.clone();
        async move { client.query_route(query).await.err() }
    });
    let refused: Vec<Status> = futures_util::future::join_all(calls).await.into_iter().flatten().collect();
    let refusal = refused.first().expect("more calls than it may make");
    assert_eq!(refusal.code(), tonic::Code::ResourceExhausted);
    assert!(retry_delay(refusal).is_some(), "{refusal:?}");
    let mut gateways = guarded.gateways("slow");
    let hello = pb::RegisterGatewayReq { gateway_addr: GATEWAY.to_owned(), ..Default::default() };
    let epoch = gateways.register_gateway(hello.clone()).await.expect("a life").into_inner().gateway_epoch;
    for _ in 0..50 {
        let beat = pb::HeartbeatReq { gateway_addr: GATEWAY.to_owned(), gateway_epoch: epoch, ..Default::default() };
        gateways.heartbeat(beat).await.expect("a lease is never refused");
    }

    let many = pb::BatchQueryRouteReq { user_ids: (1..=1_000).collect(), ..Default::default() };
    let mut service = guarded.presence("service");
    service.batch_query_route(many.clone()).await.expect("a batch is done as a whole");
    let refusal = service.batch_query_route(many).await.expect_err("and paid for");
    assert_eq!(refusal.code(), tonic::Code::ResourceExhausted, "{refusal:?}");
    service.query_route(query).await.expect("single users are calls");

    let frame = || pb::GatewayFrame { seq: 1, body: Some(pb::gateway_frame::Body::Hello(hello.clone())) };
    let forever = |frame| tokio_stream::StreamExt::chain(iter([frame]), tokio_stream::pending());
    let mut first = guarded.gateways("gateway").attach(forever(frame())).await.expect("a stream").into_inner();
    first.message().await.expect("a welcome");
    let second = guarded.gateways("gateway").attach(forever(frame())).await.err();
    assert_eq!(second.map(|status| status.code()), Some(tonic::Code::ResourceExhausted));
}

#[tokio::test]
async fn what_operators_do_and_what_others_are_denied_is_taken_down() {
    let guarded = Guarded::start("", &[]).await;
    let ctl = |role: &str, words: &[&str]| {
        let file = guarded.pki.path(role);
        let words = [&["--token-file", file.to_str().expect("a path")], words].concat();
        guarded.node().ctl(&words)
    };
    let (exit, said) = ctl("operator", &["gateways", "hold", "1000", "--reason", "switch\nmaintenance"]);
    assert_eq!(exit, 0, "{said}");
    assert_eq!(ctl("viewer", &["gateways", "hold", "1000"]).0, 1);
    assert_eq!(ctl("viewer", &["gateways"]).0, 0);
    let count = |what: &str| format!("SELECT COUNT(*) FROM audit WHERE {what}");
    let held = "who = 'operator' AND role = 'operator' AND action = 'HoldGateways' AND outcome = 'ok' \
        AND args = 'for 1s' AND reason = 'switchmaintenance' AND from_addr LIKE '127.0.0.1:%'";
    let denied = "who = 'viewer' AND action LIKE '%HoldGateways' AND outcome = 'denied'";
    let db = &guarded.cluster.db;
    eventually("rows", Duration::from_secs(3), async || {
        db.number(&count(held)).await == 1 && db.number(&count(denied)).await == 1
    })
    .await;
    assert_eq!(db.number(&count("action = 'ListGateways'")).await, 0, "to look is not taken down");
    assert_eq!(db.number(&count("action = 'start'")).await, 1);
    let lines = guarded.node().log();
    let audit: Vec<&String> = lines.iter().filter(|line| line.contains("\"target\":\"audit\"")).collect();
    assert!(audit.iter().any(|line| line.contains("HoldGateways") && line.contains("\"who\":\"operator\"")), "{audit:?}");
}

/// A gateway's lease is not shortened when its credential is taken away, and its users stay online.
#[tokio::test]
async fn a_credential_that_is_taken_away_ends_its_streams_soon_and_nothing_else() {
    let (second, entry) = token("second", "gateway", &format!("gateways = [\"{OTHER_GATEWAY}\"]"));
    let guarded = Guarded::start(&entry, &[]).await;
    let tokens = guarded.pki.path("tokens.toml");
    guarded.pki.write("second", &second);
    let attach = async |name: &str, addr: &str| {
        let hello = pb::RegisterGatewayReq { gateway_addr: addr.to_owned(), ..Default::default() };
        let frame = pb::GatewayFrame { seq: 1, body: Some(pb::gateway_frame::Body::Hello(hello)) };
        let frames = tokio_stream::StreamExt::chain(iter([frame]), tokio_stream::pending());
        let mut stream = guarded.gateways(name).attach(frames).await.expect("a stream").into_inner();
        stream.message().await.expect("a frame").expect("a welcome");
        stream
    };
    let (mut revoked, mut kept) = (attach("second", OTHER_GATEWAY).await, attach("gateway", GATEWAY).await);
    let on = pb::BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(BOB, PHONE, "c") };
    guarded.presence("second").bind_route(on).await.expect("a bind");
    let mut ages = guarded.presence("second");
    let text = std::fs::read_to_string(&tokens).expect("the tokens");
    let began = std::time::Instant::now();
    guarded.pki.write("tokens.toml", &text.replace("name = \"second\"", "name = \"third\""));
    let ended = revoked.message().await.expect_err("the stream ends");
    assert_eq!(ended.code(), tonic::Code::Unauthenticated, "a name that changes is another caller: {ended:?}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    let nothing: PathBuf = guarded.pki.write("tokens.toml", &text.replace(&entry, ""));
    assert!(nothing.exists());
    let query = pb::QueryRouteReq { user_id: BOB, max_staleness_ms: Some(0) };
    eventually("the token is worth nothing", Duration::from_secs(10), async || {
        ages.query_route(query).await.is_err_and(|status| status.code() == tonic::Code::Unauthenticated)
    })
    .await;
    let bob = guarded.presence("service").query_route(query).await.expect("a query").into_inner();
    assert!(bob.is_online, "an operator's slip takes nobody offline");
    let idle = tokio::time::timeout(Duration::from_millis(200), kept.message()).await;
    assert!(idle.is_err(), "the other stream goes on: {idle:?}");
}

#[tokio::test]
async fn nothing_is_kept_for_somebody_who_has_not_said_who_it_is() {
    let guarded = Guarded::start("", &[]).await;
    let before = guarded.node().metric("im_presence_held_bytes").await;
    let mut strangers = Vec::new();
    for _ in 0..20 {
        let mut stream = TcpStream::connect(guarded.node().admin).await.expect("connect");
        let head = "POST /mpim.AdminService/ListGateways HTTP/1.1\r\nHost: node\r\nContent-Length: 200000\r\n\r\nno more";
        stream.write_all(head.as_bytes()).await.expect("ask");
        let mut said = [0; 12];
        // Half of the time that a body has.
        let answer = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut said));
        answer.await.expect("an answer before the body is there").expect("an answer");
        strangers.push(stream);
    }
    assert_eq!(guarded.node().metric("im_presence_held_bytes").await, before);
    drop(strangers);

    // Health and reflection may be asked by anybody, with small messages.
    let mut health = Grpc::new(link(&Security::default(), guarded.node().data));
    health.ready().await.expect("a node");
    let large = pb::DeliverReq { message: "x".repeat(100_000), ..Default::default() };
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = ProstCodec::<pb::DeliverReq, pb::DeliverResp>::default();
    let refused = health.unary(Request::new(large), path, codec).await.expect_err("too large");
    assert!(refused.message().contains("16384 bytes"), "{refused:?}");
}

#[tokio::test]
async fn a_limit_that_is_changed_in_the_file_holds_for_connections_that_are_there() {
    let (bearer, entry) = token("busy", "service", "");
    let guarded = Guarded::start(&entry, &[]).await;
    guarded.pki.write("busy", &bearer);
    let mut busy = guarded.presence("busy");
    let query = pb::QueryRouteReq { user_id: ALICE, max_staleness_ms: None };
    let mut refusals = async || {
        let mut refused = 0;
        for _ in 0..50 {
            refused += usize::from(busy.query_route(query).await.is_err());
        }
        refused
    };
    assert_eq!(refusals().await, 0);
    let text = std::fs::read_to_string(guarded.pki.path("tokens.toml")).expect("the tokens");
    guarded.pki.write("tokens.toml", &text.replace("name = \"busy\"", "name = \"busy\"\ncalls_per_s = 5"));
    eventually("it is limited", Duration::from_secs(10), async || refusals().await > 0).await;
}

/// Whether a watch of one user is taken.
async fn may_watch(presence: &mut PresenceServiceClient<Link>, user_id: i64) -> Code {
    let add = vec![pb::KnownUser { user_id, version: 0 }];
    let request = pb::WatchReq { seq: 1, add, remove: Vec::new() };
    let mut told = presence.watch(iter([request])).await.expect("a watch").into_inner();
    loop {
        match told.message().await.expect("it goes on").and_then(|told| told.body) {
            Some(pb::watch_resp::Body::Done(done)) => return code(&done.result),
            Some(pb::watch_resp::Body::Presence(_)) => {}
            None => panic!("it has ended"),
        }
    }
}

#[tokio::test]
async fn a_gateway_sets_the_status_of_its_own_users_only_and_watches_others_if_it_may() {
    for (setting, others) in [("true", Code::Ok), ("false", Code::Refused)] {
        let guarded = Guarded::start("", &[("AUTH__GATEWAY_MAY_WATCH_ANY", setting)]).await;
        let mut operator = guarded.presence("operator");
        operator.bind_route(a_bind(ALICE, PHONE, "c")).await.expect("bound");
        operator
            .bind_route(pb::BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(BOB, PHONE, "c") })
            .await
            .expect("bound");
        let mut gateway = guarded.presence("gateway");
        let busy = |user_id| pb::SetStatusReq { user_id, status: pb::Status::Busy.into(), ..Default::default() };
        let own = gateway.set_status(busy(ALICE)).await.expect("its own user").into_inner();
        assert_eq!((code(&own.result), own.shown()), (Code::Ok, pb::Status::Busy));
        let refused = gateway.set_status(busy(BOB)).await.expect_err("another's");
        assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused:?}");
        assert_eq!((may_watch(&mut gateway, ALICE).await, may_watch(&mut gateway, BOB).await), (Code::Ok, others));
        assert_eq!(may_watch(&mut guarded.presence("service"), BOB).await, Code::Ok);
    }
}

#[tokio::test]
async fn a_watch_ends_when_its_credential_is_taken_away() {
    let guarded = Guarded::start("", &[]).await;
    let mut told = guarded.presence("viewer").watch(tokio_stream::pending()).await.expect("a watch").into_inner();
    guarded.pki.write("tokens.toml", "");
    let ended = tokio::time::timeout(Duration::from_secs(20), told.message()).await.expect("it ends");
    assert_eq!(ended.expect_err("it is told why").code(), tonic::Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_operators_are_shown_the_steps_of_a_delivery() {
    let guarded = Guarded::start("", &[]).await;
    for (name, sees) in [("service", false), ("operator", true)] {
        let request = traced(a_message(ALICE, "hello"));
        let answer = guarded.presence(name).deliver(request).await.expect("an answer").into_inner();
        assert_eq!((code(&answer.result), answer.steps.is_empty()), (Code::NotFound, !sees), "{name}: {answer:?}");
    }
}
