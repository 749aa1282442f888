//! Deliveries of this node that wait for a device to acknowledge them. A delivery's id names the node that sent it, so an
//! acknowledgement that comes to another node finds its way.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::hash::RandomState;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::domain::caller::GatewayPatterns;
use crate::domain::id::DeviceId;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::engine::messages::steps::Steps;
use crate::metrics::ByResult;
use crate::metrics::Metrics;

/// What a gateway says of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ack {
    pub delivery_id: String,
    pub user: UserId,
    pub device: DeviceId,
    /// The device is not on this gateway any more.
    pub not_here: bool,
    /// For which gateways whoever says it may speak. None: for any.
    pub by: Option<Arc<GatewayPatterns>>,
}

/// What an acknowledgement came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Counted,
    /// Nobody waits for it, or not from this user's device.
    Unknown,
    /// The message was not handed to a gateway that the sender may speak for.
    NotTheirs,
}

/// Which devices have answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    pub acked: BTreeSet<DeviceId>,
    pub not_here: BTreeSet<DeviceId>,
}

struct Waiting {
    user: UserId,
    /// Who is expected to answer, and through which gateways: those that the message was handed to.
    devices: BTreeMap<DeviceId, Vec<GatewayAddr>>,
    answered: Answered,
    changed: Arc<Notify>,
    /// For whoever wants to see them.
    steps: Option<Arc<Steps>>,
}

pub struct Acks {
    node_id: String,
    counter: AtomicU64,
    /// Known to nobody else.
    key: RandomState,
    waiting: Mutex<HashMap<String, Waiting>>,
    metrics: Arc<Metrics>,
}

/// A delivery that waits. Dropping it ends that.
pub struct Expected<'a> {
    acks: &'a Acks,
    delivery_id: String,
    changed: Arc<Notify>,
}

impl Acks {
    pub fn new(node_id: &str, metrics: Arc<Metrics>) -> Arc<Self> {
        let (counter, key, waiting) = (AtomicU64::new(0), RandomState::new(), Mutex::default());
        Arc::new(Self { node_id: node_id.to_owned(), counter, key, waiting, metrics })
    }

    /// An id that no delivery had before, of this process or another of the same name, and that only its receivers know:
    /// whoever could guess it could acknowledge for them.
    pub fn next_id(&self) -> String {
        let number = self.key.hash_one(self.counter.fetch_add(1, Ordering::Relaxed)) >> 8;
        format!("{}-{number}", self.node_id)
    }

    /// The node that made a delivery's id. None: no node did.
    pub fn origin(delivery_id: &str) -> Option<&str> {
        delivery_id.rsplit_once('-').filter(|(_, number)| number.parse::<u64>().is_ok()).map(|(node, _)| node)
    }

    pub fn is_own(&self, delivery_id: &str) -> bool {
        Self::origin(delivery_id) == Some(&self.node_id)
    }

