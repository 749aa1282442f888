//! Logging: one line per event on stderr, as text for people or as JSON for collectors.

use std::io;
use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::Log;
use crate::config::LogFormat;

/// Starts logging. A process that logs already (a test with several nodes) goes on as it does.
pub fn init_logging(log: &Log) {
    let terminal = io::stderr().is_terminal();
    let filter = EnvFilter::builder().parse_lossy(&log.level); // checked when the configuration was loaded
    let logger = tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter);
    let started = match log.format {
        LogFormat::Json => logger.json().flatten_event(true).try_init(),
        LogFormat::Auto if !terminal => logger.json().flatten_event(true).try_init(),
        LogFormat::Auto | LogFormat::Text if terminal => logger.try_init(), // colours, unless NO_COLOR is set
        LogFormat::Auto | LogFormat::Text => logger.with_ansi(false).try_init(),
    };
    if let Err(error) = started {
        tracing::debug!(%error, "logging was started before");
    }
}
