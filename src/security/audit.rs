//! The record of who did what as an operator, who was denied what, and which secrets were read again: a line of the log at once,
//! and a row in SQL soon after.

use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::info;

use crate::metrics::Metrics;

/// Rows that wait for the database; what comes then is in the log only, and counted.
pub const QUEUE: usize = 1_024;
/// What others have written, such as an operator's reason, is cut here, in bytes.
const MAX_TEXT_BYTES: usize = 1_000;
/// The same for names: certificates may have longer ones.
const MAX_NAME_BYTES: usize = 255;

/// One thing that was done, or denied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Name of the caller; empty: nobody was asked.
    pub who: String,
    pub role: &'static str,
    /// Empty: the node itself.
    pub from_addr: String,
    pub action: String,
    /// What it was done to.
    pub target: String,
    pub args: String,
    /// ok, failed or denied.
    pub outcome: &'static str,
    pub reason: String,
}

#[derive(Clone)]
pub struct Audit {
    rows: mpsc::Sender<Entry>,
    metrics: Arc<Metrics>,
}

impl Audit {
    pub fn new(metrics: Arc<Metrics>) -> (Self, mpsc::Receiver<Entry>) {
        let (rows, waiting) = mpsc::channel(QUEUE);
        (Self { rows, metrics }, waiting)
    }

    /// Takes down what was done just now.
    pub fn note(&self, entry: Entry) {
        let cut = |text: String| text.chars().filter(|c| !c.is_control()).collect::<String>();
        let entry = Entry {
            who: shortened(cut(entry.who), MAX_NAME_BYTES),
            target: shortened(cut(entry.target), MAX_TEXT_BYTES),
            args: shortened(cut(entry.args), MAX_TEXT_BYTES),
            reason: shortened(cut(entry.reason), MAX_TEXT_BYTES),
            ..entry
        };
        let Entry { who, role, from_addr, action, target, args, outcome, reason, .. } = &entry;
        info!(target: "audit", who, role, from = from_addr, action, on = target, args, outcome, reason, "{action} {outcome}");
        self.metrics.security.audited(action, outcome);
        if self.rows.try_send(entry).is_err() {
            self.metrics.shed("audit");
        }
    }
}

fn shortened(mut text: String, bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes));
    text
}
