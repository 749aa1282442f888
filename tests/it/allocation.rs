//! Where clients are sent: only to gateways that take them, paced, and the same on every node.

use std::collections::BTreeSet;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::caller::Caller;
use im_presence::client::gateway;
use im_presence::client::gateway::Options;
use im_presence::pb;
use im_presence::pb::AllocateGatewayReq;
use im_presence::pb::AllocateGatewayResp;
use im_presence::pb::Code;
use im_presence::pb::HoldGatewaysReq;
use im_presence::pb::RegisterGatewayReq;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tonic::service::Routes;
use tonic::transport::Server;

use crate::bad_input::check;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Proxy;

/// Late after three seconds, dead after five.
const SHORT_LEASE: [(&str, &str); 2] = [("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "5000")];
const BEAT: Duration = Duration::from_millis(300);
/// Each node reads the table of lives once a second.
const KNOWN_WITHIN: Duration = Duration::from_secs(3);
const LATE_WITHIN: Duration = Duration::from_secs(6);
const DEAD_WITHIN: Duration = Duration::from_secs(10);

impl Node {
    async fn try_allocate(&self, request: AllocateGatewayReq) -> Result<AllocateGatewayResp, Status> {
        self.presence().allocate_gateway(request).await.map(tonic::Response::into_inner)
    }

    async fn allocate(&self, request: AllocateGatewayReq) -> AllocateGatewayResp {
        self.try_allocate(request).await.expect("an allocation")
    }

    /// Everybody to whom one of a hundred users may be sent.
    async fn takers(&self, wishes: &AllocateGatewayReq) -> BTreeSet<String> {
        let mut takers = BTreeSet::new();
        for user_id in 1..=100 {
            takers.extend(addresses(&self.allocate(AllocateGatewayReq { user_id, ..wishes.clone() }).await));
        }
        takers
    }

    async fn enter(&self, request: RegisterGatewayReq) -> u64 {
        let answer = self.gateways().register_gateway(request).await.expect("a registration").into_inner();
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer.gateway_epoch
    }

    /// One that goes on beating.
    async fn keep(&self, request: RegisterGatewayReq) -> Gateway {
        let addr = request.gateway_addr.clone();
        Gateway::go_on(&addr, self.enter(request).await, &[self], BEAT)
    }

    async fn nodes(&self) -> Vec<pb::Node> {
        let answer = self.presence().list_nodes(pb::ListNodesReq {}).await.expect("the nodes").into_inner();
        assert_eq!(code(&answer.result), Code::Ok);
        answer.nodes
    }
}

fn someone() -> AllocateGatewayReq {
    AllocateGatewayReq { user_id: ALICE, ..Default::default() }
}

fn a_gateway(addr: &str) -> RegisterGatewayReq {
    RegisterGatewayReq { gateway_addr: addr.to_owned(), capacity: 1_000_000, ..Default::default() }
}

fn addresses(answer: &AllocateGatewayResp) -> Vec<String> {
    answer.candidates.iter().map(|one| one.gateway_addr.clone()).collect()
}

#[tokio::test]
async fn no_node_sends_a_client_to_a_gateway_that_is_dead_late_draining_full_excluded_or_takes_nobody() {
    let cluster = Cluster::mariadb(2, &SHORT_LEASE).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    // Whoever falls silent stays late.
    let hold = HoldGatewaysReq { for_ms: 600_000, reason: "a test".to_owned() };
    node.operator().hold_gateways(hold).await.expect("a hold");
    let _good = node.keep(RegisterGatewayReq { public_addr: "wss://good".to_owned(), ..a_gateway("gw-good:1") }).await;
    let _full = node.keep(RegisterGatewayReq { capacity: 1, ..a_gateway("gw-full:1") }).await;
    let _closed = node.keep(RegisterGatewayReq { weight: Some(0), ..a_gateway("gw-closed:1") }).await;
    let _excluded = node.keep(a_gateway("gw-excluded:1")).await;
    let _public = node.keep(RegisterGatewayReq { public_addr: "wss://two".to_owned(), ..a_gateway("gw-two:1") }).await;
    let draining = node.keep(a_gateway("gw-draining:1")).await;
    cluster.db.run(&format!("UPDATE lives SET draining = 1 WHERE epoch = {}", draining.epoch)).await;
    node.enter(a_gateway("gw-late:1")).await;
    let dead = node.enter(a_gateway("gw-dead:1")).await;
    assert_eq!(node.deregister("gw-dead:1", dead).await, Code::Ok);
    node.bind(a_bind(ALICE, PHONE, "c")).await; // on a gateway that never registered

    let exclude = vec!["gw-excluded:1".to_owned(), "wss://two".to_owned()];
    let wishes = AllocateGatewayReq { count: 10, exclude, ..Default::default() };
    for node in [node, other] {
        let good = BTreeSet::from(["gw-good:1".to_owned()]);
        eventually("only one is left", LATE_WITHIN, async || node.takers(&wishes).await == good).await;
        assert_eq!(node.takers(&wishes).await, good);
        let answer = node.allocate(AllocateGatewayReq { count: 1, exclude: wishes.exclude.clone(), ..someone() }).await;
        let [candidate] = &answer.candidates[..] else { panic!("{answer:?}") };
        assert_eq!((&*candidate.public_addr, &*candidate.why, &*answer.algorithm), ("wss://good", "anywhere", "two_choices"));
    }
    // Without any that is on time those that are late are better than none.
    let exclude = [&wishes.exclude[..], &["gw-good:1".to_owned()]].concat();
    let answer = other.allocate(AllocateGatewayReq { exclude, ..someone() }).await;
    assert_eq!((addresses(&answer), &*answer.candidates[0].why), (vec!["gw-late:1".to_owned()], "late"));
}

#[tokio::test]
async fn a_client_whose_gateway_has_just_died_is_sent_to_another_at_once_and_later_without_asking_for_it() {
    let cluster = Cluster::mariadb(2, &[&SHORT_LEASE[..], &[("GATEWAY__DOUBT_SHARE", "1")]].concat()).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let one = node.keep(a_gateway(GATEWAY)).await;
    let _other = node.keep(a_gateway(OTHER_GATEWAY)).await;
    let both = async || other.allocate(someone()).await.candidates.len() == 2;
    eventually("both are known", KNOWN_WITHIN, both).await;
    one.falls_silent();
    let answer = other.allocate(AllocateGatewayReq { exclude: vec![GATEWAY.to_owned()], ..someone() }).await;
    assert_eq!(addresses(&answer), [OTHER_GATEWAY]);
    let gone = async || other.takers(&someone()).await == BTreeSet::from([OTHER_GATEWAY.to_owned()]);
    eventually("nobody is sent to the dead one", DEAD_WITHIN, gone).await;
}

#[tokio::test]
async fn a_node_that_has_lost_its_database_goes_on_and_says_that_the_gateways_are_late() {
    let server = MariaDb::shared();
    let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
    let node = Node::start(db.settings_through(&proxy, &SHORT_LEASE)).await;
    node.enter(a_gateway(GATEWAY)).await;
    eventually("it is known", KNOWN_WITHIN, async || node.allocate(someone()).await.candidates.len() == 1).await;
    assert_eq!(node.allocate(someone()).await.candidates[0].why, "anywhere");
    proxy.cut_off();
    let late = async || node.allocate(someone()).await.candidates.first().is_some_and(|one| one.why == "late");
    eventually("it is late", LATE_WITHIN, late).await;
    // Its lease has been over for long when this ends.
    let began = Instant::now();
    while began.elapsed() < DEAD_WITHIN {
        let answer = node.allocate(someone()).await;
        assert_eq!((code(&answer.result), addresses(&answer)), (Code::Ok, vec![GATEWAY.to_owned()]), "{answer:?}");
        tokio::time::sleep(BEAT).await;
    }
    let counted = node.series("im_presence_allocations_total").await;
    assert!(counted.iter().any(|(labels, _)| labels.contains("result=\"late\"")), "{counted:?}");
}

#[tokio::test]
async fn if_nobody_takes_users_the_answer_says_so_and_when_to_ask_again() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let refused = async || {
        let answer = node.allocate(someone()).await;
        assert!((2_500..=7_500).contains(&answer.retry_after_ms) || code(&answer.result) == Code::Ok, "{answer:?}");
        code(&answer.result) == Code::NotFound && answer.candidates.is_empty()
    };
    assert!(refused().await, "there is none");
    let (status, text) = node.ctl(&["allocate", "1"]);
    assert_eq!(status, 3, "{text}");
    let _closed = node.keep(RegisterGatewayReq { weight: Some(0), ..a_gateway(GATEWAY) }).await;
    let _full = node.keep(RegisterGatewayReq { capacity: 1, ..a_gateway(OTHER_GATEWAY) }).await;
    eventually("one is closed, the other full", KNOWN_WITHIN, refused).await;
    let labels = [("version".to_owned(), "2".to_owned())].into();
    let answer = node.allocate(AllocateGatewayReq { labels, ..someone() }).await;
    assert_eq!(code(&answer.result), Code::NotFound, "{answer:?}");
}

#[tokio::test]
async fn log_ins_are_paced_over_all_nodes_by_the_rate_that_a_gateway_likes() {
    const LOG_INS: i64 = 10;
    let cluster = Cluster::mariadb(2, &[]).await;
    let node = cluster.node();
    let _gateway = node.keep(RegisterGatewayReq { login_rate: 4, ..a_gateway(GATEWAY) }).await;
    eventually("the nodes know each other", KNOWN_WITHIN, async || node.nodes().await.len() == 2).await;
    let known = async |node: &Node| !node.allocate(someone()).await.candidates.is_empty();
    eventually("it is known", KNOWN_WITHIN, async || known(node).await).await;
    let (began, mut waits) = (Instant::now(), Vec::new());
    for user_id in 1..=LOG_INS {
        let answer = node.allocate(AllocateGatewayReq { user_id, ..Default::default() }).await;
        waits.push(Duration::from_millis(answer.retry_after_ms.into()));
    }
    // Two a second through this node, at most; the one before them has its half second, too.
    let took = began.elapsed();
    let last = *waits.last().expect("a wait");
    let turns = Duration::from_millis(500) * (LOG_INS as u32 - 1);
    assert!(last + took + Duration::from_millis(2) >= turns, "{waits:?} in {took:?}");
    assert!(last <= turns + Duration::from_secs(1), "{waits:?}");
    assert!(node.metric("im_presence_allocation_wait_seconds_count").await >= LOG_INS as f64);
}

#[tokio::test]
async fn an_experiment_has_the_same_users_on_both_nodes_and_after_a_restart() {
    let experiments = "[{ name = \"canary\", share = 0.3, algorithm = \"rendezvous\", labels = { version = \"2\" } }]";
    let mut cluster = Cluster::mariadb(2, &[("ALLOCATION__EXPERIMENTS", experiments)]).await;
    let labels = [("version".to_owned(), "2".to_owned())];
    let new = RegisterGatewayReq { labels: labels.clone().into(), ..a_gateway("gw-new:1") };
    let _new = cluster.node().keep(new).await;
    let _old = cluster.node().keep(a_gateway("gw-old:1")).await;
    let canaries = async |node: &Node| {
        let mut canaries = BTreeSet::new();
        for user_id in 1..=200 {
            let answer = node.allocate(AllocateGatewayReq { user_id, ..Default::default() }).await;
            match &*answer.experiment {
                "canary" => {
                    assert_eq!((&*answer.algorithm, addresses(&answer)), ("rendezvous", vec!["gw-new:1".to_owned()]));
                    canaries.insert(user_id);
                }
                none => assert_eq!((none, &*answer.algorithm), ("", "two_choices")),
            }
        }
        canaries
    };
    for node in &cluster.nodes {
        eventually("both are known", KNOWN_WITHIN, async || node.takers(&someone()).await.len() == 2).await;
    }
    let first = canaries(&cluster.nodes[0]).await;
    assert!((30..=90).contains(&first.len()), "{first:?}");
    assert_eq!(canaries(&cluster.nodes[1]).await, first);
    cluster.nodes[0].restart_with(&[]).await;
    eventually("both are known", KNOWN_WITHIN, async || cluster.nodes[0].takers(&someone()).await.len() == 2).await;
    assert_eq!(canaries(&cluster.nodes[0]).await, first);
}

#[tokio::test]
async fn each_nonsense_in_a_question_and_in_a_registration_is_refused_by_name() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let names = |count: usize| (0..count).map(|n| format!("n-{n}"));
    let text = |bytes: usize| "x".repeat(bytes);
    let label = |name: String, value: String| [(name, value)].into();
    for (request, field, limit) in [
        (AllocateGatewayReq { user_id: 0, ..someone() }, "user_id", "above 0"),
        (AllocateGatewayReq { region: text(129), ..someone() }, "region", "128"),
        (AllocateGatewayReq { latency_ms: names(65).map(|name| (name, 1)).collect(), ..someone() }, "latency_ms", "64"),
        (AllocateGatewayReq { latency_ms: [(text(129), 1)].into(), ..someone() }, "latency_ms", "128"),
        (AllocateGatewayReq { count: 11, ..someone() }, "count", "10"),
        (AllocateGatewayReq { exclude: names(65).collect(), ..someone() }, "exclude", "64"),
        (AllocateGatewayReq { exclude: vec![text(256)], ..someone() }, "exclude", "255"),
        (AllocateGatewayReq { labels: names(65).map(|name| (name, text(1))).collect(), ..someone() }, "labels", "64"),
        (AllocateGatewayReq { labels: label(text(64), text(1)), ..someone() }, "labels", "63"),
        (AllocateGatewayReq { labels: label(text(1), text(256)), ..someone() }, "labels", "255"),
        (AllocateGatewayReq { platform: 9, ..someone() }, "platform", "0 to 8"),
    ] {
        check(&format!("{request:.200?}"), node.try_allocate(request).await, field, limit);
    }
    for (request, field, limit) in [
        (RegisterGatewayReq { weight: Some(1_001), ..a_gateway(GATEWAY) }, "weight", "1000"),
        (RegisterGatewayReq { public_addr: "a b".to_owned(), ..a_gateway(GATEWAY) }, "public_addr", "without spaces"),
        (RegisterGatewayReq { public_addr: text(256), ..a_gateway(GATEWAY) }, "public_addr", "255"),
    ] {
        check(&format!("{request:.200?}"), node.gateways().register_gateway(request).await, field, limit);
    }
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives").await, 0);
    let widest = AllocateGatewayReq {
        latency_ms: names(64).map(|name| (name, u32::MAX)).collect(),
        exclude: names(64).collect(),
        labels: names(64).map(|name| (name, String::new())).collect(),
        count: 10,
        ..someone()
    };
    assert_eq!(code(&node.allocate(widest).await.result), Code::NotFound);
    let answer = RegisterGatewayReq { weight: Some(1_000), login_rate: u32::MAX, ..a_gateway(GATEWAY) };
    node.enter(answer).await;
}

