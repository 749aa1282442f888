//! What input creates has an end: gateways that never register, users who never come back.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::UnbindRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::on;

/// After this time no transaction can still be under way.
const STRAGGLERS: Duration = Duration::from_secs(20);
const MARGIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_that_never_register_are_bounded_in_their_rate_and_end() {
    const NAMES: i64 = 3_000;
    const TOGETHER: usize = 300;
    let cluster = Cluster::sqlite(&[("ROUTE__ROUTE_TTL", "2")]).await;
    let (node, db) = (cluster.node(), &cluster.db);
    let binds: Vec<_> = (0..NAMES).map(|n| on(&format!("gw-{n}:7000"), 0, a_bind(1 + n, PHONE, "c"))).collect();
    let (began, mut bound, mut refused) = (Instant::now(), 0, None);
    for binds in binds.chunks(TOGETHER) {
        let answer = node.presence().batch_bind_route(BatchBindRouteReq { binds: binds.to_vec() }).await.expect("binds");
        let (good, others): (Vec<_>, Vec<_>) =
            answer.into_inner().results.into_iter().partition(|bound| code(&bound.result) == Code::Ok);
        (bound, refused) = (bound + good.len(), others.into_iter().next());
        if refused.is_some() {
            break; // of a batch that was refused altogether the call fails
        }
    }
    let most = 2_000 + 20 * (began.elapsed().as_secs() as usize + 1);
    assert!((2_000..=most).contains(&bound), "{bound} names at once");
    let refused = refused.expect("too many");
    assert!(code(&refused.result) == Code::Unavailable && refused.retry_after_ms > 0, "{refused:?}");
    let known = on("gw-0:7000", 0, a_bind(ALICE, PHONE, "c"));
    assert_eq!(code(&node.bind(known).await.result), Code::Ok, "who is known already is not refused");
    let living = async || db.number("SELECT COUNT(*) FROM lives WHERE alive = 1").await;
    assert!(living().await >= 2_000);
    let they_end = async || {
        db.clock_was_steady().await; // so many binds may have kept the node from beating
        living().await == 0
    };
    eventually("they end", 2 * STRAGGLERS + MARGIN, they_end).await;
    let lives = node.list_gateways(false).await.lives;
    assert_eq!(lives.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bind_to_a_gateway_whose_unused_life_is_closed_begins_a_new_one() {
    let cluster = Cluster::mariadb(2, &[("ROUTE__ROUTE_TTL", "3600")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let first = one.bind(on("never:7000", 0, a_bind(ALICE, PHONE, "c"))).await;
    let unbind = UnbindRouteReq { user_id: ALICE, route_key: first.route_key.clone(), ..Default::default() };
    assert!(one.unbind(unbind).await.unbound);
    cluster.db.run("UPDATE lives SET draining = 2 WHERE gateway_addr = 'never:7000'").await;
    let second = two.bind(on("never:7000", 0, a_bind(BOB, PHONE, "c"))).await;
    assert!(second.gateway_epoch > first.gateway_epoch, "{second:?}");
    cluster.db.run("UPDATE lives SET alive = 0, ended_at = 1, swept_at = 1 WHERE draining = 2").await;
    for node in [one, two] {
        assert!(node.query_sql(BOB).await.is_online && !node.query_sql(ALICE).await.is_online);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_of_long_ago_is_forgotten_which_worries_nobody_who_knew_them() {
    const DAY_US: i64 = 86_400 * 1_000_000;
    let mut cluster = Cluster::mariadb(1, &[("STORE__FORGET_USERS_AFTER", "604800")]).await;
    let insert = async |user: i64, days: i64| {
        let long_ago = format!("CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED) - {}", days * DAY_US);
        cluster.db.run(&format!("INSERT INTO users (user_id, version, last_seen_ms) VALUES ({user}, {long_ago}, 1)")).await;
    };
    insert(ALICE, 8).await;
    insert(BOB, 6).await;
    assert!(cluster.node().query(ALICE).await.version > 0, "this node knows her");
    let there = async |cluster: &Cluster, user: i64| {
        cluster.db.number(&format!("SELECT COUNT(*) FROM users WHERE user_id = {user}")).await
    };
    // A node looks when it starts. On a busy machine a gap in the beats may make the clock doubtful just then.
    for _ in 0..5 {
        cluster.db.clock_was_steady().await;
        cluster.db.run("UPDATE jobs SET until = 0 WHERE name = 'orphans'").await; // else the first node's claim is waited for
        cluster.add_node(&[("STORE__FORGET_USERS_AFTER", "604800")]).await;
        let began = Instant::now();
        while there(&cluster, ALICE).await > 0 && began.elapsed() < MARGIN / 2 {
            tokio::time::sleep(MARGIN / 100).await;
        }
        if there(&cluster, ALICE).await == 0 {
            break;
        }
    }
    assert_eq!((there(&cluster, ALICE).await, there(&cluster, BOB).await), (0, 1), "his time is not over");
    let knew_her = &cluster.nodes[0];
    assert_eq!(knew_her.query_sql(ALICE).await.version, 0);
    assert!(!knew_her.log().iter().any(|line| line.contains("set back")), "{:?}", knew_her.log());
    let back = knew_her.bind(a_bind(ALICE, PHONE, "c")).await;
    assert!(code(&back.result) == Code::Ok && knew_her.query(ALICE).await.is_online);
}
