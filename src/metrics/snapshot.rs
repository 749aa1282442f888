//! What the metrics say at one moment, and what happened between two moments.

use std::collections::HashMap;
use std::time::Duration;
use std::time::Instant;

use crate::metrics::Metrics;

/// How a number is made of series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows: its pace is told as well.
    Counter,
    Gauge,
}

/// A number for operators: its name, the metric whose series are added up, and what the labels of these contain.
struct Source {
    name: &'static str,
    metric: &'static str,
    labels: &'static str,
    kind: Kind,
}

const fn counter(name: &'static str, metric: &'static str, labels: &'static str) -> Source {
    Source { name, metric, labels, kind: Kind::Counter }
}

const fn gauge(name: &'static str, metric: &'static str) -> Source {
    Source { name, metric, labels: "", kind: Kind::Gauge }
}

const SOURCES: [Source; 35] = [
    counter("queries", "queries_total", ""),
    counter("batch_users", "batch_users_total", ""),
    counter("queries_from_memory", "queries_total", "local"),
    counter("queries_from_redis", "queries_total", "shared"),
    counter("queries_from_sql", "queries_total", "durable"),
    counter("batch_users_from_memory", "batch_users_total", "local"),
    counter("batch_users_from_redis", "batch_users_total", "shared"),
    counter("batch_users_from_sql", "batch_users_total", "durable"),
    counter("binds", "binds_total", ""),
    counter("unbinds", "unbinds_total", ""),
    counter("deliveries", "deliveries_total", ""),
    counter("delivered", "deliveries_total", "\"delivered"),
    counter("stored", "deliveries_total", "stored"),
    counter("offline", "deliveries_total", "offline"),
    counter("acks", "acks_total", ""),
    counter("kicks", "kicks_total", ""),
    counter("fenced", "fenced_total", ""),
    counter("turned_away", "shed_total", ""),
    counter("store_errors", "store_errors_total", ""),
    counter("redis_errors", "redis_errors_total", ""),
    counter("hint_gaps", "hint_gaps_total", ""),
    counter("gateway_deaths", "gateway_deaths_total", ""),
    counter("swept_routes", "swept_routes_total", ""),
    counter("auth_failures", "auth_failures_total", ""),
    counter("denied", "denied_total", ""),
    gauge("connections", "connections"),
    gauge("streams", "streams"),
    gauge("stream_queue_depth", "stream_queue_depth"),
    gauge("lane_queue_depth", "lane_queue_depth"),
    gauge("l1_entries", "l1_entries"),
    gauge("held_bytes", "held_bytes"),
    gauge("users_online", "users_online"),
    gauge("inbox_messages", "inbox_messages"),
    gauge("outbox_rows", "outbox_rows"),
    gauge("sweep_backlog", "sweep_backlog"),
];

/// What takes time, and the metric with its buckets.
const TIMES: [(&str, &str, &str); 3] = [
    ("query", "query_seconds_bucket", ""),
    ("bind", "bind_seconds_bucket", ""),
    ("delivery", "delivery_seconds_bucket", "\"total\""),
];

/// Upper bound in seconds, and how many took no longer.
type Buckets = Vec<(f64, f64)>;

#[derive(Clone, Debug)]
pub struct Snapshot {
    at: Instant,
    numbers: [f64; SOURCES.len()],
    times: [Buckets; TIMES.len()],
}

/// A number, and how much it has grown per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Number {
    pub name: &'static str,
    pub value: f64,
    /// None: it does not only grow.
    pub per_s: Option<f64>,
}

impl Snapshot {
    /// What is counted at this moment.
    pub fn take(metrics: &Metrics) -> Self {
        Self::read(&metrics.openmetrics().unwrap_or_default(), Instant::now())
    }

    fn read(text: &str, at: Instant) -> Self {
        let mut wanted: HashMap<&str, (Vec<usize>, Option<usize>)> = HashMap::new();
        (0..).zip(&SOURCES).for_each(|(i, source)| wanted.entry(source.metric).or_default().0.push(i));
        (0..).zip(&TIMES).for_each(|(i, (_, metric, _))| wanted.entry(metric).or_default().1 = Some(i));
        let (mut numbers, mut times) = ([0.0; SOURCES.len()], [const { Buckets::new() }; TIMES.len()]);
        for line in text.lines().filter_map(|line| line.strip_prefix("im_presence_")) {
            let end = line.find(['{', ' ']).unwrap_or(line.len());
            let Some((sums, buckets)) = wanted.get(&line[..end]) else { continue };
            let Some((labels, value)) = line[end..].rsplit_once(' ') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            sums.iter().filter(|i| labels.contains(SOURCES[**i].labels)).for_each(|i| numbers[*i] += value);
            if let Some(i) = buckets.filter(|i| labels.contains(TIMES[*i].2))
                && let Some(bound) = labels.split("le=\"").nth(1).and_then(|rest| rest.split('"').next())
            {
                times[i].push((bound.parse().unwrap_or(f64::INFINITY), value));
            }
        }
        Self { at, numbers, times }
    }

