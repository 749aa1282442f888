//! Connections that nobody can read, and certificates that say who calls.

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::security::Security;
use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::node_service_client::NodeServiceClient;
use im_presence::pb::presence_service_client::PresenceServiceClient;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Settings;
use crate::harness::node::settings;
use crate::harness::pki::Ca;
use crate::harness::pki::Pair;
use crate::harness::pki::Pki;
use crate::harness::pki::ROLES;
use crate::harness::pki::bears;
use crate::harness::pki::link;
use crate::harness::pki::shows;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;

const HERE: [&str; 2] = ["127.0.0.1", "localhost"];

/// TLS on the gRPC port.
fn tls(pair: &Pair) -> Settings {
    settings(&[("TLS__CERT_FILE", text(&pair.cert)), ("TLS__KEY_FILE", text(&pair.key))])
}

/// The same, and a certificate for each caller.
fn mutual_tls(pair: &Pair, ca: &Ca) -> Settings {
    let mut all = tls(pair);
    all.extend(settings(&[("TLS__CLIENT_CA_FILE", text(&ca.file)), ("AUTH__MODE", "mtls"), ("AUTH__MTLS", ROLES)]));
    all
}

fn query(user_id: i64) -> pb::QueryRouteReq {
    pb::QueryRouteReq { user_id, max_staleness_ms: Some(0) }
}

async fn asks(node: &Node, security: &Security) -> Result<pb::QueryRouteResp, tonic::Status> {
    PresenceServiceClient::new(link(security, node.data)).query_route(query(ALICE)).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_port_with_a_certificate_speaks_tls_and_nothing_else() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let (ca, other) = (pki.ca("ca"), pki.ca("other"));
    let pair = ca.issue("node", &HERE);
    let mut all = db.settings(&[("ADMIN_TLS__CERT_FILE", text(&pair.cert)), ("ADMIN_TLS__KEY_FILE", text(&pair.key))]);
    all.extend(tls(&pair));
    let node = Node::start(all).await;
    asks(&node, &shows(&ca, None, None)).await.expect("a client that believes the CA");
    let stranger = asks(&node, &shows(&other, None, None)).await.expect_err("another CA");
    assert_eq!(stranger.code(), tonic::Code::Unavailable, "{stranger:?}");
    let named = Security { server_name: Some("presence.example".to_owned()), ..shows(&ca, None, None) };
    asks(&node, &named).await.expect_err("another name");
    asks(&node, &Security::default()).await.expect_err("plaintext");

    let ca_file = text(&ca.file);
    let (exit, said) = node.ctl(&["--ca", ca_file, "query", "1"]);
    assert!(exit == 3 && said.contains("offline"), "{said}");
    assert_eq!(node.ctl(&["query", "1"]).0, 1);
    let (exit, said) = node.ctl(&["--ca", ca_file, "gateways"]);
    assert_eq!(exit, 0, "{said}");
    let health = |more: &[&str]| {
        let admin = node.admin.to_string();
        let output = Command::new(PROGRAM).args(["health", "--addr", &admin]).args(more).output().expect("run health");
        output.status.success()
    };
    assert!(health(&["--ca", ca_file]) && !health(&[]));
    let log = node.log().join("\n");
    assert!(log.contains("gRPC port: TLS; admin port: TLS; to other nodes: TLS"), "{log}");
}

#[tokio::test]
async fn a_certificate_says_who_calls() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let mut all = db.settings(&[]);
    all.extend(mutual_tls(&ca.issue("node", &HERE), &ca));
    let node = Node::start(all).await;
    let presence = |pair: &Pair| PresenceServiceClient::new(link(&shows(&ca, Some(pair), None), node.data));
    let gateway = ca.issue("gw-1", &["spiffe://im/gateway/gw-1"]);
    let bound = presence(&gateway).bind_route(a_bind(ALICE, PHONE, "c")).await.expect("its own address").into_inner();
    assert_eq!(code(&bound.result), Code::Ok);
    let elsewhere = pb::BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(BOB, PHONE, "c") };
    let denied = presence(&gateway).bind_route(elsewhere).await.expect_err("another's address");
    assert_eq!(denied.code(), tonic::Code::PermissionDenied);
    let service = ca.issue("service", &["spiffe://im/service"]);
    assert!(presence(&service).query_route(query(ALICE)).await.expect("a query").into_inner().is_online);
    let denied = presence(&service).bind_route(a_bind(BOB, PHONE, "c")).await.expect_err("a service binds nobody");
    assert_eq!(denied.code(), tonic::Code::PermissionDenied);
    let nameless = ca.issue("nameless", &["spiffe://im/somebody"]);
    let unknown = presence(&nameless).query_route(query(ALICE)).await.expect_err("no role");
    assert_eq!(unknown.code(), tonic::Code::Unauthenticated);
    let old = ca.issue_until("old", &["spiffe://im/service"], Some(2020));
    presence(&old).query_route(query(ALICE)).await.expect_err("it has expired");
    asks(&node, &shows(&ca, None, None)).await.expect_err("no certificate");
    let other = pki.ca("other");
    let forged = Pair { ..other.issue("forged", &["spiffe://im/service"]) };
    presence(&forged).query_route(query(ALICE)).await.expect_err("a CA of their own");
}

