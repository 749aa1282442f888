//! What the daemon counts. Names are an interface: dashboards and alerts hang on them. Each name is listed in `docs/operations.md`.

mod allocation;
pub mod calls;
mod digests;
mod limits;
mod moves;
mod per_thread;
mod presence;
mod process;
mod security;
pub mod snapshot;
pub mod sql;
pub mod threads;

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Atomic;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::histogram::exponential_buckets;
use prometheus_client::registry::Registry;

use crate::clock;
use crate::metrics::allocation::AllocationMetrics;
use crate::metrics::calls::Calls;
use crate::metrics::digests::DigestMetrics;
use crate::metrics::limits::LimitMetrics;
pub use crate::metrics::moves::MoveMetrics;
pub use crate::metrics::per_thread::HotCounter;
use crate::metrics::per_thread::HotSeconds;
use crate::metrics::presence::PresenceMetrics;
use crate::metrics::process::Process;
use crate::metrics::security::SecurityMetrics;
use crate::metrics::sql::SqlMetrics;
use crate::metrics::threads::BusyThreads;

/// One label with a fixed set of values.
macro_rules! label {
    ($type:ident, $field:ident) => {
        #[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
        pub struct $type {
            pub $field: &'static str,
        }
    };
}

label!(ByResult, result);
label!(ByReason, reason);
label!(BySource, source);
label!(ByCause, cause);
label!(ByKind, kind);
label!(ByWhat, what);
label!(ByTier, tier);
label!(ByDirection, direction);
label!(ByUse, r#use);
label!(ByOutcome, outcome);
label!(ByState, state);
label!(ByStage, stage);
label!(ByTls, tls);
label!(ByMode, mode);
label!(ByRole, role);
label!(ByShown, shown);
label!(ByPart, part);

/// Which program this is.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByBuild {
    version: &'static str,
    commit: &'static str,
}

/// What alerts compare with others than 0 have to begin with: a counter that appears with 1 has not risen.
const BIND_RESULTS: [&str; 6] = ["ok", "refused", "fenced", "error", "overloaded", "unavailable"];
const DEATH_CAUSES: [&str; 5] = ["expired", "superseded", "deregistered", "operator", "held"];
const DELIVERY_OUTCOMES: [&str; 6] = ["delivered", "offline", "undelivered", "stored", "inbox_full", "error"];
const SPAN_RESULTS: [&str; 3] = ["sent", "dropped", "failed"];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByGateway {
    pub gateway: String,
}

/// Users looked up, by the tier that answered.
pub struct LookedUp {
    pub local: HotCounter,
    pub shared: HotCounter,
    pub durable: HotCounter,
}

impl LookedUp {
    fn of(family: &Family<BySource, HotCounter>) -> Self {
        let from = |source| family.get_or_create(&BySource { source }).clone();
        Self { local: from("local"), shared: from("shared"), durable: from("durable") }
    }
}

