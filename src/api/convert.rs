//! Between wire types and domain types. Everything that comes in is checked here, once; the error names the field.

use std::collections::HashMap;
use std::fmt;
use std::fmt::Display;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::domain::caller::Caller;
use crate::domain::event::Bind;
use crate::domain::event::Unbind;
use crate::domain::gateway::Beat;
use crate::domain::gateway::DEFAULT_WEIGHT;
use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Profile;
use crate::domain::gateway::Registration;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::InvalidId;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::policy::Refusal;
use crate::domain::route::Platform;
use crate::domain::route::Route;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::time::written_time;
use crate::engine::gateways::registry::Terms;
use crate::engine::messages::acks::Ack;
use crate::engine::messages::inbox::StoredMessage;
use crate::engine::messages::streams::Envelope;
use crate::engine::messages::streams::KickOrder;
use crate::engine::read::directory::LiveRoute;
use crate::engine::read::directory::Source;
use crate::error::Error;
use crate::pb;

/// Users or binds in one batch.
pub const MAX_BATCH: usize = 10_000;
/// Users in one batch that asks for routes.
pub const MAX_BATCH_WITH_ROUTES: usize = 2_000;

/// Largest answer: most clients take no more than 4 MiB.
pub const MAX_ANSWER_BYTES: usize = 3_584 * 1024;

/// A node's name, a dash and a number.
const MAX_DELIVERY_ID_BYTES: usize = 128;
pub const MAX_REGION_BYTES: usize = 128;
/// Of a gateway's weight next to others.
const MAX_WEIGHT: usize = 1_000;
const MAX_LABELS: usize = 16;
const MAX_LABEL_NAME_BYTES: usize = 63;
pub const MAX_LABEL_BYTES: usize = 255;

const KEY_PREFIX: &str = "user:route:";

fn invalid(field: &'static str) -> impl FnOnce(InvalidId) -> Error {
    move |error| Error::Invalid { field, reason: error.to_string() }
}

pub fn user_id(raw: i64) -> Result<UserId, Error> {
    UserId::parse(raw).map_err(invalid("user_id"))
}

pub fn user_ids(raw: &[i64], limit: usize) -> Result<Vec<UserId>, Error> {
    batch_size("user_ids", raw.len(), limit)?;
    raw.iter().map(|raw| UserId::parse(*raw).map_err(invalid("user_ids"))).collect()
}

pub fn batch_size(field: &'static str, len: usize, limit: usize) -> Result<(), Error> {
    if len <= limit { Ok(()) } else { Err(Error::Invalid { field, reason: format!("at most {limit} in one call, is {len}") }) }
}

pub fn bind(request: &pb::BindRouteReq) -> Result<(UserId, Bind), Error> {
    bind_on(gateway(&request.gateway_addr)?, epoch(request.gateway_epoch), request)
}

/// A bind whose gateway and life are known.
pub fn bind_on(gateway: GatewayAddr, epoch: Option<Epoch>, request: &pb::BindRouteReq) -> Result<(UserId, Bind), Error> {
    let bind = Bind {
        gateway,
        epoch,
        device: DeviceId::parse(&request.device_id).map_err(invalid("device_id"))?,
        platform: platform(request.platform)?,
        conn: ConnId::parse(&request.conn_id).map_err(invalid("conn_id"))?,
        client_ip: client_ip(&request.client_ip)?,
        client_port: client_port(request.client_port)?,
        connected_ago: (request.connected_ms_ago > 0).then(|| Duration::from_millis(request.connected_ms_ago.into())),
        idle: request.idle,
    };
    Ok((user_id(request.user_id)?, bind))
}

/// `by`: who asks, if that is known.
pub fn unbind(request: &pb::UnbindRouteReq, by: Option<&Arc<Caller>>) -> Result<(UserId, Unbind), Error> {
    let user = user_id(request.user_id)?;
    let device = DeviceId::parse(&request.device_id).map_err(invalid("device_id"))?;
    let conn = ConnId::parse(&request.conn_id).map_err(invalid("conn_id"))?;
    let conn = (!conn.is_empty()).then_some(conn);
    let epoch = epoch(request.gateway_epoch);
    if request.route_key.is_empty() {
        let gateway = GatewayAddr::parse(&request.gateway_addr).map_err(invalid("gateway_addr"))?;
        return Ok((user, Unbind::Device { device, gateway, conn, epoch }));
    }
    if !request.gateway_addr.is_empty() {
        GatewayAddr::parse(&request.gateway_addr).map_err(invalid("gateway_addr"))?;
    }
    let bound_version = parse_route_key(user, &request.route_key)?;
    Ok((user, Unbind::Exact { bound_version, conn, epoch, by: by.cloned() }))
}

