//! What operators do to users, and what they ask of all of them.

use std::collections::BTreeSet;
use std::time::Duration;

use im_presence::pb;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::CountBy;
use im_presence::pb::Platform;
use im_presence::pb::Reason;
use im_presence::pb::RegisterGatewayReq;
use im_presence::pb::Status as Shown;
use im_presence::pb::TopBy;
use im_presence::pb::node_frame::Body as Down;
use sqlx::AssertSqlSafe;
use sqlx::Row;
use tonic::Code as Grpc;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::each_engine;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;
use crate::harness::stream::RawStream;
use crate::harness::watcher::Watcher;
use crate::harness::watcher::set_idle;
use crate::harness::watcher::set_status;

const SOON: Duration = Duration::from_secs(5);
const DAY_S: u32 = 86_400;
const TEN_YEARS_S: u32 = 315_360_000;
/// Longer than a count by gateway is kept for others.
const COUNT_KEPT: Duration = Duration::from_secs(6);
/// The last statement of a lane before COMMIT.
const OUTBOX: &str = "INTO outbox";
/// Gateways of these tests do not beat, and their users may change at any pace.
const UNHURRIED: &[(&str, &str)] = &[("GATEWAY__LEASE", "3600000"), ("STATUS__RATE", "0")];

fn ban(user_id: i64, ban_for_s: u32) -> pb::ForceOfflineReq {
    pb::ForceOfflineReq { user_id, ban_for_s, reason: "spam".to_owned(), ..Default::default() }
}

fn lift(user_id: i64) -> pb::ForceOfflineReq {
    pb::ForceOfflineReq { user_id, lift_ban: true, ..Default::default() }
}

fn kick(user_id: i64, device: &str) -> pb::KickDeviceReq {
    pb::KickDeviceReq { user_id, device_id: device.to_owned(), ..Default::default() }
}

impl Node {
    async fn force(&self, request: pb::ForceOfflineReq) -> pb::ForceOfflineResp {
        let answer = self.operator().force_offline(request).await.expect("an answer").into_inner();
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer
    }

    async fn kick(&self, request: pb::KickDeviceReq) -> pb::KickDeviceResp {
        self.operator().kick_device(request).await.expect("an answer").into_inner()
    }

    /// Insists that nothing can be bound, and tells for how long.
    async fn refuses(&self, bind: BindRouteReq) -> Duration {
        let answer = self.try_bind(bind).await.expect("an answer");
        let result = answer.result.as_ref().expect("a result");
        assert!(result.code() == Code::Refused && result.msg.starts_with("banned until 20"), "{answer:?}");
        assert!(result.msg.ends_with('Z') && answer.route_key.is_empty(), "{answer:?}");
        Duration::from_millis(answer.retry_after_ms.into())
    }

    async fn page(&self, request: &pb::ListOnlineReq) -> pb::ListOnlineResp {
        let answer = self.operator().list_online(request.clone()).await.expect("a page").into_inner();
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer
    }

    /// All pages.
    async fn list(&self, mut request: pb::ListOnlineReq) -> Vec<pb::OnlineUser> {
        let mut users = Vec::new();
        loop {
            let page = self.page(&request).await;
            assert!(request.page_size == 0 || page.users.len() <= request.page_size as usize);
            users.extend(page.users);
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return users;
            }
        }
    }

    async fn count(&self, by: CountBy) -> pb::CountOnlineResp {
        self.operator().count_online(pb::CountOnlineReq { by: by.into() }).await.expect("a count").into_inner()
    }

    async fn top(&self, by: TopBy) -> Vec<pb::TopItem> {
        let answer = self.operator().list_top(pb::ListTopReq { by: by.into(), count: 3 }).await.expect("a list").into_inner();
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer.items
    }
}

impl RawStream {
    /// The next kick, whatever comes before.
    async fn is_kicked(&mut self) -> pb::Kick {
        loop {
            if let Some(Down::Kick(kick)) = self.next().await.expect("a kick").body {
                return kick;
            }
        }
    }
}

