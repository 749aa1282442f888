//! How fast users are resolved: the daemon against an empty handler on its own server, against itself on one multi-threaded
//! runtime, against nginx with an answer from memory, and against what people use instead: plain Redis and plain SQL.
//!
//! `cargo bench --bench resolve` measures (about ten minutes); `cargo test` runs every contender for a moment, so that it
//! does not rot. Loader, servers and stores share this machine: each ratio is of two things measured one after the other in
//! the same round. `benches/README.md` says how to read the table.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::time::Duration;

use serde_json::Value;
use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::percentile;
use crate::harness::pki;
use crate::harness::pki::Pki;
use crate::harness::redis::RedisServer;
use crate::load::Target;
use crate::load::contender;
use crate::load::nginx::Nginx;
use crate::load::on_core;
use crate::load::paced;
use crate::load::queries::BATCH;
use crate::load::queries::QUERY;
use crate::load::queries::batch_query;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::queries::query_at;
use crate::load::queries::query_of;
use crate::load::report::Row;
use crate::load::seed;
use crate::load::stores;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// The core of a server that has one for itself, and the loader's.
const SERVER: usize = 0;
const LOADER: usize = 1;
const HOT_USERS: u64 = 10_000;
const GATEWAYS: u64 = 16;
/// Fewer than this in memory: next to every user of a batch is a miss.
const NO_L1: (&str, &str) = ("ROUTE__L1_CAPACITY", "1000");
/// Longer than a run, so that what is measured is a hit.
const L1_TTL: (&str, &str) = ("ROUTE__L1_TTL", "3600");

struct Plan {
    rounds: usize,
    time: Duration,
    users: u64,
    redis_calls: u64,
    growth: bool,
}

fn main() {
    contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = match measuring {
        true => Plan { rounds: 5, time: Duration::from_secs(2), users: 1_000_000, redis_calls: 200_000, growth: true },
        false => {
            let time = Duration::from_millis(50);
            Plan { rounds: 1, time, users: 2_000, redis_calls: 500, growth: false }
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&plan));
    println!("test result: ok. {} rounds", plan.rounds);
}

/// Everybody who takes part.
struct Field {
    db: TestDb,
    /// The daemon, with one serving thread on a core of its own.
    alone: Node,
    /// The same, which wants a token.
    guarded: Node,
    token: String,
    empty_alone: Node,
    ready_alone: Node,
    nginx: Nginx,
    /// The daemon as it comes.
    node: Node,
    one_runtime: Node,
    /// The daemon with next to nothing in L1, with Redis and without.
    past_l1: Node,
    past_l2: Node,
    redis: stores::PlainRedis,
    _cluster_redis: RedisServer,
    _pki: Pki,
}

