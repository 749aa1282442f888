//! Ways to a gateway: its stream here, its stream on another node, or the channels it has subscribed to.

use std::sync::Arc;
use std::time::Instant;

use futures_util::future::join_all;

use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::streams::Handed;
use crate::engine::messages::streams::Order;
use crate::engine::messages::streams::Streams;
use crate::store::bus::Bus;
use crate::store::posts::Posts;

pub struct Outlets {
    pub node_id: String,
    pub streams: Arc<Streams>,
    pub peers: Arc<Peers>,
    pub bus: Option<Arc<Bus>>,
    /// On the same way, what is by the thousand.
    pub posts: Option<Posts>,
}

/// An order for a gateway that has a stream, and the node that has it.
pub struct Addressed {
    pub epoch: Epoch,
    pub node: Arc<str>,
    pub order: Order,
}

/// Orders for one node, and their places among all.
struct ForNode {
    node: Arc<str>,
    places: Vec<usize>,
    orders: Vec<(Epoch, Order)>,
}

impl Outlets {
    /// Whether the gateway has a stream, as far as is known.
    pub fn stream_of(life: &Life) -> Option<(Epoch, Arc<str>)> {
        life.attached.clone().map(|node| (life.epoch, node))
    }

    /// Hands each order to its stream by `until`, in their order per gateway; nodes are asked at the same time. Says also when
    /// the outcome was known.
    pub async fn hand(&self, orders: Vec<Addressed>, until: Instant) -> Vec<(Handed, Instant)> {
        let mut outcomes = vec![(Handed::NotHere, Instant::now()); orders.len()];
        let mut nodes: Vec<ForNode> = Vec::new(); // a few: a map would cost more
        for (i, Addressed { epoch, node, order }) in orders.into_iter().enumerate() {
            match nodes.iter_mut().find(|known| known.node == node) {
                Some(known) => {
                    known.places.push(i);
                    known.orders.push((epoch, order));
                }
                None => nodes.push(ForNode { node, places: vec![i], orders: vec![(epoch, order)] }),
            }
        }
        nodes.sort_unstable_by_key(|known| *known.node == *self.node_id); // the others begin meanwhile
        let calls = nodes.into_iter().map(async |ForNode { node, places, orders }| {
            let handed = match *node == *self.node_id {
                true => self.streams.hand_all(&orders, until).await,
                false => self.peers.forward(&node, orders).await,
            };
            (places, handed, Instant::now())
        });
        for (places, handed, at) in join_all(calls).await {
            places.into_iter().zip(handed).for_each(|(i, handed)| outcomes[i] = (handed, at));
        }
        outcomes
    }
}
