//! Gateways hold leases: registering, beating, binding, and what a life that is over may still do.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::Code;
use im_presence::pb::HeartbeatReq;
use im_presence::pb::RegisterGatewayReq;
use im_presence::pb::RouteState;
use im_presence::pb::UnbindRouteReq;
use tokio::time::timeout;
use tonic::Code as Grpc;

use crate::bad_input::check;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::each_engine;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::gateway::a_beat;
use crate::harness::gateway::on;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;

const LEASE: Duration = Duration::from_secs(2);
const BEAT: Duration = Duration::from_millis(500);
const SHORT_LEASE: &[(&str, &str)] =
    &[("GATEWAY__HEARTBEAT_INTERVAL", "500"), ("GATEWAY__LEASE", "2000"), ("GATEWAY__STREAM_GRACE", "1000")];
/// After the end of its lease a gateway's users are offline everywhere.
const DEAD_WITHIN: Duration = Duration::from_millis(1_500);
/// What only the reading of the whole table of lives says.
const TABLE: &str = "swept_at = 0 OR ended_at";

/// A node whose table of lives stands still while its proxy holds what the database says of it, and one that is told all.
/// There is no bus: nothing but its own transactions tells the first one anything.
struct Behind {
    proxy: Proxy,
    behind: Node,
    other: Node,
    _db: TestDb,
}

impl Behind {
    async fn start() -> Self {
        let server = MariaDb::shared();
        let (db, proxy) = (TestDb::mariadb(server).await, Proxy::start(server.port).await);
        let behind = Node::start(db.settings_through(&proxy, &[])).await;
        let other = Node::start(db.settings(&[])).await;
        Self { proxy, behind, other, _db: db }
    }

    async fn stand_still(&self) {
        self.proxy.hold_answers(Kind::Lane, TABLE);
        self.proxy.struck().await;
    }
}

/// The unbind of a client that has left this gateway.
fn an_unbind(user: i64, addr: &str, epoch: u64) -> UnbindRouteReq {
    let (gateway_addr, device_id, conn_id) = (addr.to_owned(), PHONE.to_owned(), format!("c-{user}"));
    UnbindRouteReq { user_id: user, gateway_addr, device_id, conn_id, gateway_epoch: epoch, ..Default::default() }
}

/// Whatever a former life says late, through this node, it is told that another process has its address, and `user`, who is
/// on the life that came after it, stays there.
async fn is_fenced(node: &Node, user: i64, former: u64, current: u64) {
    let late = on(GATEWAY, former, a_bind(user, PHONE, &format!("c-{user}")));
    let bound = node.try_bind(late).await.expect("an answer");
    assert_eq!(code(&bound.result), Code::Superseded, "{bound:?}");
    let mut presence = node.presence();
    let unbound = presence.unbind_route(an_unbind(user, GATEWAY, former)).await.expect("an answer").into_inner();
    assert_eq!((code(&unbound.result), unbound.unbound), (Code::Superseded, false), "{unbound:?}");
    assert_eq!(node.beat(GATEWAY, former).await, Code::Superseded);
    assert_eq!(code(&node.try_register(GATEWAY, former).await.expect("an answer").result), Code::Superseded);
    assert_eq!(node.deregister(GATEWAY, former).await, Code::Superseded);
    let answer = node.query_sql(user).await;
    assert!(answer.is_online && answer.routes.len() == 1, "{answer:?}");
    assert_eq!(answer.routes[0].gateway_epoch, current, "{answer:?}");
}

