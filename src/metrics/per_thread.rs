//! Counting where it happens a hundred thousand times a second: each thread counts in a cache line of its own, and whoever
//! asks adds them up.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::MetricEncoder;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Atomic;
use prometheus_client::metrics::counter::Counter;

/// More threads than this share lines; the sums stay right.
const LINES: usize = 32;
/// Upper bounds in seconds: 50 us to 6.5 s, each twice the one before; then everything.
const BOUNDS: usize = 18;
const FIRST_BOUND: Duration = Duration::from_micros(50);

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static LINE: usize = THREADS.fetch_add(1, Ordering::Relaxed) % LINES;
}

/// Two lines, because processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Line<T>(T);

#[derive(Debug, Default)]
pub(super) struct PerThread<T>([Line<T>; LINES]);

impl<T> PerThread<T> {
    pub(super) fn mine(&self) -> &T {
        &self.0[LINE.with(|line| *line)].0
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|line| &line.0)
    }
}

/// A counter for the hot path.
pub type HotCounter = Counter<u64, Sum>;

#[derive(Debug, Default)]
pub struct Sum(PerThread<AtomicU64>);

impl Atomic<u64> for Sum {
    fn inc(&self) -> u64 {
        self.inc_by(1)
    }

    fn inc_by(&self, more: u64) -> u64 {
        self.0.mine().fetch_add(more, Ordering::Relaxed)
    }

    fn get(&self) -> u64 {
        self.0.all().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// A histogram of times for the hot path.
#[derive(Clone, Debug, Default)]
pub struct HotSeconds(Arc<PerThread<Times>>);

#[derive(Debug, Default)]
struct Times {
    buckets: [AtomicU64; BOUNDS + 1],
    nanos: AtomicU64,
}

impl HotSeconds {
    pub fn observe(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let times = self.0.mine();
        times.buckets[bucket(took)].fetch_add(1, Ordering::Relaxed);
        times.nanos.fetch_add(nanos, Ordering::Relaxed);
    }
}

/// The first bucket whose bound is not below `took`.
fn bucket(took: Duration) -> usize {
    let of_first = took.as_nanos().div_ceil(FIRST_BOUND.as_nanos()).max(1);
    usize::try_from(of_first.next_power_of_two().ilog2()).unwrap_or(BOUNDS).min(BOUNDS)
}

impl TypedMetric for HotSeconds {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for HotSeconds {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        let mut buckets: [(f64, u64); BOUNDS + 1] = [(f64::INFINITY, 0); BOUNDS + 1];
        let mut bound = FIRST_BOUND.as_secs_f64();
        for bucket in &mut buckets[..BOUNDS] {
            bucket.0 = bound;
            bound *= 2.0;
        }
        let mut nanos = 0;
        for times in self.0.all() {
            nanos += times.nanos.load(Ordering::Relaxed);
            for (sum, bucket) in buckets.iter_mut().zip(&times.buckets) {
                sum.1 += bucket.load(Ordering::Relaxed);
            }
        }
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(Duration::from_nanos(nanos).as_secs_f64(), count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn a_time_is_counted_under_the_first_bound_it_does_not_exceed() {
        for (micros, want) in [(0, 0), (1, 0), (50, 0), (51, 1), (100, 1), (101, 2), (200, 2), (6_553_600, 17), (6_553_601, 18)] {
            assert_eq!(bucket(Duration::from_micros(micros)), want, "{micros} us");
        }
        assert_eq!(bucket(Duration::MAX), BOUNDS);
        assert_eq!(bucket(Duration::from_nanos(50_001)), 1);
    }

    #[test]
    fn what_all_threads_have_counted_is_shown() {
        let (mut registry, count, times) = (Registry::default(), HotCounter::default(), HotSeconds::default());
        registry.register("calls", "calls", count.clone());
        registry.register("seconds", "times", times.clone());
        std::thread::scope(|scope| {
            for _ in 0..2 * LINES {
                scope.spawn(|| {
                    count.inc_by(3);
                    times.observe(Duration::from_micros(75));
                });
            }
        });
        times.observe(Duration::from_secs(60));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for line in [
            "calls_total 192",
            "seconds_count 65",
            "seconds_sum 60.0048",
            "seconds_bucket{le=\"0.00005\"} 0",
            "seconds_bucket{le=\"0.0001\"} 64",
            "seconds_bucket{le=\"6.5536\"} 64",
            "seconds_bucket{le=\"+Inf\"} 65",
        ] {
            assert!(lines.contains(&line), "{line} in\n{text}");
        }
    }
}
