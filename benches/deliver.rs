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
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::node_frame::Body as Down;
use serde_json::json;

use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::percentile;
use crate::harness::redis::Subscriber;
use crate::harness::stream::RawStream;
use crate::harness::stream::bind_frame;
use crate::harness::stream::hello;

/// Of each gateway.
const USERS: i64 = 1_000;
/// Calls at a time, as redis-benchmark makes them by default; the daemon's share a few connections.
const CLIENTS: u64 = 50;
const CONNECTIONS: u64 = 5;
const BINDS_IN_FLIGHT: u64 = 64;
const RECEIVED_WITHIN: Duration = Duration::from_secs(20);
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
        let binds = binds(&plan).await;
        println!("{}", json!({ "bench": "deliver", "deliveries": deliveries, "binds": binds }));
    });
    println!("test result: ok. {} rounds", plan.rounds);
}

/// What arrived, and how long it was under way: every message says when it was sent.
struct Receipts {
    began: Instant,
    took: Mutex<Vec<Duration>>,
}

impl Receipts {
    fn stamp(&self) -> String {
        self.began.elapsed().as_nanos().to_string()
    }

    fn note(&self, body: &[u8]) {
        let sent = std::str::from_utf8(body).ok().and_then(|text| text.parse().ok()).map(Duration::from_nanos);
        let took = sent.map(|sent| self.began.elapsed().saturating_sub(sent));
        self.took.lock().unwrap_or_else(PoisonError::into_inner).extend(took);
    }

