//! Redis with a primary that sentinels choose.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::DeliverReq;
use tonic::Code;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::Settings;
use crate::harness::redis::RedisServer;
use crate::harness::sentinel::DOWN_AFTER;
use crate::harness::sentinel::MASTER;
use crate::harness::sentinel::Sentinel;
use crate::harness::sentinel::settings_of;

const NOTICED_WITHIN: Duration = Duration::from_secs(5);
/// Until the sentinels have agreed on a new primary, also if one of them did not get its time.
const AGREED_WITHIN: Duration = Duration::from_secs(20);
/// After another is the primary.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(3);

/// A primary, its replica, and three sentinels.
async fn two_servers_and_three_sentinels() -> (RedisServer, RedisServer, Vec<Sentinel>) {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    second.replica_of(&first).await;
    let sentinels = Sentinel::three(&first, 1).await;
    (first, second, sentinels)
}

async fn is_promoted(replica: &RedisServer, within: Duration) {
    let promoted = async || replica.client().await.run::<String>(&["INFO", "replication"]).await.contains("role:master");
    eventually("the replica is promoted", within, promoted).await;
}

async fn cluster_with(settings: &Settings) -> Cluster {
    let more: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (&**key, &**value)).collect();
    Cluster::mariadb(2, &more).await
}

/// What another service sees of a user, on a server.
async fn key_is_there(server: &RedisServer, user: i64, within: Duration) {
    let key = format!("user:route:{user}");
    // Sentinels end the connections of a server whose role they change.
    eventually(&format!("{key} is written"), within, async || server.try_get(&key).await.is_some()).await;
}

async fn nothing_is_degraded(node: &Node, within: Duration) {
    eventually("all is well", within, async || node.degraded().await.is_empty()).await;
}

