//! What a gateway and its nodes say to each other, whichever stream carries it: what was asked and has no answer, what is asked
//! again, and what its clients are told.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::HashSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::Code;
use im_presence_proto::gateway_frame::Body as Up;
use im_presence_proto::node_frame::Body as Down;
use im_presence_proto::watch_resp::Body as Told;
use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::sync::oneshot;

use crate::connections::Connections;
use crate::contacts::ClientKey;
use crate::contacts::Contacts;
use crate::event::Acker;
use crate::event::Call;
use crate::event::Connection;
use crate::event::Event;
use crate::event::QUEUE;
use crate::event::not_set;
use crate::event::refusal;
use crate::idleness::Idleness;
use crate::jittered;
use crate::watched::WatchError;

/// What nodes drop as too old. A bind that was not answered may still be carried out until then.
const MAX_EVENT_AGE: Duration = Duration::from_secs(5);
/// Before what a node could not store is asked again, beyond the time that the node has named.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The same for a status, which is also refused because it changes too often.
const STATUS_RETRY_AFTER: Duration = Duration::from_secs(1);

/// A request without an answer yet: it is made again on the next stream.
enum Asked {
    Bind(Connection, Option<oneshot::Sender<pb::BindRouteResp>>),
    Unbind(pb::UnbindRouteReq, Option<oneshot::Sender<pb::UnbindRouteResp>>),
    Status(SetStatus),
}

struct SetStatus {
    request: pb::SetStatusReq,
    /// None: a device has become idle, or is no more.
    answer: Option<oneshot::Sender<pb::SetStatusResp>>,
}

/// When devices were used, which is said from anywhere.
#[derive(Clone)]
pub struct Usage {
    idleness: Arc<Mutex<Idleness>>,
    /// There is something to do earlier than was known.
    changed: Arc<Notify>,
}

pub struct Dialogue {
    seq: u64,
    connections: Connections,
    asked: BTreeMap<u64, Asked>,
    /// Frames that wait for the transport.
    outgoing: VecDeque<pb::GatewayFrame>,
    /// What is asked again then.
    later: BTreeMap<(Instant, u64), Asked>,
    /// Connections that are closed then, unless they have gone elsewhere.
    leaving: BTreeMap<(Instant, u64), pb::Kick>,
    /// By user, who has asked for one: what waits until it is answered, so that the last word stays the last.
    statuses: HashMap<i64, VecDeque<SetStatus>>,
    contacts: Contacts,
    usage: Usage,
    calls: mpsc::WeakSender<Call>,
    on_event: Box<dyn Fn(Event) + Send + Sync>,
}

impl Usage {
    pub fn new(idle_after: Duration) -> Self {
        Self { idleness: Arc::new(Mutex::new(Idleness::new(idle_after))), changed: Arc::new(Notify::new()) }
    }

    pub fn used(&self, user_id: i64, device_id: &str) {
        if self.lock().used(user_id, device_id, Instant::now()) {
            self.changed.notify_one();
        }
    }

    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> MutexGuard<'_, Idleness> {
        self.idleness.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Dialogue {
    pub fn new(calls: mpsc::WeakSender<Call>, usage: Usage, on_event: Box<dyn Fn(Event) + Send + Sync>) -> Self {
        Self {
            seq: 0,
            connections: Connections::default(),
            asked: BTreeMap::new(),
            outgoing: VecDeque::new(),
            later: BTreeMap::new(),
            leaving: BTreeMap::new(),
            statuses: HashMap::new(),
            contacts: Contacts::default(),
            usage,
            calls,
            on_event,
        }
    }

    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// The digest of all connections, and their number. None: many binds are being made again, and nodes would find a difference
    /// where none is.
    pub fn digest(&self) -> Option<(u64, u32)> {
        let is_repeated = |asked: &Asked| matches!(asked, Asked::Bind(_, None));
        let is_settled = !self.asked.values().chain(self.later.values()).any(is_repeated);
        is_settled.then(|| self.connections.digest())
    }

    pub fn tell(&self, event: Event) {
        (self.on_event)(event);
    }

    pub fn next_seq(&mut self) -> u64 {
        self.seq += 1;
        self.seq
    }

    /// Whether another call can be taken.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() < QUEUE
    }

