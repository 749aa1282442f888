//! Memory for what callers send and what waits to be read by them, in sum over all connections. It is taken before it is used
//! and given back after. When there is no more, callers are turned away; the process does not grow.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

/// Who takes it, and so how much of it may be gone when they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// What waits for gateways, up to one half: gateways that do not read must leave room for callers.
    Streams,
    /// Calls of services and of other nodes, up to fifteen sixteenths.
    Calls,
    /// All of it: leases and acknowledgements are small, and needed most when everything else is too much.
    Leases,
}

/// An account. A thread that takes often has a handle of its own: counting references in one place would slow all down.
#[derive(Clone)]
pub struct Memory(Arc<Account>);

struct Account {
    limit: usize,
    taken: AtomicUsize,
    refused: AtomicU64,
}

/// Bytes that are taken, until it is dropped.
pub struct Held {
    memory: Arc<Memory>,
    share: Share,
    bytes: AtomicUsize,
}

impl Memory {
    /// `limit` in bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self(Arc::new(Account { limit, taken: AtomicUsize::new(0), refused: AtomicU64::new(0) })))
    }

    pub fn for_another_thread(&self) -> Arc<Self> {
        Arc::new(self.clone())
    }

    /// In bytes.
    pub fn taken(&self) -> usize {
        self.0.taken.load(Ordering::Relaxed)
    }

    /// How often there was not so much left, for what does not wait in a stream's queue.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Nothing yet, to be added to.
    pub fn none(self: &Arc<Self>, share: Share) -> Held {
        Held { memory: self.clone(), share, bytes: AtomicUsize::new(0) }
    }

    /// None: there is not so much left.
    pub fn take(self: &Arc<Self>, share: Share, bytes: usize) -> Option<Held> {
        let held = self.none(share);
        held.add(bytes).then_some(held)
    }
}

impl Held {
    /// Takes more. False: there is not so much left, and nothing is taken.
    pub fn add(&self, bytes: usize) -> bool {
        let Account { limit, taken, refused } = &*self.memory.0;
        let ceiling = match self.share {
            Share::Streams => limit / 2,
            Share::Calls => limit - limit / 16,
            Share::Leases => *limit,
        };
        if taken.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > ceiling {
            taken.fetch_sub(bytes, Ordering::Relaxed);
            refused.fetch_add(u64::from(self.share != Share::Streams), Ordering::Relaxed);
            return false;
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        true
    }

    /// Takes more, if this holds no more than `limit` then. False: it would, or there is not so much left.
    pub fn add_within(&self, bytes: usize, limit: usize) -> bool {
        self.has_room(bytes, limit) && self.add(bytes) // two at once may exceed it by one of them
    }

    /// Whether so much more is within `limit`.
    pub fn has_room(&self, bytes: usize, limit: usize) -> bool {
        self.bytes.load(Ordering::Relaxed).saturating_add(bytes) <= limit
    }

    /// Takes more, for what is there already and has to be.
    pub fn add_anyway(&self, bytes: usize) {
        self.memory.0.taken.fetch_add(bytes, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Gives some of it back.
    pub fn remove(&self, bytes: usize) {
        self.memory.0.taken.fetch_sub(bytes, Ordering::Relaxed);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.memory.0.taken.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_gateways_leave_room_for_callers_and_callers_for_leases() {
        let memory = Memory::new(1600);
        let streams = memory.take(Share::Streams, 800).expect("half of it");
        assert!(memory.take(Share::Streams, 1).is_none() && memory.taken() == 800);
        let calls = memory.take(Share::Calls, 700).expect("what is left, but a sixteenth");
        assert!(!calls.add(1) && memory.take(Share::Leases, 100).is_some());
        streams.remove(300);
        assert!(calls.add(300) && memory.taken() == 1500);
        calls.add_anyway(1000);
        assert!(memory.take(Share::Leases, 1).is_none());
        drop((streams, calls));
        assert_eq!((memory.taken(), memory.refused()), (0, 2), "who was refused for a stream is counted there");
    }
}
