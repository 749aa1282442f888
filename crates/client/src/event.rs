//! What a gateway and its nodes tell each other.

use std::collections::HashMap;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::Code;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tonic::Status;

pub use crate::contacts::ClientKey;
use crate::fields;
use crate::security::Security;
use crate::watched::WatchError;

/// Calls and frames that wait to be sent.
pub(crate) const QUEUE: usize = 4_096;
/// A device that is not used for so long is idle, if its gateway does not say otherwise.
const IDLE_AFTER: Duration = Duration::from_secs(60);

pub(crate) enum Call {
    Bind(Connection, oneshot::Sender<pb::BindRouteResp>),
    Unbind(pb::UnbindRouteReq, oneshot::Sender<pb::UnbindRouteResp>),
    Ack(pb::DeliveryAck),
    SetStatus(pb::SetStatusReq, oneshot::Sender<pb::SetStatusResp>),
    Watch(ClientKey, Vec<i64>, oneshot::Sender<Result<(), WatchError>>),
    Unwatch(ClientKey),
}

/// What a gateway says of itself.
#[derive(Clone, Debug)]
pub struct Options {
    /// `host:port` of each node; if `other_zones` has some, those of the gateway's own zone.
    pub nodes: Vec<String>,
    /// Nodes of other zones. It attaches there only while none of `nodes` takes it, and stays until that stream ends.
    pub other_zones: Vec<String>,
    /// Where this gateway is found; its name.
    pub gateway_addr: String,
    pub region: String,
    pub capacity: u32,
    /// How much of what is handed out it takes, next to others: 1 to 1000; 0: nobody new. None: 100.
    pub weight: Option<u32>,
    /// Where clients reach it; empty: by its label `public_addr`, or at `gateway_addr`.
    pub public_addr: String,
    /// Log-ins per second that it likes; 0: as many as nodes are configured to send.
    pub login_rate: u32,
    pub labels: HashMap<String, String>,
    /// How it proves who it is, and which nodes it believes.
    pub security: Security,
    /// A device is idle after so long without [`crate::gateway::Gateway::active`]; zero: never. Only devices for which that was
    /// ever called.
    pub idle_after: Duration,
    /// Nobody else binds for this gateway. Then nodes and this library compare what they believe to be bound, and mend what
    /// differs.
    pub binds_alone: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            other_zones: Vec::new(),
            gateway_addr: String::new(),
            region: String::new(),
            capacity: 0,
            weight: None,
            public_addr: String::new(),
            login_rate: 0,
            labels: HashMap::new(),
            security: Security::default(),
            idle_after: IDLE_AFTER,
            binds_alone: true,
        }
    }
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
    /// Nobody uses the device when it connects.
    pub idle: bool,
}

/// What the gateway is told.
#[derive(Debug)]
pub enum Event {
    /// Hand this over to the user's devices (`device_ids`, or all), then acknowledge for each.
    Delivery(pb::Delivery, Acker),
    /// Close this connection: another bind has removed its route, or it was to go elsewhere and its time is over. There is
    /// nothing to unbind.
    Kick(Connection, pb::Kick),
    /// Tell this client to connect elsewhere: to the first of `reconnect_to` that takes it (empty: anywhere), after
    /// `reconnect_after_ms`. Keep the connection until then: its route stays until the client is bound there, and the connection
    /// is kicked when that is done, or after `close_after_ms`.
    Move(Connection, pb::Kick),
    /// This gateway is to lose its clients (true: take no new ones), or not any more.
    Draining(bool),
    /// A bind that had to be made again, in a new life of the gateway or because its route was lost, did not succeed: close the
    /// connection.
    Lost(Connection, pb::BindRouteResp),
    /// A user whom this client watches is shown like this now.
    Presence { client: ClientKey, presence: pb::UserPresence },
    /// Nodes watch no more users: this client is told nothing of these until it asks for them again.
    NotWatched { client: ClientKey, users: Vec<i64>, why: String },
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
    pub(crate) calls: mpsc::Sender<Call>,
    pub(crate) delivery_id: String,
    pub(crate) user_id: i64,
    pub(crate) wanted: bool,
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
        if self.wanted && fields::check_name("device_id", device_id).is_ok() {
            let (delivery_id, device_id) = (self.delivery_id.clone(), device_id.to_owned());
            let ack = pb::DeliveryAck { delivery_id, user_id: self.user_id, device_id, not_here };
            let _ = self.calls.try_send(Call::Ack(ack)); // full: it is delivered again
        }
    }
}

pub(crate) fn request(connection: &Connection, since: Instant) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: connection.user_id,
        device_id: connection.device_id.clone(),
        conn_id: connection.conn_id.clone(),
        platform: connection.platform,
        client_ip: connection.client_ip.clone(),
        client_port: connection.client_port,
        connected_ms_ago: ms_ago(since),
        idle: connection.idle,
        ..Default::default()
    }
}

pub(crate) fn ms_ago(since: Instant) -> u32 {
    u32::try_from(since.elapsed().as_millis()).unwrap_or(u32::MAX)
}

pub(crate) fn refusal(code: Code, why: impl Into<String>) -> pb::BindRouteResp {
    pb::BindRouteResp { result: result(code, why), ..Default::default() }
}

pub(crate) fn not_set(code: Code, why: impl Into<String>) -> pb::SetStatusResp {
    pb::SetStatusResp { result: result(code, why), ..Default::default() }
}

pub(crate) fn result(code: Code, why: impl Into<String>) -> Option<pb::Result> {
    Some(pb::Result { code: code.into(), msg: why.into() })
}
