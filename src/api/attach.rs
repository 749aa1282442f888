//! `GatewayService.Attach`: moves frames between a gateway's socket and the engine. What may come when is decided by
//! [`Session`]; here nothing is.
//!
//! Answers go before orders, and a gateway that does not read them is not read from: nothing here grows without bound.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::Status;
use tonic::Streaming;

use crate::api::binder::Binder;
use crate::api::convert;
use crate::api::credential::Credential;
use crate::api::credential::revoked;
use crate::api::digests;
use crate::api::status::status;
use crate::api::statuses;
use crate::api::to_gateway;
use crate::api::to_gateway::Outgoing;
use crate::api::to_gateway::ToGateway;
use crate::api::to_gateway::Written;
use crate::api::to_gateway::next_for;
use crate::api::watch;
use crate::api::watch::WatchContext;
use crate::domain::caller::GatewayPatterns;
use crate::domain::event::SetStatus;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::session::Frame;
use crate::domain::session::Session;
use crate::engine::gateways::attaching::Attaching;
use crate::engine::gateways::attaching::End;
use crate::engine::gateways::digests::Digests;
use crate::engine::gateways::digests::Holder;
use crate::engine::gateways::heartbeats::Heartbeats;
use crate::engine::messages::acks::Ack;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::streams::Attached;
use crate::engine::presence::statuses::Statuses;
use crate::engine::presence::watches::Told;
use crate::engine::presence::watches::Watch;
use crate::engine::presence::watches::Watches;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::error::Error;
use crate::pb;
use crate::pb::gateway_frame::Body as Up;
use crate::pb::node_frame::Body as Down;

/// Frames that wait for the transport; more only when the gateway reads.
pub const OUTGOING: usize = 64;
/// Binds, unbinds and heartbeats of one stream that are under way or whose answers wait.
const MAX_IN_FLIGHT: usize = 1_024;
/// A gateway says hello within this time.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// How long a gateway has for its last frames, once this node stops.
pub const DRAIN_TIME: Duration = Duration::from_secs(1);
/// The same, as it is told.
const DRAIN_DEADLINE_MS: u32 = 1_000;

/// What streams work with.
pub struct StreamContext {
    pub attaching: Arc<Attaching>,
    pub digests: Arc<Digests>,
    pub heartbeats: Arc<Heartbeats>,
    pub binder: Arc<Binder>,
    pub acks: Arc<Acks>,
    pub peers: Arc<Peers>,
    pub lives: Arc<Lives>,
    pub statuses: Arc<Statuses>,
    pub watches: Arc<Watches>,
    pub watching: Arc<WatchContext>,
    /// This node stops: streams end, leases stay.
    pub draining: CancellationToken,
}

/// One gateway's stream.
pub struct Stream {
    tools: Arc<StreamContext>,
    credential: Option<Credential>,
    session: Session,
    /// For whom it acknowledges, once it is attached.
    speaker: Option<Arc<GatewayPatterns>>,
    attached: Option<Attached>,
    /// What it says of its connections, once it is attached.
    holder: Option<Holder>,
    /// What its clients want to know of others. None: nobody has asked.
    watch: Option<Watch>,
    /// Frames that asked for that, in the order in which they are answered.
    watching: VecDeque<u64>,
    /// The gateway was told that it is drained.
    is_drained: bool,
    /// It is not of the last release, for which any `drain` means that this node stops: it would attach anew without end.
    knows_moves: bool,
    /// Polled inside this task: a task per request would cost more than the request itself.
    in_flight: FuturesUnordered<BoxFuture<'static, pb::NodeFrame>>,
    answers: VecDeque<pb::NodeFrame>,
    out: Outgoing,
}

impl Stream {
    pub fn new(tools: Arc<StreamContext>, credential: Option<Credential>, out: Outgoing) -> Self {
        let (session, in_flight, answers) = (Session::default(), FuturesUnordered::new(), VecDeque::new());
        let (watch, watching, holder) = (None, VecDeque::new(), None);
        Self {
            tools,
            credential,
            session,
            speaker: None,
            attached: None,
            holder,
            watch,
            is_drained: false,
            knows_moves: false,
            watching,
            in_flight,
            answers,
            out,
        }
    }

    /// Serves the gateway until one of both ends it.
    pub async fn run(mut self, mut frames: Streaming<pb::GatewayFrame>) {
        let (mut end, status) = self.serve(&mut frames).await;
        if self.tools.draining.is_cancelled() {
            end = End::Ours; // it was asked to go
        }
        if let Some((epoch, no)) = self.session.end() {
            self.tools.attaching.detach(epoch, no, end).await;
        }
        if let Some(status) = status {
            let _ = self.out.try_send((Err(status), None)); // a gateway that does not read will see the end without a reason
        }
    }

