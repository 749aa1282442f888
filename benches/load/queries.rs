//! Queries by the second, of one user and of a batch.

use std::time::Duration;

use im_presence::pb;

use crate::harness;
use crate::harness::node::Node;
use crate::load;
use crate::load::Target;
use crate::load::on_core;
use crate::load::scatter;

pub const QUERY: &str = "/mpim.PresenceService/QueryRoute";
/// Users of a batch.
pub const BATCH: u64 = 1_000;
const BATCH_QUERY: &str = "/mpim.PresenceService/BatchQueryRoute";
const WARM_WITHIN: Duration = Duration::from_secs(120);

pub async fn is_warm(node: &Node) {
    let warm = async || node.log().iter().any(|line| line.contains("memory is warm"));
    harness::eventually("memory is warm", WARM_WITHIN, warm).await;
}

/// Queries of one of the first `users` a second, by a loader on `core`.
pub async fn query(node: &Node, core: Option<usize>, shape: (u64, u64), users: u64, time: Duration) -> f64 {
    query_at(&Target { server: node.data, tls: None, token: None }, core, shape, users, time).await
}

/// The same of a server that wants more than a connection, or is no node.
pub async fn query_at(target: &Target, core: Option<usize>, shape: (u64, u64), users: u64, time: Duration) -> f64 {
    let (target, request) = (target.clone(), move |c, n| query_of(c, n, users));
    let done = on_core(core, move || load::run_on(&target, QUERY, shape, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

pub fn query_of(connection: u64, n: u64, users: u64) -> pb::QueryRouteReq {
    pb::QueryRouteReq { user_id: user(connection << 32 | n, users), max_staleness_ms: None }
}

fn user(n: u64, users: u64) -> i64 {
    i64::try_from(1 + scatter(n) % users).expect("not that many users")
}

/// Batches a second, of some of the first `users`.
pub async fn batch_query(node: &Node, users: u64, time: Duration) -> f64 {
    let server = node.data;
    let request = move |c: u64, n: u64| pb::BatchQueryRouteReq {
        user_ids: (0..BATCH).map(|i| user(c << 48 | n << 16 | i, users)).collect(),
        ..Default::default()
    };
    let done = on_core(None, move || load::run(server, BATCH_QUERY, 4, 4, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}