    /// From now on `devices` may acknowledge the delivery.
    pub fn wait_for(
        &self,
        delivery_id: &str,
        user: UserId,
        devices: BTreeMap<DeviceId, GatewayAddr>,
        steps: Option<Arc<Steps>>,
    ) -> Expected<'_> {
        let (changed, answered) = (Arc::new(Notify::new()), Answered::default());
        let devices = devices.into_iter().map(|(device, gateway)| (device, vec![gateway])).collect();
        let waiting = Waiting { user, devices, answered, changed: changed.clone(), steps };
        self.lock().insert(delivery_id.to_owned(), waiting);
        Expected { acks: self, delivery_id: delivery_id.to_owned(), changed }
    }

    /// Takes what a gateway says. What nobody waits for, or what is about another user, device or gateway, changes nothing.
    pub fn take(&self, ack: Ack) -> Taken {
        let mut waiting = self.lock();
        let entry = waiting.get_mut(&ack.delivery_id);
        let expected = entry.filter(|waiting| waiting.user == ack.user && waiting.devices.contains_key(&ack.device));
        let speaks = |gateway: &GatewayAddr| ack.by.as_ref().is_none_or(|by| by.cover(gateway));
        let is_theirs = expected.as_ref().is_some_and(|waiting| waiting.devices[&ack.device].iter().any(speaks));
        let (result, taken) = match (&expected, is_theirs, ack.not_here) {
            (None, ..) => ("unknown", Taken::Unknown),
            (Some(_), false, _) => ("unknown", Taken::NotTheirs),
            (Some(_), true, true) => ("not_here", Taken::Counted),
            (Some(_), true, false) => ("acked", Taken::Counted),
        };
        self.metrics.acks.get_or_create(&ByResult { result }).inc();
        if let Some(waiting) = expected.filter(|_| is_theirs) {
            let Answered { acked, not_here } = &mut waiting.answered;
            let (devices, what) = if ack.not_here { (not_here, "device_gone") } else { (acked, "acked") };
            let is_new = devices.insert(ack.device.clone());
            if let Some(steps) = waiting.steps.as_ref().filter(|_| is_new) {
                steps.note(what, Instant::now(), |step| step.device = ack.device.to_string());
            }
            waiting.changed.notify_one();
        }
        taken
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected<'_> {
    /// The message goes out again, to `devices`. What was acknowledged stays so; who was not there is asked anew.
    pub fn again(&self, devices: BTreeMap<DeviceId, GatewayAddr>) {
        if let Some(waiting) = self.acks.lock().get_mut(&self.delivery_id) {
            let mut before = std::mem::take(&mut waiting.devices);
            waiting.devices = devices
                .into_iter()
                .map(|(device, gateway)| {
                    let mut gateways = before.remove(&device).unwrap_or_default();
                    gateways.retain(|known| *known != gateway);
                    gateways.push(gateway);
                    (device, gateways)
                })
                .collect();
            waiting.answered.not_here.clear();
        }
    }

    /// Who has acknowledged by now.
    pub fn acked(&self) -> BTreeSet<DeviceId> {
        self.look(|_| true).0.acked
    }

    /// Waits until every device has answered, or until `until`. An answer that is there counts, however late it is asked for.
    pub async fn answers(&self, until: Instant) -> Answered {
        self.wait(until, |waiting| waiting.is_complete()).await
    }

    /// The same, but not for further devices when one has acknowledged.
    pub async fn first(&self, until: Instant) -> Answered {
        self.wait(until, |waiting| waiting.is_complete() || !waiting.answered.acked.is_empty()).await
    }

    async fn wait(&self, until: Instant, enough: impl Fn(&Waiting) -> bool) -> Answered {
        loop {
            let (answered, enough) = self.look(&enough);
            if enough || timeout_at(until.into(), self.changed.notified()).await.is_err() {
                return if enough { answered } else { self.look(|_| true).0 };
            }
        }
    }

    fn look(&self, enough: impl Fn(&Waiting) -> bool) -> (Answered, bool) {
        let waiting = self.acks.lock();
        let Some(waiting) = waiting.get(&self.delivery_id) else { return (Answered::default(), true) };
        (waiting.answered.clone(), enough(waiting))
    }
}

