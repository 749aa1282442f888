//! Two stores on one Redis.

use std::ops::Range;
use std::process::ExitStatus;
use std::time::Duration;

use im_presence::pb::Code;
use im_presence::pb::Source;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::Process;

const SHOWN_WITHIN: Duration = Duration::from_secs(3);
const REFUSES_WITHIN: Duration = Duration::from_secs(5);
/// By then each node has looked at the database a second time.
const LOOKED_AGAIN: Duration = Duration::from_secs(2);
/// Users whom only the neighbour knows. On a busy machine, a read of Redis that takes too long is given up, and counts nothing.
const STRANGERS: Range<i64> = 7_001..7_051;
const OWNER: &str = "presence:store";
/// How long the name of a store stays when all its nodes are gone.
const OWNER_TTL: i64 = 10;

/// Another cluster, on a database of its own, and on the same Redis.
async fn a_neighbour_of(cluster: &Cluster) -> Cluster {
    Cluster::on_all(MariaDb::shared(), cluster.redis().clone(), 1, &[]).await
}

async fn count(node: &Node, metric: &str, label: &str) -> f64 {
    node.series(metric).await.iter().filter(|(labels, _)| labels.contains(label)).map(|(_, value)| value).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_and_hints_of_another_store_are_ignored_and_counted() {
    let cluster = Cluster::with_redis(1, &[]).await;
    let neighbour = a_neighbour_of(&cluster).await;
    let (ours, theirs) = (cluster.node(), neighbour.node());
    ours.bind(a_bind(BOB, PHONE, "ours")).await;
    assert_eq!(ours.query(BOB).await.source(), Source::Local);
    for user in [BOB].into_iter().chain(STRANGERS) {
        theirs.bind(a_bind(user, PHONE, "theirs")).await;
    }
    let redis = cluster.cache().client().await;
    let shown = STRANGERS.count() + 1;
    eventually("their records are in Redis", SHOWN_WITHIN, async || redis.keys("user:record:*").await.len() == shown).await;
    eventually("their hints were heard", SHOWN_WITHIN, async || {
        count(ours, "im_presence_hints_total", "of_another_store").await >= 2.0
    })
    .await;

    let bob = ours.query(BOB).await;
    assert_eq!((bob.source(), bob.routes[0].conn_id.as_str()), (Source::Local, "ours"), "their hints mean nothing here");
    assert_eq!(ours.metric("im_presence_hint_gaps_total").await, 0.0);
    let mut strangers = STRANGERS;
    eventually("a record of theirs was counted", SHOWN_WITHIN, async || {
        let stranger = ours.query(strangers.next().expect("Redis answers one of many reads in time")).await;
        assert_eq!(code(&stranger.result), Code::NotFound, "their records mean nothing here");
        let counted = count(ours, "im_presence_stale_offers_rejected_total", "another_store").await;
        assert!(counted == 0.0 || (counted, stranger.source()) == (1.0, Source::Durable), "{counted}: {stranger:?}");
        counted == 1.0
    })
    .await;
    let warned = |node: &Node| node.log().iter().any(|line| line.contains("another store uses this Redis"));
    eventually("who came later was warned", SHOWN_WITHIN, async || warned(theirs)).await;
    assert_eq!(theirs.degraded().await, [""; 0], "both go on");
    tokio::time::sleep(LOOKED_AGAIN).await;
    let distrusted = ours.log().into_iter().find(|line| line.contains("memory is not trusted"));
    assert_eq!(distrusted, None, "a node that begins a generation when it starts knows of no other");
}

async fn refused(db: &TestDb, more: &[(&str, &str)]) -> (ExitStatus, String) {
    let mut process = Process::start(&db.settings(more));
    let status = process.ended(REFUSES_WITHIN).await;
    let [line] = &process.log()[..] else { panic!("one line: {:#?}", process.log()) };
    (status, line.clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_sqlite_that_meets_another_store_in_its_redis_refuses_and_says_what_to_do() {
    let cluster = Cluster::with_two_redis(1, &[]).await;
    let (cache, queue) =
        (format!("redis://127.0.0.1:{}", cluster.cache().port), format!("redis://127.0.0.1:{}", cluster.queue().port));
    let db = TestDb::sqlite();

    let (status, line) = refused(&db, &[("REDIS_CACHE__URL", &cache)]).await;
    assert_eq!(status.code(), Some(1));
    for word in ["[redis_cache]", "another store", "redis_cache.database", "store.url = mysql://"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    let (status, line) = refused(&db, &[("REDIS_QUEUE__URL", &queue)]).await;
    assert_eq!(status.code(), Some(1));
    for word in ["[redis_queue]", "another store", "redis_queue.channel_prefix", "store.url = mysql://"] {
        assert!(line.contains(word), "{word}: {line}");
    }

    let cache = format!("{cache}/1");
    let apart = [("REDIS_CACHE__URL", &*cache), ("REDIS_QUEUE__URL", &queue), ("REDIS_QUEUE__CHANNEL_PREFIX", "small:")];
    let node = Node::start(db.settings(&apart)).await;
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    assert_eq!(code(&cluster.node().query_sql(ALICE).await.result), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_on_sqlite_comes_back_to_its_own_redis_and_names_itself_there_again_when_it_was_emptied() {
    let servers = Redis::one();
    let (db, url) = (TestDb::sqlite(), format!("redis://127.0.0.1:{}", servers.cache.port));
    let settings = db.settings(&[("REDIS_CACHE__URL", &url), ("REDIS_QUEUE__URL", &url)]);
    let mut node = Node::start(settings).await;
    node.kill();
    node.restart().await;
    let redis = servers.cache.client().await;
    let owner = redis.get(OWNER).await.expect("a store");
    redis.run::<()>(&["FLUSHALL"]).await;
    eventually("it says so again", SHOWN_WITHIN, async || redis.get(OWNER).await.as_deref() == Some(&*owner)).await;
    let (other, ttl) = (TestDb::sqlite(), redis.ttl(OWNER).await);
    assert!((OWNER_TTL - 2..=OWNER_TTL).contains(&ttl), "a store without nodes is soon forgotten: {ttl}");
    assert_eq!(refused(&other, &[("REDIS_CACHE__URL", &url)]).await.0.code(), Some(1));
    node.terminate();
    node.ended().await;
    redis.run::<()>(&["DEL", OWNER]).await; // which time would have done
    Node::start(other.settings(&[("REDIS_CACHE__URL", &url), ("REDIS_QUEUE__URL", &url)])).await;
}