#[tokio::test]
async fn a_gateway_registers_beats_goes_on_and_deregisters_and_its_users_are_offline_at_once() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let registered = node.try_register(GATEWAY, 0).await.expect("a registration");
        let epoch = registered.gateway_epoch;
        assert_eq!((registered.heartbeat_interval_ms, registered.lease_ms), (5_000, 15_000));
        let bound = node.bind(on(GATEWAY, epoch, a_bind(ALICE, PHONE, "c"))).await;
        assert_eq!(bound.gateway_epoch, epoch);
        let without = node.bind(a_bind(BOB, PHONE, "c")).await;
        assert_eq!(without.gateway_epoch, epoch, "a bind without an epoch belongs to the life that the gateway has");
        let beaten = node.try_beat(GATEWAY, epoch).await.expect("a heartbeat");
        assert_eq!((code(&beaten.result), beaten.draining), (Code::Ok, false));
        assert!(beaten.lease_ms > 14_000 && beaten.lease_ms <= 15_000, "{beaten:?}");
        let going_on = node.try_register(GATEWAY, epoch).await.expect("an answer");
        assert_eq!((code(&going_on.result), going_on.gateway_epoch), (Code::Ok, epoch));
        let answer = node.query(ALICE).await;
        assert_eq!((answer.is_online, answer.routes[0].state()), (true, RouteState::Live), "{answer:?}");

        assert_eq!(node.deregister(GATEWAY, epoch).await, Code::Ok);
        assert_eq!(node.online([ALICE, BOB]).await, 0, "offline with the answer");
        assert_eq!(node.beat(GATEWAY, epoch).await, Code::Fenced);
        assert_eq!(node.deregister(GATEWAY, epoch).await, Code::Fenced);
        let late = node.try_bind(on(GATEWAY, epoch, a_bind(ALICE, PHONE, "late"))).await.expect("an answer");
        assert_eq!(code(&late.result), Code::Fenced, "{late:?}");
        let again = node.register(GATEWAY).await;
        assert!(again > epoch, "epochs grow: {epoch}, {again}");
        node.bind(on(GATEWAY, again, a_bind(ALICE, PHONE, "c"))).await;
        assert_eq!(node.online([ALICE, BOB]).await, 1, "whoever is not bound again stays offline");
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_starts_again_has_lost_its_old_routes_keeps_new_ones_and_its_former_life_is_fenced_through_every_node() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let former = node.register(GATEWAY).await;
    node.bind_all([ALICE, BOB], GATEWAY, former).await;
    let old_key = node.query(ALICE).await.routes[0].route_key.clone();
    assert_eq!(other.online([ALICE, BOB]).await, 2);

    let current = other.register(GATEWAY).await;
    assert_eq!(other.online([ALICE, BOB]).await, 0, "gone at registration");
    eventually("gone on the other node", DEAD_WITHIN, async || node.online([ALICE, BOB]).await == 0).await;
    other.bind_all([ALICE], GATEWAY, current).await;
    for node in &cluster.nodes {
        is_fenced(node, ALICE, former, current).await;
        let request = UnbindRouteReq { user_id: ALICE, route_key: old_key.clone(), ..Default::default() };
        assert!(!node.unbind(request).await.unbound, "the old route's key names no other");
        eventually("only the new bind is left", DEAD_WITHIN, async || node.online([ALICE, BOB]).await == 1).await;
        assert_eq!(node.beat(GATEWAY, current).await, Code::Ok);
    }
}

#[tokio::test]
async fn a_former_life_is_fenced_also_through_a_node_that_has_not_heard_of_the_new_one() {
    const ADDRS: [&str; 3] = ["gw-1:7000", "gw-2:7000", "gw-3:7000"];
    let nodes = Behind::start().await;
    let (mut former, mut current) = (Vec::new(), Vec::new());
    for (user, addr) in (1..).zip(ADDRS) {
        former.push(nodes.behind.register(addr).await);
        nodes.behind.bind_all([user], addr, former[former.len() - 1]).await;
    }
    nodes.stand_still().await;
    for (user, addr) in (1..).zip(ADDRS) {
        current.push(nodes.other.register(addr).await);
        nodes.other.bind_all([user], addr, current[current.len() - 1]).await;
    }
    // Each of these is the first that the node hears of that gateway.
    let late = nodes.behind.try_bind(on(ADDRS[0], former[0], a_bind(1, PHONE, "c-1"))).await.expect("an answer");
    assert_eq!(code(&late.result), Code::Superseded, "{late:?}");
    let mut presence = nodes.behind.presence();
    let late = presence.unbind_route(an_unbind(2, ADDRS[1], former[1])).await.expect("an answer").into_inner();
    assert_eq!((code(&late.result), late.unbound), (Code::Superseded, false), "{late:?}");
    assert_eq!(nodes.behind.beat(ADDRS[2], former[2]).await, Code::Superseded);
    for node in [&nodes.behind, &nodes.other] {
        for (user, (addr, epoch)) in (1..).zip(ADDRS.into_iter().zip(&current)) {
            let answer = node.query_sql(user).await;
            assert_eq!((answer.is_online, &*answer.gateway_addr, answer.routes.len()), (true, addr, 1), "{answer:?}");
            assert_eq!(answer.routes[0].gateway_epoch, *epoch);
        }
    }
    assert_eq!(nodes.behind.online(1..=3).await, 3);
}