#[tokio::test]
async fn the_nodes_and_their_zones_are_listed_and_one_that_stops_says_so() {
    let server = MariaDb::shared();
    let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
    let named = |name, zone| [("PRESENCE_SERVICE__NODE_ID", name), ("NODE__ZONE", zone)];
    let node = Node::start(db.settings(&named("n-1", "a"))).await;
    let mut other = Node::start(db.settings_through(&proxy, &named("n-2", "b"))).await;
    let listed = async || {
        let nodes = node.nodes().await;
        nodes.into_iter().map(|node| (node.node_id, node.addr, node.zone, node.draining)).collect::<BTreeSet<_>>()
    };
    let row = |id: &str, node: &Node, zone: &str, draining| (id.to_owned(), node.data.to_string(), zone.to_owned(), draining);
    let both = BTreeSet::from([row("n-1", &node, "a", false), row("n-2", &other, "b", false)]);
    eventually("both are there", KNOWN_WITHIN, async || listed().await == both).await;
    let (status, text) = node.ctl(&["nodes"]);
    assert!(status == 0 && text.contains("2 nodes") && text.contains("n-2"), "{text}");
    let (status, text) = node.ctl(&["nodes", "--json"]);
    assert!(status == 0 && text.contains("\"zone\":\"b\""), "{text}");
    // A call that cannot end keeps it for a while.
    proxy.hold_commit();
    let mut presence = other.presence();
    let waits = tokio::spawn(async move { presence.bind_route(a_bind(ALICE, PHONE, "c")).await });
    proxy.struck().await;
    other.terminate();
    let stopping = BTreeSet::from([row("n-1", &node, "a", false), row("n-2", &other, "b", true)]);
    eventually("it says that it stops", KNOWN_WITHIN, async || listed().await == stopping).await;
    assert!(other.ended().await.success());
    eventually("it is gone", KNOWN_WITHIN + KNOWN_WITHIN, async || listed().await.len() == 1).await;
    waits.abort();
}

