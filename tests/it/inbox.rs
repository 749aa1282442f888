//! Messages for users who cannot be reached: stored, brought to a device later, and gone when it has them.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::BatchDeliverReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::Delivery;
use im_presence::pb::PullInboxResp;
use im_presence::pb::UnbindRouteReq;
use prost::Message;
use sqlx::AnyConnection;
use sqlx::AssertSqlSafe;
use tokio::task::JoinSet;

use crate::acks;
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
use crate::harness::cluster::Redis;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::each_engine;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;
use crate::harness::stream::ack_frame;
use crate::harness::stream::bind_frame;
use crate::harness::stream::gateways;

/// On a machine that builds something else meanwhile.
const SOON: Duration = Duration::from_secs(5);
/// By then the regular look has been, also if another node's turn had to end first.
const LOOKED: Duration = Duration::from_secs(25);
/// What is stored for somebody online does not stay longer.
const AT_ONCE: Duration = Duration::from_millis(1_500);

/// To be stored; its text, without spaces, is its id.
fn storable(user: i64, text: &str) -> DeliverReq {
    DeliverReq { store_offline: true, message_id: text.replace(' ', "-"), ..a_message(user, text) }
}

fn for_device(device: &str, message: DeliverReq) -> DeliverReq {
    DeliverReq { device_ids: vec![device.to_owned()], ..message }
}

/// Delivers, and insists that it was stored.
async fn store(node: &Node, message: DeliverReq) {
    let answer = node.deliver(message).await;
    assert_eq!((code(&answer.result), answer.stored, answer.delivered), (Code::Ok, true, false), "{answer:?}");
}

async fn waiting(cluster: &Cluster, user: i64) -> i64 {
    cluster.db.number(&format!("SELECT COUNT(*) FROM inbox WHERE user_id = {user}")).await
}

/// Waits until nothing is stored for anybody, and nobody's record says otherwise.
async fn all_gone(cluster: &Cluster, deadline: Duration) {
    let left = "SELECT (SELECT COUNT(*) FROM inbox) + (SELECT COUNT(*) FROM users WHERE inbox_pending > 0)";
    eventually("nothing waits", deadline, async || cluster.db.number(left).await == 0).await;
}

async fn pull(node: &Node, user: i64, device: &str, after_seq: u64, limit: u32) -> PullInboxResp {
    let request = pb::PullInboxReq { user_id: user, after_seq, limit, device_id: device.to_owned() };
    gateways(node).pull_inbox(request).await.expect("an inbox").into_inner()
}

async fn read_up_to(node: &Node, user: i64, device: &str, up_to_seq: u64) {
    let request = pb::AckInboxReq { user_id: user, up_to_seq, device_id: device.to_owned() };
    let answer = gateways(node).ack_inbox(request).await.expect("an answer").into_inner();
    assert_eq!(code(&answer.result), Code::Ok);
}