#[tokio::test]
async fn either_credential_will_do_and_a_wrong_one_is_not_passed_over() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let (service, entry) = token("service", "service", "");
    let (tokens, service) = (pki.write("tokens.toml", &entry), pki.write("service", &service));
    let mut all = db.settings(&[("TLS__REQUIRE_CLIENT_CERT", "false")]);
    all.extend(mutual_tls(&ca.issue("node", &HERE), &ca));
    all.extend(settings(&[("AUTH__MODE", "mtls,token"), ("AUTH__TOKENS_FILE", text(&tokens))]));
    let node = Node::start(all).await;
    let by_certificate = ca.issue("service", &["spiffe://im/service"]);
    let without_role = ca.issue("nobody", &["spiffe://im/nobody"]);
    asks(&node, &shows(&ca, Some(&by_certificate), None)).await.expect("a certificate");
    asks(&node, &shows(&ca, None, Some(&service))).await.expect("a token");
    asks(&node, &shows(&ca, Some(&without_role), Some(&service))).await.expect("a certificate without a role does not apply");
    let wrong = pki.write("wrong", "imp_wrong");
    for security in [shows(&ca, None, Some(&wrong)), shows(&ca, None, None)] {
        let status = asks(&node, &security).await.expect_err("nothing valid");
        assert_eq!(status.code(), tonic::Code::Unauthenticated, "{security:?}");
    }
}

#[tokio::test]
async fn nodes_prove_to_each_other_that_they_are_nodes() {
    let (pki, db) = (Pki::new(), TestDb::mariadb(MariaDb::shared()).await);
    let ca = pki.ca("ca");
    let pair = ca.issue("node", &["127.0.0.1", "localhost", "spiffe://im/node"]);
    let mut cluster = Vec::new();
    for _ in 0..2 {
        let mut all = db.settings(&[]);
        all.extend(mutual_tls(&pair, &ca));
        cluster.push(Node::start(all).await);
    }
    let gateway = ca.issue("gw-1", &["spiffe://im/gateway/gw-1"]);
    let shown = shows(&ca, Some(&gateway), None);
    let attached = TestGateway::showing(&shown, vec![cluster[0].data.to_string()], GATEWAY, Devices::Acknowledge).await;
    attached.bind(ALICE, PHONE, "c").await;
    let service = shows(&ca, Some(&ca.issue("service", &["spiffe://im/service"])), None);
    let mut through_the_other = PresenceServiceClient::new(link(&service, cluster[1].data));
    let message = pb::DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
    eventually("the other node hands it over", Duration::from_secs(10), async || {
        let told = through_the_other.deliver(message.clone()).await;
        told.is_ok_and(|answer| code(&answer.get_ref().result) == Code::Ok)
    })
    .await;
    attached.hears(1).await; // it was handed to the stream, and may not have been read yet
    assert_eq!(attached.texts()[0], "hello");
    for who in [&shown, &service] {
        let mut nodes = NodeServiceClient::new(link(who, cluster[0].data));
        let denied = nodes.forward(pb::ForwardReq::default()).await.expect_err("no node");
        assert_eq!(denied.code(), tonic::Code::PermissionDenied);
        let denied = nodes.forward_acks(pb::ForwardAcksReq::default()).await.expect_err("no node");
        assert_eq!(denied.code(), tonic::Code::PermissionDenied);
    }
    let log = cluster[0].log().join("\n");
    assert!(!log.contains("nobody answers"), "it reaches itself: {log}");
}

