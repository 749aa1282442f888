//! Gateways of tests: one that keeps itself attached, by the client library, and a bare stream that does only what it is told.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::gateway;
use im_presence::client::gateway::Connection;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Options;
use im_presence::client::security::Security;
use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use im_presence::pb::node_frame::Body as Down;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::Streaming;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::node::Node;

const ATTACHED_WITHIN: Duration = Duration::from_secs(20);
const TOLD_WITHIN: Duration = Duration::from_secs(20);
const QUEUE: usize = 4_096;
/// Between looks whether a stalled gateway may go on.
const STALL_LOOK: Duration = Duration::from_millis(5);

/// How devices answer deliveries that want it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    Acknowledge,
    AreSilent,
    AreNotHere,
}

/// A gateway with a socket for each user it is asked to bind, and all that it was told.
pub struct TestGateway {
    pub addr: String,
    gateway: Option<gateway::Gateway>,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    deliveries: Mutex<Vec<pb::Delivery>>,
    kicks: Mutex<Vec<pb::Kick>>,
    /// Of clients who are to go elsewhere.
    moves: Mutex<Vec<pb::Kick>>,
    is_drained: AtomicBool,
    /// Of each stream there was.
    epochs: Mutex<Vec<u64>>,
    detached: Mutex<Vec<String>>,
    stalled: AtomicBool,
}

impl TestGateway {
    /// Attaches to one of `nodes`, whichever answers; done when this returns.
    pub async fn start(nodes: &[Node], addr: &str, devices: Devices) -> Self {
        Self::at(nodes.iter().map(|node| node.data.to_string()).collect(), addr, devices).await
    }

    /// The same, by the nodes' addresses.
    pub async fn at(nodes: Vec<String>, addr: &str, devices: Devices) -> Self {
        Self::showing(&Security::default(), nodes, addr, devices).await
    }

    /// The same, with a credential or over TLS.
    pub async fn showing(security: &Security, nodes: Vec<String>, addr: &str, devices: Devices) -> Self {
        let (gateway_addr, security) = (addr.to_owned(), security.clone());
        let (log, options) = (Arc::<Log>::default(), Options { nodes, gateway_addr, security, ..Default::default() });
        let told = log.clone();
        let gateway = gateway::Gateway::start(options, move |event| told.take(event, devices)).expect("addresses of nodes");
        let this = Self { addr: addr.to_owned(), gateway: Some(gateway), log };
        eventually("the gateway is attached", ATTACHED_WITHIN, async || !this.epochs().is_empty()).await;
        this
    }

    /// One on each node of a cluster: `gw-0:7000` to the first and so on.
    pub async fn one_each(cluster: &Cluster, devices: Devices) -> Vec<Self> {
        let mut gateways = Vec::new();
        for (n, node) in cluster.nodes.iter().enumerate() {
            gateways.push(Self::at(vec![node.data.to_string()], &format!("gw-{n}:7000"), devices).await);
        }
        gateways
    }

    /// A client connects; insists that it is bound.
    pub async fn bind(&self, user: i64, device: &str, conn: &str) -> pb::BindRouteResp {
        let gateway = self.gateway.as_ref().expect("it has not left");
        let bound = gateway.bind(connection(user, device, conn)).await.expect("the gateway runs");
        assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
        bound
    }

    /// A client connects; whatever comes of it. None: the gateway has left.
    pub async fn try_bind(&self, user: i64, device: &str, conn: &str) -> Option<Code> {
        let bound = self.gateway.as_ref()?.bind(connection(user, device, conn)).await;
        bound.ok().map(|bound| code(&bound.result))
    }

    /// The phones of all these users connect at once.
    pub async fn bind_all(self: &Arc<Self>, users: impl Iterator<Item = i64>) {
        let mut binds = JoinSet::new();
        for user in users {
            let this = self.clone();
            binds.spawn(async move { this.bind(user, PHONE, &format!("c-{user}")).await });
        }
        binds.join_all().await;
    }

