//! For gateways: one stream to any of the nodes, which is made again when it breaks.
//!
//! The gateway says who is connected to it ([`Gateway::bind`], [`Gateway::unbind`]) and is told what to hand over
//! ([`Event`]). It keeps its sockets whatever happens here: a node that stops, a broken network, a database that stands still.
//! With its epoch it goes on with its life on another node. If that life is over it begins a new one and binds everybody again,
//! with the age of each connection, so that nobody who has moved on meanwhile is taken back.

use std::collections::HashMap;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;
use tonic::Status;

use crate::api::convert;
use crate::client::InvalidAddress;
use crate::client::life::Call;
use crate::client::life::Life;
use crate::client::life::QUEUE;
use crate::domain::id::DeviceId;
use crate::domain::id::GatewayAddr;
use crate::pb;
use crate::pb::Code;

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
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
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
    /// Close this connection: another bind has removed its route.
    Kick(Connection, pb::Kick),
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
    pub(super) calls: mpsc::Sender<Call>,
    pub(super) delivery_id: String,
    pub(super) user_id: i64,
    pub(super) wanted: bool,
}

/// The gateway's own end. Dropping it ends the stream, and the lease soon after; see [`Gateway::stop`].
pub struct Gateway {
    addr: GatewayAddr,
    calls: mpsc::Sender<Call>,
    task: JoinHandle<Life>,
    /// Ends the task, whoever else still holds an end of its queue.
    running: DropGuard,
}

/// The node's side is gone for good: the gateway was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gateway has stopped")]
pub struct Stopped;

impl Gateway {
    /// Attaches in the background, and keeps attached. `on_event` must not block.
    ///
    /// # Errors
    /// The gateway's address or that of a node makes no sense, or there is no node.
    pub fn start(options: Options, on_event: impl Fn(Event) + Send + Sync + 'static) -> Result<Self, InvalidAddress> {
        let addr = GatewayAddr::parse(&options.gateway_addr);
        let addr = addr.map_err(|_| InvalidAddress { of: "a gateway", address: options.gateway_addr.clone() })?;
        let (calls, mut queue) = mpsc::channel(QUEUE);
        let mut life = Life::new(options, calls.downgrade(), Box::new(on_event))?;
        let running = CancellationToken::new();
        let ended = running.clone();
        let task = tokio::spawn(async move {
            ended.run_until_cancelled(life.keep_attached(&mut queue)).await;
            life
        });
        Ok(Self { addr, calls, task, running: running.drop_guard() })
    }

    /// Says that a client is connected. Waits until a node has said what came of it, however long that takes; if the client
    /// goes away meanwhile, call [`Gateway::unbind`] without waiting for this. What no node would take is INVALID at once.
    pub async fn bind(&self, connection: Connection) -> Result<pb::BindRouteResp, Stopped> {
        if let Err(invalid) = convert::bind_on(self.addr.clone(), None, &request(&connection, Instant::now())) {
            return Ok(refusal(Code::Invalid, &invalid.to_string()));
        }
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Bind(connection, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Says that a client's connection has ended.
    pub async fn unbind(&self, user_id: i64, device_id: &str, conn_id: &str) -> Result<pb::UnbindRouteResp, Stopped> {
        let (device_id, conn_id, gateway_addr) = (device_id.to_owned(), conn_id.to_owned(), self.addr.to_string());
        let request = pb::UnbindRouteReq { user_id, device_id, conn_id, gateway_addr, ..Default::default() };
        if let Err(invalid) = convert::unbind(&request) {
            let result = convert::result(Code::Invalid, invalid.to_string());
            return Ok(pb::UnbindRouteResp { result, ..Default::default() });
        }
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Unbind(request, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Deregisters: all users of this gateway are offline at once.
    ///
    /// # Errors
    /// No node could be told; they are offline when the lease ends.
    pub async fn stop(self) -> Result<(), Status> {
        drop(self.running);
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
        if self.wanted && DeviceId::parse(device_id).is_ok() {
            let (delivery_id, device_id) = (self.delivery_id.clone(), device_id.to_owned());
            let ack = pb::DeliveryAck { delivery_id, user_id: self.user_id, device_id, not_here };
            let _ = self.calls.try_send(Call::Ack(ack)); // full: it is delivered again
        }
    }
}

pub(super) fn request(connection: &Connection, since: Instant) -> pb::BindRouteReq {
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

pub(super) fn refusal(code: Code, why: &str) -> pb::BindRouteResp {
    pb::BindRouteResp { result: convert::result(code, why), ..Default::default() }
}
