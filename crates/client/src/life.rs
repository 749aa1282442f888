//! One gateway's life as its own process sees it: attached to one node after the other.

use std::pin::pin;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::Code;
use im_presence_proto::gateway_frame::Body as Up;
use im_presence_proto::gateway_service_client::GatewayServiceClient;
use im_presence_proto::node_frame::Body as Down;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::Streaming;

use crate::InvalidAddress;
use crate::at;
use crate::dialogue::Dialogue;
use crate::dialogue::Usage;
use crate::event::Call;
use crate::event::Event;
use crate::event::Options;
use crate::event::QUEUE;
use crate::jittered;
use crate::pauses::Pauses;
use crate::security::Link;
use crate::tour::Tour;

/// For connecting and for the welcome.
const ATTACH_LIMIT: Duration = Duration::from_secs(3);
/// A node that does not answer a heartbeat within this time is left for another one.
const BEAT_LIMIT: Duration = Duration::from_secs(3);

pub struct Life {
    options: Options,
    /// First those of the own zone.
    nodes: Vec<Link>,
    tour: Tour,
    /// 0: none, or it is over.
    epoch: u64,
    /// Another process has begun a life under this address.
    superseded: bool,
    lease: Duration,
    /// As the last heartbeat's answer said.
    is_drained: bool,
    dialogue: Dialogue,
    usage: Usage,
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
    pub fn new(options: Options, dialogue: Dialogue, usage: Usage) -> Result<Self, InvalidAddress> {
        if options.nodes.is_empty() {
            return Err(InvalidAddress { of: "a node", address: String::new() });
        }
        let nodes = options.nodes.iter().chain(&options.other_zones);
        let nodes = nodes.map(|node| options.security.link(node, ATTACH_LIMIT)).collect::<Result<Vec<_>, _>>()?;
        let turn = usize::try_from(uuid::Uuid::new_v4().as_u128() % 64).unwrap_or(0);
        let tour = Tour::new(options.nodes.len(), nodes.len(), turn);
        Ok(Self { options, nodes, tour, epoch: 0, superseded: false, lease: Duration::ZERO, is_drained: false, dialogue, usage })
    }

    /// Goes on until it is dropped.
    pub async fn keep_attached(&mut self, calls: &mut mpsc::Receiver<Call>) {
        let mut pauses = Pauses::new();
        loop {
            if std::mem::take(&mut self.superseded) {
                self.dialogue.tell(Event::Superseded);
                let pause = jittered(self.lease * 2);
                self.meanwhile(calls, sleep(pause)).await;
            }
            let (began, claimed) = (Instant::now(), self.epoch);
            let hello = pb::GatewayFrame { seq: self.dialogue.next_seq(), body: Some(Up::Hello(self.hello())) };
            let attaching = timeout(ATTACH_LIMIT, attach(self.nodes[self.tour.now()].clone(), hello));
            let attached = self.meanwhile(calls, attaching).await;
            let attached = attached.unwrap_or_else(|_| Err(Status::deadline_exceeded("no welcome came in time")));
            let status = match attached.and_then(|(stream, welcome)| self.welcome(welcome).map(|()| stream)) {
                Ok(mut stream) => {
                    self.dialogue.tell(Event::Attached { epoch: self.epoch });
                    pauses.reset();
                    self.tour.settle();
                    self.dialogue.resume(claimed != self.epoch);
                    self.serve(&mut stream, calls).await
                }
                Err(status) => status,
            };
            if status.code() == tonic::Code::Unauthenticated {
                self.nodes.iter().for_each(|node| _ = node.renew()); // with what the files say now
            }
            if status.code() == tonic::Code::InvalidArgument {
                self.dialogue.refuse_statuses(status.message());
            }
            self.dialogue.tell(Event::Detached(status));
            self.tour.go_on();
            self.meanwhile(calls, pauses.after(began)).await;
        }
    }

    /// Without a stream calls are taken nevertheless: what is known is told, and the rest is asked on the next stream.
    async fn meanwhile<T>(&mut self, calls: &mut mpsc::Receiver<Call>, doing: impl Future<Output = T>) -> T {
        let mut doing = pin!(doing);
        loop {
            tokio::select! {
                done = &mut doing => return done,
                Some(call) = calls.recv(), if self.dialogue.has_room() => self.dialogue.call(call),
            }
        }
    }

    fn hello(&self) -> pb::RegisterGatewayReq {
        pb::RegisterGatewayReq {
            gateway_addr: self.options.gateway_addr.clone(),
            region: self.options.region.clone(),
            capacity: self.options.capacity,
            weight: self.options.weight,
            public_addr: self.options.public_addr.clone(),
            login_rate: self.options.login_rate,
            labels: self.options.labels.clone(),
            gateway_epoch: self.epoch,
        }
    }