#[tokio::test]
async fn a_shell_is_told_where_a_user_should_go() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let eu = RegisterGatewayReq { region: "eu".to_owned(), public_addr: "wss://eu".to_owned(), ..a_gateway(GATEWAY) };
    node.enter(eu).await;
    node.enter(RegisterGatewayReq { region: "us".to_owned(), ..a_gateway(OTHER_GATEWAY) }).await;
    let told = |words: &[&str]| node.ctl(&[&["allocate", "42"], words].concat());
    eventually("both are known", KNOWN_WITHIN, async || told(&[]).1.lines().count() == 4).await;
    let (status, text) = told(&["--region", "eu", "--count", "1"]);
    assert!(status == 0 && text.starts_with("user 42 should connect to wss://eu"), "{text}");
    let (status, text) = told(&["--latency", "eu=90", "--latency", "us=10", "--json", "--count", "1"]);
    assert!(status == 0 && text.contains(OTHER_GATEWAY) && !text.contains("wss://eu"), "{text}");
    assert_eq!(told(&["--exclude", "wss://eu", "--label", "version=2"]).0, 3);
    assert_eq!(told(&["--latency", "eu"]).0, 2);
}

#[tokio::test]
async fn the_client_library_asks_one_node_about_a_user_as_long_as_it_answers() {
    let mut cluster = Cluster::mariadb(2, &[]).await;
    let addresses: Vec<String> = cluster.nodes.iter().map(|node| node.data.to_string()).collect();
    let nodes: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let caller = Caller::new(&nodes, Duration::from_secs(10)).expect("addresses");
    let home = addresses.iter().position(|addr| addr == caller.home_of(ALICE)).expect("one of them");
    let _gateway = cluster.nodes[1 - home].keep(a_gateway(GATEWAY)).await;
    for _ in 0..20 {
        caller.query(pb::QueryRouteReq { user_id: ALICE, max_staleness_ms: None }).await.expect("a query");
    }
    assert_eq!(cluster.nodes[home].metric("im_presence_queries_total").await, 20.0);
    assert_eq!(cluster.nodes[1 - home].metric("im_presence_queries_total").await, 0.0);
    let spread: BTreeSet<&str> = (1..=100).map(|user| caller.home_of(user)).collect();
    assert_eq!(spread.len(), 2, "users have different homes");
    cluster.nodes[home].kill();
    caller.query(pb::QueryRouteReq { user_id: ALICE, max_staleness_ms: None }).await.expect("the other answers");
    let answer = caller.allocate(someone()).await.expect("an allocation");
    assert_eq!(addresses_of(&answer), [GATEWAY]);
    assert!(!caller.nodes().await.expect("the nodes").nodes.is_empty());
}

