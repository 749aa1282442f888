//! What a change costs the nodes that did not make it, by how many nodes there are: CPU of each, and of the Redis that tells
//! them.
//!
//! `cargo bench --bench nodes` measures (about eight minutes a round); with `BASELINE=path/of/its/binary` also another build, in
//! turn with this one. `cargo test` runs it small, so that it does not rot. All changes go through the first node. The others
//! only hear of them: once with every user in memory, once with room for few.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use serde_json::Value;
use serde_json::json;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::redis::RedisClient;
use crate::harness::redis::RedisServer;
use crate::load::on_core;
use crate::load::paced;
use crate::load::queries::is_warm;
use crate::load::seed;

const GATEWAYS: u64 = 16;
const BATCH: u64 = 1_000;
/// Users of a node that holds next to nothing.
const FEW: &str = "50";
/// What was told last is heard.
const PAUSE: Duration = Duration::from_secs(1);

struct Plan {
    rounds: usize,
    users: u64,
    /// Nodes, with the one that serves.
    counts: &'static [usize],
    /// Of a look at nodes that have nothing to do, and of one that hear of single users.
    time: Duration,
    batch_time: Duration,
    /// Changes a second, each told by itself.
    rate: f64,
    /// Batches a second.
    batch_rate: f64,
}

const MEASURING: Plan = Plan {
    rounds: 2,
    users: 200_000,
    counts: &[2, 4, 8, 16],
    time: Duration::from_secs(20),
    batch_time: Duration::from_secs(10),
    rate: 500.0,
    batch_rate: 4.0,
};

const TINY: Plan = Plan {
    rounds: 1,
    users: 2_500,
    counts: &[2, 3],
    time: Duration::from_millis(300),
    batch_time: Duration::from_millis(500),
    rate: 100.0,
    batch_rate: 2.0,
};

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = if measuring { MEASURING } else { TINY };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    println!(
        "| memory | nodes | idle, of one core | told alone | together | Redis, idle | told alone | together | users a message |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let baseline = std::env::var("BASELINE").ok();
    let builds = [("", Some(PROGRAM.to_owned())), ("baseline, ", baseline)];
    let mut lines = Vec::new();
    for _ in 0..plan.rounds {
        for (memory, more) in [("full", None), ("50 users", Some(("ROUTE__L1_CAPACITY", FEW)))] {
            for (build, program) in builds.iter().filter_map(|(build, program)| Some((build, program.as_ref()?))) {
                let memory = format!("{build}{memory}");
                lines.extend(runtime.block_on(measure(&plan, &memory, program, more)));
            }
        }
    }
    lines.iter().for_each(|line| println!("{line}"));
    println!("test result: ok. {} rounds", plan.rounds);
}

/// Nodes on one database, and who tells them of changes.
struct Field {
    program: String,
    db: TestDb,
    /// Two servers: what is measured is the one of hints.
    cache: RedisServer,
    queue: RedisServer,
    teller: RedisClient,
    nodes: Vec<Node>,
    /// Users who have not changed yet: each changes once, so that whoever holds everybody holds that one, too.
    next: u64,
}

/// CPU during a look in seconds, and what was told.
#[derive(Clone, Copy)]
struct Cost {
    /// Of a node that does not serve.
    node: f64,
    redis: f64,
    messages: f64,
    users: f64,
    time: f64,
}

async fn measure(plan: &Plan, memory: &str, program: &str, more: Option<(&'static str, &'static str)>) -> Vec<Value> {
    let mut field = Field::enter(plan.users, program).await;
    let mut lines = vec![field.sizes(plan.users).await];
    for count in plan.counts {
        while field.nodes.len() < *count {
            field.add_node(more.as_slice()).await;
        }
        for node in &field.nodes {
            is_warm(node).await;
        }
        let (rate, users) = (plan.rate, (plan.rate * plan.time.as_secs_f64()) as u64);
        let alone = field.cost(plan.time, users, async |field: &Field| field.one_by_one(rate, plan.time).await).await;
        let idle = field.cost(plan.time, 0, async |_| ()).await; // not first: a new node has still something to do
        let (rate, users) = (plan.batch_rate, (plan.batch_rate * plan.batch_time.as_secs_f64()) as u64 * BATCH);
        let together = field.cost(plan.batch_time, users, async |field: &Field| field.batches(rate, plan.batch_time).await).await;
        lines.push(report(memory, *count, [idle, alone, together]));
    }
    assert!(field.next <= plan.users + 1, "users change once: {} of {}", field.next - 1, plan.users);
    for node in &field.nodes {
        assert_eq!(node.metric("im_presence_hint_gaps_total").await, 0.0, "what was told was heard");
    }
    lines
}

impl Field {
    /// With one node, which serves.
    async fn enter(users: u64, program: &str) -> Self {
        let (db, cache, queue) = (seed::users(users, GATEWAYS).await, RedisServer::start(), RedisServer::start());
        let teller = queue.client().await;
        let mut field = Self { program: program.to_owned(), db, cache, queue, teller, nodes: Vec::new(), next: 1 };
        field.add_node(&[]).await; // raises the generation: it meets a new Redis
        seed::everybody_is_shown(&field.db).await;
        field
    }

