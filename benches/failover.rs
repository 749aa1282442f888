//! How long users of a dead gateway stay online, by how many they are; and how fast their routes are removed afterwards.
//!
//! `cargo bench --bench failover` measures (about ten minutes); `cargo test` runs it small, so that it does not rot. Two nodes
//! on one MariaDB, without Redis: nothing tells a node of a death but the table that it reads.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use serde_json::json;
use tokio::task::JoinSet;

use crate::harness::cluster::Cluster;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::load::gateway::Gateway;
use crate::load::gateway::LEASE;
use crate::load::gateway::LEASES;

/// Users asked for, spread over all.
const SAMPLE: u64 = 1_000;
/// What other nodes change is seen within this time, as there is no bus.
const SEEN_ELSEWHERE: Duration = Duration::from_millis(1_200);
/// After a million rows were written.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);
/// Steady load while the sweep gives way.
const QUERIES_PER_SECOND: u32 = 2_000;
const QUERYING: u32 = 8;
const SWEPT_UNDER_LOAD: u64 = 100_000;

struct Plan {
    sizes: &'static [u64],
    deaths: usize,
    swept_under_load: u64,
    load_time: Duration,
}

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = match measuring {
        true => Plan {
            sizes: &[10_000, 100_000, 1_000_000],
            deaths: 10,
            swept_under_load: SWEPT_UNDER_LOAD,
            load_time: Duration::from_secs(10),
        },
        false => Plan { sizes: &[1_000], deaths: 1, swept_under_load: 1_000, load_time: Duration::from_millis(300) },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&plan));
    println!("test result: ok. {} sizes", plan.sizes.len());
}

async fn measure(plan: &Plan) {
    let cluster = Cluster::mariadb(2, &[&LEASES[..], &[("ROUTE__L1_CAPACITY", "10000")]].concat()).await;
    let healthy = Gateway::register(cluster.node(), "gw-healthy:7000").await; // one of two that dies is no mass expiry
    println!("| routes | deaths | median from the end of the lease | lowest | highest | swept, routes a second |");
    println!("|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    for &size in plan.sizes {
        let mut delays = Vec::new();
        let mut swept = 0.0;
        for death in 1..=plan.deaths {
            let gateway = Gateway::register(cluster.node(), &format!("gw-{size}-{death}:7000")).await;
            seed(&cluster, &gateway, size).await;
            delays.push(die(&cluster, gateway, size).await.as_secs_f64() * 1_000.0);
            if death < plan.deaths {
                cluster.db.run("TRUNCATE TABLE routes").await;
            } else {
                swept = swept_per_second(&cluster, size).await;
            }
        }
        delays.sort_unstable_by(f64::total_cmp);
        let (median, lowest, highest) = (delays[delays.len() / 2], delays[0], delays[delays.len() - 1]);
        println!("| {size} | {} | {median:.0} ms | {lowest:.0} ms | {highest:.0} ms | {swept:.0} |", delays.len());
        lines.push(json!({ "routes": size, "median_ms": median, "highest_ms": highest, "swept_per_second": swept }));
    }
    let load = sweep_under_load(&cluster, plan).await;
    drop(healthy);
    println!("{}", json!({ "bench": "failover", "deaths": lines, "under_load": load }));
}

/// Puts `size` users onto the gateway, straight into the tables: binding a million takes longer than what is measured here.
async fn seed(cluster: &Cluster, gateway: &Gateway, size: u64) {
    let epoch = gateway.epoch;
    cluster
        .db
        .run(&format!(
            "INSERT INTO users (user_id, version) SELECT seq, {epoch} FROM seq_1_to_{size} \
             ON DUPLICATE KEY UPDATE version = GREATEST(version + 1, VALUES(version)); \
             INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, \
             bound_version, bound_at_ms) SELECT seq, 'phone', 1, {epoch}, 'c', {now}, '', 0, {epoch}, {now} FROM seq_1_to_{size}",
            now = epoch / 1_000,
        ))
        .await;
    tokio::time::sleep(SEEN_ELSEWHERE).await;
    for node in &cluster.nodes {
        // The tables are busy with what they were given: some may still be answered as they were.
        let all = async || online(node, size).await == SAMPLE.min(size);
        eventually("all are online while their gateway lives", SETTLED_WITHIN, all).await;
    }
}

