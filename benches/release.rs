//! This build of the daemon against another one, as a rule the last release: how fast both answer from memory, and what a user
//! costs there.
//!
//! `BASELINE=path/of/its/binary cargo bench --bench release` measures (about three minutes); without it the daemon is compared
//! with itself, which tells how far noise goes. `cargo test` runs both for a moment.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::time::Duration;

use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Settings;
use crate::harness::redis::RedisServer;
use crate::load::contender;
use crate::load::queries::BATCH;
use crate::load::queries::batch_query;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::report::Row;
use crate::load::seed;
use crate::load::stores;
use crate::load::stores::PlainRedis;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// The core of the server that has one for itself, and the loader's.
const SERVER: usize = 0;
const LOADER: usize = 1;
const HOT_USERS: u64 = 10_000;
const GATEWAYS: u64 = 16;
/// About as many as Redis answers in the time of a run.
const MGETS_PER_MS: u64 = 2;

fn main() {
    contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let (rounds, time, users) =
        if measuring { (7, Duration::from_secs(2), 1_000_000) } else { (1, Duration::from_millis(50), 2_000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(rounds, time, users));
    println!("test result: ok. {rounds} rounds");
}

/// A database with users, and the Redis by which its nodes hear of changes: without it they keep nothing for long.
struct Store {
    db: TestDb,
    redis: RedisServer,
}

impl Store {
    async fn with(users: u64) -> Self {
        let this = Self { db: seed::users(users, GATEWAYS).await, redis: RedisServer::start() };
        // The first node that meets a Redis raises the generation, which empties the memory of all that run.
        drop(Node::start(this.settings("1")).await);
        this
    }

    fn settings(&self, threads: &str) -> Settings {
        let port = self.redis.port.to_string();
        let redis = [("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)];
        let more = [("ROUTE__L1_TTL", "3600"), ("PRESENCE_SERVICE__THREAD_COUNT", threads)];
        self.db.settings(&[redis, more].concat())
    }
}

/// One build, on the same users as the other.
struct Build {
    /// With one serving thread on a core of its own.
    alone: Node,
    /// As it comes.
    node: Node,
    bytes_per_user: f64,
}

impl Build {
    async fn start(program: &str, users: u64, store: &Store, nobody: &Store) -> Self {
        let start =
            async |store: &Store, core, threads| Node::start_as(contender::on_core(core, program), store.settings(threads)).await;
        let empty = start(nobody, None, "0").await;
        let (alone, node) = (start(store, Some(SERVER), "1").await, start(store, None, "0").await);
        is_warm(&alone).await;
        is_warm(&node).await;
        let bytes_per_user = node.rss_bytes().saturating_sub(empty.rss_bytes()) as f64 / users as f64;
        Self { alone, node, bytes_per_user }
    }

    /// Queries a second of hot users and of all, both by themselves on a core, and batches a second.
    async fn speeds(&self, time: Duration, users: u64) -> [f64; 5] {
        let alone = async |users| query(&self.alone, Some(LOADER), (4, 32), users, time).await;
        let shared = async |users| query(&self.node, None, (8, 16), users, time).await;
        let (hot, all) = (alone(HOT_USERS.min(users)).await, alone(users).await);
        [hot, all, shared(HOT_USERS.min(users)).await, shared(users).await, batch_query(&self.node, users, time).await]
    }
}

fn rows() -> [Row; 7] {
    let baseline = "the other build";
    [
        Row::new("hot", ("QueryRoute, 10,000 users, one thread on its own core", baseline), (0.93, 1.0)),
        Row::new("all", ("the same, all users uniformly", baseline), (0.85, 0.95)),
        Row::new("hot_shared", ("QueryRoute, 10,000 users, default threads", baseline), (0.93, 1.0)),
        Row::new("all_shared", ("the same, all users uniformly", baseline), (0.85, 0.95)),
        Row::new("batch", ("BatchQueryRoute of 1,000, all users", baseline), (0.0, 0.0)),
        Row::new("batch_mget", ("the same", "pipelined MGET of 1,000"), (1.2, 1.8)),
        Row::new("bytes", ("resident bytes per user in memory, one device each", baseline), (0.0, 0.0)).less_is_better("B"),
    ]
}

async fn measure(rounds: usize, time: Duration, users: u64) {
    let baseline = std::env::var("BASELINE").unwrap_or_else(|_| PROGRAM.to_owned());
    let (store, nobody, redis) = (Store::with(users).await, Store::with(1).await, PlainRedis::start(users));
    let ours = Build::start(PROGRAM, users, &store, &nobody).await;
    let theirs = Build::start(&baseline, users, &store, &nobody).await;
    let mgets = u64::try_from(time.as_millis()).expect("a short time") * MGETS_PER_MS;
    let mut rows = rows();
    rows[6].add(ours.bytes_per_user, theirs.bytes_per_user);
    for round in 0..=rounds {
        // In turn, so that neither is always the one that follows a rest.
        let (first, second) = if round % 2 == 0 { (&ours, &theirs) } else { (&theirs, &ours) };
        let (first, second) = (first.speeds(time, users).await, second.speeds(time, users).await);
        let (ours, theirs) = if round % 2 == 0 { (first, second) } else { (second, first) };
        let mget = redis.mget(BATCH, (4, 4), mgets).await;
        if round > 0 {
            // the first round warms up
            rows.iter_mut().zip(ours.into_iter().zip(theirs)).for_each(|(row, (ours, theirs))| row.add(ours, theirs));
            rows[5].add(ours[4], mget);
        }
    }
    if rounds > 1 {
        for node in [&ours.node, &theirs.node] {
            let local = stores::share_of(node, "im_presence_queries_total", "local").await;
            assert!(local > 0.99, "hits were measured: {local}");
        }
    }
    load::report::print("release", &rows, &json!({ "users": users, "baseline": baseline }));
}
