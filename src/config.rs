//! What can be configured. Three layers, a later one wins: `config/default.toml` (compiled in, the one place of defaults),
//! a file (.toml or .ini), environment variables `IM_PRESENCE__SECTION__KEY`.
//!
//! Every value is checked once, when it is loaded; all that is wrong is told at once, each with the file or variable it came
//! from. Passwords show neither in errors nor in `Debug`, nor in `Display`, which is the effective configuration as TOML.

mod load;
mod rules;
mod schema;

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;

pub use load::ConfigError;
pub use load::Problem;
pub use rules::UNNAMED;

const MASK: &str = "***";

/// Everything that can be configured, checked. A Redis section that is `None` is a tier that is not there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub presence_service: PresenceService,
    pub admin: Admin,
    pub log: Log,
    pub limits: Limits,
    pub route: Route,
    pub gateway: Gateway,
    pub delivery: Delivery,
    pub store: Store,
    pub redis_cache: Option<Redis>,
    pub redis_queue: Option<RedisQueue>,
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
}

/// The port for operators.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    pub host: String,
    /// 0 picks a free one.
    pub port: u16,
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

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Begins with `sqlite:`, `mysql:` or `mariadb:`.
    pub url: Url,
    /// For reading.
    pub connections: u32,
    /// SQLite uses 1, whatever is said here.
    pub lanes: usize,
    /// Events per lane.
    pub queue: usize,
    #[serde(with = "millis")]
    pub timeout: Duration,
    #[serde(with = "millis")]
    pub max_event_age: Duration,
    /// Zero: never.
    #[serde(with = "seconds")]
    pub forget_users_after: Duration,
}

/// A Redis server: by `url`, or by all the other fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    pub host: String,
    pub port: u16,
    pub database: u32,
    /// For connecting and writing, not for readers. Also goes with `url`.
    #[serde(with = "millis")]
    pub timeout: Duration,
    #[serde(with = "or_empty")]
    pub username: Option<String>,
    #[serde(with = "or_empty")]
    pub password: Option<Secret>,
    pub tls: bool,
    /// Given: the fields above, `timeout` excepted, have their defaults and say nothing.
    #[serde(with = "or_empty")]
    pub url: Option<Url>,
}

/// The Redis that carries channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RedisQueue {
    #[serde(flatten)]
    pub server: Redis,
    /// Begins every channel's name; may be empty.
    pub channel_prefix: String,
}

/// A string that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

/// A URL whose password is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Url(String);

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tree = serde_json::to_value(self).map_err(|_| fmt::Error)?;
        let sections = tree.as_object().into_iter().flatten();
        for (at, (section, keys)) in sections.filter_map(|(section, keys)| Some((section, keys.as_object()?))).enumerate() {
            writeln!(f, "{}[{section}]", if at == 0 { "" } else { "\n" })?;
            for (key, value) in keys {
                writeln!(f, "{key} = {value}")?; // a number, a boolean or a quoted string is written alike in JSON and TOML
            }
        }
        Ok(())
    }
}

