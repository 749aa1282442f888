//! What the callers of a run asked and were told. The checker knows nothing else of the run.

use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Instant;

/// Microseconds since the run began.
pub type At = u64;

#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub began: At,
    pub ended: At,
}

#[derive(Clone, Debug)]
pub enum Outcome<T> {
    /// Carried out, and acknowledged.
    Done(T),
    /// Nothing was done, and nothing will be.
    Refused,
    /// It may have been done, or be done yet.
    Unknown,
}

#[derive(Clone, Debug)]
pub struct Bind {
    pub user: i64,
    pub device: String,
    pub epoch: u64,
    /// No two binds of a run have the same.
    pub conn: String,
    pub node: usize,
    pub span: Span,
    pub outcome: Outcome<Bound>,
}

#[derive(Clone, Debug, Default)]
pub struct Bound {
    pub version: u64,
    pub key: String,
    /// Keys of routes that it removed.
    pub kicked: Vec<String>,
}

/// Of the route of one bind.
#[derive(Clone, Debug)]
pub struct Unbind {
    pub user: i64,
    pub key: String,
    pub node: usize,
    pub span: Span,
    /// The version after it, if the route was there.
    pub outcome: Outcome<Option<u64>>,
}

#[derive(Clone, Debug)]
pub struct Query {
    pub user: i64,
    pub node: usize,
    pub span: Span,
    pub max_staleness_ms: Option<u32>,
    pub version: u64,
    pub age_ms: u32,
    #[allow(dead_code)] // complaints show it
    pub source: &'static str,
    pub status: i32,
    pub is_online: bool,
    pub routes: Vec<Seen>,
}

/// A route in an answer.
#[derive(Clone, Debug)]
pub struct Seen {
    pub device: String,
    pub epoch: u64,
    pub conn: String,
    pub key: String,
    pub is_suspect: bool,
}

#[derive(Clone, Debug)]
pub struct Message {
    pub user: i64,
    pub text: String,
    pub span: Span,
    pub sent: Sent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// By a device.
    Acknowledged,
    /// By a gateway.
    Taken,
    Stored,
    NotFound,
    Undelivered,
    Unknown,
}

/// By a gateway.
#[derive(Clone, Debug)]
pub struct Received {
    pub user: i64,
    pub text: String,
    /// Its number in the inbox; 0: it is not stored.
    pub seq: u64,
    pub is_acknowledged: bool,
    pub at: At,
}

/// A life of a gateway, as its process knows it.
#[derive(Clone, Debug)]
pub struct Life {
    pub gateway: String,
    pub epoch: u64,
    #[allow(dead_code)] // complaints show it
    pub began: At,
    /// When the last heartbeat left that was answered with OK.
    pub last_beat: At,
    /// Since when nothing was heard of it: it died without a word.
    pub silent: Option<At>,
    /// When somebody was told that it is over.
    pub over: Option<At>,
}

#[derive(Clone, Debug)]
pub struct Told {
    pub watcher: usize,
    pub user: i64,
    pub version: u64,
    pub status: i32,
    pub is_online: bool,
    #[allow(dead_code)] // complaints show it
    pub at: At,
}

#[derive(Debug, Default)]
pub struct History {
    pub binds: Vec<Bind>,
    pub unbinds: Vec<Unbind>,
    pub queries: Vec<Query>,
    /// Each user, by each node, when all was over.
    pub last_queries: Vec<Query>,
    pub messages: Vec<Message>,
    pub received: Vec<Received>,
    /// What was left in the inboxes when all was over: user, number, text.
    pub left: Vec<(i64, u64, String)>,
    pub lives: Vec<Life>,
    /// Of each watcher the users.
    pub watchers: Vec<Vec<i64>>,
    pub told: Vec<Told>,
    /// Nodes that were killed: what they remembered is gone.
    pub kills: Vec<(usize, At)>,
    /// Errors that no caller may get.
    pub errors: Vec<String>,
    /// From this time on nothing was broken any more.
    pub healed: At,
}

impl History {
    pub fn operations(&self) -> usize {
        self.binds.len() + self.unbinds.len() + self.queries.len() + self.messages.len()
    }
}

/// Where a run writes its history.
pub struct Recorder {
    began: Instant,
    history: Mutex<History>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self { began: Instant::now(), history: Mutex::default() }
    }
}

impl Recorder {
    pub fn now(&self) -> At {
        u64::try_from(self.began.elapsed().as_micros()).expect("a short run")
    }

    pub fn since(&self, began: At) -> Span {
        Span { began, ended: self.now() }
    }

    pub fn write(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was written; what comes later is lost.
    pub fn take(&self) -> History {
        std::mem::take(&mut self.write())
    }
}
