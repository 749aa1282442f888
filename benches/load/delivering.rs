//! Messages on their way to gateways that only count: who hears them, and how many a second arrive.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::node_frame::Body as Down;

use crate::harness::cluster::PHONE;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::harness::redis::Subscriber;
use crate::harness::stream::RawStream;
use crate::harness::stream::bind_frame;
use crate::load;

/// Of each gateway.
pub const USERS: i64 = 1_000;
/// Calls at a time, as redis-benchmark makes them by default; the daemon's share a few connections.
pub const CLIENTS: u64 = 50;
const CONNECTIONS: u64 = 5;
const DELIVER: &str = "/mpim.PresenceService/Deliver";
const RECEIVED_WITHIN: Duration = Duration::from_secs(20);

/// What arrived, and how long it was under way: every message says when it was sent.
pub struct Receipts {
    began: Instant,
    took: Mutex<Vec<Duration>>,
}

impl Receipts {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), took: Mutex::default() })
    }

    pub fn stamp(&self) -> String {
        self.began.elapsed().as_nanos().to_string()
    }

    fn note(&self, body: &[u8]) {
        let sent = std::str::from_utf8(body).ok().and_then(|text| text.parse().ok()).map(Duration::from_nanos);
        let took = sent.map(|sent| self.began.elapsed().saturating_sub(sent));
        self.took.lock().unwrap_or_else(PoisonError::into_inner).extend(took);
    }

    fn len(&self) -> usize {
        self.took.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// What is said to be delivered has to arrive.
    pub async fn all_received(&self, delivered: u64) -> Vec<Duration> {
        eventually("all are received", RECEIVED_WITHIN, async || self.len() as u64 >= delivered).await;
        assert_eq!(self.len() as u64, delivered, "each once");
        std::mem::take(&mut self.took.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A gateway with all its users, that reads.
pub async fn attach(node: &Node, addr: &str, first: i64, receipts: &Arc<Receipts>) {
    let (mut stream, _) = RawStream::attach(node, addr, 0).await;
    for user in first..first + USERS {
        assert!(stream.send(2, bind_frame(user, PHONE, "c")).await, "the stream is there");
    }
    for _ in 0..USERS {
        assert!(matches!(stream.next().await.expect("an answer").body, Some(Down::Bound(_))));
    }
    let receipts = receipts.clone();
    tokio::spawn(async move {
        while let Some(frame) = stream.wait().await {
            if let Some(Down::Delivery(delivery)) = frame.body {
                receipts.note(delivery.message.as_bytes());
            }
        }
    });
}

/// A gateway that subscribes instead.
pub async fn subscribe(node: &Node, redis: &RedisServer, first: i64, receipts: &Arc<Receipts>) {
    let channels: Vec<String> = (first..first + USERS).map(|user| format!("user:{user}")).collect();
    let subscriber = redis.subscribe(&channels.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let bind = |user_id| pb::BindRouteReq {
        user_id,
        gateway_addr: "gw-redis:7000".to_owned(),
        conn_id: "c".to_owned(),
        ..Default::default()
    };
    let binds = pb::BatchBindRouteReq { binds: (first..first + USERS).map(bind).collect() };
    node.presence().batch_bind_route(binds).await.expect("binds");
    tokio::spawn(hear(subscriber, receipts.clone()));
}

async fn hear(mut subscriber: Subscriber, receipts: Arc<Receipts>) {
    while let Some((_, body)) = subscriber.next(Duration::MAX).await {
        receipts.note(&body);
    }
}

/// Messages to users that the node has delivered so far. What a stream's queue had no room for is not among them.
pub async fn delivered(node: &Node) -> u64 {
    let series = node.series("im_presence_deliveries_total").await;
    series.iter().filter(|(labels, _)| labels.contains("\"delivered\"")).map(|(_, n)| *n as u64).sum()
}

/// Messages a second to the users of one gateway, from `first` on, and how long each was under way.
pub async fn deliver(node: &Node, first: i64, time: Duration, receipts: &Arc<Receipts>) -> (f64, Vec<Duration>) {
    let (server, stamps) = (node.data, receipts.clone());
    let request = move |c, n| pb::DeliverReq {
        user_id: first + ((c * 7_919 + n) % USERS as u64) as i64,
        message: stamps.stamp(),
        ..Default::default()
    };
    let before = delivered(node).await;
    let run = move || load::run(server, DELIVER, CONNECTIONS, CLIENTS / CONNECTIONS, time, request);
    let done = load::on_core(None, run).await;
    assert_eq!(done.failed, 0, "failed calls");
    let delivered = delivered(node).await - before;
    (delivered as f64 / done.elapsed.as_secs_f64(), receipts.all_received(delivered).await)
}
