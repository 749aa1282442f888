//! What nodes tell each other gets lost, repeated or overtaken, or does not arrive at all.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::Source;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::node::Node;
use crate::harness::redis_proxy::Fault;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::traffic::Traffic;
use crate::harness::traffic::everything_agrees_with_sql;

const BUSY: i64 = 100;
const NOTICED_WITHIN: Duration = Duration::from_secs(6);
/// How old an answer may be, ever; and on a node that knows that it is deaf.
const OLDEST_ANSWER: Duration = Duration::from_secs(3);
const OLDEST_WHILE_DEAF: Duration = Duration::from_secs(1);
/// Nodes beat once a second, and a beat shows what was lost before it.
const BEAT: Duration = Duration::from_secs(1);
/// For the machine.
const ALLOWANCE: Duration = Duration::from_millis(500);
const AGREES_WITHIN: Duration = Duration::from_secs(10);

/// Two nodes; the second one hears through a proxy.
async fn one_hears_through_a_proxy() -> (Cluster, RedisProxy) {
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    let proxy = RedisProxy::start(cluster.queue().port).await;
    cluster.add_node(&[("REDIS_QUEUE__URL", &proxy.url())]).await;
    (cluster, proxy)
}

/// Asks until the answer is `version`, and insists that each answer before it was honest. Returns how long that took.
async fn shows(node: &Node, user: i64, version: u64, acknowledged: Instant) -> Duration {
    loop {
        let asked = Instant::now();
        let answer = node.query(user).await;
        if answer.version >= version {
            return acknowledged.elapsed();
        }
        let age = Duration::from_millis(answer.age_ms.into()) + Duration::from_millis(1);
        let behind = asked.saturating_duration_since(acknowledged);
        assert!(age >= behind, "further behind than it says, {behind:?}: {answer:?}");
        assert!(behind < allowed(OLDEST_ANSWER), "{behind:?}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hint_that_is_lost_repeated_or_overtaken_makes_no_answer_older_than_it_says() {
    const TIMES: usize = 3;
    let _turn = heavy().await;
    let (cluster, proxy) = one_hears_through_a_proxy().await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    for (turn, fault) in [Fault::Lost, Fault::Repeated, Fault::Overtaken].repeat(TIMES).into_iter().enumerate() {
        for user in [ALICE, BOB] {
            let before = one.bind(a_bind(user, PHONE, &format!("before-{turn}"))).await;
            shows(two, user, before.version, Instant::now()).await;
        }
        eventually("it remembers her", NOTICED_WITHIN, async || two.query(ALICE).await.source() == Source::Local).await;
        let gaps = two.metric("im_presence_hint_gaps_total").await;
        proxy.next_hint_is(fault);
        let alice = one.bind(a_bind(ALICE, PHONE, &format!("after-{turn}"))).await;
        let acknowledged = Instant::now();
        if fault == Fault::Overtaken {
            one.bind(a_bind(BOB, PHONE, &format!("after-{turn}"))).await;
        }
        proxy.struck().await;
        let delay = shows(two, ALICE, alice.version, acknowledged).await;
        println!("{fault:?}: her bind shows after {delay:?}");
        assert!(delay < allowed(BEAT + ALLOWANCE), "{fault:?}: {delay:?}");
        eventually("it is noticed", BEAT + ALLOWANCE, async || two.metric("im_presence_hint_gaps_total").await > gaps).await;
    }
    let traffic = Traffic::start(&cluster, BUSY);
    for fault in [Fault::Lost, Fault::Repeated, Fault::Overtaken].repeat(TIMES) {
        traffic.goes_on(50).await;
        proxy.next_hint_is(fault);
        proxy.struck().await;
    }
    let (written, seen) = traffic.stop().await;
    assert!(written.refused.is_empty() && seen.iter().all(|reader| reader.refused.is_empty()), "{written:?}");
    for reader in &seen {
        assert!(reader.oldest < allowed(BEAT + ALLOWANCE), "{:?}", reader.oldest);
    }
    everything_agrees_with_sql(&cluster, 1..=BUSY, AGREES_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_subscription_is_silently_dead_says_so_trusts_its_memory_for_a_second_and_heals_alone() {
    let _turn = heavy().await;
    let dead_for = Duration::from_secs(if long() { 60 } else { 6 });
    let (cluster, proxy) = one_hears_through_a_proxy().await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(300).await;
    proxy.swallow();
    let since = Instant::now();
    eventually("readiness tells", NOTICED_WITHIN, async || two.degraded().await == ["hints"]).await;
    println!("deaf, and says so after {:?}", since.elapsed());
    let mut delays = Vec::new();
    for turn in 0.. {
        if since.elapsed() > dead_for {
            break;
        }
        let user = BUSY + 1 + turn % 10;
        two.query(user).await; // it remembers what was before
        let bound = one.bind(a_bind(user, PHONE, &format!("c-{turn}"))).await;
        delays.push(shows(two, user, bound.version, Instant::now()).await);
    }
    let longest = delays.iter().max().copied().unwrap_or_default();
    println!("{} binds meanwhile, the last of them showed after {longest:?}", delays.len());
    assert!(longest < allowed(OLDEST_WHILE_DEAF + ALLOWANCE), "{longest:?}");
    assert_eq!(two.degraded().await, ["hints"]);
    assert_eq!(one.degraded().await, [""; 0], "it hears both");
    proxy.release();
    eventually("it heals", NOTICED_WITHIN, async || two.degraded().await.is_empty()).await;
    traffic.goes_on(300).await;
    let (written, seen) = traffic.stop().await;
    assert!(written.refused.is_empty() && seen.iter().all(|reader| reader.refused.is_empty()), "{written:?}");
    for reader in &seen {
        assert!(reader.oldest < allowed(OLDEST_ANSWER + ALLOWANCE), "{:?}", reader.oldest);
    }
    everything_agrees_with_sql(&cluster, 1..=BUSY, AGREES_WITHIN).await;
}

/// Such a one may have acknowledged what nobody has heard of: its messages got lost, or it stood still.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_node_that_was_not_heard_nothing_counts_as_known_however_new_it_is_to_the_list() {
    const LISTED_FOR: Duration = Duration::from_secs(3);
    let mut cluster = Cluster::with_redis(1, &[]).await;
    cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", "stopped")]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let hears_all = async || node.degraded().await.is_empty();
    let is_deaf_while_listed = async |id: &str| {
        tokio::time::sleep(LISTED_FOR + BEAT).await; // so long it has heard nothing of that one
        eventually("nobody is missed", NOTICED_WITHIN, hears_all).await;
        let seen_at = "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - 1000"; // so it is listed for two seconds more
        let list = format!(
            "INSERT INTO nodes (node_id, addr, seen_at) VALUES ('{id}', 'x:1', {seen_at}) ON DUPLICATE KEY UPDATE seen_at = {seen_at}"
        );
        cluster.db.run(&list).await;
        let since = Instant::now();
        while since.elapsed() < LISTED_FOR - BEAT {
            if node.degraded().await == ["hints"] {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        false // or it has not looked at the list meanwhile
    };
    let one_of_them = async |ids: [&str; 3]| {
        for id in ids {
            if is_deaf_while_listed(id).await {
                return true;
            }
        }
        false
    };
    assert!(one_of_them(["never-1", "never-2", "never-3"]).await, "one that was never heard");
    other.stop();
    assert!(one_of_them(["stopped"; 3]).await, "one that is listed again while it stands still");
}
