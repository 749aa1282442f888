//! What other metrics are held against, as it was configured.

use prometheus_client::metrics::gauge::Gauge;

use crate::metrics::Register;

pub struct LimitMetrics {
    pub lane_queue: Gauge,
    pub inbox_ttl_seconds: Gauge,
    pub held_bytes: Gauge,
}

impl LimitMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            lane_queue: r.add("lane_queue_limit", "changes that may wait for a lane, over all lanes", Gauge::default()),
            inbox_ttl_seconds: r.add("inbox_ttl_seconds", "age at which a stored message is dropped", Gauge::default()),
            held_bytes: r.add("held_limit_bytes", "memory that calls and waiting messages may take", Gauge::default()),
        }
    }
}
