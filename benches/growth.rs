//! What grows with users, gateways, streams, connections and nodes, and what does not; what a daemon costs that nobody asks.
//!
//! `cargo bench --bench growth` measures (about three quarters of an hour, and 20 GB of disk); `GROWTH_PARTS=users,idle` only these parts,
//! `GROWTH_USERS=3000000` the most users; `cargo test` runs all of them small, so that they do not rot. Everything shares this
//! machine: lines of one table may be compared with each other.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

#[path = "growth/connections.rs"]
mod connections;
#[path = "growth/first.rs"]
mod first;
#[path = "growth/gateways.rs"]
mod gateways;
#[path = "growth/idle.rs"]
mod idle;
#[path = "growth/nodes.rs"]
mod nodes;
#[path = "growth/streams.rs"]
mod streams;
#[path = "growth/users.rs"]
mod users;

use std::time::Duration;

use im_presence::pb;
use serde_json::json;

use crate::harness::node::Node;
use crate::load::on_core;
use crate::load::parts;
use crate::load::scatter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

const PARTS: [&str; 7] = ["first", "users", "gateways", "streams", "connections", "nodes", "idle"];
const BIND: &str = "/mpim.PresenceService/BindRoute";
/// Longer than a run: a hit is a hit, and nobody beats.
const L1_TTL: (&str, &str) = ("ROUTE__L1_TTL", "3600");
const NO_END: [(&str, &str); 2] = [("GATEWAY__LEASE", "3600000"), ("GATEWAY__HEARTBEAT_INTERVAL", "1000000")];

/// How large everything is.
pub struct Plan {
    time: Duration,
    users: Vec<u64>,
    /// Of the gateway that is swept.
    swept: u64,
    gateways: &'static [u64],
    streams: &'static [u64],
    connections: &'static [u64],
    nodes: &'static [usize],
    idle_time: Duration,
    idle_users: u64,
    idle_gateways: u64,
}

impl Plan {
    fn measuring() -> Self {
        let most = std::env::var("GROWTH_USERS").map_or(10_000_000, |users| users.parse().expect("GROWTH_USERS: a number"));
        Self {
            time: Duration::from_secs(3),
            users: [10_000, 100_000, 1_000_000].into_iter().filter(|users| *users < most).chain([most]).collect(),
            swept: 1_000_000,
            gateways: &[10, 1_000, 20_000],
            streams: &[10, 100, 1_000, 10_000],
            connections: &[1, 10, 100, 1_000, 10_000],
            nodes: &[1, 2, 4, 8],
            idle_time: Duration::from_secs(60), // what comes once a minute is in it
            idle_users: 1_000_000,
            idle_gateways: 2_000,
        }
    }

    fn tiny() -> Self {
        Self {
            time: Duration::from_millis(50),
            users: vec![500, 1_000],
            swept: 500,
            gateways: &[2, 20],
            streams: &[2, 20],
            connections: &[1, 20],
            nodes: &[1, 2],
            idle_time: Duration::from_millis(500),
            idle_users: 500,
            idle_gateways: 5,
        }
    }
}

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = if measuring { Plan::measuring() } else { Plan::tiny() };
    let parts = parts::wanted("GROWTH_PARTS", &PARTS);
    parts::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    for part in &parts {
        runtime.block_on(async {
            match *part {
                "first" => first::measure().await,
                "users" => users::measure(&plan).await,
                "gateways" => gateways::measure(&plan).await,
                "streams" => streams::measure(&plan).await,
                "connections" => connections::measure(&plan).await,
                "nodes" => nodes::measure(&plan).await,
                _ => idle::measure(&plan).await,
            }
        });
    }
    println!("test result: ok. {} parts", parts.len());
}

/// A table that is printed line by line, as it comes: the last line may take long.
pub struct Table {
    part: &'static str,
    columns: &'static [&'static str],
    lines: Vec<Vec<String>>,
}

impl Table {
    pub fn new(part: &'static str, columns: &'static [&'static str]) -> Self {
        println!("\n| {} |\n|{}", columns.join(" | "), "---|".repeat(columns.len()));
        Self { part, columns, lines: Vec::new() }
    }

    pub fn line(&mut self, cells: Vec<String>) {
        println!("| {} |", cells.join(" | "));
        self.lines.push(cells);
    }

    /// Prints the same for machines.
    pub fn end(self) {
        println!("{}", json!({ "bench": format!("growth {}", self.part), "columns": self.columns, "lines": self.lines }));
    }
}

/// Acknowledged binds a second of random users among the first `users`, each on a new connection of the client. Another `round`
/// is other connections.
pub async fn binds(node: &Node, users: u64, gateways: u64, round: u64, time: Duration) -> f64 {
    let server = node.data;
    let request = move |c: u64, n: u64| pb::BindRouteReq {
        user_id: (1 + scatter(round << 48 | c << 32 | n) % users) as i64,
        gateway_addr: format!("gw-{}.example.net:7000", 1 + n % gateways),
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        device_id: "phone".to_owned(),
        platform: pb::Platform::Ios.into(),
        conn_id: format!("{round}-{c}-{n}"),
        ..Default::default()
    };
    let done = on_core(None, move || load::run(server, BIND, 8, 64, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

/// Which share of a core the node takes while nobody asks it anything.
pub async fn idle_percent(node: &Node, time: Duration) -> f64 {
    let before = node.cpu_time();
    tokio::time::sleep(time).await;
    (node.cpu_time() - before).as_secs_f64() / time.as_secs_f64() * 100.0
}

pub fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}
