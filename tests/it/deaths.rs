//! A gateway that dies takes its users offline at once, on every node, and touches nobody who has moved. One that lives is not
//! declared dead, whatever stands still.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::RouteState;
use tonic::Code as Grpc;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::gateway::GatewayProcess;
use crate::harness::gateway::a_beat;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::LAST_BEFORE_COMMIT;
use crate::harness::proxy::Proxy;

const LEASE: Duration = Duration::from_secs(2);
const BEAT: Duration = Duration::from_millis(500);
/// Short leases, and no doubt: with so short a lease a gateway is late all the time.
const SHORT_LEASE: &[(&str, &str)] = &[
    ("GATEWAY__HEARTBEAT_INTERVAL", "500"),
    ("GATEWAY__LEASE", "2000"),
    ("GATEWAY__STREAM_GRACE", "1000"),
    ("GATEWAY__DOUBT_SHARE", "1"),
];
/// After the end of its lease a gateway's users are offline on every node.
const DEAD_WITHIN: Duration = Duration::from_millis(1_500);
/// A log-in waits for nobody.
const AT_ONCE: Duration = Duration::from_millis(500);
/// When the node that sweeps dies, its claim ends after 10 s.
const SWEPT_BY_ANOTHER_WITHIN: Duration = Duration::from_secs(15);

/// How often a node looks whether there is something to sweep.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// How a node begins to look who lives.
const READ_CLUSTER: &str = "hold_reason, server FROM cluster";
// Steps of a death and of the sweep after it, as the node says them to the database.
const DECLARE: &str = "SET alive = 0, ended_at";
const COMMIT: &str = "COMMIT";
const SWEEP_PAGE: &str = "FORCE INDEX (routes_by_life)";
const LOCK_USERS: &str = "INTO users";

/// The same device's bind on the other gateway, by a client that has just connected there.
fn moved(user: i64, epoch: u64) -> BindRouteReq {
    on(OTHER_GATEWAY, epoch, a_bind(user, PHONE, "moved"))
}

/// Waits until all of `users` are offline on every node.
async fn offline_everywhere(cluster: &Cluster, users: std::ops::RangeInclusive<i64>, since: Instant, within: Duration) {
    for node in &cluster.nodes {
        let left = within.saturating_sub(since.elapsed());
        eventually("everybody is offline", left, async || node.online(users.clone()).await == 0).await;
    }
}

/// Every one of `users` has exactly one route, on this life, on every node.
async fn all_are_on(cluster: &Cluster, users: std::ops::RangeInclusive<i64>, epoch: u64) {
    for node in &cluster.nodes {
        for user in node.query_all(users.clone()).await {
            let epochs: Vec<u64> = user.routes.iter().map(|route| route.gateway_epoch).collect();
            assert_eq!((user.is_online, epochs), (true, vec![epoch]), "{user:?}");
        }
    }
}

