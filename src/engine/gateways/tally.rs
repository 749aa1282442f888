//! What this node has handed out of one gateway, as far as the gateway's beats cannot tell of it yet.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::domain::allocation::pacing::paced;
use crate::domain::gateway::Life;
use crate::domain::time::Timestamp;

/// Without beats, twice so many microseconds is how long a user is waited for.
const TURN: u64 = 7_500_000;

/// Counts in atomics: they go on while the gateways are made ready anew. Points in time are microseconds since the node started.
pub struct Tally {
    /// Users sent there since the last beat.
    sent: AtomicU32,
    /// Users of all nodes sent there before it whom it could not tell of: who was asked to come later, and who has not come. The
    /// second beat forgets the latter: they never will.
    missing: AtomicU32,
    /// When the next log-in may come.
    next: AtomicU64,
    seen: Mutex<Seen>,
}

/// What is known of the last beat.
struct Seen {
    beat: Timestamp,
    connections: u32,
    turned_at: u64,
}

impl Tally {
    pub fn new(life: &Life, now: u64) -> Self {
        let seen = Seen { beat: life.last_beat, connections: life.connections, turned_at: now };
        let (sent, missing, next) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0));
        Self { sent, missing, next, seen: Mutex::new(seen) }
    }

    /// Users of all `nodes` whom the last beat could not tell of yet, as far as one node can know.
    pub fn on_their_way(&self, nodes: u32) -> f64 {
        f64::from(self.sent.load(Ordering::Relaxed)) * f64::from(nodes) + f64::from(self.missing.load(Ordering::Relaxed))
    }

    /// How long the next log-in would have to wait.
    pub fn wait_micros(&self, now: u64) -> u64 {
        self.next.load(Ordering::Relaxed).saturating_sub(now)
    }

    /// One more user goes there. Returns when, from `now` on; `rate` 0: at once.
    pub fn hand_out(&self, now: u64, nodes: u32, rate: u32) -> Duration {
        self.sent.fetch_add(1, Ordering::Relaxed);
        if rate == 0 {
            return Duration::ZERO;
        }
        let then = |next| Some(paced(next, now, nodes, rate).1);
        let next = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, then);
        paced(next.unwrap_or_else(|next| next), now, nodes, rate).0
    }

    /// Takes the last beat over. Who was sent there and is not among its connections is still on the way, and so is who was asked
    /// to come after it, at `rate`.
    pub fn look(&self, life: &Life, nodes: u32, rate: u32, now: u64) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let has_beaten = seen.beat != life.last_beat;
        if !has_beaten && now.saturating_sub(seen.turned_at) < TURN {
            return;
        }
        let came = if has_beaten { life.connections.saturating_sub(seen.connections) } else { 0 };
        let sent = self.sent.swap(0, Ordering::Relaxed).saturating_mul(nodes);
        let waiting = self.wait_micros(now).saturating_mul(rate.into()) / 1_000_000;
        let missing = sent.saturating_sub(came).max(u32::try_from(waiting).unwrap_or(u32::MAX));
        self.missing.store(missing, Ordering::Relaxed);
        *seen = Seen { beat: life.last_beat, connections: life.connections, turned_at: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::gateway::LifeKind;
    use crate::domain::id::Epoch;
    use crate::domain::id::GatewayAddr;

    const SECOND: u64 = 1_000_000;

    fn beaten(at: i64, connections: u32) -> Life {
        let gateway = GatewayAddr::parse("gw-1:7000").unwrap();
        let life = Life::begun(Epoch(1), gateway, LifeKind::Managed, Timestamp(at + 15_000));
        Life { last_beat: Timestamp(at), connections, ..life }
    }

    #[test]
    fn who_was_sent_counts_until_they_have_come_or_two_beats_have_not_told_of_them() {
        let tally = Tally::new(&beaten(0, 100), 0);
        (0..10).for_each(|_| _ = tally.hand_out(0, 2, 0));
        assert_eq!(tally.on_their_way(2), 20.0, "as many through the other node");
        let at = |second: u64, beat, connections| {
            tally.look(&beaten(beat, connections), 2, 0, second * SECOND);
            tally.on_their_way(2)
        };
        assert_eq!(at(4, 0, 100), 20.0, "no beat yet");
        assert_eq!(at(5, 5_000, 115), 5.0, "fifteen have come");
        assert_eq!(at(10, 10_000, 115), 0.0, "five never will");
    }

    #[test]
    fn without_beats_they_are_forgotten_after_15_seconds() {
        let silent = beaten(0, 0);
        let tally = Tally::new(&silent, 0);
        tally.hand_out(0, 1, 0);
        let at = |ms: u64| {
            tally.look(&silent, 1, 0, ms * 1_000);
            tally.on_their_way(1)
        };
        assert_eq!([at(7_499), at(7_500), at(14_999), at(15_000)], [1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn log_ins_are_paced_from_the_first_on() {
        let tally = Tally::new(&beaten(0, 0), 0);
        let waits: Vec<u128> = (0..3).map(|_| tally.hand_out(1_000, 2, 100).as_millis()).collect();
        assert_eq!(waits, [0, 20, 40]);
        assert_eq!((tally.wait_micros(1_000), tally.wait_micros(61_001)), (60_000, 0));
        assert_eq!(tally.on_their_way(2), 6.0);
    }

    #[test]
    fn who_was_asked_to_come_later_counts_until_a_beat_has_told_of_them() {
        let tally = Tally::new(&beaten(0, 0), 0);
        (0..600).for_each(|_| _ = tally.hand_out(0, 1, 10));
        for second in [5, 10, 15] {
            let came = second * 10;
            let at = u64::from(second) * SECOND;
            tally.look(&beaten(i64::from(second) * 1_000, came), 1, 10, at);
            assert_eq!(tally.on_their_way(1), f64::from(600 - came));
            tally.look(&beaten(i64::from(second) * 1_000, came), 1, 10, at + 4 * SECOND);
            assert_eq!(tally.on_their_way(1), f64::from(600 - came), "who came since the beat is in no other number");
        }
        let quiet = Tally::new(&beaten(0, 0), 0);
        quiet.hand_out(4 * SECOND, 1, 500);
        assert_eq!(quiet.on_their_way(1), 1.0, "nobody came while nobody was sent");
    }
}
