//! Callers that bind, unbind, ask and send, and write down what came of it.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use im_presence::pb;
use im_presence::pb::Code as Said;
use im_presence::pb::presence_service_client::PresenceServiceClient;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::Status;
use tonic::transport::Channel;

use crate::edges::Edge;
use crate::history::At;
use crate::history::Bind;
use crate::history::Bound;
use crate::history::Message;
use crate::history::Outcome;
use crate::history::Query;
use crate::history::Recorder;
use crate::history::Seen;
use crate::history::Sent;
use crate::history::Unbind;

/// One more than a user may have online.
const DEVICES: [&str; 4] = ["phone", "laptop", "tablet", "watch"];
const PATIENCE: Duration = Duration::from_secs(7);
const ACK_TIMEOUT_MS: u32 = 1_500;
/// Between the calls of one caller, on the average.
const PACE_MS: u64 = 200;
/// A message without an answer is sent again so often.
const REPEATS: usize = 2;

pub struct Callers {
    pub users: i64,
    nodes: Vec<Channel>,
    edges: Vec<Arc<Edge>>,
    recorder: Arc<Recorder>,
    /// The newest acknowledged bind of each device.
    known: Mutex<HashMap<(i64, &'static str), Route>>,
    next: AtomicU64,
}

#[derive(Clone)]
struct Route {
    edge: usize,
    key: String,
    conn: String,
}

impl Callers {
    pub fn new(users: i64, nodes: Vec<Channel>, edges: Vec<Arc<Edge>>, recorder: Arc<Recorder>) -> Arc<Self> {
        Arc::new(Self { users, nodes, edges, recorder, known: Mutex::default(), next: AtomicU64::new(1) })
    }

    /// One caller.
    pub async fn call(self: Arc<Self>, mut random: fastrand::Rng, stop: CancellationToken) {
        while !stop.is_cancelled() {
            tokio::time::sleep(Duration::from_millis(random.u64(..2 * PACE_MS))).await;
            let (user, node) = (random.i64(1..=self.users), random.usize(..self.nodes.len()));
            match random.u8(..100) {
                0..30 => self.bind(user, node, &mut random).await,
                30..45 => self.unbind(user, node, &mut random).await,
                45..80 => {
                    let limit = [None, None, Some(0), Some(0), Some(1_000), Some(5_000)][random.usize(..6)];
                    if let Some(query) = self.query(user, node, limit).await {
                        self.recorder.write().queries.push(query);
                    }
                }
                _ => self.send(user, node, &mut random).await,
            }
        }
    }

    async fn bind(&self, user: i64, node: usize, random: &mut fastrand::Rng) {
        let (device, edge) = (DEVICES[random.usize(..DEVICES.len())], random.usize(..self.edges.len()));
        let Some(epoch) = self.edges[edge].epoch() else { return };
        let conn = format!("c-{}", self.number());
        self.edges[edge].connected(user, device, &conn);
        let request = pb::BindRouteReq {
            user_id: user,
            gateway_addr: self.edges[edge].addr.clone(),
            device_id: device.to_owned(),
            gateway_epoch: epoch,
            conn_id: conn.clone(),
            ..Default::default()
        };
        let began = self.recorder.now();
        let answer = timeout(PATIENCE, self.presence(node).bind_route(request)).await;
        let span = self.recorder.since(began);
        let outcome = match answer.map(|answer| answer.map(tonic::Response::into_inner)) {
            Err(_) => Outcome::Unknown,
            Ok(Err(status)) => self.failed("bind", &status),
            Ok(Ok(bound)) => match said(&bound.result) {
                Said::Ok => Outcome::Done(Bound {
                    version: bound.version,
                    key: bound.route_key,
                    kicked: bound.kicked.into_iter().map(|route| route.route_key).collect(),
                }),
                Said::Refused | Said::Fenced | Said::Superseded => Outcome::Refused,
                Said::Unavailable => Outcome::Unknown,
                code => self.odd(&format!("bind: {code:?}")),
            },
        };
        match &outcome {
            Outcome::Done(bound) => {
                self.edges[edge].bound(user, device, &conn, &bound.key);
                self.known().insert((user, device), Route { edge, key: bound.key.clone(), conn: conn.clone() });
            }
            Outcome::Refused => self.edges[edge].disconnected(user, device, &conn),
            Outcome::Unknown => {}
        }
        self.recorder.write().binds.push(Bind { user, device: device.to_owned(), epoch, conn, node, span, outcome });
    }

    async fn unbind(&self, user: i64, node: usize, random: &mut fastrand::Rng) {
        let device = DEVICES[random.usize(..DEVICES.len())];
        let Some(route) = self.known().get(&(user, device)).cloned() else { return };
        self.edges[route.edge].disconnected(user, device, &route.conn);
        let by_key = random.bool();
        let request = match by_key {
            true => pb::UnbindRouteReq { user_id: user, route_key: route.key.clone(), ..Default::default() },
            false => pb::UnbindRouteReq {
                user_id: user,
                gateway_addr: self.edges[route.edge].addr.clone(),
                device_id: device.to_owned(),
                conn_id: route.conn,
                ..Default::default()
            },
        };
        let began = self.recorder.now();
        let answer = timeout(PATIENCE, self.presence(node).unbind_route(request)).await;
        let span = self.recorder.since(began);
        let outcome = match answer.map(|answer| answer.map(tonic::Response::into_inner)) {
            Err(_) => Outcome::Unknown,
            Ok(Err(status)) => self.failed("unbind", &status),
            Ok(Ok(answer)) => match said(&answer.result) {
                Said::Ok => Outcome::Done(answer.unbound.then_some(answer.version)),
                Said::Fenced | Said::Superseded => Outcome::Refused,
                Said::Unavailable => Outcome::Unknown,
                code => self.odd(&format!("unbind: {code:?}")),
            },
        };
        self.recorder.write().unbinds.push(Unbind { user, key: route.key, node, span, outcome });
    }

