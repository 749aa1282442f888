//! The other nodes: who they are, and what is handed to them. Orders for one node that queue up while a call is under way
//! go with the next one together.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
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

/// Calls for one node that may wait; what does not fit is not handed over, and tried again or given up by its sender.
const QUEUE: usize = 4_096;
/// Nodes that wait for somebody who calls them.
const NEW_LINES: usize = 256;
/// How long another node may take. An order that comes to it later is not handed over any more.
pub const FORWARD_LIMIT: Duration = Duration::from_secs(1);

/// Why a node of the last release tells nothing of itself.
pub const OLDER_RELEASE: &str = "it runs an older release, which tells nothing of itself";

/// A call to another node, for whoever speaks the protocol.
pub enum Call {
    Forward {
        orders: Vec<(Epoch, Order)>,
        answer: Answer<Vec<Handed>>,
    },
    Acks(Vec<Ack>),
    /// Nothing but who this node is and where: whoever hears it can answer.
    Hello,
    /// What the node holds of a user.
    Inspect {
        user: UserId,
        answer: oneshot::Sender<Inspected>,
    },
    /// What the node says of itself.
    Ask {
        question: Question,
        answer: oneshot::Sender<Result<Vec<u8>, String>>,
    },
}

/// Calls for the node at an address, in their order, until nobody can make another.
pub type Line = (Arc<str>, mpsc::Receiver<Call>);

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
    /// Where calls are handed in, by address.
    lines: ArcSwap<HashMap<Arc<str>, mpsc::Sender<Call>>>,
    /// Gives each new one to whoever calls nodes. Locked while one is opened: there is one for each address.
    new_lines: Mutex<mpsc::Sender<Line>>,
}

impl Peers {
    pub fn new(own: NodeName) -> (Arc<Self>, mpsc::Receiver<Line>) {
        let (new_lines, opened) = mpsc::channel(NEW_LINES);
        let (nodes, listed, lines) = (ArcSwap::default(), ArcSwap::default(), ArcSwap::default());
        (Arc::new(Self { own, nodes, listed, lines, new_lines: Mutex::new(new_lines) }), opened)
    }

