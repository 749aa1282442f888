//! Gateways: each keeps a stream to some node, beats, hands messages to the devices that it believes in, and acknowledges for
//! them. From time to time one stops, with or without a word, and comes back as a new process.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use im_presence::pb;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use im_presence::pb::node_frame::Body as Down;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::timeout;
use tokio::time::timeout_at;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::history::At;
use crate::history::Life;
use crate::history::Received;
use crate::history::Recorder;

const BEAT: Duration = Duration::from_millis(1_000);
/// A node that has not answered for so long is left.
const PATIENCE: Duration = Duration::from_millis(2_500);
/// Of the whole of a process, and of the time until the next.
const LIVES_SECONDS: std::ops::Range<u64> = 20..80;
const GONE_SECONDS: std::ops::Range<u64> = 6..14;
const QUEUE: usize = 1_024;

pub struct Edge {
    pub addr: String,
    state: Mutex<State>,
    recorder: Arc<Recorder>,
}

#[derive(Default)]
struct State {
    /// 0: none.
    epoch: u64,
    holds: HashMap<(i64, String), Held>,
}

/// A client's connection.
struct Held {
    conn: String,
    /// As soon as its bind is answered.
    key: String,
}

/// What becomes of a gateway when everything is mended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum AtLast {
    Stays,
    Dies,
}

/// Why a stream is left.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    ForAnotherNode,
    /// Nothing came in time.
    Silent,
}

impl Edge {
    pub fn new(addr: String, recorder: Arc<Recorder>) -> Arc<Self> {
        Arc::new(Self { addr, state: Mutex::default(), recorder })
    }

    /// None: it has no life now.
    pub fn epoch(&self) -> Option<u64> {
        Some(self.state().epoch).filter(|epoch| *epoch > 0)
    }

    /// A client has connected, and is about to be bound.
    pub fn connected(&self, user: i64, device: &str, conn: &str) {
        self.state().holds.insert((user, device.to_owned()), Held { conn: conn.to_owned(), key: String::new() });
    }

    pub fn bound(&self, user: i64, device: &str, conn: &str, key: &str) {
        if let Some(held) = self.state().holds.get_mut(&(user, device.to_owned())).filter(|held| held.conn == conn) {
            held.key = key.to_owned();
        }
    }

