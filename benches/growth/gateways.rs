//! Gateways that each node keeps in memory, and that binds name.

use std::time::Instant;

use crate::L1_TTL;
use crate::Plan;
use crate::Table;
use crate::binds;
use crate::harness::node::Node;
use crate::idle_percent;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::seed;
use crate::mib;

const USERS: u64 = 10_000;

pub async fn measure(plan: &Plan) {
    let mut table = Table::new(
        "gateways",
        &[
            "gateways, MariaDB",
            "start to warm memory",
            "resident",
            "queries a second",
            "binds a second",
            "CPU when idle, of a core",
        ],
    );
    for gateways in plan.gateways {
        let db = seed::users(USERS, *gateways).await;
        let began = Instant::now();
        let node = Node::start(db.settings(&[L1_TTL])).await;
        is_warm(&node).await;
        let (warm, rss) = (began.elapsed(), node.rss_bytes());
        query(&node, None, (8, 16), USERS, plan.time).await; // warms up
        let queries = query(&node, None, (8, 16), USERS, plan.time).await;
        let bound = binds(&node, USERS, *gateways, 0, plan.time).await;
        let idle = idle_percent(&node, plan.idle_time / 2).await;
        table.line(vec![
            gateways.to_string(),
            format!("{:.2} s", warm.as_secs_f64()),
            mib(rss),
            format!("{queries:.0}"),
            format!("{bound:.0}"),
            format!("{idle:.2} %"),
        ]);
    }
    table.end();
}
