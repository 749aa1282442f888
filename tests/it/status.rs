//! How users want to be seen, and what others are shown.

use std::time::Duration;

use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::Status;
use im_presence::pb::Status::Away;
use im_presence::pb::Status::Busy;
use im_presence::pb::Status::Invisible;
use im_presence::pb::Status::Offline;
use im_presence::pb::Status::Online;
use im_presence::pb::UnbindRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::each_engine;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;
use crate::harness::stream::RawStream;
use crate::harness::stream::bind_frame;
use crate::harness::watcher::Watcher;
use crate::harness::watcher::set_idle;
use crate::harness::watcher::set_status;

const SEEN_ELSEWHERE: Duration = Duration::from_millis(1_500);
const SOON: Duration = Duration::from_secs(5);

fn unbind(device: &str) -> UnbindRouteReq {
    UnbindRouteReq { user_id: ALICE, gateway_addr: GATEWAY.to_owned(), device_id: device.to_owned(), ..Default::default() }
}

async fn cause_of_newest(node: &Node) -> (Status, String) {
    let newest = node.history(ALICE).await.remove(0);
    (newest.shown(), newest.cause)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_shown_follows_from_the_wish_and_the_live_devices_on_every_node() {
    let cluster = Cluster::with_redis(2, &[("STATUS__RATE", "0")]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let shown = async |want: Status| {
        let wants = format!("Alice is {want:?}");
        eventually(&wants, SEEN_ELSEWHERE, async || {
            let (near, far) = (here.query(ALICE).await, there.query(ALICE).await);
            let many = there.query_all([ALICE]).await.remove(0);
            let key = cluster.cache().client().await.get("user:status:1").await.unwrap_or_default();
            let word = format!("{want:?}").to_lowercase();
            near.status() == want && far.status() == want && many.status() == want && (key == word || want == Offline)
        })
        .await;
    };
    let table = [
        (Online, [Offline, Online, Away]),
        (Away, [Offline, Away, Away]),
        (Busy, [Offline, Busy, Busy]),
        (Invisible, [Offline, Offline, Offline]),
    ];
    for (wanted, [without, active, idle]) in table {
        here.set(set_status(ALICE, wanted)).await;
        shown(without).await;
        there.bind(a_bind(ALICE, PHONE, "c1")).await;
        here.bind(a_bind(ALICE, LAPTOP, "c2")).await;
        shown(active).await;
        here.set(set_idle(ALICE, PHONE, true)).await;
        shown(active).await;
        let set = there.set(set_idle(ALICE, LAPTOP, true)).await;
        assert_eq!(set.shown(), idle);
        shown(idle).await;
        here.set(set_idle(ALICE, PHONE, false)).await;
        shown(active).await;
        here.unbind(unbind(PHONE)).await;
        shown(idle).await;
        there.unbind(unbind(LAPTOP)).await;
        shown(without).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_its_text_and_idleness_are_durable_and_the_same_again_changes_nothing() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let meeting = pb::SetStatusReq { text: Some("im Gespräch 📞".to_owned()), ..set_status(ALICE, Busy) };
        let offline = node.set(meeting.clone()).await;
        assert_eq!(offline.shown(), Offline, "it holds from the next log-in");
        node.bind(pb::BindRouteReq { idle: true, ..a_bind(ALICE, PHONE, "c") }).await;
        let known = node.query_sql(ALICE).await;
        assert_eq!((known.status(), known.status_text.as_str()), (Busy, "im Gespräch 📞"));
        assert!(known.routes[0].idle && known.status_since_ms == known.last_seen_ms, "{known:?}");
        let again = node.set(meeting).await;
        assert_eq!((again.shown(), again.version), (Busy, known.version));
        node.set(pb::SetStatusReq { text: Some(String::new()), user_id: ALICE, ..Default::default() }).await;
        node.unbind(unbind(PHONE)).await;
        let gone = node.query_sql(ALICE).await;
        assert_eq!((gone.status(), gone.status_text.as_str()), (Offline, ""));
        node.bind(a_bind(ALICE, PHONE, "c2")).await;
        let back = node.query_sql(ALICE).await;
        assert_eq!((back.status(), back.routes[0].idle), (Busy, false), "idleness went with the route");
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_wanted_is_refused_by_name_and_changes_nothing() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let before = node.query_sql(ALICE).await;
    let text = |text: &str| pb::SetStatusReq { text: Some(text.to_owned()), ..set_status(ALICE, Busy) };
    let refused = [
        (set_status(ALICE, Offline), "status: OFFLINE cannot be wanted: unbind, or want INVISIBLE"),
        (pb::SetStatusReq { status: 6, ..set_status(ALICE, Busy) }, "status: must be ONLINE, AWAY, BUSY or INVISIBLE"),
        (set_status(0, Busy), "user_id: must be above 0, is 0"),
        (text(&"x".repeat(257)), "text: must be at most 256 bytes, is 257"),
        (text("a\nb"), "text: must have no control characters"),
        (pb::SetStatusReq { user_id: ALICE, ..Default::default() }, "status: must be given, or text, or idle"),
        (
            pb::SetStatusReq { expire_after_s: 31 * 86_400 + 1, ..set_status(ALICE, Busy) },
            "expire_after_s: must be at most 2678400 seconds, is 2678401",
        ),
        (
            pb::SetStatusReq { expire_after_s: 1, ..set_idle(ALICE, PHONE, true) },
            "expire_after_s: must be given with status or text",
        ),
    ];
    for (request, why) in refused {
        let status = node.try_set(request).await.expect_err(why);
        assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, why));
    }
    let no_device = node.try_set(pb::SetStatusReq { idle: Some(true), ..set_status(ALICE, Busy) }).await.expect("an answer");
    assert_eq!(code(&no_device.result), Code::NotFound, "the unnamed device is not there, so Alice is not BUSY either");
    assert_eq!(node.query_sql(ALICE).await.version, before.version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timed_status_ends_by_itself_also_if_the_node_that_took_it_is_gone() {
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let watched = Watcher::of(&cluster.nodes[1], [ALICE]).await;
    cluster.nodes[0].bind(a_bind(ALICE, PHONE, "c")).await;
    let lunch = pb::SetStatusReq { text: Some("lunch".to_owned()), expire_after_s: 3, ..set_status(ALICE, Away) };
    let mut watched = watched;
    watched.shows(ALICE, Online).await;
    cluster.nodes[0].set(lunch.clone()).await;
    let away = watched.shows(ALICE, Away).await;
    assert_eq!(away.status_text, "lunch");
    cluster.nodes[0].kill();
    cluster.nodes[1].set(lunch).await; // the same again lasts for three seconds from now on
    watched.is_silent(Duration::from_secs(2)).await;
    let back = watched.shows(ALICE, Online).await;
    assert_eq!(back.status_text, "");
    assert_eq!(cause_of_newest(&cluster.nodes[1]).await, (Online, "status_ended".to_owned()));
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM users WHERE status_until_ms IS NOT NULL").await, 0);
}

#[tokio::test]
async fn who_changes_their_status_too_often_is_told_when_to_come_again_and_others_are_not() {
    let cluster = Cluster::sqlite(&[("STATUS__BURST", "3"), ("STATUS__RATE", "1")]).await;
    let node = cluster.node();
    for status in [Busy, Away, Busy] {
        node.set(set_status(ALICE, status)).await;
    }
    let refused = node.try_set(set_status(ALICE, Away)).await.expect_err("too often");
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert!(retry_delay(&refused).is_some_and(|delay| delay <= Duration::from_secs(1)), "{refused:?}");
    node.set(set_status(BOB, Busy)).await;
    assert_eq!(node.metric("im_presence_status_refused_total").await, 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_stream_a_gateway_sets_the_status_of_its_own_users_only_and_bad_input_does_not_end_it() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let (mut stream, _) = RawStream::attach(node, "gw-9:7000", 0).await;
    node.bind(a_bind(BOB, PHONE, "c")).await;
    let mut asked = 10;
    let mut sets = async |request: pb::SetStatusReq| {
        asked += 1;
        stream.send(asked, pb::gateway_frame::Body::Status(request)).await;
        let frame = stream.next().await.expect("an answer");
        assert_eq!(frame.seq, asked);
        match frame.body {
            Some(pb::node_frame::Body::Status(set)) => set,
            other => panic!("{other:?}"),
        }
    };
    let stranger = sets(set_status(BOB, Busy)).await;
    assert_eq!(code(&stranger.result), Code::NotFound, "{stranger:?}");
    let long = sets(pb::SetStatusReq { text: Some("x".repeat(300)), ..set_status(ALICE, Busy) }).await;
    assert_eq!(code(&long.result), Code::Invalid, "{long:?}");
    stream.send(1, bind_frame(ALICE, PHONE, "c")).await;
    stream.next().await.expect("it goes on, and the bind is answered");
    stream.send(2, pb::gateway_frame::Body::Status(set_status(ALICE, Busy))).await;
    let set = stream.next().await.expect("an answer");
    assert!(matches!(&set.body, Some(pb::node_frame::Body::Status(set)) if set.shown() == Busy), "{set:?}");
    assert_eq!((node.query_sql(ALICE).await.status(), node.query_sql(BOB).await.status()), (Busy, Online));
}

/// All that others can see of a user, but for versions and routes, which are for services.
async fn seen(node: &Node, user: i64) -> Vec<String> {
    let one = node.query(user).await;
    let many = node.query_all([user]).await.remove(0);
    let request = pb::GetStatusHistoryReq { user_id: user, ..Default::default() };
    let history = node.presence().get_status_history(request).await.expect("a history").into_inner();
    let time = node.online_time(pb::GetOnlineTimeReq { user_id: user, ..Default::default() }).await;
    let mut watcher = Watcher::open(node).await;
    let (told, _) = watcher.ask(&[(user, 0)], &[]).await;
    vec![
        format!("{:?} {} {} {:?}", one.status(), one.is_online, one.last_seen_ms, one.status_text),
        format!("since {}", one.status_since_ms),
        format!("{:?} {} {} {:?}", many.status(), many.is_online, many.last_seen_ms, many.status_text),
        format!("{history:?}"),
        format!("{time:?}"),
        format!("{told:?}"),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hides_looks_like_somebody_who_is_not_there() {
    let cluster = Cluster::with_redis(2, &[("STATUS__RATE", "0")]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let mut statuses = cluster.queue().subscribe(&["presence:status"]).await;
    here.bind(a_bind(ALICE, PHONE, "c1")).await;
    here.unbind(unbind(PHONE)).await;
    here.set(set_status(ALICE, Invisible)).await;
    let soon = Duration::from_secs(5);
    for line in ["1:online", "1:offline"] {
        assert_eq!(statuses.text(soon).await, line);
    }
    let before = (seen(here, ALICE).await, seen(there, ALICE).await);
    assert_eq!(before.0, before.1);
    let mut watcher = Watcher::of(there, [ALICE, BOB]).await;
    for round in 0..10 {
        let conn = format!("c{round}");
        here.bind(pb::BindRouteReq { platform: 1, ..a_bind(ALICE, PHONE, &conn) }).await;
        there.bind(a_bind(ALICE, LAPTOP, &conn)).await;
        here.set(set_idle(ALICE, PHONE, true)).await;
        there.set(pb::SetStatusReq { user_id: ALICE, text: Some(conn), ..Default::default() }).await;
        assert_eq!((seen(here, ALICE).await, seen(there, ALICE).await), before, "while they are there");
        let unseen = here.history(ALICE).await;
        assert!(unseen[0].hidden && unseen[0].shown() == Online, "for themselves: {unseen:?}");
        here.unbind(unbind(PHONE)).await;
        there.unbind(unbind(LAPTOP)).await;
    }
    assert_eq!((seen(here, ALICE).await, seen(there, ALICE).await), before, "and after it");
    watcher.is_silent(Duration::from_secs(3)).await;
    assert_eq!(cluster.cache().client().await.get("user:status:1").await.as_deref(), Some("offline"));
    here.bind(a_bind(BOB, PHONE, "c")).await;
    watcher.shows(BOB, Online).await;
    assert_eq!(statuses.text(soon).await, "2:online", "nothing was said of Alice");
    here.set(set_status(ALICE, Online)).await;
    let after = here.query(ALICE).await;
    assert_eq!(format!("{:?} {}", after.status(), after.last_seen_ms), format!("Offline {}", last_seen(&before.0)));
}

fn last_seen(seen: &[String]) -> &str {
    seen[0].split(' ').nth(2).expect("it is the third word")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_user_was_shown_as_is_written_down_with_its_cause() {
    each_engine(
        &[
            ("GATEWAY__HEARTBEAT_INTERVAL", "300"),
            ("GATEWAY__LEASE", "1000"),
            ("GATEWAY__STREAM_GRACE", "500"),
            ("STATUS__RATE", "0"),
        ],
        async |cluster| {
            let node = cluster.node();
            let epoch = node.register("gw-5:7000").await;
            node.bind(on("gw-5:7000", epoch, a_bind(ALICE, PHONE, "c"))).await;
            node.set(set_idle(ALICE, PHONE, true)).await;
            node.set(set_idle(ALICE, PHONE, false)).await;
            node.set(set_status(ALICE, Busy)).await;
            eventually("its gateway is dead", SOON, async || node.query(ALICE).await.status() == Offline).await;
            let expired = node.history(ALICE).await;
            assert_eq!((expired[0].shown(), expired[0].cause.as_str(), expired[0].devices), (Offline, "expired", 0));
            node.bind(a_bind(ALICE, PHONE, "c")).await;
            node.unbind(unbind(PHONE)).await;
            let told: Vec<_> = node.history(ALICE).await.into_iter().map(|change| (change.shown(), change.cause)).collect();
            let expected = [
                (Offline, "logout"),
                (Busy, "login"),
                (Offline, "expired"),
                (Busy, "set"),
                (Online, "active"),
                (Away, "idle"),
                (Online, "login"),
            ];
            assert_eq!(told, expected.map(|(shown, cause)| (shown, cause.to_owned())));
            let changes = node.history(ALICE).await;
            assert!(
                changes.windows(2).all(|pair| pair[0].version > pair[1].version && pair[0].at_ms >= pair[1].at_ms),
                "{changes:?}"
            );
            assert_eq!(changes[1].gateway_addr, GATEWAY);

            let page = pb::GetStatusHistoryReq { user_id: ALICE, page_size: 3, ..Default::default() };
            let first = node.presence().get_status_history(page.clone()).await.expect("a page").into_inner();
            let next = pb::GetStatusHistoryReq { page_token: first.next_page_token.clone(), page_size: 100, ..page };
            let rest = node.presence().get_status_history(next).await.expect("a page").into_inner();
            assert_eq!((first.changes.len(), rest.changes.len(), rest.next_page_token.as_str()), (3, 4, ""));
            assert_eq!([first.changes, rest.changes].concat(), changes);
            for (request, why) in [
                (
                    pb::GetStatusHistoryReq { user_id: ALICE, page_size: 1_001, ..Default::default() },
                    "page_size: must be at most 1000",
                ),
                (
                    pb::GetStatusHistoryReq { user_id: ALICE, page_token: "x".to_owned(), ..Default::default() },
                    "page_token: must be the",
                ),
            ] {
                let refused = node.presence().get_status_history(request).await.expect_err(why);
                assert!(refused.message().starts_with(why), "{refused:?}");
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_is_in_the_history_once_also_while_it_is_being_written_down() {
    // The same statement: a part of the log.
    const READ_LOG: &str = "ORDER BY version DESC LIMIT";
    const READ_LOG_AGAIN: &str = "FROM status_log WHERE user_id";
    let expected = [(Offline, "expired"), (Online, "login")].map(|(shown, cause)| (shown, cause.to_owned()));
    for reads_before in [1, 2] {
        let proxy = Proxy::start(MariaDb::shared().port).await;
        let mut cluster = Cluster::mariadb(0, &[]).await;
        cluster.add_node_through(&proxy, &[]).await;
        let (node, db) = (cluster.node(), &cluster.db);
        let epoch = node.register(GATEWAY).await;
        node.bind(on(GATEWAY, epoch, a_bind(ALICE, PHONE, "c"))).await;
        db.another_sweeps().await;
        assert_eq!(node.deregister(GATEWAY, epoch).await, Code::Ok);
        let told = async || {
            let changes = node.history(ALICE).await.into_iter();
            changes.map(|change| (change.shown(), change.cause)).collect::<Vec<_>>()
        };
        assert_eq!(told().await, expected, "before it is written down");
        proxy.hold_answers(Kind::Reader, READ_LOG);
        let while_held = async {
            proxy.struck().await;
            if reads_before == 2 {
                proxy.hold_answers(Kind::Reader, READ_LOG_AGAIN);
                proxy.struck().await;
            }
            db.anybody_sweeps().await;
            eventually("it is written down", SOON, async || db.number("SELECT COUNT(*) FROM routes").await == 0).await;
            proxy.release();
        };
        let (meanwhile, ()) = tokio::join!(told(), while_held);
        assert_eq!(meanwhile, expected, "written down after {reads_before} reads");
        assert_eq!(told().await, expected, "after it was written down");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_history_nothing_is_written_down_and_everything_else_works() {
    let cluster = Cluster::sqlite(&[("HISTORY__ENABLED", "false")]).await;
    let node = cluster.node();
    let mut watcher = Watcher::of(node, [ALICE]).await;
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    watcher.shows(ALICE, Online).await;
    node.set(set_status(ALICE, Busy)).await;
    watcher.shows(ALICE, Busy).await;
    node.unbind(unbind(PHONE)).await;
    assert_eq!(node.history(ALICE).await, []);
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM online_days").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forgotten_user_leaves_nothing_behind_but_a_number() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let (mut stream, _) = RawStream::attach(here, "gw-9:7000", 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    here.set(pb::SetStatusReq { text: Some("hello".to_owned()), ..set_status(ALICE, Busy) }).await;
    let stored = pb::DeliverReq {
        user_id: ALICE,
        message: "later".to_owned(),
        store_offline: true,
        device_ids: vec![LAPTOP.to_owned()],
        ..Default::default()
    };
    assert!(here.presence().deliver(stored).await.expect("an answer").into_inner().stored);
    here.unbind(UnbindRouteReq { gateway_addr: "gw-9:7000".to_owned(), ..unbind(PHONE) }).await;
    stream.bind(ALICE, PHONE, "c2").await;
    let mut watcher = Watcher::of(there, [ALICE]).await;
    let rows = async || {
        let of = |table: &str| format!("(SELECT COUNT(*) FROM {table} WHERE user_id = {ALICE})");
        let sum = ["routes", "inbox", "status_log", "online_days"].map(of).join(" + ");
        cluster.db.number(&format!("SELECT {sum}")).await
    };
    let there_were = rows().await;
    assert!(there_were >= 5, "{there_were}");
    let forget = |dry_run| pb::ForgetUserReq { user_id: ALICE, dry_run };
    let dry = there.operator().forget_user(forget(true)).await.expect("an answer").into_inner();
    assert_eq!((dry.rows as i64, rows().await), (there_were, there_were), "nothing has happened");
    let done = there.operator().forget_user(forget(false)).await.expect("an answer").into_inner();
    assert_eq!((code(&done.result), done.rows as i64, rows().await), (Code::Ok, there_were, 0));

    let kick = stream.next().await.expect("its gateway is told");
    assert!(matches!(&kick.body, Some(pb::node_frame::Body::Kick(kick)) if kick.reason() == pb::Reason::Operator), "{kick:?}");
    watcher.shows(ALICE, Offline).await;
    for node in [here, there] {
        eventually("nobody knows more", SEEN_ELSEWHERE, async || {
            let known = node.query(ALICE).await;
            (known.status(), known.last_seen_ms, known.status_since_ms, known.routes.len()) == (Offline, 0, 0, 0)
        })
        .await;
    }
    let redis = cluster.cache().client().await;
    eventually("Redis knows no more", SEEN_ELSEWHERE, async || {
        !redis.has("user:status:1").await && !redis.has("user:route:1").await
    })
    .await;
    let row = "SELECT COUNT(*) FROM users WHERE user_id = 1 AND version > 0 AND last_seen_ms = 0 AND status = 1 \
        AND status_text = '' AND online_since_ms = 0 AND inbox_pending = 0";
    assert_eq!(cluster.db.number(row).await, 1, "only the version stays, for a day");
    here.bind(a_bind(ALICE, PHONE, "c3")).await;
    assert_eq!(watcher.shows(ALICE, Online).await.status_text, "", "they are new");
    let nobody = there.operator().forget_user(pb::ForgetUserReq { user_id: BOB, dry_run: false }).await.expect("an answer");
    assert_eq!(nobody.into_inner().rows, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hides_while_they_are_there_seems_to_log_out_and_who_comes_out_to_log_in() {
    let cluster = Cluster::with_redis(1, &[("STATUS__RATE", "0")]).await;
    let node = cluster.node();
    let mut statuses = cluster.queue().subscribe(&["presence:status"]).await;
    let public = async || {
        let request = pb::GetStatusHistoryReq { user_id: ALICE, ..Default::default() };
        let history = node.presence().get_status_history(request).await.expect("a history").into_inner().changes;
        history.into_iter().map(|change| (change.shown(), change.cause, change.devices)).collect::<Vec<_>>()
    };
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let timed = pb::SetStatusReq { expire_after_s: 2, ..set_status(ALICE, Invisible) };
    node.set(timed).await;
    let hidden = node.query_sql(ALICE).await;
    assert!(hidden.status() == Offline && hidden.last_seen_ms == hidden.status_since_ms && !hidden.routes.is_empty());
    tokio::time::sleep(Duration::from_millis(50)).await;
    node.bind(a_bind(ALICE, LAPTOP, "c")).await;
    let still = node.query_sql(ALICE).await;
    assert_eq!((still.last_seen_ms, still.status_since_ms), (hidden.last_seen_ms, hidden.status_since_ms));
    eventually("it ends", SOON, async || node.query_sql(ALICE).await.status() == Online).await;
    node.unbind(unbind(PHONE)).await;
    node.unbind(unbind(LAPTOP)).await;
    let line = |shown, cause: &str, devices| (shown, cause.to_owned(), devices);
    let expected = [line(Offline, "logout", 0), line(Online, "login", 2), line(Offline, "logout", 0), line(Online, "login", 1)];
    assert_eq!(public().await, expected);
    let true_causes: Vec<_> = node.history(ALICE).await.into_iter().map(|change| (change.cause, change.hidden)).collect();
    assert_eq!(true_causes[2], ("set".to_owned(), true), "{true_causes:?}");
    for line in ["1:online", "1:offline", "1:online", "1:offline"] {
        assert_eq!(statuses.text(SOON).await, line);
    }
    let others = node.online_time(pb::GetOnlineTimeReq { user_id: ALICE, ..Default::default() }).await;
    let own = node.online_time(pb::GetOnlineTimeReq { user_id: ALICE, include_hidden: true, ..Default::default() }).await;
    assert!(others.online_s < own.online_s && own.days[0].hidden_s >= 1, "{others:?} {own:?}");
}
