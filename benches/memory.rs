//! What memory costs and what it is good for: bytes per user, the share of hits with room for a tenth of the users, and how
//! long a node takes to be warm again.
//!
//! `cargo bench --bench memory` measures (about two minutes); `cargo test` does the same with few users.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use im_presence::domain::id::UserId;
use im_presence::domain::id::Version;
use im_presence::domain::user::UserRecord;
use im_presence::engine::read::cache::Cache;
use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::load::report::Row;
use crate::load::scatter;
use crate::load::seed;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const GATEWAYS: u64 = 16;
/// How unevenly users are asked for.
const ZIPF: f64 = 0.99;
const WARM_WITHIN: Duration = Duration::from_secs(120);
/// Between two queries to a node that is getting warm.
const PACE: Duration = Duration::from_millis(2);

fn main() {
    load::contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let (rounds, users) = if measuring { (5, 1_000_000) } else { (1, 2_000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(rounds, users));
    println!("test result: ok. {rounds} rounds");
}

async fn measure(rounds: usize, users: u64) {
    let redis = RedisServer::start();
    let (db, nobody) = (seed::users(users, GATEWAYS).await, seed::users(1, GATEWAYS).await);
    let mut bytes = Row::absolute("bytes", "resident bytes per user in memory, one device each", "B", (450.0, 350.0));
    let mut start = Row::absolute("start", "start with these users until memory is warm", "s", (20.0, 10.0));
    let mut slowest = Row::absolute("slowest", "the slowest query meanwhile", "ms", (0.0, 0.0));
    let what = "share of hits, room for 10 % of the users, Zipf 0.99";
    let mut hits = Row::new("hits", (what, "exact LRU of that size"), (1.0, 1.05)).in_unit("");
    settings(&db, &redis).await; // the first node that meets a Redis raises the generation, which empties memory
    for round in 0..rounds {
        let node = warm_node(&db, &redis).await;
        let empty = settings(&nobody, &RedisServer::start()).await;
        bytes.add_absolute(node.node.rss_bytes().saturating_sub(empty.rss_bytes()) as f64 / users as f64);
        start.add_absolute(node.warm_after.as_secs_f64());
        slowest.add_absolute(node.slowest.as_secs_f64() * 1e3);
        let (ours, exact) = hit_ratios(users, round as u64);
        hits.add(ours, exact);
    }
    load::report::print("memory", &[bytes, hits, start, slowest], &json!({ "users": users }));
}

async fn settings(db: &TestDb, redis: &RedisServer) -> Node {
    let port = redis.port.to_string();
    let more = [("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)];
    Node::start(db.settings(&more)).await
}

struct WarmNode {
    node: Node,
    warm_after: Duration,
    slowest: Duration,
}

/// Starts a node and asks it until it is warm.
async fn warm_node(db: &TestDb, redis: &RedisServer) -> WarmNode {
    let began = Instant::now();
    let node = settings(db, redis).await;
    let mut slowest = Duration::ZERO;
    for n in 0.. {
        if node.log().iter().any(|line| line.contains("memory is warm")) {
            break;
        }
        assert!(began.elapsed() < WARM_WITHIN, "it does not get warm");
        let asking = Instant::now();
        node.query(1 + i64::try_from(scatter(n) % 1_000).expect("a user")).await;
        slowest = slowest.max(asking.elapsed());
        tokio::time::sleep(PACE).await;
    }
    WarmNode { node, warm_after: began.elapsed(), slowest }
}

/// The shares of hits of the daemon's cache and of an exact LRU, with room for a tenth of the users, on the same calls. Counted
/// once both have seen as many calls as there are users, twice.
fn hit_ratios(users: u64, seed: u64) -> (f64, f64) {
    let zipf = Zipf::new(users);
    let (cache, mut exact) = (Cache::new(users / 10), Lru::new(users / 10));
    let (mut ours, mut theirs) = (0, 0);
    let calls = 2 * users;
    for n in 0..2 * calls {
        let user = zipf.user(scatter(seed << 48 | n));
        let hit = is_hit(&cache, user);
        let exact_hit = exact.is_hit(user);
        if n >= calls {
            ours += u64::from(hit);
            theirs += u64::from(exact_hit);
        }
    }
    (ours as f64 / calls as f64, theirs as f64 / calls as f64)
}

fn is_hit(cache: &Arc<Cache>, user: u64) -> bool {
    let user = UserId::parse(i64::try_from(user).expect("a user")).expect("a user");
    let hit = cache.get(user).is_some();
    if !hit {
        let ticket = cache.begin_load(user);
        let _entry = cache.end_load(ticket, UserRecord { version: Version(1), ..UserRecord::default() }, true);
    }
    hit
}

struct Zipf {
    cumulated: Vec<f64>,
}

impl Zipf {
    fn new(users: u64) -> Self {
        let weights = (1..=users).map(|rank| (rank as f64).powf(-ZIPF));
        let cumulated = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { cumulated: cumulated.collect() }
    }

    fn user(&self, random: u64) -> u64 {
        let total = self.cumulated.last().expect("users");
        let at = random as f64 / u64::MAX as f64 * total;
        1 + self.cumulated.partition_point(|sum| *sum < at).min(self.cumulated.len() - 1) as u64
    }
}

/// Keeps exactly those who were asked for last.
struct Lru {
    capacity: usize,
    clock: u64,
    used: HashMap<u64, u64>,
    oldest: BTreeMap<u64, u64>,
}

impl Lru {
    fn new(capacity: u64) -> Self {
        let capacity = usize::try_from(capacity).expect("a number of users");
        Self { capacity, clock: 0, used: HashMap::new(), oldest: BTreeMap::new() }
    }

    fn is_hit(&mut self, user: u64) -> bool {
        self.clock += 1;
        let before = self.used.insert(user, self.clock);
        if let Some(before) = before {
            self.oldest.remove(&before);
        }
        self.oldest.insert(self.clock, user);
        if self.used.len() > self.capacity
            && let Some((_, evicted)) = self.oldest.pop_first()
        {
            self.used.remove(&evicted);
        }
        before.is_some()
    }
}
