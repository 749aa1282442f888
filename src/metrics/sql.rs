//! Connections to the database, and how long reads wait for one.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::metrics::Register;
use crate::metrics::seconds;

/// What a connection is for, and whether it works.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByUseAndState {
    r#use: &'static str,
    state: &'static str,
}

pub struct SqlMetrics {
    connections: Family<ByUseAndState, Gauge>,
    /// The users of one read wait together; observed of the one who has waited longest.
    pub wait_seconds: Histogram,
}

/// A connection that is open, until it is dropped.
pub struct Open {
    idle: Gauge,
    busy: Gauge,
}

/// A statement under way, until it is dropped.
pub struct Working<'a>(&'a Open);

impl SqlMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Arc<Self> {
        Arc::new(Self {
            connections: r.gauges("sql_connections", "connections to the database that are open"),
            wait_seconds: r.add("sql_wait_seconds", "time that users waited for a connection to be read on", seconds()),
        })
    }

    /// `use`: lane (changes) or general.
    pub fn opened(&self, r#use: &'static str) -> Open {
        let gauge = |state| self.connections.get_or_create(&ByUseAndState { r#use, state }).clone();
        let open = Open { idle: gauge("idle"), busy: gauge("busy") };
        open.idle.inc();
        open
    }
}

impl Open {
    pub fn work(&self) -> Working<'_> {
        self.idle.dec();
        self.busy.inc();
        Working(self)
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        self.0.busy.dec();
        self.0.idle.inc();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.idle.dec();
    }
}
