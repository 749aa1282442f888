//! What can be configured. Three layers, a later one wins: `config/default.toml` (compiled in, the one place of defaults),
//! a file (.toml or .ini), environment variables `IM_PRESENCE__SECTION__KEY`.
//!
//! Every value is checked once, when it is loaded; all that is wrong is told at once, each with the file or variable it came
//! from. Passwords show neither in errors nor in `Debug`, nor in `Display`, which is the effective configuration as TOML.

mod allocation;
mod database;
mod digest;
mod forms;
mod load;
mod moves;
mod presence;
mod redis;
mod rules;
mod schema;
mod secret;
mod security;
mod sources;
mod trace;

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;
use serde_json::Value;

pub use allocation::Algorithm;
pub use allocation::Allocation;
pub use allocation::Experiment;
pub use database::Store;
pub use database::StoreTls;
pub use database::server_of;
pub use digest::Digest;
use forms::millis;
use forms::or_empty;
use forms::seconds;
pub use load::ConfigError;
pub use load::Problem;
pub use moves::Drain;
pub use presence::History;
pub use presence::Status;
pub use presence::Watch;
pub use redis::Redis;
pub use redis::RedisCache;
pub use redis::RedisMode;
pub use redis::RedisQueue;
pub use rules::UNNAMED;
pub use secret::Secret;
pub use secret::Url;
pub use security::Audit;
pub use security::Auth;
pub use security::AuthMode;
pub use security::Credential;
pub use security::MtlsRule;
pub use security::Peer;
pub use security::Tls;
pub use security::WhoReadsMetrics;
pub use sources::Sources;
pub use trace::Trace;

/// Everything that can be configured, checked. A Redis section that is `None` is a tier that is not there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub presence_service: PresenceService,
    pub node: Node,
    pub admin: Admin,
    pub console: Console,
    pub log: Log,
    pub trace: Trace,
    pub tls: Tls,
    pub admin_tls: Tls,
    pub peer: Peer,
    pub auth: Auth,
    pub audit: Audit,
    pub limits: Limits,
    pub route: Route,
    pub gateway: Gateway,
    pub delivery: Delivery,
    pub drain: Drain,
    pub status: Status,
    pub watch: Watch,
    pub history: History,
    pub allocation: Allocation,
    pub digest: Digest,
    pub store: Store,
    pub redis_cache: Option<RedisCache>,
    pub redis_queue: Option<RedisQueue>,
    #[serde(skip)]
    pub sources: Sources,
}

/// The gRPC port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PresenceService {
    pub host: String,
    /// 0 picks a free one.
    pub port: u16,
    /// 0: one per core.
    pub thread_count: usize,
    pub max_connections: usize,
    /// Users online; 0: no limit.
    pub max_capacity: u64,
    /// `None`: a random one.
    #[serde(with = "or_empty")]
    pub node_id: Option<String>,
    /// `host:port` for other nodes; `None`: the address it listens on.
    #[serde(with = "or_empty")]
    pub advertise: Option<String>,
    /// How long a node that is asked to stop still serves.
    #[serde(with = "millis")]
    pub drain_ms: Duration,
}

/// What others are told of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    pub zone: String,
}

/// The port for operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    pub host: String,
    /// 0 picks a free one.
    pub port: u16,
    /// Under which the REST API may be called, besides IP addresses, localhost and the node's own.
    pub allowed_hosts: Vec<String>,
}

/// What browsers see on the port for operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Where the past is drawn.
    #[serde(with = "or_empty")]
    pub grafana_url: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    pub format: LogFormat,
    /// A level, or `EnvFilter` directives.
    pub level: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text if stderr is a terminal, else JSON.
    Auto,
    Text,
    Json,
}

/// What callers may use of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Of all calls under way and all that waits for gateways.
    pub memory_bytes: usize,
    /// Of one caller; 0: no limit.
    pub calls_per_s: u32,
    pub users_per_s: u32,
    pub streams: usize,
}

/// Routes, and the policy about a user's devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// Life of a route on an unmanaged gateway.
    #[serde(with = "seconds")]
    pub route_ttl: Duration,
    /// How long `user:status:<id>` outlives the last route.
    #[serde(with = "seconds")]
    pub status_ttl: Duration,
    /// Of a delivery that no gateway took.
    pub max_retries: u32,
    #[serde(with = "millis")]
    pub retry_interval: Duration,
    /// In users.
    pub l1_capacity: u64,
    #[serde(with = "seconds")]
    pub l1_ttl: Duration,
    pub max_devices: usize,
    pub on_overflow: OnOverflow,
    /// 0: no limit.
    pub per_platform: usize,
    pub mpim_keys: bool,
}

/// What a device beyond `max_devices` meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnOverflow {
    KickOldest,
    RefuseNew,
}

/// When a gateway is believed alive.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gateway {
    #[serde(with = "millis")]
    pub heartbeat_interval: Duration,
    /// At least three heartbeats.
    #[serde(with = "millis")]
    pub lease: Duration,
    /// What is left of the lease when the stream broke.
    #[serde(with = "millis")]
    pub stream_grace: Duration,
    /// 0 to 1.
    pub doubt_share: f64,
    #[serde(with = "millis")]
    pub doubt_for: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delivery {
    pub payload: Payload,
    pub max_message_bytes: usize,
    /// Per user.
    pub inbox_max_messages: u64,
    /// Per user.
    pub inbox_max_bytes: u64,
    #[serde(with = "seconds")]
    pub inbox_ttl: Duration,
}

/// What is published on `user:<id>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Payload {
    /// The message as it was given.
    Raw,
    /// A protobuf `Delivery`.
    Envelope,
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tree = serde_json::to_value(self).map_err(|_| fmt::Error)?;
        let sections = tree.as_object().into_iter().flatten();
        for (at, (section, keys)) in sections.filter_map(|(section, keys)| Some((section, keys.as_object()?))).enumerate() {
            writeln!(f, "{}[{section}]", if at == 0 { "" } else { "\n" })?;
            for (key, value) in keys {
                writeln!(f, "{key} = {}", in_toml(value))?;
            }
        }
        Ok(())
    }
}

/// A number, a boolean or a quoted string is written alike in JSON and TOML.
fn in_toml(value: &Value) -> String {
    let joined = |items: Vec<String>| items.join(", ");
    match value {
        Value::Array(items) => format!("[{}]", joined(items.iter().map(in_toml).collect())),
        Value::Object(keys) => {
            format!("{{ {} }}", joined(keys.iter().map(|(key, value)| format!("{key:?} = {}", in_toml(value))).collect()))
        }
        value => value.to_string(),
    }
}
