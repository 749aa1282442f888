//! What users would pick instead, beside the daemon: plain Redis, NATS JetStream KV, etcd. The same users, the same questions,
//! one run on one machine; `benches/README.md` says what is unfair to whom.
//!
//! `cargo bench --bench rivals` measures (about six minutes); `cargo test` runs each for a moment, so that it does not rot.
//! Who is not installed is left out, which the table says.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

#[path = "rivals/etcd.rs"]
mod etcd;
#[path = "rivals/nats.rs"]
mod nats;
#[path = "rivals/ours.rs"]
mod ours;
#[path = "rivals/plain_redis.rs"]
mod plain_redis;

use std::net::SocketAddr;
use std::time::Duration;

use nix::unistd::sync;
use prost::Message;
use serde_json::Value;
use serde_json::json;

use crate::etcd::Etcd;
use crate::load::on_core;
use crate::load::report;
use crate::load::server::is_installed;
use crate::nats::Nats;
use crate::ours::Ours;
use crate::plain_redis::Keys;
use crate::plain_redis::Log;
use crate::plain_redis::PlainRedis;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// The core of whoever answers, and the loader's. What stands behind the daemon runs where it likes.
const SERVER: usize = 0;
const LOADER: usize = 1;
/// Connections, and how many calls are under way on each.
type Shape = (u64, u64);
/// Fifty callers who share five connections, as callers of one client library do; and with a connection each.
const SHARED: Shape = (5, 10);
const APART: Shape = (50, 1);
/// Binds of many gateways at once: whoever can put many into one write to the disk may.
const BINDS: Shape = (8, 64);
const FILL_IN_FLIGHT: u64 = 200;
/// Between looks whether all are gone.
const LOOK: Duration = Duration::from_millis(20);
/// Users of the gateway that dies, and those whose binds are acknowledged just before a SIGKILL.
const FIRST_DYING: u64 = 10_000_000;
const FIRST_LOST: u64 = 20_000_000;
/// What a store that knows nothing of routes is given to keep of one: what the daemon knows.
const VALUE: &str = "{\"gateway\": \"gw-12.example.net:7000\", \"epoch\": 12, \"device\": \"phone\", \"platform\": 1, \"conn\": \"c-123456\", \
    \"ip\": \"192.0.2.17\", \"port\": 40000, \"at\": 1800000000000, \"status\": 1}";

/// One system that says where a user is.
trait Rival {
    fn name(&self) -> String;
    /// Puts users there who stay. All are acknowledged when it returns.
    async fn fill(&mut self, users: u64);
    /// Look-ups a second of one of `users`.
    async fn lookups(&mut self, shape: Shape, users: u64, time: Duration) -> f64;
    /// Acknowledged writes a second of where one of `users` is.
    async fn binds(&mut self, shape: Shape, users: u64, time: Duration) -> f64;
    /// A gateway with so many users gives its last sign of life.
    async fn death(&mut self, users: u64, lease: Duration) -> Figures;
    fn rss_bytes(&self) -> u64;
    /// How many of so many users are not there when the server comes back, which was killed once all were acknowledged. The last
    /// thing that is asked of it.
    async fn lost(&mut self, users: u64) -> u64;
}

struct Figures {
    /// When nobody sees any of the users any more.
    beyond_the_lease: Duration,
    /// What it takes to keep them alive for another lease.
    cpu_of_a_beat: Duration,
}

struct Plan {
    rounds: usize,
    time: Duration,
    users: u64,
    lost: u64,
    lease: Duration,
}

fn main() {
    load::contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = match measuring {
        true => Plan { rounds: 5, time: Duration::from_secs(2), users: 100_000, lost: 10_000, lease: Duration::from_secs(5) },
        // The shortest lease that etcd grants.
        false => {
            let (time, lease) = (Duration::from_millis(50), Duration::from_secs(2));
            Plan { rounds: 1, time, users: 500, lost: 100, lease }
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&plan));
    println!("test result: ok. {} rounds", plan.rounds);
}

/// What one of them came to.
#[derive(Default)]
struct Line {
    name: String,
    bytes_per_user: f64,
    lookups: Vec<f64>,
    lookups_apart: Vec<f64>,
    binds: Vec<f64>,
    death: Option<Figures>,
    lost: u64,
}

