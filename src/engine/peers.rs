//! The other nodes: who they are, and what is handed to them. Orders for one node that queue up while a call is under way
//! go with the next one together.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::domain::id::Epoch;
use crate::engine::acks::Ack;
use crate::engine::streams::Handed;
use crate::engine::streams::Order;

/// Calls that may wait; what does not fit is not handed over, and tried again or given up by its sender.
const QUEUE: usize = 4_096;
/// How long another node may take. An order that comes to it later is not handed over any more.
pub const FORWARD_LIMIT: Duration = Duration::from_secs(1);

/// A call to another node, for whoever speaks the protocol.
pub enum Call {
    Forward { addr: Arc<str>, orders: Vec<(Epoch, Order)>, answer: oneshot::Sender<Vec<Handed>> },
    Acks { addr: Arc<str>, acks: Vec<Ack> },
}

pub struct Peers {
    /// Addresses of the nodes that are there, by id.
    nodes: ArcSwap<HashMap<String, Arc<str>>>,
    calls: mpsc::Sender<Call>,
}

impl Peers {
    pub fn new() -> (Arc<Self>, mpsc::Receiver<Call>) {
        let (calls, queue) = mpsc::channel(QUEUE);
        (Arc::new(Self { nodes: ArcSwap::default(), calls }), queue)
    }

    /// Takes over which nodes there are.
    pub fn set_nodes(&self, nodes: &[(String, String)]) {
        let nodes = nodes.iter().map(|(id, addr)| (id.clone(), Arc::from(addr.as_str())));
        self.nodes.store(Arc::new(nodes.collect()));
    }

    /// Hands orders to streams that `node` has. One outcome for each; all are [`Handed::NotHere`] if it does not answer.
    pub async fn forward(&self, node: &str, orders: Vec<(Epoch, Order)>) -> Vec<Handed> {
        let count = orders.len();
        let none = || vec![Handed::NotHere; count];
        let Some(addr) = self.nodes.load().get(node).cloned() else { return none() };
        let (answer, answered) = oneshot::channel();
        if self.calls.try_send(Call::Forward { addr, orders, answer }).is_err() {
            return none();
        }
        match timeout(FORWARD_LIMIT, answered).await {
            Ok(Ok(outcomes)) if outcomes.len() == count => outcomes,
            _ => none(),
        }
    }

    /// Passes acknowledgements to the node that waits for them. If they are lost, the delivery is repeated.
    pub fn pass_acks(&self, node: &str, acks: Vec<Ack>) {
        if let Some(addr) = self.nodes.load().get(node).cloned() {
            let _ = self.calls.try_send(Call::Acks { addr, acks }); // full: see above
        }
    }
}