    async fn serve(&mut self, frames: &mut Streaming<pb::GatewayFrame>) -> (End, Option<Status>) {
        let (tools, out) = (self.tools.clone(), self.out.clone());
        let hello_by = Instant::now() + HELLO_LIMIT;
        let mut drain_until: Option<Instant> = None;
        let admission = self.credential.as_ref().map(|credential| credential.admission().clone());
        let mut revoked = pin!(revoked(admission));
        loop {
            let takes_more = self.watch.as_ref().is_none_or(Watch::takes_more);
            let may_read = takes_more && self.in_flight.len() + self.answers.len() < MAX_IN_FLIGHT;
            let is_attached = self.attached.is_some();
            let replaced = self.attached.as_ref().map(|attached| attached.replaced.clone()).unwrap_or_default();
            tokio::select! {
                biased;
                () = replaced.cancelled() => return (End::Ours, Some(Status::aborted("a newer stream of this gateway, or the end of its life, ended this one"))),
                // The lease stays: a slip of an operator must not take the gateway's users offline.
                () = &mut revoked => return (End::Ours, Some(Status::unauthenticated("the credential of this stream is not valid any more"))),
                () = tools.draining.cancelled(), if drain_until.is_none() => {
                    let reason = pb::Reason::Restart.into();
                    self.answers.push_back(frame(0, Down::Drain(pb::Drain { deadline_ms: DRAIN_DEADLINE_MS, reason })));
                    drain_until = Some(Instant::now() + DRAIN_TIME);
                }
                () = until(drain_until) => return (End::Ours, Some(Status::unavailable("this node stops: attach to another one with your epoch"))),
                () = sleep_until(hello_by.into()), if !is_attached => return (End::Ours, Some(Status::deadline_exceeded("no hello came in time"))),
                place = out.reserve(), if !self.answers.is_empty() => match (place, self.answers.pop_front()) {
                    (Ok(place), Some(answer)) => {
                        place.send((Ok(answer), None));
                        self.send_more(&out);
                    }
                    _ => return (End::Theirs, None),
                },
                Some(answer) = self.in_flight.next() => {
                    self.note_answer(answer);
                    while let Some(Some(answer)) = self.in_flight.next().now_or_never() {
                        self.note_answer(answer); // a batch's answers come together
                    }
                }
                read = frames.next(), if may_read => match read {
                    Some(Ok(frame)) => if let Err(status) = self.take(frame).await {
                        return (End::Theirs, Some(status));
                    },
                    Some(Err(status)) => return (End::Theirs, Some(unreadable(status))),
                    None => return (End::Theirs, None),
                },
                next = next_for(&out, self.attached.as_mut(), self.holder.as_mut(), self.watch.as_ref()), if is_attached => {
                    let Some(next) = next else { return (End::Theirs, None) };
                    self.pass_on(next);
                    // What waits already goes with it: a turn of this loop costs more than a frame.
                    while let Some(Some(next)) =
                        next_for(&out, self.attached.as_mut(), self.holder.as_mut(), self.watch.as_ref()).now_or_never()
                    {
                        self.pass_on(next);
                    }
                },
            }
        }
    }

