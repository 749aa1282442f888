//! Spans of calls that are traced, as OpenTelemetry has them. One is made only if somebody keeps it: of a call whose caller says
//! so (header `traceparent`), or that the dice pick. Of all others there is a `None`, and nothing else.
//!
//! What has ended waits in a bounded queue for whoever sends it. If that is full, because the collector is slow or away, it is
//! dropped and counted: nothing here waits.

use std::cell::Cell;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::clock::unix_nanos;
use crate::config::Trace;
use crate::metrics::Metrics;

/// `00-<trace>-<span>-<flags>`; a later version may have more behind it.
const TRACEPARENT_BYTES: usize = 55;

/// Decides which calls are traced, and takes their spans.
pub struct Spans {
    /// Of all numbers of 64 bits those below are picked.
    share: u64,
    out: Arc<Out>,
}

struct Out {
    finished: mpsc::Sender<Finished>,
    metrics: Arc<Metrics>,
    /// For ids that nobody else has.
    key: RandomState,
    counter: AtomicU64,
}

/// A place in a trace, where further spans begin. A clone of it is a reference.
#[derive(Clone)]
pub struct Place(Arc<Known>);

struct Known {
    trace_id: u128,
    span_id: u64,
    out: Arc<Out>,
}

/// A part of a traced call. It ends when it is dropped.
pub struct Span {
    place: Place,
    parent: u64,
    name: &'static str,
    kind: Kind,
    began: Instant,
    ended: Option<Instant>,
    attributes: Vec<(&'static str, Value)>,
    error: Option<String>,
}

/// On which side of what a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Internal,
    /// Serves what another process has begun.
    Server,
    /// Waits for another process.
    Client,
    /// Sends to whoever listens.
    Producer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Number(i64),
}

/// A span that has ended.
#[derive(Debug)]
pub struct Finished {
    pub trace_id: u128,
    pub span_id: u64,
    /// 0: it is the first of its trace.
    pub parent: u64,
    pub name: &'static str,
    pub kind: Kind,
    /// Since 1970.
    pub start_ns: u64,
    pub end_ns: u64,
    pub attributes: Vec<(&'static str, Value)>,
    pub error: Option<String>,
}

impl Spans {
    /// What ends comes out of the receiver.
    pub fn new(settings: &Trace, metrics: Arc<Metrics>) -> (Arc<Self>, mpsc::Receiver<Finished>) {
        let (finished, receiver) = mpsc::channel(settings.queue);
        let out = Arc::new(Out { finished, metrics, key: RandomState::new(), counter: AtomicU64::new(0) });
        let share = (settings.sample * u64::MAX as f64) as u64; // saturates
        (Arc::new(Self { share, out }), receiver)
    }

    /// Where the spans of a call begin that came with this `traceparent`. None: it is not traced.
    pub fn pick(&self, traceparent: Option<&[u8]>) -> Option<Place> {
        match traceparent.and_then(parse) {
            Some((trace_id, span_id, sampled)) => sampled.then(|| self.place(trace_id, span_id)), // its caller has decided
            None => is_picked(self.share).then(|| self.place(self.out.trace_id(), 0)),
        }
    }

    /// Where the spans begin of what another node has handed on. None: it is not traced.
    pub fn resume(&self, traceparent: &str) -> Option<Place> {
        let (trace_id, span_id, sampled) = parse(traceparent.as_bytes())?;
        sampled.then(|| self.place(trace_id, span_id))
    }

    fn place(&self, trace_id: u128, span_id: u64) -> Place {
        Place(Arc::new(Known { trace_id, span_id, out: self.out.clone() }))
    }
}

impl Out {
    fn span_id(&self) -> u64 {
        self.key.hash_one(self.counter.fetch_add(1, Ordering::Relaxed)).max(1)
    }

    fn trace_id(&self) -> u128 {
        u128::from(self.span_id()) << 64 | u128::from(self.span_id())
    }
}

impl Place {
    pub fn begin(&self, name: &'static str, kind: Kind) -> Span {
        self.begin_at(name, kind, Instant::now())
    }

    /// The span of something that has begun before.
    pub fn begin_at(&self, name: &'static str, kind: Kind, began: Instant) -> Span {
        let Known { trace_id, span_id, out } = &*self.0;
        let place = Self(Arc::new(Known { trace_id: *trace_id, span_id: out.span_id(), out: out.clone() }));
        Span { place, parent: *span_id, name, kind, began, ended: None, attributes: Vec::new(), error: None }
    }

    /// As others are told of it.
    pub fn traceparent(&self) -> String {
        format!("00-{:032x}-{:016x}-01", self.0.trace_id, self.0.span_id)
    }
}

impl Span {
    /// Where what it causes begins.
    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn note(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push((key, value.into()));
    }

    pub fn fail(&mut self, why: impl Into<String>) {
        self.error = Some(why.into());
    }

