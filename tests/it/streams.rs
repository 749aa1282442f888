//! Gateways that attach: what their streams carry, how they end, and what becomes of the users on them.

use std::collections::BTreeSet;
use std::collections::HashSet;
use std::io::BufRead;
use std::io::BufReader;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::caller::Caller;
use im_presence::pb;
use im_presence::pb::BatchDeliverReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::NodeFrame;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::node_frame::Body as Down;
use nix::sys::signal::Signal;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code as StatusCode;

use crate::deliver::a_message;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::process;
use crate::harness::redis::Subscriber;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;
use crate::harness::stream::ack_frame;
use crate::harness::stream::bind_frame;
use crate::harness::stream::gateways;
use crate::harness::stream::hello;
use crate::tidy::package;

const SOON: Duration = Duration::from_secs(5);
/// For what has to be seen in a table that each node reads once a second.
const SEEN_ELSEWHERE: Duration = Duration::from_secs(3);

/// Whether the user is online, as SQL has it.
async fn is_online(node: &Node, user: i64) -> bool {
    node.query_sql(user).await.is_online
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rolling_restart_of_all_nodes_takes_nobody_offline_and_loses_no_acknowledged_message() {
    let _turn = heavy().await;
    let users: i64 = if long() { 10_000 } else { 400 };
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let mut told = Vec::new();
    for n in 0..4 {
        told.push(Arc::new(TestGateway::start(&cluster.nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await));
    }
    for (n, gateway) in told.iter().enumerate() {
        gateway.bind_all((1..=users).filter(|user| user % 4 == n as i64)).await;
    }
    let state = async |cluster: &Cluster| {
        let routes = "SELECT COUNT(*) FROM routes";
        let (count, newest) = (cluster.db.number(routes).await, cluster.db.number("SELECT MAX(version) FROM users").await);
        (count, newest, cluster.db.number("SELECT COUNT(*) FROM lives").await)
    };
    let before = state(&cluster).await;
    assert_eq!((before.0, before.2), (users, 4));
    // What was announced of the binds is heard by now, or soon.
    eventually("the binds are shown", SOON, async || cluster.db.number("SELECT COUNT(*) FROM outbox").await == 0).await;
    let mut routes = cluster.queue().subscribe(&["presence:route"]).await;
    while routes.next(Duration::from_secs(1)).await.is_some() {} // two nodes may both have shown a bind

    let (nodes, done) =
        (cluster.nodes.iter().map(|node| node.data.to_string()).collect::<Vec<_>>(), Arc::new(AtomicBool::new(false)));
    let mut senders = JoinSet::new();
    for sender in 0..4_i64 {
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        let caller = Caller::new(&nodes, Duration::from_secs(10)).expect("addresses");
        let done = done.clone();
        senders.spawn(async move {
            let (mut sent, mut undelivered) = (Vec::new(), Vec::new());
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            while !done.load(Ordering::Relaxed) {
                ticks.tick().await;
                let user = 1 + (sent.len() as i64 * 4 + sender) % users;
                let message_id = format!("{sender}/{}", sent.len());
                let request = DeliverReq { message_id: message_id.clone(), ack_timeout_ms: 1_000, ..a_message(user, "m") };
                match caller.deliver(request).await {
                    Ok(answer) if answer.delivered => {}
                    other => undelivered.push(format!("{message_id}: {other:?}")),
                }
                sent.push((user, message_id));
            }
            (sent, undelivered)
        });
    }
    for node in &mut cluster.nodes {
        let began = Instant::now();
        node.terminate();
        assert!(node.ended().await.success());
        println!("stopped in {:?}", began.elapsed());
        node.restart().await;
    }
    done.store(true, Ordering::Relaxed);
    let (mut sent, mut undelivered) = (Vec::new(), Vec::new());
    for (mine, not) in senders.join_all().await {
        sent.extend(mine);
        undelivered.extend(not);
    }
    println!("{} messages, {} not delivered: {undelivered:#?}", sent.len(), undelivered.len());
    let received: HashSet<(i64, String)> =
        told.iter().flat_map(|gateway| gateway.deliveries()).map(|it| (it.user_id, it.message_id)).collect();
    assert!(sent.len() > 20 && undelivered.is_empty(), "everything was acknowledged");
    assert!(sent.iter().all(|it| received.contains(it)), "and acknowledged means received");
    for gateway in &told {
        let epochs = gateway.epochs();
        assert!(epochs.len() >= 2 && epochs.iter().all(|epoch| *epoch == epochs[0]), "the same life: {epochs:?}");
    }
    assert_eq!(state(&cluster).await, before, "no route has changed, no life has begun");
    assert_eq!(routes.next(Duration::from_millis(500)).await, None, "nothing was announced");
    for user in (1..=users).step_by(17) {
        assert!(is_online(&cluster.nodes[0], user).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_node_says_so_and_shortens_no_lease() {
    let mut cluster = Cluster::mariadb(2, &[]).await;
    let (mut stream, epoch) = RawStream::attach(&cluster.nodes[0], GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    let lease = async || cluster.db.number("SELECT MAX(lease_until) FROM lives").await;
    let before = lease().await;
    cluster.nodes[0].terminate();
    match stream.next().await.expect("a last word").body {
        Some(Down::Drain(drain)) => assert_eq!(drain.reason(), pb::Reason::Restart),
        other => panic!("{other:?}"),
    }
    assert_eq!(stream.ended().await.code(), StatusCode::Unavailable);
    let after = lease().await;
    assert!(cluster.nodes[0].ended().await.success());
    assert_eq!(after, before);
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives WHERE attached_node = '' AND alive = 1").await, 1);
    let (_stream, resumed) = RawStream::attach(&cluster.nodes[1], GATEWAY, epoch).await;
    assert_eq!(resumed, epoch);
    assert!(is_online(&cluster.nodes[1], ALICE).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn attached_gateways_need_no_redis() {
    let cluster = Cluster::with_two_redis(2, &[]).await;
    let told = TestGateway::one_each(&cluster, Devices::Acknowledge).await;
    told[0].bind(ALICE, PHONE, "c").await;
    told[1].bind(BOB, PHONE, "c").await;
    let everybody_hears = async |text: &str| {
        for node in &cluster.nodes {
            for user in [ALICE, BOB] {
                let answer = node.deliver(DeliverReq { ack_timeout_ms: 2_000, ..a_message(user, text) }).await;
                assert_eq!((code(&answer.result), answer.attempts <= 2), (Code::Ok, true), "{text}: {answer:?}");
            }
        }
    };
    everybody_hears("with Redis").await;
    for redis in [cluster.cache(), cluster.queue()] {
        redis.stop();
    }
    everybody_hears("both frozen").await;
    for redis in [cluster.cache(), cluster.queue()] {
        redis.kill();
    }
    everybody_hears("both gone").await;
    // So do kicks: a sixth device takes the place of the oldest.
    for n in 0..5 {
        told[1].bind(ALICE, &format!("device-{n}"), "c").await;
    }
    let within = Duration::from_secs(15); // from the outbox
    eventually("the phone is kicked", within, async || told[0].kicks().iter().any(|kick| kick.device_id == PHONE)).await;
    for redis in [cluster.cache(), cluster.queue()] {
        redis.restart();
    }
    let texts: BTreeSet<String> = told.iter().flat_map(|gateway| gateway.texts()).collect();
    assert_eq!(texts.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_devices_that_take_each_others_place_are_kicked_once_each_and_one_remains() {
    const ROUNDS: usize = 50;
    let cluster = Cluster::mariadb(2, &[("ROUTE__MAX_DEVICES", "1")]).await;
    let told: Vec<_> = TestGateway::one_each(&cluster, Devices::Acknowledge).await.into_iter().map(Arc::new).collect();
    let mut devices = JoinSet::new();
    for (gateway, device) in told.iter().zip([PHONE, LAPTOP]) {
        let gateway = gateway.clone();
        devices.spawn(async move {
            let mut answers = Vec::new();
            for n in 0..ROUNDS {
                answers.push(gateway.bind(ALICE, device, &format!("{device}-{n}")).await);
            }
            (device, answers)
        });
    }
    let answers = devices.join_all().await;
    let kicked: Vec<String> = answers
        .iter()
        .flat_map(|(_, answers)| answers)
        .flat_map(|it| it.kicked.iter().map(|route| route.route_key.clone()))
        .collect();
    let bound: usize = answers.iter().map(|(_, answers)| answers.len()).sum();
    assert_eq!(kicked.len(), bound - 1, "each bind but the first removed the route before it");
    let heard = || told.iter().map(|gateway| gateway.kicks().len()).sum::<usize>();
    eventually("the kicks are told", SOON, async || heard() >= kicked.len()).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await; // a repetition would come after a second
    for ((gateway, device), (_, answers)) in told.iter().zip([PHONE, LAPTOP]).zip(sorted(answers)) {
        let mine: HashSet<String> = answers.iter().map(|it| it.route_key.clone()).collect();
        for kick in gateway.kicks() {
            assert!(kick.device_id == device && mine.contains(&kick.route_key), "{} got {kick:?}", gateway.addr);
        }
    }
    let all: HashSet<String> = told.iter().flat_map(|gateway| gateway.kicks()).map(|kick| kick.route_key).collect();
    assert_eq!((heard(), all), (kicked.len(), kicked.into_iter().collect()), "each once, no storm");
    assert_eq!(cluster.node().query_sql(ALICE).await.routes.len(), 1, "one remains");
}

/// By gateway.
fn sorted(mut answers: Vec<(&'static str, Vec<pb::BindRouteResp>)>) -> Vec<(&'static str, Vec<pb::BindRouteResp>)> {
    answers.sort_unstable_by_key(|(device, _)| *device != PHONE);
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kick_reaches_subscribers_too_and_is_repeated_until_somebody_hears_it() {
    let cluster = Cluster::with_two_redis(2, &[("ROUTE__MAX_DEVICES", "1")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let bound = one.bind(a_bind(BOB, PHONE, "c-1")).await;
    let mut subscriber = cluster.queue().subscribe(&["gateway:gw-1:7000"]).await;
    let attached = TestGateway::start(&cluster.nodes[1..], OTHER_GATEWAY, Devices::Acknowledge).await;
    attached.bind(ALICE, LAPTOP, "c-2").await;
    let kick = next_kick(&mut subscriber).await;
    assert_eq!((kick.user_id, kick.device_id.as_str()), (ALICE, PHONE));
    drop(subscriber);
    // Nobody hears this one; the queue goes away, too, and comes back.
    attached.bind(BOB, LAPTOP, "c-2").await;
    let outbox = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await;
    eventually("it was told to nobody", SOON, async || outbox().await == 0).await;
    cluster.queue().kill();
    tokio::time::sleep(Duration::from_millis(1_500)).await; // at least one repetition fails
    cluster.queue().restart();
    let mut subscriber = cluster.queue().subscribe(&["gateway:gw-1:7000"]).await;
    let began = Instant::now();
    while next_kick(&mut subscriber).await.route_key != bound.route_key {
        assert!(began.elapsed() < allowed(SOON), "only others are repeated");
    }
    // From the node to which it is not attached.
    two.bind(pb::BindRouteReq { gateway_addr: "gw-3:7000".to_owned(), ..a_bind(ALICE, PHONE, "c-3") }).await;
    one.bind(pb::BindRouteReq { gateway_addr: "gw-3:7000".to_owned(), ..a_bind(BOB, PHONE, "c-3") }).await;
    eventually("both are told", SOON, async || attached.kicks().len() == 2).await;
}

async fn next_kick(subscriber: &mut Subscriber) -> pb::Kick {
    let (_, body) = subscriber.next(Duration::from_secs(11)).await.expect("a kick");
    match NodeFrame::decode(body.as_slice()).expect("a frame").body {
        Some(Down::Kick(kick)) => kick,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_illegal_frame_ends_the_stream_and_is_named() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let beat = |addr: &str, epoch: u64| {
        Up::Heartbeat(pb::HeartbeatReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch, ..Default::default() })
    };
    let unbind = |user| Up::Unbind(pb::UnbindRouteReq { user_id: user, ..Default::default() });
    let text = |bytes: usize| "x".repeat(bytes);
    let fresh = [
        ("heartbeat", beat("", 0)),
        ("bind", bind_frame(ALICE, PHONE, "c")),
        ("unbind", unbind(ALICE)),
        ("ack", ack_frame("x-1", ALICE, PHONE)),
        ("hello", hello("", 0)),
        ("hello", hello("a b", 0)),
        ("hello", hello(&text(256), 0)),
    ];
    for (name, frame) in fresh {
        let mut stream = RawStream::open(&mut gateways(node)).await;
        stream.send(3, frame.clone()).await;
        is_refused(&mut stream, name, &format!("{frame:.100?}")).await;
    }
    let attached = [
        ("hello", hello(GATEWAY, 0)),
        ("heartbeat", beat(OTHER_GATEWAY, 0)),
        ("heartbeat", beat("", 1)),
        ("bind", bind_frame(0, PHONE, "c")),
        ("bind", bind_frame(ALICE, "a b", "c")),
        ("bind", bind_frame(ALICE, PHONE, &text(129))),
        ("bind", Up::Bind(pb::BindRouteReq { user_id: ALICE, gateway_addr: OTHER_GATEWAY.to_owned(), ..Default::default() })),
        ("bind", Up::Bind(pb::BindRouteReq { user_id: ALICE, gateway_epoch: 1, ..Default::default() })),
        ("unbind", unbind(0)),
        ("ack", ack_frame(&text(1_000), ALICE, PHONE)),
        ("ack", ack_frame("x-1", 0, PHONE)),
        ("ack", ack_frame("x-1", ALICE, "a b")),
    ];
    for (n, (name, frame)) in attached.into_iter().enumerate() {
        let (mut stream, _) = RawStream::attach(node, &format!("gw-{n}:7000"), 0).await;
        stream.send(3, frame.clone()).await;
        is_refused(&mut stream, name, &format!("{frame:.100?}")).await;
    }
    let (mut stream, _) = RawStream::attach(node, "gw-empty:7000", 0).await;
    stream.send_frame(pb::GatewayFrame { seq: 3, body: None }).await;
    is_refused(&mut stream, "empty", "no body").await;
    let (mut stream, _) = RawStream::attach(node, "gw-large:7000", 0).await;
    stream.send(3, bind_frame(ALICE, PHONE, &text(4 * 1024 * 1024))).await;
    let status = stream.ended().await;
    assert_eq!(status.code(), StatusCode::OutOfRange, "as every request above 4 MiB: {status:?}");
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes").await, 0);
}

async fn is_refused(stream: &mut RawStream, name: &str, frame: &str) {
    let status = stream.ended().await;
    assert_eq!(status.code(), StatusCode::InvalidArgument, "{frame}: {status:?}");
    assert!(status.message().contains(name) && status.message().contains('3'), "{frame}: {status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_life_that_is_over_is_fenced_and_the_stream_may_begin_a_new_one() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut first, epoch) = RawStream::attach(one, GATEWAY, 0).await;
    first.bind(ALICE, PHONE, "c").await;
    let over = pb::DeregisterGatewayReq { gateway_addr: GATEWAY.to_owned(), gateway_epoch: epoch };
    gateways(two).deregister_gateway(over).await.expect("deregistered");
    assert_eq!(first.ended().await.code(), StatusCode::Aborted, "though another node was told");
    assert!(!is_online(one, ALICE).await);

    let mut stream = RawStream::open(&mut gateways(one)).await;
    stream.send(1, hello(GATEWAY, epoch)).await;
    assert_eq!(code(&stream.welcome().await.result), Code::Fenced);
    stream.send(2, hello(GATEWAY, 0)).await;
    let welcome = stream.welcome().await;
    assert!(code(&welcome.result) == Code::Ok && welcome.gateway_epoch > epoch, "{welcome:?}");
    stream.bind(ALICE, PHONE, "c").await;

    let (mut usurper, _) = RawStream::attach(two, GATEWAY, 0).await;
    assert_eq!(stream.ended().await.code(), StatusCode::Aborted);
    let mut late = RawStream::open(&mut gateways(one)).await;
    late.send(1, hello(GATEWAY, welcome.gateway_epoch)).await;
    assert_eq!(code(&late.welcome().await.result), Code::Superseded);
    assert!(usurper.is_silent(Duration::from_millis(100)).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_on_another_node_ends_the_older_whose_late_end_shortens_nothing() {
    let cluster = Cluster::mariadb(2, &[("GATEWAY__STREAM_GRACE", "1000")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut older, epoch) = RawStream::attach(one, GATEWAY, 0).await;
    older.bind(ALICE, PHONE, "c").await;
    // The older stream's node stands still, and sees the newer one and the break of the older only afterwards.
    one.stop();
    let (mut newer, again) = RawStream::attach(two, GATEWAY, epoch).await;
    assert_eq!(again, epoch);
    drop(older);
    let lease = async || cluster.db.number("SELECT MAX(lease_until) FROM lives").await;
    let before = lease().await;
    one.cont();
    eventually("it has seen the end", SEEN_ELSEWHERE, async || one.metric("im_presence_streams").await < 0.5).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await; // beyond the grace
    assert!(lease().await >= before);
    for node in &cluster.nodes {
        let answer = node.deliver(a_message(ALICE, "hello")).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
        assert!(matches!(newer.next().await.expect("a delivery").body, Some(Down::Delivery(_))));
    }
    // And with nobody standing still.
    let (mut newest, _) = RawStream::attach(one, GATEWAY, epoch).await;
    assert_eq!(newer.ended().await.code(), StatusCode::Aborted);
    let answer = two.deliver(a_message(ALICE, "hello")).await;
    assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
    assert!(matches!(newest.next().await.expect("a delivery").body, Some(Down::Delivery(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_whose_stream_broke_is_dead_after_the_grace_and_no_other() {
    const GRACE: Duration = Duration::from_secs(3);
    let cluster = Cluster::mariadb(2, &[("GATEWAY__LEASE", "120000")]).await; // far above what the grace is allowed here
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    // Enough others that are heard: one of three is no reason for doubt.
    let others = [
        TestGateway::start(&cluster.nodes, "gw-a:7000", Devices::Acknowledge).await,
        TestGateway::start(&cluster.nodes, "gw-b:7000", Devices::Acknowledge).await,
    ];
    others[0].bind(BOB, PHONE, "c").await;
    let (mut stream, _) = RawStream::attach(one, GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    cluster.db.clock_was_steady().await; // a lease is believed over only where beats were taken for a whole lease
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (mut stream, _) = {
        drop(stream);
        RawStream::attach(one, GATEWAY, 0).await
    };
    stream.bind(ALICE, PHONE, "c").await;
    let began = Instant::now();
    drop(stream);
    let offline = async || !two.query(ALICE).await.is_online;
    eventually("she is offline on the other node", GRACE + SEEN_ELSEWHERE, offline).await;
    let took = began.elapsed();
    println!("offline {took:?} after the stream broke");
    assert!(took >= GRACE - Duration::from_millis(100), "{took:?}");
    assert!(is_online(one, BOB).await);
    assert_eq!(others[0].epochs().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_outlives_a_database_that_stands_still_and_carries_messages_meanwhile() {
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[("STORE__MAX_EVENT_AGE", "1000")]).await;
    let node = cluster.node();
    let gateway = TestGateway::start(&cluster.nodes, OTHER_GATEWAY, Devices::Acknowledge).await;
    gateway.bind(BOB, PHONE, "c").await;
    let (mut stream, _) = RawStream::attach(node, GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    server.stop();
    stream.send(5, bind_frame(CAROL, PHONE, "c")).await;
    let frame = stream.next().await.expect("an answer");
    match (frame.seq, frame.body) {
        (5, Some(Down::Bound(bound))) => {
            assert!(code(&bound.result) == Code::Unavailable && bound.retry_after_ms > 0, "{bound:?}")
        }
        other => panic!("{other:?}"),
    }
    stream.send(6, Up::Heartbeat(pb::HeartbeatReq::default())).await;
    match stream.next().await.expect("an answer").body {
        Some(Down::Heartbeat(answer)) => assert_eq!(code(&answer.result), Code::Unavailable),
        other => panic!("{other:?}"),
    }
    let answer = node.deliver(a_message(ALICE, "hello")).await;
    assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
    assert!(matches!(stream.next().await.expect("a delivery").body, Some(Down::Delivery(_))));
    // The client library beats meanwhile, is told each time that it was not recorded, and stays.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let answer = node.deliver(DeliverReq { ack_timeout_ms: 1_000, ..a_message(BOB, "hello") }).await;
    assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
    server.cont();
    eventually("she is bound again", Duration::from_secs(10), async || {
        stream.send(0, bind_frame(CAROL, PHONE, "c")).await;
        node.try_query(CAROL, None).await.is_ok_and(|answer| answer.is_online)
    })
    .await;
    assert_eq!((gateway.epochs().len(), gateway.detached()), (1, Vec::new()), "one stream through it all");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_does_not_read_delays_nobody_and_what_does_not_fit_is_not_taken() {
    let _turn = heavy().await;
    // The slow one sends no beats either; how long it takes to fill its queue is up to the machine.
    let cluster = Cluster::mariadb(2, &[("ROUTE__MAX_RETRIES", "0"), ("GATEWAY__LEASE", "3600000")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut slow, _) = RawStream::attach(one, GATEWAY, 0).await;
    let quick = TestGateway::start(&cluster.nodes[..1], OTHER_GATEWAY, Devices::Acknowledge).await;
    slow.bind(ALICE, PHONE, "c").await;
    quick.bind(BOB, PHONE, "c").await;
    let large = "x".repeat(1_024);
    let mut taken = 0_u64;
    for n in 0.. {
        let node = [one, two][n % 2];
        let answer = node.deliver(a_message(ALICE, &large)).await;
        match code(&answer.result) {
            Code::Ok => taken += 1,
            Code::Undelivered => break,
            other => panic!("{other:?}: {answer:?}"),
        }
        assert!(n < 20_000, "the queue is bounded");
    }
    println!("{taken} messages were taken before the queue was full");
    assert!(one.series("im_presence_shed_total").await.iter().any(|(labels, n)| labels.contains("stream") && *n > 0.0));
    assert!(one.metric("im_presence_stream_queue_depth").await > 0.0);
    for node in &cluster.nodes {
        let began = Instant::now();
        let answer = node.deliver(DeliverReq { ack_timeout_ms: 1_000, ..a_message(BOB, "hello") }).await;
        assert!(answer.delivered && began.elapsed() < allowed(Duration::from_secs(1)), "{answer:?} after {:?}", began.elapsed());
        let request = BatchDeliverReq { user_ids: vec![ALICE, BOB], message: "to both".to_owned(), ..Default::default() };
        let answer = node.presence().batch_deliver(request).await.expect("an answer").into_inner();
        assert_eq!([answer.users[0].delivered, answer.users[1].delivered], [false, true], "{answer:?}");
    }
    for n in 0..taken {
        match slow.next().await.expect("what was taken").body {
            Some(Down::Delivery(_)) => {}
            other => panic!("message {n}: {other:?}"),
        }
    }
    assert!(slow.is_silent(Duration::from_millis(200)).await, "and nothing else");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_opened_and_dropped_leave_nothing_behind() {
    const GATEWAYS: usize = 10;
    const STREAMS: usize = 50;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let storm = async || {
        let mut client = gateways(node);
        let mut gateways = JoinSet::new();
        for n in 0..GATEWAYS {
            let (mut client, addr) = (client.clone(), format!("gw-{n}:7000"));
            gateways.spawn(async move {
                let mut epoch = 0;
                for n in 0..STREAMS {
                    let mut stream = RawStream::open(&mut client).await;
                    stream.send(1, hello(&addr, epoch)).await;
                    if n % 2 == 0 {
                        epoch = stream.welcome().await.gateway_epoch; // the others do not wait for it
                        stream.send(2, bind_frame(1 + n as i64, PHONE, "c")).await;
                    }
                }
            });
        }
        for _ in 0..GATEWAYS * STREAMS {
            drop(RawStream::open(&mut client).await); // and these never say hello
        }
        gateways.join_all().await;
        let gone = async || node.metric("im_presence_streams").await < 0.5;
        eventually("no stream is left", Duration::from_secs(15), gone).await;
    };
    storm().await;
    let before = node.rss_bytes();
    storm().await;
    let growth = node.rss_bytes().saturating_sub(before);
    println!("{} streams: {} KiB more", 2 * GATEWAYS * STREAMS, growth / 1024);
    assert!(growth < 16 * 1024 * 1024, "{growth} bytes");
    assert!(node.metric("im_presence_stream_queue_depth").await < 0.5);
    node.bind(a_bind(ALICE, PHONE, "c-2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_in_the_terminal_makes_bind_query_and_deliver_work_with_nothing_installed() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let addr = node.data.to_string();
    let command = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_im-presence"));
        command.arg("ctl").args(words).env("IM_PRESENCE_ADDR", &addr).stdin(Stdio::null());
        command
    };
    let ctl = async |words: &[&str]| {
        let mut command = command(words);
        let output = tokio::task::spawn_blocking(move || command.output()).await.expect("the task").expect("run ctl");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let mut gateway = command(&["gateway", GATEWAY, "42", "43"]);
    gateway.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut gateway = process::spawn(gateway).expect("run ctl gateway");
    eventually("43 is bound", SOON, async || is_online(node, 43).await).await;
    let (exit, said) = ctl(&["query", "42"]).await;
    assert!(exit == Some(0) && said.contains(GATEWAY), "{exit:?}: {said}");
    let (exit, said) = ctl(&["deliver", "42", "dinner is ready", "--ack-timeout-ms", "2000"]).await;
    assert_eq!(exit, Some(0), "{said}");
    let mut line = String::new();
    let mut out = BufReader::new(gateway.stdout.take().expect("its output"));
    let line =
        tokio::task::spawn_blocking(move || out.read_line(&mut line).map(|_| line)).await.expect("the task").expect("a line");
    assert!(line.contains("user 42") && line.contains("dinner is ready"), "{line}");
    process::signal(&gateway, Signal::SIGINT);
    let ended = tokio::task::spawn_blocking(move || gateway.wait()).await.expect("the task").expect("it ended");
    assert!(ended.success());
    assert!(!is_online(node, 42).await, "it deregisters");
    let (exit, _) = ctl(&["query", "42"]).await;
    assert_eq!(exit, Some(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_block_of_the_readme_works_when_it_is_pasted() {
    let cluster = Cluster::sqlite(&[]).await;
    let readme = std::fs::read_to_string(package().join("README.md")).expect("README.md");
    let block = readme.split("With the daemon running, in a second terminal:").nth(1).expect("it is there");
    let pasted: Vec<&str> =
        block.lines().skip_while(|line| line.is_empty()).map_while(|line| line.strip_prefix("    ")).collect();
    assert!(pasted.len() > 3, "{pasted:?}");
    let script = format!("shopt -s expand_aliases\n{}\n", pasted.join("\n"));
    let script = script.replace("target/release/im-presence", env!("CARGO_BIN_EXE_im-presence"));
    let mut shell = Command::new("bash");
    shell.args(["-m", "-c", &script]).env("IM_PRESENCE_ADDR", cluster.node().data.to_string()).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || shell.output()).await.expect("the task").expect("run bash");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(3), "offline in the end: {said}");
    assert!(said.contains("is online") && said.contains("gw-1:7000") && said.matches("dinner is ready").count() == 1, "{said}");
    println!("{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_a_dead_gateway_who_come_back_all_at_once_are_all_bound_and_no_query_fails() {
    const GATEWAYS: i64 = 4;
    const TICK: Duration = Duration::from_millis(10);
    let _turn = heavy().await;
    let (users, ticks): (i64, i64) = if long() { (100_000, 1_000) } else { (4_000, 100) };
    let cluster = Cluster::mariadb(2, &[]).await;
    let mut dead = gateways(cluster.node());
    let hello = pb::RegisterGatewayReq { gateway_addr: "gw-dead:7000".to_owned(), ..Default::default() };
    let gateway_epoch = dead.register_gateway(hello).await.expect("registered").into_inner().gateway_epoch;
    for first in (1..=users).step_by(10_000) {
        let bind = |user| pb::BindRouteReq { gateway_addr: "gw-dead:7000".to_owned(), gateway_epoch, ..a_bind(user, PHONE, "c") };
        let binds = (first..(first + 10_000).min(users + 1)).map(bind).collect();
        cluster.node().presence().batch_bind_route(pb::BatchBindRouteReq { binds }).await.expect("binds");
    }
    let mut told = Vec::new();
    for n in 0..GATEWAYS {
        told.push(Arc::new(TestGateway::start(&cluster.nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await));
    }
    let memory = || cluster.nodes.iter().map(Node::rss_bytes).sum::<u64>();
    let (before, done) = (memory(), Arc::new(AtomicBool::new(false)));
    let mut queries = JoinSet::new();
    for node in &cluster.nodes {
        let (mut client, done) = (node.new_connection(), done.clone());
        queries.spawn(async move {
            let mut slowest = Duration::ZERO;
            for n in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let began = Instant::now();
                let query = pb::QueryRouteReq { user_id: 1 + n * 7_919 % users, max_staleness_ms: None };
                client.query_route(query).await.expect("no query fails");
                slowest = slowest.max(began.elapsed());
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            slowest
        });
    }
    let over = pb::DeregisterGatewayReq { gateway_addr: "gw-dead:7000".to_owned(), gateway_epoch };
    dead.deregister_gateway(over).await.expect("deregistered");
    let (began, mut pace, mut binds) = (Instant::now(), tokio::time::interval(TICK), JoinSet::new());
    for tick in 0..ticks {
        pace.tick().await;
        for user in tick * users / ticks + 1..=(tick + 1) * users / ticks {
            let gateway = told[(user % GATEWAYS) as usize].clone();
            binds.spawn(async move { gateway.bind(user, PHONE, &format!("again-{user}")).await });
        }
    }
    let offered = began.elapsed();
    let bound = binds.join_all().await.len() as i64;
    let took = began.elapsed();
    let growth = memory().saturating_sub(before);
    done.store(true, Ordering::Relaxed);
    let slowest = queries.join_all().await.into_iter().max();
    println!("{bound} users offered in {offered:?}, bound after {took:?}; {} MiB more; slowest query {slowest:?}", growth >> 20);
    assert_eq!(bound, users);
    assert!(growth < 256 << 20, "{growth} bytes");
    let stay = "SELECT COUNT(*) FROM routes WHERE epoch IN (SELECT epoch FROM lives WHERE alive = 1)";
    assert_eq!(cluster.db.number(stay).await, users);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_message_to_many_more_users_of_a_gateway_than_its_queue_holds_reaches_all_of_them() {
    const USERS: i64 = 5_000;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, &[]).await;
    let gateway = Arc::new(TestGateway::start(&cluster.nodes[..1], "gw-1:7000", Devices::Acknowledge).await);
    gateway.bind_all(1..=USERS).await;
    for (n, node) in cluster.nodes.iter().enumerate() {
        let request = BatchDeliverReq { user_ids: (1..=USERS).collect(), message: format!("{n}"), ..Default::default() };
        let answer = node.presence().batch_deliver(request).await.expect("a batch").into_inner();
        let missed = answer.users.iter().filter(|user| !user.delivered).count();
        assert_eq!(missed, 0, "through node {n}");
        gateway.hears((n + 1) * USERS as usize).await;
    }
}
