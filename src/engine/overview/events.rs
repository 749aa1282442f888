//! What has happened lately, for those who watch: the last [`RING`] events, in this node's memory. Whoever comes too late for
//! one, or from another process, is told that some are missing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use serde_json::Map;
use serde_json::Value;
use tokio::sync::watch;

use crate::domain::time::Timestamp;

/// Events that are kept.
pub const RING: usize = 1_000;
/// Characters of an incarnation that tell one process from another.
const RUN_CHARS: usize = 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A gateway was declared dead.
    Death,
    Hold,
    Drain,
    /// Something of this node is missing, or there again.
    Degraded,
    /// A node came, is about to stop, or is gone.
    Node,
    Audit,
}

impl Kind {
    pub const ALL: [Self; 6] = [Self::Death, Self::Hold, Self::Drain, Self::Degraded, Self::Node, Self::Audit];

    pub fn name(self) -> &'static str {
        match self {
            Self::Death => "death",
            Self::Hold => "hold",
            Self::Drain => "drain",
            Self::Degraded => "degraded",
            Self::Node => "node",
            Self::Audit => "audit",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub number: u64,
    pub kind: Kind,
    /// With `at_ms`, and what it `says` to people.
    pub data: Value,
}

/// From where somebody goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// After the event of this number.
    After(u64),
    /// With so many past events.
    Last(usize),
}

/// What comes next for somebody.
#[derive(Debug, PartialEq)]
pub struct Next {
    pub events: Vec<Arc<Event>>,
    /// The number before the first of them, if events are missing before it.
    pub gap: Option<u64>,
    /// Go on after this one.
    pub last: u64,
}

pub struct Events {
    /// Begins the ids of this process's events: those of another one are not mistaken for them.
    run: String,
    ring: Mutex<Ring>,
    newest: watch::Sender<u64>,
}

#[derive(Default)]
struct Ring {
    last: u64,
    events: VecDeque<Arc<Event>>,
}

impl Events {
    /// `incarnation` names this process.
    pub fn new(incarnation: &str) -> Arc<Self> {
        let run = incarnation.chars().filter(char::is_ascii_alphanumeric).take(RUN_CHARS).collect();
        Arc::new(Self { run, ring: Mutex::default(), newest: watch::channel(0).0 })
    }

    /// Something has happened.
    pub fn push(&self, kind: Kind, at: Timestamp, says: String, about: Value) {
        let mut data = Map::from_iter([("at_ms".to_owned(), at.0.into()), ("says".to_owned(), says.into())]);
        if let Value::Object(about) = about {
            data.extend(about);
        }
        let mut ring = self.lock();
        ring.last += 1;
        let number = ring.last;
        ring.events.push_back(Arc::new(Event { number, kind, data: data.into() }));
        if ring.events.len() > RING {
            ring.events.pop_front();
        }
        self.newest.send_replace(number);
    }

    /// What an event is called. Unique over all processes.
    pub fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.run)
    }

    /// The number that an id names. None: it is of another process, or of nobody.
    pub fn number(&self, id: &str) -> Option<u64> {
        let (run, number) = id.rsplit_once('-')?;
        number.parse().ok().filter(|_| run == self.run)
    }

    /// What has happened since then, as far as it is known.
    pub fn next(&self, since: Since) -> Next {
        let ring = self.lock();
        let oldest = ring.events.front().map_or(ring.last + 1, |event| event.number);
        let after = match since {
            Since::After(number) => number.min(ring.last),
            Since::Last(count) => ring.last.saturating_sub(count as u64).max(oldest - 1),
        };
        let gap = (after + 1 < oldest).then(|| oldest - 1);
        let events = ring.events.iter().filter(|event| event.number > after).cloned().collect();
        Next { events, gap, last: ring.last }
    }

    /// Everything that is known, for somebody who saw events that are not.
    pub fn after_a_gap(&self) -> Next {
        let next = self.next(Since::Last(RING));
        let before = next.events.first().map_or(next.last, |event| event.number - 1);
        Next { gap: Some(before), ..next }
    }

    /// Changes with every event.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn events(count: u64) -> Arc<Events> {
        let events = Events::new("0b1c2d3e-4f5a-4b6c-8d7e-9f0a1b2c3d4e");
        (0..count).for_each(|n| events.push(Kind::Node, Timestamp(5), "it came".into(), json!({ "n": n })));
        events
    }

    fn numbers(next: &Next) -> Vec<u64> {
        next.events.iter().map(|event| event.number).collect()
    }

    #[test]
    fn whoever_comes_back_goes_on_where_it_was() {
        let events = events(5);
        assert_eq!(numbers(&events.next(Since::After(3))), [4, 5]);
        assert_eq!(numbers(&events.next(Since::Last(2))), [4, 5]);
        assert_eq!(events.next(Since::After(5)), Next { events: vec![], gap: None, last: 5 });
        assert_eq!(events.number(&events.id(3)), Some(3));
        let data = &events.next(Since::After(4)).events[0].data;
        assert_eq!(*data, json!({ "at_ms": 5, "says": "it came", "n": 4 }));
    }

    #[test]
    fn whoever_was_away_for_too_long_is_told_so_and_the_ring_stays_small() {
        let events = events(RING as u64 + 10);
        let next = events.next(Since::After(3));
        assert_eq!((next.gap, next.events.len(), next.events[0].number), (Some(10), RING, 11));
        assert_eq!(events.next(Since::After(10)).gap, None);
        assert_eq!(events.next(Since::Last(2 * RING)).gap, None, "it did not ask for more than there is");
    }

    #[test]
    fn an_id_of_another_process_is_not_mistaken() {
        let (events, other) = (events(5), Events::new("ffffffff-4f5a-4b6c-8d7e-9f0a1b2c3d4e"));
        assert_eq!(events.number(&other.id(3)), None);
        assert_eq!(events.number("3"), None);
        assert_eq!((events.after_a_gap().gap, other.after_a_gap().gap), (Some(0), Some(0)));
    }
}
