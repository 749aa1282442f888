//! Where spans go.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::assemble::Daemon;
use crate::config::Config;
use crate::telemetry::spans::Spans;

/// Sends spans, if a collector is configured. None: there are none.
#[cfg(feature = "otlp")]
pub(super) fn start(config: &Config, engine: &Daemon, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Option<Arc<Spans>> {
    let (spans, finished) = Spans::new(&config.trace, engine.metrics.clone());
    let exporter = crate::telemetry::otlp::Exporter::new(&config.trace, &engine.own.node_id, finished, engine.metrics.clone());
    tasks.spawn(exporter.ok().flatten()?.run(stop.clone())); // the address was checked with the configuration
    Some(spans)
}

/// Nobody could send them: `trace.endpoint` is refused.
#[cfg(not(feature = "otlp"))]
pub(super) fn start(_: &Config, _: &Daemon, _: &mut JoinSet<()>, _: &CancellationToken) -> Option<Arc<Spans>> {
    None
}
