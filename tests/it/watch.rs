//! Who watches users is told what they are shown as: at once, in order, once, and whatever happens to nodes and servers.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::Status::Away;
use im_presence::pb::Status::Busy;
use im_presence::pb::Status::Invisible;
use im_presence::pb::Status::Offline;
use im_presence::pb::Status::Online;
use im_presence::pb::UnbindRouteReq;
use im_presence::pb::watch_resp::Body;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;
use crate::harness::redis_proxy::Fault;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::stream::RawStream;
use crate::harness::watcher::Watcher;
use crate::harness::watcher::code;
use crate::harness::watcher::set_status;

const OFFLINE_DELAY: Duration = Duration::from_secs(2);
/// Hints are missed when the echo of a node's own is: three seconds.
const DEAF_WITHIN: Duration = Duration::from_secs(5);
const MIN_INTERVAL: Duration = Duration::from_millis(500);
/// For the machine.
const ALLOWANCE: Duration = Duration::from_millis(500);
const QUICK: [(&str, &str); 3] =
    [("GATEWAY__HEARTBEAT_INTERVAL", "300"), ("GATEWAY__LEASE", "1000"), ("GATEWAY__STREAM_GRACE", "500")];

fn unbind(user_id: i64, device: &str) -> UnbindRouteReq {
    UnbindRouteReq { user_id, gateway_addr: GATEWAY.to_owned(), device_id: device.to_owned(), ..Default::default() }
}

