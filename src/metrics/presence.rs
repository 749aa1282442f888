//! What is counted of status, watches and history.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::metrics::ByCause;
use crate::metrics::ByShown;
use crate::metrics::Register;
use crate::metrics::seconds;

pub struct PresenceMetrics {
    status_changes: Family<ByShown, Counter>,
    pub status_refused: Counter,
    pub watch_streams: Gauge,
    pub watch_pairs: Gauge,
    pub watch_users: Gauge,
    pub watch_dirty: Gauge,
    pub watch_told: Counter,
    pub watch_same: Counter,
    pub watch_coalesced: Counter,
    pub watch_damped: Counter,
    watch_resyncs: Family<ByCause, Counter>,
    pub watch_lag_seconds: Histogram,
    pub watch_read_seconds: Histogram,
    pub version_floor_reads: Counter,
    pub bans: Counter,
    pub censuses: Counter,
    pub history_rows: Counter,
    pub history_skipped: Counter,
}

impl PresenceMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            status_changes: r.family("status_changes", "changes of what users are shown as that this node committed"),
            status_refused: r.add("status_refused", "changes of status beyond status.rate", Counter::default()),
            watch_streams: r.add("watch_streams", "streams that watch users", Gauge::default()),
            watch_pairs: r.add("watch_pairs", "users that streams watch, each as often as it is watched", Gauge::default()),
            watch_users: r.add("watch_users", "users that are watched", Gauge::default()),
            watch_dirty: r.add("watch_dirty", "watched users who have to be looked at", Gauge::default()),
            watch_told: r.add("watch_told", "what watchers were told", Counter::default()),
            watch_same: r.add("watch_same", "watched users who were looked at and had nothing new", Counter::default()),
            watch_coalesced: r.add(
                "watch_coalesced",
                "changes that watchers were not told of, but of a newer one",
                Counter::default(),
            ),
            watch_damped: r.add("watch_damped", "what watchers were to be told later, if it still held", Counter::default()),
            watch_resyncs: r.family("watch_resyncs", "looks at all watched users, by cause"),
            watch_lag_seconds: r.add("watch_lag_seconds", "time from a commit until a watcher is told, if at once", seconds()),
            watch_read_seconds: r.add("watch_read_seconds", "time to look watched users up", seconds()),
            version_floor_reads: r.add(
                "version_floor_reads",
                "watched users read past the caches because more was known of them",
                Counter::default(),
            ),
            bans: r.add("bans", "users banned by an operator", Counter::default()),
            censuses: r.add("censuses", "counts of everybody online that this node made for all", Counter::default()),
            history_rows: r.add("history_rows", "rows of history written", Counter::default()),
            history_skipped: r.add(
                "history_skipped",
                "times online not counted: the database's clock was set meanwhile",
                Counter::default(),
            ),
        }
    }

    pub fn status_change(&self, shown: &'static str) {
        self.status_changes.get_or_create(&ByShown { shown }).inc();
    }

    pub fn watch_resync(&self, cause: &'static str) {
        self.watch_resyncs.get_or_create(&ByCause { cause }).inc();
    }
}
