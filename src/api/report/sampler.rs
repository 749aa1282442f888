//! Rates: what the metrics say now, next to what they said ten to twenty seconds ago. Nothing more is kept.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use crate::api::http::Operator;
use crate::api::report::shapes::HitShare;
use crate::api::report::shapes::Latency;
use crate::api::report::shapes::NodeMetrics;
use crate::api::report::shapes::NumberReport;
use crate::metrics::snapshot::Snapshot;

/// How far the two that are kept are apart.
pub const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);
/// How old the newest may be that those who ask are told of: reading all metrics costs something.
const FRESH: Duration = Duration::from_millis(500);

pub struct Sampler {
    operator: Operator,
    kept: Mutex<Samples>,
}

struct Samples {
    /// The last two of [`SAMPLE_INTERVAL`].
    before: Snapshot,
    last: Snapshot,
    now: Snapshot,
}

impl Sampler {
    pub fn new(operator: Operator) -> Self {
        operator.refresh();
        let first = Snapshot::take(&operator.metrics);
        let kept = Mutex::new(Samples { before: first.clone(), last: first.clone(), now: first });
        Self { operator, kept }
    }

    /// One more interval has gone by.
    pub fn step(&self) {
        let now = self.take();
        let mut kept = self.lock();
        kept.before = std::mem::replace(&mut kept.last, now.clone());
        kept.now = now;
    }

    /// The numbers of this node.
    pub fn metrics(&self, node_id: &str) -> NodeMetrics {
        if self.lock().now.age() > FRESH {
            let now = self.take();
            self.lock().now = now;
        }
        let kept = self.lock();
        let mut metrics = NodeMetrics {
            node_id: node_id.to_owned(),
            as_of_ms: self.operator.lives.clock.now().0,
            over_s: kept.now.since(&kept.before).as_secs_f64(),
            ..NodeMetrics::default()
        };
        let report = |one: crate::metrics::snapshot::Number| NumberReport {
            name: one.name.to_owned(),
            value: one.value,
            per_s: one.per_s,
        };
        metrics.items = kept.now.numbers(&kept.before).map(report).collect();
        for (what, p99) in kept.now.times(&kept.before, 0.99) {
            match what {
                "query" => metrics.latency_ms.query_p99 = p99,
                "bind" => metrics.latency_ms.bind_p99 = p99,
                _ => metrics.latency_ms.delivery_p99 = p99,
            }
        }
        metrics.hit_share = hit_share(std::slice::from_ref(&metrics));
        metrics
    }

    fn take(&self) -> Snapshot {
        self.operator.refresh();
        Snapshot::take(&self.operator.metrics)
    }

    fn lock(&self) -> MutexGuard<'_, Samples> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sum of a number's pace over nodes.
pub fn pace(nodes: &[NodeMetrics], names: &[&str]) -> f64 {
    let items = nodes.iter().flat_map(|node| &node.items).filter(|item| names.contains(&&*item.name));
    items.filter_map(|item| item.per_s).sum()
}

/// By whom users were found on these nodes. None: nobody was looked up.
pub fn hit_share(nodes: &[NodeMetrics]) -> Option<HitShare> {
    let memory = pace(nodes, &["queries_from_memory", "batch_users_from_memory"]);
    let redis = pace(nodes, &["queries_from_redis", "batch_users_from_redis"]);
    let sql = pace(nodes, &["queries_from_sql", "batch_users_from_sql"]);
    let all = memory + redis + sql;
    (all > 0.0).then(|| HitShare { memory: memory / all, redis: redis / all, sql: sql / all })
}

/// Of each the worst.
pub fn slowest(nodes: &[NodeMetrics]) -> Latency {
    let worst = |of: fn(&Latency) -> Option<f64>| nodes.iter().filter_map(|node| of(&node.latency_ms)).reduce(f64::max);
    Latency {
        query_p99: worst(|latency| latency.query_p99),
        bind_p99: worst(|latency| latency.bind_p99),
        delivery_p99: worst(|latency| latency.delivery_p99),
    }
}