/// Two nodes; the second one hears through a proxy.
async fn one_hears_through_a_proxy(more: &[(&str, &str)]) -> (Cluster, RedisProxy) {
    let mut cluster = Cluster::with_two_redis(1, more).await;
    let proxy = RedisProxy::start(cluster.queue().port).await;
    let url = proxy.url();
    let all: Vec<_> = more.iter().copied().chain([("REDIS_QUEUE__URL", url.as_str())]).collect();
    cluster.add_node(&all).await;
    (cluster, proxy)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_is_told_what_is_and_then_what_changes_through_any_node() {
    let cluster = Cluster::with_redis(2, &[("STATUS__RATE", "0")]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let bound = here.bind(pb::BindRouteReq { platform: 1, ..a_bind(ALICE, PHONE, "c") }).await;
    let mut watcher = Watcher::open(there).await;
    let (told, done) = watcher.ask(&[(ALICE, 0), (BOB, 0)], &[]).await;
    assert_eq!((code(&done), done.delayed, told.len()), (Code::Ok, false, 2));
    let alice = &watcher.known[&ALICE];
    assert_eq!((alice.status(), alice.is_online, alice.devices, alice.gateway_addr.as_str()), (Online, true, 1, GATEWAY));
    assert_eq!((alice.platforms.as_slice(), alice.version), (&[1][..], bound.version));
    let bob = &watcher.known[&BOB];
    assert_eq!((bob.status(), bob.is_online, bob.devices, bob.last_seen_ms, bob.version), (Offline, false, 0, 0, 0));

    there.bind(pb::BindRouteReq { platform: 6, ..a_bind(ALICE, LAPTOP, "c") }).await;
    let two = watcher.shows(ALICE, Online).await;
    assert_eq!((two.devices, two.platforms.as_slice()), (2, &[1, 6][..]));
    tokio::time::sleep(MIN_INTERVAL).await;
    here.set(pb::SetStatusReq { text: Some("hello".to_owned()), ..set_status(ALICE, Busy) }).await;
    assert_eq!(watcher.shows(ALICE, Busy).await.status_text, "hello");
    watcher.ask(&[], &[ALICE]).await;
    here.set(set_status(ALICE, Away)).await;
    there.bind(a_bind(BOB, PHONE, "c")).await;
    watcher.shows(BOB, Online).await; // and nothing more of Alice
    assert_eq!(there.metric("im_presence_watch_pairs").await, 1.0);
    drop(watcher);
    nothing_is_left_on(there).await;
}

async fn nothing_is_left_on(node: &Node) {
    eventually("nothing is left of the watch", OFFLINE_DELAY, async || {
        let mut sum = 0.0;
        for what in ["pairs", "users", "streams", "dirty"] {
            sum += node.metric(&format!("im_presence_watch_{what}")).await;
        }
        sum == 0.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_at_everybody_ends_with_the_last_watch() {
    let cluster = Cluster::with_redis(1, &[("WATCH__RESYNC_RATE", "100")]).await; // all of them: 50 s
    let watcher = Watcher::of(cluster.node(), 1..=5_000).await;
    cluster.queue().kill();
    let dirty = async || cluster.node().metric("im_presence_watch_dirty").await;
    eventually("everybody has to be looked at", DEAF_WITHIN, async || dirty().await > 1_000.0).await;
    drop(watcher);
    nothing_is_left_on(cluster.node()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn offline_is_told_when_it_has_held_for_a_while_and_everything_else_at_once() {
    let cluster = Cluster::sqlite(&[("STATUS__RATE", "0")]).await;
    let node = cluster.node();
    let mut watcher = Watcher::of(node, [ALICE]).await;
    for page in 0..20 {
        node.bind(a_bind(ALICE, PHONE, &format!("c{page}"))).await;
        node.unbind(unbind(ALICE, PHONE)).await;
    }
    node.bind(a_bind(ALICE, PHONE, "last")).await;
    watcher.shows(ALICE, Online).await;
    watcher.is_silent(OFFLINE_DELAY + ALLOWANCE).await;
    let began = Instant::now();
    node.unbind(unbind(ALICE, PHONE)).await;
    watcher.shows(ALICE, Offline).await;
    assert!(began.elapsed() >= OFFLINE_DELAY, "{:?}", began.elapsed());
    let began = Instant::now();
    for status in [Busy, Away, Busy, Away, Online, Busy] {
        node.set(set_status(ALICE, status)).await;
    }
    node.bind(a_bind(ALICE, PHONE, "again")).await;
    watcher.shows(ALICE, Busy).await;
    assert!(began.elapsed() < allowed(MIN_INTERVAL), "{:?}", began.elapsed());
    for status in [Away, Online, Busy, Away] {
        node.set(set_status(ALICE, status)).await;
    }
    watcher.shows(ALICE, Away).await;
    assert!(began.elapsed() >= MIN_INTERVAL, "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_goes_on_at_another_node_is_told_only_what_has_changed() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    for user in [ALICE, BOB, CAROL] {
        here.bind(a_bind(user, PHONE, "c")).await;
    }
    let watcher = Watcher::of(here, [ALICE, BOB, CAROL]).await;
    let known = watcher.known.clone();
    here.terminate();
    there.set(set_status(BOB, Busy)).await;
    let (mut watcher, told) = watcher.resume(there).await;
    assert_eq!(told.iter().map(|presence| (presence.user_id, presence.status())).collect::<Vec<_>>(), [(BOB, Busy)]);
    assert!(told[0].version > known[&BOB].version);
    // What nobody has written cannot be known: SQL is looked at, and it is told as it is.
    let made_up = [(ALICE, 1 << 60), (BOB, 1), (CAROL, known[&BOB].version)];
    let mut again = Watcher::open(there).await;
    let (told, done) = again.ask(&made_up, &[]).await;
    let mut told: Vec<_> = told.iter().map(|presence| (presence.user_id, presence.status(), presence.version)).collect();
    told.sort_unstable();
    let right = |user: i64, status| (user, status, watcher.known[&user].version);
    let carol = watcher.known[&CAROL].version != known[&BOB].version;
    assert!(carol, "they were bound one after the other");
    assert_eq!((code(&done), told), (Code::Ok, vec![right(ALICE, Online), right(BOB, Busy), right(CAROL, Online)]));
    watcher.is_silent(ALLOWANCE).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_is_refused_by_name_and_what_was_watched_before_goes_on() {
    let limits = [("WATCH__MAX_USERS_PER_STREAM", "10"), ("WATCH__MAX_USERS", "15"), ("WATCH__MAX_STREAMS", "2")];
    let cluster = Cluster::sqlite(&limits).await;
    let node = cluster.node();
    let mut watcher = Watcher::of(node, 1..=8).await;
    let (told, done) = watcher.ask(&[(9, 0), (10, 0), (11, 0), (12, 0)], &[8]).await;
    let why = done.result.as_ref().expect("a result").msg.clone();
    assert!(code(&done) == Code::Refused && told.is_empty() && why.contains("watch.max_users_per_stream"), "{done:?}");
    let (told, done) = watcher.ask(&[(9, 0), (10, 0)], &[]).await;
    assert_eq!((told.len(), code(&done)), (2, Code::Ok), "its removals were done, so there is room for two");
    let mut second = Watcher::open(node).await;
    let many: Vec<_> = (1..=7).map(|user| (user, 0)).collect();
    let (_, done) = second.ask(&many, &[]).await;
    assert!(
        code(&done) == Code::Refused && done.result.as_ref().is_some_and(|it| it.msg.contains("watch.max_users)")),
        "{done:?}"
    );
    let (told, done) = second.ask(&many[..6], &[]).await;
    assert_eq!((told.len(), code(&done)), (6, Code::Ok));
    let (requests, queue) = tokio::sync::mpsc::channel(1);
    let third = node.presence().watch(tokio_stream::wrappers::ReceiverStream::new(queue)).await.expect_err("too many streams");
    assert_eq!(third.code(), tonic::Code::ResourceExhausted, "{third:?}");
    drop(requests);
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    for watcher in [&mut watcher, &mut second] {
        watcher.shows(ALICE, Online).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_makes_no_sense_ends_the_watch_and_says_why() {
    let cluster = Cluster::sqlite(&[]).await;
    let many: Vec<_> = (1..=5_001).map(|user| (user, 0)).collect();
    for (add, remove, why) in [
        (vec![(0, 0)], vec![], "add: must be above 0, is 0"),
        (vec![], vec![-1], "remove: must be above 0, is -1"),
        (many.clone(), vec![], "add: must be at most 5000 users, is 5001"),
        (vec![], (1..=5_001).collect(), "remove: must be at most 5000 users, is 5001"),
    ] {
        let mut watcher = Watcher::open(cluster.node()).await;
        watcher.send(&add, &remove).await;
        let status = watcher.next().await.expect_err("it ends");
        assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, &*format!("seq 1: {why}")));
    }
    let mut largest = Watcher::open(cluster.node()).await;
    let (told, done) = largest.ask(&many[..5_000], &[]).await;
    assert_eq!((told.len(), code(&done)), (5_000, Code::Ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_a_gateway_is_told_and_one_that_goes_on_within_its_grace_is_not() {
    const USERS: i64 = 200;
    let cluster = Cluster::with_redis(2, &QUICK).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let epoch = here.register("gw-5:7000").await;
    here.bind_all(1..=USERS, "gw-5:7000", epoch).await;
    let mut near = Watcher::of(here, 1..=USERS).await;
    let mut far = Watcher::of(there, 1..=USERS).await;
    assert!((1..=USERS).all(|user| far.status(user) == Some(Online)));
    for watcher in [&mut near, &mut far] {
        for _ in 0..USERS {
            assert!(matches!(watcher.next().await, Ok(Body::Presence(told)) if told.status() == Offline));
        }
    }
    let (mut stream, epoch) = RawStream::attach(here, "gw-6:7000", 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    far.shows(ALICE, Online).await;
    near.shows(ALICE, Online).await;
    for turn in 0..5 {
        drop(stream);
        let node = [there, here][turn % 2];
        (stream, _) = RawStream::attach(node, "gw-6:7000", epoch).await;
    }
    let beats = tokio::spawn(async move {
        for seq in 100.. {
            let beat = pb::gateway_frame::Body::Heartbeat(pb::HeartbeatReq::default());
            if !stream.send(seq, beat).await {
                break;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    near.is_silent(OFFLINE_DELAY + ALLOWANCE).await;
    far.is_silent(ALLOWANCE).await;
    beats.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_death_is_told_before_it_is_written_down_also_to_who_is_read_meanwhile() {
    const READ_USER: &str = "FROM users u";
    const MADE_UP: u64 = 1 << 60; // newer than what memory and Redis know: SQL is read
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::with_redis(0, &[]).await;
    cluster.add_node_through(&proxy, &[]).await;
    let node = cluster.node();
    let epoch = node.register(GATEWAY).await;
    node.bind_all([ALICE, BOB], GATEWAY, epoch).await;
    cluster.db.another_sweeps().await;
    let mut watcher = Watcher::of(node, [BOB]).await;
    proxy.hold_answers(Kind::Reader, READ_USER);
    watcher.send(&[(ALICE, MADE_UP)], &[]).await;
    proxy.struck().await;
    assert_eq!(node.deregister(GATEWAY, epoch).await, Code::Ok);
    tokio::time::sleep(ALLOWANCE).await; // the node looks at its dead
    proxy.release();
    while [ALICE, BOB].map(|user| watcher.status(user)) != [Some(Offline); 2] {
        watcher.next().await.expect("a telling");
        assert_ne!(watcher.status(ALICE), Some(Online), "it was read before the death, and is told after it");
    }
    let routes = cluster.db.number("SELECT COUNT(*) FROM routes").await;
    assert_eq!(routes, 2, "nobody has swept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bind_that_commits_on_a_life_that_has_just_ended_leaves_the_watcher_with_what_holds() {
    const TIMES: usize = 20;
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let mut watcher = Watcher::of(there, [ALICE]).await;
    for turn in 0..TIMES {
        let gateway = format!("gw-old-{turn}:7000");
        let old = here.register(&gateway).await;
        here.bind(on(&gateway, old, a_bind(ALICE, PHONE, &format!("old-{turn}")))).await;
        let dies = pb::PurgeGatewaysReq { epochs: vec![old], held: false, ..Default::default() };
        let (mut operator, new) = (there.operator(), on("gw-6:7000", 0, a_bind(ALICE, PHONE, &format!("new-{turn}"))));
        let (purged, bound) = tokio::join!(operator.purge_gateways(dies), async {
            tokio::time::sleep(Duration::from_millis(turn as u64)).await;
            here.try_bind(new).await
        });
        purged.expect("purged");
        bound.expect("bound");
        eventually("she is there", OFFLINE_DELAY, async || there.query(ALICE).await.gateway_addr == "gw-6:7000").await;
    }
    watcher.listen(OFFLINE_DELAY + ALLOWANCE).await;
    let last = &watcher.known[&ALICE];
    assert_eq!((last.status(), last.gateway_addr.as_str()), (Online, "gw-6:7000"), "{last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hints_that_are_lost_repeated_or_overtaken_delay_a_telling_and_lose_none() {
    let _turn = heavy().await;
    let (cluster, proxy) = one_hears_through_a_proxy(&[("STATUS__RATE", "0")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut watcher = Watcher::of(two, [ALICE]).await;
    for (turn, fault) in [Fault::Lost, Fault::Repeated, Fault::Overtaken].repeat(3).into_iter().enumerate() {
        proxy.next_hint_is(fault);
        one.set(set_status(ALICE, [Busy, Away][turn % 2])).await;
        if fault == Fault::Overtaken {
            one.bind(a_bind(BOB, PHONE, &format!("c-{turn}"))).await;
        }
        proxy.struck().await;
        watcher.shows(ALICE, [Busy, Away][turn % 2]).await;
    }
    proxy.swallow();
    eventually("it is deaf", Duration::from_secs(6), async || two.degraded().await == ["hints"]).await;
    for status in [Away, Online, Busy] {
        one.set(set_status(ALICE, status)).await;
        watcher.shows(ALICE, status).await;
    }
    let (_, done) = watcher.ask(&[(BOB, 0)], &[]).await;
    assert!(done.delayed, "it says so");
    proxy.release();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_queue_watchers_are_told_within_seconds() {
    let cluster = Cluster::mariadb(2, &[("STATUS__RATE", "0")]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    here.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut watcher = Watcher::of(there, [ALICE]).await;
    for status in [Busy, Away, Invisible] {
        let began = Instant::now();
        here.set(set_status(ALICE, status)).await;
        watcher.shows(ALICE, if status == Invisible { Offline } else { status }).await;
        println!("{status:?} after {:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_away_what_memory_knows_is_told_and_the_rest_later() {
    let server = crate::harness::mariadb::MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[("STORE__TIMEOUT", "500")]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    node.query(ALICE).await;
    server.stop();
    eventually("it is noticed", Duration::from_secs(10), async || node.degraded().await.contains(&"store".to_owned())).await;
    let mut watcher = Watcher::open(node).await;
    let (told, done) = watcher.ask(&[(ALICE, 0), (BOB, 0)], &[]).await;
    assert_eq!(told.iter().map(|told| (told.user_id, told.status())).collect::<Vec<_>>(), [(ALICE, Online)]);
    assert_eq!((code(&done), done.delayed), (Code::Unavailable, true), "{done:?}");
    server.cont();
    watcher.shows(BOB, Offline).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateways_stream_carries_the_watches_of_its_clients() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = [&cluster.nodes[0], &cluster.nodes[1]];
    let (mut stream, _) = RawStream::attach(here, "gw-9:7000", 0).await;
    let add = vec![pb::KnownUser { user_id: ALICE, version: 0 }];
    stream.send(7, pb::gateway_frame::Body::Watch(pb::WatchReq { seq: 70, add, remove: Vec::new() })).await;
    let mut told = async |seq: u64| {
        let frame = stream.next().await.expect("a telling");
        assert_eq!(frame.seq, seq, "{frame:?}");
        match frame.body {
            Some(pb::node_frame::Body::Watched(pb::WatchResp { body: Some(body) })) => body,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(told(0).await, Body::Presence(alice) if alice.status() == Offline));
    assert!(matches!(told(7).await, Body::Done(done) if done.seq == 70 && code(&done) == Code::Ok));
    there.bind(a_bind(ALICE, PHONE, "c")).await;
    assert!(matches!(told(0).await, Body::Presence(alice) if alice.status() == Online));
}

/// Users change through both nodes, with everything that can befall hints, while a watcher moves from node to node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_the_end_of_a_bad_day_every_watcher_shows_what_sql_says() {
    let _turn = heavy().await;
    let (users, seconds) = if crate::harness::long() { (2_000, 60) } else { (300, 12) };
    let day = Duration::from_secs(seconds);
    let (mut cluster, proxy) = one_hears_through_a_proxy(&[("STATUS__RATE", "0"), QUICK[0], QUICK[1], QUICK[2]]).await;
    for page in 0..3 {
        let third: Vec<_> = (1..=users).filter(|user| user % 3 == page).collect();
        let epoch = cluster.nodes[0].register(&format!("gw-{page}:7000")).await;
        cluster.nodes[0].bind_all(third, &format!("gw-{page}:7000"), epoch).await;
    }
    let mut watcher = Watcher::of(&cluster.nodes[1], 1..=users).await;
    let mut slow = Watcher::of(&cluster.nodes[0], 1..=users).await;
    let changes = change_all_the_time(&cluster, users);
    let (began, mut turn) = (Instant::now(), 0);
    while began.elapsed() < day {
        let fault = [Fault::Lost, Fault::Repeated, Fault::Overtaken][turn % 3];
        proxy.next_hint_is(fault);
        watcher.listen(Duration::from_millis(700)).await;
        if turn % 6 == 5 {
            cluster.queue().kill();
            cluster.queue().restart();
        }
        if turn == 4 || turn == 9 {
            let at = 1 - turn / 5;
            cluster.nodes[at].kill();
            cluster.nodes[at].restart().await;
            if at == 0 {
                slow = Watcher::of(&cluster.nodes[0], 1..=users).await;
            }
            (watcher, _) = watcher.resume(&cluster.nodes[1 - at]).await;
        }
        turn += 1;
    }
    proxy.release();
    drop(changes);
    agrees(&mut watcher, &cluster.nodes[0], users).await;
    agrees(&mut slow, &cluster.nodes[0], users).await;
}

/// Binds, unbinds and statuses of random users, through whichever node answers, until it is dropped.
fn change_all_the_time(cluster: &Cluster, users: i64) -> tokio::task::JoinSet<()> {
    let mut changes = tokio::task::JoinSet::new();
    for writer in 0..4_i64 {
        let clients: Vec<_> = cluster.nodes.iter().map(Node::presence).collect();
        changes.spawn(async move {
            for n in 0.. {
                let user = (n * 7 + writer * 13) % users + 1;
                let mut client = clients[n as usize % clients.len()].clone();
                let _ = match n % 5 {
                    // a node that is away refuses; the next change goes elsewhere
                    0 => client.bind_route(a_bind(user, PHONE, &format!("{writer}-{n}"))).await.map(|_| ()),
                    1 => client.unbind_route(unbind(user, PHONE)).await.map(|_| ()),
                    2 => client.set_status(set_status(user, Busy)).await.map(|_| ()),
                    3 => client.set_status(set_status(user, Invisible)).await.map(|_| ()),
                    _ => client.set_status(set_status(user, Online)).await.map(|_| ()),
                };
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        });
    }
    changes
}

async fn agrees(watcher: &mut Watcher, node: &Node, users: i64) {
    let until = Instant::now() + allowed(Duration::from_secs(10));
    loop {
        watcher.listen(ALLOWANCE).await;
        let mut wrong = Vec::new();
        for user in 1..=users {
            let now = node.query_sql(user).await;
            if watcher.status(user) != Some(now.status()) {
                wrong.push((user, watcher.known.get(&user).cloned(), now));
            }
        }
        if wrong.is_empty() {
            return;
        }
        assert!(Instant::now() < until, "{} are shown wrongly: {:?}", wrong.len(), wrong[0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_node_has_left_behind_is_told_by_the_node_that_repairs_it() {
    let cluster = Cluster::with_redis(1, &[]).await;
    let node = cluster.node();
    let bound = node.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut watcher = Watcher::of(node, [ALICE]).await;
    // As another node commits it, which is killed before it can tell anybody.
    let mut left = im_presence::store::codec::OutboxBody::default();
    left.changes.push(im_presence::store::codec::ChangedUser {
        user_id: ALICE,
        version: bound.version + 64,
        shown_version: None,
    });
    let body: String = prost::Message::encode_to_vec(&left).iter().map(|byte| format!("{byte:02x}")).collect();
    let change = "UPDATE users SET status = 3, version = version + 64, shown_version = version, shown_for = version";
    cluster.db.run(&format!("{change} WHERE user_id = {ALICE}")).await;
    let row = "INSERT INTO outbox (id, node_id, created, body) VALUES ('left', 'dead', UNIX_TIMESTAMP() * 1000 - 3000";
    cluster.db.run(&format!("{row}, X'{body}')")).await;
    watcher.shows(ALICE, Busy).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_requests_may_be_under_way() {
    const REQUESTS: u64 = 1_000;
    let cluster = Cluster::sqlite(&[]).await;
    let mut watcher = Watcher::open(cluster.node()).await;
    let (mut users, mut done) = (0, 0);
    for user in 1..=100 {
        for n in 0..10 {
            watcher.send(&[(user * 10 + n, 0)], &[]).await;
        }
    }
    while done < REQUESTS {
        match watcher.next().await.expect("a telling") {
            Body::Presence(_) => users += 1,
            Body::Done(told) => {
                done += 1;
                assert_eq!((told.seq, code(&told)), (done, Code::Ok), "in their order");
            }
        }
    }
    assert_eq!(users, REQUESTS);
}
