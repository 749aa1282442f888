//! The streams of gateways that are attached to this node. Each has a bounded queue: a gateway that reads too slowly has its
//! queue full, and what does not fit is not taken; other gateways are not delayed by it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

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
}

pub struct Streams {
    streams: Mutex<HashMap<Epoch, Stream>>,
    metrics: Arc<Metrics>,
}

/// A stream's own end.
pub struct Attached {
    pub orders: mpsc::Receiver<Order>,
    pub replaced: CancellationToken,
}

impl Streams {
    pub fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { streams: Mutex::default(), metrics })
    }

    /// Takes stream number `no` of a life in. An older one of the same life is ended.
    pub fn attach(&self, epoch: Epoch, no: u64) -> Attached {
        let (orders, receiver) = mpsc::channel(STREAM_QUEUE);
        let replaced = CancellationToken::new();
        let mut streams = self.lock();
        match streams.get(&epoch) {
            Some(newer) if newer.no > no => replaced.cancel(),
            _ => {
                let stream = Stream { no, orders, replaced: replaced.clone() };
                if let Some(older) = streams.insert(epoch, stream) {
                    older.replaced.cancel();
                }
            }
        }
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        Attached { orders: receiver, replaced }
    }

    /// Forgets stream number `no` of a life.
    pub fn detach(&self, epoch: Epoch, no: u64) {
        let mut streams = self.lock();
        if streams.get(&epoch).is_some_and(|stream| stream.no == no) {
            streams.remove(&epoch);
        }
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
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
        let orders = match self.lock().get(&epoch) {
            Some(stream) if !stream.replaced.is_cancelled() => stream.orders.clone(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn kick(n: i64) -> Order {
        Order::Kick(KickOrder { user_id: n, ..KickOrder::default() })
    }

    #[tokio::test]
    async fn a_slow_reader_is_not_waited_for_and_delays_nobody() {
        let streams = Streams::new(Metrics::new());
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
        let streams = Streams::new(Metrics::new());
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
}
