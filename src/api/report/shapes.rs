//! What is answered, as JSON. Another release may know more fields or fewer: what is missing has its default.

use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;

/// What one node is and does. Of a node that did not answer only who it is, and why it did not, is known.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodeReport {
    pub node_id: String,
    /// Where other nodes reach it.
    pub addr: String,
    /// What fails together with it; empty: it does not say.
    pub zone: String,
    pub version: Option<String>,
    pub up_since_ms: Option<i64>,
    /// How long ago it has said, in the database, that it is there.
    pub seen_ms_ago: Option<i64>,
    /// Whether it can do its job.
    pub ready: Option<bool>,
    /// What is missing although it goes on: store, redis_cache, redis_queue, hints, hold, clock; or why it is not ready.
    pub degraded: Vec<String>,
    /// Gateways that are attached to it.
    pub streams: Option<u64>,
    /// Messages that wait for these to read.
    pub stream_queue_depth: Option<u64>,
    /// Users in its memory.
    pub l1_entries: Option<u64>,
    pub connections: Option<u64>,
    /// Changes that wait to be stored.
    pub lane_queue_depth: Option<u64>,
    pub sql_ok: Option<bool>,
    /// Null: not configured.
    pub redis_cache_ok: Option<bool>,
    /// Null: not configured.
    pub redis_queue_ok: Option<bool>,
    pub tls: Option<TlsReport>,
    pub certificates: Vec<CertificateReport>,
    /// Why it did not answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How each of its links is protected: `off`, `on`, or `unverified` (encrypted, but nobody has proved who he is).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TlsReport {
    pub data: String,
    pub admin: String,
    pub peer: String,
    pub store: String,
    pub redis_cache: String,
    pub redis_queue: String,
}

/// A certificate that is in use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CertificateReport {
    /// data, admin, peer, store, redis_cache or redis_queue; of a CA with ` (ca)` behind it.
    pub r#use: String,
    pub not_after_ms: i64,
}

/// A gateway's stream.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct StreamReport {
    pub gateway_addr: String,
    pub epoch: String,
    pub since_ms: i64,
    /// Orders that wait for the gateway to read, and how many may.
    pub queue: u64,
    pub queue_max: u64,
    /// Deliveries and kicks that were written to it, and those that found its queue full.
    pub delivered: u64,
    pub shed: u64,
    pub last_frame_ms_ago: i64,
    /// Whose credential it came with; empty: nobody was asked.
    pub caller: String,
}

/// Numbers of one node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodeMetrics {
    pub node_id: String,
    pub as_of_ms: i64,
    /// Over how many seconds `per_s`, `latency_ms` and `hit_share` are: 10 to 20, or since the start.
    pub over_s: f64,
    pub items: Vec<NumberReport>,
    pub latency_ms: Latency,
    pub hit_share: Option<HitShare>,
}

/// A number of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NumberReport {
    pub name: String,
    pub value: f64,
    /// How much it grew per second lately; null: it does not only grow.
    pub per_s: Option<f64>,
}

/// What 99 of 100 did not exceed, in milliseconds; null: there were none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Latency {
    pub query_p99: Option<f64>,
    pub bind_p99: Option<f64>,
    pub delivery_p99: Option<f64>,
}

/// By whom users were found who were looked up; the sum is 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct HitShare {
    pub memory: f64,
    pub redis: f64,
    pub sql: f64,
}

/// What a node tells another that asks it for everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Overview {
    pub report: NodeReport,
    pub metrics: NodeMetrics,
}

/// The first look at the system.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Summary {
    pub as_of_ms: i64,
    /// Name of the database.
    pub system: String,
    pub store_id: String,
    /// Of the caches.
    pub generation: u64,
    pub version: String,
    /// ok, degraded, or down: no change can be stored.
    pub verdict: String,
    /// Each a sentence.
    pub because: Vec<String>,
    /// As counted at `users_as_of_ms`, corrected by what gateways have said since.
    pub users_online: u64,
    /// 0: nobody has counted yet.
    pub users_as_of_ms: i64,
    /// Connections, as gateways said with their last heartbeats.
    pub devices: u64,
    /// Of these, on gateways that are silent.
    pub suspect_users: u64,
    pub gateways: GatewayCounts,
    pub deaths_last_hour: u64,
    pub hold: Option<HoldReport>,
    /// That wait or run.
    pub drains: u64,
    pub inbox: InboxReport,
    pub outbox_rows: u64,
    pub sweep_backlog: u64,
    /// Per second, over all nodes that answer.
    pub rates: Rates,
    /// Of the slowest node.
    pub latency_ms: Latency,
    /// Over all nodes that answer; null: nobody was looked up.
    pub hit_share: Option<HitShare>,
    pub nodes: Vec<NodeState>,
}

/// Lives of gateways. One that is drained is counted there only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct GatewayCounts {
    pub alive: u64,
    pub late: u64,
    /// Late, while a hold is on.
    pub held: u64,
    pub draining: u64,
    /// Without a heartbeat: they never registered.
    pub unmanaged: u64,
}

/// A time in which no gateway is declared dead.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct HoldReport {
    pub until_ms: i64,
    pub reason: String,
    /// Gateways.
    pub silent: u64,
}

/// Stored messages, over all users.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct InboxReport {
    pub messages: u64,
    pub oldest_s: u64,
}

/// Per second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Rates {
    /// Users looked up, one by one and in batches.
    pub queries: f64,
    pub binds: f64,
    pub deliveries: f64,
    /// Of the deliveries, those that a gateway took; null: there were none.
    pub delivered_share: Option<f64>,
    /// Of the database and of Redis, and calls that were turned away.
    pub errors: f64,
}

/// One node in short.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct NodeState {
    pub node_id: String,
    pub ready: bool,
    pub degraded: Vec<String>,
}