fn texts(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| delivery.message.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_for_a_user_comes_in_order_when_a_device_binds_and_is_gone_when_it_has_it() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
        let sent: Vec<String> = (0..100).map(|n| format!("gr\u{fc}\u{df} {n}\0")).collect();
        for (n, text) in sent.iter().enumerate() {
            store(node, DeliverReq { message_id: format!("m{n}"), message_type: "chat".to_owned(), ..storable(ALICE, text) })
                .await;
        }
        let payload: Vec<u8> = (0..=255).rev().collect();
        store(node, DeliverReq { user_id: ALICE, payload: payload.clone().into(), store_offline: true, ..Default::default() })
            .await;
        assert_eq!(waiting(cluster, ALICE).await, 101);
        gateway.bind(ALICE, PHONE, "c").await;
        gateway.hears(101).await;
        let heard = gateway.deliveries();
        assert_eq!(gateway.texts()[..100], sent);
        assert_eq!((&heard[100].payload[..], &*heard[100].message_id), (&payload[..], ""));
        assert!(heard.is_sorted_by(|one, next| 0 < one.inbox_seq && one.inbox_seq < next.inbox_seq), "numbers grow");
        assert!(heard.iter().all(|delivery| delivery.wants_ack && delivery.timestamp > 1_700_000_000_000));
        assert_eq!((&*heard[7].message_id, &*heard[7].message_type), ("m7", "chat"));
        all_gone(cluster, SOON).await;
        let answer = node.deliver(DeliverReq { ack_timeout_ms: 5_000, ..storable(ALICE, "straight") }).await;
        assert!(answer.delivered && !answer.stored, "{answer:?}");
        assert_eq!(gateway.deliveries().len(), 102, "none came twice");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_through_one_node_comes_through_the_other() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateways = TestGateway::one_each(&cluster, Devices::Acknowledge).await;
    for (user, stores, binds) in [(ALICE, one, &gateways[1]), (BOB, two, &gateways[0])] {
        for n in 0..10 {
            store(stores, storable(user, &format!("{user}/{n}"))).await;
        }
        binds.bind(user, PHONE, "c").await;
        binds.hears(10).await;
        assert_eq!(binds.texts(), (0..10).map(|n| format!("{user}/{n}")).collect::<Vec<_>>());
    }
    all_gone(&cluster, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_stored_message_is_told_to_push_services_and_a_repeat_is_stored_by_no_node_again() {
    const BEYOND_DOUBLES: i64 = 9_007_199_254_740_993;
    let cluster = Cluster::with_redis(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut push = cluster.queue().subscribe(&["presence:offline"]).await;
    let message = || DeliverReq { message_type: "chat".to_owned(), ..storable(BEYOND_DOUBLES, "m1") };
    for node in [one, two, one] {
        store(node, message()).await;
    }
    store(two, storable(BEYOND_DOUBLES, "m2")).await;
    let mut told: Vec<serde_json::Value> = Vec::new();
    for _ in 0..2 {
        told.push(serde_json::from_str(&push.text(SOON).await).expect("JSON"));
    }
    told.sort_by_key(|notice| notice["message_id"].to_string());
    let at = cluster.db.number("SELECT stored_at FROM inbox WHERE message_id = 'm1'").await.to_string();
    let user = BEYOND_DOUBLES.to_string();
    let want = serde_json::json!({ "user_id": user, "message_id": "m1", "message_type": "chat", "stored_at_ms": at });
    assert_eq!((&told[0], told[1]["message_id"].as_str()), (&want, Some("m2")));
    assert_eq!(waiting(&cluster, BEYOND_DOUBLES).await, 2);
    assert_eq!(push.next(Duration::from_millis(500)).await, None, "a repeat is not told");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscribers_acknowledge_stored_messages_in_envelopes_and_raw_ones_are_done_when_received() {
    for payload in ["envelope", "raw"] {
        let cluster = Cluster::with_redis(1, &[("DELIVERY__PAYLOAD", payload)]).await;
        let node = cluster.node();
        store(node, storable(ALICE, "hello")).await;
        node.bind(a_bind(BOB, PHONE, "c")).await;
        let mut subscriber = cluster.queue().subscribe(&["user:1"]).await;
        node.bind(a_bind(ALICE, PHONE, "c")).await;
        let (_, body) = subscriber.next(allowed(SOON)).await.expect("the message");
        if payload == "raw" {
            assert_eq!(body, b"hello");
        } else {
            let delivery = Delivery::decode(body.as_slice()).expect("a Delivery");
            assert!(delivery.wants_ack && delivery.inbox_seq > 0 && delivery.message == "hello", "{delivery:?}");
            assert_eq!(waiting(&cluster, ALICE).await, 1, "until it is acknowledged");
            let (delivery_id, device_id) = (delivery.delivery_id, PHONE.to_owned());
            let acks = vec![pb::DeliveryAck { delivery_id, user_id: ALICE, device_id, not_here: false }];
            gateways(node).ack_delivery(pb::AckDeliveryReq { acks }).await.expect("taken");
        }
        all_gone(&cluster, SOON).await;
    }
}

async fn run(connection: &mut AnyConnection, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whether_storing_or_the_bind_is_first_nothing_stays_in_the_inbox_of_a_user_who_is_online() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut user = 0;
    for (storing, what) in [(one, "through two nodes"), (two, "through one node")] {
        for store_first in [true, false] {
            user += 1;
            // The row is there, and both wait for it: in this order.
            let bound = two.bind(a_bind(user, PHONE, "before")).await;
            two.unbind(UnbindRouteReq { user_id: user, route_key: bound.route_key, ..Default::default() }).await;
            eventually("it is known", SOON, async || !storing.query(user).await.is_online).await;
            let mut session = cluster.db.connect().await;
            run(&mut session, format!("BEGIN; SELECT * FROM users WHERE user_id = {user} FOR UPDATE")).await;
            // Of a gateway that has only just attached, the other node has not read yet.
            let addr = format!("gw-{user}:7100");
            let gateway = Arc::new(TestGateway::start(&cluster.nodes[1..], &addr, Devices::Acknowledge).await);
            let mut client = storing.new_connection();
            let text = format!("{what}, stored first: {store_first}");
            let message = storable(user, &text);
            let bind = {
                let gateway = gateway.clone();
                async move { drop(gateway.bind(user, PHONE, "c").await) }
            };
            let deliver = async move { assert!(client.deliver(message).await.expect("an answer").into_inner().stored) };
            let mut both = JoinSet::new();
            let waits =
                async |n| eventually("it waits for the row", SOON, async || cluster.db.waiting_for_a_row().await >= n).await;
            if store_first {
                both.spawn(deliver);
                waits(1).await;
                both.spawn(bind);
            } else {
                both.spawn(bind);
                waits(1).await;
                both.spawn(deliver);
            }
            match what {
                "through two nodes" => waits(2).await,
                _ => tokio::time::sleep(Duration::from_millis(100)).await, // in the lane, where nobody sees it
            }
            run(&mut session, "COMMIT".to_owned()).await;
            both.join_all().await;
            let began = Instant::now();
            eventually(&text, AT_ONCE, async || !gateway.deliveries().is_empty()).await;
            eventually("it is gone", AT_ONCE, async || waiting(&cluster, user).await == 0).await;
            println!("{text}: there and gone {:?} after both were answered", began.elapsed());
            assert_eq!(gateway.texts(), [text]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_users_who_bind_while_messages_for_them_are_stored_everywhere_nothing_stays_behind() {
    let _turn = heavy().await;
    let users: i64 = if long() { 2_000 } else { 200 };
    let cluster = Cluster::mariadb(2, &[]).await;
    let gateway = Arc::new(TestGateway::start(&cluster.nodes[1..], GATEWAY, Devices::Acknowledge).await);
    let mut all = JoinSet::new();
    for user in 1..=users {
        let (mut client, gateway) = (cluster.nodes[user as usize % 2].presence(), gateway.clone());
        all.spawn(async move {
            let answer = client.deliver(storable(user, &format!("{user}"))).await.expect("an answer").into_inner();
            assert!(answer.stored || answer.delivered, "{answer:?}");
        });
        all.spawn(async move { drop(gateway.bind(user, PHONE, "c").await) });
    }
    all.join_all().await;
    let began = Instant::now();
    eventually("all have theirs", AT_ONCE, async || waiting_for_all(&cluster).await == 0).await;
    println!("{:?} after the last answer nothing waits", began.elapsed());
    let mut heard: Vec<i64> = gateway.deliveries().iter().map(|delivery| delivery.user_id).collect();
    heard.sort_unstable();
    heard.dedup();
    assert!(heard.into_iter().eq(1..=users));
}

async fn waiting_for_all(cluster: &Cluster) -> i64 {
    cluster.db.number("SELECT COUNT(*) FROM inbox").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_inbox_takes_no_further_message_and_loses_none_it_has() {
    let limits =
        [("DELIVERY__INBOX_MAX_MESSAGES", "5"), ("DELIVERY__INBOX_MAX_BYTES", "2000"), ("DELIVERY__MAX_MESSAGE_BYTES", "1000")];
    each_engine(&limits, async |cluster| {
        let node = cluster.node();
        let large = |text: &str| DeliverReq { message_id: text.to_owned(), message: text.repeat(900), ..storable(BOB, "") };
        let refused = async |message: DeliverReq| {
            let answer = node.deliver(message).await;
            assert_eq!((code(&answer.result), answer.stored, answer.delivered), (Code::Undelivered, false, false), "{answer:?}");
        };
        for n in 0..5 {
            store(node, storable(ALICE, &format!("{n}"))).await;
        }
        refused(storable(ALICE, "one too many")).await;
        store(node, storable(ALICE, "3")).await; // a repeat is stored as it was
        store(node, large("a")).await;
        store(node, large("b")).await;
        refused(large("c")).await;
        store(node, storable(BOB, "small")).await;

        let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
        gateway.bind(ALICE, PHONE, "c").await;
        gateway.hears(5).await;
        assert_eq!(gateway.texts(), ["0", "1", "2", "3", "4"]);
        eventually("there is room", SOON, async || waiting(cluster, ALICE).await == 0).await;
        gateway.bind(BOB, PHONE, "c").await;
        gateway.hears(8).await;
        assert_eq!(gateway.texts()[5..], ["a".repeat(900), "b".repeat(900), "small".to_owned()]);
        let answer = node.deliver(large("c")).await;
        assert!(answer.delivered || answer.stored, "what was refused may be sent again: {answer:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_ends_with_its_time_for_devices_for_callers_and_in_sql() {
    each_engine(&[("DELIVERY__INBOX_TTL", "3600"), ("DELIVERY__INBOX_MAX_MESSAGES", "3")], async |cluster| {
        let node = cluster.node();
        cluster.db.clock_was_steady().await;
        let lasts = async |id: &str| {
            cluster.db.number(&format!("SELECT expires_at - stored_at FROM inbox WHERE message_id = '{id}'")).await
        };
        for (id, expire_after_s) in [("short", 60), ("default", 0), ("long", 1_000_000)] {
            for user in [ALICE, BOB] {
                store(node, DeliverReq { expire_after_s, message_id: format!("{id}-{user}"), ..storable(user, id) }).await;
            }
        }
        assert_eq!([lasts("short-1").await, lasts("default-1").await, lasts("long-1").await], [60_000, 3_600_000, 3_600_000]);
        cluster.db.run("UPDATE inbox SET expires_at = stored_at WHERE message_id LIKE 'short%'").await;
        assert_eq!(texts(&pull(node, BOB, PHONE, 0, 0).await.deliveries), ["default", "long"]);
        let again = DeliverReq { message_id: "again".to_owned(), ..storable(BOB, "again") };
        eventually("what is over takes no room", LOOKED, async || node.deliver(again.clone()).await.stored).await;
        assert_eq!(texts(&pull(node, BOB, PHONE, 0, 0).await.deliveries), ["default", "long", "again"]);
        let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
        gateway.bind(ALICE, PHONE, "c").await;
        gateway.hears(2).await;
        assert_eq!(gateway.texts(), ["default", "long"]);
        cluster.db.run("UPDATE inbox SET expires_at = stored_at").await;
        all_gone(cluster, LOOKED).await;
        assert_eq!(gateway.deliveries().len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_for_one_device_wait_for_it_and_hold_up_no_others() {
    const ADDRESSED: usize = 70; // more than are on their way at a time
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    for n in 0..ADDRESSED {
        store(node, for_device(LAPTOP, storable(ALICE, &format!("laptop {n}")))).await;
    }
    store(node, storable(ALICE, "anybody")).await;
    gateway.bind(ALICE, PHONE, "c-1").await;
    gateway.hears(1).await;
    assert_eq!(gateway.texts(), ["anybody"]);
    eventually("it is gone", SOON, async || waiting(&cluster, ALICE).await == ADDRESSED as i64).await;
    // A phone's word does not count for what is the laptop's.
    let all = pull(node, ALICE, LAPTOP, 0, 50).await;
    assert_eq!((all.deliveries.len(), all.more), (50, true));
    read_up_to(node, ALICE, PHONE, u64::try_from(i64::MAX).expect("positive")).await;
    assert_eq!(waiting(&cluster, ALICE).await, ADDRESSED as i64);
    gateway.bind(ALICE, LAPTOP, "c-2").await;
    gateway.hears(1 + ADDRESSED).await;
    assert_eq!(gateway.texts()[1..], (0..ADDRESSED).map(|n| format!("laptop {n}")).collect::<Vec<_>>());
    all_gone(&cluster, SOON).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_for_a_device_that_is_silent_hold_up_no_others() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let (silent, _) = RawStream::attach(node, OTHER_GATEWAY, 0).await;
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    for n in 0..70 {
        store(node, for_device(LAPTOP, storable(ALICE, &format!("laptop {n}")))).await;
    }
    for n in 0..70 {
        store(node, storable(ALICE, &format!("{n}"))).await;
    }
    silent.send(7, bind_frame(ALICE, LAPTOP, "c-1")).await;
    eventually("the laptop is bound", SOON, async || node.query_sql(ALICE).await.is_online).await;
    gateway.bind(ALICE, PHONE, "c-2").await;
    eventually("the phone has its own", LOOKED, async || waiting(&cluster, ALICE).await == 70).await;
    let mut heard: Vec<String> = gateway.texts().into_iter().filter(|text| !text.starts_with("laptop")).collect();
    heard.dedup();
    assert_eq!(heard, (0..70).map(|n| n.to_string()).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_for_anybody_is_done_when_one_device_has_it_and_waits_for_no_silent_one() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let (silent, _) = RawStream::attach(node, OTHER_GATEWAY, 0).await;
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    for n in 0..200 {
        store(node, for_device("tablet", storable(ALICE, &format!("tablet {n}")))).await;
        store(node, storable(ALICE, &format!("{n}"))).await;
    }
    silent.send(7, bind_frame(ALICE, "tablet", "c-1")).await;
    eventually("the tablet is bound", SOON, async || node.query_sql(ALICE).await.is_online).await;
    gateway.bind(ALICE, PHONE, "c-2").await;
    let began = Instant::now();
    eventually("the phone has its own", LOOKED, async || waiting(&cluster, ALICE).await == 200).await;
    println!("beside a silent device it took {:?}", began.elapsed());
    store(node, storable(ALICE, "later")).await;
    eventually("that, too", LOOKED, async || waiting(&cluster, ALICE).await == 200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_reads_its_inbox_in_pages_and_removes_only_what_it_has_read() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        for n in 0..50 {
            let message = storable(ALICE, &format!("{n}"));
            store(node, message).await;
        }
        let first = pull(node, ALICE, PHONE, 0, 0).await;
        assert_eq!((first.deliveries.len(), first.more), (20, true), "as many as it is by itself");
        let (mut seen, mut after) = (Vec::new(), 0);
        loop {
            let page = pull(node, ALICE, PHONE, after, 7).await;
            after = page.deliveries.last().map_or(after, |last| last.inbox_seq);
            seen.extend(page.deliveries);
            if !page.more {
                break;
            }
        }
        assert_eq!(texts(&seen), (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
        store(node, storable(ALICE, "later")).await;
        read_up_to(node, ALICE, PHONE, seen[29].inbox_seq).await;
        assert_eq!(waiting(cluster, ALICE).await, 21);
        read_up_to(node, ALICE, LAPTOP, after).await;
        let rest = pull(node, ALICE, PHONE, 0, 50).await;
        assert_eq!((texts(&rest.deliveries), rest.more), (vec!["later"], false), "nobody has read it yet");
        assert_eq!(cluster.db.number("SELECT inbox_pending FROM users WHERE user_id = 1").await, 1);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_stored_messages_come_to_one_device_in_order() {
    let _turn = heavy().await;
    let messages: usize = if long() { 10_000 } else { 1_000 };
    let cluster = Cluster::mariadb(2, &[("DELIVERY__INBOX_MAX_MESSAGES", "10000")]).await;
    let gateway = TestGateway::start(&cluster.nodes[1..], GATEWAY, Devices::Acknowledge).await;
    let began = Instant::now();
    for n in 0..messages {
        store(cluster.node(), storable(ALICE, &format!("{n}"))).await;
    }
    println!("{messages} stored in {:?}", began.elapsed());
    let began = Instant::now();
    gateway.bind(ALICE, PHONE, "c").await;
    all_gone(&cluster, Duration::from_secs(120)).await;
    println!("brought to the device in {:?}", began.elapsed());
    assert!(gateway.texts().into_iter().eq((0..messages).map(|n| n.to_string())), "all, once, in order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_does_not_acknowledge_is_tried_again_ever_later_and_loses_nothing() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await; // each node remembers for itself who is silent
    let node = cluster.node();
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::AreSilent).await;
    store(node, storable(ALICE, "a")).await;
    store(node, storable(ALICE, "b")).await;
    gateway.bind(ALICE, PHONE, "c").await;
    let times = if long() { 5 } else { 3 };
    let mut came = Vec::new();
    for time in 1..=times {
        let there = async || gateway.deliveries().len() >= 2 * time;
        eventually("they come again", Duration::from_secs(60) + LOOKED, there).await;
        came.push(Instant::now());
    }
    assert_eq!(gateway.texts(), ["a", "b"].repeat(times), "in order each time");
    let pauses: Vec<Duration> = came.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("repeated after {pauses:?}");
    // Each time it has 5 s to answer; then 5 s of rest, doubling, until the next regular look.
    for (pause, rest) in pauses.iter().zip([5, 10, 20, 40]) {
        assert!(*pause >= Duration::from_millis(4_500 + rest * 1_000), "{pauses:?}");
        assert!(*pause < allowed(Duration::from_secs(5 + rest) + LOOKED), "{pauses:?}");
    }
    let last = gateway.deliveries().split_off(2 * (times - 1));
    let ack = |delivery: Delivery| {
        let (delivery_id, device_id) = (delivery.delivery_id, PHONE.to_owned());
        pb::DeliveryAck { delivery_id, user_id: ALICE, device_id, not_here: false }
    };
    let acks = last.into_iter().map(ack).collect();
    gateways(node).ack_delivery(pb::AckDeliveryReq { acks }).await.expect("taken");
    all_gone(&cluster, SOON).await;

    // Whoever binds anew is not made to wait for that.
    store(node, storable(BOB, "c")).await;
    gateway.bind(BOB, PHONE, "c-1").await;
    gateway.hears(2 * times + 1).await;
    tokio::time::sleep(Duration::from_secs(6)).await; // it was given up
    let (before, began) = (gateway.deliveries().len(), Instant::now());
    gateway.bind(BOB, PHONE, "c-2").await;
    eventually("at once", AT_ONCE, async || gateway.deliveries().len() > before).await;
    println!("after a new bind: {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_while_stored_messages_wait_for_a_silent_device_is_answered_within_its_deadline() {
    /// Shorter than devices have for stored messages.
    const LIMIT: Duration = Duration::from_secs(2);
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let (mut silent, _) = RawStream::attach(node, GATEWAY, 0).await;
    let mut heard = Vec::new();
    for text in ["one", "two", "three"] {
        store(node, storable(ALICE, text)).await;
    }
    silent.send(7, bind_frame(ALICE, PHONE, "c")).await;
    for _ in 0..3 {
        heard.push(silent.delivery().await);
    }
    let in_time = async |message: DeliverReq| {
        let mut request = tonic::Request::new(message);
        request.set_timeout(LIMIT);
        node.presence().deliver(request).await.expect("an answer, not a deadline that has passed").into_inner()
    };
    let answer = in_time(storable(ALICE, "four")).await;
    assert_eq!((answer.stored, answer.delivered), (true, false), "{answer:?}");
    let answer = in_time(a_message(ALICE, "aside")).await;
    assert_eq!((answer.stored, answer.delivered), (false, true), "a gateway took it: {answer:?}");
    assert_eq!(silent.delivery().await.message, "aside");
    let answer = in_time(DeliverReq { ack_timeout_ms: 100, ..a_message(ALICE, "to be acknowledged") }).await;
    assert_eq!((code(&answer.result), answer.stored, answer.delivered), (Code::Undelivered, false, false), "{answer:?}");
    for delivery in &heard {
        silent.send(0, ack_frame(&delivery.delivery_id, ALICE, PHONE)).await;
    }
    while heard.len() < 4 {
        heard.extend(Some(silent.delivery().await).filter(|delivery| delivery.inbox_seq > 0));
    }
    assert_eq!(texts(&heard), ["one", "two", "three", "four"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_while_a_full_inbox_is_being_emptied_waits_for_that_and_is_not_refused() {
    let cluster = Cluster::mariadb(1, &[("DELIVERY__INBOX_MAX_MESSAGES", "3")]).await;
    let node = cluster.node();
    let (mut stream, _) = RawStream::attach(node, GATEWAY, 0).await;
    for text in ["one", "two", "three"] {
        store(node, storable(ALICE, text)).await;
    }
    stream.send(7, bind_frame(ALICE, PHONE, "c")).await;
    let heard = [stream.delivery().await, stream.delivery().await, stream.delivery().await];
    let mut client = node.presence();
    let mut call = tokio::spawn(async move { client.deliver(storable(ALICE, "four")).await });
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut call).await.is_err(), "there is no room for it yet");
    for delivery in heard {
        stream.send(0, ack_frame(&delivery.delivery_id, ALICE, PHONE)).await;
    }
    let answer = call.await.expect("the task").expect("an answer").into_inner();
    assert!(answer.delivered || answer.stored, "{answer:?}");
    assert_eq!(stream.delivery().await.message, "four");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_whose_devices_do_not_acknowledge_hold_up_nobody_else() {
    const SILENT: i64 = 100;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let silent = Arc::new(TestGateway::start(&cluster.nodes, GATEWAY, Devices::AreSilent).await);
    let gateway = TestGateway::start(&cluster.nodes, OTHER_GATEWAY, Devices::Acknowledge).await;
    for user in 1..=SILENT + 1 {
        store(node, storable(user, "hello")).await;
    }
    silent.bind_all(1..=SILENT).await;
    silent.hears(1).await;
    let began = Instant::now();
    gateway.bind(SILENT + 1, PHONE, "c").await;
    eventually("the message is there", AT_ONCE, async || !gateway.deliveries().is_empty()).await;
    println!("beside {SILENT} silent users it took {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_user_whose_rows_were_deleted_nothing_comes_back() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
        store(node, storable(ALICE, "secret")).await;
        store(node, storable(BOB, "secret, too")).await;
        gateway.bind(CAROL, PHONE, "c").await;
        store(node, for_device(LAPTOP, storable(CAROL, "for a laptop"))).await;
        let before = cluster.db.number("SELECT inbox_seq FROM users WHERE user_id = 1").await;
        for user in [ALICE, CAROL] {
            for table in ["routes", "inbox", "users"] {
                cluster.db.run(&format!("DELETE FROM {table} WHERE user_id = {user}")).await;
            }
        }
        gateway.bind(ALICE, PHONE, "c").await;
        gateway.bind(BOB, PHONE, "c").await;
        gateway.hears(1).await;
        assert_eq!(gateway.texts(), ["secret, too"]);
        assert!(!node.query_sql(CAROL).await.is_online);
        gateway.bind(CAROL, LAPTOP, "c-2").await;
        all_gone(cluster, SOON).await;
        store(node, for_device(LAPTOP, storable(ALICE, "later"))).await;
        let after = cluster.db.number("SELECT inbox_seq FROM users WHERE user_id = 1").await;
        assert!(after > before, "numbers do not come back: {after} after {before}");
        assert_eq!(gateway.texts(), ["secret, too"]);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_fails_what_is_answered_as_delivered_or_stored_arrives() {
    const USERS: usize = 200;
    const GATEWAYS: usize = 4;
    const CALLERS: usize = 8;
    let _turn = heavy().await;
    let messages: usize = if long() { 20_000 } else { 1_600 };
    let server = MariaDb::start();
    let mut cluster = Cluster::on_all(&server, Redis::two(), 2, &[("ROUTE__RETRY_INTERVAL", "200")]).await;
    let mut told = Vec::new();
    for n in 0..GATEWAYS {
        told.push(Arc::new(TestGateway::start(&cluster.nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await));
    }
    let gateway_of = |user: i64| usize::try_from(user).expect("a user") % GATEWAYS;
    let users_of = |n| (1..=USERS as i64).filter(move |user| gateway_of(*user) == n);
    for (n, gateway) in told.iter().enumerate() {
        gateway.bind_all(users_of(n)).await;
    }
    let answered = Arc::new(AtomicU64::new(0));
    let mut callers = JoinSet::new();
    for n in 0..CALLERS {
        let users = (1..=USERS as i64).filter(|user| (*user as usize / GATEWAYS) % CALLERS == n).collect();
        let (node, answered) = (cluster.nodes[n % 2].new_connection(), answered.clone());
        callers.spawn(acks::Caller { node, users, messages: messages / CALLERS, store_offline: true, answered }.run());
    }
    let share = async |share: f64| {
        let enough = (messages as f64 * share) as u64;
        eventually("messages are sent", Duration::from_secs(400), async || answered.load(Ordering::Relaxed) >= enough).await;
    };
    share(0.1).await;
    cluster.queue().kill();
    cluster.cache().kill();
    share(0.15).await;
    cluster.queue().restart();
    cluster.cache().restart();
    share(0.2).await;
    Arc::get_mut(&mut told[0]).expect("nobody else has it").leaves();
    share(0.35).await;
    told[1].bind_all(users_of(0)).await; // its clients come back elsewhere
    share(0.4).await;
    server.stop();
    tokio::time::sleep(Duration::from_secs(3)).await;
    server.cont();
    share(0.55).await;
    cluster.nodes[1].kill();
    share(0.65).await;
    cluster.nodes[1].restart().await;
    told[2].stall(true);
    share(0.8).await;
    told[2].stall(false);
    cluster.queue().kill();
    cluster.cache().kill();
    share(0.9).await;
    cluster.queue().restart();
    cluster.cache().restart();
    let sent: Vec<acks::Sent> = callers.join_all().await.into_iter().flatten().collect();
    let began = Instant::now();
    all_gone(&cluster, Duration::from_secs(120)).await;
    println!("the inboxes were empty {:?} after the last answer", began.elapsed());
    acks::check(&sent, messages, &told, gateway_of);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_message_to_thousands_is_stored_behind_everybodys_binds() {
    const USERS: i64 = 3_000;
    const BODY_BYTES: usize = 60 * 1024;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let (mut caller, user_ids) = (node.new_connection(), (1..=USERS).collect());
    let request = BatchDeliverReq { user_ids, message: "x".repeat(BODY_BYTES), store_offline: true, ..Default::default() };
    let before = node.rss_bytes();
    let began = Instant::now();
    let stored = tokio::spawn(async move { caller.batch_deliver(request).await });
    let (mut passed, mut peak, mut by_now) = (0, 0, 0);
    for n in 0.. {
        let earlier = by_now;
        node.bind(a_bind(USERS + 1 + n % 100, PHONE, &n.to_string())).await;
        by_now = waiting_for_all(&cluster).await;
        (passed, peak) = (passed.max(by_now - earlier), peak.max(node.rss_bytes()));
        if stored.is_finished() {
            break;
        }
    }
    let took = began.elapsed();
    let answer = stored.await.expect("the task").expect("a batch").into_inner();
    let refused = answer.users.iter().filter(|user| !user.stored).count();
    assert_eq!(refused, 0, "each is stored, however long all of them take");
    println!("{USERS} stored in {took:?}, {passed} during one bind, grew by {} MB", peak.saturating_sub(before) >> 20);
    // Not in seconds: a disk that stands still holds up both.
    assert!(passed < USERS / 4, "a bind waited while {passed} messages were stored");
    assert!(peak.saturating_sub(before) < (USERS as u64 * BODY_BYTES as u64) / 2, "one body for all of them");
}
