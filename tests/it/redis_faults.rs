//! Redis fails, stands still, or comes back with what it knew long ago. SQL is the truth all the time.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::QueryRouteReq;
use im_presence::pb::Source;
use im_presence::pb::UnbindRouteReq;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::percentile;
use crate::harness::redis::RedisServer;
use crate::harness::redis::Switch;
use crate::harness::traffic::Seen;
use crate::harness::traffic::Traffic;
use crate::harness::traffic::Written;
use crate::harness::traffic::everything_agrees_with_sql;

/// Users of [`Traffic`]; whoever comes after them is not touched by it.
const BUSY: i64 = 100;
const NOTICED_WITHIN: Duration = Duration::from_secs(5);
/// After Redis came back, with whatever data.
const KEYS_AGREE_WITHIN: Duration = Duration::from_secs(10);
const REPAIRED_WITHIN: Duration = Duration::from_secs(5);
/// How old an answer may be, ever.
const OLDEST_ANSWER: Duration = Duration::from_secs(3);
/// For the machine.
const ALLOWANCE: Duration = Duration::from_millis(500);
/// A node that remembers nobody.
const COLD: (&str, &str) = ("ROUTE__L1_CAPACITY", "0");

async fn bind_all(node: &Node, users: RangeInclusive<i64>, conn: &str) {
    let binds = users.map(|user| a_bind(user, PHONE, conn)).collect();
    let answer = node.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
    assert!(answer.results.iter().all(|bind| code(&bind.result) == Code::Ok));
}

/// A node that remembers nobody finds users 1 and 2 in Redis.
async fn redis_answers(node: &Node) {
    eventually("Redis answers", NOTICED_WITHIN, async || {
        node.query(1).await;
        node.query(2).await.source() == Source::Shared
    })
    .await;
}

async fn unbind_all(node: &Node, users: RangeInclusive<i64>) {
    for user in users {
        let (gateway_addr, device_id) = (GATEWAY.to_owned(), PHONE.to_owned());
        let gone = node.unbind(UnbindRouteReq { user_id: user, gateway_addr, device_id, ..Default::default() }).await;
        assert!(gone.unbound, "{gone:?}");
    }
}

async fn degraded_becomes(cluster: &Cluster, parts: &[&str]) {
    for node in &cluster.nodes {
        eventually("readiness tells", NOTICED_WITHIN, async || node.degraded().await == parts).await;
    }
}