#[tokio::test]
async fn a_live_user_is_never_offline_on_a_node_that_has_not_heard_of_the_gateway() {
    let nodes = Behind::start().await;
    nodes.stand_still().await;
    for user in 1..=20 {
        let addr = format!("gw-{user}:7000");
        let epoch = nodes.other.register(&addr).await;
        nodes.other.bind_all([user], &addr, epoch).await;
        let (in_a_batch, claim) = (user % 2 == 0, if user % 4 < 2 { epoch } else { 0 });
        let online = if in_a_batch { nodes.behind.online([user]).await == 1 } else { nodes.behind.query(user).await.is_online };
        assert!(online, "user {user}, bound through the other node; in a batch: {in_a_batch}");
        let there = 1_000 + user;
        let bound = nodes.behind.bind(on(&addr, claim, a_bind(there, PHONE, "c"))).await;
        assert_eq!(bound.gateway_epoch, epoch, "with or without its epoch: the life that the gateway has");
        assert!(nodes.behind.query(there).await.is_online, "user {there}, bound through this node");
        assert!(nodes.other.query(there).await.is_online, "user {there}, bound through the node that is behind");
    }
}

#[tokio::test]
async fn of_two_processes_with_one_address_one_is_told_and_a_storm_of_registrations_is_refused() {
    const MAX_REGISTRATIONS: usize = 5;
    let cluster = Cluster::mariadb(2, SHORT_LEASE).await;
    let mut lives = Vec::new();
    let refused = loop {
        match cluster.nodes[lives.len() % 2].try_register(GATEWAY, 0).await {
            Ok(answer) => lives.push(answer.gateway_epoch),
            Err(status) => break status,
        }
        assert!(lives.len() <= 10 * MAX_REGISTRATIONS, "a storm is refused");
    };
    assert_eq!(refused.code(), Grpc::ResourceExhausted, "{refused:?}");
    assert_eq!(retry_delay(&refused), Some(LEASE));
    assert!(lives.len() >= MAX_REGISTRATIONS, "a process that crashes and starts again is served: {lives:?}");
    for node in &cluster.nodes {
        let (last, former) = lives.split_last().expect("lives");
        assert_eq!(node.beat(GATEWAY, *last).await, Code::Ok, "the refused one has ended nobody");
        assert_eq!(node.beat(GATEWAY, former[former.len() - 1]).await, Code::Superseded, "the other process is told to stop");
    }
    cluster.node().register(OTHER_GATEWAY).await; // others are not kept waiting
    eventually("a lease later it may register", 2 * LEASE, async || cluster.node().try_register(GATEWAY, 0).await.is_ok()).await;
}

#[tokio::test]
async fn a_registration_that_its_caller_has_given_up_is_not_made_later() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    // Somebody holds the row that issues epochs; the gateway loses patience and goes to the other node.
    let mut holder = cluster.db.connect().await;
    sqlx::raw_sql("BEGIN").execute(&mut holder).await.expect("begin");
    sqlx::raw_sql("UPDATE cluster SET generation = generation + 0 WHERE id = 1").execute(&mut holder).await.expect("a lock");
    let mut request = tonic::Request::new(RegisterGatewayReq { gateway_addr: GATEWAY.to_owned(), ..Default::default() });
    request.set_timeout(Duration::from_millis(300));
    node.gateways().register_gateway(request).await.expect_err("it waits for the row");
    sqlx::raw_sql("COMMIT").execute(&mut holder).await.expect("commit");
    let epoch = other.register(GATEWAY).await;
    other.bind_all([ALICE], GATEWAY, epoch).await;
    node.register(OTHER_GATEWAY).await; // behind the one that was given up
    for node in &cluster.nodes {
        assert_eq!(node.beat(GATEWAY, epoch).await, Code::Ok);
        assert_eq!(node.online([ALICE]).await, 1);
    }
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives").await, 2, "no life was begun for nobody");
}

