//! One gateway's life as its own process sees it: attached to one node after the other.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::collections::VecDeque;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::Code;
use im_presence_proto::gateway_frame::Body as Up;
use im_presence_proto::gateway_service_client::GatewayServiceClient;
use im_presence_proto::node_frame::Body as Down;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::Streaming;

use crate::InvalidAddress;
use crate::connections::Connections;
use crate::event::Acker;
use crate::event::Call;
use crate::event::Connection;
use crate::event::Event;
use crate::event::Options;
use crate::event::QUEUE;
use crate::event::refusal;
use crate::jittered;
use crate::security::Link;

/// For connecting and for the welcome.
const ATTACH_LIMIT: Duration = Duration::from_secs(3);
/// A node that does not answer a heartbeat within this time is left for another one.
const BEAT_LIMIT: Duration = Duration::from_secs(3);
/// Between attempts to attach: from, to.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// What nodes drop as too old. A bind that was not answered may still be carried out until then.
const MAX_EVENT_AGE: Duration = Duration::from_secs(5);
/// Before what a node could not store is asked again, beyond the time that the node has named.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// A request without an answer yet: it is made again on the next stream.
enum Asked {
    Bind(Connection, Option<oneshot::Sender<pb::BindRouteResp>>),
    Unbind(pb::UnbindRouteReq, Option<oneshot::Sender<pb::UnbindRouteResp>>),
}

pub struct Life {
    options: Options,
    nodes: Vec<Link>,
    node: usize,
    /// 0: none, or it is over.
    epoch: u64,
    /// Another process has begun a life under this address.
    superseded: bool,
    lease: Duration,
    seq: u64,
    connections: Connections,
    asked: BTreeMap<u64, Asked>,
    /// Frames that wait for the transport.
    outgoing: VecDeque<pb::GatewayFrame>,
    /// What is asked again then.
    later: BTreeMap<(Instant, u64), Asked>,
    calls: mpsc::WeakSender<Call>,
    on_event: Box<dyn Fn(Event) + Send + Sync>,
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

impl Life {
    pub fn new(
        options: Options,
        calls: mpsc::WeakSender<Call>,
        on_event: Box<dyn Fn(Event) + Send + Sync>,
    ) -> Result<Self, InvalidAddress> {
        let nodes = options.nodes.iter().map(|node| options.security.link(node, ATTACH_LIMIT)).collect::<Result<Vec<_>, _>>()?;
        if nodes.is_empty() {
            return Err(InvalidAddress { of: "a node", address: String::new() });
        }
        Ok(Self {
            options,
            nodes,
            node: usize::try_from(uuid::Uuid::new_v4().as_u128() % 64).unwrap_or(0),
            epoch: 0,
            superseded: false,
            lease: Duration::ZERO,
            seq: 0,
            connections: Connections::default(),
            asked: BTreeMap::new(),
            outgoing: VecDeque::new(),
            later: BTreeMap::new(),
            calls,
            on_event,
        })
    }

    /// Goes on until it is dropped.
    pub async fn keep_attached(&mut self, calls: &mut mpsc::Receiver<Call>) {
        let mut pause = PAUSES.0;
        loop {
            if std::mem::take(&mut self.superseded) {
                (self.on_event)(Event::Superseded);
                sleep(jittered(self.lease * 2)).await;
            }
            let (began, claimed) = (Instant::now(), self.epoch);
            let status = match timeout(ATTACH_LIMIT, self.attach()).await {
                Ok(Ok(mut stream)) => {
                    (self.on_event)(Event::Attached { epoch: self.epoch });
                    pause = PAUSES.0;
                    self.resume(claimed != self.epoch);
                    self.serve(&mut stream, calls).await
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no welcome came in time"),
            };
            if status.code() == tonic::Code::Unauthenticated {
                self.nodes.iter().for_each(|node| _ = node.renew()); // with what the files say now
            }
            (self.on_event)(Event::Detached(status));
            self.node += 1;
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
                self.over(code);
                Err(Status::failed_precondition(result.msg))
            }
        }
    }

    fn over(&mut self, code: Code) {
        self.epoch = 0;
        self.superseded |= code == Code::Superseded;
    }