    /// Takes over which nodes there are, and makes itself known to those that are new: they look for it once a second only.
    pub fn set_nodes(&self, nodes: &[NodeName]) {
        let nodes = nodes.iter().map(|node| (node.node_id.clone(), Arc::from(node.addr.as_str())));
        let nodes = Arc::new(nodes.collect::<HashMap<String, Arc<str>>>());
        let known = self.nodes.swap(nodes.clone());
        for (_, addr) in nodes.iter().filter(|(id, addr)| **id != self.own.node_id && known.get(*id) != Some(addr)) {
            self.call(addr, Call::Hello); // full: it will look
        }
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
        if !self.call(&addr, Call::Forward { orders, answer }) {
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
        self.call(&addr, Call::Inspect { user, answer }).then_some(())?;
        timeout(FORWARD_LIMIT, answered).await.ok()?.ok()
    }

    /// What a node says of itself, as JSON. It need not be one of those that are there.
    ///
    /// # Errors
    /// Why it says nothing, for people.
    pub async fn ask(&self, addr: &str, question: Question, limit: Duration) -> Result<Vec<u8>, String> {
        let (answer, answered) = oneshot::channel();
        if !self.call(&addr.into(), Call::Ask { question, answer }) {
            return Err("too many calls to it wait, or this node ends".to_owned());
        }
        match timeout(limit, answered).await {
            Ok(Ok(said)) => said,
            Ok(Err(_)) => Err("it was not asked: its address makes no sense, or this node ends".to_owned()),
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
            self.call(&addr, Call::Acks(acks)); // full: see above
        }
    }

    /// Takes no more calls. What already waits for a node that somebody calls is made.
    pub fn close(&self) {
        let _opening = self.new_lines.lock().unwrap_or_else(PoisonError::into_inner);
        self.lines.store(Arc::default());
    }

    /// False: too many wait for the node at `addr`, or no more are made.
    fn call(&self, addr: &Arc<str>, call: Call) -> bool {
        match self.lines.load().get(addr).filter(|line| !line.is_closed()) {
            Some(line) => line.try_send(call).is_ok(),
            None => self.open(addr).is_some_and(|line| line.try_send(call).is_ok()),
        }
    }

    /// Has somebody call the node at `addr`, and those that are not there any more no longer.
    fn open(&self, addr: &Arc<str>) -> Option<mpsc::Sender<Call>> {
        let new_lines = self.new_lines.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.lines.load();
        if let Some(line) = known.get(addr).filter(|line| !line.is_closed()) {
            return Some(line.clone()); // another call was faster
        }
        let (line, calls) = mpsc::channel(QUEUE);
        new_lines.try_send((addr.clone(), calls)).ok()?;
        let others = known.iter().filter(|(known, _)| *known != addr && self.has(known));
        let others = others.map(|(addr, line)| (addr.clone(), line.clone()));
        self.lines.store(Arc::new(others.chain([(addr.clone(), line.clone())]).collect()));
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(id: &str) -> NodeName {
        NodeName { node_id: id.to_owned(), addr: format!("{id}:8081"), incarnation: "1".to_owned(), zone: String::new() }
    }

    /// Beside those that are there a node has met.
    fn met(peers: &Peers, others: &[&str]) {
        peers.set_nodes(&others.iter().copied().chain(["own"]).map(node).collect::<Vec<_>>());
    }

    fn orders(epoch: u64) -> Vec<(Epoch, Order)> {
        vec![(Epoch(epoch), Order::Kick(Default::default()))]
    }

    /// What waits for a node, as a letter and the number of an order.
    fn waiting(calls: &mut mpsc::Receiver<Call>) -> Vec<(char, u64)> {
        let call = |call| match call {
            Call::Forward { orders, .. } => ('f', orders[0].0.0),
            Call::Hello => ('h', 0),
            Call::Acks(_) | Call::Inspect { .. } | Call::Ask { .. } => ('?', 0),
        };
        std::iter::from_fn(|| calls.try_recv().ok().map(call)).collect()
    }

    #[tokio::test]
    async fn each_node_has_one_line_in_which_calls_stand_in_their_order() {
        let (peers, mut lines) = Peers::new(node("own"));
        met(&peers, &["a", "b"]); // at once: neither takes the other's line
        met(&peers, &["a", "b"]);
        let calls = [("a", 1), ("b", 2), ("a", 3)].map(|(node, epoch)| peers.forward(node, orders(epoch)));
        assert!(timeout(Duration::ZERO, join_all(calls)).await.is_err(), "nobody has made them");
        let mut opened: Vec<_> = std::iter::from_fn(|| lines.try_recv().ok()).collect();
        opened.sort_unstable_by_key(|(addr, _)| addr.clone());
        let opened = opened.iter_mut().map(|(addr, calls)| (&**addr, waiting(calls)));
        let want = [("a:8081", vec![('h', 0), ('f', 1), ('f', 3)]), ("b:8081", vec![('h', 0), ('f', 2)])];
        assert_eq!(opened.collect::<Vec<_>>(), want);
    }

    #[tokio::test]
    async fn what_was_taken_for_a_node_is_made_after_it_has_gone_and_after_the_end_and_nothing_is_taken_then() {
        let (peers, mut lines) = Peers::new(node("own"));
        met(&peers, &["a"]);
        met(&peers, &["b"]);
        let mut a = lines.recv().await.expect("a line").1;
        assert_eq!((waiting(&mut a), a.is_closed()), (vec![('h', 0)], true), "it is not there any more");
        let mut b = lines.recv().await.expect("a line").1;
        drop(lines);
        peers.close();
        assert_eq!((waiting(&mut b), b.is_closed()), (vec![('h', 0)], true));
        assert_eq!(peers.forward("b", orders(1)).await, [Handed::NotHere]);
    }

    #[tokio::test]
    async fn a_node_that_nobody_calls_any_more_is_called_anew() {
        let (peers, mut lines) = Peers::new(node("own"));
        met(&peers, &["a"]);
        drop(lines.recv().await.expect("a line"));
        assert!(timeout(Duration::ZERO, peers.forward("a", orders(1))).await.is_err(), "it waits");
        assert_eq!(waiting(&mut lines.recv().await.expect("a line").1), [('f', 1)]);
    }
}
