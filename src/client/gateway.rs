//! For gateways: one stream to any of the nodes, which is made again when it breaks.
//!
//! The gateway says who is connected to it ([`Gateway::bind`], [`Gateway::unbind`]) and is told what to hand over
//! ([`Event`]). It keeps its sockets whatever happens here: a node that stops, a broken network, a database that stands still.
//! With its epoch it goes on with its life on another node. If that life is over it begins a new one and binds everybody again,
//! with the age of each connection, so that nobody who has moved on meanwhile is taken back.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::HashSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::client::InvalidNode;
use crate::client::channel;
use crate::client::jittered;
use crate::pb;
use crate::pb::Code;
use crate::pb::gateway_frame::Body as Up;
use crate::pb::gateway_service_client::GatewayServiceClient;
use crate::pb::node_frame::Body as Down;

/// For connecting and for the welcome.
const ATTACH_LIMIT: Duration = Duration::from_secs(3);
/// A node that does not answer a heartbeat within this time is left for another one.
const BEAT_LIMIT: Duration = Duration::from_secs(3);
/// Between attempts to attach: from, to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// What nodes drop as too old. A bind that was not answered may still be carried out until then.
const MAX_EVENT_AGE: Duration = Duration::from_secs(5);
/// Before a bind that a node could not store is asked again, if the node did not say when.
const MIN_RETRY_MS: u32 = 100;
/// Calls and frames that wait to be sent.
const QUEUE: usize = 4_096;

/// What a gateway says of itself.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// `host:port` of each node.
    pub nodes: Vec<String>,
    /// Where this gateway is found; its name.
    pub gateway_addr: String,
    pub region: String,
    pub capacity: u32,
    pub labels: HashMap<String, String>,
}

/// A client's connection. `conn_id` names it among all this gateway ever had.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    pub user_id: i64,
    pub device_id: String,
    pub conn_id: String,
    pub platform: i32,
    pub client_ip: String,
    pub client_port: i32,
}

/// What the gateway is told.
#[derive(Debug)]
pub enum Event {
    /// Hand this over to the user's devices (`device_ids`, or all), then acknowledge for each.
    Delivery(pb::Delivery, Acker),
    /// Close this connection: another device's bind has removed its route.
    Kick(pb::Kick),
    /// A bind that had to be made again after the gateway's life was over did not succeed: close the connection.
    Lost(Connection, pb::BindRouteResp),
    /// The stream is there, with this epoch.
    Attached { epoch: u64 },
    /// The stream has ended; another one is being made.
    Detached(Status),
    /// Another process has this address. It is tried again after a lease; better stop.
    Superseded,
}

/// Acknowledges one delivery.
#[derive(Clone, Debug)]
pub struct Acker {
    calls: mpsc::Sender<Call>,
    delivery_id: String,
    user_id: i64,
    wanted: bool,
}

enum Call {
    Bind(Connection, oneshot::Sender<pb::BindRouteResp>),
    Unbind(pb::UnbindRouteReq, oneshot::Sender<pb::UnbindRouteResp>),
    Ack(pb::DeliveryAck),
}

/// The gateway's own end. Dropping it ends the stream, and the lease soon after; see [`Gateway::stop`].
pub struct Gateway {
    calls: mpsc::Sender<Call>,
    task: JoinHandle<Life>,
}

/// The node's side is gone for good: the gateway was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gateway has stopped")]
pub struct Stopped;