pub fn route_key(user: UserId, bound_version: Version) -> impl Display {
    fmt::from_fn(move |f| write!(f, "{KEY_PREFIX}{user}:{}", bound_version.0))
}

fn parse_route_key(user: UserId, key: &str) -> Result<Version, Error> {
    let invalid = |reason: &str| Error::Invalid { field: "route_key", reason: reason.to_owned() };
    let (owner, version) = key
        .strip_prefix(KEY_PREFIX)
        .and_then(|rest| rest.split_once(':'))
        .ok_or_else(|| invalid("must be a key that BindRoute has answered with"))?;
    let version = version.parse().map_err(|_| invalid("must be a key that BindRoute has answered with"))?;
    if owner != user.to_string() {
        return Err(invalid("must belong to user_id"));
    }
    Ok(Version(version))
}

fn epoch(raw: u64) -> Option<Epoch> {
    (raw != 0).then_some(Epoch(raw))
}

pub fn gateway(raw: &str) -> Result<GatewayAddr, Error> {
    GatewayAddr::parse(raw).map_err(invalid("gateway_addr"))
}

/// The epoch of a gateway that has registered.
pub fn registered_epoch(raw: u64) -> Result<Epoch, Error> {
    let reason = || "must be the epoch that RegisterGateway answered with, is 0".to_owned();
    epoch(raw).ok_or_else(|| Error::Invalid { field: "gateway_epoch", reason: reason() })
}

/// What a gateway says of itself, and the life it wants to go on with.
pub fn registration(request: pb::RegisterGatewayReq) -> Result<Registration, Error> {
    let gateway = gateway(&request.gateway_addr)?;
    at_most("region", request.region.len(), MAX_REGION_BYTES, "bytes")?;
    check_labels(&request.labels, MAX_LABELS)?;
    let weight = request.weight.unwrap_or(DEFAULT_WEIGHT);
    at_most("weight", weight as usize, MAX_WEIGHT, "parts")?;
    if !request.public_addr.is_empty() {
        GatewayAddr::parse(&request.public_addr).map_err(invalid("public_addr"))?;
    }
    let profile = Profile {
        region: request.region,
        capacity: request.capacity,
        labels: request.labels.into_iter().collect(),
        weight,
        public_addr: request.public_addr,
        login_rate: request.login_rate,
    };
    Ok(Registration { gateway, claimed: epoch(request.gateway_epoch), profile })
}

pub fn beat(request: &pb::HeartbeatReq) -> Result<(GatewayAddr, Beat), Error> {
    let gateway = gateway(&request.gateway_addr)?;
    let (epoch, load) = (registered_epoch(request.gateway_epoch)?, request.load);
    if !load.is_finite() || load < 0.0 {
        return Err(Error::Invalid { field: "load", reason: format!("must be a number from 0 on, is {load}") });
    }
    Ok((gateway, Beat { epoch, connections: request.connections, load }))
}

/// # Errors
/// More than `most` labels, or one is too long.
pub fn check_labels(labels: &HashMap<String, String>, most: usize) -> Result<(), Error> {
    at_most("labels", labels.len(), most, "labels")?;
    labels.iter().try_for_each(|(name, value)| {
        at_most("labels", name.len(), MAX_LABEL_NAME_BYTES, "bytes in a name")?;
        at_most("labels", value.len(), MAX_LABEL_BYTES, "bytes in a value")
    })
}

pub fn at_most(field: &'static str, given: usize, limit: usize, of_what: &str) -> Result<(), Error> {
    if given <= limit {
        return Ok(());
    }
    Err(Error::Invalid { field, reason: format!("must be at most {limit} {of_what}, is {given}") })
}

fn client_ip(raw: &str) -> Result<Option<IpAddr>, Error> {
    let reason = || "must be empty or an IP address".to_owned();
    if raw.is_empty() {
        return Ok(None);
    }
    raw.parse().map(Some).map_err(|_| Error::Invalid { field: "client_ip", reason: reason() })
}

