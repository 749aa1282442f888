//! Telling gateways to close connections whose routes other devices' binds removed. A kick that nobody received is repeated
//! once a second as long as that gateway lives, up to ten times: somebody's client believes that it is online.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use crate::domain::id::Epoch;
use crate::engine::lives::Lives;
use crate::engine::outlets::Addressed;
use crate::engine::outlets::Outlets;
use crate::engine::streams::Handed;
use crate::engine::streams::Order;
use crate::metrics::Metrics;
use crate::store::codec::KickedRoute;
use crate::store::link::LinkError;

const REPEAT_INTERVAL: Duration = Duration::from_secs(1);
const MAX_REPEATS: u32 = 10;
/// Kicks that wait to be repeated; further ones are given up.
const QUEUE: usize = 10_000;

type Unheard = (KickedRoute, u32);

pub struct Kicks {
    outlets: Arc<Outlets>,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    unheard: mpsc::Sender<Unheard>,
}

impl Kicks {
    pub fn new(outlets: Arc<Outlets>, lives: Arc<Lives>, metrics: Arc<Metrics>) -> (Arc<Self>, mpsc::Receiver<Unheard>) {
        let (unheard, queue) = mpsc::channel(QUEUE);
        (Arc::new(Self { outlets, lives, metrics, unheard }), queue)
    }

    /// Tells the gateways. What nobody received is repeated.
    ///
    /// # Errors
    /// If the queue cannot be reached.
    pub async fn send(&self, kicks: &[KickedRoute]) -> Result<(), LinkError> {
        let first = kicks.iter().map(|kick| (kick.clone(), 0)).collect();
        self.tell(first).await
    }

    /// Repeats until `stop`.
    pub async fn keep_repeating(self: Arc<Self>, mut unheard: mpsc::Receiver<Unheard>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut ticks = interval(REPEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let mut again = Vec::new();
            while let Ok(kick) = unheard.try_recv() {
                again.push(kick);
            }
            if self.tell(again).await.is_err() {
                self.metrics.redis_error("queue");
            }
        }
    }

    async fn tell(&self, kicks: Vec<Unheard>) -> Result<(), LinkError> {
        let table = self.lives.table();
        let (mut attached, mut orders, mut others, mut messages) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for kick in kicks {
            let Some(life) = table.get(Epoch(kick.0.epoch)).filter(|life| life.is_alive()) else { continue };
            if let Some((epoch, node)) = Outlets::stream_of(life) {
                orders.push(Addressed { epoch, node, order: Order::Kick(kick.0.order()) });
                attached.push(kick);
            } else if let Some(bus) = &self.outlets.bus {
                messages.push((bus.channels.gateway(life.gateway.as_str()), kick.0.as_frame().encode_to_vec()));
                others.push(kick);
            }
        }
        for (kick, handed) in attached.into_iter().zip(self.outlets.hand(orders).await) {
            self.note(kick, handed == Handed::Taken);
        }
        let Some(bus) = self.outlets.bus.as_ref().filter(|_| !messages.is_empty()) else { return Ok(()) };
        match bus.publish(&messages, bus.link.timeout()).await {
            Ok(received) => others.into_iter().zip(received).for_each(|(kick, receivers)| self.note(kick, receivers > 0)),
            Err(error) => {
                // The first time the outbox keeps it.
                others.into_iter().filter(|(_, repeats)| *repeats > 0).for_each(|kick| self.note(kick, false));
                return Err(error);
            }
        }
        Ok(())
    }

    fn note(&self, (kick, repeats): Unheard, heard: bool) {
        if !heard && repeats < MAX_REPEATS && self.unheard.try_send((kick, repeats + 1)).is_err() {
            self.metrics.shed("kicks");
        }
    }
}