    pub fn has_frame(&self) -> bool {
        !self.outgoing.is_empty() || self.contacts.watched.has_message()
    }

    pub fn pop_frame(&mut self) -> Option<pb::GatewayFrame> {
        if let Some(frame) = self.outgoing.pop_front() {
            return Some(frame);
        }
        let seq = self.next_seq();
        let message = self.contacts.watched.message(seq)?;
        Some(pb::GatewayFrame { seq, body: Some(Up::Watch(message)) })
    }

    /// Before everything else that waits.
    pub fn push_heartbeat(&mut self, beat: pb::HeartbeatReq) {
        let seq = self.next_seq();
        self.outgoing.push_front(pb::GatewayFrame { seq, body: Some(Up::Heartbeat(beat)) });
    }

    /// There is another stream: asks again for what was not answered; in a new life, binds everybody.
    pub fn resume(&mut self, new_life: bool) {
        self.outgoing.retain(|frame| matches!(frame.body, Some(Up::Ack(_))));
        self.connections.forget_early_kicks();
        self.contacts.watched.resume();
        let asked = std::mem::take(&mut self.asked);
        if new_life {
            let pending: HashSet<_> = asked.values().filter_map(Asked::connection).collect();
            let again: Vec<_> = self.connections.all().filter(|held| !pending.contains(held)).cloned().collect();
            again.into_iter().for_each(|connection| self.ask(Asked::Bind(connection, None)));
        }
        asked.into_values().for_each(|asked| self.ask(asked));
    }

    /// A node has ended the stream because of something that it would not take. What the gateway checks itself it would have;
    /// but how long the text of a status may be is for the nodes to say, and no stream must end of it again.
    pub fn refuse_statuses(&mut self, why: &str) {
        let is_wish = |asked: &Asked| matches!(asked, Asked::Status(SetStatus { answer: Some(_), .. }));
        let wishes: Vec<u64> = self.asked.iter().filter(|(_, asked)| is_wish(asked)).map(|(seq, _)| *seq).collect();
        wishes.into_iter().for_each(|seq| _ = self.status_set(seq, not_set(Code::Invalid, why)));
    }

    pub fn call(&mut self, call: Call) {
        match call {
            Call::Bind(connection, answer) => {
                self.connections.insert(&connection);
                self.usage.lock().connected(connection.user_id, &connection.device_id, Instant::now());
                self.ask(Asked::Bind(connection, Some(answer)));
            }
            Call::Unbind(request, answer) => {
                if self.connections.ended(request.user_id, &request.device_id, &request.conn_id) {
                    // Its bind may still be on its way somewhere, and arrive after this.
                    self.ask_later(MAX_EVENT_AGE, Asked::Unbind(request.clone(), None));
                }
                self.has_ended(request.user_id, &request.device_id);
                self.ask(Asked::Unbind(request, Some(answer)));
            }
            Call::Ack(ack) => self.outgoing.push_back(pb::GatewayFrame { seq: 0, body: Some(Up::Ack(ack)) }),
            Call::SetStatus(request, answer) => self.set_status(SetStatus { request, answer: Some(answer) }),
            Call::Watch(client, users, answer) => {
                let _ = answer.send(self.watch(client, users)); // whoever asked may have gone
            }
            Call::Unwatch(client) => self.contacts.unwatch(client, Instant::now()),
        }
    }

    /// When [`Dialogue::look`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        let later = self.later.first_key_value().map(|((when, _), _)| *when);
        let leaving = self.leaving.first_key_value().map(|((when, _), _)| *when);
        [later, leaving, self.contacts.due(), self.usage.lock().due()].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn look(&mut self) {
        let now = Instant::now();
        let later = self.later.split_off(&(now, 0));
        std::mem::replace(&mut self.later, later).into_values().for_each(|asked| self.ask(asked));
        let leaving = self.leaving.split_off(&(now, 0));
        std::mem::replace(&mut self.leaving, leaving).into_values().for_each(|kick| self.close(kick));
        self.contacts.look(now);
        let changes = self.usage.lock().look(now, |user_id, device_id| self.connections.is_idle(user_id, device_id));
        for change in changes {
            let (user_id, device_id, idle) = (change.user_id, change.device_id, Some(change.idle));
            let request = pb::SetStatusReq { user_id, device_id, idle, ..Default::default() };
            self.set_status(SetStatus { request, answer: None });
        }
    }

