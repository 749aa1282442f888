//! Logging: one line per event on stderr, as text for people or as JSON for collectors.
//!
//! The log is a side channel, and whoever reads it must never stop the service. Lines go to a thread of their own through a
//! bounded queue; when that is full, because the reader stands still or the disk is slow, lines are dropped and counted.

mod line;
#[cfg(feature = "otlp")]
pub mod otlp;
mod repeats;
pub mod spans;

use std::io;
use std::io::IsTerminal;
use std::panic;
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tracing_appender::non_blocking::ErrorCounter;
use tracing_appender::non_blocking::NonBlockingBuilder;
use tracing_appender::non_blocking::WorkerGuard;
use tracing_subscriber::EnvFilter;

use crate::config::Log;
use crate::config::LogFormat;
use crate::telemetry::line::Line;

/// Lines that wait to be written, a few hundred bytes each.
const QUEUE_LINES: usize = 8_192;

/// How long a process that ends waits for somebody to read its last words.
const MOMENT: Duration = Duration::from_millis(1_500);

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Writes what is still queued when it is dropped, but waits for a reader that stands still only for a second.
pub struct Logging(Option<WorkerGuard>);

impl Drop for Logging {
    fn drop(&mut self) {
        // If it cannot flush it says so on stdout, which may be closed, or stand still as well.
        let guard = self.0.take();
        within_a_moment(move || drop(guard));
    }
}

/// Does what nobody's reading, or not reading, may hold up: soon it is not waited for any more.
pub fn within_a_moment(act: impl FnOnce() + Send + 'static) {
    let (done, waits) = mpsc::channel::<()>();
    let act = move || {
        let _done = done; // dropped, also by a panic
        act();
    };
    if thread::Builder::new().name("last words".to_owned()).spawn(act).is_ok() {
        let _ = waits.recv_timeout(MOMENT);
    }
}

/// Starts logging. A process that logs already (a test with several nodes) goes on as it does.
#[must_use]
pub fn init_logging(log: &Log) -> Logging {
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUE_LINES).thread_name("log").finish(io::stderr());
    let dropped = writer.error_counter();
    // Checked when the configuration was loaded. The audit is written whatever else is.
    let filter = EnvFilter::builder().parse_lossy(format!("{},audit=info", log.level));
    let logger =
        tracing_subscriber::fmt().with_ansi(false).log_internal_errors(false).with_env_filter(filter).with_writer(writer);
    let json = match log.format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !io::stderr().is_terminal(),
    };
    let started = match json {
        true => logger.json().map_event_format(|format| Line::json(format.flatten_event(true))).try_init(),
        false => logger.map_event_format(Line::text).try_init(),
    };
    match started {
        Ok(()) => {
            let _ = DROPPED.set(dropped); // the first logger is the one that logs
            panic::set_hook(Box::new(|panicked| tracing::error!("{panicked}")));
        }
        Err(error) => tracing::debug!(%error, "logging was started before"),
    }
    Logging(Some(guard))
}

/// How many lines were dropped because nobody read them.
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |dropped| u64::try_from(dropped.dropped_lines()).unwrap_or(u64::MAX))
}
