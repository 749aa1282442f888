//! Changes of status at a steady rate, and when each was due, acknowledged and told: each says its number in its text.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;

use crate::harness::node::Node;
use crate::load::on_core;
use crate::load::paced;
use crate::load::watching::Telling;

const PATH: &str = "/mpim.PresenceService/SetStatus";
const CONNECTIONS: u64 = 2;
/// Between the users of two changes: neighbours are watched by the same stream. Prime, so that everybody has their turn.
const STEP: u64 = 7_919;

/// Times in nanoseconds since it began; 0: it has not happened.
#[derive(Default)]
struct Entry {
    due: AtomicU64,
    acknowledged: AtomicU64,
    told: AtomicU64,
}

/// The changes of a measurement, by their numbers.
pub struct Book {
    began: Instant,
    entries: Vec<Entry>,
    next: AtomicU64,
    /// Who changes, one after the other.
    users: Range<u64>,
}

impl Book {
    /// With room for `changes`.
    pub fn new(changes: u64, users: Range<u64>) -> Arc<Self> {
        let entries = (0..changes).map(|_| Entry::default()).collect();
        Arc::new(Self { began: Instant::now(), entries, next: AtomicU64::new(0), users })
    }

    /// A telling that came now.
    pub fn heard(&self, telling: &Telling, now: Instant) {
        if let Some(entry) = telling.status_text.parse().ok().and_then(|number: usize| self.entries.get(number)) {
            let _ = entry.told.compare_exchange(0, self.nanos(now), Ordering::Relaxed, Ordering::Relaxed); // the first counts
        }
    }

    /// Has users change through `node`, so many a second. Returns the numbers of these changes.
    pub async fn change(self: &Arc<Self>, node: &Node, rate: f64, time: Duration) -> Range<u64> {
        let (book, server, first) = (self.clone(), node.data, self.next.load(Ordering::Relaxed));
        let number = move |c: u64, n: u64| first + n * CONNECTIONS + c;
        let calls = on_core(None, move || {
            let note = |c, n, due, answered| book.note(number(c, n), due, answered);
            paced::run_noting(server, PATH, CONNECTIONS, (rate, time), |c, n| book.request(number(c, n)), note).len()
        })
        .await;
        let numbers = first..first + calls as u64;
        self.next.store(numbers.end, Ordering::Relaxed);
        assert!(numbers.end <= self.entries.len() as u64, "the book is too small");
        numbers
    }

    /// How many of them were told.
    pub fn told(&self, numbers: Range<u64>) -> u64 {
        numbers.filter(|n| self.entries[*n as usize].told.load(Ordering::Relaxed) > 0).count() as u64
    }

    /// How long each that was told took, from when it was due and from its acknowledgement.
    pub fn lags(&self, numbers: Range<u64>) -> (Vec<Duration>, Vec<Duration>) {
        let entries = numbers.map(|n| &self.entries[n as usize]);
        let lags = entries.filter_map(|entry| {
            let [due, acknowledged, told] = [&entry.due, &entry.acknowledged, &entry.told].map(|at| at.load(Ordering::Relaxed));
            let since = |at: u64| Duration::from_nanos(told.saturating_sub(at));
            (told > 0).then(|| (since(due), since(acknowledged)))
        });
        lags.unzip()
    }

    fn request(&self, number: u64) -> pb::SetStatusReq {
        let count = self.users.end - self.users.start;
        let (user, pass) = (self.users.start + number * STEP % count, number / count);
        let status = if pass.is_multiple_of(2) { pb::Status::Busy } else { pb::Status::Away };
        let text = Some(number.to_string());
        pb::SetStatusReq { user_id: user as i64, status: status.into(), text, ..Default::default() }
    }

    fn note(&self, number: u64, due: Instant, acknowledged: Instant) {
        if let Some(entry) = self.entries.get(number as usize) {
            entry.due.store(self.nanos(due), Ordering::Relaxed);
            entry.acknowledged.store(self.nanos(acknowledged), Ordering::Relaxed);
        }
    }

    fn nanos(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_nanos() as u64
    }
}
