//! Messages that devices acknowledge: whatever fails, an answer "delivered" was acknowledged by that device.

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::Delivery;
use im_presence::pb::node_frame::Body as Down;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Request;

use crate::deliver::a_message;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::node::Node;
use crate::harness::node::Presence;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;
use crate::harness::stream::ack_frame;
use crate::harness::stream::gateways;

const HEARD_WITHIN: Duration = Duration::from_secs(5);
/// Of devices that do answer, on a machine that builds something else meanwhile.
const PATIENCE_MS: u32 = 5_000;

pub fn with_ack(user: i64, text: &str, ack_timeout_ms: u32) -> DeliverReq {
    DeliverReq { ack_timeout_ms, ..a_message(user, text) }
}

async fn acks(node: &Node, result: &str) -> f64 {
    let label = format!("result=\"{result}\"");
    node.series("im_presence_acks_total").await.iter().filter(|(labels, _)| labels.contains(&label)).map(|(_, n)| n).sum()
}

impl RawStream {
    /// The next message, whatever comes before.
    pub async fn delivery(&mut self) -> Delivery {
        loop {
            if let Some(Down::Delivery(delivery)) = self.next().await.expect("a delivery").body {
                return delivery;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_acknowledges_through_whichever_node_and_only_for_itself() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut stream, _) = RawStream::attach(one, GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    stream.bind(BOB, PHONE, "c").await;
    // The node that has the stream, then the other one, is asked to deliver; the answer comes by frame, or by a call to
    // the node that did not ask.
    for (asked, by_call) in [(one, None), (two, None), (one, Some(two)), (two, Some(one))] {
        let mut client = asked.presence();
        let call = tokio::spawn(async move { client.deliver(with_ack(ALICE, "hello", PATIENCE_MS)).await });
        let delivery = stream.delivery().await;
        assert!(delivery.wants_ack && delivery.user_id == ALICE, "{delivery:?}");
        let unknown = acks(asked, "unknown").await;
        for (id, user, device) in [
            ("nonsense", ALICE, PHONE),
            (&*format!("{}9", delivery.delivery_id), ALICE, PHONE),
            (&*delivery.delivery_id, BOB, PHONE),
            (&*delivery.delivery_id, ALICE, LAPTOP),
        ] {
            assert!(stream.send(0, ack_frame(id, user, device)).await);
        }
        // What is of nobody is counted where it came in, the others where the delivery waits.
        eventually("they are counted", HEARD_WITHIN, async || {
            acks(asked, "unknown").await >= unknown + if asked.data == one.data { 4.0 } else { 3.0 }
        })
        .await;
        assert!(!call.is_finished(), "none of these is an acknowledgement");
        match by_call {
            None => assert!(stream.send(0, ack_frame(&delivery.delivery_id, ALICE, PHONE)).await),
            Some(other) => {
                let (delivery_id, device_id) = (delivery.delivery_id.clone(), PHONE.to_owned());
                let ack = pb::DeliveryAck { delivery_id, user_id: ALICE, device_id, not_here: false };
                let answer = gateways(other).ack_delivery(pb::AckDeliveryReq { acks: vec![ack] }).await.expect("taken");
                assert_eq!(code(&answer.get_ref().result), Code::Ok);
            }
        }
        let answer = call.await.expect("the task").expect("an answer").into_inner();
        assert_eq!((code(&answer.result), answer.delivered, answer.attempts), (Code::Ok, true, 1), "{answer:?}");
        assert_eq!((answer.acked_devices, answer.delivery_id), (vec![PHONE.to_owned()], delivery.delivery_id));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_for_single_devices_reaches_their_gateways_only() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let gateways = TestGateway::one_each(&cluster, Devices::Acknowledge).await;
    gateways[0].bind(ALICE, PHONE, "c").await;
    gateways[1].bind(ALICE, LAPTOP, "c").await;
    let for_devices = |text: &str, devices: &[&str]| DeliverReq {
        device_ids: devices.iter().map(|device| (*device).to_owned()).collect(),
        ..with_ack(ALICE, text, PATIENCE_MS)
    };
    for node in &cluster.nodes {
        let answer = node.deliver(for_devices("to the laptop", &[LAPTOP])).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 1), "{answer:?}");
        assert_eq!(answer.acked_devices, [LAPTOP]);
        let answer = node.deliver(for_devices("to both", &[PHONE, LAPTOP])).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::Ok, 2), "{answer:?}");
        let answer = node.deliver(for_devices("to none", &["tablet"])).await;
        assert_eq!((code(&answer.result), answer.receivers), (Code::NotFound, 0), "{answer:?}");
    }
    gateways[0].hears(2).await;
    gateways[1].hears(4).await;
    assert_eq!(gateways[0].texts(), ["to both", "to both"]);
    assert_eq!(gateways[1].texts(), ["to the laptop", "to both", "to the laptop", "to both"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_is_not_there_twice_loses_this_route_and_no_newer_one() {
    let cluster = Cluster::mariadb(2, &[("ROUTE__MAX_RETRIES", "1"), ("ROUTE__RETRY_INTERVAL", "100")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let absent = TestGateway::start(&cluster.nodes[..1], "gw-absent:7000", Devices::AreNotHere).await;
    let present = TestGateway::start(&cluster.nodes[1..], "gw-present:7000", Devices::Acknowledge).await;
    absent.bind(ALICE, PHONE, "c-1").await;
    present.bind(ALICE, LAPTOP, "c-2").await;
    let to_phone = || DeliverReq { device_ids: vec![PHONE.to_owned()], ..with_ack(ALICE, "hello", PATIENCE_MS) };
    let began = Instant::now();
    let answer = two.deliver(to_phone()).await;
    assert!(!answer.delivered && answer.acked_devices.is_empty(), "{answer:?}");
    assert!(began.elapsed() < Duration::from_millis(PATIENCE_MS.into()), "nobody waits for a device that is not there");
    eventually("the route is gone", HEARD_WITHIN, async || one.query_sql(ALICE).await.routes.len() == 1).await;
    assert_eq!(one.query_sql(ALICE).await.routes[0].device_id, LAPTOP);
    assert_eq!(absent.deliveries().len(), 2, "refused twice");

    let answer = two.deliver(to_phone()).await;
    assert_eq!(code(&answer.result), Code::NotFound, "{answer:?}");
    present.bind(ALICE, PHONE, "c-3").await;
    let answer = two.deliver(to_phone()).await;
    assert_eq!((code(&answer.result), answer.acked_devices), (Code::Ok, vec![PHONE.to_owned()]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_that_subscribe_acknowledge_what_they_get_in_an_envelope() {
    let cluster = Cluster::with_redis(2, &[("DELIVERY__PAYLOAD", "envelope")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(ALICE, PHONE, "c")).await;
    let mut subscriber = cluster.queue().subscribe(&["user:1"]).await;
    for (asked, told) in [(one, one), (one, two), (two, one)] {
        let mut client = asked.presence();
        let call = tokio::spawn(async move { client.deliver(with_ack(ALICE, "hello", PATIENCE_MS)).await });
        let (_, body) = subscriber.next(allowed(HEARD_WITHIN)).await.expect("a message");
        let delivery = Delivery::decode(body.as_slice()).expect("a Delivery");
        assert!(delivery.wants_ack && !call.is_finished());
        let ack =
            pb::DeliveryAck { delivery_id: delivery.delivery_id, user_id: ALICE, device_id: PHONE.to_owned(), not_here: false };
        gateways(told).ack_delivery(pb::AckDeliveryReq { acks: vec![ack] }).await.expect("taken");
        let answer = call.await.expect("the task").expect("an answer").into_inner();
        assert_eq!((code(&answer.result), answer.acked_devices), (Code::Ok, vec![PHONE.to_owned()]));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_can_be_acknowledged_and_so_can_the_first_attempt_late() {
    const SHORT_MS: u32 = 100;
    let cluster = Cluster::mariadb(1, &[("ROUTE__MAX_RETRIES", "3"), ("ROUTE__RETRY_INTERVAL", "1000")]).await;
    let node = cluster.node();
    let (mut stream, _) = RawStream::attach(node, GATEWAY, 0).await;
    stream.bind(ALICE, PHONE, "c").await;
    let deliver = || {
        let mut client = node.presence();
        tokio::spawn(async move { client.deliver(with_ack(ALICE, "hello", SHORT_MS)).await })
    };

    let call = deliver();
    let first = stream.delivery().await;
    let second = stream.delivery().await;
    assert_eq!(first, second, "the same message, so that the device can drop it");
    stream.send(0, ack_frame(&first.delivery_id, ALICE, PHONE)).await;
    let answer = call.await.expect("the task").expect("an answer").into_inner();
    assert_eq!((code(&answer.result), answer.attempts), (Code::Ok, 2), "{answer:?}");

    // After the second attempt has waited, and before the third.
    let call = deliver();
    let first = stream.delivery().await;
    stream.delivery().await;
    let waits = || async { node.series("im_presence_delivery_seconds_count").await };
    let acknowledged = async || {
        let stages = waits().await;
        stages.iter().filter(|(labels, _)| labels.contains("acknowledged")).map(|(_, count)| *count).sum::<f64>()
    };
    eventually("both attempts have waited", HEARD_WITHIN, async || acknowledged().await >= 4.0).await;
    stream.send(0, ack_frame(&first.delivery_id, ALICE, PHONE)).await;
    let answer = call.await.expect("the task").expect("an answer").into_inner();
    assert_eq!((code(&answer.result), answer.acked_devices), (Code::Ok, vec![PHONE.to_owned()]), "{}", answer.attempts);
    assert!(stream.is_silent(Duration::from_millis(200)).await, "who has acknowledged is not told again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silence_is_undelivered_within_the_callers_deadline_and_leaves_nothing_waiting() {
    let cluster = Cluster::mariadb(1, &[("ROUTE__MAX_RETRIES", "20"), ("ROUTE__RETRY_INTERVAL", "100")]).await;
    let node = cluster.node();
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::AreSilent).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let limit = Duration::from_millis(1_500);
    let mut request = Request::new(with_ack(ALICE, "hello", 100));
    request.set_timeout(limit);
    let began = Instant::now();
    let answer = node.presence().deliver(request).await.expect("an answer, not a deadline that has passed").into_inner();
    assert_eq!((code(&answer.result), answer.delivered), (Code::Undelivered, false), "{answer:?}");
    assert!(answer.receivers == 1 && answer.attempts > 2 && began.elapsed() < allowed(limit), "{answer:?}");
    let unknown = acks(node, "unknown").await;
    let late = pb::DeliveryAck { delivery_id: answer.delivery_id, user_id: ALICE, device_id: PHONE.to_owned(), not_here: false };
    gateways(node).ack_delivery(pb::AckDeliveryReq { acks: vec![late] }).await.expect("taken");
    assert!((acks(node, "unknown").await - unknown - 1.0).abs() < 0.5, "nobody waits for it any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_waits_for_nobodys_retry() {
    /// The message before the batch is under way for so long at least.
    const PATIENCE: Duration = Duration::from_secs(20);
    const LIMIT: Duration = Duration::from_secs(4);
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let (mut silent, _) = RawStream::attach(node, GATEWAY, 0).await;
    silent.bind(ALICE, PHONE, "c").await;
    let present = TestGateway::start(&cluster.nodes, "gw-present:7000", Devices::Acknowledge).await;
    present.bind(BOB, PHONE, "c").await;
    let mut client = node.presence();
    let patience_ms = u32::try_from(PATIENCE.as_millis()).expect("seconds");
    let waits = tokio::spawn(async move { client.deliver(with_ack(ALICE, "before", patience_ms)).await });
    assert_eq!(silent.delivery().await.message, "before");
    let began = Instant::now();
    let request = pb::BatchDeliverReq { user_ids: vec![ALICE, BOB], message: "to both".to_owned(), ..Default::default() };
    let answer = node.presence().batch_deliver(request).await.expect("an answer").into_inner();
    assert!(answer.users.iter().all(|user| user.delivered), "a gateway took it for each: {answer:?}");
    assert_eq!(silent.delivery().await.message, "to both");
    present.hears(1).await;
    // A message to her alone keeps its place, and does not get it in time.
    let mut request = Request::new(a_message(ALICE, "after"));
    request.set_timeout(LIMIT);
    let status = node.presence().deliver(request).await.expect_err("another message is before it");
    assert_eq!((status.code(), status.message().contains("came before")), (tonic::Code::Unavailable, true), "{status:?}");
    assert!(began.elapsed() < PATIENCE && !waits.is_finished(), "all this while the first is under way");
}

/// What came of one message.
#[derive(Debug)]
pub enum Outcome {
    Delivered,
    Stored,
    Undelivered,
    Refused(tonic::Code),
}

pub struct Sent {
    user: i64,
    number: usize,
    outcome: Outcome,
}

pub struct Caller {
    pub node: Presence,
    pub users: Vec<i64>,
    pub messages: usize,
    pub store_offline: bool,
    pub answered: Arc<AtomicU64>,
}

impl Caller {
    /// Sends its messages at a steady pace, each after the answer to the one before.
    pub async fn run(mut self) -> Vec<Sent> {
        const PACE: Duration = Duration::from_millis(20);
        const LIMIT: Duration = Duration::from_secs(10);
        let mut sent = Vec::new();
        let mut ticks = tokio::time::interval(PACE);
        for number in 0..self.messages {
            ticks.tick().await;
            let user = self.users[number % self.users.len()];
            let message_id = format!("{user}/{number}");
            let mut request =
                Request::new(DeliverReq { message_id, store_offline: self.store_offline, ..with_ack(user, "m", 500) });
            request.set_timeout(LIMIT);
            let outcome = match self.node.deliver(request).await.map(tonic::Response::into_inner) {
                Ok(answer) if answer.delivered => {
                    assert_eq!((code(&answer.result), &answer.acked_devices[..]), (Code::Ok, &[PHONE.to_owned()][..]));
                    Outcome::Delivered
                }
                Ok(answer) if answer.stored => {
                    assert!(self.store_offline && code(&answer.result) == Code::Ok, "{answer:?}");
                    Outcome::Stored
                }
                Ok(answer) => {
                    assert!(matches!(code(&answer.result), Code::Undelivered | Code::NotFound), "{answer:?}");
                    Outcome::Undelivered
                }
                Err(status) => Outcome::Refused(status.code()),
            };
            sent.push(Sent { user, number, outcome });
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        sent
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_fails_every_message_is_accounted_for_and_delivered_means_acknowledged() {
    const USERS: usize = 200;
    const GATEWAYS: usize = 4;
    const CALLERS: usize = 8;
    let _turn = heavy().await;
    let messages: usize = if long() { 20_000 } else { 2_000 };
    let settings = [("ROUTE__RETRY_INTERVAL", "200")];
    let mut cluster = Cluster::with_two_redis(2, &settings).await;
    let mut told = Vec::new();
    for n in 0..GATEWAYS {
        told.push(Arc::new(TestGateway::start(&cluster.nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await));
    }
    let gateway_of = |user: i64| usize::try_from(user).expect("a user") % GATEWAYS;
    for (n, gateway) in told.iter().enumerate() {
        gateway.bind_all((1..=USERS as i64).filter(|user| gateway_of(*user) == n)).await;
    }
    let answered = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for n in 0..CALLERS {
        let users = (1..=USERS as i64).filter(|user| *user as usize % CALLERS == n).collect();
        let node = cluster.nodes[n % 2].new_connection();
        callers
            .spawn(Caller { node, users, messages: messages / CALLERS, store_offline: false, answered: answered.clone() }.run());
    }
    let share = async |share: f64| {
        let enough = (messages as f64 * share) as u64;
        eventually("messages are sent", Duration::from_secs(300), async || answered.load(Ordering::Relaxed) >= enough).await;
    };
    share(0.2).await;
    cluster.nodes[1].kill();
    share(0.35).await;
    cluster.nodes[1].restart().await;
    share(0.5).await;
    cluster.queue().kill();
    share(0.6).await;
    cluster.queue().restart();
    share(0.7).await;
    told[2].stall(true);
    share(0.8).await;
    told[2].stall(false);
    let sent: Vec<Sent> = callers.join_all().await.into_iter().flatten().collect();
    check(&sent, messages, &told, gateway_of);
    for gateway in &told {
        assert_eq!(
            gateway.epochs().iter().collect::<HashSet<_>>().len(),
            1,
            "no gateway lost its life: {:?}",
            gateway.detached()
        );
    }
}

/// Every message is accounted for, those answered as delivered or stored have arrived, and each user's in their order. Of the
/// gateways of a user who moved, the former ones come first in `told`.
pub fn check(sent: &[Sent], messages: usize, told: &[Arc<TestGateway>], gateway_of: impl Fn(i64) -> usize) {
    let (mut first, mut received) = (HashMap::<i64, Vec<usize>>::new(), HashSet::new());
    let mut duplicates = 0;
    for delivery in told.iter().flat_map(|gateway| gateway.deliveries()) {
        let (user, number) = delivery.message_id.split_once('/').expect("one of ours");
        let (user, number): (i64, usize) = (user.parse().expect("a user"), number.parse().expect("a number"));
        assert_eq!(user, delivery.user_id);
        match received.insert((user, number)) {
            true => first.entry(user).or_default().push(number),
            false => duplicates += 1,
        }
    }
    let (mut counts, mut whys) = ([0; 4], HashMap::<String, usize>::new());
    for Sent { user, number, outcome } in sent {
        let (place, acknowledged) = match outcome {
            Outcome::Delivered => (0, true),
            Outcome::Stored => (1, true),
            Outcome::Undelivered => (2, false),
            Outcome::Refused(why) => {
                *whys.entry(format!("{why:?}")).or_default() += 1;
                (3, false)
            }
        };
        counts[place] += 1;
        assert!(!acknowledged || received.contains(&(*user, *number)), "{user}/{number} is said to be {outcome:?}");
    }
    let [delivered, stored, undelivered, refused] = counts;
    println!(
        "{} sent: {delivered} acknowledged, {stored} stored and received, {undelivered} undelivered, {refused} refused \
        {whys:?}; \
        {duplicates} twice",
        sent.len()
    );
    assert_eq!((sent.len(), delivered + stored + undelivered + refused), (messages, messages));
    assert!(delivered + stored > messages / 2, "most of it went well: {counts:?}");
    for (user, numbers) in first {
        assert!(numbers.is_sorted(), "user {user} on gateway {}: out of order: {numbers:?}", gateway_of(user));
    }
}
