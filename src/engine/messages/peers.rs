//! The other nodes: who they are, and what is handed to them. Orders for one node that queue up while a call is under way
//! go with the next one together.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::answers;
use crate::answers::Answer;
use crate::domain::explanation::Inspected;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::engine::messages::acks::Ack;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::acks::Taken;
use crate::engine::messages::streams::Handed;
use crate::engine::messages::streams::Order;
use crate::store::cluster::NodeName;
use crate::store::cluster::NodeRow;

/// Calls that may wait; what does not fit is not handed over, and tried again or given up by its sender.
const QUEUE: usize = 4_096;
/// How long another node may take. An order that comes to it later is not handed over any more.
pub const FORWARD_LIMIT: Duration = Duration::from_secs(1);

/// Why a node of the last release tells nothing of itself.
pub const OLDER_RELEASE: &str = "it runs an older release, which tells nothing of itself";

/// A call to another node, for whoever speaks the protocol.
pub enum Call {
    Forward {
        addr: Arc<str>,
        orders: Vec<(Epoch, Order)>,
        answer: Answer<Vec<Handed>>,
    },
    Acks {
        addr: Arc<str>,
        acks: Vec<Ack>,
    },
    /// Nothing but who this node is and where: whoever hears it can answer.
    Hello {
        addr: Arc<str>,
    },
    /// What the node holds of a user.
    Inspect {
        addr: Arc<str>,
        user: UserId,
        answer: oneshot::Sender<Inspected>,
    },
    /// What the node says of itself.
    Ask {
        addr: Arc<str>,
        question: Question,
        answer: oneshot::Sender<Result<Vec<u8>, String>>,
    },
}

/// What a node is asked about itself, and about whom besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub what: &'static str,
    pub about: String,
}

pub struct Peers {
    pub own: NodeName,
    /// Addresses of the nodes that are there, by id.
    nodes: ArcSwap<HashMap<String, Arc<str>>>,
    /// As the database had them last.
    listed: ArcSwap<Vec<NodeRow>>,
    calls: mpsc::Sender<Call>,
}

impl Peers {
    pub fn new(own: NodeName) -> (Arc<Self>, mpsc::Receiver<Call>) {
        let (calls, queue) = mpsc::channel(QUEUE);
        (Arc::new(Self { own, nodes: ArcSwap::default(), listed: ArcSwap::default(), calls }), queue)
    }

    /// Takes over which nodes there are, and makes itself known to those that are new: they look for it once a second only.
    pub fn set_nodes(&self, nodes: &[NodeName]) {
        let nodes = nodes.iter().map(|node| (node.node_id.clone(), Arc::from(node.addr.as_str())));
        let (nodes, known) = (Arc::new(nodes.collect::<HashMap<String, Arc<str>>>()), self.nodes.load());
        for (_, addr) in nodes.iter().filter(|(id, addr)| **id != self.own.node_id && known.get(*id) != Some(addr)) {
            let _ = self.calls.try_send(Call::Hello { addr: addr.clone() }); // full: it will look
        }
        self.nodes.store(nodes);
    }

    /// Takes over what the database says of the nodes, for those who ask which there are.
    pub fn list(&self, nodes: Vec<NodeRow>) {
        self.listed.store(Arc::new(nodes));
    }

    /// The nodes, as the database had them last.
    pub fn listed(&self) -> Arc<Vec<NodeRow>> {
        self.listed.load_full()
    }

    /// Nodes that are there; this one is.
    pub fn count(&self) -> u32 {
        u32::try_from(self.nodes.load().len()).unwrap_or(u32::MAX).max(1)
    }

    /// Whether a node that is there has this address.
    pub fn has(&self, addr: &str) -> bool {
        self.nodes.load().values().any(|known| **known == *addr)
    }