    /// What a node says. Returns why this life is over, if it is.
    pub fn take(&mut self, frame: pb::NodeFrame) -> Option<Code> {
        match frame.body {
            Some(Down::Bound(bound)) => return self.bound(frame.seq, bound),
            Some(Down::Unbound(unbound)) => return self.unbound(frame.seq, unbound),
            Some(Down::Status(set)) => return self.status_set(frame.seq, set),
            Some(Down::Delivery(delivery)) => {
                let calls = self.calls.upgrade()?;
                let (delivery_id, user_id, wanted) = (delivery.delivery_id.clone(), delivery.user_id, delivery.wants_ack);
                self.tell(Event::Delivery(delivery, Acker { calls, delivery_id, user_id, wanted }));
            }
            Some(Down::Kick(kick)) => self.kick(kick),
            Some(Down::Watched(pb::WatchResp { body: Some(Told::Presence(told)) })) => self.told(told),
            Some(Down::Watched(pb::WatchResp { body: Some(Told::Done(done)) })) => {
                let why = done.result.as_ref().map(|result| result.msg.clone()).unwrap_or_default();
                for (client, users) in self.contacts.done(&done) {
                    self.tell(Event::NotWatched { client, users, why: why.clone() });
                }
            }
            Some(Down::DigestQuery(query)) => self.digest_query(frame.seq, &query),
            Some(Down::Watched(_) | Down::Heartbeat(_) | Down::Drain(_) | Down::Welcome(_)) | None => {}
        }
        None
    }

    /// A node asks what is held here, or says what of it has no route. Whatever is being bound anyway is not bound twice.
    fn digest_query(&mut self, seq: u64, query: &pb::DigestQuery) {
        if seq != 0 {
            let frames = self.connections.answer(query).into_iter();
            self.outgoing.extend(frames.map(|answer| pb::GatewayFrame { seq, body: Some(Up::Digest(answer)) }));
        }
        let pending: HashSet<_> = self.asked.values().chain(self.later.values()).filter_map(Asked::connection).collect();
        let named = query.bind_again.iter().filter_map(|bound| self.connections.named(bound));
        let again: Vec<_> = named.filter(|held| !pending.contains(held)).cloned().collect();
        again.into_iter().for_each(|connection| self.ask(Asked::Bind(connection, None)));
    }