    async fn add_node(&mut self, more: &[(&str, &str)]) {
        let (cache, queue) = (self.cache.port.to_string(), self.queue.port.to_string());
        let stores = [("REDIS_CACHE__PORT", &*cache), ("REDIS_QUEUE__PORT", &*queue), ("ROUTE__L1_TTL", "3600")];
        let settings = self.db.settings(&[&stores[..], more].concat());
        self.nodes.push(Node::start_as(vec![self.program.clone()], settings).await);
    }

    /// What users of one device take in the stores, each.
    async fn sizes(&self, users: u64) -> Value {
        const SQL: &str = "SELECT CAST(SUM(data_length + index_length) AS SIGNED) FROM information_schema.tables \
            WHERE table_schema = DATABASE() AND table_name IN ('users', 'routes')";
        self.db.run("ANALYZE TABLE users, routes").await;
        let memory: String = self.cache.client().await.run(&["INFO", "memory"]).await;
        let redis: f64 = memory.lines().find_map(|line| line.strip_prefix("used_memory:")?.parse().ok()).expect("a number");
        let (sql, redis) = (self.db.number(SQL).await as f64 / users as f64, redis / users as f64);
        json!({ "bench": "nodes", "users": users, "sql_bytes_per_user": sql, "redis_bytes_per_user": redis })
    }

    /// What `time` costs in which these users change.
    async fn cost(&mut self, time: Duration, users: u64, change: impl AsyncFn(&Self)) -> Cost {
        let (began, told) = (Instant::now(), self.told().await);
        let (nodes, redis) = (self.cpu(), self.redis_cpu().await);
        change(self).await;
        tokio::time::sleep((time + PAUSE).saturating_sub(began.elapsed())).await;
        let (node, redis) = (self.cpu() - nodes, self.redis_cpu().await - redis);
        let (messages, time) = (self.told().await - told, began.elapsed().as_secs_f64());
        self.next += users;
        Cost { node, redis, messages, users: users as f64, time }
    }

    async fn one_by_one(&self, rate: f64, time: Duration) {
        let (server, first) = (self.nodes[0].data, self.next);
        let bind = move |_, n| bind_of(first + n);
        on_core(None, move || paced::run(server, "/mpim.PresenceService/BindRoute", 1, rate, time, bind)).await;
    }

    async fn batches(&self, rate: f64, time: Duration) {
        let (server, first) = (self.nodes[0].data, self.next);
        let batch = move |_, n| pb::BatchBindRouteReq { binds: (0..BATCH).map(|i| bind_of(first + n * BATCH + i)).collect() };
        on_core(None, move || paced::run(server, "/mpim.PresenceService/BatchBindRoute", 1, rate, time, batch)).await;
    }

    /// Messages with users so far.
    async fn told(&self) -> f64 {
        let series = self.nodes[0].series("im_presence_hints_total").await;
        series.iter().filter(|(labels, _)| labels.contains("\"sent\"")).map(|(_, count)| count).sum()
    }

    /// Seconds, on an average node that does not serve.
    fn cpu(&self) -> f64 {
        let others = &self.nodes[1..];
        others.iter().map(|node| seconds_used(node.pid())).sum::<f64>() / others.len() as f64
    }

    async fn redis_cpu(&self) -> f64 {
        let info: String = self.teller.run(&["INFO", "cpu"]).await;
        let used = ["used_cpu_sys:", "used_cpu_user:"].map(|key| info.lines().find_map(|line| line.strip_prefix(key)));
        used.iter().map(|seconds| seconds.and_then(|seconds| seconds.parse::<f64>().ok()).expect("CPU of Redis")).sum()
    }
}

/// By all threads of a process, in seconds; `stat` counts in hundredths, which is too much for what is measured here.
fn seconds_used(pid: u32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a running node");
    let nanos = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?; // it may have ended
        text.split(' ').next()?.parse::<f64>().ok()
    });
    nanos.sum::<f64>() / 1e9
}

/// A further device: it replaces nothing, so nobody is kicked.
fn bind_of(user: u64) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: user as i64,
        gateway_addr: format!("gw-{}.example.net:7000", 1 + user % GATEWAYS),
        device_id: "tablet".to_owned(),
        conn_id: format!("t-{user}"),
        ..Default::default()
    }
}

/// Beyond what nodes cost that have nothing to do, in microseconds.
fn report(memory: &str, count: usize, [idle, alone, together]: [Cost; 3]) -> Value {
    let beyond = |cost: Cost, of: fn(&Cost) -> f64| (of(&cost) - of(&idle) / idle.time * cost.time) * 1e6;
    let node = |cost: Cost| beyond(cost, |cost| cost.node) / cost.users.max(1.0);
    let redis = |cost: Cost| beyond(cost, |cost| cost.redis) / cost.users.max(1.0);
    let shares = [idle.node, idle.redis].map(|seconds| 100.0 * seconds / idle.time);
    let users = [alone, together].map(|cost| cost.users / cost.messages.max(1.0));
    println!(
        "| {memory} | {count} | {:.2} % | {:.1} us | {:.2} us | {:.2} % | {:.1} us | {:.2} us | {:.1}, {:.0} |",
        shares[0],
        node(alone),
        node(together),
        shares[1],
        redis(alone),
        redis(together),
        users[0],
        users[1],
    );
    json!({
        "bench": "nodes", "memory": memory, "nodes": count, "idle_percent": shares[0], "alone_us": node(alone),
        "together_us": node(together), "redis_idle_percent": shares[1], "redis_alone_us": redis(alone),
        "redis_together_us": redis(together), "users_a_message": users,
    })
}