impl Secret {
    /// The string itself: for the server that asks for it, for nobody's eyes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

impl Url {
    /// The URL with its password: for connecting, not for logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Url {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Keys of a URL's query that hold no secret.
const SHOWN_KEYS: [&str; 8] =
    ["ssl-mode", "sslmode", "charset", "collation", "statement-cache-capacity", "mode", "vfs", "protocol"];
/// Ports that are shown although no login stands before them. Another number may be a password whose server was forgotten; of a
/// Redis, which is seldom given a user, only where no host stands.
const USUAL_PORTS: [&str; 2] = ["3306", "6379"];

/// Shows what cannot be a password: of a login the user, of a server its name and port, of a query known keys.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.0.split_once("://").map_or(("", &*self.0), |(scheme, rest)| (scheme, rest));
        if !scheme.is_empty() {
            write!(f, "{scheme}://")?;
        }
        let (rest, query) = match rest.rfind('?').filter(|at| !rest[*at..].contains('@')) {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        match rest.rsplit_once('@') {
            _ if is_file(scheme, rest) => f.write_str(rest)?,
            Some((login, server)) => {
                let (user, mask) = login.split_once(':').map_or((login, ""), |(user, _)| (user, ":***"));
                write!(f, "{user}{mask}@{}", without_password(server, |port| port.parse::<u16>().is_ok()))?;
            }
            None => {
                let may_be_port =
                    |port: &str| scheme.starts_with("redis") && !rest.starts_with(':') && port.parse::<u16>().is_ok();
                f.write_str(&without_password(rest, |port| USUAL_PORTS.contains(&port) || may_be_port(port)))?;
            }
        }
        match query {
            Some(query) if is_shown(query) => write!(f, "?{query}"),
            Some(_) => write!(f, "?{MASK}"),
            None => Ok(()),
        }
    }
}

fn is_file(scheme: &str, rest: &str) -> bool {
    scheme == "sqlite" || rest.starts_with("sqlite:") || scheme.ends_with("unix")
}

fn is_shown(query: &str) -> bool {
    query.split('&').all(|pair| SHOWN_KEYS.contains(&pair.split('=').next().unwrap_or_default()))
}

/// `HOST:PORT/PATH`; or, if that is no such port, without what follows the host.
fn without_password(server: &str, is_port: impl Fn(&str) -> bool) -> String {
    let (authority, path) = server.split_once('/').map_or((server, String::new()), |(server, path)| (server, format!("/{path}")));
    let host_end = if authority.starts_with('[') { authority.find(']').map_or(0, |end| end + 1) } else { 0 };
    match authority[host_end..].split_once(':') {
        Some((_, port)) if is_port(port) => format!("{authority}{path}"),
        Some((host, _)) => format!("{}{host}:{MASK}", &authority[..host_end]),
        None => format!("{authority}{path}"),
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A string of which the empty one means that there is none.
mod or_empty {
    use super::*;

    pub fn serialize<T: Serialize, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => value.serialize(serializer),
            None => "".serialize(serializer),
        }
    }

    pub fn deserialize<'de, T: From<String>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok((!text.is_empty()).then(|| text.into()))
    }
}

mod seconds {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_secs().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_secs)
    }
}

mod millis {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        value.as_millis().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_hides_its_password() {
        let check = |url: &str, shown: &str| assert_eq!(Url::from(url.to_owned()).to_string(), shown);
        check("sqlite://im-presence.db", "sqlite://im-presence.db");
        check("sqlite::memory:", "sqlite::memory:");
        check("mysql://app@db/im", "mysql://app@db/im");
        check("mysql://app:s3cret@db:3306/im?ssl-mode=required", "mysql://app:***@db:3306/im?ssl-mode=required");
        check("mysql://app:p@ss:/w?rd@db/im", "mysql://app:***@db/im");
        check("redis://:s3cret@cache", "redis://:***@cache");
        check("redis+unix:///run/redis.sock?db=1&pass=s3cret", "redis+unix:///run/redis.sock?***");
        check("redis://cache:6379?token=s3cret", "redis://cache:6379?***");
        check("app:s3cret@db", "app:***@db");
        check("mysql://app:s3cret", "mysql://app:***");
        check("mysql://app:s3cret/im", "mysql://app:***");
        check("redis://:s3cret", "redis://:***");
        check("mysql://app:12345", "mysql://app:***");
        check("redis://:12345", "redis://:***");
        check("redis://cache:6380/1", "redis://cache:6380/1");
        check("mysql://app:12345/im", "mysql://app:***");
        check("mysql://app:s3cret:3306/im", "mysql://app:***");
        check("mysql://app:s3cret?ssl-mode=required", "mysql://app:***?ssl-mode=required");
        check("mysql://app@s3cret:x:3306/im", "mysql://app@s3cret:***");
        check("mysql://db:3306/im", "mysql://db:3306/im");
        check("redis://cache:6379/1", "redis://cache:6379/1");
        check("redis://[::1]:6379", "redis://[::1]:6379");
        check("redis://[::1]", "redis://[::1]");
    }
}