impl Field {
    async fn enter(plan: &Plan) -> Self {
        let (plain_redis, redis) = (stores::PlainRedis::start(plan.users), RedisServer::start());
        let port = redis.port.to_string();
        let of_cluster = [("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port), L1_TTL];
        let one_thread = ("PRESENCE_SERVICE__THREAD_COUNT", "1");
        let with = |more: &[(&'static str, &'static str)]| [&of_cluster[..], more].concat();
        let db = seed::users(plan.users, GATEWAYS).await;
        let pinned = || contender::on_core(Some(SERVER), PROGRAM);
        let (pki, (token, service), (of_nodes, nodes)) =
            (Pki::new(), pki::token("service", "service", ""), pki::token("nodes", "node", ""));
        let (tokens, of_nodes) = (pki.write("tokens.toml", &format!("{service}{nodes}")), pki.write("node.token", &of_nodes));
        let tokens = [("AUTH__TOKENS_FILE", pki::text(&tokens)), ("PEER__TOKEN_FILE", pki::text(&of_nodes))];
        let guard = [&tokens[..], &[("AUTH__MODE", "token"), one_thread]].concat();
        let guarded = db.settings(&[&of_cluster[..], &guard].concat());
        // The first node that meets a Redis raises the generation, which empties the memory of all that run.
        let past_l1 = Node::start(db.settings(&with(&[NO_L1]))).await;
        let field = Self {
            past_l1,
            alone: Node::start_as(pinned(), db.settings(&with(&[one_thread]))).await,
            guarded: Node::start_as(pinned(), guarded).await,
            token,
            empty_alone: contender::empty(Some(SERVER), &[one_thread]).await,
            ready_alone: contender::ready(Some(SERVER), &[one_thread]).await,
            nginx: Nginx::start(SERVER).await,
            node: Node::start(db.settings(&with(&[]))).await,
            one_runtime: contender::one_runtime(&db, &with(&[])).await,
            // It says hints: while a node is silent, the others keep nothing for longer than a second.
            past_l2: Node::start(db.settings(&[NO_L1, ("REDIS_QUEUE__PORT", &*port), L1_TTL])).await,
            redis: plain_redis,
            _cluster_redis: redis,
            _pki: pki,
            db,
        };
        for node in [&field.alone, &field.guarded, &field.node, &field.one_runtime] {
            is_warm(node).await;
        }
        seed::everybody_is_shown(&field.db).await;
        field
    }
}

fn rows() -> Vec<Row> {
    let empty = "an empty handler on the same server";
    let nginx = "nginx, one worker on that core, a constant answer of as many bytes";
    let one_by_one = "plain Redis, four GETs one after the other, 50 connections";
    let mget = "pipelined MGET of 1,000";
    vec![
        Row::new("hot", ("QueryRoute, L1 hit, 10,000 users, one thread on its own core", empty), (0.0, 0.0)),
        Row::new("all", ("the same, all users uniformly", empty), (0.0, 0.0)),
        Row::new("nginx", ("QueryRoute with a token, L1 hit, 10,000 users, one thread on its own core", nginx), (1.4, 2.0)),
        Row::new("nginx_all", ("the same, all users uniformly", nginx), (1.2, 1.7)),
        Row::new("ready", ("the same, 10,000 users", "a handler with the same answer made beforehand"), (0.0, 0.0)),
        Row::new("threads", ("QueryRoute, default threads", "the same service on one multi-thread runtime"), (1.3, 1.5)),
        Row::new("callers", ("QueryRoute, 50 callers", one_by_one), (4.0, 5.0)),
        Row::new("callers_apart", ("the same, each caller with a connection of its own", one_by_one), (5.0, 8.0)),
        Row::new("callers_900", ("the same, 900 callers", "the same, 900 connections"), (5.0, 8.0)),
        Row::new("get", ("QueryRoute, 50 callers", "plain Redis, one GET per query, 50 connections"), (0.0, 0.0)),
        Row::new("mget", ("the same", "plain Redis, one MGET of four, 50 connections, 16 at a time"), (0.0, 0.0)),
        Row::new("batch_l1", ("BatchQueryRoute of 1,000, L1 hit, all users", mget), (1.3, 2.0)),
        Row::new("batch_l2", ("BatchQueryRoute of 1,000, nothing in L1", mget), (0.6, 0.9)),
        Row::new(
            "batch_sql",
            ("BatchQueryRoute of 1,000, nothing in L1 or L2", "SELECT ... IN of 1,000, plain client"),
            (1.0, 1.3),
        ),
        Row::new(
            "p99",
            ("QueryRoute p99 at half of the peak, one thread on its own core", "the empty handler's at that rate"),
            (1.5, 1.1),
        )
        .less_is_better("us"),
    ]
}

async fn measure(plan: &Plan) {
    let field = Field::enter(plan).await;
    let (mut rows, mut more) = (rows(), json!({}));
    for round in 0..=plan.rounds {
        let results = one_round(plan, &field).await;
        if round > 0 || plan.rounds == 1 {
            // the first round warms up
            rows.iter_mut().zip(results).for_each(|(row, (ours, theirs))| row.add(ours, theirs));
        }
    }
    if plan.growth {
        for node in [&field.alone, &field.node] {
            let local = stores::share_of(node, "im_presence_queries_total", "local").await;
            assert!(local > 0.99, "hits were measured: {local}");
        }
        more = growth(plan, &field).await;
    }
    load::report::print("resolve", &rows, &more);
}

/// Both sides of each row, in the order of the rows.
async fn one_round(plan: &Plan, field: &Field) -> Vec<(f64, f64)> {
    let alone = async |node: &Node, users: u64| query(node, Some(LOADER), (4, 32), users, plan.time).await;
    let (hot, empty) = (alone(&field.alone, HOT_USERS).await, alone(&field.empty_alone, HOT_USERS).await);
    let (all, ready) = (alone(&field.alone, plan.users).await, alone(&field.ready_alone, HOT_USERS).await);
    let (guarded, guarded_all, nginx) = beside_nginx(plan, field).await;
    let shared = async |node: &Node| query(node, None, (8, 16), HOT_USERS, plan.time).await;
    let (threads, one_runtime) = (shared(&field.node).await, shared(&field.one_runtime).await);
    let callers = query(&field.node, None, (5, 10), plan.users, plan.time).await;
    let get = field.redis.get(50, plan.redis_calls).await;
    let callers_apart = query(&field.node, None, (50, 1), plan.users, plan.time).await;
    let callers_900 = query(&field.node, None, (900, 1), plan.users, plan.time).await;
    let get_900 = field.redis.get(900, plan.redis_calls).await;
    let mget_of_four = field.redis.mget(4, (50, 16), plan.redis_calls).await;
    let batch_l1 = batch_query(&field.node, plan.users, plan.time).await;
    let mget = field.redis.mget(BATCH, (4, 4), plan.redis_calls / 40).await;
    let batch_l2 = batch_query(&field.past_l1, plan.users, plan.time).await;
    let batch_sql = batch_query(&field.past_l2, plan.users, plan.time).await;
    let select = stores::select_in(&field.db, BATCH, plan.users, plan.time).await;
    let half = hot / 2.0;
    let (p99, empty_p99) = (p99(&field.alone, half, plan.time).await, p99(&field.empty_alone, half, plan.time).await);
    vec![
        (hot, empty),
        (all, empty),
        (guarded, nginx),
        (guarded_all, nginx),
        (hot, ready),
        (threads, one_runtime),
        (callers, get / 4.0),
        (callers_apart, get / 4.0),
        (callers_900, get_900 / 4.0),
        (callers, get),
        (callers, mget_of_four),
        (batch_l1, mget),
        (batch_l2, mget),
        (batch_sql, select),
        (p99, empty_p99),
    ]
}

/// Queries with a token of hot users, of all, and what nginx answers.
async fn beside_nginx(plan: &Plan, field: &Field) -> (f64, f64, f64) {
    let ours = Target { server: field.guarded.data, tls: None, token: Some(field.token.clone()) };
    let ask = async |target: &Target, users| query_at(target, Some(LOADER), (4, 32), users, plan.time).await;
    let theirs = Target { server: field.nginx.addr, tls: None, token: None };
    (ask(&ours, HOT_USERS).await, ask(&ours, plan.users).await, ask(&theirs, HOT_USERS).await)
}

/// In microseconds. By one connection, and not on the core of the server: a loader that keeps to a rate takes as much of a core
/// as that, and which of its threads gets it next would be what is measured.
async fn p99(node: &Node, rate: f64, time: Duration) -> f64 {
    let server = node.data;
    let request = move |c, n| query_of(c, n, HOT_USERS);
    let mut took = on_core(Some(LOADER), move || paced::run(server, QUERY, 1, rate, time, request)).await;
    percentile(&mut took, 0.99).as_secs_f64() * 1e6
}

/// What grows with users, connections and gateways: a figure for each size.
async fn growth(plan: &Plan, field: &Field) -> Value {
    let (mut users, mut connections, mut gateways) = (json!({}), json!({}), json!({}));
    for count in [10_000, 100_000, 1_000_000] {
        users[count.to_string()] = json!(query(&field.node, None, (8, 16), count, plan.time).await.round());
    }
    for count in [1, 10, 100, 900] {
        let in_flight = 1 + 100 / count;
        connections[count.to_string()] = json!(query(&field.node, None, (count, in_flight), HOT_USERS, plan.time).await.round());
    }
    for count in [10, 10_000] {
        let db = seed::users(HOT_USERS, count).await;
        let port = field._cluster_redis.port.to_string();
        let redis = [("REDIS_QUEUE__PORT", &*port), L1_TTL, ("REDIS_QUEUE__CHANNEL_PREFIX", "growth:")];
        let node = Node::start(db.settings(&redis)).await;
        is_warm(&node).await;
        gateways[count.to_string()] = json!(query(&node, None, (8, 16), HOT_USERS, plan.time).await.round());
    }
    json!({ "queries_by_users": users, "queries_by_connections": connections, "queries_by_gateways": gateways })
}