async fn routes_of(cluster: &Cluster, epoch: u64) -> i64 {
    cluster.db.number(&format!("SELECT COUNT(*) FROM routes WHERE epoch = {epoch}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_a_killed_gateway_are_offline_within_its_lease_and_a_log_in_elsewhere_does_not_wait_for_that() {
    const USERS: i64 = 500;
    let _turn = heavy().await;
    for cluster in [Cluster::mariadb(2, SHORT_LEASE).await, Cluster::with_redis(2, SHORT_LEASE).await] {
        let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
        let elsewhere = Gateway::start(OTHER_GATEWAY, &[other], BEAT).await;
        let mut gateway = GatewayProcess::start(GATEWAY, USERS, node);
        // As long as it beats it lives.
        let began = Instant::now();
        while began.elapsed() < 2 * LEASE {
            all_are_on(&cluster, 1..=USERS, gateway.epoch).await;
            tokio::time::sleep(BEAT / 5).await;
        }
        gateway.kill();
        let killed = Instant::now();
        let bound = other.bind(moved(ALICE, elsewhere.epoch)).await;
        assert_eq!(bound.kicked.len(), 1, "{bound:?}");
        let answer = other.query(ALICE).await;
        assert_eq!((answer.is_online, answer.gateway_addr.as_str()), (true, OTHER_GATEWAY), "{answer:?}");
        assert!(killed.elapsed() < allowed(AT_ONCE), "logged in elsewhere after {:?}", killed.elapsed());
        offline_everywhere(&cluster, 2..=USERS, killed, LEASE + DEAD_WITHIN).await;
        println!("{} users offline on both nodes {:?} after the kill, lease {LEASE:?}", USERS - 1, killed.elapsed());
        all_are_on(&cluster, ALICE..=ALICE, elsewhere.epoch).await;
        eventually("the routes are removed", DEAD_WITHIN, async || routes_of(&cluster, gateway.epoch).await == 0).await;
        all_are_on(&cluster, ALICE..=ALICE, elsewhere.epoch).await;
        assert_eq!(elsewhere.failed(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_moves_at_any_step_of_a_gateways_death_keeps_the_new_gateway() {
    const LEFT_BEHIND: i64 = 8;
    let server = MariaDb::shared();
    let (dying, barred) = (Proxy::start(server.port).await, Proxy::start(server.port).await);
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(&dying, SHORT_LEASE).await;
    cluster.db.somebody_sweeps().await; // the first node
    cluster.add_node_through(&barred, SHORT_LEASE).await;
    let node = &cluster.nodes[1];
    barred.hold_requests(READ_CLUSTER); // it is the first node that declares the death: this one sees nobody die
    let to = Gateway::start(OTHER_GATEWAY, &[node], BEAT).await;
    let from = node.register(GATEWAY).await;
    node.bind_all(1..=LEFT_BEHIND, GATEWAY, from).await;

    node.bind(moved(1, to.epoch)).await; // while the lease holds
    dying.hold_requests(DECLARE);
    dying.struck().await;
    node.bind(moved(2, to.epoch)).await; // the lease is over, nobody has said so
    dying.hold_requests(LAST_BEFORE_COMMIT);
    dying.struck().await;
    node.bind(moved(3, to.epoch)).await; // its death is declared, and not committed
    dying.hold_requests(COMMIT);
    dying.struck().await;
    node.bind(moved(4, to.epoch)).await;
    dying.hold_answers(Kind::Reader, SWEEP_PAGE);
    dying.struck().await;
    node.bind(moved(5, to.epoch)).await; // it is dead; the sweep has read whom to look at
    dying.hold_requests(LOCK_USERS);
    dying.struck().await;
    node.bind(moved(6, to.epoch)).await; // the sweep is about to lock them
    dying.hold_requests(COMMIT);
    dying.struck().await;
    let (mut presence, request) = (node.presence(), moved(7, to.epoch));
    let waits = tokio::spawn(async move { presence.bind_route(request).await }); // the sweep has them locked
    dying.release();
    let bound = waits.await.expect("the task").expect("a bind").into_inner();
    assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    barred.release();

    eventually("nothing is left", DEAD_WITHIN, async || routes_of(&cluster, from).await == 0).await;
    for node in &cluster.nodes {
        eventually("who moved is seen", DEAD_WITHIN, async || node.online(1..LEFT_BEHIND).await == 7).await;
        assert!(!node.query(LEFT_BEHIND).await.is_online);
    }
    all_are_on(&cluster, 1..=LEFT_BEHIND - 1, to.epoch).await;
    assert_eq!(to.failed(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_node_that_declares_a_death_is_killed_another_declares_and_announces_it() {
    const USERS: i64 = 20;
    for committed in [false, true] {
        let server = MariaDb::shared();
        let (dying, barred) = (Proxy::start(server.port).await, Proxy::start(server.port).await);
        let mut cluster = Cluster::on_all(server, Redis::one(), 0, &[]).await;
        cluster.add_node_through(&barred, SHORT_LEASE).await;
        cluster.add_node_through(&dying, SHORT_LEASE).await;
        let survivor = &cluster.nodes[0];
        let lives_on = Gateway::start(OTHER_GATEWAY, &[survivor], BEAT).await;
        survivor.bind_all([1_000], OTHER_GATEWAY, lives_on.epoch).await;
        barred.hold_requests(READ_CLUSTER); // it sees nobody die
        let epoch = survivor.register(GATEWAY).await;
        survivor.bind_all(1..=USERS, GATEWAY, epoch).await;
        dying.hold_requests(DECLARE);
        dying.struck().await;
        let mut nodes_hear = cluster.queue().subscribe(&["presence:gateway"]).await;
        let mut anyone_hears = cluster.queue().subscribe(&["presence:route"]).await;
        match committed {
            true => dying.hold_answers(Kind::Lane, COMMIT), // carried out, and the node does not know
            false => dying.hold_requests(COMMIT),
        }
        dying.struck().await;
        cluster.nodes[1].kill();
        drop(dying); // and its connections with it
        let killed = Instant::now();
        barred.release();
        cluster.nodes.pop();
        offline_everywhere(&cluster, 1..=USERS, killed, Duration::from_secs(5)).await;
        println!("committed {committed}: offline {:?} after the kill", killed.elapsed());
        assert!(nodes_hear.next(allowed(Duration::from_secs(8))).await.is_some(), "announced, committed {committed}");
        for _ in 0..USERS {
            let said = anyone_hears.text(SWEPT_BY_ANOTHER_WITHIN).await;
            assert!(said.ends_with(':'), "somebody went offline: {said:?}");
        }
        println!("committed {committed}: all announced {:?} after the kill", killed.elapsed());
        assert_eq!(routes_of(&cluster, epoch).await, 0);
        let left = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await == 0;
        eventually("nothing waits to be announced", Duration::from_secs(8), left).await;
        all_are_on(&cluster, 1_000..=1_000, lives_on.epoch).await;
        assert_eq!(lives_on.failed(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_that_two_nodes_are_about_to_declare_is_told_once_and_so_is_each_user() {
    const USERS: i64 = 20;
    /// How a declaration begins: from here on a node believes that it has to make it.
    const LOCK: &str = "FOR UPDATE SKIP LOCKED";
    let server = MariaDb::shared();
    let (one, two) = (Proxy::start(server.port).await, Proxy::start(server.port).await);
    let mut cluster = Cluster::on_all(server, Redis::one(), 0, &[]).await;
    cluster.add_node_through(&one, SHORT_LEASE).await;
    cluster.add_node_through(&two, SHORT_LEASE).await;
    let (node, db) = (cluster.node(), &cluster.db);
    for (round, one_after_the_other) in [true, false].into_iter().enumerate() {
        let addr = |which: &str| format!("gw-{which}-{round}:7000");
        let first = node.register(&addr("first")).await;
        node.bind_all(1..=USERS / 2, &addr("first"), first).await;
        tokio::time::sleep(BEAT).await; // so much later its lease ends
        let second = node.register(&addr("second")).await;
        node.bind_all(USERS / 2 + 1..=USERS, &addr("second"), second).await;
        eventually("all are shown", DEAD_WITHIN, async || db.number("SELECT COUNT(*) FROM outbox").await == 0).await;
        two.hold_requests(READ_CLUSTER);
        one.hold_requests(LOCK); // it has seen the end of the first
        one.struck().await;
        let left =
            format!("SELECT lease_until - CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) FROM lives WHERE epoch = {second}");
        eventually("the second ends, too", LEASE, async || db.number(&left).await < 0).await;
        two.hold_requests(LOCK); // it has seen the end of both
        two.struck().await;
        let mut nodes_hear = cluster.queue().subscribe(&["presence:gateway"]).await;
        let mut anyone_hears = cluster.queue().subscribe(&["presence:route"]).await;
        one.release();
        if one_after_the_other {
            let is_dead = format!("SELECT alive = 0 FROM lives WHERE epoch = {first}");
            eventually("one node has declared the first", DEAD_WITHIN, async || db.number(&is_dead).await == 1).await;
        }
        two.release();
        let mut told = Vec::new();
        for _ in 0..USERS {
            told.push(anyone_hears.text(SWEPT_BY_ANOTHER_WITHIN).await);
        }
        told.sort_unstable();
        let mut want: Vec<String> = (1..=USERS).map(|user| format!("{user}:")).collect();
        want.sort_unstable();
        assert_eq!(told, want, "one after the other: {one_after_the_other}");
        // Longer than a row waits in the outbox before another node shows it, too.
        assert_eq!(anyone_hears.next(Duration::from_secs(3)).await, None, "each user once");
        assert!(nodes_hear.next(allowed(DEAD_WITHIN)).await.is_some(), "nodes are told");
        let mut deaths = 0.0;
        for node in &cluster.nodes {
            deaths += node.metric("im_presence_gateway_deaths_total").await;
        }
        assert_eq!(deaths as usize, 2 * (round + 1), "each death is counted by the node that declared it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_node_that_sweeps_is_killed_another_goes_on_and_touches_no_live_route() {
    /// Users whose laptop is on a gateway that lives.
    const MIXED: i64 = 100;
    let _turn = heavy().await;
    let users = if long() { 20_000 } else { 3_000 };
    let server = MariaDb::shared();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::on_all(server, Redis::one(), 0, &[]).await;
    cluster.add_node_through(&proxy, SHORT_LEASE).await;
    cluster.db.somebody_sweeps().await; // the first node
    cluster.add_node(SHORT_LEASE).await;
    let survivor = &cluster.nodes[1];
    let lives_on = Gateway::start(OTHER_GATEWAY, &[survivor], BEAT).await;
    let dies = Gateway::start(GATEWAY, &[survivor], BEAT).await;
    for user in (1..=MIXED).map(|user| user * 29) {
        survivor.bind(on(OTHER_GATEWAY, lives_on.epoch, a_bind(user, LAPTOP, "c"))).await;
    }
    for first in (1..=users).step_by(5_000) {
        survivor.bind_all(first..=users.min(first + 4_999), GATEWAY, dies.epoch).await;
    }
    proxy.hold_answers(Kind::Reader, SWEEP_PAGE);
    dies.falls_silent();
    proxy.struck().await;
    proxy.hold_requests(LOCK_USERS); // the first page passes until here
    proxy.struck().await;
    proxy.hold_answers(Kind::Reader, SWEEP_PAGE); // and is swept; the second
    proxy.struck().await;
    proxy.hold_requests(COMMIT); // is locked, and not swept
    proxy.struck().await;
    let swept = users - routes_of(&cluster, dies.epoch).await;
    assert!(swept > 0 && swept < users, "in the middle: {swept} of {users}");
    cluster.nodes[0].kill();
    drop(proxy);
    let killed = Instant::now();
    cluster.nodes.remove(0);
    let gone = async || routes_of(&cluster, dies.epoch).await == 0;
    eventually("another goes on", SWEPT_BY_ANOTHER_WITHIN, gone).await;
    println!("{swept} of {users} were swept; nothing was left {:?} after the kill", killed.elapsed());
    assert_eq!(routes_of(&cluster, lives_on.epoch).await, MIXED, "no live route is touched");
    let mut online = 0;
    for first in (1..=MIXED * 29).step_by(1_000) {
        online += cluster.nodes[0].online(first..=first + 999).await;
    }
    assert_eq!(i64::try_from(online), Ok(MIXED));
    let redis = cluster.cache().client().await;
    let rightly = |key: &String| key.trim_start_matches("user:route:").parse::<i64>().is_ok_and(|user| user % 29 == 0);
    eventually("their keys are gone", Duration::from_secs(5), async || redis.keys("user:route:*").await.iter().all(rightly))
        .await;
    assert_eq!(redis.keys("user:route:*").await.len() as i64, MIXED);
    assert_eq!(lives_on.failed(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_turn_to_sweep_ended_before_it_looked_does_not_believe_that_nothing_is_left() {
    // The same statement: which lives are to be swept.
    const WHICH: &str = "swept_at = 0 ORDER BY";
    const WHICH_NEXT: &str = "ORDER BY ended_at";
    let server = MariaDb::shared();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::on(server, 0, &[]).await;
    cluster.add_node_through(&proxy, &[]).await;
    let (node, db) = (cluster.node(), &cluster.db);
    let epoch = node.register(GATEWAY).await;
    node.bind_all([ALICE], GATEWAY, epoch).await;
    // Long after the death one finding of nothing is enough.
    db.run(&format!("UPDATE lives SET alive = 0, ended_at = 1, swept_at = 1 WHERE epoch = {epoch}")).await;
    proxy.hold_answers(Kind::Reader, WHICH);
    proxy.struck().await;
    db.run(&format!("UPDATE lives SET swept_at = 0 WHERE epoch = {epoch}")).await;
    proxy.hold_answers(Kind::Reader, WHICH_NEXT);
    proxy.struck().await;
    db.another_sweeps().await;
    proxy.release();
    tokio::time::sleep(2 * SWEEP_INTERVAL).await;
    assert_eq!(routes_of(&cluster, epoch).await, 1, "it is not this node's turn");
    let swept = db.number(&format!("SELECT swept_at FROM lives WHERE epoch = {epoch}")).await;
    assert_eq!(swept, 0, "nobody has looked"); // the census would find what was left, a minute later
    db.anybody_sweeps().await;
    eventually("the route is removed", SWEPT_BY_ANOTHER_WITHIN, async || routes_of(&cluster, epoch).await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_dies_of_a_database_that_stood_still_for_three_leases() {
    let _turn = heavy().await;
    // Shorter than a statement waits: what was under way is carried out late. Longer: everything is made anew.
    let leases = if long() { vec![1_500, 4_000] } else { vec![1_500] };
    for lease_ms in leases {
        let lease = Duration::from_millis(lease_ms);
        let (server, lease_ms) = (MariaDb::start(), lease_ms.to_string());
        let settings = [SHORT_LEASE, &[("GATEWAY__LEASE", &*lease_ms)]].concat();
        let proxy = Proxy::start(server.port).await;
        let mut cluster = Cluster::on(&server, 1, &settings).await;
        cluster.add_node_through(&proxy, &settings).await;
        let [direct, behind] = &cluster.nodes[..] else { panic!("two nodes") };
        let mut gateways = Vec::new();
        for (i, nodes) in [[direct, behind], [behind, direct]].iter().cycle().take(6).enumerate() {
            let gateway = Gateway::start(&format!("gw-{i}:7000"), nodes, BEAT).await;
            direct.bind_all([i as i64 + 1], &gateway.addr, gateway.epoch).await;
            gateways.push(gateway);
        }
        tokio::time::sleep(2 * lease).await; // deaths may be declared: nothing was silent for a lease
        proxy.hold_requests(READ_CLUSTER);
        proxy.struck().await; // the node looks who lives, and goes on with that after the thaw
        server.stop();
        proxy.release();
        tokio::time::sleep(3 * lease).await; // what is tested is the time
        server.cont();
        let back = Instant::now();
        let beaten = async || {
            let left = "SELECT COUNT(*) FROM lives WHERE alive = 1 AND lease_until > UNIX_TIMESTAMP(NOW(3)) * 1000 + 500";
            cluster.db.number(left).await == 6
        };
        eventually("all beat again", Duration::from_secs(15), beaten).await;
        println!("all beat again {:?} after a stop of {:?}", back.elapsed(), 3 * lease);
        tokio::time::sleep(2 * lease).await; // and whoever would be declared dead would be by now
        assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives WHERE alive = 0").await, 0);
        for (i, gateway) in gateways.iter().enumerate() {
            all_are_on(&cluster, i as i64 + 1..=i as i64 + 1, gateway.epoch).await;
            assert!(gateway.failed().iter().all(|why| !why.contains("epoch")), "{:?}", gateway.failed());
        }
        gateways[0].falls_silent();
        offline_everywhere(&cluster, 1..=1, Instant::now(), lease + DEAD_WITHIN).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_of_a_node_that_is_cut_off_from_the_database_are_told_in_time_and_move_and_none_of_them_dies() {
    const LEASE: Duration = Duration::from_secs(6);
    const BEAT: Duration = Duration::from_secs(1);
    const TOLD_WITHIN: Duration = Duration::from_millis(2_300);
    let settings = [("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "6000")];
    let _turn = heavy().await;
    let server = MariaDb::shared();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(&proxy, &settings).await;
    cluster.add_node(&settings).await;
    let [cut, whole] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut moving = Vec::new();
    for (i, user) in (1..=5).enumerate() {
        let gateway = Gateway::start(&format!("gw-{i}:7000"), &[cut, whole], BEAT).await;
        cut.bind_all([user], &gateway.addr, gateway.epoch).await;
        moving.push(gateway);
    }
    let stays = Gateway::start("stays:7000", &[cut], BEAT).await;
    cut.bind_all([6], &stays.addr, stays.epoch).await;
    tokio::time::sleep(LEASE).await; // deaths may be declared from now on
    proxy.cut_off();
    let since = Instant::now();
    let status = cut.try_beat(&moving[0].addr, moving[0].epoch).await.expect_err("it cannot be recorded");
    assert_eq!(status.code(), Grpc::Unavailable, "{status:?}");
    assert!(since.elapsed() < allowed(TOLD_WITHIN), "told after {:?}", since.elapsed());
    println!("told after {:?}: {}", since.elapsed(), status.message());
    offline_on(whole, 6, since, LEASE + DEAD_WITHIN).await;
    assert!(since.elapsed() > LEASE - 2 * BEAT, "not before its lease was over");
    tokio::time::sleep(LEASE).await; // twice the time in which they would have died
    for gateway in &moving {
        assert!(
            gateway.failed().iter().all(|why| why.starts_with("Unavailable") || why.starts_with("Cancelled")),
            "{:?}",
            gateway.failed()
        );
    }
    assert_eq!(whole.online(1..=5).await, 5);
    let suspect = cut.query(1).await;
    assert!(
        suspect.is_online && suspect.routes[0].state() == RouteState::Suspect,
        "the node that is cut off says so: {suspect:?}"
    );
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives WHERE alive = 0").await, 1, "only who did not move");
    proxy.release();
    let heals = async || cut.try_beat(&moving[0].addr, moving[0].epoch).await.is_ok() && cut.online(1..=6).await == 5;
    eventually("the node heals by itself", Duration::from_secs(15), heals).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_alone_cannot_read_the_database_is_not_ready_and_if_none_can_all_are() {
    const NOTICED_WITHIN: Duration = Duration::from_secs(12);
    let _turn = heavy().await;
    let server = MariaDb::start();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::on_all(&server, Redis::one(), 0, &[]).await;
    cluster.add_node_through(&proxy, &[("STORE__TIMEOUT", "1000")]).await;
    cluster.add_node(&[("STORE__TIMEOUT", "1000")]).await;
    let [cut, whole] = &cluster.nodes[..] else { panic!("two nodes") };
    let is_ready = async |node: &Node| node.http("/readyz").await.0 == 200;
    assert!(is_ready(cut).await && is_ready(whole).await);
    proxy.cut_off();
    eventually("it says so", NOTICED_WITHIN, async || !is_ready(cut).await).await;
    assert!(cut.http("/readyz").await.1.contains("alone"), "and why");
    assert!(is_ready(whole).await);
    server.stop();
    eventually("nobody is better off", NOTICED_WITHIN, async || is_ready(cut).await).await;
    assert!(is_ready(whole).await);
    server.cont();
    proxy.release();
    eventually("nothing is missing", NOTICED_WITHIN, async || cut.degraded().await.is_empty()).await;
}

#[tokio::test]
async fn a_beat_that_a_node_took_before_it_stood_still_is_no_sign_of_life_afterwards() {
    const LEASE: Duration = Duration::from_secs(5);
    /// Longer than a gateway waits for its answer, shorter than its lease.
    const STOOD_STILL: Duration = Duration::from_millis(3_500);
    let settings = [SHORT_LEASE, &[("GATEWAY__LEASE", "5000")]].concat();
    let cluster = Cluster::mariadb(2, &settings).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut gateway = node.gateways();
    node.beat("gw-9:7000", 1).await; // the connection is there
    tokio::time::sleep(LEASE).await; // deaths may be declared from now on
    let epoch = other.register(GATEWAY).await;
    let since = Instant::now();
    other.bind_all([ALICE], GATEWAY, epoch).await;
    let beat = tokio::spawn(async move { gateway.heartbeat(a_beat(GATEWAY, epoch)).await });
    tokio::time::sleep(Duration::from_millis(100)).await; // beats wait for others for 250 ms
    node.stop();
    tokio::time::sleep(STOOD_STILL).await;
    node.cont();
    assert!(beat.await.expect("the task").is_err(), "it was not recorded in time");
    offline_everywhere(&cluster, ALICE..=ALICE, since, LEASE + DEAD_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_somebody_holds_keeps_no_other_gateway_alive_or_from_beating() {
    let cluster = Cluster::mariadb(2, SHORT_LEASE).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut gateways = Vec::new();
    for number in 1..=6 {
        let gateway = Gateway::start(&format!("gw-{number}:7000"), &[node], BEAT).await;
        node.bind_all([number], &gateway.addr, gateway.epoch).await;
        gateways.push(gateway);
    }
    tokio::time::sleep(LEASE).await; // deaths may be declared from now on
    // The first that any statement comes to: perhaps a node that was registering it stands still.
    let mut holder = cluster.db.connect().await;
    let lock = format!("SELECT epoch FROM lives WHERE epoch = {} FOR UPDATE", gateways[0].epoch);
    sqlx::raw_sql("BEGIN").execute(&mut holder).await.expect("begin");
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut holder).await.expect("a lock");
    tokio::time::sleep(LEASE).await; // its lease is over as well, and nobody can say so
    gateways[5].falls_silent();
    let since = Instant::now();
    for node in [node, other] {
        offline_on(node, 6, since, LEASE + DEAD_WITHIN).await;
    }
    tokio::time::sleep(LEASE).await;
    for gateway in &gateways[1..5] {
        assert_eq!(gateway.failed(), Vec::<String>::new(), "{}", gateway.addr);
    }
    assert_eq!(node.online(2..=6).await, 4);
    assert!(gateways[0].failed().iter().all(|why| why.starts_with("Unavailable")), "{:?}", gateways[0].failed());
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.expect("roll back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_row_that_all_agree_on_is_held_nodes_still_read_who_lives() {
    let cluster = Cluster::mariadb(2, SHORT_LEASE).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let leaves = Gateway::start(GATEWAY, &[node], BEAT).await;
    let stays = Gateway::start(OTHER_GATEWAY, &[node], BEAT).await;
    node.bind_all([1], GATEWAY, leaves.epoch).await;
    node.bind_all([2], OTHER_GATEWAY, stays.epoch).await;
    assert_eq!(other.online([1, 2]).await, 2);
    let mut holder = cluster.db.connect().await;
    sqlx::raw_sql("BEGIN").execute(&mut holder).await.expect("begin");
    sqlx::raw_sql("SELECT id FROM cluster WHERE id = 1 FOR UPDATE").execute(&mut holder).await.expect("a lock");
    tokio::time::sleep(2 * LEASE).await; // longer than a table of lives is believed
    leaves.falls_silent();
    assert_eq!(node.deregister(GATEWAY, leaves.epoch).await, Code::Ok);
    eventually("the other node reads it", 2 * DEAD_WITHIN, async || other.online([1, 2]).await == 1).await;
    assert!(other.query(2).await.age_ms < 3_000);
    assert_eq!(stays.failed(), Vec::<String>::new(), "beats are taken");
    sqlx::raw_sql("ROLLBACK").execute(&mut holder).await.expect("roll back");
    assert_eq!(node.online([1, 2]).await, 1);
}

#[tokio::test]
async fn a_gateway_of_a_node_with_a_file_of_its_own_dies_with_its_lease_and_two_of_two_are_held() {
    let mut settings = SHORT_LEASE.to_vec();
    settings.retain(|(key, _)| *key != "GATEWAY__DOUBT_SHARE");
    let cluster = Cluster::sqlite(&settings).await;
    let node = cluster.node();
    let one = Gateway::start(GATEWAY, &[node], BEAT).await;
    node.bind_all(1..=100, GATEWAY, one.epoch).await;
    tokio::time::sleep(LEASE).await; // deaths may be declared from now on
    one.falls_silent();
    let since = Instant::now();
    offline_everywhere(&cluster, 1..=100, since, LEASE + DEAD_WITHIN).await;
    println!("offline {:?} after it fell silent", since.elapsed());
    eventually("its routes are removed", DEAD_WITHIN, async || routes_of(&cluster, one.epoch).await == 0).await;
    tokio::time::sleep(LEASE).await; // that death is not recent any more
    let two = [node.register(GATEWAY).await, node.register(OTHER_GATEWAY).await];
    eventually("both are held", LEASE + DEAD_WITHIN, async || node.degraded().await == ["hold"]).await;
    tokio::time::sleep(LEASE).await;
    assert_eq!((node.beat(GATEWAY, two[0]).await, node.beat(OTHER_GATEWAY, two[1]).await), (Code::Ok, Code::Ok));
}

async fn offline_on(node: &Node, user: i64, since: Instant, within: Duration) {
    eventually("offline", within.saturating_sub(since.elapsed()), async || !node.query(user).await.is_online).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_wall_clock_is_an_hour_off_changes_nothing() {
    for shift in ["+1h", "-1h"] {
        let db = TestDb::mariadb(MariaDb::shared()).await;
        let settings = [SHORT_LEASE, &[("ROUTE__ROUTE_TTL", "600")]].concat();
        let Some(shifted) = Node::start_with_clock(shift, db.settings(&settings)).await else {
            println!("skipped: libfaketime is not installed");
            return;
        };
        let right = Node::start(db.settings(&settings)).await;
        assert_ne!(hour(&shifted), hour(&right), "its clock is shifted by {shift}");
        let lives_on = Gateway::start(OTHER_GATEWAY, &[&shifted], BEAT).await;
        let dies = Gateway::start(GATEWAY, &[&right], BEAT).await;
        shifted.bind_all([1], OTHER_GATEWAY, lives_on.epoch).await;
        right.bind_all([2], GATEWAY, dies.epoch).await;
        shifted.bind(on("never:7000", 0, a_bind(3, PHONE, "c"))).await;
        right.bind(on("never:7000", 0, a_bind(4, PHONE, "c"))).await;
        let older = BindRouteReq { connected_ms_ago: 60_000, ..on(GATEWAY, dies.epoch, a_bind(1, PHONE, "older")) };
        assert_eq!(code(&right.try_bind(older).await.expect("an answer").result), Code::Refused);
        let began = Instant::now();
        while began.elapsed() < 2 * LEASE {
            for node in [&shifted, &right] {
                eventually("all are online", DEAD_WITHIN, async || node.online(1..=4).await == 4).await;
            }
            tokio::time::sleep(BEAT / 5).await;
        }
        dies.falls_silent();
        let since = Instant::now();
        for node in [&shifted, &right] {
            offline_on(node, 2, since, LEASE + DEAD_WITHIN).await;
            assert_eq!(node.online(1..=4).await, 3);
        }
        assert!(since.elapsed() > LEASE - 2 * BEAT, "after {:?}", since.elapsed());
        assert_eq!(lives_on.failed(), Vec::<String>::new());
    }
}

/// Date and hour of what a node says first.
fn hour(node: &Node) -> String {
    let line: serde_json::Value = serde_json::from_str(&node.log()[0]).expect("JSON");
    line["timestamp"].as_str().and_then(|time| time.get(..13)).expect("a time").to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_comes_back_and_binds_all_it_believes_in_takes_nobody_back() {
    let _turn = heavy().await;
    let users = if long() { 10_000 } else { 400 };
    let cluster = Cluster::with_redis(2, SHORT_LEASE).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    for died_meanwhile in [false, true] {
        let from = Gateway::start(GATEWAY, &[node], BEAT).await;
        let to = Gateway::start(OTHER_GATEWAY, &[other], BEAT).await;
        node.bind_all(1..=users, GATEWAY, from.epoch).await;
        let connected = Instant::now();
        from.falls_silent(); // it is cut off: neither its beats nor its clients get through
        let mut former_hears = cluster.queue().subscribe(&[&format!("gateway:{GATEWAY}")]).await;
        let binds = (1..=users).map(|user| moved(user, to.epoch)).collect();
        let answer = other.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
        assert!(answer.results.iter().all(|bound| code(&bound.result) == Code::Ok && bound.kicked.len() == 1));
        assert!(former_hears.next(allowed(DEAD_WITHIN)).await.is_some(), "the gateway they left is told, if it can hear");
        if died_meanwhile {
            let living = format!("SELECT alive FROM lives WHERE epoch = {}", from.epoch);
            eventually("it is dead", LEASE + DEAD_WITHIN, async || cluster.db.number(&living).await == 0).await;
        }
        let mut orders = cluster.queue().subscribe(&[&format!("gateway:{OTHER_GATEWAY}")]).await;
        let epoch = node.register(GATEWAY).await;
        let connected_ms_ago = u32::try_from(connected.elapsed().as_millis()).expect("a moment") + 10;
        let believed = |user| BindRouteReq { connected_ms_ago, ..on(GATEWAY, epoch, a_bind(user, PHONE, &format!("c-{user}"))) };
        let binds = (1..=users).map(believed).collect();
        let answer = node.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("answers").into_inner();
        let refused = answer.results.iter().filter(|bound| code(&bound.result) == Code::Refused && bound.kicked.is_empty());
        assert_eq!(refused.count() as i64, users, "died meanwhile: {died_meanwhile}");
        for first in (1..=users).step_by(2_000) {
            all_are_on(&cluster, first..=users.min(first + 1_999), to.epoch).await;
        }
        assert_eq!(orders.next(Duration::from_millis(300)).await, None, "nobody is kicked");
        assert_eq!(other.deregister(OTHER_GATEWAY, to.epoch).await, Code::Ok);
    }
}
