//! What a call costs the daemon in allocations and system calls: its whole process, with an allocator that counts.
//!
//! `cargo bench --bench calls` measures (a minute); `cargo test` runs it for a moment. System calls are counted by `perf` (Debian's
//! linux-perf), where it is there and may.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::alloc::GlobalAlloc;
use std::alloc::Layout;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mimalloc::MiMalloc;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::process;
use crate::harness::redis::RedisServer;
use crate::load::binds;
use crate::load::delivering;
use crate::load::delivering::Receipts;
use crate::load::delivering::USERS;
use crate::load::delivering::attach;
use crate::load::delivering::delivered;
use crate::load::delivering::subscribe;
use crate::load::queries::batch_query;
use crate::load::queries::query;

#[global_allocator]
static ALLOCATOR: Counting = Counting { allocations: AtomicU64::new(0), bytes: AtomicU64::new(0) };

/// Names the file that the daemon writes its counts to.
const COUNTS: &str = "BENCH_COUNTS";
const WRITTEN_EVERY: Duration = Duration::from_millis(20);
/// So that the file says what was before it is read, and perf counts.
const SETTLED: Duration = Duration::from_millis(200);
const GATEWAYS: [&str; 2] = ["gw-0:7000", "gw-1:7000"];
const IN_FLIGHT: u64 = 64;

/// The daemon's allocator, which counts what it is asked for.
struct Counting {
    allocations: AtomicU64,
    bytes: AtomicU64,
}

impl Counting {
    fn count(&self, bytes: usize) {
        self.allocations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

// SAFETY: all is done by mimalloc.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count(size);
        // SAFETY: as the caller promises.
        unsafe { MiMalloc.realloc(at, layout, size) }
    }
}

fn main() -> ExitCode {
    if let Ok(file) = std::env::var(COUNTS) {
        std::thread::spawn(move || keep_writing(Path::new(&file)));
        return im_presence::command_line::run();
    }
    let time = if std::env::args().any(|arg| arg == "--bench") { Duration::from_secs(5) } else { Duration::from_millis(100) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(time));
    println!("test result: ok");
    ExitCode::SUCCESS
}

fn keep_writing(file: &Path) {
    loop {
        let Counting { allocations, bytes } = &ALLOCATOR;
        let counts = format!("{} {}\n", allocations.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
        let beside = file.with_extension("new");
        if std::fs::write(&beside, counts).and_then(|()| std::fs::rename(&beside, file)).is_err() {
            return; // the bench has ended
        }
        std::thread::sleep(WRITTEN_EVERY);
    }
}

async fn measure(time: Duration) {
    let (directory, redis, db) = (tempfile::tempdir().expect("a directory"), RedisServer::start(), TestDb::sqlite());
    let file = directory.path().join("counts");
    let port = redis.port.to_string();
    let more = [("REDIS_QUEUE__PORT", &*port), ("ROUTE__L1_TTL", "3600"), ("GATEWAY__LEASE", "3600000")];
    let itself = std::env::current_exe().expect("the path of this program");
    let program = vec!["env".to_owned(), format!("{COUNTS}={}", file.display()), itself.display().to_string()];
    let settings = db.settings(&[&more[..], &[("GATEWAY__HEARTBEAT_INTERVAL", "1000000")]].concat());
    let (node, receipts) = (Node::start_as(program, settings).await, Receipts::new());
    attach(&node, GATEWAYS[0], 1, &receipts).await;
    subscribe(&node, &redis, USERS + 1, &receipts).await;
    let stream = binds::attach(&node, GATEWAYS[1]).await;
    let users = 2 * USERS as u64;
    query(&node, None, (4, 16), users, time).await; // all are in memory

    let mut table = Table { file: &file, node: &node, lines: Vec::new() };
    println!("| a call | allocations | bytes | system calls |\n|---|---|---|---|");
    table.line("QueryRoute, from memory", async || calls(query(&node, None, (4, 16), users, time).await, time)).await;
    table
        .line("the same, 50 callers with a connection each", async || calls(query(&node, None, (50, 1), users, time).await, time))
        .await;
    table.line("BatchQueryRoute of 1,000, from memory", async || calls(batch_query(&node, users, time).await, time)).await;
    table
        .line("BindRoute on SQLite", async || binds::by_calls(&node, "gw-2:7000", (1, IN_FLIGHT), 1 << 30, time).await.answered)
        .await;
    let before = table.begin().await;
    let (done, _attached) = binds::by_frames(stream, IN_FLIGHT, 1 << 31, time).await;
    table.add("the same on a stream", before, done.answered).await;
    for (what, first) in [("Deliver to a gateway attached to this node", 1), ("Deliver to a Redis subscriber", USERS + 1)] {
        let deliver = async || {
            let before = delivered(&node).await;
            delivering::deliver(&node, first, time, &receipts).await;
            delivered(&node).await - before
        };
        table.line(what, deliver).await;
    }
    println!("{}", json!({ "bench": "calls", "lines": table.lines }));
}

fn calls(per_second: f64, time: Duration) -> u64 {
    (per_second * time.as_secs_f64()) as u64
}

struct Table<'a> {
    file: &'a Path,
    node: &'a Node,
    lines: Vec<(&'static str, Vec<f64>)>,
}

impl Table<'_> {
    /// `work` says how many calls it made.
    async fn line(&mut self, what: &'static str, work: impl AsyncFnOnce() -> u64) {
        let before = self.begin().await;
        let calls = work().await;
        self.add(what, before, calls).await;
    }

    async fn begin(&self) -> (Option<Child>, [u64; 2]) {
        (system_calls(self.node.pid()), counts(self.file).await)
    }

    async fn add(&mut self, what: &'static str, (perf, before): (Option<Child>, [u64; 2]), calls: u64) {
        let after = counts(self.file).await;
        let counted = [Some(after[0] - before[0]), Some(after[1] - before[1]), perf.and_then(counted)];
        let each: Vec<f64> = counted.into_iter().flatten().map(|count| count as f64 / calls as f64).collect();
        let system_calls = each.get(2).map_or_else(|| "not counted".to_owned(), |count| format!("{count:.2}"));
        println!("| {what} | {:.1} | {:.0} | {system_calls} |", each[0], each[1]);
        self.lines.push((what, each));
    }
}

/// Counts those of all threads of a process.
fn system_calls(pid: u32) -> Option<Child> {
    let mut perf = Command::new("perf");
    perf.args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", &pid.to_string()]).stderr(Stdio::piped());
    perf.spawn().ok()
}

fn counted(perf: Child) -> Option<u64> {
    process::signal(&perf, Signal::SIGINT);
    let output = perf.wait_with_output().ok()?;
    String::from_utf8_lossy(&output.stderr).split(',').next()?.parse().ok()
}

/// Allocations of the daemon so far, and their bytes.
async fn counts(file: &Path) -> [u64; 2] {
    tokio::time::sleep(SETTLED).await;
    let text = std::fs::read_to_string(file).expect("the daemon counts");
    let mut numbers = text.split_whitespace().map(|number| number.parse().expect("a number"));
    [numbers.next().expect("allocations"), numbers.next().expect("bytes")]
}
