//! The calls of `PresenceService`, as their arguments ask for them.

use std::fs;
use std::io;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;

use crate::pb::BatchQueryRouteReq;
use crate::pb::BindRouteReq;
use crate::pb::DeliverReq;
use crate::pb::Platform;
use crate::pb::QueryRouteReq;
use crate::pb::UnbindRouteReq;

pub const PLATFORMS: [&str; 8] = ["ios", "android", "windows", "macos", "linux", "web", "tablet", "other"];

#[derive(Args)]
pub struct Bind {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub user: i64,
    /// Address of the gateway that holds the connection
    pub gateway: String,
    /// Which device of the user; without it, the user's one unnamed device
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    device: String,
    /// What the device is
    #[arg(long, value_parser = PossibleValuesParser::new(PLATFORMS).map(|name| platform(&name)))]
    platform: Option<Platform>,
    /// The gateway's epoch, if it registered
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    epoch: u64,
    /// The gateway's name for this connection; the same bind again then changes nothing
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    conn: String,
    /// How long ago the client connected; it does not displace a connection that is newer
    #[arg(long, value_name = "N", default_value_t = 0)]
    connected_ms_ago: u32,
    /// Nobody uses the device
    #[arg(long)]
    idle: bool,
    /// The client's own address
    #[arg(long, value_name = "IP")]
    client_ip: Option<IpAddr>,
    /// The client's own port
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    client_port: u16,
}

#[derive(Args)]
pub struct Unbind {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub user: i64,
    /// Only if the device is on this gateway
    #[arg(long, value_name = "ADDR", required_unless_present = "route_key")]
    gateway: Option<String>,
    /// Which device of the user; without it, the user's one unnamed device
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    device: String,
    /// Exactly this bind and no newer one: as bind and query print it
    #[arg(long, value_name = "KEY")]
    route_key: Option<String>,
    /// Only this connection
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    conn: String,
    /// Only in this life of the gateway
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    epoch: u64,
}

#[derive(Args)]
pub struct Query {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub user: i64,
    /// How far the answer may be behind; 0 reads SQL; without it, any answer will do
    #[arg(long, value_name = "N")]
    max_staleness_ms: Option<u32>,
}

#[derive(Args)]
pub struct BatchQuery {
    /// Up to 10,000 users (2,000 with --routes); `-` reads them from stdin, one per line
    #[arg(value_name = "USER", required = true)]
    users: Vec<String>,
    /// Leave out users that are not online
    #[arg(long)]
    pub online_only: bool,
    /// Also each user's routes
    #[arg(long)]
    pub routes: bool,
    /// How far the answer may be behind; 0 reads SQL; without it, any answer will do
    #[arg(long, value_name = "N")]
    max_staleness_ms: Option<u32>,
}

#[derive(Args)]
pub struct Deliver {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    pub user: i64,
    /// The message, as text
    #[arg(required_unless_present = "binary_file", conflicts_with = "binary_file")]
    message: Option<String>,
    /// What kind of message it is; receivers see it if delivery.payload = envelope
    #[arg(long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    message_type: String,
    /// Wait so long, in milliseconds, for a device to acknowledge it; 0: a gateway that takes it is enough
    #[arg(long, value_name = "MS", default_value_t = 0, hide_default_value = true)]
    ack_timeout_ms: u32,
    /// Store it for a user who cannot be reached now
    #[arg(long)]
    store_offline: bool,
    /// The message's own id: the same message again to the same node is then delivered once
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    message_id: String,
    /// Deliver the bytes of this file instead of a text; `-` is stdin
    #[arg(long, value_name = "FILE")]
    binary_file: Option<PathBuf>,
    /// Show how it went, step by step; for operators
    #[arg(long)]
    pub trace: bool,
}

impl Bind {
    pub fn request(&self) -> BindRouteReq {
        BindRouteReq {
            user_id: self.user,
            gateway_addr: self.gateway.clone(),
            client_ip: self.client_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            client_port: self.client_port.into(),
            device_id: self.device.clone(),
            platform: self.platform.unwrap_or(Platform::Unspecified).into(),
            gateway_epoch: self.epoch,
            conn_id: self.conn.clone(),
            connected_ms_ago: self.connected_ms_ago,
            idle: self.idle,
        }
    }
}

impl Unbind {
    pub fn request(&self) -> UnbindRouteReq {
        UnbindRouteReq {
            user_id: self.user,
            route_key: self.route_key.clone().unwrap_or_default(),
            gateway_addr: self.gateway.clone().unwrap_or_default(),
            device_id: self.device.clone(),
            conn_id: self.conn.clone(),
            gateway_epoch: self.epoch,
        }
    }
}

impl Query {
    pub fn request(&self) -> QueryRouteReq {
        QueryRouteReq { user_id: self.user, max_staleness_ms: self.max_staleness_ms }
    }
}

impl BatchQuery {
    pub fn ids(&self) -> Result<Vec<i64>, String> {
        let mut words = Vec::new();
        for user in &self.users {
            if user == "-" {
                let lines = io::read_to_string(io::stdin()).map_err(|error| format!("cannot read stdin: {error}"))?;
                words.extend(lines.split_whitespace().map(str::to_owned));
            } else {
                words.push(user.clone());
            }
        }
        words.iter().map(|word| word.parse().map_err(|_| format!("a user is a number, not {word:?}"))).collect()
    }

    pub fn request(&self, user_ids: Vec<i64>) -> BatchQueryRouteReq {
        let Self { max_staleness_ms, online_only, routes: with_routes, .. } = *self;
        BatchQueryRouteReq { user_ids, max_staleness_ms, online_only, with_routes }
    }
}

impl Deliver {
    pub fn request(&self) -> Result<DeliverReq, String> {
        let payload = match &self.binary_file {
            Some(path) => bytes_of(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?,
            None => Vec::new(),
        };
        Ok(DeliverReq {
            user_id: self.user,
            message: self.message.clone().unwrap_or_default(),
            message_type: self.message_type.clone(),
            payload: payload.into(),
            message_id: self.message_id.clone(),
            ack_timeout_ms: self.ack_timeout_ms,
            store_offline: self.store_offline,
            ..Default::default()
        })
    }
}

fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    if path != Path::new("-") {
        return fs::read(path);
    }
    let mut bytes = Vec::new();
    io::stdin().read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub fn platform(name: &str) -> Platform {
    Platform::from_str_name(&format!("PLATFORM_{}", name.to_uppercase())).unwrap_or(Platform::Other)
}