    /// None: there was no answer.
    pub async fn query(&self, user: i64, node: usize, max_staleness_ms: Option<u32>) -> Option<Query> {
        let request = pb::QueryRouteReq { user_id: user, max_staleness_ms };
        let began = self.recorder.now();
        let answer = timeout(PATIENCE, self.presence(node).query_route(request)).await.ok()?;
        let span = self.recorder.since(began);
        let answer = match answer {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                self.failed::<()>("query", &status);
                return None;
            }
        };
        if !matches!(said(&answer.result), Said::Ok | Said::NotFound) {
            self.odd::<()>(&format!("query: {answer:?}"));
        }
        let seen = |route: &pb::Route| Seen {
            device: route.device_id.clone(),
            epoch: route.gateway_epoch,
            conn: route.conn_id.clone(),
            key: route.route_key.clone(),
            is_suspect: route.state() == pb::RouteState::Suspect,
        };
        Some(Query {
            user,
            node,
            span,
            max_staleness_ms,
            version: answer.version,
            age_ms: answer.age_ms,
            source: answer.source().as_str_name(),
            status: answer.status,
            is_online: answer.is_online,
            routes: answer.routes.iter().map(seen).collect(),
        })
    }

    /// Sends a message, and again through the next node if there is no answer.
    async fn send(&self, user: i64, node: usize, random: &mut fastrand::Rng) {
        let (text, ack_timeout_ms) = (format!("m-{}", self.number()), if random.bool() { ACK_TIMEOUT_MS } else { 0 });
        let store_offline = random.bool();
        for turn in 0..=REPEATS {
            let (message, message_id) = (text.clone(), text.clone());
            let request =
                pb::DeliverReq { user_id: user, message, message_id, ack_timeout_ms, store_offline, ..Default::default() };
            let began = self.recorder.now();
            let mut presence = self.presence((node + turn) % self.nodes.len());
            let answer = timeout(PATIENCE, presence.deliver(request)).await;
            let span = self.recorder.since(began);
            let sent = match answer.map(|answer| answer.map(tonic::Response::into_inner)) {
                Err(_) => Sent::Unknown,
                Ok(Err(status)) => {
                    self.failed::<()>("deliver", &status);
                    Sent::Unknown
                }
                Ok(Ok(answer)) => self.sent(&answer, ack_timeout_ms > 0),
            };
            self.recorder.write().messages.push(Message { user, text: text.clone(), span, sent });
            if sent != Sent::Unknown {
                return;
            }
        }
    }

    fn sent(&self, answer: &pb::DeliverResp, waited: bool) -> Sent {
        match said(&answer.result) {
            Said::Ok if answer.stored => Sent::Stored,
            Said::Ok if answer.delivered && waited => Sent::Acknowledged,
            Said::Ok if answer.delivered => Sent::Taken,
            Said::NotFound => Sent::NotFound,
            Said::Undelivered => Sent::Undelivered,
            _ => {
                self.odd::<()>(&format!("deliver: {answer:?}"));
                Sent::Unknown
            }
        }
    }

    /// All that is left in a user's inbox: number and text. None: there was no answer.
    pub async fn inbox(&self, user: i64, node: usize) -> Option<Vec<(u64, String)>> {
        let (mut after_seq, mut all) = (0, Vec::new());
        loop {
            let request = pb::PullInboxReq { user_id: user, after_seq, limit: 50, ..Default::default() };
            let mut gateways = pb::gateway_service_client::GatewayServiceClient::new(self.nodes[node].clone());
            let page = timeout(PATIENCE, gateways.pull_inbox(request)).await.ok()?.ok()?.into_inner();
            all.extend(page.deliveries.iter().map(|delivery| (delivery.inbox_seq, delivery.message.clone())));
            match page.deliveries.last() {
                Some(last) if page.more => after_seq = last.inbox_seq,
                _ => return Some(all),
            }
        }
    }

    /// What an error means for the call, which is one that callers may get or is written down.
    fn failed<T>(&self, what: &str, status: &Status) -> Outcome<T> {
        let is_the_ways = status.source().is_some()
            || ["h2 protocol error", "transport error", "error reading a body", "Timeout expired"]
                .iter()
                .any(|words| status.message().contains(words));
        match status.code() {
            _ if is_the_ways => Outcome::Unknown,
            Code::ResourceExhausted => Outcome::Refused,
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Outcome::Unknown,
            code => self.odd(&format!("{what}: {code:?}: {}", status.message())),
        }
    }

    fn odd<T>(&self, what: &str) -> Outcome<T> {
        let at: At = self.recorder.now();
        self.recorder.write().errors.push(format!("{what}, at {at}"));
        Outcome::Unknown
    }

    fn presence(&self, node: usize) -> PresenceServiceClient<Channel> {
        PresenceServiceClient::new(self.nodes[node].clone())
    }

    fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<(i64, &'static str), Route>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn said(result: &Option<pb::Result>) -> Said {
    result.as_ref().map_or(Said::Internal, pb::Result::code)
}