#[tokio::test]
async fn a_node_that_has_not_been_beaten_through_for_long_takes_a_beat_at_once() {
    /// The server ends sessions that are idle for longer.
    const IDLE: Duration = Duration::from_secs(11);
    let cluster = Cluster::mariadb(2, &[]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let epoch = node.register(GATEWAY).await;
    assert_eq!(other.beat(GATEWAY, epoch).await, Code::Ok);
    tokio::time::sleep(IDLE).await; // what is tested is the time
    assert_eq!(other.beat(GATEWAY, epoch).await, Code::Ok);
    assert_eq!(node.beat(GATEWAY, epoch).await, Code::Ok);
}

#[tokio::test]
async fn other_services_see_a_gateway_live_by_its_key_for_its_lease_and_no_longer() {
    let cluster = Cluster::with_redis(2, SHORT_LEASE).await;
    let redis = cluster.cache().client().await;
    let key = format!("gateway:heartbeat:{GATEWAY}");
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[node], BEAT).await;
    let began = Instant::now();
    while began.elapsed() < 2 * LEASE {
        let left: i64 = redis.run(&["PTTL", &key]).await;
        assert!(left > 0 && left <= LEASE.as_millis() as i64, "{left}");
        assert_eq!(redis.get(&key).await, Some(gateway.epoch.to_string()));
        tokio::time::sleep(BEAT / 5).await;
    }
    gateway.falls_silent();
    eventually("the key is gone", LEASE + DEAD_WITHIN, async || !redis.has(&key).await).await;
    let dead = async || cluster.db.number("SELECT COUNT(*) FROM lives WHERE alive = 0").await == 1;
    eventually("it is dead", DEAD_WITHIN, dead).await;
    let again = other.register(GATEWAY).await;
    assert_eq!(redis.get(&key).await, Some(again.to_string()), "as soon as it is answered");
    other.deregister(GATEWAY, again).await;
    assert_eq!(redis.get(&key).await, None, "as soon as it is answered");
}

#[tokio::test]
async fn a_registered_gateways_users_outlive_route_ttl_and_those_of_one_that_never_registered_do_not() {
    let (ttl, patience) = if long() { (4, Duration::from_secs(15)) } else { (2, Duration::from_secs(5)) };
    let ttl_text = ttl.to_string();
    let cluster = Cluster::with_redis(2, &[SHORT_LEASE, &[("ROUTE__ROUTE_TTL", &*ttl_text)]].concat()).await;
    let redis = cluster.cache().client().await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[node], BEAT).await;
    node.bind_all([ALICE], GATEWAY, gateway.epoch).await;
    let began = Instant::now();
    node.bind(on("never:7000", 0, a_bind(BOB, PHONE, "c"))).await;
    assert_eq!(redis.ttl("user:route:1").await, -1, "for good");
    let left = redis.ttl("user:route:2").await;
    assert!(left > 0 && left <= ttl, "{left}");
    let ttl = Duration::from_secs(ttl.unsigned_abs());
    let gone = async || other.online([BOB]).await == 0 && node.online([BOB]).await == 0 && !redis.has("user:route:2").await;
    eventually("the unregistered gateway's user is offline", ttl + DEAD_WITHIN, gone).await;
    assert!(began.elapsed() >= ttl, "after {:?}", began.elapsed());
    while began.elapsed() < patience {
        assert_eq!(redis.get("user:route:1").await.as_deref(), Some(GATEWAY), "after {:?}", began.elapsed());
        assert_eq!((node.online([ALICE]).await, other.online([ALICE]).await), (1, 1));
        tokio::time::sleep(BEAT / 5).await;
    }
    gateway.falls_silent();
    eventually("the key goes with the gateway", LEASE + 2 * DEAD_WITHIN, async || !redis.has("user:route:1").await).await;
}

#[tokio::test]
async fn keys_of_a_registered_gateways_users_come_back_for_good_when_redis_has_lost_everything() {
    const BACK_WITHIN: Duration = Duration::from_secs(10);
    let cluster = Cluster::with_redis(2, &[]).await;
    let epoch = cluster.node().register(GATEWAY).await;
    cluster.node().bind_all(1..=100, GATEWAY, epoch).await;
    cluster.cache().kill();
    cluster.cache().restart();
    let redis = cluster.cache().client().await;
    eventually("all keys are back", BACK_WITHIN, async || redis.keys("user:route:*").await.len() == 100).await;
    for user in [1, 50, 100] {
        let key = format!("user:route:{user}");
        assert_eq!((redis.get(&key).await.as_deref(), redis.ttl(&key).await), (Some(GATEWAY), -1));
    }
    assert_eq!(cluster.nodes[1].deregister(GATEWAY, epoch).await, Code::Ok);
    eventually("and gone with the gateway", BACK_WITHIN, async || redis.keys("user:route:*").await.is_empty()).await;
}

