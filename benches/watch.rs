//! What it costs to watch users: how late tellings are, how many one node makes, what a watched user takes of memory, and what
//! becomes of all that when hints are lost, one user is watched by everybody, or a gateway dies.
//!
//! `cargo bench --bench watch` measures (about half an hour); `WATCH_PARTS=latency,storm` only these parts, `WATCH_ROUNDS=1`
//! in one round; `cargo test` runs all of them small, so that they do not rot. Two nodes, A and B, on one MariaDB and one
//! Redis. All of that shares this machine with the loader, who is also the watcher.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

#[path = "watch/death.rs"]
mod death;
#[path = "watch/field.rs"]
mod field;
#[path = "watch/latency.rs"]
mod latency;
#[path = "watch/pairs.rs"]
mod pairs;
#[path = "watch/publish.rs"]
mod publish;
#[path = "watch/resync.rs"]
mod resync;
#[path = "watch/storm.rs"]
mod storm;
#[path = "watch/tellings.rs"]
mod tellings;

use std::time::Duration;

use crate::load::parts;
use crate::load::watching::Shape;

const PARTS: [&str; 6] = ["latency", "tellings", "pairs", "resync", "storm", "death"];

/// How large everything is.
pub struct Plan {
    rounds: usize,
    /// Of `latency`: one user of one stream each.
    crowd: Shape,
    change_rate: f64,
    change_time: Duration,
    /// Of `tellings`: all streams watch the same users, who change at these rates.
    fans: Shape,
    fan_rates: &'static [f64],
    fan_time: Duration,
    /// To as many subscribers as there are streams.
    published: u64,
    /// Of `pairs`; the last one also of `resync`.
    many: [Shape; 2],
    query_time: Duration,
    /// Of `storm`: all streams watch one user.
    storm: Shape,
    /// Others who are watched then.
    bystanders: Shape,
    storm_rate: f64,
    storm_seconds: u64,
    /// Users of the gateway of `death`.
    dying: u64,
}

const fn shape(connections: u64, streams: u64, users: u64) -> Shape {
    Shape { connections, streams, users }
}

const MEASURING: Plan = Plan {
    rounds: 3,
    crowd: shape(10, 10, 1_000),
    change_rate: 1_000.0,
    change_time: Duration::from_secs(20),
    fans: shape(10, 10, 2_000),
    fan_rates: &[250.0, 500.0, 1_000.0, 2_000.0, 4_000.0],
    fan_time: Duration::from_secs(5),
    published: 20_000,
    many: [shape(100, 100, 100), shape(10, 1, 100_000)],
    query_time: Duration::from_secs(30),
    storm: shape(500, 100, 1),
    bystanders: shape(1, 10, 100),
    storm_rate: 200.0,
    storm_seconds: 30,
    dying: 100_000,
};

const TINY: Plan = Plan {
    rounds: 1,
    crowd: shape(2, 2, 50),
    change_rate: 200.0,
    change_time: Duration::from_millis(500),
    fans: shape(2, 2, 50),
    fan_rates: &[100.0, 200.0],
    fan_time: Duration::from_millis(300),
    published: 200,
    many: [shape(2, 5, 100), shape(2, 1, 6_000)],
    query_time: Duration::from_millis(500),
    storm: shape(3, 10, 1),
    bystanders: shape(1, 2, 10),
    storm_rate: 20.0,
    storm_seconds: 2,
    dying: 500,
};

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let mut plan = if measuring { MEASURING } else { TINY };
    if let Ok(rounds) = std::env::var("WATCH_ROUNDS") {
        plan.rounds = rounds.parse().ok().filter(|rounds| *rounds > 0).expect("WATCH_ROUNDS: a number above 0");
    }
    let parts = parts::wanted("WATCH_PARTS", &PARTS);
    parts::raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    for part in &parts {
        runtime.block_on(async {
            match *part {
                "latency" => latency::measure(&plan).await,
                "tellings" => tellings::measure(&plan).await,
                "pairs" => pairs::measure(&plan).await,
                "resync" => resync::measure(&plan).await,
                "storm" => storm::measure(&plan).await,
                _ => death::measure(&plan).await,
            }
        });
    }
    println!("test result: ok. {} parts", parts.len());
}
