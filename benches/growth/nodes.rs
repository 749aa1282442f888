//! Nodes on one MariaDB and one Redis: what one of them costs and does while there are others. What a change costs all of them is
//! measured by the bench `nodes`.

use std::time::Instant;

use crate::L1_TTL;
use crate::Plan;
use crate::Table;
use crate::binds;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::idle_percent;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::seed;

const USERS: u64 = 10_000;
const GATEWAYS: u64 = 16;

pub async fn measure(plan: &Plan) {
    let mut table = Table::new(
        "nodes",
        &[
            "nodes",
            "start of the last until warm",
            "CPU of one when idle, of a core",
            "queries a second of one",
            "binds a second of one",
        ],
    );
    let (db, redis) = (seed::users(USERS, GATEWAYS).await, RedisServer::start());
    let port = redis.port.to_string();
    let settings = db.settings(&[("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port), L1_TTL]);
    let mut nodes: Vec<Node> = Vec::new();
    for (round, count) in (0..).zip(plan.nodes) {
        let mut took = std::time::Duration::ZERO;
        while nodes.len() < *count {
            let began = Instant::now();
            nodes.push(Node::start(settings.clone()).await);
            is_warm(&nodes[nodes.len() - 1]).await;
            took = began.elapsed();
        }
        let first = &nodes[0];
        let idle = idle_percent(first, plan.idle_time / 2).await;
        query(first, None, (8, 16), USERS, plan.time).await; // warms up
        let queries = query(first, None, (8, 16), USERS, plan.time).await;
        let bound = binds(first, USERS, GATEWAYS, round, plan.time).await;
        table.line(vec![
            count.to_string(),
            format!("{:.2} s", took.as_secs_f64()),
            format!("{idle:.2} %"),
            format!("{queries:.0}"),
            format!("{bound:.0}"),
        ]);
    }
    table.end();
}