    /// It has ended before.
    pub fn end_at(mut self, ended: Instant) {
        self.ended = Some(ended);
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let Known { trace_id, span_id, out } = &*self.place.0;
        let (now, now_ns) = (Instant::now(), unix_nanos());
        let ago = |then: Instant| {
            now_ns.saturating_sub(u64::try_from(now.saturating_duration_since(then).as_nanos()).unwrap_or(u64::MAX))
        };
        let finished = Finished {
            trace_id: *trace_id,
            span_id: *span_id,
            parent: self.parent,
            name: self.name,
            kind: self.kind,
            start_ns: ago(self.began),
            end_ns: ago(self.ended.unwrap_or(now)),
            attributes: std::mem::take(&mut self.attributes),
            error: self.error.take(),
        };
        if out.finished.try_send(finished).is_err() {
            out.metrics.spans("dropped", 1);
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// Trace, span, and whether it is kept (W3C Trace Context, 3.2). None: it is no such header, and counts as none.
fn parse(header: &[u8]) -> Option<(u128, u64, bool)> {
    let (head, more) = header.split_at_checked(TRACEPARENT_BYTES)?;
    let dashes = [2, 35, 52].iter().all(|at| head[*at] == b'-');
    let has_end = more.is_empty() || more[0] == b'-' && &head[..2] != b"00";
    if !dashes || !has_end || hex(&head[..2])? == 0xff {
        return None;
    }
    let (trace_id, span_id, flags) = (hex(&head[3..35])?, hex(&head[36..52])?, hex(&head[53..])?);
    let span_id = u64::try_from(span_id).ok()?;
    (trace_id != 0 && span_id != 0).then_some((trace_id, span_id, flags & 1 == 1))
}

fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

/// Whether the dice of this thread pick the next call (xorshift64).
fn is_picked(share: u64) -> bool {
    thread_local! {
        static DICE: Cell<u64> = Cell::new(RandomState::new().hash_one(0).max(1));
    }
    share > 0
        && DICE.with(|dice| {
            let mut number = dice.get();
            number ^= number << 13;
            number ^= number >> 7;
            number ^= number << 17;
            dice.set(number);
            number <= share
        })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const PARENT: u64 = 0x00f0_67aa_0ba9_02b7;

    fn spans(sample: f64, queue: usize) -> (Arc<Spans>, mpsc::Receiver<Finished>) {
        let timeout = Duration::from_secs(1);
        Spans::new(&Trace { endpoint: None, sample, queue, batch: 1, timeout }, Metrics::new())
    }

    #[test]
    fn a_traceparent_is_read_as_the_standard_has_it() {
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(parse(valid.as_bytes()), Some((TRACE, PARENT, true)));
        for (text, want) in [
            (valid.replace("-01", "-00"), Some(false)),
            (valid.replace("-01", "-03"), Some(true)),
            (format!("cc{}", &valid[2..]), Some(true)),
            (format!("cc{}-what.comes.later", &valid[2..]), Some(true)),
            (format!("cc{}x", &valid[2..]), None),
            (format!("{valid}-x"), None),
            (format!("ff{}", &valid[2..]), None),
            (valid.to_uppercase(), None),
            (valid.replace("4bf9", "+bf9"), None),
            (valid.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)), None),
            (valid.replace("00f067aa0ba902b7", &"0".repeat(16)), None),
            (valid[1..].to_owned(), None),
            (valid.replace('-', "_"), None),
            (String::new(), None),
        ] {
            assert_eq!(parse(text.as_bytes()).map(|(.., sampled)| sampled), want, "{text}");
        }
    }

    #[test]
    fn spans_know_their_parents_and_what_a_parent_tells_others_leads_back_to_it() {
        let (spans, mut finished) = spans(0.0, 8);
        let header = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let mut call = spans.pick(Some(header.as_bytes())).expect("its caller keeps it").begin("call", Kind::Server);
        call.note("n", 7);
        let began = Instant::now() - Duration::from_millis(5);
        call.place().begin_at("child", Kind::Client, began).end_at(began + Duration::from_millis(5));
        let elsewhere = spans.resume(&call.place().traceparent()).expect("it is traced").begin("elsewhere", Kind::Server);
        drop((elsewhere, call));
        let mut next = || finished.try_recv().expect("it has ended");
        let (child, elsewhere, call) = (next(), next(), next());
        assert_eq!((call.trace_id, call.parent, &call.attributes[..]), (TRACE, PARENT, &[("n", Value::Number(7))][..]));
        assert_eq!((child.parent, elsewhere.parent), (call.span_id, call.span_id));
        assert_eq!((child.end_ns - child.start_ns, elsewhere.trace_id), (5_000_000, TRACE));
        assert!(child.start_ns < call.start_ns, "it has begun before");
    }

    #[test]
    fn without_a_header_the_dice_decide_and_with_one_its_caller() {
        let unsampled = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
        for (sample, from, to) in [(0.0, 0, 0), (1.0, 10_000, 10_000), (0.1, 700, 1_300)] {
            let (spans, _finished) = spans(sample, 1);
            let picked = (0..10_000).filter(|_| spans.pick(None).is_some()).count();
            assert!((from..=to).contains(&picked), "{sample}: {picked}");
            assert!(spans.pick(Some(unsampled.as_bytes())).is_none(), "its caller keeps nothing");
        }
        let (spans, _finished) = spans(1.0, 1);
        let own = spans.pick(Some(b"nonsense")).expect("it counts as none");
        assert_eq!(own.begin("call", Kind::Server).parent, 0, "a trace of its own");
    }

    #[test]
    fn what_does_not_fit_into_the_queue_is_dropped_and_counted() {
        let (spans, mut finished) = spans(1.0, 2);
        (0..5).for_each(|_| drop(spans.pick(None).map(|place| place.begin("call", Kind::Server))));
        assert_eq!(std::iter::from_fn(|| finished.try_recv().ok()).count(), 2);
        let counted = spans.out.metrics.classic().expect("text");
        assert!(counted.contains("im_presence_spans_total{result=\"dropped\"} 3"), "{counted}");
    }
}