fn client_port(raw: i32) -> Result<u16, Error> {
    u16::try_from(raw).map_err(|_| Error::Invalid { field: "client_port", reason: format!("must be 0 to 65535, is {raw}") })
}

pub fn platform(raw: i32) -> Result<Platform, Error> {
    let known = pb::Platform::try_from(raw)
        .map_err(|_| Error::Invalid { field: "platform", reason: format!("must be 0 to 8, is {raw}") })?;
    Ok(match known {
        pb::Platform::Unspecified => Platform::Unspecified,
        pb::Platform::Ios => Platform::Ios,
        pb::Platform::Android => Platform::Android,
        pb::Platform::Windows => Platform::Windows,
        pb::Platform::Macos => Platform::Macos,
        pb::Platform::Linux => Platform::Linux,
        pb::Platform::Web => Platform::Web,
        pb::Platform::Tablet => Platform::Tablet,
        pb::Platform::Other => Platform::Other,
    })
}

pub fn platform_to_pb(platform: Platform) -> pb::Platform {
    match platform {
        Platform::Unspecified => pb::Platform::Unspecified,
        Platform::Ios => pb::Platform::Ios,
        Platform::Android => pb::Platform::Android,
        Platform::Windows => pb::Platform::Windows,
        Platform::Macos => pb::Platform::Macos,
        Platform::Linux => pb::Platform::Linux,
        Platform::Web => pb::Platform::Web,
        Platform::Tablet => pb::Platform::Tablet,
        Platform::Other => pb::Platform::Other,
    }
}

pub fn status_to_pb(status: Status) -> pb::Status {
    match status {
        Status::Online => pb::Status::Online,
        Status::Away => pb::Status::Away,
        Status::Busy => pb::Status::Busy,
        Status::Invisible => pb::Status::Invisible,
        Status::Offline => pb::Status::Offline,
    }
}

pub fn source_to_pb(source: Source) -> pb::Source {
    match source {
        Source::Local => pb::Source::Local,
        Source::Shared => pb::Source::Shared,
        Source::Durable => pb::Source::Durable,
    }
}

pub fn state_to_pb(live: &LiveRoute<'_>) -> pb::RouteState {
    if live.suspect { pb::RouteState::Suspect } else { pb::RouteState::Live }
}

/// A route that a bind has removed.
pub fn kicked_route(user: UserId, removed: &Route, lives: &LifeTable) -> pb::Route {
    let gateway = lives.get(removed.epoch).map(|life| life.gateway.to_string()).unwrap_or_default();
    route(user, removed, gateway)
}

/// A route as a message, of which is not said whether it is live.
pub fn route(user: UserId, route: &Route, gateway_addr: String) -> pb::Route {
    pb::Route {
        device_id: route.device.to_string(),
        platform: platform_to_pb(route.platform).into(),
        gateway_addr,
        gateway_epoch: route.epoch.0,
        conn_id: route.conn.to_string(),
        client_ip: route.client_ip.map(|ip| ip.to_string()).unwrap_or_default(),
        client_port: route.client_port.into(),
        bound_at_ms: route.bound_at.0,
        route_key: route_key(user, route.bound_version).to_string(),
        state: pb::RouteState::Unspecified.into(),
        idle: route.idle,
    }
}

/// What a gateway is told whose life is over.
pub fn fenced(fence: Fence) -> Option<pb::Result> {
    match fence {
        Fence::Expired => result(pb::Code::Fenced, "expired: the gateway's epoch is over; register, then bind again"),
        Fence::Superseded => result(
            pb::Code::Superseded,
            "superseded: another process registered under this address; stop, or wait at least one lease before registering",
        ),
    }
}

/// What a gateway is told that has its life.
pub fn welcome(epoch: Epoch, terms: &Terms) -> pb::RegisterGatewayResp {
    pb::RegisterGatewayResp {
        result: result(pb::Code::Ok, ""),
        gateway_epoch: epoch.0,
        heartbeat_interval_ms: millis(terms.heartbeat_interval),
        lease_ms: millis(terms.lease),
    }
}

/// What a gateway is told whose lease was extended.
pub fn beaten(life: &Life, now: Timestamp) -> pb::HeartbeatResp {
    let lease_ms = millis(life.lease_until.since(now));
    pb::HeartbeatResp { result: result(pb::Code::Ok, ""), draining: life.draining, lease_ms }
}