    /// A node has said where it is now.
    pub fn learn(&self, id: &str, addr: &str) {
        if id != self.own.node_id && self.nodes.load().get(id).is_none_or(|known| **known != *addr) {
            self.nodes.rcu(|nodes| {
                let mut nodes = HashMap::clone(nodes);
                nodes.insert(id.to_owned(), Arc::from(addr));
                nodes
            });
        }
    }

    /// Hands orders to streams that `node` has. One outcome for each; all are [`Handed::NotHere`] if it does not answer.
    pub async fn forward(&self, node: &str, orders: Vec<(Epoch, Order)>) -> Vec<Handed> {
        let count = orders.len();
        let none = || vec![Handed::NotHere; count];
        let Some(addr) = self.nodes.load().get(node).cloned() else { return none() };
        let (answer, answered) = answers::channel();
        if self.calls.try_send(Call::Forward { addr, orders, answer }).is_err() {
            return none();
        }
        match timeout(FORWARD_LIMIT, answered).await {
            Ok(Ok(outcomes)) if outcomes.len() == count => outcomes,
            _ => none(),
        }
    }

    /// What each other node holds of a user, by id. None: it did not answer in time.
    pub async fn inspect(&self, user: UserId) -> Vec<(String, Option<Inspected>)> {
        let nodes = self.nodes.load_full();
        let others = nodes.iter().filter(|(id, _)| **id != self.own.node_id);
        let mut inspected =
            join_all(others.map(async |(id, addr)| (id.clone(), self.inspect_at(addr.clone(), user).await))).await;
        inspected.sort_unstable_by(|(one, _), (other, _)| one.cmp(other));
        inspected
    }

    async fn inspect_at(&self, addr: Arc<str>, user: UserId) -> Option<Inspected> {
        let (answer, answered) = oneshot::channel();
        self.calls.try_send(Call::Inspect { addr, user, answer }).ok()?;
        timeout(FORWARD_LIMIT, answered).await.ok()?.ok()
    }

    /// What a node says of itself, as JSON. It need not be one of those that are there.
    ///
    /// # Errors
    /// Why it says nothing, for people.
    pub async fn ask(&self, addr: &str, question: Question, limit: Duration) -> Result<Vec<u8>, String> {
        let (answer, answered) = oneshot::channel();
        if self.calls.try_send(Call::Ask { addr: addr.into(), question, answer }).is_err() {
            return Err("too many calls to other nodes wait".to_owned());
        }
        match timeout(limit, answered).await {
            Ok(Ok(said)) => said,
            Ok(Err(_)) => Err("it was not asked: too many calls to it wait, or its address makes no sense".to_owned()),
            Err(_) => Err(format!("no answer within {} ms", limit.as_millis())),
        }
    }

    /// Where a node is that is there.
    pub fn addr_of(&self, node_id: &str) -> Option<Arc<str>> {
        self.nodes.load().get(node_id).cloned()
    }

    /// Gives each acknowledgement to the node that waits for it; `own` waits here. Returns how many were not their sender's.
    pub fn take_acks(&self, own: &Acks, acks: Vec<Ack>) -> usize {
        let mut not_theirs = 0;
        let mut elsewhere: HashMap<String, Vec<Ack>> = HashMap::new();
        for ack in acks {
            match Acks::origin(&ack.delivery_id) {
                Some(node) if !own.is_own(&ack.delivery_id) => elsewhere.entry(node.to_owned()).or_default().push(ack),
                _ => not_theirs += usize::from(own.take(ack) == Taken::NotTheirs), // of nobody: counted as unknown
            }
        }
        elsewhere.into_iter().for_each(|(node, acks)| self.pass_acks(&node, acks));
        not_theirs
    }

    /// Passes acknowledgements to another node. If they are lost, the delivery is repeated.
    fn pass_acks(&self, node: &str, acks: Vec<Ack>) {
        if let Some(addr) = self.nodes.load().get(node).cloned() {
            let _ = self.calls.try_send(Call::Acks { addr, acks }); // full: see above
        }
    }
}
