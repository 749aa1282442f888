//! Two nodes show the changes of one user, and what the first one says arrives last.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BindRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::redis::Subscriber;
use crate::harness::redis_proxy::RedisProxy;
use crate::harness::traffic::everything_agrees_with_sql;

const SHOWN_WITHIN: Duration = Duration::from_secs(3);
/// Longer than anything is still on its way.
const QUIET: Duration = Duration::from_secs(1);

fn elsewhere(conn: &str) -> BindRouteReq {
    BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(ALICE, PHONE, conn) }
}

/// All that is said until nothing more is.
async fn said(changes: &mut Subscriber) -> Vec<String> {
    let mut said = Vec::new();
    while let Some((_, body)) = changes.next(QUIET).await {
        said.push(String::from_utf8(body).expect("text"));
    }
    said
}

async fn nothing_is_left_to_show(cluster: &Cluster) {
    let rows = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await;
    eventually("nothing is left to show", SHOWN_WITHIN, async || rows().await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_change_that_arrives_in_redis_behind_a_newer_one_changes_nothing_there() {
    let _turn = heavy().await;
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    let proxy = RedisProxy::start(cluster.cache().port).await;
    cluster.add_node(&[("REDIS_CACHE__URL", &proxy.url())]).await;
    let [direct, slow] = &cluster.nodes[..] else { panic!("two nodes") };
    slow.bind(a_bind(ALICE, PHONE, "4")).await;
    everything_agrees_with_sql(&cluster, ALICE..=ALICE, SHOWN_WITHIN).await;
    nothing_is_left_to_show(&cluster).await;

    let mut changes = cluster.queue().subscribe(&["presence:route"]).await;
    proxy.hold("EVALSHA");
    let five = slow.bind(a_bind(ALICE, PHONE, "5")).await;
    proxy.struck().await;
    let six = direct.bind(elsewhere("6")).await;
    assert!(six.version > five.version);
    changes.hears(&format!("{ALICE}:{OTHER_GATEWAY}"), SHOWN_WITHIN).await;
    proxy.release();
    nothing_is_left_to_show(&cluster).await;
    let said = said(&mut changes).await;
    assert!(said.iter().all(|change| *change == format!("{ALICE}:{OTHER_GATEWAY}")), "{said:?}");
    everything_agrees_with_sql(&cluster, ALICE..=ALICE, SHOWN_WITHIN).await;
    let redis = cluster.cache().client().await;
    assert_eq!(redis.get("user:route:1").await.as_deref(), Some(OTHER_GATEWAY));
    assert!(redis.run::<Vec<u8>>(&["GET", "user:record:1"]).await[20..].starts_with(format!("{:020}", six.version).as_bytes()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_was_overtaken_is_followed_by_what_is_true() {
    /// As many as it takes, on a machine that stalls now and then.
    const ROUNDS: usize = 30;
    const ENOUGH: usize = 3;
    /// A node that cannot say it within 200 ms gives up, and then nothing arrives late.
    const SOON: Duration = Duration::from_millis(120);
    let _turn = heavy().await;
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    let proxy = RedisProxy::start(cluster.queue().port).await;
    cluster.add_node(&[("REDIS_QUEUE__URL", &proxy.url())]).await;
    let [direct, slow] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut overtaken = 0;
    for round in 0..ROUNDS {
        slow.bind(a_bind(ALICE, PHONE, &format!("4-{round}"))).await;
        nothing_is_left_to_show(&cluster).await;
        let mut changes = cluster.queue().subscribe(&["presence:route"]).await;
        proxy.hold("presence:route");
        let began = Instant::now();
        slow.bind(a_bind(ALICE, PHONE, &format!("5-{round}"))).await;
        proxy.struck().await;
        direct.bind(elsewhere(&format!("6-{round}"))).await;
        changes.hears(&format!("{ALICE}:{OTHER_GATEWAY}"), SHOWN_WITHIN).await;
        let soon = began.elapsed() < SOON;
        proxy.release();
        nothing_is_left_to_show(&cluster).await;
        let said = said(&mut changes).await;
        println!("after {:?}: {said:?}", began.elapsed());
        if soon {
            overtaken += 1;
            assert_eq!(said.first(), Some(&format!("{ALICE}:{GATEWAY}")), "the old one was late");
            assert_eq!(said.last(), Some(&format!("{ALICE}:{OTHER_GATEWAY}")), "{said:?}");
        }
        everything_agrees_with_sql(&cluster, ALICE..=ALICE, SHOWN_WITHIN).await;
        if overtaken == ENOUGH {
            break;
        }
    }
    assert!(overtaken > 0, "the test was a test");
}