    /// It is gone without a word. What it was told is remembered.
    pub fn leaves(&mut self) {
        self.gateway = None;
    }

    /// While true, nothing is read from the stream, and nothing is said on it.
    pub fn stall(&self, stalled: bool) {
        self.log.stalled.store(stalled, Ordering::Relaxed);
    }

    pub fn deliveries(&self) -> Vec<pb::Delivery> {
        lock(&self.log.deliveries).clone()
    }

    pub fn texts(&self) -> Vec<String> {
        lock(&self.log.deliveries).iter().map(|delivery| delivery.message.clone()).collect()
    }

    pub fn kicks(&self) -> Vec<pb::Kick> {
        lock(&self.log.kicks).clone()
    }

    /// Clients who were asked to go elsewhere since the last time.
    pub fn take_moves(&self) -> Vec<pb::Kick> {
        std::mem::take(&mut lock(&self.log.moves))
    }

    /// Whether it was told to take nobody new.
    pub fn is_drained(&self) -> bool {
        self.log.is_drained.load(Ordering::Relaxed)
    }

    pub fn epochs(&self) -> Vec<u64> {
        lock(&self.log.epochs).clone()
    }

    /// Why its streams ended.
    pub fn detached(&self) -> Vec<String> {
        lock(&self.log.detached).clone()
    }

    /// Waits until it was handed so many messages.
    pub async fn hears(&self, messages: usize) {
        eventually("the messages are there", TOLD_WITHIN, async || self.deliveries().len() >= messages).await;
    }
}