async fn measure(plan: &Plan) {
    let mut ours = [Ours::on_sqlite(plan.lease).await, Ours::on_mariadb_and_redis(plan.lease).await];
    let mut redis = [
        PlainRedis::start(Keys::Four, Log::Always).await,
        PlainRedis::start(Keys::One, Log::Always).await,
        PlainRedis::start(Keys::One, Log::Snapshots).await,
    ];
    let mut nats = if is_installed("nats-server") { Some(Nats::start().await) } else { None };
    let mut etcd = if is_installed("etcd") { Some(Etcd::start().await) } else { None };
    let mut lines: [Vec<Line>; 4] = Default::default();
    // One step of all, then the next: so what slows down the machine meets all of them.
    for step in 0..3 + plan.rounds {
        let [of_ours, of_redis, of_nats, of_etcd] = &mut lines;
        take_step(step, plan, &mut ours, of_ours).await;
        take_step(step, plan, &mut redis, of_redis).await;
        take_step(step, plan, nats.as_mut_slice(), of_nats).await;
        take_step(step, plan, etcd.as_mut_slice(), of_etcd).await;
    }
    report(plan, &lines.into_iter().flatten().collect::<Vec<_>>());
    for (program, there) in [("nats-server", nats.is_some()), ("etcd", etcd.is_some())] {
        if !there {
            println!("{program} is not installed, and left out: run tests/run, or apt-get install nats-server etcd-server");
        }
    }
}

/// The first step fills, rounds follow, then come death and SIGKILL.
async fn take_step<R: Rival>(step: usize, plan: &Plan, rivals: &mut [R], lines: &mut Vec<Line>) {
    for (n, rival) in rivals.iter_mut().enumerate() {
        sync(); // what the one before has left to be written is not waited for by this one
        if step == 0 {
            let before = rival.rss_bytes();
            rival.fill(plan.users).await;
            let bytes_per_user = rival.rss_bytes().saturating_sub(before) as f64 / plan.users as f64;
            lines.push(Line { name: rival.name(), bytes_per_user, ..Default::default() });
        }
        let line = &mut lines[n];
        match step {
            0 => _ = rival.lookups(SHARED, plan.users, plan.time).await, // warms up
            step if step <= plan.rounds => {
                line.lookups.push(rival.lookups(SHARED, plan.users, plan.time).await);
                line.lookups_apart.push(rival.lookups(APART, plan.users, plan.time).await);
                line.binds.push(rival.binds(BINDS, plan.users, plan.time).await);
            }
            step if step == plan.rounds + 1 => line.death = Some(rival.death(plan.users, plan.lease).await),
            _ => line.lost = rival.lost(plan.lost).await,
        }
    }
}

/// Calls a second of a gRPC server.
async fn calls<M: Message>(
    server: SocketAddr,
    path: &'static str,
    (connections, in_flight): Shape,
    time: Duration,
    request: impl Fn(u64, u64) -> M + Sync + Send + 'static,
) -> f64 {
    let done = on_core(Some(LOADER), move || load::run(server, path, connections, in_flight, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

fn report(plan: &Plan, lines: &[Line]) {
    println!(
        "| {} users, lease {} s | look-ups a second, 50 callers on 5 connections | the same, a connection each | binds a second, \
         8 x 64 under way | all of a dead gateway are gone, after its lease | CPU of one beat of all | bytes a user | of {} \
         acknowledged binds lost by SIGKILL |",
        plan.users,
        plan.lease.as_secs(),
        plan.lost
    );
    println!("|---|---|---|---|---|---|---|---|");
    let mut all: Vec<Value> = Vec::new();
    for line in lines {
        let [lookups, apart, binds] = [&line.lookups, &line.lookups_apart, &line.binds].map(|f| report::Figures::of(f.clone()));
        let spread = |f: &report::Figures| format!("**{:.0}** ({:.0} - {:.0})", f.median, f.lowest, f.highest);
        let death = line.death.as_ref().expect("each dies once");
        let (gone, beat) = (death.beyond_the_lease.as_secs_f64(), death.cpu_of_a_beat.as_millis());
        let (bytes, lost) = (line.bytes_per_user, line.lost);
        let [a, b, c] = [&lookups, &apart, &binds].map(spread);
        println!("| {} | {a} | {b} | {c} | {gone:.2} s | {beat} ms | {bytes:.0} | {lost} |", line.name);
        all.push(json!({
            "name": line.name, "lookups": lookups.median.round(), "lookups_apart": apart.median.round(),
            "binds": binds.median.round(), "gone_s": gone, "beat_cpu_ms": beat, "bytes": bytes.round(), "lost": lost,
        }));
    }
    println!("{}", json!({ "bench": "rivals", "users": plan.users, "rivals": all }));
}
