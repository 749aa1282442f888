//! How fast messages reach gateways, attached or subscribed, beside Redis alone; and what a bind costs on a stream.
//!
//! `cargo bench --bench deliver` measures (about four minutes); `cargo test` runs it for a moment, so that it does not rot.
//! Loader, gateways, daemon, Redis and database share this machine. Ratios of two lines of one run mean something;
//! absolute figures belong to the machine.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use serde_json::json;

use crate::harness::cluster::Cluster;
use crate::harness::node::Node;
use crate::harness::percentile;
use crate::load::binds;
use crate::load::delivering::CLIENTS;
use crate::load::delivering::Receipts;
use crate::load::delivering::USERS;
use crate::load::delivering::attach;
use crate::load::delivering::deliver;
use crate::load::delivering::delivered;
use crate::load::delivering::subscribe;

const BINDS_IN_FLIGHT: u64 = 64;
/// With so many users each as many as a call may have, after those of the other ways.
const GATEWAYS_OF_MANY: i64 = 10;
const FIRST_OF_MANY: i64 = 3 * USERS + 1;
/// Nobody beats here.
const NO_END: [(&str, &str); 3] =
    [("GATEWAY__LEASE", "3600000"), ("GATEWAY__HEARTBEAT_INTERVAL", "1000000"), ("ROUTE__MAX_RETRIES", "0")];

struct Plan {
    rounds: usize,
    time: Duration,
    published: u32,
}

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = match measuring {
        true => Plan { rounds: 5, time: Duration::from_secs(3), published: 200_000 },
        false => Plan { rounds: 1, time: Duration::from_millis(300), published: 5_000 },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let deliveries = deliveries(&plan).await;
        let binds = bind_both_ways(&plan).await;
        println!("{}", json!({ "bench": "deliver", "deliveries": deliveries, "binds": binds }));
    });
    println!("test result: ok. {} rounds", plan.rounds);
}

