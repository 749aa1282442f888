//! Messages for the gateways that listen on `user:<id>`.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchDeliverReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::DeliverResp;
use im_presence::pb::Delivery;
use im_presence::pb::UnbindRouteReq;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code as StatusCode;
use tonic::Request;
use tonic::Status;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::node::Node;

const HEARD_WITHIN: Duration = Duration::from_secs(2);
const ALICES_CHANNEL: &str = "user:1";

pub fn a_message(user: i64, text: &str) -> DeliverReq {
    DeliverReq { user_id: user, message: text.to_owned(), ..Default::default() }
}

impl Node {
    pub async fn try_deliver(&self, request: DeliverReq) -> Result<DeliverResp, Status> {
        self.presence().deliver(request).await.map(tonic::Response::into_inner)
    }

    pub async fn deliver(&self, request: DeliverReq) -> DeliverResp {
        self.try_deliver(request).await.expect("a delivery")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_arrives_as_it_was_given_whichever_node_was_told_and_receivers_are_counted() {
    let cluster = Cluster::with_redis(2, &[]).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    let mut gateway = cluster.queue().subscribe(&[ALICES_CHANNEL]).await;
    let text = "gr\u{fc}\u{df} dich \u{1f44b}\0\r\n{\"a\": 1}";
    let binary: Vec<u8> = (0..=255).rev().collect();
    for node in &cluster.nodes {
        let answer = node.deliver(a_message(ALICE, text)).await;
        assert_eq!((code(&answer.result), answer.delivered, answer.receivers, answer.attempts), (Code::Ok, true, 1, 1));
        assert!(!answer.delivery_id.is_empty() && answer.timestamp > 1_700_000_000_000 && !answer.stored, "{answer:?}");
        assert_eq!(gateway.next(allowed(HEARD_WITHIN)).await.expect("a message").1, text.as_bytes());

        let payload = binary.clone().into();
        let answer = node.deliver(DeliverReq { user_id: ALICE, payload, ..Default::default() }).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1));
        assert_eq!(gateway.next(allowed(HEARD_WITHIN)).await.expect("a message").1, binary);
    }
    let mut another = cluster.queue().subscribe(&[ALICES_CHANNEL]).await;
    assert_eq!(cluster.node().deliver(a_message(ALICE, "to both")).await.receivers, 2);
    for gateway in [&mut gateway, &mut another] {
        assert_eq!(gateway.text(HEARD_WITHIN).await, "to both");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_was_bound_through_another_node_a_moment_ago_gets_the_message() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    for user in 1..=50 {
        let mut gateway = cluster.queue().subscribe(&[&format!("user:{user}")]).await;
        assert!(!two.query(user).await.is_online, "and now it remembers that");
        one.bind(a_bind(user, PHONE, "c")).await;
        let answer = two.deliver(a_message(user, "hello")).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
        assert_eq!(gateway.text(HEARD_WITHIN).await, "hello");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_is_said_after_the_retries_and_before_the_callers_deadline() {
    let cluster = Cluster::with_redis(1, &[("ROUTE__MAX_RETRIES", "3"), ("ROUTE__RETRY_INTERVAL", "200")]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let began = Instant::now();
    let answer = node.deliver(a_message(ALICE, "hello")).await;
    assert_eq!((code(&answer.result), answer.delivered, answer.receivers), (Code::Undelivered, false, 0), "{answer:?}");
    assert!(answer.attempts > 1 && began.elapsed() >= Duration::from_millis(200), "{answer:?} after {:?}", began.elapsed());
    println!("undelivered after {:?} and {} attempts", began.elapsed(), answer.attempts);
    for limit in [300, 150].map(Duration::from_millis) {
        let mut request = Request::new(a_message(ALICE, "hello"));
        request.set_timeout(limit);
        let began = Instant::now();
        let answer = node.presence().deliver(request).await.expect("an answer, not a deadline that has passed").into_inner();
        assert_eq!(code(&answer.result), Code::Undelivered, "{answer:?}");
        assert!(began.elapsed() < allowed(limit), "{:?} of {limit:?}", began.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_without_a_route_is_not_found_at_once() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let bound = one.bind(a_bind(BOB, PHONE, "c")).await;
    assert!(two.query(BOB).await.is_online);
    one.unbind(UnbindRouteReq { user_id: BOB, route_key: bound.route_key, ..Default::default() }).await;
    for user in [ALICE, BOB] {
        for node in &cluster.nodes {
            let began = Instant::now();
            let answer = node.deliver(a_message(user, "hello")).await;
            assert_eq!((code(&answer.result), answer.delivered), (Code::NotFound, false), "{answer:?}");
            assert!(began.elapsed() < allowed(Duration::from_secs(1)), "it is not tried again: {:?}", began.elapsed());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_comes_during_the_retries_gets_the_message() {
    let cluster = Cluster::with_redis(1, &[("ROUTE__MAX_RETRIES", "20"), ("ROUTE__RETRY_INTERVAL", "250")]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let redis = cluster.queue().client().await;
    let published = async || {
        let calls = redis.run::<String>(&["INFO", "commandstats"]).await;
        let calls = calls.lines().find_map(|line| line.strip_prefix("cmdstat_publish:calls=").map(str::to_owned));
        calls.and_then(|calls| calls.split(',').next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    let before = published().await;
    let mut client = node.presence();
    let call = tokio::spawn(async move { client.deliver(a_message(ALICE, "hello")).await });
    // The first two attempts follow each other at once; the node's own beats count, too.
    eventually("it has been tried", HEARD_WITHIN, async || published().await >= before + 4).await;
    let mut gateway = cluster.queue().subscribe(&[ALICES_CHANNEL]).await;
    let answer = call.await.expect("the task").expect("a delivery").into_inner();
    assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
    assert!(answer.attempts > 1, "{answer:?}");
    assert_eq!(gateway.text(HEARD_WITHIN).await, "hello");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_in_a_hurry_costs_nobody_the_connection_to_the_queue() {
    let cluster = Cluster::with_two_redis(1, &[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let _gateway = cluster.queue().subscribe(&[ALICES_CHANNEL]).await;
    let redis = cluster.queue().client().await;
    let connections = async || {
        let stats = redis.run::<String>(&["INFO", "stats"]).await;
        let made = stats.lines().find_map(|line| line.strip_prefix("total_connections_received:").map(str::to_owned));
        made.and_then(|made| made.parse::<u64>().ok()).expect("a number")
    };
    let before = connections().await;
    for _ in 0..50 {
        let mut request = Request::new(a_message(ALICE, "hello"));
        request.set_timeout(Duration::from_millis(10));
        let _ = node.presence().deliver(request).await; // done in time or not
    }
    assert_eq!(connections().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envelope_says_for_which_devices_the_message_is() {
    let cluster = Cluster::with_redis(1, &[("DELIVERY__PAYLOAD", "envelope")]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut gateway = cluster.queue().subscribe(&[ALICES_CHANNEL]).await;
    let request = DeliverReq {
        message_type: "chat".to_owned(),
        message_id: "m-1".to_owned(),
        device_ids: vec![PHONE.to_owned(), LAPTOP.to_owned()],
        ..a_message(ALICE, "hello")
    };
    let answer = node.deliver(request.clone()).await;
    assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
    let (_, body) = gateway.next(allowed(HEARD_WITHIN)).await.expect("a message");
    let delivery = Delivery::decode(body.as_slice()).expect("a Delivery");
    let expected = Delivery {
        delivery_id: answer.delivery_id,
        user_id: ALICE,
        message: request.message,
        message_type: request.message_type,
        timestamp: answer.timestamp,
        device_ids: request.device_ids,
        message_id: request.message_id,
        ..Default::default()
    };
    assert_eq!(delivery, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_message_is_published_once_and_answered_as_the_first_time() {
    const CALLS: usize = 10;
    let cluster = Cluster::with_redis(1, &[("ROUTE__MAX_RETRIES", "0")]).await;
    let node = cluster.node();
    for user in [ALICE, BOB] {
        node.bind(a_bind(user, PHONE, "c")).await;
    }
    let with_id = |user: i64, id: &str| DeliverReq { message_id: id.to_owned(), ..a_message(user, id) };
    let nobody = node.deliver(with_id(ALICE, "m-1")).await;
    assert_eq!(code(&nobody.result), Code::Undelivered, "{nobody:?}");

    let mut gateway = cluster.queue().subscribe(&[ALICES_CHANNEL, "user:2"]).await;
    let mut calls = JoinSet::new();
    for _ in 0..CALLS {
        let (mut client, request) = (node.presence(), with_id(ALICE, "m-1"));
        calls.spawn(async move { client.deliver(request).await.expect("a delivery").into_inner() });
    }
    let answers = calls.join_all().await;
    assert_eq!((code(&answers[0].result), answers[0].receivers), (Code::Ok, 1), "what was not delivered is no outcome");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(node.deliver(with_id(ALICE, "m-1")).await, answers[0]);
    for (user, id) in [(BOB, "m-1"), (ALICE, "m-2")] {
        let other = node.deliver(with_id(user, id)).await;
        assert_ne!(other.delivery_id, answers[0].delivery_id, "another user, or another message, is no repeat");
    }
    for expected in [(ALICES_CHANNEL, "m-1"), ("user:2", "m-1"), (ALICES_CHANNEL, "m-2")] {
        let (channel, body) = gateway.next(allowed(HEARD_WITHIN)).await.expect("a message");
        assert_eq!((channel.as_str(), body.as_slice()), (expected.0, expected.1.as_bytes()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_message_to_10_000_users_who_were_bound_a_moment_ago_each_gets_the_right_answer() {
    const USERS: i64 = 10_000;
    const BATCH: usize = 2_500;
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[("ROUTE__MAX_RETRIES", "2"), ("ROUTE__RETRY_INTERVAL", "100")]).await;
    let expected = |user: i64| match user % 10 {
        0 => Code::NotFound,
        1 => Code::Undelivered,
        _ => Code::Ok,
    };
    let heard = (1..=USERS).filter(|user| expected(*user) == Code::Ok).map(|user| format!("user:{user}")).collect::<Vec<_>>();
    let mut gateway = cluster.queue().subscribe(&heard.iter().map(String::as_str).collect::<Vec<_>>()).await;
    for (number, users) in (1..=USERS).collect::<Vec<_>>().chunks(BATCH).enumerate() {
        let (here, there) = (&cluster.nodes[number % 2], &cluster.nodes[1 - number % 2]);
        let absent = BatchQueryRouteReq { user_ids: users.to_vec(), ..Default::default() };
        let absent = there.presence().batch_query_route(absent).await.expect("queries").into_inner();
        assert!(absent.users.iter().all(|user| !user.is_online), "and now it remembers that");
        let bound = users.iter().filter(|user| expected(**user) != Code::NotFound);
        let binds = BatchBindRouteReq { binds: bound.map(|user| a_bind(*user, PHONE, "c")).collect() };
        let answer = here.presence().batch_bind_route(binds).await.expect("binds").into_inner();
        assert!(answer.results.iter().all(|bind| code(&bind.result) == Code::Ok));

        // Named twice, a user gets it once.
        let user_ids: Vec<i64> = users.iter().rev().chain(&users[1..3]).copied().collect();
        let request = BatchDeliverReq { user_ids: user_ids.clone(), message: "to all".to_owned(), ..Default::default() };
        let began = Instant::now();
        let answer = there.presence().batch_deliver(request).await.expect("deliveries").into_inner();
        println!("{} users after {:?}", answer.users.len(), began.elapsed());
        assert_eq!(answer.users.iter().map(|user| user.user_id).collect::<Vec<_>>(), user_ids, "in the order asked");
        for user in &answer.users {
            let receivers = u32::from(expected(user.user_id) == Code::Ok);
            let got = (code(&user.result), user.delivered, user.stored, user.receivers);
            assert_eq!(got, (expected(user.user_id), receivers == 1, false, receivers), "{user:?}");
        }
    }
    let mut channels = Vec::new();
    for _ in 0..heard.len() {
        let (channel, body) = gateway.next(allowed(HEARD_WITHIN)).await.expect("a message");
        assert_eq!(body, b"to all");
        channels.push(channel);
    }
    let sorted = |mut names: Vec<String>| {
        names.sort_unstable();
        names
    };
    assert_eq!(sorted(channels), sorted(heard), "each once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_callers_at_once_each_hears_of_its_own_receivers_and_each_message_comes_once() {
    const CALLERS: i64 = 300;
    let cluster = Cluster::with_redis(1, &[("ROUTE__MAX_RETRIES", "0")]).await;
    let node = cluster.node();
    let binds = BatchBindRouteReq { binds: (1..=CALLERS).map(|user| a_bind(user, PHONE, "c")).collect() };
    node.presence().batch_bind_route(binds).await.expect("binds");
    let channels =
        |least: i64| (1..=CALLERS).filter(|user| user % 3 >= least).map(|user| format!("user:{user}")).collect::<Vec<_>>();
    let mut gateways = Vec::new();
    for least in [1, 2] {
        let channels = channels(least);
        let gateway = cluster.queue().subscribe(&channels.iter().map(String::as_str).collect::<Vec<_>>()).await;
        gateways.push((gateway, channels));
    }
    let text = |user: i64| "x".repeat(if user % 10 == 0 { 5_000 } else { 1 }) + &user.to_string(); // some go by themselves
    let mut calls = JoinSet::new();
    for user in 1..=CALLERS {
        let (mut presence, message) = (node.presence(), a_message(user, &text(user)));
        calls.spawn(async move { (user, presence.deliver(message).await.expect("an answer").into_inner()) });
    }
    for (user, answer) in calls.join_all().await {
        assert_eq!(i64::from(answer.receivers), user % 3, "of user {user}: {answer:?}");
    }
    for (mut gateway, mut expected) in gateways {
        let mut heard = Vec::new();
        for _ in 0..expected.len() {
            let (channel, body) = gateway.next(allowed(HEARD_WITHIN)).await.expect("a message");
            assert!(channel["user:".len()..].parse().is_ok_and(|user| text(user).as_bytes() == body), "{channel}");
            heard.push(channel);
        }
        heard.sort_unstable();
        expected.sort_unstable();
        assert_eq!(heard, expected, "each once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_delivered_as_asked_is_refused_with_the_fields_name() {
    const MAX: usize = 100;
    let cluster = Cluster::with_redis(1, &[("DELIVERY__MAX_MESSAGE_BYTES", "100"), ("ROUTE__MAX_RETRIES", "0")]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let hello = a_message(ALICE, "hello");
    let too_much = vec![b'x'; MAX + 1];
    for (field, request) in [
        ("user_id", a_message(0, "hello")),
        ("message", a_message(ALICE, &"x".repeat(MAX + 1))),
        ("payload", DeliverReq { user_id: ALICE, payload: too_much.clone().into(), ..Default::default() }),
        ("payload", DeliverReq { payload: b"both".to_vec().into(), ..hello.clone() }),
        ("device_ids", DeliverReq { device_ids: vec![PHONE.to_owned()], ..hello.clone() }),
        ("message_type", DeliverReq { message_type: "a b".to_owned(), ..hello.clone() }),
        ("message_id", DeliverReq { message_id: "\u{fc}".to_owned(), ..hello.clone() }),
    ] {
        let refused = node.try_deliver(request).await.expect_err(field);
        assert_eq!(refused.code(), StatusCode::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains(field), "{field}: {refused:?}");
    }
    for (field, request) in [
        ("user_ids", BatchDeliverReq { user_ids: vec![ALICE, -1], message: "hello".to_owned(), ..Default::default() }),
        ("user_ids", BatchDeliverReq { user_ids: (1..=10_001).collect(), ..Default::default() }),
        ("payload", BatchDeliverReq { user_ids: vec![ALICE], payload: too_much.into(), ..Default::default() }),
    ] {
        let refused = node.presence().batch_deliver(request).await.expect_err(field);
        assert_eq!(refused.code(), StatusCode::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains(field), "{field}: {refused:?}");
    }
    let just_fits = node.deliver(a_message(ALICE, &"x".repeat(MAX))).await;
    assert_eq!(code(&just_fits.result), Code::Undelivered, "{just_fits:?}");
}

#[tokio::test]
async fn without_a_queue_a_gateway_that_never_attached_cannot_be_reached_and_that_is_said_at_once() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(CAROL, PHONE, "c")).await;
    node.register("registered:7000").await;
    node.bind(BindRouteReq { gateway_addr: "registered:7000".to_owned(), ..a_bind(BOB, PHONE, "c") }).await;
    for user in [CAROL, BOB] {
        let began = Instant::now();
        let answer = node.deliver(a_message(user, "hello")).await;
        let result = answer.result.clone().expect("a result");
        assert_eq!((result.code(), answer.delivered), (Code::Undelivered, false), "{answer:?}");
        assert!(result.msg.contains("[redis_queue]") && result.msg.contains("attach"), "{result:?}");
        assert!(began.elapsed() < allowed(Duration::from_millis(500)), "no retry: {:?}", began.elapsed());
        let stored = node.deliver(DeliverReq { store_offline: true, ..a_message(user, "hello") }).await;
        assert!(stored.stored, "{stored:?}");
    }
}