    fn pass_on(&mut self, (place, next): (mpsc::Permit<'_, Written>, ToGateway)) {
        let (frame, held) = match next {
            ToGateway::Order((order, held)) => (frame(0, to_gateway::order(order)), Some(held)),
            ToGateway::Told(told) => {
                let seq = if let Told::Done(_) = told { self.watching.pop_front().unwrap_or(0) } else { 0 };
                (frame(seq, Down::Watched(self.tools.watching.told(told))), None)
            }
            ToGateway::Query(seq, query) => (frame(seq, digests::query(query)), None),
        };
        place.send((Ok(frame), held));
    }

    fn note_answer(&mut self, answer: pb::NodeFrame) {
        if let Some(Down::Heartbeat(pb::HeartbeatResp { result: Some(result), draining, .. })) = &answer.body
            && result.code() == pb::Code::Ok
            && std::mem::replace(&mut self.is_drained, *draining) != *draining
            && *draining
            && self.knows_moves
        {
            let drain = pb::Drain { deadline_ms: 0, reason: pb::Reason::Drain.into() };
            self.answers.push_back(frame(0, Down::Drain(drain)));
        }
        if answer.seq != 0 {
            self.answers.push_back(answer);
        }
    }

    /// Sends answers as long as there is room.
    fn send_more(&mut self, out: &Outgoing) {
        while !self.answers.is_empty() {
            let Ok(place) = out.try_reserve() else { return };
            if let Some(answer) = self.answers.pop_front() {
                place.send((Ok(answer), None));
            }
        }
    }

    /// Takes one frame.
    ///
    /// # Errors
    /// The frame is illegal where it stands, or what it says is invalid: the stream ends.
    async fn take(&mut self, frame: pb::GatewayFrame) -> Result<(), Status> {
        let seq = frame.seq;
        let (kind, name) = match &frame.body {
            Some(Up::Hello(_)) => (Frame::Hello, "hello"),
            Some(Up::Heartbeat(_)) => (Frame::Heartbeat, "heartbeat"),
            Some(Up::Bind(_)) => (Frame::Bind, "bind"),
            Some(Up::Unbind(_)) => (Frame::Unbind, "unbind"),
            Some(Up::Ack(_)) => (Frame::Ack, "ack"),
            Some(Up::Watch(_)) => (Frame::Watch, "watch"),
            Some(Up::Status(_)) => (Frame::Status, "status"),
            Some(Up::Digest(_)) => (Frame::Digest, "digest"),
            None => {
                return Err(Status::invalid_argument(format!("frame {seq}: it is empty, or of a kind this node does not know")));
            }
        };
        let illegal = |why: &dyn std::fmt::Display| Status::invalid_argument(format!("{name} (seq {seq}): {why}"));
        self.session.allows(kind).map_err(|why| illegal(&why))?;
        if let Some(attached) = &self.attached {
            attached.figures.note_frame();
        }
        match frame.body {
            Some(Up::Hello(hello)) => self.hello(seq, hello).await,
            Some(Up::Heartbeat(beat)) => self.heartbeat(seq, beat).map_err(|why| illegal(&why)),
            Some(Up::Bind(bind)) => self.bind(seq, &bind).map_err(|why| illegal(&why)),
            Some(Up::Unbind(unbind)) => self.unbind(seq, unbind).map_err(|why| illegal(&why)),
            Some(Up::Ack(ack)) => self.ack(&ack).map_err(|why| illegal(&why)),
            Some(Up::Watch(wanted)) => self.watch(seq, &wanted).await.map_err(|why| illegal(&why)),
            Some(Up::Status(set)) => {
                self.status(seq, &set);
                Ok(())
            }
            Some(Up::Digest(answer)) => self.digest(seq, answer).map_err(|why| illegal(&why)),
            None => Ok(()),
        }
    }

    async fn hello(&mut self, seq: u64, hello: pb::RegisterGatewayReq) -> Result<(), Status> {
        self.knows_moves |= hello.weight.is_some();
        let refused = |error| match error {
            Error::Invalid { .. } => Status::invalid_argument(format!("hello (seq {seq}): {error}")),
            error => status(&error),
        };
        let registration = convert::registration(hello).map_err(refused)?;
        let gateway = registration.gateway.clone();
        if let Some(credential) = &self.credential {
            credential.admission().check_gateway(&gateway)?;
        }
        let welcome = match self.tools.attaching.attach(registration).await.map_err(refused)? {
            Ok((life, attached)) => {
                self.speaker = Some(Arc::new(GatewayPatterns::exactly(&gateway)));
                self.holder = Some(self.tools.digests.attach(gateway.clone(), life.epoch));
                self.session.attach(gateway, life.epoch, life.attach_no);
                if let Some(credential) = &self.credential {
                    attached.figures.set_caller(&credential.admission().identity.caller.name);
                }
                self.attached = Some(attached);
                convert::welcome(life.epoch, &self.tools.attaching.terms())
            }
            Err(fence) => pb::RegisterGatewayResp { result: convert::fenced(fence), ..Default::default() },
        };
        self.answers.push_back(frame(seq, Down::Welcome(welcome)));
        Ok(())
    }

    fn heartbeat(&mut self, seq: u64, mut beat: pb::HeartbeatReq) -> Result<(), String> {
        let (gateway, epoch) = self.speaks_for(&beat.gateway_addr, beat.gateway_epoch)?;
        (beat.gateway_addr, beat.gateway_epoch) = (gateway.to_string(), epoch.0);
        self.knows_moves |= beat.routes_digest.is_some();
        let said = digests::said(&beat);
        let (gateway, beat) = convert::beat(&beat).map_err(|error| error.to_string())?;
        self.holder.iter().for_each(|holder| holder.beat(said));
        let tools = self.tools.clone();
        self.answer(seq, async move {
            let answer = match tools.heartbeats.beat(gateway, beat).await {
                Ok(Ok(life)) => convert::beaten(&life, tools.lives.clock.now()),
                Ok(Err(fence)) => pb::HeartbeatResp { result: convert::fenced(fence), ..Default::default() },
                Err(error) => {
                    pb::HeartbeatResp { result: convert::result(pb::Code::Unavailable, error.to_string()), ..Default::default() }
                }
            };
            Down::Heartbeat(answer)
        });
        Ok(())
    }

    fn bind(&mut self, seq: u64, bind: &pb::BindRouteReq) -> Result<(), String> {
        let (gateway, epoch) = self.speaks_for(&bind.gateway_addr, bind.gateway_epoch)?;
        let (user, bind) = convert::bind_on(gateway.clone(), Some(epoch), bind).map_err(|error| error.to_string())?;
        let taken = self.credential.as_ref().map_or(Ok(()), |credential| credential.admission().take_call());
        let binder = self.tools.binder.clone();
        let begun = taken.and_then(|()| binder.begin(user, Change::Bind(bind)));
        self.answer(seq, async move { Down::Bound(binder.finish_bind(user, begun).await) });
        Ok(())
    }

    fn unbind(&mut self, seq: u64, mut unbind: pb::UnbindRouteReq) -> Result<(), String> {
        let (gateway, epoch) = self.speaks_for(&unbind.gateway_addr, unbind.gateway_epoch)?;
        (unbind.gateway_addr, unbind.gateway_epoch) = (gateway.to_string(), epoch.0);
        let (user, unbind) = convert::unbind(&unbind, None).map_err(|error| error.to_string())?;
        let (binder, begun) = (self.tools.binder.clone(), self.tools.binder.begin(user, Change::Unbind(unbind)));
        self.answer(seq, async move { Down::Unbound(binder.finish_unbind(begun).await) });
        Ok(())
    }

    fn ack(&self, ack: &pb::DeliveryAck) -> Result<(), String> {
        let ack = Ack { by: self.speaker.clone(), ..convert::ack(ack).map_err(|error| error.to_string())? };
        self.tools.peers.take_acks(&self.tools.acks, vec![ack]);
        Ok(())
    }

    async fn watch(&mut self, seq: u64, request: &pb::WatchReq) -> Result<(), String> {
        let wanted = watch::wanted(request).map_err(|error| error.to_string())?;
        let watch = match self.watch.take().map_or_else(|| self.tools.watches.open(), Ok) {
            Ok(watch) => self.watch.insert(watch),
            Err(error) => {
                let refused = watch::refused(request.seq, error.to_string());
                self.answers.push_back(frame(seq, Down::Watched(refused)));
                return Ok(());
            }
        };
        self.watching.push_back(seq);
        let caller = self.credential.as_ref().map(Credential::admission);
        self.tools.watching.change(watch, caller, wanted).await;
        Ok(())
    }

    fn status(&mut self, seq: u64, set: &pb::SetStatusReq) {
        let statuses = self.tools.statuses.clone();
        let (user, set) = match statuses::set_status(set, statuses.max_text_bytes) {
            Ok(set) => set,
            Err(error) => {
                // What a user has typed must not end everybody's stream.
                let answer = statuses::status_set_or_code(Err(error));
                self.answers.extend((seq != 0).then(|| frame(seq, Down::Status(answer))));
                return;
            }
        };
        let taken = self.credential.as_ref().map_or(Ok(()), |credential| credential.admission().take_call());
        let begun = taken.and_then(|()| statuses.begin(user, SetStatus { by: self.speaker.clone(), ..set }));
        self.answer(seq, async move { Down::Status(statuses::status_set_or_code(statuses.finish(begun).await)) });
    }

    fn digest(&self, seq: u64, answer: pb::DigestAnswer) -> Result<(), String> {
        let part = digests::part(answer).map_err(|error| error.to_string())?;
        self.holder.as_ref().map_or(Ok(()), |holder| holder.answer(seq, part)).map_err(|illegal| illegal.to_string())
    }

    fn speaks_for(&self, addr: &str, claimed: u64) -> Result<(&GatewayAddr, Epoch), String> {
        self.session.speaks_for(addr, claimed).map_err(|illegal| illegal.to_string())
    }

    /// Answers with the same seq once it is known what to say.
    fn answer(&mut self, seq: u64, body: impl Future<Output = Down> + Send + 'static) {
        self.in_flight.push(async move { frame(seq, body.await) }.boxed());
    }
}

/// What a gateway is told of a frame that cannot be read. If it is gone, nobody hears it.
fn unreadable(status: Status) -> Status {
    match status.code() {
        Code::Internal => Status::invalid_argument(format!("a frame that is no GatewayFrame: {}", status.message())),
        _ => status,
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

fn frame(seq: u64, body: Down) -> pb::NodeFrame {
    pb::NodeFrame { seq, body: Some(body) }
}
