//! The streams of gateways that are attached to this node. Each has a queue that is bounded in orders and in bytes, and so are
//! all of them together: a gateway that reads too slowly has its queue full, and what does not fit is not taken; other gateways
//! are not delayed by it.
//!
//! Nobody acknowledges a kick, and what is written to a broken stream arrives nowhere. But a gateway whose heartbeats are not
//! answered leaves its stream within a lease, so what was written earlier than that before its end has arrived. The kicks that
//! were written later, or not at all, go to the stream that takes its place, or back to whoever ends it, to be told again.

use std::cell::LazyCell;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::sleep;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use crate::domain::id::Epoch;
use crate::engine::messages::figures::Figures;
use crate::engine::messages::figures::StreamView;
use crate::memory::Held;
use crate::memory::Memory;
use crate::memory::Share;
use crate::metrics::Metrics;
pub use crate::store::codec::Envelope;
pub use crate::store::codec::KickOrder;

/// Deliveries and kicks that wait for one gateway to read them, and their bytes.
pub const STREAM_QUEUE: usize = 1_024;
pub const STREAM_QUEUE_BYTES: usize = 4 * 1024 * 1024;
/// What an order takes beside its message, roughly.
pub const ORDER_BYTES: usize = 1024;

/// Between looks for bytes that have become free in a queue.
const ROOM_LOOK_INTERVAL: Duration = Duration::from_millis(2);
/// Whoever hands over more orders for one gateway together waits for it to read: they may be a part of many more.
const MANY: usize = 16;

/// What a gateway is told.
#[derive(Clone, Debug, PartialEq)]
pub enum Order {
    Delivery(Arc<Envelope>),
    Kick(KickOrder),
}

impl Order {
    /// What it takes, roughly.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Delivery(envelope) => ORDER_BYTES + envelope.message.len() + envelope.payload.len(),
            Self::Kick(_) => ORDER_BYTES,
        }
    }
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
    queue: Queue,
    /// Tells the stream that a newer one has taken its place.
    replaced: CancellationToken,
    kicks: Arc<Mutex<TakenKicks>>,
    figures: Arc<Figures>,
}

/// Orders that did not fit, and their places among those of the call.
type Waiting = Vec<(usize, Order)>;

/// Where orders wait.
#[derive(Clone)]
struct Queue {
    orders: mpsc::Sender<Queued>,
    /// What its orders take.
    held: Arc<Held>,
}

/// An order on its way to its gateway, and its place in the queue.
pub type Queued = (Order, HeldBytes);

/// What an order takes of its queue's room. It is free once this is dropped, which whoever writes the order does then.
pub struct HeldBytes {
    bytes: usize,
    held: Arc<Held>,
}

/// Kicks that a stream took lately, the oldest first, with the time when they were written; no more than its queue holds.
#[derive(Default)]
struct TakenKicks(VecDeque<(Option<Instant>, KickOrder)>);

pub struct Streams {
    streams: Mutex<HashMap<Epoch, Stream>>,
    lease: Duration,
    memory: Arc<Memory>,
    metrics: Arc<Metrics>,
}

/// A stream's own end.
pub struct Attached {
    orders: mpsc::Receiver<Queued>,
    kicks: Arc<Mutex<TakenKicks>>,
    pub replaced: CancellationToken,
    pub figures: Arc<Figures>,
}

impl Streams {
    pub fn new(lease: Duration, memory: Arc<Memory>, metrics: Arc<Metrics>) -> Arc<Self> {
        Arc::new(Self { streams: Mutex::default(), lease, memory, metrics })
    }

