//! The streams of gateways that are attached to this node. Each has a bounded queue: a gateway that reads too slowly has its
//! queue full, and what does not fit is not taken; other gateways are not delayed by it.
//!
//! Nobody acknowledges a kick, and what is written to a broken stream arrives nowhere. But a gateway whose heartbeats are not
//! answered leaves its stream within a lease, so what a stream took earlier than that before its end has arrived. The kicks it
//! took later go to the stream that takes its place, or back to whoever ends it, to be told again.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;

use crate::domain::id::Epoch;
use crate::metrics::Metrics;
pub use crate::store::codec::Envelope;
pub use crate::store::codec::KickOrder;

/// Deliveries and kicks that wait for one gateway to read them.
pub const STREAM_QUEUE: usize = 1_024;

/// What a gateway is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Delivery(Arc<Envelope>),
    Kick(KickOrder),
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// It is on its way.
    Taken,
    /// The gateway reads too slowly.
    Full,
    /// The gateway has no stream here, or not any more.
    NotHere,
}

struct Stream {
    no: u64,
    orders: mpsc::Sender<Order>,
    /// Tells the stream that a newer one has taken its place.
    replaced: CancellationToken,
    kicks: TakenKicks,
}

/// Kicks that a stream took lately, the oldest first; no more than its queue holds.
#[derive(Default)]
struct TakenKicks(VecDeque<(Instant, KickOrder)>);

pub struct Streams {
    streams: Mutex<HashMap<Epoch, Stream>>,
    lease: Duration,
    metrics: Arc<Metrics>,
}

/// A stream's own end.
pub struct Attached {
    pub orders: mpsc::Receiver<Order>,
    pub replaced: CancellationToken,
}

