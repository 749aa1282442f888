//! What is told of one stream to those who look after it.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::clock::AtomicInstant;
use crate::domain::id::Epoch;

/// Counted while the stream lasts.
#[derive(Debug)]
pub struct Figures {
    since: Instant,
    written: AtomicU64,
    shed: AtomicU64,
    last_frame: AtomicInstant,
    caller: OnceLock<Arc<str>>,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            written: AtomicU64::new(0),
            shed: AtomicU64::new(0),
            last_frame: AtomicInstant::now(),
            caller: OnceLock::new(),
        }
    }
}

/// One stream, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamView {
    pub epoch: Epoch,
    /// How long it has been here.
    pub age: Duration,
    /// Orders that wait for the gateway to read.
    pub queue: usize,
    /// Orders that were written to it, and those that found its queue full.
    pub written: u64,
    pub shed: u64,
    /// How long ago the gateway has said anything.
    pub silence: Duration,
    /// Whose credential it came with; empty: nobody was asked.
    pub caller: Arc<str>,
}

impl Figures {
    /// Whose credential the stream came with. The first time counts.
    pub fn set_caller(&self, name: &str) {
        let _ = self.caller.set(name.into()); // a stream has one
    }

    /// The gateway has said something.
    pub fn note_frame(&self) {
        self.last_frame.set(Instant::now());
    }

    pub(super) fn note_written(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_shed(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn view(&self, epoch: Epoch, queue: usize) -> StreamView {
        StreamView {
            epoch,
            age: self.since.elapsed(),
            queue,
            written: self.written.load(Ordering::Relaxed),
            shed: self.shed.load(Ordering::Relaxed),
            silence: self.last_frame.age(Instant::now()),
            caller: self.caller.get().cloned().unwrap_or_default(),
        }
    }
}