    /// Takes stream number `no` of a life in. An older one of the same life is ended; what it may have lost comes first.
    pub fn attach(&self, epoch: Epoch, no: u64) -> Attached {
        let (orders, receiver) = mpsc::channel(STREAM_QUEUE);
        let (replaced, kicks) = (CancellationToken::new(), Arc::<Mutex<TakenKicks>>::default());
        let (held, figures) = (Arc::new(self.memory.none(Share::Streams)), Arc::<Figures>::default());
        let queue = Queue { orders, held };
        let stream = Stream { no, queue, replaced: replaced.clone(), kicks: kicks.clone(), figures: figures.clone() };
        let mut streams = self.lock();
        match streams.get(&epoch) {
            Some(newer) if newer.no > no => replaced.cancel(),
            older => {
                if let Some(older) = older {
                    older.replaced.cancel();
                    for kick in older.may_have_lost(self.lease) {
                        let _ = stream.take(kick, self.lease); // no more than fit into a queue
                    }
                }
                streams.insert(epoch, stream);
            }
        }
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        Attached { orders: receiver, kicks, replaced, figures }
    }

    /// Forgets stream number `no` of a life. Returns the kicks that it may have lost, unless a newer stream has them.
    pub fn detach(&self, epoch: Epoch, no: u64) -> Vec<KickOrder> {
        let mut streams = self.lock();
        let ended = if streams.get(&epoch).is_some_and(|stream| stream.no == no) { streams.remove(&epoch) } else { None };
        self.metrics.streams.set(i64::try_from(streams.len()).unwrap_or(i64::MAX));
        ended.map(|stream| stream.may_have_lost(self.lease)).unwrap_or_default()
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
        let streams = self.lock();
        let Some(stream) = streams.get(&epoch).filter(|stream| !stream.replaced.is_cancelled()) else { return Handed::NotHere };
        let figures = stream.figures.clone();
        let taken = match order {
            Order::Kick(kick) => stream.take(kick, self.lease), // before anybody can end the stream
            delivery => {
                let queue = stream.queue.clone();
                drop(streams);
                queue.take(delivery)
            }
        };
        match taken {
            Ok(()) => Handed::Taken,
            Err(Refused::Full) => {
                self.metrics.shed("stream");
                figures.note_shed();
                Handed::Full
            }
            Err(Refused::Closed) => Handed::NotHere,
        }
    }

    /// Hands orders to their streams, in their order per life. Where a call has many for one of them, more than its queue may
    /// hold, it waits for the gateway to read, until `until`; nobody else is kept waiting.
    pub async fn hand_all(&self, orders: &[(Epoch, Order)], until: Instant) -> Vec<Handed> {
        let (mut outcomes, behind) = self.hand_what_fits(orders);
        if !behind.is_empty() {
            let waits = behind.into_iter().map(|(epoch, orders)| self.hand_behind(epoch, orders, until));
            for (i, handed) in join_all(waits).await.into_iter().flatten() {
                outcomes[i] = handed;
            }
        }
        outcomes
    }

    /// What became of each, and those that have to wait, with their places.
    fn hand_what_fits(&self, orders: &[(Epoch, Order)]) -> (Vec<Handed>, HashMap<Epoch, Waiting>) {
        let counts = LazyCell::new(|| {
            let mut counts = HashMap::<Epoch, usize>::new();
            orders.iter().for_each(|(epoch, _)| *counts.entry(*epoch).or_default() += 1);
            counts
        });
        let mut outcomes = vec![Handed::NotHere; orders.len()];
        let mut behind = HashMap::<Epoch, Waiting>::new();
        for (i, (epoch, order)) in orders.iter().enumerate() {
            if let Some(behind) = behind.get_mut(epoch) {
                behind.push((i, order.clone()));
                continue;
            }
            match self.hand(*epoch, order.clone()) {
                Handed::Full if counts[epoch] > MANY => behind.entry(*epoch).or_default().push((i, order.clone())),
                handed => outcomes[i] = handed,
            }
        }
        (outcomes, behind)
    }

    async fn hand_behind(&self, epoch: Epoch, orders: Waiting, until: Instant) -> Vec<(usize, Handed)> {
        let mut outcomes = Vec::with_capacity(orders.len());
        for (i, order) in orders {
            let mut handed = self.hand(epoch, order.clone());
            while handed == Handed::Full && self.room(epoch, order.bytes(), until).await {
                handed = self.hand(epoch, order.clone());
            }
            outcomes.push((i, handed));
        }
        outcomes
    }

