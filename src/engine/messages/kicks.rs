//! Telling gateways to close connections whose routes other devices' binds removed, or whose clients are to go elsewhere. A kick that nobody received is repeated
//! once a second as long as that gateway lives, up to ten times: somebody's client believes that it is online. So is one that
//! a stream took and may have lost when it broke; it finds the gateway wherever that has gone with its epoch. A kick names
//! one bind, so a repeat does no harm. Kicks that wait when the node stops go to the outbox, and another node sends them.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use prost::Message;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::domain::id::Epoch;
use crate::engine::messages::outlets::Addressed;
use crate::engine::messages::outlets::Outlets;
use crate::engine::messages::streams::Handed;
use crate::engine::messages::streams::Order;
use crate::engine::read::lives::Lives;
use crate::engine::write::publisher::NotSent;
use crate::engine::write::publisher::TellGateways;
use crate::engine::write::repair::NOTHING_TO_SHOW_AGE;
use crate::metrics::Metrics;
use crate::store::codec::KickedRoute;
use crate::store::codec::OutboxBody;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;

const REPEAT_INTERVAL: Duration = Duration::from_secs(1);
const MAX_REPEATS: u32 = 10;
/// Kicks that wait to be repeated; further ones are given up.
const QUEUE: usize = 10_000;

type Unheard = (KickedRoute, u32);

/// What became of a kick.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Somebody has it, or its gateway lives no more.
    Heard,
    Unheard,
    /// The queue could not be reached.
    NotSent,
}

pub struct Kicks {
    outlets: Arc<Outlets>,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    database: Arc<Database>,
    unheard: mpsc::Sender<Unheard>,
}

impl Kicks {
    pub fn new(
        outlets: Arc<Outlets>,
        lives: Arc<Lives>,
        metrics: Arc<Metrics>,
        database: Arc<Database>,
    ) -> (Arc<Self>, mpsc::Receiver<Unheard>) {
        let (unheard, queue) = mpsc::channel(QUEUE);
        (Arc::new(Self { outlets, lives, metrics, database, unheard }), queue)
    }

    /// Has kicks repeated that a stream may have lost.
    pub fn lost(&self, kicks: impl Iterator<Item = KickedRoute>) {
        for kick in kicks {
            let _ = self.note((kick, 0), false); // streams end before the node does
        }
    }

    /// Repeats until `stop`.
    pub async fn keep_repeating(self: Arc<Self>, mut unheard: mpsc::Receiver<Unheard>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut ticks = interval(REPEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            if self.tell(waiting(&mut unheard)).await.is_err() {
                self.metrics.redis_error("queue");
            }
        }
        unheard.close();
        let left: Vec<KickedRoute> = waiting(&mut unheard).into_iter().map(|(kick, _)| kick).collect();
        let count = left.len();
        if let Err(error) = self.leave_to_others(left).await {
            warn!(%error, kicks = count, "kicks could not be sent, nor stored for another node to send");
        }
    }

    async fn leave_to_others(&self, kicks: Vec<KickedRoute>) -> Result<(), SqlError> {
        if kicks.is_empty() {
            return Ok(());
        }
        // Without a queue the others, too, show nothing to anybody, and are in no hurry.
        let age = if self.outlets.bus.is_none() { NOTHING_TO_SHOW_AGE } else { Duration::ZERO };
        let mut connection = self.database.connect(Purpose::General).await?;
        let body = OutboxBody { kicks, ..OutboxBody::default() };
        connection.add_aged_outbox(&self.outlets.node_id, &body, age).await.map(|_| ())
    }

    async fn tell(&self, kicks: Vec<Unheard>) -> Result<(), NotSent> {
        let fates = self.hand(kicks.iter().map(|(kick, _)| kick), Instant::now()).await;
        let mut all = Ok(());
        for (kick, fate) in kicks.into_iter().zip(fates) {
            let noted = match fate {
                Fate::Heard => Ok(()),
                Fate::Unheard => self.note(kick, false),
                Fate::NotSent if kick.1 > 0 => self.note(kick, false).and(Err(NotSent)),
                Fate::NotSent => Err(NotSent), // the outbox keeps it
            };
            all = all.and(noted);
        }
        all
    }

    /// Says which of these kicks somebody has taken; the others are not repeated. Where many are for one gateway, its queue is
    /// waited for until `until`.
    pub async fn ask(&self, kicks: &[KickedRoute], until: Instant) -> Vec<bool> {
        self.hand(kicks.iter(), until).await.into_iter().map(|fate| fate == Fate::Heard).collect()
    }

    async fn hand(&self, kicks: impl Iterator<Item = &KickedRoute>, until: Instant) -> Vec<Fate> {
        let (table, mut fates) = (self.lives.table(), Vec::new());
        let (mut attached, mut orders, mut others, mut messages) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (place, kick) in kicks.enumerate() {
            fates.push(Fate::Unheard);
            let Some(life) = table.get(Epoch(kick.epoch)).filter(|life| life.is_alive()) else {
                fates[place] = Fate::Heard; // nobody is there who could believe anything
                continue;
            };
            if let Some((epoch, node)) = Outlets::stream_of(life) {
                orders.push(Addressed { epoch, node, order: Order::Kick(kick.order()) });
                attached.push(place);
            } else if let Some(bus) = &self.outlets.bus {
                messages.push((bus.channels.gateway(life.gateway.as_str()), kick.as_frame().encode_to_vec().into()));
                others.push(place);
            } // else it is between two streams
        }
        for (place, (handed, _)) in attached.into_iter().zip(self.outlets.hand(orders, until).await) {
            fates[place] = if handed == Handed::Taken { Fate::Heard } else { Fate::Unheard };
        }
        let Some(bus) = self.outlets.bus.as_ref().filter(|_| !messages.is_empty()) else { return fates };
        match bus.send(&messages, bus.link.timeout()).await {
            Ok(received) => others
                .into_iter()
                .zip(received)
                .filter(|(_, receivers)| *receivers != Some(0)) // where nobody counts, it is not repeated
                .for_each(|(place, _)| fates[place] = Fate::Heard),
            Err(_) => others.into_iter().for_each(|place| fates[place] = Fate::NotSent),
        }
        fates
    }

    /// Has a kick repeated that nobody has heard, unless that was done often enough.
    fn note(&self, (kick, repeats): Unheard, heard: bool) -> Result<(), NotSent> {
        if heard || repeats >= MAX_REPEATS {
            return Ok(());
        }
        match self.unheard.try_send((kick, repeats + 1)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                self.metrics.shed("kicks");
                Ok(())
            }
            Err(TrySendError::Closed(_)) => Err(NotSent),
        }
    }
}

impl TellGateways for Kicks {
    /// What nobody received is repeated. Fails if the queue cannot be reached, or this node stops.
    fn kick<'a>(&'a self, kicks: &'a [KickedRoute]) -> Pin<Box<dyn Future<Output = Result<(), NotSent>> + Send + 'a>> {
        Box::pin(self.tell(kicks.iter().map(|kick| (kick.clone(), 0)).collect()))
    }
}

fn waiting(unheard: &mut mpsc::Receiver<Unheard>) -> Vec<Unheard> {
    std::iter::from_fn(|| unheard.try_recv().ok()).collect()
}