    fn len(&self) -> usize {
        self.took.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn take(&self) -> Vec<Duration> {
        std::mem::take(&mut self.took.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The rounds of one way to deliver.
#[derive(Default)]
struct Way {
    per_second: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Way {
    fn add(&mut self, per_second: f64, took: &mut [Duration]) {
        self.per_second.push(per_second);
        self.p50.push(percentile(took, 0.5).as_secs_f64() * 1_000.0);
        self.p99.push(percentile(took, 0.99).as_secs_f64() * 1_000.0);
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

async fn deliveries(plan: &Plan) -> serde_json::Value {
    let cluster = Cluster::with_redis(2, &NO_END).await;
    let receipts = Arc::new(Receipts { began: Instant::now(), took: Mutex::default() });
    for (n, node) in (0..).zip(&cluster.nodes) {
        attach(node, &format!("gw-{n}:7000"), n * USERS + 1, &receipts).await;
    }
    subscribe(&cluster, 2 * USERS + 1, &receipts).await;
    let mut ways: [Way; 6] = Default::default();
    for round in 0..=plan.rounds {
        let port = cluster.queue().port;
        let [mut here, mut elsewhere, mut subscribed, mut raw, mut batch, mut redis_benchmark]: [Way; 6] = Default::default();
        deliver(cluster.node(), 1, plan, &receipts, &mut here).await;
        deliver(cluster.node(), USERS + 1, plan, &receipts, &mut elsewhere).await;
        deliver(cluster.node(), 2 * USERS + 1, plan, &receipts, &mut subscribed).await;
        publish(port, plan, &receipts, &mut raw).await;
        let published = plan.published;
        let tool = tokio::task::spawn_blocking(move || run_redis_benchmark(port, published)).await.expect("the task");
        redis_benchmark.add(tool, &mut []);
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
        "BatchDeliver to 1,000 users on 2 gateways (users)",
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

/// A gateway with all its users, that reads.
async fn attach(node: &Node, addr: &str, first: i64, receipts: &Arc<Receipts>) {
    let (mut stream, _) = RawStream::attach(node, addr, 0).await;
    for user in first..first + USERS {
        assert!(stream.send(2, bind_frame(user, PHONE, "c")).await, "the stream is there");
    }
    for _ in 0..USERS {
        assert!(matches!(stream.next().await.expect("an answer").body, Some(Down::Bound(_))));
    }
    let receipts = receipts.clone();
    tokio::spawn(async move {
        while let Some(frame) = stream.wait().await {
            if let Some(Down::Delivery(delivery)) = frame.body {
                receipts.note(delivery.message.as_bytes());
            }
        }
    });
}

/// A gateway that subscribes instead.
async fn subscribe(cluster: &Cluster, first: i64, receipts: &Arc<Receipts>) {
    let channels: Vec<String> = (first..first + USERS).map(|user| format!("user:{user}")).collect();
    let subscriber = cluster.queue().subscribe(&channels.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let bind = |user_id| pb::BindRouteReq {
        user_id,
        gateway_addr: "gw-redis:7000".to_owned(),
        conn_id: "c".to_owned(),
        ..Default::default()
    };
    let binds = pb::BatchBindRouteReq { binds: (first..first + USERS).map(bind).collect() };
    cluster.node().presence().batch_bind_route(binds).await.expect("binds");
    tokio::spawn(hear(subscriber, receipts.clone()));
}

async fn hear(mut subscriber: Subscriber, receipts: Arc<Receipts>) {
    while let Some((_, body)) = subscriber.next(Duration::MAX).await {
        receipts.note(&body);
    }
}

/// What is said to be delivered has to arrive.
async fn all_received(delivered: u64, receipts: &Receipts) -> Vec<Duration> {
    eventually("all are received", RECEIVED_WITHIN, async || receipts.len() as u64 >= delivered).await;
    assert_eq!(receipts.len() as u64, delivered, "each once");
    receipts.take()
}

/// Messages to users that the node has delivered so far. What a stream's queue had no room for is not among them.
async fn delivered(node: &Node) -> u64 {
    let series = node.series("im_presence_deliveries_total").await;
    series.iter().filter(|(labels, _)| labels.contains("\"delivered\"")).map(|(_, n)| *n as u64).sum()
}

async fn deliver(node: &Node, first: i64, plan: &Plan, receipts: &Arc<Receipts>, way: &mut Way) {
    let (server, time, stamps) = (node.data, plan.time, receipts.clone());
    let request = move |c, n| pb::DeliverReq {
        user_id: first + ((c * 7_919 + n) % USERS as u64) as i64,
        message: stamps.stamp(),
        ..Default::default()
    };
    let (path, before) = ("/mpim.PresenceService/Deliver", delivered(node).await);
    let run = move || load::run(server, path, CONNECTIONS, CLIENTS / CONNECTIONS, time, request);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    let delivered = delivered(node).await - before;
    way.add(delivered as f64 / done.elapsed.as_secs_f64(), &mut all_received(delivered, receipts).await);
}

async fn deliver_to_many(node: &Node, plan: &Plan, receipts: &Arc<Receipts>, way: &mut Way) {
    const MANY: i64 = 1_000;
    let (server, time, stamps) = (node.data, plan.time, receipts.clone());
    // Half of them on each of the two gateways.
    let user_ids: Vec<i64> = (USERS - MANY / 2 + 1..=USERS + MANY / 2).collect();
    let request = move |_, _| pb::BatchDeliverReq { user_ids: user_ids.clone(), message: stamps.stamp(), ..Default::default() };
    let before = delivered(node).await;
    // One at a time: more would not fit into the streams' queues.
    let run = move || load::run(server, "/mpim.PresenceService/BatchDeliver", 1, 1, time, request);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    let delivered = delivered(node).await - before;
    way.add(delivered as f64 / done.elapsed.as_secs_f64(), &mut all_received(delivered, receipts).await);
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
    way.add(per_second, &mut all_received(published, receipts).await);
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

/// A bind of a user whom nobody has bound before: it kicks nobody, and is never a no-op.
fn bind(n: u64, gateway_addr: &str) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: 1 + n as i64,
        gateway_addr: gateway_addr.to_owned(),
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        device_id: PHONE.to_owned(),
        platform: pb::Platform::Ios.into(),
        conn_id: n.to_string(),
        ..Default::default()
    }
}

/// One stream against unary calls on one connection, as many under way.
async fn binds(plan: &Plan) -> serde_json::Value {
    const ADDR: &str = "gw-0:7000";
    let cluster = Cluster::mariadb(1, &NO_END).await;
    let (node, time) = (cluster.node(), plan.time);
    let server = node.data;
    let first = pb::GatewayFrame { seq: 1, body: Some(hello(ADDR, 0)) };
    let open = move || load::Stream::open(server, "/mpim.GatewayService/Attach", &first);
    let mut stream = tokio::task::spawn_blocking(open).await.expect("the loader");
    let (mut calls, mut frames) = ((vec![], vec![]), (vec![], vec![]));
    for round in 0..=plan.rounds {
        let before = node.cpu_time();
        let offset = round as u64 * 10_000_000;
        let run =
            move || load::run(server, "/mpim.PresenceService/BindRoute", 1, BINDS_IN_FLIGHT, time, |_, n| bind(offset + n, ADDR));
        let unary = tokio::task::spawn_blocking(run).await.expect("the loader");
        let between = node.cpu_time();
        let run = move || {
            let frame = |n| pb::GatewayFrame { seq: n, body: Some(Up::Bind(bind(offset + 5_000_000 + n, ""))) };
            (stream.run(BINDS_IN_FLIGHT, time, frame), stream)
        };
        let (streamed, kept) = tokio::task::spawn_blocking(run).await.expect("the loader");
        stream = kept;
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