#[tokio::test]
async fn a_node_that_does_not_know_a_call_is_passed_over() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let _gateway = node.keep(a_gateway(GATEWAY)).await;
    eventually("it is known", KNOWN_WITHIN, async || !node.allocate(someone()).await.candidates.is_empty()).await;
    // Of a release before these calls, as far as a caller can see.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let (old, new) = (listener.local_addr().expect("its address").to_string(), node.data.to_string());
    let server = Server::builder().add_routes(Routes::default()).serve_with_incoming(TcpListenerStream::new(listener));
    let _server = AbortOnDropHandle::new(tokio::spawn(server));
    let caller = Caller::new(&[&old, &new], Duration::from_secs(10)).expect("addresses");
    for user_id in 1..=20 {
        let answer = caller.allocate(AllocateGatewayReq { user_id, ..Default::default() }).await.expect("an allocation");
        assert_eq!(addresses_of(&answer), [GATEWAY], "of {}", caller.home_of(user_id));
        assert_eq!(caller.nodes().await.expect("the nodes").nodes.len(), 1);
    }
    assert!((1..=20).any(|user_id| caller.home_of(user_id) == old), "some ask the old one first");
    let alone = Caller::new(&[&old], Duration::from_secs(10)).expect("an address");
    assert_eq!(alone.nodes().await.expect_err("nobody knows it").code(), tonic::Code::Unimplemented);
}