/// The rounds of one way to deliver.
#[derive(Default)]
struct Way {
    per_second: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Way {
    fn add(&mut self, (per_second, mut took): (f64, Vec<Duration>)) {
        self.per_second.push(per_second);
        self.p50.push(percentile(&mut took, 0.5).as_secs_f64() * 1_000.0);
        self.p99.push(percentile(&mut took, 0.99).as_secs_f64() * 1_000.0);
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

async fn deliveries(plan: &Plan) -> serde_json::Value {
    let cluster = Cluster::with_redis(2, &NO_END).await;
    let receipts = Receipts::new();
    for (n, node) in (0..).zip(&cluster.nodes) {
        attach(node, &format!("gw-{n}:7000"), n * USERS + 1, &receipts).await;
    }
    subscribe(cluster.node(), cluster.queue(), 2 * USERS + 1, &receipts).await;
    for n in 0..GATEWAYS_OF_MANY {
        let node = &cluster.nodes[n as usize % cluster.nodes.len()];
        attach(node, &format!("gw-many-{n}:7000"), FIRST_OF_MANY + n * USERS, &receipts).await;
    }
    let mut ways: [Way; 6] = Default::default();
    for round in 0..=plan.rounds {
        let port = cluster.queue().port;
        let [mut here, mut elsewhere, mut subscribed, mut raw, mut batch, mut redis_benchmark]: [Way; 6] = Default::default();
        here.add(deliver(cluster.node(), 1, plan.time, &receipts).await);
        elsewhere.add(deliver(cluster.node(), USERS + 1, plan.time, &receipts).await);
        subscribed.add(deliver(cluster.node(), 2 * USERS + 1, plan.time, &receipts).await);
        publish(port, plan, &receipts, &mut raw).await;
        let published = plan.published;
        let tool = tokio::task::spawn_blocking(move || run_redis_benchmark(port, published)).await.expect("the task");
        redis_benchmark.add((tool, Vec::new()));
        deliver_to_many(cluster.node(), plan, &receipts, &mut batch).await;
        if round > 0 || plan.rounds == 1 {
            // the first round warms up
            for (all, one) in ways.iter_mut().zip([redis_benchmark, raw, here, elsewhere, subscribed, batch]) {
                all.per_second.extend(one.per_second);
                all.p50.extend(one.p50);
                all.p99.extend(one.p99);
            }
        }
    }
    report(&ways)
}

fn report(ways: &[Way; 6]) -> serde_json::Value {
    const NAMES: [&str; 6] = [
        "redis-benchmark, PUBLISH",
        "PUBLISH to SUBSCRIBE, Redis alone",
        "Deliver to a gateway attached to this node",
        "Deliver to a gateway attached to the other node",
        "Deliver to a Redis subscriber",
        "BatchDeliver to 10,000 users on 10 gateways of both nodes (users)",
    ];
    let baseline = median(&ways[0].per_second);
    println!("| {CLIENTS} at a time | a second | against redis-benchmark | call to receipt, p50 | p99 |\n|---|---|---|---|---|");
    let mut figures = serde_json::Map::new();
    for (name, way) in NAMES.into_iter().zip(ways) {
        let [per_second, p50, p99] = [&way.per_second, &way.p50, &way.p99].map(|figures| median(figures));
        println!("| {name} | {per_second:.0} | {:.2}x | {p50:.2} ms | {p99:.2} ms |", per_second / baseline);
        figures.insert(name.to_owned(), json!({ "per_second": per_second.round(), "p50_ms": p50, "p99_ms": p99 }));
    }
    figures.into()
}

async fn deliver_to_many(node: &Node, plan: &Plan, receipts: &Arc<Receipts>, way: &mut Way) {
    let (server, time, stamps) = (node.data, plan.time, receipts.clone());
    let user_ids: Vec<i64> = (FIRST_OF_MANY..FIRST_OF_MANY + GATEWAYS_OF_MANY * USERS).collect();
    let request = move |_, _| pb::BatchDeliverReq { user_ids: user_ids.clone(), message: stamps.stamp(), ..Default::default() };
    let before = delivered(node).await;
    // One at a time: more would not fit into the streams' queues.
    let run = move || load::run(server, "/mpim.PresenceService/BatchDeliver", 1, 1, time, request);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    let delivered = delivered(node).await - before;
    way.add((delivered as f64 / done.elapsed.as_secs_f64(), receipts.all_received(delivered).await));
}

/// The same without the daemon: as many clients, one command at a time each.
async fn publish(port: u16, plan: &Plan, receipts: &Arc<Receipts>, way: &mut Way) {
    let (time, stamps) = (plan.time, receipts.clone());
    let run = move || {
        let began = Instant::now();
        let client = |c: u64| {
            let stamps = &stamps;
            move || {
                let mut redis = TcpStream::connect(("127.0.0.1", port)).expect("Redis listens");
                redis.set_nodelay(true).expect("TCP_NODELAY");
                let (mut answer, mut published) = ([0; 64], 0_u64);
                while began.elapsed() < time {
                    let channel = format!("user:{}", 2 * USERS + 1 + ((c * 7_919 + published) % USERS as u64) as i64);
                    let (channel_len, stamp) = (channel.len(), stamps.stamp());
                    let command =
                        format!("*3\r\n$7\r\nPUBLISH\r\n${channel_len}\r\n{channel}\r\n${}\r\n{stamp}\r\n", stamp.len());
                    redis.write_all(command.as_bytes()).expect("Redis reads");
                    let n = redis.read(&mut answer).expect("Redis answers");
                    assert_eq!(&answer[..n], b":1\r\n", "one subscriber");
                    published += 1;
                }
                published
            }
        };
        let published: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..CLIENTS).map(|c| scope.spawn(client(c))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a client panicked")).sum()
        });
        (published, published as f64 / began.elapsed().as_secs_f64())
    };
    let (published, per_second) = tokio::task::spawn_blocking(run).await.expect("the clients");
    way.add((per_second, receipts.all_received(published).await));
}

/// Its PUBLISH a second, to a channel that the subscriber hears.
fn run_redis_benchmark(port: u16, published: u32) -> f64 {
    let (port, published, clients) = (port.to_string(), published.to_string(), CLIENTS.to_string());
    let channel = format!("user:{}", 2 * USERS + 1);
    let output = Command::new("redis-benchmark")
        .args(["-p", &port, "-c", &clients, "-n", &published, "--csv", "PUBLISH", &channel, "no-stamp-12345678"])
        .output()
        .expect("run redis-benchmark, which comes with redis-server");
    let text = String::from_utf8_lossy(&output.stdout);
    let figure =
        text.lines().last().and_then(|line| line.split("\",\"").nth(1)).and_then(|figure| figure.trim_matches('"').parse().ok());
    figure.unwrap_or_else(|| panic!("redis-benchmark says {text}"))
}

/// One stream against unary calls on one connection, as many under way.
async fn bind_both_ways(plan: &Plan) -> serde_json::Value {
    const ADDR: &str = "gw-0:7000";
    let cluster = Cluster::mariadb(1, &NO_END).await;
    let (node, time) = (cluster.node(), plan.time);
    let mut stream = binds::attach(node, ADDR).await;
    let (mut calls, mut frames) = ((vec![], vec![]), (vec![], vec![]));
    for round in 0..=plan.rounds {
        let before = node.cpu_time();
        let offset = round as u64 * 10_000_000;
        let unary = binds::by_calls(node, ADDR, (1, BINDS_IN_FLIGHT), offset, time).await;
        let between = node.cpu_time();
        let streamed;
        (streamed, stream) = binds::by_frames(stream, BINDS_IN_FLIGHT, offset + 5_000_000, time).await;
        let after = node.cpu_time();
        if round > 0 || plan.rounds == 1 {
            let micros = |cpu: Duration, done: &load::Done| cpu.as_secs_f64() * 1e6 / done.answered as f64;
            calls.0.push(unary.per_second());
            calls.1.push(micros(between - before, &unary));
            frames.0.push(streamed.per_second());
            frames.1.push(micros(after - between, &streamed));
        }
    }
    let mut bad = node.series("im_presence_binds_total").await;
    bad.retain(|(labels, binds)| !labels.contains("\"ok\"") && *binds > 0.0);
    assert!(bad.is_empty(), "binds that were not done: {bad:?}");
    let [calls, frames] = [calls, frames].map(|(rate, cpu)| (median(&rate), median(&cpu)));
    println!("\n| binds, {BINDS_IN_FLIGHT} in flight, MariaDB | a second | the daemon's CPU per bind |\n|---|---|---|");
    println!("| BindRoute, one connection | {:.0} | {:.1} us |", calls.0, calls.1);
    println!(
        "| frames on one stream | {:.0} ({:.2}x) | {:.1} us ({:.2}x) |",
        frames.0,
        frames.0 / calls.0,
        frames.1,
        frames.1 / calls.1
    );
    json!({ "unary": calls.0.round(), "stream": frames.0.round(), "unary_cpu_us": calls.1, "stream_cpu_us": frames.1 })
}
