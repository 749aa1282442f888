//! Two nodes on the same stores, and how they are asked.

use std::time::Duration;

use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::percentile;
use crate::harness::redis::RedisServer;
use crate::load::on_core;
use crate::load::paced;
use crate::load::queries::QUERY;
use crate::load::queries::is_warm;
use crate::load::queries::query_of;
use crate::load::seed;

const GATEWAYS: u64 = 16;
/// For what is measured here, and nothing that is refused.
const SETTINGS: [(&str, &str); 3] =
    [("STATUS__RATE", "0"), ("WATCH__MAX_STREAMS", "100000"), ("PRESENCE_SERVICE__MAX_CONNECTIONS", "4000")];
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(60);
/// Steady load of one who asks for random users.
const QUERIES_PER_SECOND: f64 = 2_000.0;
const QUERY_CONNECTIONS: u64 = 2;

pub struct Field {
    /// Where users change.
    pub a: Node,
    /// Who is measured.
    pub b: Node,
    pub redis: RedisServer,
    db: TestDb,
    more: Vec<(&'static str, &'static str)>,
}

impl Field {
    /// With `users` who are online, one device each, and warm.
    pub async fn enter(users: u64, more: &[(&'static str, &'static str)]) -> Self {
        let db = if users == 0 { TestDb::mariadb(MariaDb::shared()).await } else { seed::users(users, GATEWAYS).await };
        let (redis, more) = (RedisServer::start(), [&SETTINGS[..], more].concat());
        start(&db, &redis, &more).await; // the first node that meets a Redis raises the generation, which empties memory
        let (a, b) = (start(&db, &redis, &more).await, start(&db, &redis, &more).await);
        let field = Self { a, b, redis, db, more };
        is_warm(&field.a).await;
        is_warm(&field.b).await;
        seed::everybody_is_shown(&field.db).await;
        field
    }

    /// A new process for B, with nothing in it but the users.
    pub async fn renew_b(&mut self) {
        self.b.terminate();
        assert!(self.b.ended().await.success());
        self.b = start(&self.db, &self.redis, &self.more).await;
        is_warm(&self.b).await;
    }

    /// Nobody is watched on the node any more.
    pub async fn forgets(&self, node: &Node) {
        let forgotten = async || node.metric("im_presence_watch_pairs").await == 0.0;
        eventually("users are forgotten whose streams have ended", FORGOTTEN_WITHIN, forgotten).await;
    }
}

async fn start(db: &TestDb, redis: &RedisServer, more: &[(&str, &str)]) -> Node {
    let port = redis.port.to_string();
    let of_redis = [("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)];
    Node::start(db.settings(&[&of_redis[..], more].concat())).await
}

/// p50 and p99 of queries of random users at a steady rate, in milliseconds.
pub async fn query_times(node: &Node, users: u64, time: Duration) -> (f64, f64) {
    let server = node.data;
    let request = move |c, n| query_of(c, n, users);
    let mut took = on_core(None, move || paced::run(server, QUERY, QUERY_CONNECTIONS, QUERIES_PER_SECOND, time, request)).await;
    (millis(&mut took, 0.5), millis(&mut took, 0.99))
}

/// A percentile in milliseconds.
pub fn millis(took: &mut [Duration], share: f64) -> f64 {
    percentile(took, share).as_secs_f64() * 1e3
}

/// CPU of a node between two looks at it, for each of so many, in microseconds.
pub fn micros_each(before: Duration, after: Duration, count: u64) -> f64 {
    (after - before).as_secs_f64() * 1e6 / count.max(1) as f64
}