/// How long after the end of its lease both nodes say that all users of the gateway are offline.
async fn die(cluster: &Cluster, gateway: Gateway, size: u64) -> Duration {
    let end = gateway.fall_silent().await;
    assert!(end > Instant::now(), "the lease ends later");
    let mut last = Duration::ZERO;
    for node in &cluster.nodes {
        while online(node, size).await > 0 {
            assert!(end.elapsed() < Duration::from_secs(10), "users stay online");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        last = last.max(end.elapsed());
    }
    last
}

/// How many of the sample are online.
async fn online(node: &Node, size: u64) -> u64 {
    let count = SAMPLE.min(size);
    let user_ids = (0..count).map(|n| (1 + n * (size / count)) as i64).collect();
    let request = pb::BatchQueryRouteReq { user_ids, online_only: true, ..Default::default() };
    let answer = node.presence().batch_query_route(request).await.expect("a query").into_inner();
    answer.users.len() as u64
}

async fn swept_per_second(cluster: &Cluster, size: u64) -> f64 {
    let began = Instant::now();
    eventually("the routes are removed", Duration::from_secs(300), async || {
        cluster.db.number("SELECT COUNT(*) FROM (SELECT 1 FROM routes LIMIT 1) AS some").await == 0
    })
    .await;
    size as f64 / began.elapsed().as_secs_f64()
}

/// How much slower queries get while a sweep gives way to them, and how fast it is then.
async fn sweep_under_load(cluster: &Cluster, plan: &Plan) -> serde_json::Value {
    let size = plan.swept_under_load;
    let before = p99(cluster.node(), plan.load_time).await;
    let gateway = Gateway::register(cluster.node(), "gw-load:7000").await;
    seed(cluster, &gateway, size).await;
    let (mut during, mut swept) = (Duration::ZERO, 0.0);
    tokio::join!(
        async {
            die(cluster, gateway, size).await;
            swept = swept_per_second(cluster, size).await
        },
        async {
            tokio::time::sleep(LEASE).await; // until it ends
            during = p99(cluster.node(), plan.load_time).await;
        }
    );
    let ratio = during.as_secs_f64() / before.as_secs_f64();
    println!("| {QUERIES_PER_SECOND} queries a second | without a sweep | during one | ratio | swept, routes a second |");
    println!("|---|---|---|---|---|");
    println!("| p99 | {before:?} | {during:?} | {ratio:.1}x | {swept:.0} |");
    json!({ "p99_us": before.as_micros(), "p99_during_sweep_us": during.as_micros(), "swept_per_second": swept })
}

/// The p99 of queries that come at a steady rate.
async fn p99(node: &Node, time: Duration) -> Duration {
    let mut tasks = JoinSet::new();
    for caller in 0..QUERYING {
        let mut client = node.new_connection();
        tasks.spawn(async move {
            let (mut took, began) = (Vec::new(), Instant::now());
            let mut ticks = tokio::time::interval(Duration::from_secs(1) * QUERYING / QUERIES_PER_SECOND);
            while began.elapsed() < time {
                let due = ticks.tick().await; // late calls are counted from when they were due
                let user_id = i64::from(1 + caller * 1_000 + took.len() as u32 % 1_000);
                client.query_route(pb::QueryRouteReq { user_id, max_staleness_ms: None }).await.expect("a query");
                took.push(due.elapsed());
            }
            took
        });
    }
    let mut took: Vec<Duration> = tasks.join_all().await.into_iter().flatten().collect();
    took.sort_unstable();
    took[took.len() * 99 / 100]
}
