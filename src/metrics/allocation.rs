//! What is counted of allocations.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::histogram::exponential_buckets;

use crate::metrics::Register;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByAllocation {
    algorithm: &'static str,
    /// As it is configured; empty: none.
    experiment: String,
    result: &'static str,
}

pub struct AllocationMetrics {
    allocations: Family<ByAllocation, Counter>,
    pub wait_seconds: Histogram,
}

impl AllocationMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            allocations: r.family("allocations", "users who were told where to connect, or that nobody takes them"),
            wait_seconds: r.add("allocation_wait_seconds", "how long users were asked to wait before they log in", waits()),
        }
    }

    pub fn count(&self, algorithm: &'static str, experiment: &str, result: &'static str) {
        let labels = ByAllocation { algorithm, experiment: experiment.to_owned(), result };
        self.allocations.get_or_create(&labels).inc();
    }
}

/// From 1 ms to 65 s.
fn waits() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 17))
}
