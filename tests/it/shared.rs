//! Redis as the second tier, and what other services find there.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BindRouteReq;
use im_presence::pb::NodeFrame;
use im_presence::pb::Reason;
use im_presence::pb::Source;
use im_presence::pb::UnbindRouteReq;
use im_presence::pb::node_frame::Body;
use prost::Message;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::percentile;
use crate::harness::traffic::Traffic;
use crate::harness::traffic::everything_agrees_with_sql;

const SHOWN_WITHIN: Duration = Duration::from_secs(2);
/// How far Redis may be behind, as the answers say it.
const SHARED_AGE_MS: u32 = 3_000;
const ROUTE_CHANNEL: &str = "presence:route";

fn an_unbind(user: i64, route_key: String) -> UnbindRouteReq {
    UnbindRouteReq { user_id: user, route_key, ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_services_find_a_user_by_the_keys_they_know_whichever_node_was_told() {
    let cluster = Cluster::with_redis(2, &[("ROUTE__ROUTE_TTL", "600"), ("ROUTE__STATUS_TTL", "300")]).await;
    let redis = cluster.cache().client().await;
    let mut changes = cluster.queue().subscribe(&[ROUTE_CHANNEL]).await;
    for (node, user) in cluster.nodes.iter().zip([ALICE, BOB]) {
        let (route, status) = (format!("user:route:{user}"), format!("user:status:{user}"));
        let bound = node.bind(a_bind(user, PHONE, "c")).await;
        assert_eq!(changes.text(SHOWN_WITHIN).await, format!("{user}:{GATEWAY}"));
        assert_eq!(redis.get(&route).await.as_deref(), Some(GATEWAY));
        assert_eq!(redis.get(&status).await.as_deref(), Some("online"));
        for key in [&route, &status] {
            let ttl = redis.ttl(key).await;
            assert!((590..=600).contains(&ttl), "{key} ends with the route, which nobody renews: {ttl}");
        }
        assert!(redis.has(&format!("user:record:{user}")).await);

        node.unbind(an_unbind(user, bound.route_key)).await;
        assert_eq!(changes.text(SHOWN_WITHIN).await, format!("{user}:"));
        assert_eq!(redis.get(&route).await, None);
        assert_eq!(redis.get(&status).await.as_deref(), Some("offline"));
        let ttl = redis.ttl(&status).await;
        assert!((290..=300).contains(&ttl), "{status} outlives the route by status_ttl: {ttl}");
    }
    assert_eq!(redis.keys("user:*").await.len(), 4, "two statuses and two records: {:?}", redis.keys("user:*").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_names_the_gateway_that_was_bound_last_until_the_last_route_has_gone() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let redis = cluster.cache().client().await;
    let mut changes = cluster.queue().subscribe(&[ROUTE_CHANNEL]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(ALICE, PHONE, "c")).await;
    let laptop = BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(ALICE, LAPTOP, "c") };
    let laptop = two.bind(laptop).await;
    changes.hears(&format!("{ALICE}:{OTHER_GATEWAY}"), SHOWN_WITHIN).await;
    assert_eq!(redis.get("user:route:1").await.as_deref(), Some(OTHER_GATEWAY));
    one.unbind(an_unbind(ALICE, laptop.route_key)).await;
    changes.hears(&format!("{ALICE}:{GATEWAY}"), SHOWN_WITHIN).await;
    assert_eq!(redis.get("user:route:1").await.as_deref(), Some(GATEWAY));
    assert_eq!(redis.get("user:status:1").await.as_deref(), Some("online"));
}

#[tokio::test]
async fn without_mpim_keys_only_the_record_is_written() {
    let cluster = Cluster::with_redis(1, &[("ROUTE__MPIM_KEYS", "false")]).await;
    let mut changes = cluster.queue().subscribe(&[ROUTE_CHANNEL]).await;
    let bound = cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    changes.hears(&format!("{ALICE}:{GATEWAY}"), SHOWN_WITHIN).await;
    let redis = cluster.cache().client().await;
    assert_eq!(redis.keys("user:*").await, ["user:record:1"]);
    cluster.node().unbind(an_unbind(ALICE, bound.route_key)).await;
    changes.hears(&format!("{ALICE}:"), SHOWN_WITHIN).await;
    assert_eq!(redis.keys("user:*").await, ["user:record:1"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_channel_begins_with_the_prefix() {
    let more = [("REDIS_QUEUE__CHANNEL_PREFIX", "staging:"), ("ROUTE__MAX_DEVICES", "1")];
    let cluster = Cluster::with_redis(2, &more).await;
    let mut everything = cluster.queue().subscribe_to_all().await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    node.bind(BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(ALICE, LAPTOP, "c") }).await;
    let message = im_presence::pb::DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
    node.presence().deliver(message).await.expect("a delivery");
    let mut missing = vec!["hint", "presence:route", "gateway:gw-1:7000", "user:1"];
    let began = Instant::now();
    while !missing.is_empty() {
        let left = SHOWN_WITHIN.saturating_sub(began.elapsed());
        let (channel, _) = everything.next(left).await.unwrap_or_else(|| panic!("nothing on {missing:?}"));
        let name = channel.strip_prefix("staging:").unwrap_or_else(|| panic!("{channel} lacks the prefix"));
        missing.retain(|wanted| !name.ends_with(wanted));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_is_told_to_close_the_connection_that_another_devices_bind_has_removed() {
    let cluster = Cluster::with_redis(2, &[("ROUTE__MAX_DEVICES", "1")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut orders = cluster.queue().subscribe(&[&format!("gateway:{GATEWAY}")]).await;
    let phone = one.bind(a_bind(ALICE, PHONE, "c")).await;
    let laptop = BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(ALICE, LAPTOP, "c") };
    let laptop = two.bind(laptop).await;
    assert_eq!(laptop.kicked.len(), 1, "{laptop:?}");
    let (_, frame) = orders.next(SHOWN_WITHIN).await.expect("an order");
    let frame = NodeFrame::decode(frame.as_slice()).expect("a NodeFrame");
    let Some(Body::Kick(kick)) = frame.body else { panic!("not a kick: {frame:?}") };
    assert_eq!((kick.user_id, kick.device_id.as_str(), &kick.route_key), (ALICE, PHONE, &phone.route_key));
    assert_eq!(kick.reason(), Reason::DeviceLimit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bind_shows_on_the_other_node_at_once_and_no_answer_ever_goes_back() {
    const BINDS: usize = 200;
    const USERS: usize = 20;
    const WITHIN: Duration = Duration::from_secs(5);
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[]).await;
    let mut delays = Vec::new();
    for i in 0..BINDS {
        let user = (i % USERS) as i64 + 1_000;
        let node = (i + i / USERS) % 2;
        let other = &cluster.nodes[1 - node];
        other.query(user).await; // it remembers what was before
        let bound = cluster.nodes[node].bind(a_bind(user, PHONE, &format!("c-{i}"))).await;
        let acknowledged = Instant::now();
        loop {
            if other.query(user).await.version >= bound.version {
                break;
            }
            assert!(acknowledged.elapsed() < allowed(WITHIN), "user {user} does not show");
        }
        delays.push(acknowledged.elapsed());
    }
    let (p50, p99, max) = (percentile(&mut delays, 0.5), percentile(&mut delays, 0.99), percentile(&mut delays, 1.0));
    println!("seen by the other node: p50 {p50:?}, p99 {p99:?}, max {max:?}");
    assert!(p99 < allowed(Duration::from_millis(500)), "{p99:?}");
    assert!(p50 < Duration::from_millis(300), "without hints it takes a beat, a second: {p50:?}");

    let traffic = Traffic::start(&cluster, 100);
    traffic.goes_on(1_500).await;
    let (written, seen) = traffic.stop().await;
    assert!(written.refused.is_empty() && seen.iter().all(|reader| reader.refused.is_empty()), "{written:?}");
    everything_agrees_with_sql(&cluster, 1..=100, SHOWN_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_answer_goes_back_on_nodes_that_remember_nothing() {
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[("ROUTE__L1_CAPACITY", "0")]).await;
    let traffic = Traffic::start(&cluster, 100);
    traffic.goes_on(1_500).await;
    let (written, seen) = traffic.stop().await;
    assert!(written.refused.is_empty() && seen.iter().all(|reader| reader.refused.is_empty()), "{written:?}");
    everything_agrees_with_sql(&cluster, 1..=100, SHOWN_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_does_not_remember_it_reads_from_redis_and_says_so() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut changes = cluster.queue().subscribe(&[ROUTE_CHANNEL]).await;
    one.bind(a_bind(BOB, PHONE, "c")).await;
    two.query_sql(BOB).await; // now it knows the gateway, without which no record makes sense
    let bound = one.bind(a_bind(ALICE, PHONE, "c")).await;
    changes.hears(&format!("{ALICE}:{GATEWAY}"), SHOWN_WITHIN).await;
    assert_eq!(one.metric("im_presence_l2_hits_total").await, 0.0, "nobody has asked it; looking after its own is no hit");
    let answer = two.query(ALICE).await;
    assert_eq!((answer.version, answer.source(), answer.age_ms), (bound.version, Source::Shared, SHARED_AGE_MS));
    assert_eq!((answer.gateway_addr.as_str(), answer.routes[0].conn_id.as_str()), (GATEWAY, "c"));
    let again = two.query(ALICE).await;
    assert_eq!((again.version, again.source()), (bound.version, Source::Local), "now it does remember");
    let close = two.try_query(ALICE, Some(SHARED_AGE_MS - 1)).await.expect("a query");
    assert_eq!((close.version, close.source(), close.age_ms), (bound.version, Source::Durable, 0), "Redis is not good enough");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_restarted_and_cannot_hold_its_users_reads_them_from_redis() {
    const USERS: i64 = 50;
    let mut cluster = Cluster::with_redis(2, &[("ROUTE__L1_CAPACITY", "0")]).await;
    for user in 1..=USERS {
        cluster.nodes[user as usize % 2].bind(a_bind(user, PHONE, "c")).await;
    }
    everything_agrees_with_sql(&cluster, 1..=USERS, SHOWN_WITHIN).await;
    let two = &mut cluster.nodes[1];
    two.terminate();
    two.ended().await;
    two.restart().await;
    eventually("memory was warmed up", SHOWN_WITHIN, async || two.log().iter().any(|line| line.contains("memory is warm"))).await;
    // Redis is believed once the node has seen that nothing waits to be shown there.
    let mut asked = 0;
    eventually("Redis is read", SHOWN_WITHIN, async || {
        asked += 1;
        two.query(1 + asked % USERS).await.source() == Source::Shared
    })
    .await;
    let mut shared = 0;
    for user in 1..=USERS {
        let answer = two.query(user).await;
        assert_ne!(answer.source(), Source::Durable, "{answer:?}");
        if answer.source() == Source::Shared {
            assert_eq!(answer.age_ms, SHARED_AGE_MS);
            shared += 1;
        }
    }
    println!("{shared} of {USERS} users were read from Redis");
    assert!(shared >= USERS / 2, "{shared}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_another_database_of_the_same_redis_everybody_is_shown_anew() {
    let mut cluster = Cluster::with_redis(1, &[]).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    everything_agrees_with_sql(&cluster, ALICE..=ALICE, SHOWN_WITHIN).await;
    let mut before = cluster.nodes.remove(0);
    before.terminate();
    before.ended().await;
    let other = format!("redis://127.0.0.1:{}/1", cluster.cache().port);
    cluster.add_node(&[("REDIS_CACHE__URL", &other)]).await;
    let redis = cluster.cache().client().await;
    redis.run::<()>(&["SELECT", "1"]).await;
    let shown = async || redis.get("user:route:1").await.as_deref() == Some(GATEWAY);
    eventually("she is shown there, too", SHOWN_WITHIN, shown).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_was_shown_is_not_taken_for_one_that_was_left_behind_though_nothing_follows_it() {
    /// Before any node would take the row over.
    const DONE_WITHIN: Duration = Duration::from_millis(1_900);
    let cluster = Cluster::with_redis(2, &[]).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    eventually("it is done", DONE_WITHIN, async || cluster.db.number("SELECT COUNT(*) FROM outbox").await == 0).await;
    for node in &cluster.nodes {
        assert_eq!(node.metric("im_presence_outbox_repaired_total").await, 0.0);
    }
}