impl Waiting {
    /// Every device has answered.
    fn is_complete(&self) -> bool {
        let answered = &self.answered;
        self.devices.keys().all(|device| answered.acked.contains(device) || answered.not_here.contains(device))
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.acks.lock().remove(&self.delivery_id);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use super::*;

    fn device(name: &str) -> DeviceId {
        DeviceId::parse(name).unwrap()
    }

    fn ack(delivery_id: &str, user: i64, name: &str) -> Ack {
        let (user, device) = (UserId::parse(user).unwrap(), device(name));
        Ack { delivery_id: delivery_id.to_owned(), user, device, not_here: false, by: None }
    }

    fn on_gateway(names: &[&str]) -> BTreeMap<DeviceId, GatewayAddr> {
        names.iter().map(|name| (device(name), GatewayAddr::parse("gw-1:7000").unwrap())).collect()
    }

    #[tokio::test]
    async fn only_the_right_device_of_the_right_user_acknowledges() {
        let acks = Acks::new("node-1", Metrics::new());
        let id = acks.next_id();
        let expected = acks.wait_for(&id, UserId::parse(1).unwrap(), on_gateway(&["phone", "pad"]), None);
        for wrong in [ack("node-1-77", 1, "phone"), ack(&id, 2, "phone"), ack(&id, 1, "laptop")] {
            acks.take(wrong);
        }
        let soon = || Instant::now() + Duration::from_millis(5);
        assert_eq!(expected.answers(soon()).await, Answered::default());
        acks.take(ack(&id, 1, "phone"));
        assert_eq!(expected.answers(soon()).await.acked, BTreeSet::from([device("phone")]));
        acks.take(Ack { not_here: true, ..ack(&id, 1, "pad") });
        let long_ago = Instant::now();
        assert_eq!(expected.answers(long_ago).await.not_here, BTreeSet::from([device("pad")]), "it is there");
        drop(expected);
        assert!(acks.is_empty(), "nothing is left behind");
    }

    #[tokio::test]
    async fn a_second_attempt_keeps_what_was_acknowledged_and_asks_the_others_anew() {
        let acks = Acks::new("node-1", Metrics::new());
        let id = acks.next_id();
        let expected = acks.wait_for(&id, UserId::parse(1).unwrap(), on_gateway(&["phone", "pad"]), None);
        acks.take(ack(&id, 1, "phone"));
        acks.take(Ack { not_here: true, ..ack(&id, 1, "pad") });
        expected.again(on_gateway(&["pad"]));
        let soon = Instant::now() + Duration::from_millis(5);
        let answered = Answered { acked: BTreeSet::from([device("phone")]), ..Answered::default() };
        assert_eq!(expected.answers(soon).await, answered);
        acks.take(ack(&id, 1, "pad"));
        assert_eq!(expected.acked().len(), 2);
    }

    #[tokio::test]
    async fn only_a_gateway_that_was_handed_the_message_speaks_for_its_device() {
        let acks = Acks::new("node-1", Metrics::new());
        let id = acks.next_id();
        let expected = acks.wait_for(&id, UserId::parse(1).unwrap(), on_gateway(&["phone"]), None);
        let by = |host: &str, not_here| {
            let by = Some(Arc::new(GatewayPatterns::host(host)));
            Ack { by, not_here, ..ack(&id, 1, "phone") }
        };
        assert_eq!(acks.take(by("gw-2", false)), Taken::NotTheirs);
        assert_eq!(acks.take(by("gw-2", true)), Taken::NotTheirs);
        let long_ago = Instant::now();
        assert_eq!(expected.answers(long_ago).await, Answered::default());
        expected.again(BTreeMap::from([(device("phone"), GatewayAddr::parse("gw-3:7000").unwrap())]));
        assert_eq!(acks.take(by("gw-1", false)), Taken::Counted, "it was handed to the first one, too");
    }

    #[test]
    fn an_id_is_of_one_process_alone_and_cannot_be_guessed() {
        let (first, second) = (Acks::new("node-1", Metrics::new()), Acks::new("node-1", Metrics::new()));
        let ids: HashSet<String> = (0..1_000).flat_map(|_| [first.next_id(), second.next_id()]).collect();
        assert_eq!(ids.len(), 2_000);
        let number = |id: &str| id.rsplit_once('-').unwrap().1.parse::<u64>().unwrap();
        assert!(ids.iter().filter(|id| number(id) < 1 << 40).count() < 10, "no counters");
    }

    #[test]
    fn an_id_names_its_node() {
        let acks = Acks::new("7f-a", Metrics::new());
        assert!(acks.is_own(&acks.next_id()));
        assert_eq!(Acks::origin("7f-a-12"), Some("7f-a"));
        for nonsense in ["", "-", "x", "node-x", "12"] {
            assert!(!acks.is_own(nonsense), "{nonsense}");
        }
    }
}