    /// Waits until a life's queue has room. False: not in time, or its stream has ended, or all queues together are full.
    async fn room(&self, epoch: Epoch, bytes: usize, until: Instant) -> bool {
        let Some(queue) = self.lock().get(&epoch).map(|stream| stream.queue.clone()) else { return false };
        let room = async {
            while queue.orders.reserve().await.is_ok() {
                if queue.held.has_room(bytes, STREAM_QUEUE_BYTES) {
                    return self.memory.take(Share::Streams, bytes).is_some();
                }
                sleep(ROOM_LOOK_INTERVAL).await;
            }
            false
        };
        timeout_at(until.into(), room).await.unwrap_or(false)
    }

    /// Orders that wait, over all streams.
    pub fn depth(&self) -> usize {
        self.depths().into_iter().map(|(_, depth)| depth).sum()
    }

    /// The same, by stream.
    pub fn depths(&self) -> Vec<(Epoch, usize)> {
        let waiting = |queue: &Queue| queue.orders.max_capacity() - queue.orders.capacity();
        self.lock().iter().map(|(epoch, stream)| (*epoch, waiting(&stream.queue))).collect()
    }

    /// Each of them, in no order.
    pub fn view(&self) -> Vec<StreamView> {
        let waiting = |queue: &Queue| queue.orders.max_capacity() - queue.orders.capacity();
        self.lock().iter().map(|(epoch, stream)| stream.figures.view(*epoch, waiting(&stream.queue))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Epoch, Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stream {
    fn take(&self, kick: KickOrder, lease: Duration) -> Result<(), Refused> {
        let mut kicks = self.kicks.lock().unwrap_or_else(PoisonError::into_inner); // noted before it can be written
        self.queue.take(Order::Kick(kick.clone()))?;
        kicks.note(kick, lease);
        Ok(())
    }

    fn may_have_lost(&self, lease: Duration) -> Vec<KickOrder> {
        self.kicks.lock().unwrap_or_else(PoisonError::into_inner).may_have_been_lost(lease)
    }
}

/// Why a queue takes no order.
enum Refused {
    Full,
    Closed,
}

impl Queue {
    fn take(&self, order: Order) -> Result<(), Refused> {
        let bytes = order.bytes();
        if !self.held.add_within(bytes, STREAM_QUEUE_BYTES) {
            return Err(Refused::Full);
        }
        let place = HeldBytes { bytes, held: self.held.clone() };
        self.orders.try_send((order, place)).map_err(|error| match error {
            TrySendError::Full(_) => Refused::Full,
            TrySendError::Closed(_) => Refused::Closed,
        })
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.held.remove(self.bytes);
    }
}

impl Attached {
    /// The next order, for a caller who writes it at once.
    pub async fn next(&mut self) -> Option<Queued> {
        let queued = self.orders.recv().await?;
        self.figures.note_written();
        if let Order::Kick(_) = queued.0 {
            self.kicks.lock().unwrap_or_else(PoisonError::into_inner).next_is_written();
        }
        Some(queued)
    }
}

impl TakenKicks {
    fn note(&mut self, kick: KickOrder, lease: Duration) {
        while self.0.len() >= STREAM_QUEUE || self.0.front().is_some_and(|(written, _)| has_arrived(*written, lease)) {
            self.0.pop_front(); // the queue holds that many: more kicks mean that the oldest was written
        }
        self.0.push_back((None, kick));
    }

    fn next_is_written(&mut self) {
        let at = self.0.partition_point(|(written, _)| written.is_some());
        if let Some((written, _)) = self.0.get_mut(at) {
            *written = Some(Instant::now());
        }
    }

    fn may_have_been_lost(&self, lease: Duration) -> Vec<KickOrder> {
        self.0.iter().filter(|(written, _)| !has_arrived(*written, lease)).map(|(_, kick)| kick.clone()).collect()
    }
}

fn has_arrived(written: Option<Instant>, lease: Duration) -> bool {
    written.is_some_and(|written| written.elapsed() > lease)
}

#[cfg(test)]
#[path = "streams_tests.rs"]
mod tests;