impl Streams {
    pub fn new(lease: Duration, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { streams: Mutex::default(), lease, metrics })
    }

    /// Takes stream number `no` of a life in. An older one of the same life is ended; what it may have lost comes first.
    pub fn attach(&self, epoch: Epoch, no: u64) -> Attached {
        let (orders, receiver) = mpsc::channel(STREAM_QUEUE);
        let replaced = CancellationToken::new();
        let mut streams = self.lock();
        match streams.remove(&epoch) {
            Some(newer) if newer.no > no => {
                replaced.cancel();
                streams.insert(epoch, newer);
            }
            older => {
                let mut stream = Stream { no, orders, replaced: replaced.clone(), kicks: TakenKicks::default() };
                if let Some(older) = older {
                    older.replaced.cancel();
                    for kick in older.kicks.younger_than(self.lease) {
                        stream.kicks.note(&kick, self.lease);
                        let _ = stream.orders.try_send(Order::Kick(kick)); // no more than fit into a queue
                    }
                }
                streams.insert(epoch, stream);
            }
        }
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        Attached { orders: receiver, replaced }
    }

    /// Forgets stream number `no` of a life. Returns the kicks that it may have lost, unless a newer stream has them.
    pub fn detach(&self, epoch: Epoch, no: u64) -> Vec<KickOrder> {
        let mut streams = self.lock();
        let ended = if streams.get(&epoch).is_some_and(|stream| stream.no == no) { streams.remove(&epoch) } else { None };
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        ended.map(|stream| stream.kicks.younger_than(self.lease).collect()).unwrap_or_default()
    }

    /// Ends every stream that `is_current` does not know as its life's newest.
    pub fn end_unless(&self, is_current: impl Fn(Epoch, u64) -> bool) {
        for (epoch, stream) in self.lock().iter() {
            if !is_current(*epoch, stream.no) {
                stream.replaced.cancel();
            }
        }
    }

    /// Hands an order to the stream of a life.
    pub fn hand(&self, epoch: Epoch, order: Order) -> Handed {
        let orders = match self.lock().get_mut(&epoch) {
            Some(stream) if !stream.replaced.is_cancelled() => {
                if let Order::Kick(kick) = &order {
                    stream.kicks.note(kick, self.lease);
                }
                stream.orders.clone()
            }
            _ => return Handed::NotHere,
        };
        match orders.try_send(order) {
            Ok(()) => Handed::Taken,
            Err(TrySendError::Full(_)) => {
                self.metrics.shed("stream");
                Handed::Full
            }
            Err(TrySendError::Closed(_)) => Handed::NotHere,
        }
    }

    /// Orders that wait, over all streams.
    pub fn depth(&self) -> usize {
        self.lock().values().map(|stream| stream.orders.max_capacity() - stream.orders.capacity()).sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Epoch, Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TakenKicks {
    fn note(&mut self, kick: &KickOrder, lease: Duration) {
        let is_old = |(when, _): &(Instant, KickOrder)| when.elapsed() > lease;
        while self.0.len() >= STREAM_QUEUE || self.0.front().is_some_and(is_old) {
            self.0.pop_front();
        }
        self.0.push_back((Instant::now(), kick.clone()));
    }

    fn younger_than(self, lease: Duration) -> impl Iterator<Item = KickOrder> {
        self.0.into_iter().filter(move |(when, _)| when.elapsed() <= lease).map(|(_, kick)| kick)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(15);

    fn kick(n: i64) -> Order {
        Order::Kick(KickOrder { user_id: n, ..KickOrder::default() })
    }

    #[tokio::test]
    async fn a_slow_reader_is_not_waited_for_and_delays_nobody() {
        let streams = Streams::new(LEASE, Metrics::new());
        let mut slow = streams.attach(Epoch(1), 1);
        let _other = streams.attach(Epoch(2), 1);
        for n in 0..STREAM_QUEUE as i64 {
            assert_eq!(streams.hand(Epoch(1), kick(n)), Handed::Taken);
        }
        assert_eq!(streams.hand(Epoch(1), kick(-1)), Handed::Full);
        assert_eq!(streams.hand(Epoch(2), kick(0)), Handed::Taken);
        assert_eq!(streams.depth(), STREAM_QUEUE + 1);
        assert_eq!(slow.orders.recv().await, Some(kick(0)));
        assert_eq!(streams.hand(Epoch(1), kick(-2)), Handed::Taken);
        assert_eq!(streams.hand(Epoch(3), kick(0)), Handed::NotHere);
    }

    #[test]
    fn the_newest_stream_of_a_life_counts() {
        let streams = Streams::new(LEASE, Metrics::new());
        let first = streams.attach(Epoch(1), 1);
        let mut third = streams.attach(Epoch(1), 3);
        assert!(first.replaced.is_cancelled());
        assert!(streams.attach(Epoch(1), 2).replaced.is_cancelled(), "it came late");
        streams.detach(Epoch(1), 1); // and so does the end of the first
        assert_eq!(streams.hand(Epoch(1), kick(0)), Handed::Taken);
        assert_eq!(third.orders.try_recv(), Ok(kick(0)));
        streams.end_unless(|_, no| no == 4);
        assert!(third.replaced.is_cancelled());
        assert_eq!(streams.hand(Epoch(1), kick(0)), Handed::NotHere);
    }

    #[test]
    fn kicks_that_a_stream_took_lately_go_to_the_next_or_come_back_at_its_end() {
        let streams = Streams::new(LEASE, Metrics::new());
        let mut first = streams.attach(Epoch(1), 1);
        streams.hand(Epoch(1), kick(1));
        assert_eq!(first.orders.try_recv(), Ok(kick(1)), "it was written, and who knows whether it arrived");
        let mut second = streams.attach(Epoch(1), 2);
        assert_eq!(second.orders.try_recv(), Ok(kick(1)));
        streams.hand(Epoch(1), kick(2));
        assert_eq!(streams.detach(Epoch(1), 1), [], "the second has them");
        let orders: Vec<Order> = streams.detach(Epoch(1), 2).into_iter().map(Order::Kick).collect();
        assert_eq!(orders, [kick(1), kick(2)]);

        let impatient = Streams::new(Duration::ZERO, Metrics::new());
        impatient.attach(Epoch(1), 1);
        impatient.hand(Epoch(1), kick(1));
        assert_eq!(impatient.detach(Epoch(1), 1), [], "a lease later it has arrived");
    }
}