fn nothing_was_refused(written: &Written, seen: &[Seen]) {
    assert!(written.refused.is_empty(), "{:?}", written.refused);
    for reader in seen {
        assert!(reader.refused.is_empty(), "{:?}", reader.refused);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_cache_binds_and_queries_go_on_and_an_empty_one_is_filled_again() {
    const RESTING: RangeInclusive<i64> = BUSY + 1..=BUSY + 200;
    let _turn = heavy().await;
    let cluster = Cluster::with_two_redis(2, &[]).await;
    bind_all(cluster.node(), RESTING, "c").await;
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(300).await;
    cluster.cache().kill();
    degraded_becomes(&cluster, &["redis_cache"]).await;
    traffic.goes_on(600).await;
    cluster.cache().restart();
    let returned = Instant::now();
    degraded_becomes(&cluster, &[]).await;
    traffic.goes_on(300).await;
    let (written, seen) = traffic.stop().await;
    nothing_was_refused(&written, &seen);
    assert!(written.slowest < allowed(Duration::from_secs(1)), "{:?}", written.slowest);
    everything_agrees_with_sql(&cluster, 1..=*RESTING.end(), KEYS_AGREE_WITHIN.saturating_sub(returned.elapsed())).await;
}

/// Data of long ago comes back, in a way that `set_back` chooses between two phases.
async fn old_data_comes_back(cluster: &Cluster, grow_old: impl AsyncFnOnce(), lose: impl FnOnce(), set_back: impl AsyncFnOnce()) {
    const LEFT_BEFORE: RangeInclusive<i64> = BUSY + 1..=BUSY + 25;
    const LEFT_MEANWHILE: RangeInclusive<i64> = BUSY + 26..=BUSY + 50;
    /// Longer than anything here is remembered or waited for.
    const WATCHED_FOR: Duration = Duration::from_secs(5);
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    bind_all(one, 1..=*LEFT_MEANWHILE.end(), "c").await;
    everything_agrees_with_sql(cluster, 1..=*LEFT_MEANWHILE.end(), NOTICED_WITHIN).await;
    let traffic = Traffic::start(cluster, BUSY);
    grow_old().await;
    traffic.goes_on(300).await;
    unbind_all(one, LEFT_BEFORE).await;
    lose();
    traffic.goes_on(300).await;
    unbind_all(two, LEFT_MEANWHILE).await;
    set_back().await;
    let returned = Instant::now();
    let mut online = Vec::new();
    while returned.elapsed() < WATCHED_FOR {
        for (number, node) in cluster.nodes.iter().enumerate() {
            for user in *LEFT_BEFORE.start()..=*LEFT_MEANWHILE.end() {
                let answer = node.query(user).await;
                if answer.is_online {
                    online.push((number, returned.elapsed(), user, answer.source(), answer.age_ms));
                }
            }
        }
    }
    let (written, seen) = traffic.stop().await;
    everything_agrees_with_sql(cluster, 1..=*LEFT_MEANWHILE.end(), KEYS_AGREE_WITHIN.saturating_sub(returned.elapsed())).await;
    nothing_was_refused(&written, &seen);
    assert!(online.is_empty(), "these users left before: {:?} of {}", &online[..online.len().min(10)], online.len());
}

async fn a_dump_comes_back(more: &[(&str, &str)]) {
    let _turn = heavy().await;
    let cluster = Cluster::with_two_redis(2, more).await;
    let cache = cluster.cache();
    old_data_comes_back(&cluster, || cache.dump(), || cache.kill(), async || cache.restart()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_comes_back_with_an_old_dump_answers_nobody_and_is_put_right() {
    a_dump_comes_back(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_even_on_nodes_that_remember_nothing() {
    a_dump_comes_back(&[COLD]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_lagged_and_was_promoted_answers_nobody_and_is_put_right() {
    let _turn = heavy().await;
    let (master, lagging) = (RedisServer::start(), RedisServer::start());
    let switch = Switch::start(master.port).await;
    let url = format!("redis://127.0.0.1:{}", switch.port);
    let cluster = Cluster::with_cache(2, &[COLD, ("REDIS_CACHE__URL", &url)], lagging).await;
    let lagging = cluster.cache();
    // The test asks the replica, which follows by the end of the first phase.
    lagging.replica_of(&master).await;
    let grow_old = async || lagging.promote().await;
    old_data_comes_back(&cluster, grow_old, || {}, async || switch.to(lagging.port)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_stands_still_keeps_nobody_from_what_redis_has() {
    const THERE: RangeInclusive<i64> = 1..=20;
    let (server, redis) = (MariaDb::start(), Arc::new(RedisServer::start()));
    let redis = Redis { cache: redis.clone(), queue: redis };
    let cluster = Cluster::on_all(&server, redis, 1, &[COLD, ("STORE__CONNECTIONS", "2")]).await;
    let node = cluster.node();
    bind_all(node, THERE, "c").await;
    redis_answers(node).await;
    let past_redis = node.metric("im_presence_l2_misses_total").await;
    server.stop();
    let mut waiting = JoinSet::new();
    for user in 1_000..1_020 {
        let mut client = node.new_connection();
        waiting.spawn(async move { client.query_route(QueryRouteReq { user_id: user, max_staleness_ms: None }).await });
    }
    eventually("more wait for SQL than there are connections", NOTICED_WITHIN, async || {
        node.metric("im_presence_l2_misses_total").await >= past_redis + 20.0
    })
    .await;
    for user in THERE {
        assert_eq!(node.query(user).await.source(), Source::Shared, "user {user}");
    }
    waiting.abort_all();
    server.cont();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_in_a_hurry_does_not_cost_the_others_their_connection() {
    let cluster = Cluster::with_two_redis(1, &[COLD]).await;
    let (node, redis) = (cluster.node(), cluster.cache().client().await);
    let made = async || {
        let stats: String = redis.run(&["INFO", "stats"]).await;
        let line = stats.lines().find(|line| line.starts_with("total_connections_received:"));
        line.expect("a count").to_owned()
    };
    bind_all(node, 1..=3, "c").await;
    redis_answers(node).await;
    let before = made().await;
    cluster.cache().stop();
    let answer = node.query(3).await;
    cluster.cache().cont();
    assert_eq!(answer.source(), Source::Durable, "a reader does not wait for Redis");
    redis_answers(node).await;
    assert_eq!(made().await, before, "over the same connection");
}

/// Another node has noticed first that Redis was exchanged, and has shown an older state of a user there; the job that shows
/// everybody anew has passed the user.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_that_was_shown_in_a_former_generation_is_shown_again_and_nobody_goes_back() {
    let cluster = Cluster::with_two_redis(1, &[COLD]).await;
    let (node, redis, database) = (cluster.node(), cluster.cache().client().await, &cluster.db);
    bind_all(node, ALICE..=ALICE, "c-1").await;
    let key = format!("user:record:{ALICE}");
    eventually("the bind is shown", NOTICED_WITHIN, async || redis.has(&key).await).await;
    let next = database.number("SELECT generation FROM cluster").await + 1;
    let _: i64 = redis.run(&["SETRANGE", &key, "0", &format!("{next:020}")]).await;
    let newer = node.bind(a_bind(ALICE, PHONE, "c-2")).await.version;
    let done = format!("'show generation {next}', 'done', {}", 32_503_680_000_000_i64);
    database.run(&format!("INSERT INTO jobs (name, node_id, until) VALUES ({done})")).await;
    database.run("UPDATE cluster SET generation = generation + 1").await;
    let shown = format!("{next:020}{newer:020}");
    eventually("the newer state is there", REPAIRED_WITHIN, async || {
        let answer = node.query(ALICE).await;
        assert_eq!(answer.version, newer, "{answer:?}");
        redis.run::<String>(&["GETRANGE", &key, "0", "39"]).await == shown
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_queue_stands_still_answers_get_no_older_than_they_say_and_it_heals_alone() {
    the_queue_freezes(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_queue_stands_still_the_cache_is_kept_up() {
    the_queue_freezes(&[COLD]).await;
}

async fn the_queue_freezes(more: &[(&str, &str)]) {
    const STANDS_STILL: Duration = Duration::from_secs(5);
    let _turn = heavy().await;
    let cluster = Cluster::with_two_redis(2, more).await;
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(300).await;
    cluster.queue().stop();
    for node in &cluster.nodes {
        deliver_answers_within(node, Duration::from_millis(600)).await;
    }
    sleep(STANDS_STILL).await; // the fault itself
    degraded_becomes(&cluster, &["redis_queue", "hints"]).await;
    for node in &cluster.nodes {
        deliver_answers_within(node, Duration::from_millis(300)).await;
    }
    cluster.queue().cont();
    degraded_becomes(&cluster, &[]).await;
    traffic.goes_on(300).await;
    let (written, seen) = traffic.stop().await;
    nothing_was_refused(&written, &seen);
    assert!(written.slowest < allowed(Duration::from_secs(1)), "{:?}", written.slowest);
    for reader in &seen {
        assert!(reader.oldest < allowed(OLDEST_ANSWER + ALLOWANCE), "{:?}", reader.oldest);
    }
    hints_work_again(&cluster).await;
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
}

/// There is no queue to deliver by, and the caller is told so before its deadline.
async fn deliver_answers_within(node: &Node, limit: Duration) {
    let message = DeliverReq { user_id: 1, message: "hello".to_owned(), ..Default::default() };
    let mut request = tonic::Request::new(message);
    request.set_timeout(limit);
    let began = Instant::now();
    let refused = node.presence().deliver(request).await.expect_err("the queue stands still");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?} after {:?}", began.elapsed());
    assert!(began.elapsed() < allowed(limit), "{:?} of {limit:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_cut_off_from_the_queue_leaves_no_old_answers_anywhere() {
    const CUT_OFF: Duration = Duration::from_secs(5);
    let _turn = heavy().await;
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    // Connections to it are taken and never answered.
    let swallows = RedisServer::start();
    swallows.stop();
    let switch = Switch::start(cluster.queue().port).await;
    cluster.add_node(&[("REDIS_QUEUE__URL", &format!("redis://127.0.0.1:{}", switch.port))]).await;
    let traffic = Traffic::start(&cluster, BUSY);
    for round in 0..2 {
        traffic.goes_on(300).await;
        switch.to(swallows.port);
        // The second time it is soon over: what was lost shows nowhere but in the count.
        sleep(CUT_OFF / (1 + 4 * round)).await; // the fault itself
        switch.to(cluster.queue().port);
        degraded_becomes(&cluster, &[]).await;
    }
    traffic.goes_on(300).await;
    let (written, seen) = traffic.stop().await;
    nothing_was_refused(&written, &seen);
    assert!(written.slowest < allowed(Duration::from_secs(1)), "{:?}", written.slowest);
    for reader in &seen {
        assert!(reader.oldest < allowed(OLDEST_ANSWER + ALLOWANCE), "{:?}", reader.oldest);
    }
    hints_work_again(&cluster).await;
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_answer_of_a_node_that_stood_still_is_no_older_than_it_says() {
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let longest = if long() { 30_000 } else { 4_000 };
    for (turn, still) in [300, 1_500, longest].map(Duration::from_millis).into_iter().enumerate() {
        let before = one.bind(a_bind(ALICE, PHONE, &format!("before-{turn}"))).await;
        eventually("it shows", NOTICED_WITHIN, async || two.query(ALICE).await.version == before.version).await;
        two.stop();
        let bound = one.bind(a_bind(ALICE, PHONE, &format!("after-{turn}"))).await;
        let acknowledged = Instant::now();
        let mut client = two.presence();
        let query = QueryRouteReq { user_id: ALICE, max_staleness_ms: None };
        let call = tokio::spawn(async move { client.query_route(query).await });
        sleep(still).await; // the fault itself
        two.cont();
        let continued = Instant::now();
        let answer = call.await.expect("the task").expect("an answer").into_inner();
        let age = Duration::from_millis(answer.age_ms.into()) + Duration::from_millis(1);
        println!("after {still:?}: {:?}, age_ms {}, new: {}", answer.source(), answer.age_ms, answer.version == bound.version);
        let is_honest = age >= continued.saturating_duration_since(acknowledged);
        assert!(answer.version == bound.version || is_honest, "{answer:?} after {still:?}");
        assert!(answer.version == bound.version || still < OLDEST_ANSWER, "{answer:?} after {still:?}");
        eventually("it shows", NOTICED_WITHIN, async || two.query(ALICE).await.version == bound.version).await;
    }
}

/// A bind through one node shows on the other at once.
async fn hints_work_again(cluster: &Cluster) {
    const BINDS: usize = 5;
    const AT_ONCE: Duration = Duration::from_millis(200);
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let began = Instant::now();
    let mut in_a_row = 0;
    for turn in 0.. {
        if in_a_row == BINDS {
            break;
        }
        two.query(ALICE).await;
        let bound = one.bind(a_bind(ALICE, PHONE, &format!("again-{turn}"))).await;
        let acknowledged = Instant::now();
        eventually("it shows", NOTICED_WITHIN, async || two.query(ALICE).await.version >= bound.version).await;
        in_a_row = if acknowledged.elapsed() < AT_ONCE { in_a_row + 1 } else { 0 };
        assert!(began.elapsed() < allowed(NOTICED_WITHIN), "hints do not work again");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_was_killed_carries_hints_and_messages_again_when_it_is_back() {
    let _turn = heavy().await;
    let cluster = Cluster::with_two_redis(2, &[("ROUTE__MAX_RETRIES", "1"), ("ROUTE__RETRY_INTERVAL", "100")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(BOB, PHONE, "c")).await;
    let message = || DeliverReq { user_id: BOB, message: "hello".to_owned(), ..Default::default() };
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(200).await;
    cluster.queue().kill();
    degraded_becomes(&cluster, &["redis_queue"]).await;
    let began = Instant::now();
    let refused = two.presence().deliver(message()).await.expect_err("there is no queue");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
    assert!(began.elapsed() < allowed(Duration::from_secs(1)), "{:?}", began.elapsed());
    traffic.goes_on(500).await;
    cluster.queue().restart();
    let mut gateway = cluster.queue().subscribe(&["user:2"]).await;
    eventually("messages are delivered", NOTICED_WITHIN, async || {
        two.presence().deliver(message()).await.is_ok_and(|answer| answer.into_inner().receivers == 1)
    })
    .await;
    assert_eq!(gateway.text(NOTICED_WITHIN).await, "hello");
    traffic.goes_on(200).await;
    let (written, seen) = traffic.stop().await;
    nothing_was_refused(&written, &seen);
    hints_work_again(&cluster).await;
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_cache_slows_nobody_down_and_is_used_again_without_a_restart() {
    the_cache_freezes(&[COLD]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_cache_leaves_no_old_answers_in_memory() {
    the_cache_freezes(&[]).await;
}

async fn the_cache_freezes(more: &[(&str, &str)]) {
    const STANDS_STILL: Duration = Duration::from_secs(4);
    const AT_MOST: Duration = Duration::from_millis(500);
    let _turn = heavy().await;
    let cluster = Cluster::with_two_redis(2, more).await;
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(300).await;
    cluster.cache().stop();
    sleep(STANDS_STILL).await; // the fault itself
    degraded_becomes(&cluster, &["redis_cache"]).await;
    cluster.cache().cont();
    degraded_becomes(&cluster, &[]).await;
    traffic.goes_on(300).await;
    let (written, mut seen) = traffic.stop().await;
    nothing_was_refused(&written, &seen);
    assert!(written.slowest < allowed(AT_MOST), "{:?}", written.slowest);
    for reader in &mut seen {
        assert!(percentile(&mut reader.took, 1.0) < allowed(AT_MOST));
    }
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
    let node = &cluster.nodes[1];
    let mut round = 0;
    eventually("the cache is read again", 2 * NOTICED_WITHIN, async || {
        round += 1;
        let before = node.metric("im_presence_l2_hits_total").await;
        bind_all(&cluster.nodes[0], 1..=BUSY, &format!("round-{round}")).await;
        for user in 1..=BUSY {
            node.query(user).await;
        }
        node.metric("im_presence_l2_hits_total").await - before >= BUSY as f64 / 2.0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_cache_stands_still_binds_go_on_and_queries_do_not_wait_for_it() {
    let _turn = heavy().await;
    let time = Duration::from_secs(if long() { 10 } else { 3 });
    let cluster = Cluster::with_two_redis(1, &[COLD]).await;
    let node = cluster.node();
    rate(node, time / 3).await; // warms up
    let (before, mut before_took) = rate(node, time).await;
    cluster.cache().stop();
    let (meanwhile, mut took) = rate(node, 2 * time).await;
    cluster.cache().cont();
    // It is behind, and says so, until what waited has been shown: in the long form, the changes of 20 s.
    let shown_within = if long() { KEYS_AGREE_WITHIN + 2 * time } else { NOTICED_WITHIN };
    eventually("what waited is shown", shown_within, async || node.degraded().await.is_empty()).await;
    let share = meanwhile / before;
    println!("binds a second: {before:.0}, then {meanwhile:.0} ({:.0} %) while the cache stands still", 100.0 * share);
    let (p99_before, p99, max) = (percentile(&mut before_took, 0.99), percentile(&mut took, 0.99), percentile(&mut took, 1.0));
    println!("queries: p99 {p99_before:?}, then p99 {p99:?}, max {max:?}");
    // Wide bounds: what is promised is half the rate, and 150 ms.
    assert!(share > 0.3, "{share}");
    assert!(p99 < allowed(Duration::from_millis(450)), "{p99:?}");
}

/// Binds a second that many callers get done within `time`, and how long queries take meanwhile.
async fn rate(node: &Node, time: Duration) -> (f64, Vec<Duration>) {
    const CALLERS: i64 = 128;
    const USERS: i64 = 50;
    let began = Instant::now();
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        let mut client = if caller % 16 == 0 { node.new_connection() } else { node.presence() };
        callers.spawn(async move {
            let mut binds = 0;
            while began.elapsed() < time {
                let user = caller * USERS + binds % USERS + 1;
                let bound =
                    client.bind_route(a_bind(user, PHONE, &began.elapsed().as_nanos().to_string())).await.expect("a bind");
                assert_eq!(code(&bound.into_inner().result), Code::Ok);
                binds += 1;
            }
            binds
        });
    }
    let (mut client, mut took) = (node.new_connection(), Vec::new());
    while began.elapsed() < time {
        let query = QueryRouteReq { user_id: took.len() as i64 * 7 % (CALLERS * USERS) + 1, max_staleness_ms: None };
        let asked = Instant::now();
        client.query_route(query).await.expect("a query");
        took.push(asked.elapsed());
    }
    let binds: i64 = callers.join_all().await.into_iter().sum();
    (binds as f64 / began.elapsed().as_secs_f64(), took)
}

/// A node commits while the cache stands still, acknowledges, and is killed. What it has not shown, the other one shows.
async fn killed_before_it_has_shown(gave_up: bool) {
    let mut cluster = Cluster::with_two_redis(2, &[]).await;
    let before = cluster.nodes[1].bind(a_bind(ALICE, PHONE, "before")).await;
    cluster.nodes[0].bind(a_bind(BOB, PHONE, "before")).await;
    everything_agrees_with_sql(&cluster, ALICE..=BOB, NOTICED_WITHIN).await;
    let mut changes = cluster.queue().subscribe(&["presence:route"]).await;
    cluster.cache().stop();
    if gave_up {
        degraded_becomes(&cluster, &["redis_cache"]).await;
    }
    let bound = cluster.nodes[0].bind(a_bind(ALICE, PHONE, "after")).await;
    unbind_all(&cluster.nodes[0], BOB..=BOB).await;
    cluster.nodes[0].kill();
    cluster.cache().cont();
    let since = Instant::now();
    changes.hears(&format!("{BOB}:"), REPAIRED_WITHIN).await;
    println!("presence:route after {:?}", since.elapsed());
    let dead = cluster.nodes.remove(0);
    everything_agrees_with_sql(&cluster, ALICE..=BOB, REPAIRED_WITHIN.saturating_sub(since.elapsed())).await;
    assert!(bound.version > before.version);
    assert_eq!(cluster.node().query(ALICE).await.version, bound.version);
    eventually("nothing is left to do", REPAIRED_WITHIN, async || cluster.db.number("SELECT COUNT(*) FROM outbox").await == 0)
        .await;
    drop(dead);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_that_was_killed_after_its_commit_had_begun_to_show_another_shows() {
    let _turn = heavy().await;
    killed_before_it_has_shown(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_that_was_killed_after_its_commit_had_not_shown_another_shows() {
    let _turn = heavy().await;
    killed_before_it_has_shown(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_was_emptied_is_filled_again_and_a_user_who_left_does_not_come_back() {
    let cluster = Cluster::with_two_redis(2, &[]).await;
    bind_all(cluster.node(), 1..=BUSY, "c").await;
    unbind_all(cluster.node(), ALICE..=ALICE).await;
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
    let generation = async || cluster.db.number("SELECT generation FROM cluster").await;
    let before = generation().await;
    let redis = cluster.cache().client().await;
    eventually("it says whose it is", NOTICED_WITHIN, async || redis.has("presence:store").await).await;
    redis.run::<()>(&["FLUSHALL"]).await;
    eventually("it is noticed", NOTICED_WITHIN, async || generation().await > before).await;
    eventually("it is filled", NOTICED_WITHIN, async || redis.has("user:route:2").await).await;
    everything_agrees_with_sql(&cluster, 1..=BUSY, KEYS_AGREE_WITHIN).await;
    assert_eq!(redis.get("user:route:1").await, None);
    assert_eq!(generation().await, before + 1, "once, however many nodes notice");
    assert_eq!(cluster.nodes[1].degraded().await, [""; 0]);
}

/// What another service sees of a user, on a server.
async fn key_is(server: &RedisServer, user: i64, there: bool, what: &str) -> Duration {
    let (client, began) = (server.client().await, Instant::now());
    let key = format!("user:route:{user}");
    eventually(what, NOTICED_WITHIN, async || client.has(&key).await == there).await;
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_planned_fail_over_that_cuts_no_connection_both_links_reach_the_new_primary() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    let switch = Switch::start(first.port).await;
    let url = format!("redis://127.0.0.1:{}", switch.port);
    let cluster = Cluster::mariadb(1, &[("REDIS_CACHE__URL", &url), ("REDIS_QUEUE__URL", &url)]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    key_is(&first, ALICE, true, "the first primary has it").await;
    second.replica_of(&first).await;
    // Planned: the replica is promoted, the former primary follows it, the address leads to the new one.
    second.promote().await;
    switch.send_new_ones_to(second.port);
    first.replica_of(&second).await;

    node.bind(a_bind(BOB, PHONE, "c-1")).await;
    println!("cache: written to the new primary after {:?}", key_is(&second, BOB, true, "the new primary has it").await);
    let began = Instant::now();
    messages_arrive_at(&second, node).await;
    println!("queue: published at the new primary after {:?}", began.elapsed());
    degraded_becomes(&cluster, &[]).await;
    assert!(node.log().iter().any(|line| line.contains("Redis (queue) passes nothing on")), "{:#?}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_keeps_to_itself_how_it_is_is_left_too_once_it_is_a_replica() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    for server in [&first, &second] {
        server.client().await.run::<()>(&["ACL", "SETUSER", "default", "-info"]).await;
    }
    let switch = Switch::start(first.port).await;
    let url = format!("redis://127.0.0.1:{}", switch.port);
    let cluster = Cluster::with_two_redis(1, &[("REDIS_QUEUE__URL", &url)]).await;
    cluster.node().bind(a_bind(BOB, PHONE, "c-1")).await;
    messages_arrive_at(&first, cluster.node()).await;
    switch.send_new_ones_to(second.port);
    first.client().await.run::<()>(&["REPLICAOF", "127.0.0.1", &second.port.to_string()]).await;
    messages_arrive_at(&second, cluster.node()).await;
    degraded_becomes(&cluster, &[]).await;
}

/// Whoever listens there for Bob hears a message.
async fn messages_arrive_at(server: &RedisServer, node: &Node) {
    let mut gateway = server.subscribe(&[&format!("user:{BOB}")]).await;
    let (began, mut heard) = (Instant::now(), false);
    while !heard {
        assert!(began.elapsed() < allowed(NOTICED_WITHIN), "the queue's link stays elsewhere");
        let message = DeliverReq { user_id: BOB, message: "hello".to_owned(), ..Default::default() };
        let _ = node.presence().deliver(message).await; // nobody hears it on a replica
        heard = gateway.next(Duration::from_millis(100)).await.is_some();
    }
}

/// Whoever has noticed first that the connection has ended was no reader: all readers know is the number of the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_over_a_connection_that_was_not_looked_at_counts_for_nothing() {
    let (first, second) = (RedisServer::start(), RedisServer::start());
    let switch = Switch::start(first.port).await;
    let url = format!("redis://127.0.0.1:{}", switch.port);
    let cluster = Cluster::with_cache(1, &[COLD, ("REDIS_CACHE__URL", &url)], first).await;
    let (node, first) = (cluster.node(), cluster.cache());
    bind_all(node, 1..=2, "old").await;
    redis_answers(node).await;
    second.replica_of(first).await;
    second.promote().await;
    bind_all(node, 1..=2, "new").await;
    everything_agrees_with_sql(&cluster, 1..=2, KEYS_AGREE_WITHIN).await;
    redis_answers(node).await;

    switch.to(second.port);
    node.register("gw-2:1").await; // which is told in Redis, too
    let answer = node.query(ALICE).await;
    assert_eq!(answer.routes[0].conn_id, "new", "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_another_prefix_everybody_is_shown_anew() {
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    bind_all(cluster.node(), 1..=20, "c").await;
    everything_agrees_with_sql(&cluster, 1..=20, KEYS_AGREE_WITHIN).await;
    let left = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await;
    eventually("nothing is left to do", REPAIRED_WITHIN, async || left().await == 0).await;
    cluster.nodes.remove(0).kill();
    cluster.add_node(&[("REDIS_CACHE__KEY_PREFIX", "eu:")]).await;
    let names: Vec<String> = (1..=20).map(|user| format!("eu:user:route:{user}")).collect();
    let redis = cluster.cache().client().await;
    eventually("all are there", KEYS_AGREE_WITHIN, async || redis.get_many(&names).await.iter().all(Option::is_some)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_answers_and_takes_no_writes_is_down_and_is_put_right_afterwards() {
    let cluster = Cluster::with_two_redis(1, &[]).await;
    let (node, redis) = (cluster.node(), cluster.cache().client().await);
    for (user, (begin, end)) in (10..).zip([
        (&["CONFIG", "SET", "maxmemory", "1"][..], &["CONFIG", "SET", "maxmemory", "0"][..]),
        (&["ACL", "SETUSER", "default", "-eval", "-evalsha"], &["ACL", "SETUSER", "default", "+@all"]),
    ]) {
        redis.run::<()>(begin).await;
        degraded_becomes(&cluster, &["redis_cache"]).await;
        assert_eq!(node.series("im_presence_redis_up").await.iter().map(|(_, up)| *up).sum::<f64>(), 1.0, "the queue is");
        node.bind(a_bind(user, PHONE, "c-1")).await;
        redis.run::<()>(end).await;
        key_is(cluster.cache(), user, true, "what could not be written is written").await;
        degraded_becomes(&cluster, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_a_full_redis_has_evicted_are_set_again_and_that_it_evicts_is_warned_of() {
    let cluster = Cluster::with_two_redis(1, &[]).await;
    let (node, redis) = (cluster.node(), cluster.cache().client().await);
    bind_all(node, 1..=50, "c").await;
    redis.run::<()>(&["CONFIG", "SET", "maxmemory", "100mb"]).await;
    redis.run::<()>(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]).await;
    let warned = async || node.log().iter().any(|line| line.contains("maxmemory-policy allkeys-*"));
    eventually("it is warned of", NOTICED_WITHIN, warned).await;
    let shown = async || cluster.db.number("SELECT COUNT(*) FROM jobs WHERE node_id = 'done'").await == 1;
    eventually("everybody was shown at the start", NOTICED_WITHIN, shown).await;
    for policy in ["allkeys-lru", "noeviction"] {
        redis.run::<()>(&["DEL", "user:route:7", "user:record:7"]).await; // as the server itself would
        redis.run::<()>(&["CONFIG", "SET", "maxmemory-policy", policy]).await;
        key_is(cluster.cache(), 7, true, "it is there again").await;
    }
}