    /// The client has gone.
    pub fn disconnected(&self, user: i64, device: &str, conn: &str) {
        self.state().holds.retain(|of, held| *of != (user, device.to_owned()) || held.conn != conn);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn life(&self, change: impl FnOnce(&mut Life)) {
        let (epoch, mut history) = (self.state().epoch, self.recorder.write());
        if let Some(life) = history.lives.iter_mut().rev().find(|life| life.epoch == epoch) {
            change(life);
        }
    }

    fn forget_everybody(&self) {
        *self.state() = State::default();
    }

    /// A process of this gateway after the other, until `stop`; after `calm` none dies, but for those that then die for good.
    pub async fn live(
        self: Arc<Self>,
        nodes: Vec<Channel>,
        mut random: fastrand::Rng,
        (calm, at_last): (CancellationToken, AtLast),
        stop: CancellationToken,
    ) {
        let mut node = random.usize(..nodes.len());
        while !stop.is_cancelled() {
            let dies = Instant::now() + Duration::from_secs(random.u64(LIVES_SECONDS));
            let process = async {
                loop {
                    let left = self.attached(nodes[node].clone()).await;
                    node = (node + 1) % nodes.len();
                    let pause = if left == Left::Silent { 0 } else { random.u64(50..250) };
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
            };
            let ended: Result<(), _> = tokio::select! {
                ended = timeout_at(dies, process) => ended,
                () = stop.cancelled() => return,
                () = calm.cancelled(), if at_last == AtLast::Dies => {
                    let now = self.recorder.now();
                    self.life(|life| life.silent = Some(now));
                    return self.forget_everybody();
                }
            };
            if ended.is_err() && !calm.is_cancelled() {
                self.dies(nodes[node].clone(), &mut random).await;
            }
        }
    }

    async fn dies(&self, node: Channel, random: &mut fastrand::Rng) {
        let before = self.recorder.now();
        self.life(|life| life.silent = Some(before));
        if random.bool() {
            let request = pb::DeregisterGatewayReq { gateway_addr: self.addr.clone(), gateway_epoch: self.state().epoch };
            let answer = timeout(PATIENCE, GatewayServiceClient::new(node).deregister_gateway(request)).await;
            let said = answer.ok().and_then(Result::ok).and_then(|answer| answer.into_inner().result);
            if said.is_some_and(|result| result.code() == pb::Code::Ok) {
                let now = self.recorder.now();
                self.life(|life| life.over = Some(now));
            }
        }
        self.forget_everybody();
        tokio::time::sleep(Duration::from_secs(random.u64(GONE_SECONDS))).await;
    }

    /// One stream, from hello to its end.
    async fn attached(&self, node: Channel) -> Left {
        let (frames, queue) = mpsc::channel(QUEUE);
        let mut client = GatewayServiceClient::new(node);
        let _ = frames.try_send(self.hello()); // the queue is empty
        let Ok(opened) = timeout(PATIENCE, client.attach(ReceiverStream::new(queue))).await else { return Left::Silent };
        let Ok(opened) = opened else { return Left::ForAnotherNode };
        let mut answers = opened.into_inner();
        let (mut beats, mut sent) = (interval(BEAT), HashMap::<u64, (At, u64)>::new());
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut seq, mut heard) = (1, Instant::now());
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(heard + PATIENCE) => return Left::Silent,
                _ = beats.tick() => {
                    if let Some(epoch) = self.epoch() {
                        seq += 1;
                        sent.insert(seq, (self.recorder.now(), epoch));
                        let beat = pb::HeartbeatReq { gateway_addr: self.addr.clone(), gateway_epoch: epoch, ..Default::default() };
                        let _ = frames.try_send(frame(seq, Up::Heartbeat(beat))); // a full queue is silence
                    }
                }
                answer = answers.message() => match answer {
                    Ok(Some(pb::NodeFrame { seq, body: Some(body) })) => match self.take(body, sent.remove(&seq), &frames) {
                        Ok(true) => heard = Instant::now(),
                        Ok(false) => {}
                        Err(left) => return left,
                    },
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return Left::ForAnotherNode,
                }
            }
        }
    }

    /// Whether this shows that the node takes heartbeats.
    fn take(&self, body: Down, sent: Option<(At, u64)>, frames: &mpsc::Sender<pb::GatewayFrame>) -> Result<bool, Left> {
        match body {
            Down::Welcome(welcome) => self.welcomed(&welcome, frames),
            // Of a former life.
            Down::Heartbeat(_) if sent.is_none_or(|(_, epoch)| Some(epoch) != self.epoch()) => Ok(false),
            Down::Heartbeat(answer) => match answer.result.map(|result| result.code()) {
                Some(pb::Code::Ok) => {
                    let at = sent.map_or(0, |(at, _)| at);
                    self.life(|life| life.last_beat = at.max(life.last_beat));
                    Ok(true)
                }
                Some(pb::Code::Fenced | pb::Code::Superseded) => {
                    self.is_over();
                    let _ = frames.try_send(self.hello()); // a full queue is silence
                    Ok(false)
                }
                _ => Err(Left::ForAnotherNode),
            },
            Down::Delivery(delivery) => {
                self.hand_over(&delivery, frames);
                Ok(false)
            }
            Down::Kick(kick) => {
                self.state().holds.retain(|_, held| held.key != kick.route_key);
                Ok(false)
            }
            Down::Drain(_) => Err(Left::ForAnotherNode),
            _ => Ok(false),
        }
    }

    fn welcomed(&self, welcome: &pb::RegisterGatewayResp, frames: &mpsc::Sender<pb::GatewayFrame>) -> Result<bool, Left> {
        match welcome.result.as_ref().map(pb::Result::code) {
            Some(pb::Code::Ok) => {
                self.lives(welcome.gateway_epoch);
                Ok(true)
            }
            Some(pb::Code::Fenced | pb::Code::Superseded) if self.epoch().is_some() => {
                self.is_over();
                let _ = frames.try_send(self.hello()); // a full queue is silence
                Ok(true)
            }
            _ => Err(Left::ForAnotherNode),
        }
    }

    fn lives(&self, epoch: u64) {
        let now = self.recorder.now();
        if self.state().epoch == epoch {
            return;
        }
        {
            let mut history = self.recorder.write();
            // Whatever life the address had before is over.
            for former in history.lives.iter_mut().filter(|life| life.gateway == self.addr && life.over.is_none()) {
                former.over = Some(now);
            }
            let gateway = self.addr.clone();
            history.lives.push(Life { gateway, epoch, began: now, last_beat: now, silent: None, over: None });
        }
        *self.state() = State { epoch, ..State::default() };
    }

    fn is_over(&self) {
        let now = self.recorder.now();
        self.life(|life| life.over = Some(life.over.unwrap_or(now)));
        self.forget_everybody();
    }

    fn hand_over(&self, delivery: &pb::Delivery, frames: &mpsc::Sender<pb::GatewayFrame>) {
        let is_meant = |device: &str| delivery.device_ids.is_empty() || delivery.device_ids.iter().any(|id| id == device);
        let devices: Vec<String> = {
            let state = self.state();
            let mine = state.holds.keys().filter(|(user, device)| *user == delivery.user_id && is_meant(device));
            mine.map(|(_, device)| device.clone()).collect()
        };
        let is_acknowledged = delivery.wants_ack && !devices.is_empty();
        self.recorder.write().received.push(Received {
            user: delivery.user_id,
            text: delivery.message.clone(),
            seq: delivery.inbox_seq,
            is_acknowledged,
            at: self.recorder.now(),
        });
        for device_id in devices.into_iter().filter(|_| is_acknowledged) {
            let (delivery_id, user_id) = (delivery.delivery_id.clone(), delivery.user_id);
            let ack = pb::DeliveryAck { delivery_id, user_id, device_id, not_here: false };
            let _ = frames.try_send(frame(0, Up::Ack(ack))); // it is tried again
        }
    }

    fn hello(&self) -> pb::GatewayFrame {
        let (gateway_addr, gateway_epoch) = (self.addr.clone(), self.state().epoch);
        frame(1, Up::Hello(pb::RegisterGatewayReq { gateway_addr, gateway_epoch, ..Default::default() }))
    }
}

fn frame(seq: u64, body: Up) -> pb::GatewayFrame {
    pb::GatewayFrame { seq, body: Some(body) }
}