    fn welcome(&mut self, welcome: pb::RegisterGatewayResp) -> Result<(), Status> {
        let result = welcome.result.unwrap_or_default();
        match result.code() {
            Code::Ok => {
                self.epoch = welcome.gateway_epoch;
                self.lease = Duration::from_millis(welcome.lease_ms.into());
                Ok(())
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

    /// Until the stream ends, or is worth no more.
    async fn serve(&mut self, stream: &mut Stream, calls: &mut mpsc::Receiver<Call>) -> Status {
        let mut beats = interval(stream.beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (frames, usage) = (stream.frames.clone(), self.usage.clone());
        while self.epoch != 0 {
            let (silent_until, due) = (stream.beaten.map(|since| since + BEAT_LIMIT), self.dialogue.due());
            tokio::select! {
                frame = stream.answers.message() => match frame {
                    Ok(Some(pb::NodeFrame { body: Some(Down::Drain(drain)), .. })) if drain.reason() != pb::Reason::Drain => {
                        return Status::unavailable("the node stops");
                    }
                    Ok(Some(frame)) => self.take(stream, frame),
                    Ok(None) => return Status::unavailable("the node has ended the stream"),
                    Err(status) => return status,
                },
                // Answers are read meanwhile: a node that waits for them to be read takes no frames.
                place = frames.reserve(), if self.dialogue.has_frame() => match (place, self.dialogue.pop_frame()) {
                    (Ok(place), Some(frame)) => place.send(frame),
                    _ => return Status::unavailable("the stream has ended"),
                },
                Some(call) = calls.recv(), if self.dialogue.has_room() => self.dialogue.call(call),
                _ = beats.tick() => {
                    stream.beaten.get_or_insert_with(Instant::now);
                    let beat = self.beat();
                    self.dialogue.push_heartbeat(beat);
                }
                Some(Ok(Some(node))) = stream.elsewhere.join_next() => {
                    self.tour.next_is(node);
                    return Status::unavailable("the node cannot record heartbeats, another one can");
                }
                () = at(silent_until) => return Status::unavailable("the node does not answer heartbeats"),
                () = usage.changed() => {} // `due` has
                () = at(due) => self.dialogue.look(),
            }
        }
        Status::failed_precondition("this life is over")
    }

    fn take(&mut self, stream: &mut Stream, frame: pb::NodeFrame) {
        let Some(Down::Heartbeat(answer)) = frame.body else {
            if let Some(code) = self.dialogue.take(frame) {
                self.over(code);
            }
            return;
        };
        match answer.result.unwrap_or_default().code() {
            Code::Ok => {
                stream.beaten = None;
                if std::mem::replace(&mut self.is_drained, answer.draining) != answer.draining {
                    self.dialogue.tell(Event::Draining(answer.draining));
                }
            }
            code @ (Code::Fenced | Code::Superseded) => self.over(code),
            _ => self.beat_elsewhere(stream),
        }
    }

    /// The node is there, but could not record a heartbeat. If another one can, that is the better one; if none can (the
    /// database is away), the stream is worth keeping: it still carries messages.
    fn beat_elsewhere(&self, stream: &mut Stream) {
        stream.beaten = None;
        stream.elsewhere.abort_all();
        let this = self.tour.now();
        for (n, node) in self.nodes.iter().enumerate().filter(|(n, _)| *n != this) {
            let (mut client, beat) = (GatewayServiceClient::new(node.clone()), self.beat());
            stream.elsewhere.spawn(async move {
                let answer = timeout(BEAT_LIMIT, client.heartbeat(beat)).await.ok()?.ok()?;
                (answer.into_inner().result.unwrap_or_default().code() == Code::Ok).then_some(n)
            });
        }
    }

    fn beat(&self) -> pb::HeartbeatReq {
        let connections = u32::try_from(self.dialogue.connections()).unwrap_or(u32::MAX);
        let gateway_addr = self.options.gateway_addr.clone();
        let digest = self.dialogue.digest().filter(|_| self.options.binds_alone);
        let (routes_digest, routes) = (digest.map(|(digest, _)| digest), digest.map_or(0, |(_, routes)| routes));
        pb::HeartbeatReq { gateway_addr, gateway_epoch: self.epoch, connections, routes_digest, routes, ..Default::default() }
    }

    pub async fn deregister(&mut self) -> Result<(), Status> {
        let request = pb::DeregisterGatewayReq { gateway_addr: self.options.gateway_addr.clone(), gateway_epoch: self.epoch };
        let mut told = Ok(());
        let this = self.tour.now();
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
}

/// Says hello to a node, and hears what it says to that.
async fn attach(node: Link, hello: pb::GatewayFrame) -> Result<(Stream, pb::RegisterGatewayResp), Status> {
    let (frames, queue) = mpsc::channel(QUEUE);
    let _ = frames.send(hello).await; // the answer tells
    let mut answers = GatewayServiceClient::new(node).attach(ReceiverStream::new(queue)).await?.into_inner();
    let Some(Down::Welcome(welcome)) = answers.message().await?.and_then(|frame| frame.body) else {
        return Err(Status::internal("the node did not begin with a welcome"));
    };
    let beat = Duration::from_millis(welcome.heartbeat_interval_ms.max(1).into());
    Ok((Stream { frames, answers, beat, beaten: None, elsewhere: JoinSet::new() }, welcome))
}