#[tokio::test]
async fn nonsense_about_gateways_is_refused_and_names_what_is_wrong() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let epoch = node.register(GATEWAY).await;
    let text = |bytes: usize| "x".repeat(bytes);
    let labels = |n: usize, name: usize, value: usize| {
        (0..n).map(|i| (format!("{i:0name$}"), text(value))).collect::<std::collections::HashMap<_, _>>()
    };
    let good = || RegisterGatewayReq { gateway_addr: GATEWAY.to_owned(), ..Default::default() };
    for (request, field, limit) in [
        (RegisterGatewayReq { gateway_addr: String::new(), ..good() }, "gateway_addr", "1 to 255"),
        (RegisterGatewayReq { gateway_addr: text(256), ..good() }, "gateway_addr", "1 to 255"),
        (RegisterGatewayReq { gateway_addr: "gw 1".to_owned(), ..good() }, "gateway_addr", "printable ASCII without spaces"),
        (RegisterGatewayReq { gateway_addr: "gw\u{fc}:1".to_owned(), ..good() }, "gateway_addr", "printable ASCII"),
        (RegisterGatewayReq { region: text(129), ..good() }, "region", "128"),
        (RegisterGatewayReq { labels: labels(17, 2, 1), ..good() }, "labels", "16"),
        (RegisterGatewayReq { weight: Some(1_001), ..good() }, "weight", "1000"),
        (RegisterGatewayReq { public_addr: text(256), ..good() }, "public_addr", "255"),
        (RegisterGatewayReq { public_addr: "gw 1".to_owned(), ..good() }, "public_addr", "without spaces"),
        (RegisterGatewayReq { labels: labels(1, 64, 1), ..good() }, "labels", "63"),
        (RegisterGatewayReq { labels: labels(1, 1, 256), ..good() }, "labels", "255"),
    ] {
        check(&format!("{request:?}"), node.gateways().register_gateway(request).await, field, limit);
    }
    let beat = || a_beat(GATEWAY, epoch);
    for (request, field, limit) in [
        (HeartbeatReq { gateway_addr: String::new(), ..beat() }, "gateway_addr", "1 to 255"),
        (HeartbeatReq { gateway_epoch: 0, ..beat() }, "gateway_epoch", "is 0"),
        (HeartbeatReq { load: f32::NAN, ..beat() }, "load", "NaN"),
        (HeartbeatReq { load: f32::INFINITY, ..beat() }, "load", "inf"),
        (HeartbeatReq { load: -1.0, ..beat() }, "load", "from 0"),
    ] {
        check(&format!("{request:?}"), node.gateways().heartbeat(request).await, field, limit);
    }
    let deregister = im_presence::pb::DeregisterGatewayReq { gateway_addr: GATEWAY.to_owned(), gateway_epoch: 0 };
    check("deregister 0", node.gateways().deregister_gateway(deregister).await, "gateway_epoch", "is 0");
    // What is just within the limits is taken, and an epoch that nobody issued is over.
    let widest = RegisterGatewayReq {
        gateway_addr: text(255),
        region: text(128),
        capacity: u32::MAX,
        labels: labels(16, 63, 255),
        gateway_epoch: 0,
        weight: Some(1_000),
        public_addr: text(255),
        login_rate: u32::MAX,
    };
    let widest = node.gateways().register_gateway(widest).await.expect("within the limits").into_inner();
    let most = HeartbeatReq { connections: u32::MAX, load: f32::MAX, ..a_beat(&text(255), widest.gateway_epoch) };
    assert_eq!(code(&node.gateways().heartbeat(most).await.expect("a heartbeat").into_inner().result), Code::Ok);
    for unknown in [1, u64::MAX] {
        assert_eq!(node.beat("gw-9:7000", unknown).await, Code::Fenced);
        assert_eq!(node.beat(GATEWAY, unknown).await, Code::Superseded, "that address has another life");
        let bound = node.try_bind(on("gw-9:7000", unknown, a_bind(ALICE, PHONE, "c"))).await.expect("an answer");
        assert_eq!(code(&bound.result), Code::Fenced, "{bound:?}");
    }
    let foreign = node.try_bind(on("gw-9:7000", epoch, a_bind(ALICE, PHONE, "c"))).await.expect("an answer");
    assert_eq!(code(&foreign.result), Code::Fenced, "another gateway's epoch: {foreign:?}");
    assert_eq!(node.beat(GATEWAY, epoch).await, Code::Ok);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_registers_while_somebody_waits_for_a_list() {
    const LIST: &str = "ORDER BY gateway_addr, epoch DESC LIMIT";
    const AT_ONCE: Duration = Duration::from_secs(10);
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(&proxy, &[("STORE__TIMEOUT", "60000")]).await;
    let node = cluster.node();
    proxy.hold_answers(Kind::Reader, LIST);
    let registers = async {
        timeout(allowed(AT_ONCE), proxy.struck()).await.expect("the list is read by one who only reads");
        timeout(allowed(AT_ONCE), node.register(GATEWAY)).await.expect("it does not wait for the list");
        proxy.release();
    };
    let (listed, ()) = tokio::join!(node.list_gateways(false), registers);
    assert!(listed.lives.len() <= 1, "{listed:?}");
}
