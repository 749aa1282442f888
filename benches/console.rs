//! What operators cost: how fast the console's pages are with a million users and two thousand gateways, and what five open
//! consoles cost those who ask where users are.
//!
//! `cargo bench --bench console` measures (about three minutes); `cargo test` runs it small, so that it does not rot. Two nodes
//! on one MariaDB and one Redis; one of them is asked for everything.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::time::Duration;
use std::time::Instant;

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::node::ask;
use crate::harness::redis::RedisServer;
use crate::load::on_core;
use crate::load::paced;
use crate::load::queries::QUERY;
use crate::load::queries::is_warm;
use crate::load::queries::query_of;
use crate::load::report;
use crate::load::report::Row;
use crate::load::seed;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// What each page of the console asks for, besides the summary.
const PAGES: [(&str, &[&str]); 9] = [
    ("overview", &["nodes"]),
    ("gateways", &["gateways?limit=100"]),
    ("gateways_late", &["gateways?state=late&limit=100"]),
    ("gateway", &["gateways/gw-1.example.net:7000", "users?gateway=gw-1.example.net:7000&limit=100"]),
    ("users", &["users?region=eu&limit=100", "counts?by=status"]),
    ("user", &["users/500000", "users/500000/history", "users/500000/online-time", "users/500000/inbox"]),
    ("events", &["audit?limit=50", "drains?limit=100"]),
    ("node", &["nodes", "nodes/asked/streams?sort=queue", "config?node=asked", "config/diff"]),
    ("doctor", &["doctor"]),
];
const PAGE_LIMIT_MS: f64 = 1_000.0;
const SUMMARY_LIMIT_MS: f64 = 20.0;
const CONSOLES: usize = 5;
/// A console asks again after so long.
const REFRESH: Duration = Duration::from_secs(2);
/// Users are counted once a minute.
const COUNTED_WITHIN: Duration = Duration::from_secs(150);
const QUERIES_PER_SECOND: f64 = 5_000.0;
const CONNECTIONS: u64 = 8;

struct Plan {
    users: u64,
    gateways: u64,
    rounds: usize,
    page_asks: usize,
    summary_asks: usize,
    query_time: Duration,
}

fn main() {
    let plan = match std::env::args().any(|arg| arg == "--bench") {
        true => Plan {
            users: 1_000_000,
            gateways: 2_000,
            rounds: 7,
            page_asks: 5,
            summary_asks: 2_000,
            query_time: Duration::from_secs(5),
        },
        false => {
            Plan { users: 2_000, gateways: 20, rounds: 1, page_asks: 1, summary_asks: 20, query_time: Duration::from_millis(100) }
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&plan));
    println!("test result: ok. {} rounds", plan.rounds);
}

async fn measure(plan: &Plan) {
    let (db, redis) = (a_store(plan).await, RedisServer::start());
    let port = redis.port.to_string();
    let settings = db.settings(&[("REDIS_CACHE__PORT", &port), ("REDIS_QUEUE__PORT", &port), ("ROUTE__L1_TTL", "3600")]);
    let named = |name: &str| [settings.clone(), vec![("PRESENCE_SERVICE__NODE_ID".to_owned(), name.to_owned())]].concat();
    let (node, _other) = (Node::start(named("asked")).await, Node::start(named("other")).await);
    is_warm(&node).await;
    let counted = async || node.http("/api/v1/counts?by=gateway").await.0 == 200;
    eventually("users are counted", COUNTED_WITHIN, counted).await;
    let mut rows = Vec::new();
    for (page, paths) in PAGES {
        rows.push(page_row(&node, plan, page, paths).await);
    }
    rows.push(summary_row(&node, plan).await);
    rows.push(queries_row(&node, plan).await);
    report::print("console", &rows, &json!({ "users": plan.users, "gateways": plan.gateways, "consoles": CONSOLES }));
}

/// All users on registered gateways whose leases do not end meanwhile.
async fn a_store(plan: &Plan) -> TestDb {
    let db = seed::users(plan.users, plan.gateways).await;
    let later = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000 AS SIGNED) + 7200000";
    db.run(&format!("UPDATE lives SET kind = 1, lease_until = {later}, region = 'eu', capacity = 10000")).await;
    db.run("UPDATE routes SET expires_at_ms = NULL").await;
    db
}

async fn page_row(node: &Node, plan: &Plan, page: &'static str, paths: &[&str]) -> Row {
    let mut row = Row::absolute(page, page, "ms", (PAGE_LIMIT_MS, PAGE_LIMIT_MS / 4.0));
    for _ in 0..plan.page_asks {
        let began = Instant::now();
        for path in paths {
            let (status, body) = node.http(&format!("/api/v1/{path}")).await;
            assert_eq!(status, 200, "{path}: {body}");
        }
        row.add_absolute(began.elapsed().as_secs_f64() * 1_000.0);
    }
    row
}

async fn summary_row(node: &Node, plan: &Plan) -> Row {
    let mut row = Row::absolute("summary", "summary, p99", "ms", (SUMMARY_LIMIT_MS, SUMMARY_LIMIT_MS / 2.0));
    for _ in 0..plan.rounds {
        let mut took = Vec::new();
        for _ in 0..plan.summary_asks {
            let began = Instant::now();
            assert_eq!(node.http("/api/v1/summary").await.0, 200);
            took.push(began.elapsed());
        }
        row.add_absolute(p99(took).as_secs_f64() * 1_000.0);
    }
    row
}

/// With and without consoles in turn.
async fn queries_row(node: &Node, plan: &Plan) -> Row {
    let what = ("QueryRoute, p99, 5,000 a second, five open consoles", "none");
    let mut row = Row::new("queries", what, (1.1, 1.0)).less_is_better("us");
    for round in 0..=plan.rounds {
        let with = async || {
            let _open = consoles(node);
            queries(node, plan).await
        };
        let (ours, theirs) = match round % 2 {
            0 => (with().await, queries(node, plan).await),
            _ => {
                let theirs = queries(node, plan).await;
                (with().await, theirs)
            }
        };
        if round > 0 {
            row.add(ours, theirs); // the first round warms up
        }
    }
    row
}

async fn queries(node: &Node, plan: &Plan) -> f64 {
    let (server, time, users) = (node.data, plan.query_time, plan.users);
    let run = move || paced::run(server, QUERY, CONNECTIONS, QUERIES_PER_SECOND, time, move |c, n| query_of(c, n, users));
    p99(on_core(None, run).await).as_secs_f64() * 1_000_000.0
}

/// Consoles that stand open until this is dropped: each with its stream of events, and a page that is made anew all the time.
fn consoles(node: &Node) -> JoinSet<()> {
    let mut open = JoinSet::new();
    for (n, (_, paths)) in PAGES.into_iter().take(CONSOLES).enumerate() {
        let admin = node.admin;
        open.spawn(async move { drop(ask(admin, "GET", "/api/v1/events", &[], "").await) });
        open.spawn(async move {
            sleep(REFRESH * u32::try_from(n).expect("a few") / u32::try_from(CONSOLES).expect("a few")).await;
            loop {
                for path in [&["summary"], paths].concat() {
                    ask(admin, "GET", &format!("/api/v1/{path}"), &[], "").await;
                }
                sleep(REFRESH).await;
            }
        });
    }
    open
}

fn p99(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() * 99 / 100]
}