#[tokio::test]
async fn a_gateway_with_the_client_library_says_what_it_takes() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let start = |addr: &str, public_addr: &str, label: &str, weight, login_rate| {
        let labels = [("public_addr".to_owned(), label.to_owned())].into();
        let (nodes, gateway_addr, public_addr) = (vec![node.data.to_string()], addr.to_owned(), public_addr.to_owned());
        let options =
            Options { nodes, gateway_addr, capacity: 1_000, weight, public_addr, login_rate, labels, ..Options::default() };
        gateway::Gateway::start(options, |_| {}).expect("addresses")
    };
    let _one = start(GATEWAY, "wss://one", "wss://label", Some(300), 7);
    let _other = start(OTHER_GATEWAY, "", "wss://other", None, 0);
    let _closed = start("gw-closed:1", "", "", Some(0), 0);
    let told = async || {
        let candidates = node.allocate(someone()).await.candidates.into_iter();
        candidates.map(|one| (one.gateway_addr, one.public_addr)).collect::<BTreeSet<_>>()
    };
    let both = [(GATEWAY, "wss://one"), (OTHER_GATEWAY, "wss://other")];
    let both = BTreeSet::from(both.map(|(addr, public)| (addr.to_owned(), public.to_owned())));
    eventually("both take users", KNOWN_WITHIN, async || told().await == both).await;
    let lives = node.list_gateways(false).await.lives;
    let said: BTreeSet<_> = lives.iter().map(|life| (&*life.gateway_addr, life.weight, life.login_rate)).collect();
    assert_eq!(said, BTreeSet::from([(GATEWAY, 300, 7), (OTHER_GATEWAY, 100, 0), ("gw-closed:1", 0, 0)]));
}

fn addresses_of(answer: &AllocateGatewayResp) -> Vec<&str> {
    answer.candidates.iter().map(|one| one.gateway_addr.as_str()).collect()
}