impl Log {
    fn take(&self, event: Event, devices: Devices) {
        if self.stalled.load(Ordering::Relaxed) {
            tokio::task::block_in_place(|| {
                while self.stalled.load(Ordering::Relaxed) {
                    std::thread::sleep(STALL_LOOK);
                }
            });
        }
        match event {
            Event::Delivery(delivery, acker) => {
                let all = [PHONE.to_owned()];
                let to = if delivery.device_ids.is_empty() { &all[..] } else { &delivery.device_ids };
                for device in to {
                    match devices {
                        Devices::Acknowledge => acker.taken(device),
                        Devices::AreSilent => {}
                        Devices::AreNotHere => acker.not_here(device),
                    }
                }
                lock(&self.deliveries).push(delivery);
            }
            Event::Kick(_, kick) => lock(&self.kicks).push(kick),
            Event::Move(_, kick) => lock(&self.moves).push(kick),
            Event::Draining(is_drained) => self.is_drained.store(is_drained, Ordering::Relaxed),
            Event::Attached { epoch } => lock(&self.epochs).push(epoch),
            Event::Detached(status) => lock(&self.detached).push(format!("{status:?}")),
            Event::Lost(connection, answer) => panic!("not bound again: {connection:?}, {answer:?}"),
            Event::Presence { .. } | Event::NotWatched { .. } => {} // nobody watches
            Event::Superseded => lock(&self.detached).push("superseded".to_owned()),
        }
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn connection(user: i64, device: &str, conn: &str) -> Connection {
    Connection { user_id: user, device_id: device.to_owned(), conn_id: conn.to_owned(), ..Default::default() }
}

/// A stream without a mind of its own. Dropping it ends it.
pub struct RawStream {
    frames: mpsc::Sender<pb::GatewayFrame>,
    answers: Streaming<pb::NodeFrame>,
}

impl RawStream {
    pub async fn open(client: &mut GatewayServiceClient<Channel>) -> Self {
        let (frames, queue) = mpsc::channel(QUEUE);
        let answers = client.attach(ReceiverStream::new(queue)).await.expect("a stream").into_inner();
        Self { frames, answers }
    }

    /// Opens one over a connection of its own and says hello. Epoch 0: a new life.
    pub async fn attach(node: &Node, addr: &str, epoch: u64) -> (Self, u64) {
        let mut stream = Self::open(&mut gateways(node)).await;
        stream.send(1, hello(addr, epoch)).await;
        let welcome = stream.welcome().await;
        assert_eq!(code(&welcome.result), Code::Ok, "{welcome:?}");
        (stream, welcome.gateway_epoch)
    }

    /// False: the stream has ended.
    pub async fn send(&self, seq: u64, body: Up) -> bool {
        self.frames.send(pb::GatewayFrame { seq, body: Some(body) }).await.is_ok()
    }

    pub async fn send_frame(&self, frame: pb::GatewayFrame) {
        let _ = self.frames.send(frame).await; // its end tells
    }

    /// The next frame.
    ///
    /// # Errors
    /// How the stream ended.
    pub async fn next(&mut self) -> Result<pb::NodeFrame, Status> {
        match timeout(TOLD_WITHIN, self.answers.message()).await.expect("a frame, or the end") {
            Ok(Some(frame)) => Ok(frame),
            Ok(None) => Err(Status::ok("without a word")),
            Err(status) => Err(status),
        }
    }

    /// The next frame, however long that takes. None: the stream has ended.
    #[allow(dead_code)] // benches do
    pub async fn wait(&mut self) -> Option<pb::NodeFrame> {
        self.answers.message().await.ok().flatten()
    }

    /// No frame comes within this time.
    pub async fn is_silent(&mut self, time: Duration) -> bool {
        timeout(time, self.answers.message()).await.is_err()
    }

    pub async fn welcome(&mut self) -> pb::RegisterGatewayResp {
        match self.next().await.expect("a welcome").body {
            Some(Down::Welcome(welcome)) => welcome,
            other => panic!("no welcome: {other:?}"),
        }
    }

    /// Waits for its end, whatever comes before.
    pub async fn ended(&mut self) -> Status {
        let began = Instant::now();
        while began.elapsed() < TOLD_WITHIN {
            if let Err(status) = self.next().await {
                return status;
            }
        }
        panic!("the stream did not end within {TOLD_WITHIN:?}");
    }

    /// Binds a user's phone, and insists that it is done: if the database is slow, after it was repeated as it was asked for.
    pub async fn bind(&mut self, user: i64, device: &str, conn: &str) -> pb::BindRouteResp {
        let began = Instant::now();
        loop {
            assert!(self.send(7, bind_frame(user, device, conn)).await, "the stream has ended");
            let bound = self.bound().await;
            if code(&bound.result) == Code::Ok {
                return bound;
            }
            assert!(code(&bound.result) == Code::Unavailable && began.elapsed() < TOLD_WITHIN, "{bound:?}");
        }
    }

    async fn bound(&mut self) -> pb::BindRouteResp {
        loop {
            if let Some(Down::Bound(bound)) = self.next().await.expect("an answer").body {
                return bound;
            }
        }
    }
}

/// Calls for gateways, over a connection of their own.
pub fn gateways(node: &Node) -> GatewayServiceClient<Channel> {
    GatewayServiceClient::new(Endpoint::from_shared(format!("http://{}", node.data)).expect("an address").connect_lazy())
}

pub fn hello(addr: &str, epoch: u64) -> Up {
    Up::Hello(pb::RegisterGatewayReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch, ..Default::default() })
}

pub fn bind_frame(user: i64, device: &str, conn: &str) -> Up {
    let (device_id, conn_id) = (device.to_owned(), conn.to_owned());
    Up::Bind(pb::BindRouteReq { user_id: user, device_id, conn_id, ..Default::default() })
}

pub fn ack_frame(delivery_id: &str, user: i64, device: &str) -> Up {
    let (delivery_id, device_id) = (delivery_id.to_owned(), device.to_owned());
    Up::Ack(pb::DeliveryAck { delivery_id, user_id: user, device_id, not_here: false })
}
