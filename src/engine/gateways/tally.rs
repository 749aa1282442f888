//! What this node has handed out of one gateway, as far as the gateway's beats cannot tell of it yet.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use crate::domain::allocation::pacing::paced;
use crate::domain::gateway::Life;
use crate::domain::time::Timestamp;

/// Without beats, twice this is how long a user is waited for.
const TURN: Duration = Duration::from_millis(7_500);

/// Counts in atomics: they go on while the gateways are made ready anew.
pub struct Tally {
    /// Users sent there since the last beat.
    sent: AtomicU32,
    /// Users of all nodes sent there before it who have not come by it. The second beat forgets them: they never will.
    missing: AtomicU32,
    /// When the next log-in may come, in microseconds since the node started.
    next: AtomicU64,
    seen: Mutex<Seen>,
}

/// What is known of the last beat.
struct Seen {
    beat: Timestamp,
    connections: u32,
    turned_at: Instant,
}

impl Tally {
    pub fn new(life: &Life, now: Instant) -> Self {
        let seen = Seen { beat: life.last_beat, connections: life.connections, turned_at: now };
        let (sent, missing, next) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU64::new(0));
        Self { sent, missing, next, seen: Mutex::new(seen) }
    }

    /// Users of all `nodes` whom the last beat could not tell of yet, as far as one node can know: who was sent there lately, and
    /// who was asked to come later, at `rate`.
    pub fn on_their_way(&self, now: u64, nodes: u32, rate: u32) -> f64 {
        let sent = f64::from(self.sent.load(Ordering::Relaxed)) * f64::from(nodes);
        let waiting = self.wait_micros(now) as f64 / 1_000_000.0 * f64::from(rate);
        waiting.max(sent + f64::from(self.missing.load(Ordering::Relaxed)))
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

    /// Takes the last beat over. Who was sent there and is not among its connections is still on the way.
    pub fn look(&self, life: &Life, nodes: u32, now: Instant) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let has_beaten = seen.beat != life.last_beat;
        if !has_beaten && now.saturating_duration_since(seen.turned_at) < TURN {
            return;
        }
        let came = if has_beaten { life.connections.saturating_sub(seen.connections) } else { 0 };
        let sent = self.sent.swap(0, Ordering::Relaxed).saturating_mul(nodes);
        self.missing.store(sent.saturating_sub(came), Ordering::Relaxed);
        *seen = Seen { beat: life.last_beat, connections: life.connections, turned_at: now };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::gateway::LifeKind;
    use crate::domain::id::Epoch;
    use crate::domain::id::GatewayAddr;

    fn beaten(at: i64, connections: u32) -> Life {
        let gateway = GatewayAddr::parse("gw-1:7000").unwrap();
        let life = Life::begun(Epoch(1), gateway, LifeKind::Managed, Timestamp(at + 15_000));
        Life { last_beat: Timestamp(at), connections, ..life }
    }

    #[test]
    fn who_was_sent_counts_until_they_have_come_or_two_beats_have_not_told_of_them() {
        let now = Instant::now();
        let tally = Tally::new(&beaten(0, 100), now);
        (0..10).for_each(|_| _ = tally.hand_out(0, 2, 0));
        assert_eq!(tally.on_their_way(0, 2, 0), 20.0, "as many through the other node");
        tally.look(&beaten(0, 100), 2, now + Duration::from_secs(4));
        assert_eq!(tally.on_their_way(0, 2, 0), 20.0, "no beat yet");
        tally.look(&beaten(5_000, 115), 2, now + Duration::from_secs(5));
        assert_eq!(tally.on_their_way(0, 2, 0), 5.0, "fifteen have come");
        tally.look(&beaten(10_000, 115), 2, now + Duration::from_secs(10));
        assert_eq!(tally.on_their_way(0, 2, 0), 0.0, "five never will");
    }

    #[test]
    fn without_beats_they_are_forgotten_after_15_seconds() {
        let (begin, silent) = (Instant::now(), beaten(0, 0));
        let tally = Tally::new(&silent, begin);
        tally.hand_out(0, 1, 0);
        let at = |ms| {
            tally.look(&silent, 1, begin + Duration::from_millis(ms));
            tally.on_their_way(0, 1, 0)
        };
        assert_eq!([at(7_499), at(7_500), at(14_999), at(15_000)], [1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn log_ins_are_paced_from_the_first_on() {
        let tally = Tally::new(&beaten(0, 0), Instant::now());
        let waits: Vec<u128> = (0..3).map(|_| tally.hand_out(1_000, 2, 100).as_millis()).collect();
        assert_eq!(waits, [0, 20, 40]);
        assert_eq!((tally.wait_micros(1_000), tally.wait_micros(61_001)), (60_000, 0));
        assert_eq!(tally.on_their_way(1_000, 2, 100), 6.0);
    }

    #[test]
    fn who_was_asked_to_come_later_counts_until_then() {
        let begin = Instant::now();
        let tally = Tally::new(&beaten(0, 0), begin);
        (0..600).for_each(|_| _ = tally.hand_out(0, 1, 10));
        for (beat, second) in [(5_000, 5), (10_000, 10), (15_000, 15)] {
            tally.look(&beaten(beat, second * 10), 1, begin + Duration::from_secs(second.into()));
            assert_eq!(tally.on_their_way(u64::from(second) * 1_000_000, 1, 10), f64::from(600 - second * 10));
        }
    }
}
