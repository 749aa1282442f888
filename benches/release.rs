//! This build of the daemon against another one, as a rule the last release: eleven rows, each measured on both in turn.
//!
//! `BASELINE=path/of/its/binary cargo bench --bench release` measures (about ten minutes); without it the daemon is compared
//! with itself, which tells how far noise goes. With `GATE=1` it fails where this build has fallen behind: `benches/gate`.
//! `cargo test` runs both for a moment.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;
#[path = "release/pair.rs"]
mod pair;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Settings;
use crate::harness::redis::RedisServer;
use crate::load::contender;
use crate::load::queries::batch_query;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::report::Row;
use crate::load::seed;
use crate::load::stores;
use crate::pair::Pair;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// The core of the server that has one for itself, and the loader's.
const SERVER: usize = 0;
const LOADER: usize = 1;
const HOT_USERS: u64 = 10_000;
const GATEWAYS: u64 = 16;
/// Next to every user of a batch is a miss.
const NO_L1: &str = "1000";
const L1: &str = "1000000";

fn main() -> ExitCode {
    contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let (rounds, time, users) =
        if measuring { (7, Duration::from_secs(2), 1_000_000) } else { (1, Duration::from_millis(50), 2_000) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let rows = runtime.block_on(measure(rounds, time, users));
    if measuring && std::env::var_os("GATE").is_some() {
        return judge(&rows);
    }
    the_gate_holds_back_what_is_slower_beyond_noise();
    println!("test result: ok. {rounds} rounds");
    ExitCode::SUCCESS
}

/// Says which rows have fallen behind the other build.
fn judge(rows: &[Row]) -> ExitCode {
    let fallen: Vec<&Row> = rows.iter().filter(|row| row.has_fallen()).collect();
    for row in &fallen {
        println!("FALLEN BEHIND: {}", row.what);
    }
    if fallen.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn the_gate_holds_back_what_is_slower_beyond_noise() {
    let row = |figures: &[(f64, f64)]| {
        let mut row = Row::new("", ("", ""), (0.0, 0.0));
        figures.iter().for_each(|(ours, theirs)| row.add(*ours, *theirs));
        row
    };
    assert!(row(&[(80.0, 100.0), (82.0, 99.0), (85.0, 101.0)]).has_fallen(), "slower in each round");
    assert!(!row(&[(80.0, 100.0), (82.0, 99.0), (101.0, 102.0)]).has_fallen(), "as fast once as the other at its slowest");
    assert!(!row(&[(91.0, 100.0), (92.0, 99.0), (93.0, 101.0)]).has_fallen(), "hardly slower");
    let dearer = row(&[(100.0, 80.0), (99.0, 82.0), (101.0, 85.0)]).less_is_better("us");
    assert!(dearer.has_fallen() && !row(&[(100.0, 80.0)]).has_fallen(), "where less is better");
}

/// A database with users, and the Redis by which its nodes hear of changes: without it they keep nothing for long.
struct Store {
    db: TestDb,
    redis: RedisServer,
}

impl Store {
    async fn with(users: u64) -> Self {
        let this = Self { db: seed::users(users, GATEWAYS).await, redis: RedisServer::start() };
        // The first node that meets a Redis raises the generation, which empties the memory of all that run, and shows everybody.
        let _first = Node::start(this.settings("1", NO_L1)).await;
        seed::everybody_is_shown(&this.db).await;
        this
    }

    fn settings(&self, threads: &str, l1: &str) -> Settings {
        let port = self.redis.port.to_string();
        let redis = [("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)];
        let more = [("ROUTE__L1_TTL", "3600"), ("PRESENCE_SERVICE__THREAD_COUNT", threads), ("ROUTE__L1_CAPACITY", l1)];
        self.db.settings(&[&redis[..], &more].concat())
    }
}

/// One build, on the same users as the other, and with what it writes on stores of its own.
struct Build {
    /// With one serving thread on a core of its own.
    alone: Node,
    /// As it comes.
    node: Node,
    /// With next to nobody in memory.
    past_l1: Node,
    bytes_per_user: f64,
    pair: Pair,
}

impl Build {
    async fn start(program: &str, users: u64, (store, nobody): (&Store, &Store), time: Duration) -> Self {
        let start = async |store: &Store, core, threads, l1| {
            Node::start_as(contender::on_core(core, program), store.settings(threads, l1)).await
        };
        let empty = start(nobody, None, "0", L1).await;
        let (alone, node) = (start(store, Some(SERVER), "1", L1).await, start(store, None, "0", L1).await);
        let past_l1 = start(store, None, "0", NO_L1).await;
        is_warm(&alone).await;
        is_warm(&node).await;
        let bytes_per_user = node.rss_bytes().saturating_sub(empty.rss_bytes()) as f64 / users as f64;
        Self { alone, node, past_l1, bytes_per_user, pair: Pair::start(program, time).await }
    }

    /// In the order of the rows.
    async fn figures(&mut self, time: Duration, users: u64) -> [f64; 11] {
        let alone = async |users| query(&self.alone, Some(LOADER), (4, 32), users, time).await;
        let (hot, all) = (alone(HOT_USERS.min(users)).await, alone(users).await);
        let (batch, past_l1) = (batch_query(&self.node, users, time).await, batch_query(&self.past_l1, users, time).await);
        let pair = self.pair.speeds(time).await;
        let [here, elsewhere, subscriber] = [pair.delivered_here, pair.delivered_elsewhere, pair.delivered_to_subscriber];
        let [binds, frames, telling] = [pair.binds, pair.frames, pair.micros_per_telling];
        [hot, all, batch, past_l1, binds, frames, here, elsewhere, subscriber, telling, self.bytes_per_user]
    }
}

fn rows() -> [Row; 11] {
    let baseline = "the other build";
    let more = |key, what| Row::new(key, (what, baseline), (0.9, 1.0));
    let less = |key, what, unit| Row::new(key, (what, baseline), (1.11, 1.0)).less_is_better(unit);
    [
        more("hot", "QueryRoute, 10,000 users, one thread on its own core"),
        more("all", "the same, all users uniformly"),
        more("batch", "BatchQueryRoute of 1,000, all users"),
        more("batch_past_l1", "the same, from Redis"),
        more("bind", "BindRoute, MariaDB and Redis"),
        more("bind_stream", "the same, frames on one stream"),
        more("deliver", "Deliver to a gateway attached to this node"),
        more("deliver_elsewhere", "the same, attached to the other node"),
        more("deliver_subscriber", "the same, a Redis subscriber"),
        less("telling", "CPU of the node per telling of Watch", "us"),
        less("bytes", "resident bytes per user in memory, one device each", "B"),
    ]
}

async fn measure(rounds: usize, time: Duration, users: u64) -> [Row; 11] {
    let baseline = std::env::var("BASELINE").unwrap_or_else(|_| PROGRAM.to_owned());
    let (store, nobody) = (Store::with(users).await, Store::with(1).await);
    let all_rounds = time * (1 + u32::try_from(rounds).expect("few rounds"));
    let mut ours = Build::start(PROGRAM, users, (&store, &nobody), all_rounds).await;
    let mut theirs = Build::start(&baseline, users, (&store, &nobody), all_rounds).await;
    let mut rows = rows();
    for round in 0..=rounds {
        // In turn, so that neither is always the one that follows a rest.
        let even = round % 2 == 0;
        let (first, second) = if even { (&mut ours, &mut theirs) } else { (&mut theirs, &mut ours) };
        let (first, second) = (first.figures(time, users).await, second.figures(time, users).await);
        let (ours, theirs) = if even { (first, second) } else { (second, first) };
        if round > 0 {
            // the first round warms up
            rows.iter_mut().zip(ours.into_iter().zip(theirs)).for_each(|(row, (ours, theirs))| row.add(ours, theirs));
        }
    }
    if rounds > 1 {
        for node in [&ours.alone, &theirs.alone] {
            let local = stores::share_of(node, "im_presence_queries_total", "local").await;
            assert!(local > 0.99, "hits were measured: {local}");
        }
    }
    load::report::print("release", &rows, &json!({ "users": users, "baseline": baseline }));
    rows
}