    /// How long ago `earlier` was taken.
    pub fn since(&self, earlier: &Self) -> Duration {
        self.at.duration_since(earlier.at)
    }

    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }

    /// All numbers, and their pace since `earlier`.
    pub fn numbers(&self, earlier: &Self) -> impl Iterator<Item = Number> {
        let seconds = self.since(earlier).as_secs_f64();
        (0..).zip(&SOURCES).map(move |(i, source)| {
            let grown = (self.numbers[i] - earlier.numbers[i]).max(0.0);
            let per_s = (source.kind == Kind::Counter).then_some(if seconds > 0.0 { grown / seconds } else { 0.0 });
            Number { name: source.name, value: self.numbers[i], per_s }
        })
    }

    /// The time in milliseconds that this share of the queries, binds and deliveries since `earlier` did not exceed. None: there
    /// were none.
    pub fn times(&self, earlier: &Self, share: f64) -> impl Iterator<Item = (&'static str, Option<f64>)> {
        (0..).zip(&TIMES).map(move |(i, (name, ..))| {
            let before = |bound: f64| earlier.times[i].iter().find(|(known, _)| *known == bound).map_or(0.0, |(_, count)| *count);
            let grown: Buckets = self.times[i].iter().map(|(bound, count)| (*bound, (count - before(*bound)).max(0.0))).collect();
            (*name, quantile(&grown, share).map(|seconds| seconds * 1_000.0))
        })
    }
}

/// As Prometheus has it: within a bucket all are spread evenly. Beyond the last bound it is that one.
fn quantile(buckets: &Buckets, share: f64) -> Option<f64> {
    let all = buckets.last().map(|(_, count)| *count).filter(|count| *count > 0.0)?;
    let rank = all * share;
    let (mut below, mut from) = (0.0, 0.0);
    for (bound, count) in buckets {
        if *count >= rank {
            return Some(if bound.is_infinite() { from } else { from + (bound - from) * (rank - below) / (count - below) });
        }
        (below, from) = (*count, *bound);
    }
    Some(from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::ByOutcome;

    fn number(found: &[Number], name: &str) -> (f64, Option<f64>) {
        let found = found.iter().find(|number| number.name == name).unwrap_or_else(|| panic!("no {name}"));
        (found.value, found.per_s)
    }

    #[test]
    fn numbers_and_their_pace_come_from_the_metrics() {
        let metrics = Metrics::new();
        metrics.queries.local.inc_by(5);
        let before = Snapshot::take(&metrics);
        metrics.queries.local.inc_by(30);
        metrics.queries.durable.inc_by(10);
        for (outcome, times) in [("delivered", 4), ("undelivered", 2), ("stored", 1)] {
            metrics.deliveries.get_or_create(&ByOutcome { outcome }).inc_by(times);
        }
        metrics.streams.set(3);
        let after = Snapshot { at: before.at + Duration::from_secs(10), ..Snapshot::take(&metrics) };
        let found: Vec<Number> = after.numbers(&before).collect();
        assert_eq!(number(&found, "queries"), (45.0, Some(4.0)));
        assert_eq!(number(&found, "queries_from_sql"), (10.0, Some(1.0)));
        assert_eq!(number(&found, "deliveries"), (7.0, Some(0.7)));
        assert_eq!(number(&found, "delivered"), (4.0, Some(0.4)));
        assert_eq!(number(&found, "streams"), (3.0, None));
    }

    #[test]
    fn every_number_has_a_metric() {
        let registered = [include_str!("../metrics.rs"), include_str!("security.rs")].concat();
        let metrics = SOURCES.iter().map(|source| source.metric).chain(TIMES.iter().map(|(_, metric, _)| *metric));
        for metric in metrics {
            let name = metric.trim_end_matches("_total").trim_end_matches("_bucket");
            assert!(registered.contains(&format!("\"{name}\"")), "{metric}");
        }
    }

    #[test]
    fn times_are_of_what_happened_in_between() {
        let metrics = Metrics::new();
        (0..100).for_each(|_| metrics.query_seconds.observe(Duration::from_secs(1)));
        metrics.delivery_stage("handed", Duration::from_secs(1));
        let before = Snapshot::take(&metrics);
        (0..100).for_each(|_| metrics.query_seconds.observe(Duration::from_micros(150)));
        metrics.delivery_stage("total", Duration::from_millis(90));
        let times: HashMap<_, _> = Snapshot::take(&metrics).times(&before, 0.99).collect();
        let query = times["query"].expect("there were queries");
        assert!((0.1..=0.2).contains(&query), "{query} ms");
        assert!(times["delivery"].is_some_and(|ms| (51.0..=103.0).contains(&ms)), "{times:?}");
        assert_eq!(times["bind"], None);
    }
}