    fn ask(&mut self, asked: Asked) {
        let body = match &asked {
            Asked::Bind(connection, _) => self.connections.bind_request(connection).map(Up::Bind),
            Asked::Unbind(request, _) => Some(Up::Unbind(request.clone())),
            Asked::Status(status) => Some(Up::Status(status.request.clone())),
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

    fn bound(&mut self, seq: u64, bound: pb::BindRouteResp) -> Option<Code> {
        let Some(Asked::Bind(connection, answer)) = self.asked.remove(&seq) else { return None };
        let code = bound.result.as_ref().map_or(Code::Internal, pb::Result::code);
        let mut early = None;
        match code {
            Code::Ok => early = self.connections.bound(&connection, &bound.route_key),
            Code::Fenced | Code::Superseded => {
                self.asked.insert(seq, Asked::Bind(connection, answer));
                return Some(code);
            }
            Code::Unavailable => {
                let pause = Duration::from_millis(bound.retry_after_ms.into()) + jittered(RETRY_AFTER);
                self.ask_later(pause, Asked::Bind(connection, answer));
                return None;
            }
            _ => {
                self.connections.refused(&connection);
                self.has_ended(connection.user_id, &connection.device_id);
            }
        }
        match answer {
            Some(answer) => _ = answer.send(bound), // whoever asked may have gone
            None if code != Code::Ok => self.tell(Event::Lost(connection, bound)),
            None => {}
        }
        early.into_iter().for_each(|kick| self.kick(kick));
        None
    }

    fn unbound(&mut self, seq: u64, unbound: pb::UnbindRouteResp) -> Option<Code> {
        let Some(Asked::Unbind(request, answer)) = self.asked.remove(&seq) else { return None };
        let code = unbound.result.as_ref().map_or(Code::Internal, pb::Result::code);
        if code == Code::Unavailable {
            self.ask_later(jittered(RETRY_AFTER), Asked::Unbind(request, answer));
            return None;
        }
        if let Some(answer) = answer {
            let _ = answer.send(unbound); // whoever asked may have gone
        }
        matches!(code, Code::Fenced | Code::Superseded).then_some(code) // and so is the route
    }

    fn set_status(&mut self, status: SetStatus) {
        match self.statuses.get_mut(&status.request.user_id) {
            Some(waiting) => waiting.push_back(status),
            None => {
                self.statuses.insert(status.request.user_id, VecDeque::new());
                self.ask(Asked::Status(status));
            }
        }
    }

    fn status_set(&mut self, seq: u64, set: pb::SetStatusResp) -> Option<Code> {
        let Some(Asked::Status(status)) = self.asked.remove(&seq) else { return None };
        match set.result.as_ref().map_or(Code::Internal, pb::Result::code) {
            Code::Unavailable => {
                self.ask_later(jittered(STATUS_RETRY_AFTER), Asked::Status(status));
                return None;
            }
            code @ (Code::Fenced | Code::Superseded) => {
                self.asked.insert(seq, Asked::Status(status));
                return Some(code);
            }
            _ => {}
        }
        let SetStatus { request: pb::SetStatusReq { user_id, device_id, idle, .. }, answer } = status;
        if let Some(idle) = idle {
            self.connections.set_idle(user_id, &device_id, idle);
            self.usage.lock().answered(user_id, &device_id, Instant::now());
        }
        if let Some(answer) = answer {
            let _ = answer.send(set); // whoever asked may have gone
        }
        match self.statuses.get_mut(&user_id).and_then(VecDeque::pop_front) {
            Some(next) => self.ask(Asked::Status(next)),
            None => _ = self.statuses.remove(&user_id),
        }
        None
    }

    fn kick(&mut self, kick: pb::Kick) {
        if matches!(kick.reason(), pb::Reason::Drain | pb::Reason::Migrate) {
            return self.move_away(kick);
        }
        if let Some(connection) = self.connections.kicked(&kick) {
            self.has_ended(connection.user_id, &connection.device_id);
            self.tell(Event::Kick(connection, kick));
        }
    }

    /// The route stays until the client is bound elsewhere. If it does not go, its connection is closed.
    fn move_away(&mut self, kick: pb::Kick) {
        let Some(connection) = self.connections.meant(&kick) else { return };
        let (until, seq) = (Instant::now() + Duration::from_millis(kick.close_after_ms.into()), self.next_seq());
        self.leaving.insert((until, seq), kick.clone());
        self.tell(Event::Move(connection, kick));
    }

    /// Its time is over.
    fn close(&mut self, kick: pb::Kick) {
        let Some(connection) = self.connections.kicked(&kick) else { return }; // it has gone
        let Connection { user_id, device_id, conn_id, .. } = connection.clone();
        self.has_ended(user_id, &device_id);
        self.tell(Event::Kick(connection, kick.clone()));
        let request = pb::UnbindRouteReq { user_id, device_id, conn_id, route_key: kick.route_key, ..Default::default() };
        self.ask(Asked::Unbind(request, None));
    }

    /// A connection has ended; the device may have another one.
    fn has_ended(&self, user_id: i64, device_id: &str) {
        if self.connections.is_idle(user_id, device_id).is_none() {
            self.usage.lock().forget(user_id, device_id);
        }
    }

    fn watch(&mut self, client: ClientKey, users: Vec<i64>) -> Result<(), WatchError> {
        for presence in self.contacts.watch(client, users, Instant::now())? {
            self.tell(Event::Presence { client, presence });
        }
        Ok(())
    }

    fn told(&mut self, told: pb::UserPresence) {
        let Some((presence, clients)) = self.contacts.told(told) else { return };
        for client in clients {
            (self.on_event)(Event::Presence { client: *client, presence: presence.clone() });
        }
    }
}

impl Asked {
    fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Bind(connection, _) => Some(connection),
            Self::Unbind(..) | Self::Status(_) => None,
        }
    }
}

#[cfg(test)]
#[path = "dialogue_tests.rs"]
mod tests;