    /// Asks again for what was not answered; in a new life, binds everybody.
    fn resume(&mut self, new_life: bool) {
        self.outgoing.retain(|frame| matches!(frame.body, Some(Up::Ack(_))));
        self.connections.forget_early_kicks();
        let asked = std::mem::take(&mut self.asked);
        if new_life {
            let pending: HashSet<_> = asked.values().filter_map(Asked::connection).collect();
            let again: Vec<_> = self.connections.all().filter(|held| !pending.contains(held)).cloned().collect();
            again.into_iter().for_each(|connection| self.ask(Asked::Bind(connection, None)));
        }
        asked.into_values().for_each(|asked| self.ask(asked));
    }

    /// Until the stream ends, or is worth no more.
    async fn serve(&mut self, stream: &mut Stream, calls: &mut mpsc::Receiver<Call>) -> Status {
        let mut beats = interval(stream.beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let frames = stream.frames.clone();
        while self.epoch != 0 {
            let silent_until = stream.beaten.map(|since| since + BEAT_LIMIT);
            let later = self.later.first_key_value().map(|((when, _), _)| *when);
            tokio::select! {
                frame = stream.answers.message() => match frame {
                    Ok(Some(pb::NodeFrame { body: Some(Down::Drain(_)), .. })) => {
                        return Status::unavailable("the node stops");
                    }
                    Ok(Some(frame)) => self.take(stream, frame),
                    Ok(None) => return Status::unavailable("the node has ended the stream"),
                    Err(status) => return status,
                },
                // Answers are read meanwhile: a node that waits for them to be read takes no frames.
                place = frames.reserve(), if !self.outgoing.is_empty() => match (place, self.outgoing.pop_front()) {
                    (Ok(place), Some(frame)) => place.send(frame),
                    _ => return Status::unavailable("the stream has ended"),
                },
                Some(call) = calls.recv(), if self.outgoing.len() < QUEUE => self.call(call),
                _ = beats.tick() => {
                    stream.beaten.get_or_insert_with(Instant::now);
                    let frame = pb::GatewayFrame { seq: self.next_seq(), body: Some(Up::Heartbeat(self.beat())) };
                    self.outgoing.push_front(frame);
                }
                Some(Ok(Some(node))) = stream.elsewhere.join_next() => {
                    self.node = node + self.nodes.len() - 1; // the next one
                    return Status::unavailable("the node cannot record heartbeats, another one can");
                }
                () = at(silent_until) => return Status::unavailable("the node does not answer heartbeats"),
                () = at(later) => self.ask_due(),
            }
        }
        Status::failed_precondition("this life is over")
    }

    fn call(&mut self, call: Call) {
        match call {
            Call::Bind(connection, answer) => {
                self.connections.insert(&connection);
                self.ask(Asked::Bind(connection, Some(answer)));
            }
            Call::Unbind(request, answer) => {
                if self.connections.ended(request.user_id, &request.device_id, &request.conn_id) {
                    // Its bind may still be on its way somewhere, and arrive after this.
                    self.ask_later(MAX_EVENT_AGE, Asked::Unbind(request.clone(), None));
                }
                self.ask(Asked::Unbind(request, Some(answer)));
            }
            Call::Ack(ack) => self.outgoing.push_back(pb::GatewayFrame { seq: 0, body: Some(Up::Ack(ack)) }),
        }
    }

    fn ask(&mut self, asked: Asked) {
        let body = match asked {
            Asked::Bind(ref connection, _) => self.connections.bind_request(connection).map(Up::Bind),
            Asked::Unbind(ref request, _) => Some(Up::Unbind(request.clone())),
        };
        if body.is_some() {
            let seq = self.next_seq();
            self.asked.insert(seq, asked);
            self.outgoing.push_back(pb::GatewayFrame { seq, body });
        } else if let Asked::Bind(_, Some(answer)) = asked {
            let _ = answer.send(refusal(Code::Refused, "this connection has ended")); // whoever asked may have gone
        }
    }

    fn ask_later(&mut self, pause: Duration, asked: Asked) {
        let seq = self.next_seq(); // tells apart what is due at the same time
        self.later.insert((Instant::now() + pause, seq), asked);
    }

    fn ask_due(&mut self) {
        let later = self.later.split_off(&(Instant::now(), 0));
        std::mem::replace(&mut self.later, later).into_values().for_each(|asked| self.ask(asked));
    }

    fn take(&mut self, stream: &mut Stream, frame: pb::NodeFrame) {
        match frame.body {
            Some(Down::Heartbeat(answer)) => match answer.result.unwrap_or_default().code() {
                Code::Ok => stream.beaten = None,
                code @ (Code::Fenced | Code::Superseded) => self.over(code),
                _ => self.beat_elsewhere(stream),
            },
            Some(Down::Bound(bound)) => self.bound(frame.seq, bound),
            Some(Down::Unbound(unbound)) => self.unbound(frame.seq, unbound),
            Some(Down::Delivery(delivery)) => {
                let Some(calls) = self.calls.upgrade() else { return };
                let (delivery_id, user_id, wanted) = (delivery.delivery_id.clone(), delivery.user_id, delivery.wants_ack);
                (self.on_event)(Event::Delivery(delivery, Acker { calls, delivery_id, user_id, wanted }));
            }
            Some(Down::Kick(kick)) => self.kick(kick),
            Some(Down::Drain(_) | Down::Welcome(_) | Down::Watched(_) | Down::Status(_)) | None => {}
        }
    }

    fn bound(&mut self, seq: u64, bound: pb::BindRouteResp) {
        let Some(Asked::Bind(connection, answer)) = self.asked.remove(&seq) else { return };
        let code = bound.result.as_ref().map_or(Code::Internal, pb::Result::code);
        let mut early = None;
        match code {
            Code::Ok => early = self.connections.bound(&connection, &bound.route_key),
            Code::Fenced | Code::Superseded => {
                self.over(code);
                self.asked.insert(seq, Asked::Bind(connection, answer));
                return;
            }
            Code::Unavailable => {
                let pause = Duration::from_millis(bound.retry_after_ms.into()) + jittered(RETRY_AFTER);
                self.ask_later(pause, Asked::Bind(connection, answer));
                return;
            }
            _ => self.connections.refused(&connection),
        }
        match answer {
            Some(answer) => _ = answer.send(bound), // whoever asked may have gone
            None if code != Code::Ok => (self.on_event)(Event::Lost(connection, bound)),
            None => {}
        }
        early.into_iter().for_each(|kick| self.kick(kick));
    }

    fn unbound(&mut self, seq: u64, unbound: pb::UnbindRouteResp) {
        let Some(Asked::Unbind(request, answer)) = self.asked.remove(&seq) else { return };
        match unbound.result.as_ref().map_or(Code::Internal, pb::Result::code) {
            Code::Unavailable => {
                self.ask_later(jittered(RETRY_AFTER), Asked::Unbind(request, answer));
                return;
            }
            code @ (Code::Fenced | Code::Superseded) => self.over(code), // and so is the route
            _ => {}
        }
        if let Some(answer) = answer {
            let _ = answer.send(unbound); // whoever asked may have gone
        }
    }

    fn kick(&mut self, kick: pb::Kick) {
        if let Some(connection) = self.connections.kicked(&kick) {
            (self.on_event)(Event::Kick(connection, kick));
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

    pub async fn deregister(&mut self) -> Result<(), Status> {
        let request = pb::DeregisterGatewayReq { gateway_addr: self.options.gateway_addr.clone(), gateway_epoch: self.epoch };
        let mut told = Ok(());
        let this = self.node % self.nodes.len();
        for node in self.nodes[this..].iter().chain(&self.nodes[..this]).filter(|_| self.epoch != 0) {
            let mut client = GatewayServiceClient::new(node.clone());
            match timeout(BEAT_LIMIT, client.deregister_gateway(request.clone())).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) => told = Err(status),
                Err(_) => told = Err(Status::deadline_exceeded("no node answered in time")),
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
    fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Bind(connection, _) => Some(connection),
            Self::Unbind(..) => None,
        }
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}