/// What stands in these tables.
async fn rows(db: &TestDb) -> Vec<String> {
    let mut connection = db.connect().await;
    let mut all = Vec::new();
    for table in ["users", "routes", "status_log"] {
        let select = match table {
            "users" => "SELECT CONCAT(user_id, ' ', version, ' ', last_seen_ms, ' ', banned_until_ms) FROM users",
            "routes" => "SELECT CONCAT(user_id, ' ', device_id, ' ', bound_version) FROM routes",
            _ => "SELECT CONCAT(user_id, ' ', version) FROM status_log",
        };
        for row in sqlx::query(AssertSqlSafe(select.to_owned())).fetch_all(&mut connection).await.expect("rows") {
            all.push(row.try_get::<String, _>(0).expect("text"));
        }
    }
    all.sort_unstable();
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_holds_on_every_node_at_once_until_it_is_lifted() {
    let cluster = Cluster::with_redis(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut gateway, epoch) = RawStream::attach(one, "gw-9:7000", 0).await;
    let bound = gateway.bind(ALICE, PHONE, "c1").await;
    two.bind(a_bind(ALICE, LAPTOP, "c2")).await;
    let mut watcher = Watcher::of(two, [ALICE]).await;
    let banned = two.force(ban(ALICE, DAY_S)).await;
    let mut devices: Vec<_> = banned.kicked.iter().map(|route| (route.device_id.as_str(), route.gateway_addr.as_str())).collect();
    devices.sort_unstable();
    assert_eq!(devices, [(LAPTOP, GATEWAY), (PHONE, "gw-9:7000")]);
    let kick = gateway.is_kicked().await;
    assert_eq!((kick.reason(), kick.route_key), (Reason::Banned, bound.route_key));
    for node in [one, two] {
        let left = node.refuses(on("gw-9:7000", epoch, a_bind(ALICE, PHONE, "c3"))).await;
        assert!(left > Duration::from_secs(u64::from(DAY_S) - 3_600) && left <= Duration::from_secs(DAY_S.into()), "{left:?}");
        let binds = vec![a_bind(ALICE, PHONE, "c3"), a_bind(BOB, PHONE, "c3")];
        let many = node.presence().batch_bind_route(pb::BatchBindRouteReq { binds }).await.expect("an answer").into_inner();
        assert_eq!(many.results.iter().map(|bound| code(&bound.result)).collect::<Vec<_>>(), [Code::Refused, Code::Ok]);
    }
    watcher.shows(ALICE, Shown::Offline).await;
    assert_eq!(one.history(ALICE).await[0].cause, "operator");
    assert_eq!(code(&one.try_set(set_status(ALICE, Shown::Busy)).await.expect("an answer").result), Code::Ok, "as while offline");
    let again = one.force(ban(ALICE, 0)).await;
    assert_eq!((again.kicked.len(), again.banned_until_ms), (0, banned.banned_until_ms), "the ban stays");
    assert_eq!(one.force(lift(ALICE)).await.banned_until_ms, 0);
    two.bind(a_bind(ALICE, PHONE, "c4")).await;
    watcher.shows(ALICE, Shown::Busy).await;
    let metric = async |name: &str| one.metric(name).await + two.metric(name).await;
    assert_eq!(metric("im_presence_bans_total").await, 1.0);
    let lines = "SELECT COUNT(*) FROM audit WHERE action = 'ForceOffline' AND target = 'user 1' AND outcome = 'ok'";
    eventually("it is taken down", SOON, async || cluster.db.number(lines).await == 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_bind_slips_past_a_ban_that_commits_meanwhile() {
    let server = MariaDb::shared();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::mariadb(1, &[]).await;
    cluster.add_node_through(&proxy, &[]).await;
    let [free, held] = &cluster.nodes[..] else { panic!("two nodes") };
    for user in [ALICE, BOB] {
        free.bind(a_bind(user, PHONE, "c1")).await;
    }
    let waits = async || cluster.db.waiting_for_a_row().await >= 1;

    // The ban has the user's row and is not committed yet; a bind comes to the other node.
    proxy.hold_requests(OUTBOX);
    let mut operator = held.operator();
    let banned = tokio::spawn(async move { operator.force_offline(ban(ALICE, DAY_S)).await });
    proxy.struck().await;
    let mut client = free.new_connection();
    let bound = tokio::spawn(async move { client.bind_route(a_bind(ALICE, PHONE, "c2")).await });
    eventually("the bind waits for the ban", SOON, waits).await;
    proxy.release();
    assert_eq!(banned.await.expect("it ran").expect("a ban").into_inner().kicked.len(), 1);
    match bound.await.expect("it ran") {
        Ok(answer) => assert_eq!(code(&answer.into_inner().result), Code::Refused),
        Err(status) => assert_eq!(status.code(), Grpc::Unavailable, "{status:?}"), // it waited for too long
    }

    // The other way round: the bind is under way, and the ban takes its route as well.
    proxy.hold_requests(OUTBOX);
    let mut client = held.new_connection();
    let bound = tokio::spawn(async move { client.bind_route(a_bind(BOB, LAPTOP, "c2")).await });
    proxy.struck().await;
    let mut operator = free.operator();
    let banned = tokio::spawn(async move { operator.force_offline(ban(BOB, DAY_S)).await });
    eventually("the ban waits for the bind", SOON, waits).await;
    proxy.release();
    let bound = code(&bound.await.expect("it ran").expect("a bind").into_inner().result);
    let banned = banned.await.expect("it ran").expect("a ban").into_inner();
    assert_eq!((bound, banned.kicked.len()), (Code::Ok, 2));
    for node in [free, held] {
        for user in [ALICE, BOB] {
            assert!(!node.query_sql(user).await.is_online);
            node.refuses(a_bind(user, PHONE, "c3")).await;
        }
    }
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_whose_caller_goes_away_is_taken_down() {
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::mariadb(1, &[]).await;
    cluster.add_node_through(&proxy, &[]).await;
    let node = &cluster.nodes[1];
    node.bind(a_bind(ALICE, PHONE, "c1")).await;
    proxy.hold_requests(OUTBOX);
    let mut operator = node.operator();
    let banned = tokio::spawn(async move { operator.force_offline(ban(ALICE, DAY_S)).await });
    proxy.struck().await;
    banned.abort();
    assert!(banned.await.is_err());
    cluster.nodes[0].bind(a_bind(BOB, PHONE, "c1")).await; // the node hears meanwhile that nobody waits any more
    proxy.release();
    let taken_down = "SELECT COUNT(*) FROM audit WHERE action = 'ForceOffline' AND target = 'user 1' AND outcome = 'ok'";
    eventually("it is taken down", SOON, async || cluster.db.number(taken_down).await == 1).await;
    assert_eq!(node.metric("im_presence_bans_total").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_outlives_nodes_and_ends_by_itself_or_with_all_that_is_known_of_the_user() {
    let mut cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let short = node.force(ban(ALICE, 3)).await;
    assert_eq!((short.kicked.len(), short.version > 0), (0, true), "nobody has ever heard of the user");
    for user in [BOB, CAROL] {
        node.force(ban(user, TEN_YEARS_S)).await;
    }
    cluster.nodes[0].kill();
    cluster.nodes[0].restart().await;
    let node = cluster.node();
    assert!(node.refuses(a_bind(BOB, PHONE, "c")).await > Duration::from_secs(DAY_S.into()));
    eventually("it is over", SOON, async || {
        code(&node.try_bind(a_bind(ALICE, PHONE, "c")).await.expect("an answer").result) == Code::Ok
    })
    .await;
    let over = cluster.db.number("SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)").await;
    assert!(over >= short.banned_until_ms, "not before its time");
    let forget = pb::ForgetUserReq { user_id: CAROL, dry_run: false };
    node.operator().forget_user(forget).await.expect("an answer");
    node.bind(a_bind(CAROL, PHONE, "c")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ban_of_a_user_who_hides_is_seen_by_nobody() {
    let cluster = Cluster::with_redis(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut gateway, _) = RawStream::attach(one, "gw-9:7000", 0).await;
    gateway.bind(ALICE, PHONE, "c1").await;
    one.set(set_status(ALICE, Shown::Invisible)).await;
    let before = Watcher::of(two, [ALICE]).await.known[&ALICE].clone();
    let public = async || {
        let request = pb::GetStatusHistoryReq { user_id: ALICE, ..Default::default() };
        one.presence().get_status_history(request).await.expect("a history").into_inner().changes
    };
    let told = public().await;
    let mut watcher = Watcher::of(two, [ALICE]).await;
    two.force(ban(ALICE, DAY_S)).await;
    assert_eq!(gateway.is_kicked().await.reason(), Reason::Banned);
    one.bind(a_bind(BOB, PHONE, "c1")).await;
    let (tellings, _) = watcher.ask(&[(BOB, 0)], &[]).await; // whatever was to be told of Alice came before
    assert!(tellings.iter().all(|telling| telling.user_id == BOB), "{tellings:?}");
    assert_eq!(Watcher::of(two, [ALICE]).await.known[&ALICE], before);
    assert_eq!(public().await, told);
    let line = &one.history(ALICE).await[0];
    assert_eq!((line.cause.as_str(), line.hidden), ("operator", true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_device_is_kicked_and_what_is_only_tried_changes_nothing() {
    let cluster = Cluster::mariadb(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut gateway, _) = RawStream::attach(one, "gw-9:7000", 0).await;
    let phone = gateway.bind(ALICE, PHONE, "c1").await;
    gateway.bind(ALICE, LAPTOP, "c2").await;
    let before = rows(&cluster.db).await;
    let tried = two.force(pb::ForceOfflineReq { dry_run: true, ..ban(ALICE, DAY_S) }).await;
    assert!(tried.kicked.len() == 2 && tried.banned_until_ms > 0, "{tried:?}");
    let tried = two.kick(pb::KickDeviceReq { dry_run: true, ..kick(ALICE, PHONE) }).await;
    assert_eq!(tried.kicked.iter().map(|route| &route.route_key).collect::<Vec<_>>(), [&phone.route_key]);
    let stranger = two.force(pb::ForceOfflineReq { dry_run: true, ..ban(CAROL, DAY_S) }).await;
    assert_eq!(stranger.version, 0);
    for (user, device) in [(ALICE, "watch"), (BOB, PHONE)] {
        assert_eq!(code(&two.kick(kick(user, device)).await.result), Code::NotFound);
    }
    assert_eq!(two.force(ban(BOB, 0)).await.kicked.len(), 0, "nothing to do is no error");
    assert_eq!(rows(&cluster.db).await, before);
    let taken_down = "SELECT COUNT(*) FROM audit WHERE action IN ('ForceOffline', 'KickDevice')";
    eventually("what was not only tried is taken down", SOON, async || cluster.db.number(taken_down).await == 3).await;

    let kicked = two.kick(kick(ALICE, PHONE)).await;
    assert_eq!((code(&kicked.result), kicked.kicked.len()), (Code::Ok, 1));
    let told = gateway.is_kicked().await;
    assert_eq!((told.reason(), told.route_key), (Reason::Operator, phone.route_key));
    assert_eq!(two.query_sql(ALICE).await.routes.len(), 1, "the laptop stays");
    gateway.bind(ALICE, PHONE, "c3").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_by_the_name_of_its_field() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let refuse = |field: &str, answer: Result<(), tonic::Status>| {
        let status = answer.expect_err(field);
        assert!(status.code() == Grpc::InvalidArgument && status.message().contains(field), "{field}: {status:?}");
    };
    let long_reason = "x".repeat(256);
    for (field, request) in [
        ("user_id", ban(0, 1)),
        ("reason", pb::ForceOfflineReq { reason: long_reason.clone(), ..ban(ALICE, 1) }),
        ("ban_for_s", ban(ALICE, TEN_YEARS_S + 1)),
        ("lift_ban", pb::ForceOfflineReq { lift_ban: true, ..ban(ALICE, 1) }),
    ] {
        refuse(field, node.operator().force_offline(request).await.map(drop));
    }
    for (field, request) in [
        ("user_id", kick(-1, PHONE)),
        ("device_id", kick(ALICE, "a b")),
        ("reason", pb::KickDeviceReq { reason: long_reason, ..kick(ALICE, PHONE) }),
    ] {
        refuse(field, node.operator().kick_device(request).await.map(drop));
    }
    let default = pb::ListOnlineReq::default;
    for (field, request) in [
        ("page_size", pb::ListOnlineReq { page_size: 1_001, ..default() }),
        ("gateway_addr", pb::ListOnlineReq { gateway_addr: "a b".to_owned(), ..default() }),
        ("region", pb::ListOnlineReq { region: "x".repeat(129), ..default() }),
        ("platform", pb::ListOnlineReq { platform: 9, ..default() }),
        ("status", pb::ListOnlineReq { status: Shown::Offline.into(), ..default() }),
        ("status", pb::ListOnlineReq { status: 77, ..default() }),
    ] {
        refuse(field, node.operator().list_online(request).await.map(drop));
    }
    for token in ["0", "-1", "x", "1 ", "9223372036854775808", "1@gw-1:7000"] {
        let request = pb::ListOnlineReq { page_token: token.to_owned(), ..default() };
        refuse("page_token", node.operator().list_online(request).await.map(drop));
    }
    refuse("by", node.operator().count_online(pb::CountOnlineReq { by: 5 }).await.map(drop));
    refuse("by", node.operator().list_top(pb::ListTopReq::default()).await.map(drop));
    refuse("count", node.operator().list_top(pb::ListTopReq { by: 1, count: 101 }).await.map(drop));
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM users").await, 0);
}

/// Users 1 to 300 on gateways in two regions, with phones and browsers, some of them busy, idle or hidden.
async fn a_crowd(node: &Node) {
    for (addr, region) in [("gw-1:7000", "eu"), ("gw-2:7000", "eu"), ("gw-3:7000", "EU"), ("gw-4:7000", "us")] {
        let request = RegisterGatewayReq { gateway_addr: addr.to_owned(), region: region.to_owned(), ..Default::default() };
        node.gateways().register_gateway(request).await.expect("a registration");
    }
    let device = |user: i64, device: &str, platform: Platform, gateway: i64| BindRouteReq {
        platform: platform.into(),
        ..on(&format!("gw-{gateway}:7000"), 0, a_bind(user, device, "c"))
    };
    let phones = (1..=300).map(|user| device(user, PHONE, [Platform::Ios, Platform::Android][user as usize % 2], user % 4 + 1));
    let browsers = (1..=300).filter(|user| user % 3 == 0).map(|user| device(user, "web", Platform::Web, user % 5 % 4 + 1));
    let binds = phones.chain(browsers).collect();
    let bound = node.presence().batch_bind_route(pb::BatchBindRouteReq { binds }).await.expect("binds").into_inner();
    assert!(bound.results.iter().all(|bound| code(&bound.result) == Code::Ok), "{bound:?}");
    for user in 1..=300 {
        match user % 10 {
            1 => _ = node.set(set_status(user, Shown::Busy)).await,
            2 => _ = node.set(set_status(user, Shown::Invisible)).await,
            7 => _ = node.set(set_idle(user, PHONE, true)).await,
            _ => {}
        }
    }
}

/// The users whom `condition` on routes, lives and users selects.
async fn selected(db: &TestDb, condition: &str) -> BTreeSet<i64> {
    let sql = format!(
        "SELECT DISTINCT r.user_id FROM routes r JOIN lives l ON l.epoch = r.epoch JOIN users u ON u.user_id = r.user_id \
         WHERE l.alive = 1 AND {condition}"
    );
    let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut db.connect().await).await.expect("rows");
    rows.iter().map(|row| row.try_get(0).expect("a user")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_who_is_online_is_what_sql_says_with_each_filter_and_page() {
    each_engine(UNHURRIED, async |cluster| {
        let (node, db) = (cluster.node(), &cluster.db);
        a_crowd(node).await;
        let all_idle = "(SELECT MIN(i.idle) FROM routes i WHERE i.user_id = r.user_id) = 1";
        let away = format!("(u.status = 2 OR u.status = 1 AND {all_idle})");
        let online = format!("u.status = 1 AND NOT {all_idle}");
        let default = pb::ListOnlineReq::default;
        let gateway = |n: u32| format!("gw-{n}:7000");
        let exactly = |word: &str| match db.url.starts_with("mysql") {
            true => format!("BINARY l.region = '{word}'"),
            false => format!("l.region = '{word}'"),
        };
        for (request, condition) in [
            (default(), "1 = 1".to_owned()),
            (pb::ListOnlineReq { gateway_addr: gateway(2), ..default() }, "l.gateway_addr = 'gw-2:7000'".to_owned()),
            (pb::ListOnlineReq { gateway_addr: gateway(9), ..default() }, "1 = 0".to_owned()),
            (pb::ListOnlineReq { region: "eu".to_owned(), ..default() }, exactly("eu")),
            (pb::ListOnlineReq { region: "EU".to_owned(), ..default() }, exactly("EU")),
            (pb::ListOnlineReq { platform: Platform::Web.into(), ..default() }, "r.platform = 6".to_owned()),
            (pb::ListOnlineReq { status: Shown::Busy.into(), ..default() }, "u.status = 3".to_owned()),
            (pb::ListOnlineReq { status: Shown::Invisible.into(), ..default() }, "u.status = 4".to_owned()),
            (pb::ListOnlineReq { status: Shown::Away.into(), ..default() }, away),
            (pb::ListOnlineReq { status: Shown::Online.into(), ..default() }, online),
            (
                pb::ListOnlineReq {
                    region: "eu".to_owned(),
                    gateway_addr: gateway(2),
                    platform: Platform::Web.into(),
                    status: Shown::Busy.into(),
                    ..default()
                },
                format!("{} AND l.gateway_addr = 'gw-2:7000' AND r.platform = 6 AND u.status = 3", exactly("eu")),
            ),
        ] {
            let expected = selected(db, &condition).await;
            assert_eq!(expected.is_empty(), condition == "1 = 0", "{condition} tells something");
            for page_size in [1, 7, 0, 1_000] {
                let users = node.list(pb::ListOnlineReq { page_size, ..request.clone() }).await;
                let ids: Vec<i64> = users.iter().map(|user| user.user_id).collect();
                assert_eq!(ids, expected.iter().copied().collect::<Vec<_>>(), "{request:?}");
            }
        }
        let users = node.list(default()).await;
        let of = |user: usize| &users[user - 1];
        assert_eq!((of(2).shown(), of(2).wanted()), (Shown::Offline, Shown::Invisible));
        assert_eq!((of(7).shown(), of(7).wanted(), of(3).routes.len()), (Shown::Away, Shown::Online, 2));
        assert!(users.iter().all(|user| user.routes.iter().all(|route| route.state() == pb::RouteState::Live)), "{users:?}");
        assert!(of(1).status_since_ms > 0);
        // A life that is over takes its users out of the list before anybody has removed their routes.
        db.another_sweeps().await;
        let epoch = node.list_gateways(false).await.lives.iter().find(|life| life.gateway_addr == gateway(4)).expect("it").epoch;
        assert_eq!(node.deregister(&gateway(4), epoch).await, Code::Ok);
        let left: Vec<i64> = node.list(default()).await.iter().map(|user| user.user_id).collect();
        assert_eq!(left, selected(db, "1 = 1").await.into_iter().collect::<Vec<_>>());
        assert!(left.len() < 300);
        let counts = node.count(CountBy::Gateway).await;
        assert_eq!(counts.users, left.len() as u64, "{counts:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_region_is_walked_by_user_also_if_each_gateway_has_users_of_its_own() {
    const BLOCK: i64 = 40;
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let node = cluster.node();
    for n in 0..5 {
        let addr = format!("gw-{n}:7000");
        let request = RegisterGatewayReq { gateway_addr: addr.clone(), region: "eu".to_owned(), ..Default::default() };
        node.gateways().register_gateway(request).await.expect("a registration");
        node.bind_all(n * BLOCK + 1..=(n + 1) * BLOCK, &addr, 0).await;
    }
    for page_size in [1, 40, 100, 1_000] {
        let users = node.list(pb::ListOnlineReq { region: "eu".to_owned(), page_size, ..Default::default() }).await;
        let users: Vec<i64> = users.iter().map(|user| user.user_id).collect();
        assert_eq!(users, (1..=5 * BLOCK).collect::<Vec<_>>(), "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_by_many_gateways_reads_no_more_than_it_may_and_says_that_there_is_more() {
    const GATEWAYS: i64 = 100;
    const BLOCK: i64 = 60;
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let node = cluster.node();
    for n in 0..GATEWAYS {
        let addr = format!("gw-{n}:7000");
        let request = RegisterGatewayReq { gateway_addr: addr.clone(), region: "eu".to_owned(), ..Default::default() };
        node.gateways().register_gateway(request).await.expect("a registration");
        node.bind_all(n * BLOCK + 1..=(n + 1) * BLOCK, &addr, 0).await;
    }
    // Of 20,000 routes each step reads some on each gateway, and gets on by those of one.
    let busy = pb::ListOnlineReq { region: "eu".to_owned(), status: Shown::Busy.into(), ..Default::default() };
    let page = node.page(&busy).await;
    let reached: i64 = page.next_page_token.parse().expect("there are more");
    assert!(page.users.is_empty() && (1..GATEWAYS * BLOCK / 4).contains(&reached), "{page:?}");
    assert!(node.list(busy).await.is_empty());
    let users = node.list(pb::ListOnlineReq { region: "eu".to_owned(), page_size: 1_000, ..Default::default() }).await;
    let users: Vec<i64> = users.iter().map(|user| user.user_id).collect();
    assert_eq!(users, (1..=GATEWAYS * BLOCK).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stays_is_listed_once_however_many_come_and_go_meanwhile() {
    let cluster = Cluster::mariadb(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    for addr in [GATEWAY, OTHER_GATEWAY] {
        let request = RegisterGatewayReq { gateway_addr: addr.to_owned(), region: "eu".to_owned(), ..Default::default() };
        one.gateways().register_gateway(request).await.expect("a registration");
    }
    // Odd users stay; some of them go on binding anew, from one gateway to the other. Even ones come and go.
    let stays: Vec<i64> = (1..400).step_by(2).collect();
    one.bind_all(stays.iter().copied(), GATEWAY, 0).await;
    let churn = async {
        for round in 0_i64.. {
            let to = [GATEWAY, OTHER_GATEWAY][round as usize % 2];
            let user = round * 37 % 200 * 2 + 1;
            two.bind(on(to, 0, a_bind(user, PHONE, &format!("r-{round}")))).await;
            let guest = round * 61 % 200 * 2 + 2;
            two.bind(on(to, 0, a_bind(guest, PHONE, "c"))).await;
            let gone = (round + 7) * 61 % 200 * 2 + 2;
            let unbind = pb::UnbindRouteReq {
                user_id: gone,
                device_id: PHONE.to_owned(),
                gateway_addr: to.to_owned(),
                ..Default::default()
            };
            two.unbind(unbind).await;
        }
    };
    let walks = async {
        for (page_size, region) in [(3, ""), (10, "eu"), (50, ""), (7, "eu"), (100, "eu")] {
            let request = pb::ListOnlineReq { page_size, region: region.to_owned(), ..Default::default() };
            let listed: Vec<i64> = one.list(request).await.iter().map(|user| user.user_id).collect();
            let distinct: BTreeSet<i64> = listed.iter().copied().collect();
            assert_eq!(distinct.len(), listed.len(), "nobody twice: {listed:?}");
            let missed: Vec<_> = stays.iter().filter(|user| !distinct.contains(user)).collect();
            assert!(missed.is_empty(), "missed {missed:?}");
        }
    };
    tokio::select! {
        () = churn => {}
        () = walks => {}
    }
}

fn named(counts: &pb::CountOnlineResp) -> Vec<(&str, u64)> {
    let mut named: Vec<_> = counts.counts.iter().map(|count| (count.name.as_str(), count.users)).collect();
    named.sort_unstable();
    named
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_are_counted_by_gateway_now_and_by_anything_else_once_a_minute() {
    each_engine(UNHURRIED, async |cluster| {
        let (node, db) = (cluster.node(), &cluster.db);
        let first = async || code(&node.count(CountBy::Status).await.result) == Code::Ok;
        eventually("the first count", SOON, first).await;
        assert_eq!(node.count(CountBy::Unspecified).await.users, 0);
        a_crowd(node).await;
        // Nobody has heard of the gateway that this one is on.
        db.run("INSERT INTO users (user_id, version) VALUES (999, 1)").await;
        let columns = "conn_id, connected_at_ms, client_ip, client_port, bound_version, bound_at_ms";
        db.run(&format!(
            "INSERT INTO routes (user_id, device_id, platform, epoch, {columns}) \
             SELECT 999, device_id, platform, 999999, {columns} FROM routes WHERE user_id = 1"
        ))
        .await;
        let number = async |condition: &str| selected(db, condition).await.len() as u64;
        let by_gateway = node.count(CountBy::Gateway).await;
        let mut expected = Vec::new();
        for n in 1..=4 {
            expected.push((format!("gw-{n}:7000"), number(&format!("l.gateway_addr = 'gw-{n}:7000'")).await));
        }
        let expected: Vec<_> = expected.iter().map(|(name, users)| (name.as_str(), *users)).collect();
        assert_eq!((named(&by_gateway), by_gateway.users), (expected, 300));
        assert!(by_gateway.counts.iter().map(|count| count.users).sum::<u64>() > 300, "who has two devices counts twice");
        assert_eq!(node.count(CountBy::Unspecified).await.users, 0, "not counted again yet");

        db.run("UPDATE census SET at_ms = at_ms - 60000").await;
        let counted = async || node.count(CountBy::Unspecified).await.users == 300;
        eventually("a minute later", Duration::from_secs(10), counted).await;
        let platforms = node.count(CountBy::Platform).await;
        assert_eq!(named(&platforms), [("android", 150), ("ios", 150), ("web", 100)]);
        assert!(platforms.users == 300 && platforms.age_ms < 60_000, "{platforms:?}");
        let statuses = node.count(CountBy::Status).await;
        let of = |status: Shown| pb::ListOnlineReq { status: status.into(), ..Default::default() };
        for (word, status) in
            [("online", Shown::Online), ("busy", Shown::Busy), ("away", Shown::Away), ("invisible", Shown::Invisible)]
        {
            let listed = node.list(of(status)).await.len() as u64;
            assert!(named(&statuses).contains(&(word, listed)), "{word} {listed}: {statuses:?}");
        }
        let regions = node.count(CountBy::Region).await;
        let eu = node.list(pb::ListOnlineReq { region: "eu".to_owned(), ..Default::default() }).await.len() as u64;
        assert!(named(&regions).contains(&("eu", eu)) && named(&regions).len() == 3, "{regions:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_count_that_took_long_is_there_for_whoever_asks_again() {
    const OF_A_LIFE: &str = "AS users";
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::mariadb(1, UNHURRIED).await;
    cluster.add_node_through(&proxy, &[UNHURRIED, &[("STORE__TIMEOUT", "60000")]].concat()).await;
    let node = &cluster.nodes[1];
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let ask = || {
        let mut operator = node.operator();
        let request = pb::CountOnlineReq { by: CountBy::Gateway.into() };
        tokio::spawn(async move { operator.count_online(request).await.expect("a count").into_inner() })
    };
    let is_kept = async || {
        let kept = tokio::time::timeout(SOON, ask()).await.expect("it is not counted again").expect("it ran");
        assert_eq!((kept.users, named(&kept)), (1, vec![(GATEWAY, 1)]));
    };

    // It takes longer than a count is kept.
    proxy.hold_answers(Kind::Reader, OF_A_LIFE);
    let asked = ask();
    proxy.struck().await;
    tokio::time::sleep(COUNT_KEPT).await;
    proxy.hold_answers(Kind::Reader, OF_A_LIFE); // this one goes on, the next would not
    let counted = asked.await.expect("it ran");
    assert!(Duration::from_millis(counted.age_ms.into()) >= COUNT_KEPT, "as old as when it began: {counted:?}");
    is_kept().await;

    // Its caller goes away.
    tokio::time::sleep(COUNT_KEPT).await;
    proxy.hold_answers(Kind::Reader, OF_A_LIFE);
    let asked = ask();
    proxy.struck().await;
    asked.abort();
    assert!(asked.await.is_err());
    proxy.hold_answers(Kind::Reader, OF_A_LIFE);
    is_kept().await;
    proxy.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_one_counts_and_the_other_reads_what_it_found() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let censuses = async || cluster.nodes[0].metric(CENSUSES).await + cluster.nodes[1].metric(CENSUSES).await;
    const CENSUSES: &str = "im_presence_censuses_total";
    eventually("the first", SOON, async || censuses().await == 1.0).await;
    for round in 2..=4 {
        cluster.nodes[round % 2].bind(a_bind(round as i64, PHONE, "c")).await;
        cluster.db.run("UPDATE census SET at_ms = at_ms - 60000").await;
        eventually("the next", Duration::from_secs(15), async || censuses().await >= round as f64).await;
        let users =
            [cluster.nodes[0].count(CountBy::Unspecified).await.users, cluster.nodes[1].count(CountBy::Unspecified).await.users];
        assert_eq!(users, [round as u64 - 1; 2]);
        assert_eq!(censuses().await, round as f64, "nobody else has counted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preview_says_what_the_policy_then_really_costs() {
    const USERS: i64 = 60;
    let mut cluster = Cluster::mariadb(1, &[("ROUTE__MAX_DEVICES", "10")]).await;
    let devices = |user: i64| 1 + user % 6;
    let platform = |device: i64| [Platform::Ios, Platform::Android, Platform::Web][device as usize % 3];
    let bind = |user: i64, device: i64, conn: &str| BindRouteReq {
        platform: platform(device).into(),
        connected_ms_ago: 1 + (10 - device as u32) * 1_000,
        ..a_bind(user, &format!("d-{device}"), conn)
    };
    for user in 1..=USERS {
        for device in 0..devices(user) {
            cluster.node().bind(bind(user, device, "c1")).await;
        }
    }
    let all = cluster.db.number("SELECT COUNT(*) FROM routes").await;
    let policy = pb::PreviewPolicyReq { max_devices: 3, per_platform: 1 };
    let preview = async |request| cluster.node().operator().preview_policy(request).await.expect("a preview").into_inner();
    let told = preview(policy).await;
    assert_eq!((code(&told.result), told.users_seen, told.share_seen), (Code::Ok, USERS as u64, 1.0), "{told:?}");
    let losers: Vec<i64> = (1..=USERS).filter(|user| devices(*user) > 3).collect();
    assert_eq!((told.users, &told.examples[..]), (losers.len() as u64, &losers[..20]), "{told:?}");
    assert_eq!(preview(pb::PreviewPolicyReq::default()).await.routes, 0, "without limits nobody goes");
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes").await, all, "it was only a preview");

    cluster.nodes[0].restart_with(&[("ROUTE__MAX_DEVICES", "3"), ("ROUTE__PER_PLATFORM", "1")]).await;
    for user in 1..=USERS {
        for device in 0..devices(user) {
            let answer = cluster.node().try_bind(bind(user, device, "c2")).await.expect("an answer");
            assert!(matches!(code(&answer.result), Code::Ok | Code::Refused), "{answer:?}");
        }
    }
    let left = cluster.db.number("SELECT COUNT(*) FROM routes").await;
    assert_eq!(told.routes, (all - left) as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_top_list_finds_who_flaps_and_who_is_watched() {
    let cluster = Cluster::mariadb(1, UNHURRIED).await;
    let node = cluster.node();
    let (_stream, _) = RawStream::attach(node, "gw-9:7000", 0).await;
    node.bind_all(1..=300, GATEWAY, 0).await;
    const FLAPS: i64 = 77;
    for round in 0..25 {
        node.bind(on(OTHER_GATEWAY, 0, a_bind(FLAPS, PHONE, &format!("r-{round}")))).await;
    }
    let changes = async || {
        let top = node.top(TopBy::Changes).await;
        top.first().is_some_and(|first| (first.name.as_str(), first.value, first.error) == ("77", 26, 0))
    };
    eventually("it is found", SOON, changes).await;
    let gateways = async || {
        let top: Vec<_> = node.top(TopBy::Gateways).await.into_iter().map(|item| (item.name, item.value)).collect();
        top == [(GATEWAY.to_owned(), 300), (OTHER_GATEWAY.to_owned(), 25)]
    };
    eventually("binds of both", SOON, gateways).await;
    let mut watches = Vec::new();
    for users in [&[ALICE, BOB][..], &[BOB], &[BOB, CAROL, ALICE]] {
        watches.push(Watcher::of(node, users.iter().copied()).await);
    }
    let watched: Vec<_> = node.top(TopBy::Watched).await.into_iter().map(|item| (item.name, item.value)).collect();
    assert_eq!(watched, [("2", 3), ("1", 2), ("3", 1)].map(|(name, value)| (name.to_owned(), value)));
    let streams = node.top(TopBy::Streams).await;
    assert_eq!(streams.iter().map(|item| item.name.as_str()).collect::<Vec<_>>(), ["gw-9:7000"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_does_all_this_from_a_shell() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let ctl = |words: &str| {
        let (exit, text) = node.ctl(&words.split(' ').collect::<Vec<_>>());
        println!("{words}\n{text}");
        (exit, text)
    };
    node.bind(BindRouteReq { platform: Platform::Ios.into(), ..a_bind(ALICE, PHONE, "c") }).await;
    node.bind(a_bind(ALICE, LAPTOP, "c")).await;
    node.bind(a_bind(BOB, PHONE, "c")).await;
    let has = |(exit, text): (i32, String), want: i32, part: &str| assert!(exit == want && text.contains(part), "{exit}: {text}");
    has(ctl("online"), 0, "2 users");
    has(ctl("online --platform ios"), 0, "phone");
    has(ctl("online --json --limit 1"), 0, "\"user_id\":\"1\"");
    has(ctl("online --gateway nowhere:1"), 0, "nobody");
    has(ctl("count --by gateway"), 0, GATEWAY);
    eventually("counted", SOON, async || ctl("count").0 == 0).await;
    has(ctl("kick 1 laptop --dry-run"), 0, "would");
    has(ctl("kick 1 laptop --reason test"), 0, "laptop");
    has(ctl("kick 1 laptop"), 3, "NOT_FOUND");
    has(ctl("offline 1 --dry-run"), 0, "no ban would be on");
    has(ctl("offline 1 --ban 60 --dry-run"), 0, "would be banned until");
    has(ctl("online --limit 0"), 2, "");
    has(ctl("offline 1 --ban 3600 --reason spam"), 0, "banned until");
    has(ctl("bind 1 gw-1:7000 --device phone"), 3, "banned until");
    has(ctl("offline 1 --lift"), 0, "no ban");
    has(ctl("preview-policy --max-devices 1"), 0, "0 users");
    has(ctl("preview-policy --max-devices 1 --json"), 0, "\"share_seen\":1.0");
    eventually("shown", SOON, async || ctl("top changes").1.contains("USER")).await;
    has(ctl("top streams"), 0, "nothing");
}

/// How long `work` takes at best.
async fn fastest(times: usize, mut work: impl AsyncFnMut()) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..times {
        let began = std::time::Instant::now();
        work().await;
        best = best.min(began.elapsed());
    }
    best
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_at_the_end_of_a_million_is_as_fast_as_the_first() {
    let users: i64 = if long() { 1_000_000 } else { 20_000 };
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, UNHURRIED).await;
    let node = cluster.node();
    let mut epochs = Vec::new();
    for n in 0..10 {
        let request = RegisterGatewayReq { gateway_addr: format!("gw-{n}:7000"), region: "eu".to_owned(), ..Default::default() };
        epochs.push(node.gateways().register_gateway(request).await.expect("a registration").into_inner().gateway_epoch);
    }
    cluster.db.run(&format!("INSERT INTO users (user_id, version) SELECT seq, 1 FROM seq_1_to_{users}")).await;
    let epoch = |n: usize| epochs[n];
    let case: String = (0..10).map(|n| format!(" WHEN {n} THEN {}", epoch(n))).collect();
    cluster
        .db
        .run(&format!(
            "INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, \
             bound_version, bound_at_ms) SELECT seq, 'phone', seq % 3 + 1, CASE seq % 10{case} END, CONCAT('c-', seq), 1, \
             '10.0.0.1', 1, seq, 1 FROM seq_1_to_{users}"
        ))
        .await;
    let page = |after: i64, region: &str| pb::ListOnlineReq {
        page_token: if after == 0 { String::new() } else { after.to_string() },
        region: region.to_owned(),
        ..Default::default()
    };
    for region in ["", "eu"] {
        let (mut first, mut last) = (Duration::MAX, Duration::MAX);
        for _ in 0..20 {
            first = first.min(fastest(1, async || assert_eq!(node.page(&page(0, region)).await.users.len(), 100)).await);
            last = last.min(fastest(1, async || assert_eq!(node.page(&page(users - 101, region)).await.users.len(), 100)).await);
        }
        println!("{users} users, region {region:?}: first page {first:?}, last {last:?}");
        assert!(last < 2 * first + Duration::from_millis(5), "{last:?} against {first:?}");
    }
    cluster.db.run("UPDATE census SET at_ms = at_ms - 60000").await;
    let began = std::time::Instant::now();
    let all = async || node.count(CountBy::Unspecified).await.users == users as u64;
    eventually("the census", Duration::from_secs(120), all).await;
    println!("{users} users: census found {:?} after it was due", began.elapsed());
    let read = fastest(5, async || assert_eq!(node.count(CountBy::Platform).await.users, users as u64)).await;
    println!("{users} users: the census is read in {read:?}");
    let mut counted = Duration::MAX;
    for _ in 0..if long() { 3 } else { 1 } {
        let count = async || {
            let counts = node.count(CountBy::Gateway).await;
            assert_eq!((counts.users, counts.counts.len()), (users as u64, 10), "{counts:?}");
        };
        counted = counted.min(fastest(1, count).await);
        if long() {
            tokio::time::sleep(COUNT_KEPT).await;
        }
    }
    println!("{users} users counted by gateway in {counted:?}");
    if long() {
        assert!(counted < Duration::from_secs(1) && read < Duration::from_secs(1), "{counted:?} {read:?}");
    }
}