/// Whoever subscribes at this server hears a message.
async fn messages_arrive_at(server: &RedisServer, node: &Node, user: i64, within: Duration) {
    let mut gateway = server.subscribe(&[&format!("user:{user}")]).await;
    let began = Instant::now();
    loop {
        let message = DeliverReq { user_id: user, message: "hello".to_owned(), ..Default::default() };
        let _ = node.presence().deliver(message).await; // nobody hears it elsewhere
        if gateway.next(Duration::from_millis(100)).await.is_some() {
            return;
        }
        assert!(began.elapsed() < allowed(within), "no message within {within:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_primary_is_killed_both_uses_follow_the_sentinels_to_the_new_one() {
    let _turn = heavy().await;
    let (first, second, sentinels) = two_servers_and_three_sentinels().await;
    let cluster = cluster_with(&settings_of(&sentinels.iter().collect::<Vec<_>>())).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    key_is_there(&first, ALICE, NOTICED_WITHIN).await;
    let generation = async || cluster.db.number("SELECT generation FROM cluster").await;
    let before = generation().await;

    first.kill();
    let killed = Instant::now();
    node.bind(a_bind(BOB, PHONE, "c")).await;
    // How long the sentinels take is theirs: one that stood still for a moment waits before it acts.
    is_promoted(&second, AGREED_WITHIN).await;
    println!("another is the primary {:?} after the old one was killed, {DOWN_AFTER:?} of it to be sure", killed.elapsed());
    key_is_there(&second, BOB, FOLLOWED_WITHIN).await;
    println!("written to the new primary {:?} after the old one was killed", killed.elapsed());
    messages_arrive_at(&second, node, BOB, FOLLOWED_WITHIN).await;
    println!("published at it after {:?}", killed.elapsed());
    for node in &cluster.nodes {
        nothing_is_degraded(node, NOTICED_WITHIN).await;
    }
    assert_eq!(generation().await, before + 1, "another server, once");
    key_is_there(&second, ALICE, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_planned_fail_over_is_followed_and_the_former_primary_left() {
    let _turn = heavy().await;
    let (first, second, sentinels) = two_servers_and_three_sentinels().await;
    let cluster = cluster_with(&settings_of(&sentinels.iter().collect::<Vec<_>>())).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    key_is_there(&first, ALICE, NOTICED_WITHIN).await;

    // Refused, as long as it has not heard from the replica lately.
    let begins = async || sentinels[0].run::<()>(&["SENTINEL", "FAILOVER", MASTER]).await.is_ok();
    eventually("a fail-over begins", NOTICED_WITHIN, begins).await;
    let began = Instant::now();
    is_promoted(&second, NOTICED_WITHIN).await;
    let (promoted_after, promoted) = (began.elapsed(), Instant::now());
    node.bind(a_bind(BOB, PHONE, "c")).await;
    key_is_there(&second, BOB, NOTICED_WITHIN).await;
    println!("promoted after {promoted_after:?}, written there {:?} later", promoted.elapsed());
    messages_arrive_at(&second, node, BOB, FOLLOWED_WITHIN).await;
    nothing_is_degraded(node, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_are_wrong_stand_still_or_are_gone_are_passed_over() {
    let _turn = heavy().await;
    let (first, second, mut sentinels) = two_servers_and_three_sentinels().await;
    // This one takes the replica for the primary, nobody tells it otherwise, and it does not begin to doubt.
    let patient = format!("sentinel down-after-milliseconds {MASTER} 600000\n");
    let wrong = Sentinel::start_with(&second, 5, &patient);
    eventually("it answers", NOTICED_WITHIN, async || wrong.says().await.is_ok()).await;
    let all: Vec<&Sentinel> = std::iter::once(&wrong).chain(&sentinels).collect();
    let settings = settings_of(&all);
    sentinels[0].kill();
    sentinels[1].stop();
    let cluster = cluster_with(&settings).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    key_is_there(&first, ALICE, NOTICED_WITHIN).await;
    messages_arrive_at(&first, node, ALICE, NOTICED_WITHIN).await;
    nothing_is_degraded(node, NOTICED_WITHIN).await;

    // Without any of them: whoever is connected stays so.
    sentinels[2].kill();
    node.bind(a_bind(BOB, PHONE, "c")).await;
    key_is_there(&first, BOB, NOTICED_WITHIN).await;
    // Whoever is not has to wait for one of them.
    first.client().await.run::<()>(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    let both_are_down = async || {
        let degraded = node.degraded().await;
        ["redis_cache", "redis_queue"].iter().all(|part| degraded.iter().any(|named| named == part))
    };
    eventually("nobody knows where the primary is", NOTICED_WITHIN, async || {
        // The one that answers names a replica, which would take it, and reach nobody.
        let message = DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
        let refused = node.presence().deliver(message).await.expect_err("there is no primary");
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        both_are_down().await
    })
    .await;
    node.bind(a_bind(CAROL, PHONE, "c")).await;
    sentinels[1].cont();
    key_is_there(&first, CAROL, NOTICED_WITHIN).await;
    nothing_is_degraded(node, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_are_told_their_own_password_and_servers_are_not() {
    let first = RedisServer::start(); // knows no password, and refuses whoever gives one
    let sentinel = Sentinel::start_with(&first, 1, "requirepass sesame\n");
    let mut settings = settings_of(&[&sentinel]);
    settings.extend(["REDIS_CACHE", "REDIS_QUEUE"].map(|section| (format!("{section}__SENTINEL_PASSWORD"), "sesame".to_owned())));
    let cluster = cluster_with(&settings).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    key_is_there(&first, ALICE, NOTICED_WITHIN).await;
    messages_arrive_at(&first, cluster.node(), ALICE, NOTICED_WITHIN).await;
    nothing_is_degraded(cluster.node(), NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_the_sentinels_do_not_know_is_told() {
    let first = RedisServer::start();
    let sentinel = Sentinel::start(&first, 1);
    eventually("it answers", NOTICED_WITHIN, async || sentinel.says().await.is_ok()).await;
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut settings = db.settings(&[("REDIS_CACHE__SENTINEL_MASTER", "nobody"), ("REDIS_QUEUE__SENTINEL_MASTER", "nobody")]);
    settings.extend(settings_of(&[&sentinel]));
    let node = Node::start(settings).await;
    let told = ["where the primary of nobody is", "watches over no master of this name", "sentinel_master"];
    eventually("the log says what is wrong", NOTICED_WITHIN, async || {
        node.log().iter().any(|line| told.iter().all(|part| line.contains(part)))
    })
    .await;
    assert!(node.degraded().await.contains(&"redis_cache".to_owned()));
}