#[tokio::test]
async fn nodes_may_prove_it_by_a_token() {
    let (pki, db) = (Pki::new(), TestDb::mariadb(MariaDb::shared()).await);
    let (node, node_entry) = token("nodes", "node", "");
    let (any, any_entry) = token("any", "gateway", "gateways = [\"*\"]");
    let tokens = pki.write("tokens.toml", &[node_entry, any_entry].concat());
    let (node, any) = (pki.write("node", &node), pki.write("any", &any));
    let more = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", text(&tokens)), ("PEER__TOKEN_FILE", text(&node))];
    let cluster = [Node::start(db.settings(&more)).await, Node::start(db.settings(&more)).await];
    let gateway = TestGateway::showing(&bears(&any), vec![cluster[0].data.to_string()], GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let mut other = PresenceServiceClient::new(link(&bears(&any), cluster[1].data));
    let message = pb::DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
    eventually("the other node hands it over", Duration::from_secs(10), async || {
        let told = other.deliver(message.clone()).await;
        told.is_ok_and(|answer| code(&answer.get_ref().result) == Code::Ok)
    })
    .await;
}

/// Both kinds of connections on one port, then the nodes among each other, then TLS alone.
#[tokio::test]
async fn a_running_system_moves_to_tls_node_by_node_and_nobody_is_offline() {
    let (pki, mut cluster) = (Pki::new(), Cluster::mariadb(2, &[("GATEWAY__LEASE", "15000")]).await);
    let ca = pki.ca("ca");
    let pair = ca.issue("node", &HERE);
    let ca_file = ca.file.clone();
    let nodes: Vec<String> = cluster.nodes.iter().map(|node| node.data.to_string()).collect();
    let gateway = TestGateway::at(nodes.clone(), GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let both = [
        ("TLS__CERT_FILE", text(&pair.cert)),
        ("TLS__KEY_FILE", text(&pair.key)),
        ("TLS__ACCEPT_PLAIN", "true"),
        ("PEER__CA_FILE", text(&ca_file)),
        ("PEER__PLAIN", "true"),
    ];
    let secure = shows(&ca, None, None);
    for (step, more) in [&both[..], &[("PEER__PLAIN", "false")], &[("TLS__ACCEPT_PLAIN", "false")]].into_iter().enumerate() {
        let moved = match step {
            1 => Some(TestGateway::showing(&secure, nodes.clone(), OTHER_GATEWAY, Devices::Acknowledge).await),
            _ => None,
        };
        for n in 0..2 {
            cluster.nodes[n].restart_with(more).await;
            let security = if step == 2 || n == 0 { &secure } else { &Security::default() };
            eventually("alice is online", Duration::from_secs(5), async || {
                asks(&cluster.nodes[n], security).await.is_ok_and(|answer| answer.is_online)
            })
            .await;
        }
        drop(moved);
    }
    asks(&cluster.nodes[0], &Security::default()).await.expect_err("plaintext is over");
    let epochs = gateway.epochs();
    assert!(epochs.iter().all(|epoch| *epoch == epochs[0]), "one life through all of it: {epochs:?}");
    assert!(cluster.nodes[0].metric("im_presence_connections{tls=\"yes\"}").await > 0.0);
    assert_eq!(cluster.nodes[0].metric("im_presence_connections{tls=\"no\"}").await, 0.0);
}

#[tokio::test]
async fn a_crowd_that_never_finishes_its_handshake_keeps_nobody_out() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let mut all = db.settings(&[("PRESENCE_SERVICE__MAX_CONNECTIONS", "4"), ("TLS__HANDSHAKE_TIMEOUT", "2000")]);
    all.extend(tls(&ca.issue("node", &HERE)));
    let node = Node::start(all).await;
    let hello_of_1000_bytes = [0x16, 3, 1, 3, 0xe8];
    let crowd: Vec<TcpStream> = (0..300)
        .map(|n| {
            let mut stream = TcpStream::connect(node.data).expect("connect");
            let begun: &[u8] = if n % 2 == 0 { &hello_of_1000_bytes } else { b"\x16\x03\x01\x00\x05garbage" };
            let _ = stream.write_all(begun); // it may have been closed already
            stream
        })
        .collect();
    let began = Instant::now();
    for _ in 0..8 {
        asks(&node, &shows(&ca, None, None)).await.expect("whoever finishes is let in");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(crowd);
    assert!(node.metric("im_presence_handshakes_total{result=\"failed\"}").await > 0.0);
}

#[tokio::test]
async fn whoever_says_nothing_after_its_handshake_holds_no_slot() {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let mut all = db.settings(&[("PRESENCE_SERVICE__MAX_CONNECTIONS", "4"), ("TLS__HANDSHAKE_TIMEOUT", "2000")]);
    all.extend(tls(&ca.issue("node", &HERE)));
    let node = Node::start(all).await;
    let (security, mut silent) = (shows(&ca, None, None), Vec::new());
    for _ in 0..10 {
        silent.push(security.connect_tls(&node.data.to_string(), b"h2").await.expect("a handshake"));
    }
    asks(&node, &security).await.expect("there is a slot");
}

/// As long as a certificate can have it, and longer than a row has room for.
#[tokio::test]
async fn a_long_name_in_a_certificate_does_not_stop_the_audit() {
    let (pki, db) = (Pki::new(), TestDb::mariadb(MariaDb::shared()).await);
    let ca = pki.ca("ca");
    let mut all = db.settings(&[]);
    let pair = ca.issue("node", &["127.0.0.1", "spiffe://im/node"]);
    all.extend(mutual_tls(&pair, &ca));
    let long = format!("spiffe://im/{}", "x".repeat(400));
    let rules = format!("[{{ san = \"{long}\", role = \"viewer\" }}, {{ san = \"spiffe://im/service\", role = \"service\" }}]");
    all.extend(settings(&[("AUTH__MTLS", &rules)]));
    let node = Node::start(all).await;
    let service = ca.issue("service", &["spiffe://im/service"]);
    for pair in [ca.issue("long", &[&long]), service] {
        let mut presence = PresenceServiceClient::new(link(&shows(&ca, Some(&pair), None), node.data));
        presence.bind_route(a_bind(ALICE, PHONE, "c")).await.expect_err("neither binds");
    }
    eventually("both rows are there", Duration::from_secs(5), async || {
        db.number("SELECT COUNT(*) FROM audit WHERE outcome = 'denied' AND CHAR_LENGTH(who) <= 255").await == 2
    })
    .await;
}