pub struct Metrics {
    registry: Registry,
    pub calls: Arc<Calls>,
    pub threads: Arc<BusyThreads>,
    pub limits: LimitMetrics,
    pub sql: Arc<SqlMetrics>,
    degraded: Family<ByPart, Gauge>,
    pub binds: Family<ByResult, Counter>,
    pub unbinds: Family<ByResult, Counter>,
    pub kicks: Family<ByReason, Counter>,
    pub queries: LookedUp,
    pub query_seconds: HotSeconds,
    pub bind_seconds: HotSeconds,
    pub batch_users: LookedUp,
    pub lane_batch_events: Histogram,
    pub lane_commit_seconds: Histogram,
    lane_retries: Family<ByCause, Counter>,
    pub lane_queue_depth: Gauge,
    pub l1_entries: Gauge,
    pub l1_hits: HotCounter,
    pub l1_misses: HotCounter,
    pub l2_hits: Counter,
    pub l2_misses: Counter,
    pub hint_gaps: Counter,
    hints: Family<ByDirection, Counter>,
    pub outbox_repaired: Counter,
    redis_up: Family<ByUse, Gauge>,
    redis_errors: Family<ByUse, Counter>,
    redis_memory: Family<ByUse, Gauge>,
    pub deliveries: Family<ByOutcome, Counter>,
    stale_offers_rejected: Family<ByTier, Counter>,
    pub store_up: Gauge,
    store_errors: Family<ByKind, Counter>,
    pub cache_generation: Gauge,
    pub gateways: Family<ByState, Gauge>,
    pub gateway_users: Family<ByGateway, Gauge>,
    pub gateway_deaths: Family<ByCause, Counter>,
    pub oldest_beat_seconds: Gauge<f64, AtomicU64>,
    pub hold: Gauge,
    pub sweep_backlog: Gauge,
    pub swept_routes: Counter,
    pub users_online: Gauge,
    pub outbox_rows: Gauge,
    shed: Family<ByWhat, Counter>,
    pub fenced: Family<ByWhat, Counter>,
    connections: Family<ByTls, Gauge>,
    pub security: SecurityMetrics,
    pub presence: PresenceMetrics,
    pub allocation: AllocationMetrics,
    pub moves: MoveMetrics,
    pub digests: DigestMetrics,
    pub inbox_messages: Gauge,
    pub inbox_oldest_seconds: Gauge,
    pub streams: Gauge,
    pub stream_queue_depth: Gauge,
    pub held_bytes: Gauge,
    pub acks: Family<ByResult, Counter>,
    delivery_seconds: Family<ByStage, Histogram, fn() -> Histogram>,
    went_back: Counter,
    log_lines_dropped: Counter,
    spans: Family<ByResult, Counter>,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Process));
        let metrics = Self::register(registry);
        metrics.begin_with_nothing();
        Arc::new(metrics)
    }

    fn register(mut registry: Registry) -> Self {
        let mut r = Register(registry.sub_registry_with_prefix("im_presence"));
        r.say_which_program_this_is();
        Self {
            threads: r.threads(),
            calls: Calls::register(&mut r),
            limits: LimitMetrics::register(&mut r),
            sql: SqlMetrics::register(&mut r),
            degraded: r.gauges("degraded", "1 while this is missing or an operator should look at it, as /readyz names it"),
            binds: r.family("binds", "binds by result"),
            unbinds: r.family("unbinds", "unbinds by result"),
            kicks: r.family("kicks", "routes removed by another device's bind or by an operator, by reason"),
            queries: LookedUp::of(&r.family("queries", "users looked up one by one, by the tier that answered")),
            query_seconds: r.add("query_seconds", "time to answer a query", HotSeconds::default()),
            bind_seconds: r.add("bind_seconds", "time to answer a bind", HotSeconds::default()),
            batch_users: LookedUp::of(&r.family("batch_users", "users looked up in batches, by the tier that answered")),
            lane_batch_events: r.add("lane_batch_events", "events per batch", Histogram::new(exponential_buckets(1.0, 2.0, 11))),
            lane_commit_seconds: r.add("lane_commit_seconds", "time of a batch's transaction", seconds()),
            lane_retries: r.family("lane_retries", "parts of batches that were run again, by cause"),
            lane_queue_depth: r.add("lane_queue_depth", "changes that wait for a lane", Gauge::default()),
            l1_entries: r.add("l1_entries", "users in memory", Gauge::default()),
            l1_hits: r.add("l1_hits", "users found in memory", HotCounter::default()),
            l1_misses: r.add("l1_misses", "users not found in memory, or not fresh enough", HotCounter::default()),
            l2_hits: r.add("l2_hits", "users found in Redis", Counter::default()),
            l2_misses: r.add("l2_misses", "users not found in Redis", Counter::default()),
            hint_gaps: r.add("hint_gaps", "hints of another node that were lost: memory was distrusted", Counter::default()),
            hints: r.family("hints", "messages about changes between nodes, by direction"),
            outbox_repaired: r.add("outbox_repaired", "changes shown for a node that had left them behind", Counter::default()),
            redis_up: r.gauges("redis_up", "1 if this Redis answered last time"),
            redis_errors: r.family("redis_errors", "commands that failed or were not answered in time"),
            redis_memory: r.gauges("redis_memory_bytes", "memory that this Redis uses"),
            deliveries: r.family("deliveries", "messages to deliver, by what came of them"),
            stale_offers_rejected: r.family("stale_offers_rejected", "outdated records kept out of a cache"),
            store_up: r.add("store_up", "1 if the database answered last time", Gauge::default()),
            store_errors: r.family("store_errors", "database errors, by what was being done"),
            cache_generation: r.add("cache_generation", "raised if caches may hold what the database does not", Gauge::default()),
            gateways: r.gauges("gateways", "lives of gateways, by state"),
            gateway_users: r.gauges("gateway_users", "connections that each registered gateway said it had"),
            gateway_deaths: r.family("gateway_deaths", "lives that this node ended, by cause"),
            oldest_beat_seconds: r.add("gateway_oldest_beat_seconds", "age of the oldest last beat", Gauge::default()),
            hold: r.add("hold", "1 while no gateway is declared dead because too many are silent", Gauge::default()),
            sweep_backlog: r.add("sweep_backlog", "routes of ended lives that are still to be removed", Gauge::default()),
            swept_routes: r.add("swept_routes", "routes removed because they were over", Counter::default()),
            users_online: r.add("users_online", "users with a route, counted once a minute", Gauge::default()),
            outbox_rows: r.add("outbox_rows", "batches not shown to the outside yet, counted once a minute", Gauge::default()),
            shed: r.family("shed", "turned away for overload, by what it was"),
            fenced: r.family("fenced", "refused because the gateway's life was over, by what it was"),
            connections: r.gauges("connections", "client connections, with TLS or without"),
            security: SecurityMetrics::register(&mut r),
            presence: PresenceMetrics::register(&mut r),
            allocation: AllocationMetrics::register(&mut r),
            moves: MoveMetrics::register(&mut r),
            digests: DigestMetrics::register(&mut r),
            inbox_messages: r.add("inbox_messages", "messages stored for users", Gauge::default()),
            inbox_oldest_seconds: r.add("inbox_oldest_seconds", "age of the oldest stored message", Gauge::default()),
            streams: r.add("streams", "gateways that are attached to this node", Gauge::default()),
            stream_queue_depth: r.add("stream_queue_depth", "messages that wait for attached gateways to read", Gauge::default()),
            held_bytes: r.add("held_bytes", "memory of calls and waiting messages (limits.memory_bytes)", Gauge::default()),
            acks: r.family("acks", "acknowledgements of deliveries, by what they came to"),
            delivery_seconds: r.add(
                "delivery_seconds",
                "time of a delivery, by stage",
                Family::new_with_constructor(seconds as fn() -> Histogram),
            ),
            went_back: r.add("sql_went_back", "users of whom the database held less than it had", Counter::default()),
            log_lines_dropped: r.add("log_lines_dropped", "lines of the log that nobody read in time", Counter::default()),
            spans: r.family("spans", "parts of traced calls, by whether the collector has them"),
            registry,
        }
    }

    /// So that the first of each is a rise.
    fn begin_with_nothing(&self) {
        BIND_RESULTS.iter().for_each(|result| drop(self.binds.get_or_create(&ByResult { result })));
        DEATH_CAUSES.iter().for_each(|cause| drop(self.gateway_deaths.get_or_create(&ByCause { cause })));
        SPAN_RESULTS.iter().for_each(|result| drop(self.spans.get_or_create(&ByResult { result })));
        DELIVERY_OUTCOMES.iter().for_each(|outcome| drop(self.deliveries.get_or_create(&ByOutcome { outcome })));
    }

    /// Whether a part is missing, or something about it is worth a look.
    pub fn degraded(&self, part: &'static str, is_degraded: bool) {
        self.degraded.get_or_create(&ByPart { part }).set(i64::from(is_degraded));
    }

    /// Of how many users the database held less than it had acknowledged.
    pub fn went_back_so_far(&self, users: u64) {
        self.went_back.inner().store(users, Ordering::Relaxed);
    }

    pub fn lane_retry(&self, cause: &'static str) {
        self.lane_retries.get_or_create(&ByCause { cause }).inc();
    }

    pub fn store_error(&self, kind: &'static str) {
        self.store_errors.get_or_create(&ByKind { kind }).inc();
    }

    pub fn hint(&self, direction: &'static str) {
        self.hints.get_or_create(&ByDirection { direction }).inc();
    }

    pub fn redis_error(&self, r#use: &'static str) {
        self.redis_errors.get_or_create(&ByUse { r#use }).inc();
    }

    pub fn redis_up(&self, r#use: &'static str, up: bool) {
        self.redis_up.get_or_create(&ByUse { r#use }).set(i64::from(up));
    }

    pub fn redis_memory(&self, r#use: &'static str, bytes: i64) {
        self.redis_memory.get_or_create(&ByUse { r#use }).set(bytes);
    }

    /// Whether that Redis answered last time. None: it is not configured, or was not asked yet.
    pub fn is_redis_up(&self, r#use: &'static str) -> Option<bool> {
        self.redis_up.get(&ByUse { r#use }).map(|gauge| gauge.get() == 1)
    }

    /// So many spans came to this.
    pub fn spans(&self, result: &'static str, number: u64) {
        if number > 0 {
            self.spans.get_or_create(&ByResult { result }).inc_by(number);
        }
    }

    /// How long one stage of a delivery took.
    pub fn delivery_stage(&self, stage: &'static str, took: Duration) {
        self.delivery_seconds.get_or_create(&ByStage { stage }).observe(took.as_secs_f64());
    }

    /// Records that were kept out of a cache, or passed over in one.
    pub fn rejected(&self, tier: &'static str, records: u64) {
        self.stale_offers_rejected.get_or_create(&ByTier { tier }).inc_by(records);
    }

    /// The same, as counted elsewhere so far.
    pub fn rejected_so_far(&self, tier: &'static str, records: u64) {
        self.stale_offers_rejected.get_or_create(&ByTier { tier }).inner().store(records, Ordering::Relaxed);
    }

    pub fn connections(&self, is_encrypted: bool) -> Gauge {
        self.connections.get_or_create(&ByTls { tls: if is_encrypted { "yes" } else { "no" } }).clone()
    }

    /// Client connections that are open now.
    pub fn open_connections(&self) -> i64 {
        self.connections(true).get() + self.connections(false).get()
    }

    pub fn shed(&self, what: &'static str) {
        self.shed.get_or_create(&ByWhat { what }).inc();
    }

    /// What was turned away so far is counted elsewhere.
    pub fn shed_so_far(&self, what: &'static str, times: u64) {
        self.shed.get_or_create(&ByWhat { what }).inner().store(times, Ordering::Relaxed);
    }

    /// How many lines of the log were dropped so far.
    pub fn log_lines_dropped_so_far(&self, lines: u64) {
        self.log_lines_dropped.inner().store(lines, Ordering::Relaxed);
    }

    /// Everything in the OpenMetrics text format, version 1.0.0.
    pub fn openmetrics(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// Everything in the text format of Prometheus, version 0.0.4. There a counter's whole name stands in its description, and
    /// units and an end mark are not known.
    pub fn classic(&self) -> Result<String, std::fmt::Error> {
        let text = self.openmetrics()?;
        let described = |line: &str| Some(line.strip_prefix("# TYPE ")?.strip_suffix(" counter")?.to_owned());
        let counters: HashSet<String> = text.lines().filter_map(described).collect();
        let mut out = String::with_capacity(text.len());
        for line in text.lines().filter(|line| !line.starts_with("# UNIT ") && *line != "# EOF") {
            let mut words = line.splitn(4, ' ');
            match (words.next(), words.next(), words.next(), words.next()) {
                (Some("#"), Some(what), Some(name), Some(rest)) if counters.contains(name) => {
                    writeln!(out, "# {what} {name}_total {rest}")?;
                }
                _ => writeln!(out, "{line}")?,
            }
        }
        Ok(out)
    }
}

/// From 50 us to 6.5 s.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 18))
}

struct Register<'a>(&'a mut Registry);

impl Register<'_> {
    fn threads(&mut self) -> Arc<BusyThreads> {
        let threads = Arc::<BusyThreads>::default();
        self.0.register_collector(Box::new(threads.clone()));
        threads
    }

    fn say_which_program_this_is(&mut self) {
        let build: Family<ByBuild, Gauge> = self.gauges("build_info", "1; its labels say which program this is");
        let commit = option_env!("IM_PRESENCE_COMMIT").unwrap_or("unknown");
        build.get_or_create(&ByBuild { version: env!("CARGO_PKG_VERSION"), commit }).set(1);
        let started: Gauge<f64, AtomicU64> =
            self.add("start_time_seconds", "start of this node, in seconds since 1970", Gauge::default());
        started.set(clock::unix_ms() as f64 / 1000.0);
    }

    fn add<M: prometheus_client::registry::Metric + Clone>(&mut self, name: &'static str, help: &'static str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    fn family<L, A>(&mut self, name: &'static str, help: &'static str) -> Family<L, Counter<u64, A>>
    where
        L: EncodeLabelSet + std::hash::Hash + Eq + Clone + std::fmt::Debug + Send + Sync + 'static,
        A: Atomic<u64> + Default + std::fmt::Debug + Send + Sync + 'static,
    {
        self.add(name, help, Family::default())
    }

    fn gauges<L>(&mut self, name: &'static str, help: &'static str) -> Family<L, Gauge>
    where
        L: EncodeLabelSet + std::hash::Hash + Eq + Clone + std::fmt::Debug + Send + Sync + 'static,
    {
        self.add(name, help, Family::default())
    }
}