pub fn ack(ack: &pb::DeliveryAck) -> Result<Ack, Error> {
    at_most("delivery_id", ack.delivery_id.len(), MAX_DELIVERY_ID_BYTES, "bytes")?;
    let device = DeviceId::parse(&ack.device_id).map_err(invalid("device_id"))?;
    Ok(Ack { delivery_id: ack.delivery_id.clone(), user: user_id(ack.user_id)?, device, not_here: ack.not_here, by: None })
}

pub fn ack_to_pb(ack: &Ack) -> pb::DeliveryAck {
    let (delivery_id, device_id) = (ack.delivery_id.clone(), ack.device.to_string());
    pb::DeliveryAck { delivery_id, user_id: ack.user.get(), device_id, not_here: ack.not_here }
}

/// A delivery without its content, which stands elsewhere.
pub fn addressed(envelope: &Envelope) -> pb::Delivery {
    pb::Delivery {
        delivery_id: envelope.delivery_id.clone(),
        user_id: envelope.user_id,
        message: String::new(),
        message_type: envelope.message_type.clone(),
        payload: Bytes::new(),
        timestamp: envelope.timestamp,
        device_ids: envelope.device_ids.clone(),
        wants_ack: envelope.wants_ack,
        message_id: envelope.message_id.clone(),
        inbox_seq: envelope.inbox_seq,
        traceparent: envelope.traceparent.clone(),
    }
}

pub fn content(envelope: &Envelope) -> pb::Content {
    pb::Content { message: text(&envelope.message), payload: envelope.payload.clone() }
}

pub fn delivery(envelope: &Envelope) -> pb::Delivery {
    let (message, payload) = (text(&envelope.message), envelope.payload.clone());
    pb::Delivery { message, payload, ..addressed(envelope) }
}

/// It came as text, so it is UTF-8.
fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A message that is pulled out of an inbox. It is acknowledged by its number.
pub fn stored_delivery(user: UserId, stored: StoredMessage) -> pb::Delivery {
    let StoredMessage { seq, message, stored_at } = stored;
    let (words, payload) = match message.is_binary {
        true => (String::new(), message.body),
        false => (text(&message.body), Bytes::new()),
    };
    pb::Delivery {
        delivery_id: String::new(),
        user_id: user.get(),
        message: words,
        message_type: message.message_type,
        payload,
        timestamp: stored_at.0,
        device_ids: message.devices.into_iter().flatten().map(|device| device.to_string()).collect(),
        wants_ack: false,
        message_id: message.message_id,
        inbox_seq: seq,
        traceparent: String::new(),
    }
}

pub fn device_id(raw: &str) -> Result<DeviceId, Error> {
    DeviceId::parse(raw).map_err(invalid("device_id"))
}

pub fn conn_id(raw: &str) -> Result<ConnId, Error> {
    ConnId::parse(raw).map_err(invalid("conn_id"))
}

pub fn envelope(delivery: pb::Delivery) -> Envelope {
    Envelope {
        delivery_id: delivery.delivery_id,
        user_id: delivery.user_id,
        message: delivery.message.into(),
        message_type: delivery.message_type,
        payload: delivery.payload,
        timestamp: delivery.timestamp,
        device_ids: delivery.device_ids,
        wants_ack: delivery.wants_ack,
        message_id: delivery.message_id,
        inbox_seq: delivery.inbox_seq,
        traceparent: delivery.traceparent,
    }
}

pub fn kick(kick: &KickOrder) -> pb::Kick {
    let KickOrder { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms } = kick.clone();
    pb::Kick { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms }
}

pub fn kick_order(kick: pb::Kick) -> KickOrder {
    let pb::Kick { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms } = kick;
    KickOrder { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms }
}

pub fn refusal(refusal: Refusal) -> String {
    match refusal {
        Refusal::Older => "a newer connection holds the device".to_owned(),
        Refusal::DeviceLimit => "the user has as many devices online as allowed (route.max_devices)".to_owned(),
        Refusal::PlatformLimit => {
            "the user has as many devices of this platform online as allowed (route.per_platform)".to_owned()
        }
        Refusal::Banned { until, .. } => format!("banned until {}", written_time(until)),
    }
}

pub fn result(code: pb::Code, msg: impl Into<String>) -> Option<pb::Result> {
    Some(pb::Result { code: code.into(), msg: msg.into() })
}

pub fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