impl Gateway {
    /// Attaches in the background, and keeps attached. `on_event` must not block.
    ///
    /// # Errors
    /// An address of a node makes no sense, or there is none.
    pub fn start(options: Options, on_event: impl Fn(Event) + Send + Sync + 'static) -> Result<Self, InvalidNode> {
        let nodes = options.nodes.iter().map(|node| channel(node, ATTACH_LIMIT)).collect::<Result<Vec<_>, _>>()?;
        if nodes.is_empty() {
            return Err(InvalidNode(String::new()));
        }
        let (calls, queue) = mpsc::channel(QUEUE);
        let life = Life {
            options,
            nodes,
            node: usize::try_from(uuid::Uuid::new_v4().as_u128() % 64).unwrap_or(0),
            epoch: 0,
            lease: Duration::ZERO,
            seq: 0,
            connections: HashMap::new(),
            asked: BTreeMap::new(),
            outgoing: VecDeque::new(),
            later: Vec::new(),
            calls: calls.downgrade(),
            on_event: Arc::new(on_event),
        };
        Ok(Self { calls, task: tokio::spawn(life.keep_attached(queue)) })
    }

    /// Says that a client is connected. Waits until a node has said what came of it, however long that takes; if the client
    /// goes away meanwhile, call [`Gateway::unbind`] without waiting for this.
    pub async fn bind(&self, connection: Connection) -> Result<pb::BindRouteResp, Stopped> {
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Bind(connection, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Says that a client's connection has ended.
    pub async fn unbind(&self, user_id: i64, device_id: &str, conn_id: &str) -> Result<pb::UnbindRouteResp, Stopped> {
        let (device_id, conn_id) = (device_id.to_owned(), conn_id.to_owned());
        let request = pb::UnbindRouteReq { user_id, device_id, conn_id, ..Default::default() };
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Unbind(request, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Deregisters: all users of this gateway are offline at once.
    ///
    /// # Errors
    /// No node could be told; they are offline when the lease ends.
    pub async fn stop(self) -> Result<(), Status> {
        drop(self.calls);
        let Ok(mut life) = self.task.await else { return Ok(()) };
        life.deregister().await
    }
}

impl Acker {
    /// The device has it.
    pub fn taken(&self, device_id: &str) {
        self.answer(device_id, false);
    }

    /// The device is not on this gateway any more.
    pub fn not_here(&self, device_id: &str) {
        self.answer(device_id, true);
    }

    fn answer(&self, device_id: &str, not_here: bool) {
        if self.wanted {
            let (delivery_id, device_id) = (self.delivery_id.clone(), device_id.to_owned());
            let ack = pb::DeliveryAck { delivery_id, user_id: self.user_id, device_id, not_here };
            let _ = self.calls.try_send(Call::Ack(ack)); // full: it is delivered again
        }
    }
}

/// A request without an answer yet: it is made again on the next stream.
enum Asked {
    Bind(Connection, Option<oneshot::Sender<pb::BindRouteResp>>),
    Unbind(pb::UnbindRouteReq, Option<oneshot::Sender<pb::UnbindRouteResp>>),
}

struct Held {
    connection: Connection,
    since: Instant,
    /// A node has said that it is bound.
    answered: bool,
}

struct Life {
    options: Options,
    nodes: Vec<Channel>,
    node: usize,
    epoch: u64,
    lease: Duration,
    seq: u64,
    /// By user and device: who is connected.
    connections: HashMap<(i64, String), Held>,
    asked: BTreeMap<u64, Asked>,
    /// Frames that wait for the transport.
    outgoing: VecDeque<pb::GatewayFrame>,
    /// What is asked again then.
    later: Vec<(Instant, Asked)>,
    calls: mpsc::WeakSender<Call>,
    on_event: Arc<dyn Fn(Event) + Send + Sync>,
}

struct Stream {
    frames: mpsc::Sender<pb::GatewayFrame>,
    answers: Streaming<pb::NodeFrame>,
    beat: Duration,
    /// When the oldest heartbeat without an answer was sent.
    beaten: Option<Instant>,
    /// Heartbeats that other nodes are asked to record: which of them could.
    elsewhere: JoinSet<Option<usize>>,
}

/// Why a stream is left.
enum Left {
    Stopped,
    Broken(Status),
}

impl Life {
    async fn keep_attached(mut self, mut calls: mpsc::Receiver<Call>) -> Self {
        let mut pause = PAUSES.0;
        loop {
            let began = Instant::now();
            let claimed = self.epoch;
            let left = match timeout(ATTACH_LIMIT, self.attach()).await {
                Ok(Ok(mut stream)) => {
                    (self.on_event)(Event::Attached { epoch: self.epoch });
                    pause = PAUSES.0;
                    self.resume(claimed != self.epoch);
                    self.serve(&mut stream, &mut calls).await
                }
                Ok(Err(status)) => Left::Broken(status),
                Err(_) => Left::Broken(Status::deadline_exceeded("no welcome came in time")),
            };
            match left {
                Left::Stopped => return self,
                Left::Broken(status) => (self.on_event)(Event::Detached(status)),
            }
            self.node += 1;
            if calls.is_closed() {
                return self;
            }
            if began.elapsed() < pause {
                sleep(jittered(pause)).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }

    async fn attach(&mut self) -> Result<Stream, Status> {
        let mut client = GatewayServiceClient::new(self.nodes[self.node % self.nodes.len()].clone());
        let (frames, queue) = mpsc::channel(QUEUE);
        let hello = pb::RegisterGatewayReq {
            gateway_addr: self.options.gateway_addr.clone(),
            region: self.options.region.clone(),
            capacity: self.options.capacity,
            labels: self.options.labels.clone(),
            gateway_epoch: self.epoch,
        };
        let hello = pb::GatewayFrame { seq: self.next_seq(), body: Some(Up::Hello(hello)) };
        let _ = frames.send(hello).await; // the answer tells
        let mut answers = client.attach(ReceiverStream::new(queue)).await?.into_inner();
        let Some(Down::Welcome(welcome)) = answers.message().await?.and_then(|frame| frame.body) else {
            return Err(Status::internal("the node did not begin with a welcome"));
        };
        let result = welcome.result.unwrap_or_default();
        match result.code() {
            Code::Ok => {
                self.epoch = welcome.gateway_epoch;
                self.lease = Duration::from_millis(welcome.lease_ms.into());
                let beat = Duration::from_millis(welcome.heartbeat_interval_ms.max(1).into());
                Ok(Stream { frames, answers, beat, beaten: None, elsewhere: JoinSet::new() })
            }
            code => {
                self.epoch = 0;
                if code == Code::Superseded {
                    (self.on_event)(Event::Superseded);
                    sleep(jittered(self.lease * 2)).await;
                }
                Err(Status::failed_precondition(result.msg))
            }
        }
    }

    /// Asks again for what was not answered; in a new life, binds everybody.
    fn resume(&mut self, new_life: bool) {
        self.outgoing.clear();
        let asked = std::mem::take(&mut self.asked);
        if new_life {
            let pending: HashSet<_> = asked.values().filter_map(Asked::bound).collect();
            let held = self.connections.iter().filter(|(place, _)| !pending.contains(place));
            let again: Vec<Connection> = held.map(|(_, held)| held.connection.clone()).collect();
            again.into_iter().for_each(|connection| self.ask(Asked::Bind(connection, None)));
        }
        asked.into_values().for_each(|asked| self.ask(asked));
    }

    async fn serve(&mut self, stream: &mut Stream, calls: &mut mpsc::Receiver<Call>) -> Left {
        let mut beats = interval(stream.beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let frames = stream.frames.clone();
        while self.epoch != 0 {
            let silent_until = stream.beaten.map(|since| since + BEAT_LIMIT);
            let later = self.later.iter().map(|(when, _)| *when).min();
            tokio::select! {
                frame = stream.answers.message() => match frame {
                    Ok(Some(pb::NodeFrame { body: Some(Down::Drain(_)), .. })) => {
                        return Left::Broken(Status::unavailable("the node stops"));
                    }
                    Ok(Some(frame)) => self.take(stream, frame),
                    Ok(None) => return Left::Broken(Status::unavailable("the node has ended the stream")),
                    Err(status) => return Left::Broken(status),
                },
                // Answers are read meanwhile: a node that waits for them to be read takes no frames.
                place = frames.reserve(), if !self.outgoing.is_empty() => match (place, self.outgoing.pop_front()) {
                    (Ok(place), Some(frame)) => place.send(frame),
                    _ => return Left::Broken(Status::unavailable("the stream has ended")),
                },
                call = calls.recv(), if self.outgoing.len() < QUEUE => match call {
                    Some(call) => self.call(call),
                    None => return Left::Stopped,
                },
                _ = beats.tick() => {
                    stream.beaten.get_or_insert_with(Instant::now);
                    let frame = pb::GatewayFrame { seq: self.next_seq(), body: Some(Up::Heartbeat(self.beat())) };
                    self.outgoing.push_front(frame);
                }
                Some(Ok(Some(node))) = stream.elsewhere.join_next() => {
                    self.node = node + self.nodes.len() - 1; // the next one
                    return Left::Broken(Status::unavailable("the node cannot record heartbeats, another one can"));
                }
                () = at(silent_until) => return Left::Broken(Status::unavailable("the node does not answer heartbeats")),
                () = at(later) => self.ask_due(),
            }
        }
        Left::Broken(Status::failed_precondition("this life is over"))
    }

    fn call(&mut self, call: Call) {
        match call {
            Call::Bind(connection, answer) => {
                let place = (connection.user_id, connection.device_id.clone());
                self.connections.insert(place, Held { connection: connection.clone(), since: Instant::now(), answered: false });
                self.ask(Asked::Bind(connection, Some(answer)));
            }
            Call::Unbind(request, answer) => {
                let place = (request.user_id, request.device_id.clone());
                let held = self.connections.get(&place).filter(|held| held.connection.conn_id == request.conn_id);
                if held.is_some_and(|held| !held.answered) {
                    // Its bind may still be on its way somewhere, and arrive after this.
                    self.later.push((Instant::now() + MAX_EVENT_AGE, Asked::Unbind(request.clone(), None)));
                }
                if held.is_some() {
                    self.connections.remove(&place);
                }
                self.ask(Asked::Unbind(request, Some(answer)));
            }
            Call::Ack(ack) => self.outgoing.push_back(pb::GatewayFrame { seq: 0, body: Some(Up::Ack(ack)) }),
        }
    }

    fn ask(&mut self, asked: Asked) {
        let body = match &asked {
            Asked::Bind(connection, _) => {
                let held = self.connections.get(&(connection.user_id, connection.device_id.clone()));
                match held.filter(|held| held.connection.conn_id == connection.conn_id) {
                    Some(held) => Up::Bind(request(connection, held.since)),
                    None => return, // it is gone
                }
            }
            Asked::Unbind(request, _) => Up::Unbind(request.clone()),
        };
        let seq = self.next_seq();
        self.asked.insert(seq, asked);
        self.outgoing.push_back(pb::GatewayFrame { seq, body: Some(body) });
    }

    fn ask_due(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.later).into_iter().partition(|(when, _)| *when <= now);
        self.later = later;
        let due: Vec<(Instant, Asked)> = due;
        due.into_iter().for_each(|(_, asked)| self.ask(asked));
    }

    fn take(&mut self, stream: &mut Stream, frame: pb::NodeFrame) {
        match frame.body {
            Some(Down::Heartbeat(answer)) => match answer.result.unwrap_or_default().code() {
                Code::Ok => stream.beaten = None,
                Code::Fenced | Code::Superseded => self.epoch = 0,
                _ => self.beat_elsewhere(stream),
            },
            Some(Down::Bound(bound)) => self.bound(frame.seq, bound),
            Some(Down::Unbound(unbound)) => {
                if let Some(Asked::Unbind(_, Some(answer))) = self.asked.remove(&frame.seq) {
                    let _ = answer.send(unbound); // whoever asked may have gone
                }
            }
            Some(Down::Delivery(delivery)) => {
                let Some(calls) = self.calls.upgrade() else { return };
                let (delivery_id, user_id, wanted) = (delivery.delivery_id.clone(), delivery.user_id, delivery.wants_ack);
                (self.on_event)(Event::Delivery(delivery, Acker { calls, delivery_id, user_id, wanted }));
            }
            Some(Down::Kick(kick)) => (self.on_event)(Event::Kick(kick)),
            Some(Down::Drain(_) | Down::Welcome(_)) | None => {}
        }
    }

    fn bound(&mut self, seq: u64, bound: pb::BindRouteResp) {
        let Some(Asked::Bind(connection, answer)) = self.asked.remove(&seq) else { return };
        let place = (connection.user_id, connection.device_id.clone());
        match bound.result.clone().unwrap_or_default().code() {
            Code::Ok => {
                if let Some(held) = self.connections.get_mut(&place) {
                    held.answered |= held.connection.conn_id == connection.conn_id;
                }
            }
            Code::Fenced | Code::Superseded => {
                self.epoch = 0;
                self.asked.insert(seq, Asked::Bind(connection, answer));
                return;
            }
            Code::Unavailable => {
                let pause = jittered(Duration::from_millis(bound.retry_after_ms.max(MIN_RETRY_MS).into()));
                self.later.push((Instant::now() + pause, Asked::Bind(connection, answer)));
                return;
            }
            _ => {
                self.connections.remove(&place);
            }
        }
        match answer {
            Some(answer) => {
                let _ = answer.send(bound); // whoever asked may have gone
            }
            None if bound.result.clone().unwrap_or_default().code() != Code::Ok => {
                (self.on_event)(Event::Lost(connection, bound));
            }
            None => {}
        }
    }

    /// The node is there, but could not record a heartbeat. If another one can, that is the better one; if none can (the
    /// database is away), the stream is worth keeping: it still carries messages.
    fn beat_elsewhere(&self, stream: &mut Stream) {
        stream.beaten = None;
        stream.elsewhere.abort_all();
        let this = self.node % self.nodes.len();
        for (n, node) in self.nodes.iter().enumerate().filter(|(n, _)| *n != this) {
            let (mut client, beat) = (GatewayServiceClient::new(node.clone()), self.beat());
            stream.elsewhere.spawn(async move {
                let answer = timeout(BEAT_LIMIT, client.heartbeat(beat)).await.ok()?.ok()?;
                (answer.into_inner().result.unwrap_or_default().code() == Code::Ok).then_some(n)
            });
        }
    }

    fn beat(&self) -> pb::HeartbeatReq {
        let connections = u32::try_from(self.connections.len()).unwrap_or(u32::MAX);
        let gateway_addr = self.options.gateway_addr.clone();
        pb::HeartbeatReq { gateway_addr, gateway_epoch: self.epoch, connections, ..Default::default() }
    }

    async fn deregister(&mut self) -> Result<(), Status> {
        let request = pb::DeregisterGatewayReq { gateway_addr: self.options.gateway_addr.clone(), gateway_epoch: self.epoch };
        let mut told = Ok(());
        for node in self.nodes.iter().filter(|_| self.epoch != 0) {
            match GatewayServiceClient::new(node.clone()).deregister_gateway(request.clone()).await {
                Ok(_) => return Ok(()),
                Err(status) => told = Err(status),
            }
        }
        told
    }

    fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }
}

impl Asked {
    fn bound(&self) -> Option<(i64, String)> {
        match self {
            Self::Bind(connection, _) => Some((connection.user_id, connection.device_id.clone())),
            Self::Unbind(..) => None,
        }
    }
}

fn request(connection: &Connection, since: Instant) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: connection.user_id,
        device_id: connection.device_id.clone(),
        conn_id: connection.conn_id.clone(),
        platform: connection.platform,
        client_ip: connection.client_ip.clone(),
        client_port: connection.client_port,
        connected_ms_ago: u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX),
        ..Default::default()
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}
