//! How long each thread was busy. The rate of it is the share of the time: near 1 a thread is what calls wait for.

use std::fmt;
use std::sync::Mutex;
use std::sync::PoisonError;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use tokio::runtime::RuntimeMetrics;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByThread {
    thread: String,
}

/// The runtimes that are watched, by name.
#[derive(Debug, Default)]
pub struct BusyThreads(Mutex<Vec<(String, RuntimeMetrics)>>);

impl BusyThreads {
    /// Several threads of one runtime are numbered.
    pub fn watch(&self, name: String, runtime: RuntimeMetrics) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((name, runtime));
    }
}

impl Collector for BusyThreads {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let help = "time that a thread was busy: its rate is a share";
        let mut family = encoder.encode_descriptor("thread_busy_seconds", help, None, MetricType::Counter)?;
        for (name, runtime) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for worker in 0..runtime.num_workers() {
                let thread = if runtime.num_workers() == 1 { name.clone() } else { format!("{name}-{worker}") };
                let busy = runtime.worker_total_busy_duration(worker).as_secs_f64();
                family.encode_family(&ByThread { thread })?.encode_counter::<NoLabelSet, _, u64>(&busy, None)?;
            }
        }
        Ok(())
    }
}
