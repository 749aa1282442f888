//! How answers look: a sentence and an aligned table for people, proto3 JSON for programs.

use std::time::Duration;

use prost::Message;
use prost_reflect::DescriptorPool;
use prost_reflect::DynamicMessage;
use prost_reflect::SerializeOptions;

use super::code;
use super::moment::shown as time;
use crate::domain::time::span;
use crate::pb;
use crate::pb::Code;
use crate::pb::Platform;
use crate::pb::RouteState;
use crate::pb::Source;
use crate::pb::Status;

const ROUTE_HEADERS: [&str; 7] = ["DEVICE", "PLATFORM", "GATEWAY", "EPOCH", "STATE", "CONNECTED SINCE", "ROUTE KEY"];

/// The message `mpim.<name>` as proto3 JSON on one line.
pub fn json(name: &str, message: &impl Message) -> String {
    let options = SerializeOptions::new().use_proto_field_name(true).skip_default_fields(false);
    let pool = DescriptorPool::decode(pb::DESCRIPTORS).expect("compiled in: descriptors");
    let descriptor = pool.get_message_by_name(&format!("mpim.{name}")).expect("compiled in: one of our messages");
    let mut reflected = DynamicMessage::new(descriptor);
    reflected.transcode_from(message).expect("compiled in: both are the same message");
    let mut line = serde_json::Serializer::new(Vec::new());
    reflected.serialize_with_options(&mut line, &options).expect("compiled in: a message of our own");
    String::from_utf8_lossy(&line.into_inner()).into_owned()
}

pub fn bound(user: i64, gateway: &str, answer: &pb::BindRouteResp) -> String {
    if code(&answer.result) != Code::Ok {
        return format!("user {user} was not bound to {gateway}{}", refusal(&answer.result));
    }
    let (version, epoch, key) = (answer.version, answer.gateway_epoch, &answer.route_key);
    let sentence = format!("user {user} is bound to {gateway}, epoch {epoch}, version {version}\nroute key: {key}");
    if answer.kicked.is_empty() { sentence } else { format!("{sentence}\nkicked:\n{}", routes(&answer.kicked)) }
}

pub fn unbound(user: i64, answer: &pb::UnbindRouteResp) -> String {
    if answer.unbound {
        format!("user {user} is unbound, version {}", answer.version)
    } else {
        format!("nothing of user {user} was unbound{}", refusal(&answer.result))
    }
}

pub fn found(user: i64, answer: &pb::QueryRouteResp) -> String {
    if !matches!(code(&answer.result), Code::Ok | Code::NotFound) {
        return format!("user {user} was not looked up{}", refusal(&answer.result));
    }
    let status = with_text_and_since(answer.status, &answer.status_text, answer.status_since_ms);
    let seen = match answer.last_seen_ms {
        _ if answer.is_online => String::new(),
        0 => ", never seen".into(),
        at => format!(", last seen {}", time(at)),
    };
    let source = match Source::try_from(answer.source) {
        Ok(Source::Local) => "memory",
        Ok(Source::Shared) => "Redis",
        Ok(Source::Durable) => "SQL",
        Ok(Source::Unspecified) | Err(_) => "an unknown source",
    };
    let (version, age) = (answer.version, answer.age_ms);
    let state = online(answer.is_online);
    let sentence = format!("user {user} is {state} ({status}){seen}, version {version}, from {source}, {age} ms old");
    if answer.routes.is_empty() { sentence } else { format!("{sentence}\n{}", routes(&answer.routes)) }
}

pub fn listed(with_routes: bool, answer: &pb::BatchQueryRouteResp) -> String {
    if code(&answer.result) != Code::Ok {
        return format!("the users were not looked up{}", refusal(&answer.result));
    }
    let users = &answer.users;
    let failed = users.iter().filter(|user| Code::try_from(user.code) == Ok(Code::Unavailable)).count();
    let count = users.iter().filter(|user| user.is_online).count();
    let unknown = if failed == 0 { String::new() } else { format!(", {failed} could not be looked up now") };
    let sentence = format!("{count} of {} listed users are online{unknown}", users.len());
    let rows: Vec<Vec<String>> = users.iter().map(user).collect();
    let mut parts = vec![sentence, table(&["USER", "IS", "STATUS", "GATEWAY"], &rows)];
    if with_routes {
        let of_user = |user: &pb::UserRoute| {
            user.routes.iter().map(|one| [vec![user.user_id.to_string()], route(one)].concat()).collect::<Vec<_>>()
        };
        parts.push(table(&[&["USER"], &ROUTE_HEADERS[..]].concat(), &users.iter().flat_map(of_user).collect::<Vec<_>>()));
    }
    parts.retain(|part| !part.is_empty());
    parts.join("\n")
}

pub fn delivered(user: i64, answer: &pb::DeliverResp) -> String {
    let attempts = counted(answer.attempts, "attempt");
    if answer.stored {
        return format!("the message for user {user} is stored until a device has it");
    }
    if !answer.delivered {
        return format!("the message was not delivered to user {user}{}, after {attempts}", refusal(&answer.result));
    }
    let (receivers, id) = (counted(answer.receivers, "receiver"), &answer.delivery_id);
    let acked = match &answer.acked_devices[..] {
        [] => String::new(),
        devices => {
            format!(", acknowledged by {}", devices.iter().map(|device| format!("{device:?}")).collect::<Vec<_>>().join(" "))
        }
    };
    format!("the message for user {user} is delivered to {receivers}{acked}, after {attempts}, delivery id {id}")
}

/// How a delivery went.
pub fn steps(answer: &pb::DeliverResp) -> String {
    let ms = |us: u64| format!("{:.2}", us as f64 / 1_000.0);
    let rows: Vec<Vec<String>> = answer
        .steps
        .iter()
        .map(|step| {
            let pb::DeliveryStep { at_us, what, node_id, gateway_addr, device_id, took_us, detail } = step;
            let words = [what, node_id, gateway_addr, device_id, detail].map(|word| harmless(word));
            let [what, node, gateway, device, detail] = words;
            vec![ms(*at_us), ms(*took_us), what, node, gateway, device, detail]
        })
        .collect();
    match &rows[..] {
        [] => "no steps: the node shows them to operators only, or is of a release that does not know them".to_owned(),
        rows => table(&["AT MS", "TOOK MS", "STEP", "NODE", "GATEWAY", "DEVICE", "DETAIL"], rows),
    }
}

pub fn gateways(answer: &pb::ListGatewaysResp) -> String {
    let alive = answer.lives.iter().filter(|life| life.alive).count();
    let hold = match answer.hold {
        true => {
            let left = span(Duration::from_millis(answer.hold_left_ms.try_into().unwrap_or(0)));
            format!("\nHOLD for {left} more: no gateway is declared dead. {}", harmless(&answer.hold_reason))
        }
        false => String::new(),
    };
    let rows: Vec<Vec<String>> = answer.lives.iter().map(life).collect();
    let headers = ["GATEWAY", "EPOCH", "IS", "LEASE LEFT", "CONNECTIONS", "ROUTES", "DIGEST", "REGION", "LABELS"];
    let parts = [format!("{} live{hold}", counted(u32::try_from(alive).unwrap_or(u32::MAX), "gateway")), table(&headers, &rows)];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

fn life(life: &pb::Life) -> Vec<String> {
    let state = match (life.alive, life.managed, life.held) {
        (false, ..) => "dead",
        (true, false, _) => "unmanaged",
        (true, true, true) => "held",
        (true, true, false) if life.draining => "draining",
        (true, true, false) => "alive",
    };
    let lease = if life.alive && life.managed { format!("{} ms", life.lease_left_ms) } else { "-".to_owned() };
    let labels: std::collections::BTreeMap<_, _> = life.labels.iter().collect();
    let labels: Vec<String> = labels.iter().map(|(name, value)| harmless(&format!("{name}={value}"))).collect();
    let (connections, routes) = (life.connections.to_string(), life.routes.to_string());
    let (region, labels) = (or_dash(&harmless(&life.region)), or_dash(&labels.join(",")));
    let digest = or_dash(&harmless(&life.digest));
    vec![life.gateway_addr.clone(), life.epoch.to_string(), state.to_owned(), lease, connections, routes, digest, region, labels]
}

pub fn purged(answer: &pb::PurgeGatewaysResp) -> String {
    format!("{} declared dead{}", counted(answer.lives, "life").replace("lifes", "lives"), refusal(&answer.result))
}

/// A message that was heard on the channel of its user, on one line. Bytes that are no text are shown in hexadecimal.
pub fn heard(delivery: &pb::Delivery) -> String {
    let (at, user) = (time(delivery.timestamp), delivery.user_id);
    let body = match std::str::from_utf8(&delivery.payload) {
        Ok("") => harmless(&delivery.message),
        Ok(text) => harmless(text),
        Err(_) => format!("0x{}", hex(&delivery.payload)),
    };
    let named = [("type", &delivery.message_type), ("id", &delivery.message_id), ("delivery", &delivery.delivery_id)];
    let named = named.into_iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("{name} {value}"));
    let devices = (!delivery.device_ids.is_empty()).then(|| format!("for {}", delivery.device_ids.join(" ")));
    let about = named.chain(devices).collect::<Vec<_>>().join(", ");
    if about.is_empty() { format!("{at} user {user}: {body}") } else { format!("{at} user {user} ({about}): {body}") }
}

/// Without what would end the line, or steer a terminal.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn counted(count: u32, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn user(user: &pb::UserRoute) -> Vec<String> {
    let state = match Code::try_from(user.code) {
        Ok(Code::Ok | Code::NotFound) => online(user.is_online).to_owned(),
        Ok(code) => code.as_str_name().trim_start_matches("CODE_").to_lowercase(),
        Err(_) => "?".to_owned(),
    };
    let status = with_text(name(user.status), &user.status_text);
    vec![user.user_id.to_string(), state, status, or_dash(&user.gateway_addr)]
}

pub fn routes(routes: &[pb::Route]) -> String {
    table(&ROUTE_HEADERS, &routes.iter().map(route).collect::<Vec<_>>())
}

fn route(route: &pb::Route) -> Vec<String> {
    let state = match RouteState::try_from(route.state) {
        Ok(RouteState::Unspecified) => "-",
        Ok(RouteState::Live) => "live",
        Ok(RouteState::Suspect) => "suspect",
        Err(_) => "?",
    };
    let state = if route.idle { format!("{state}, idle") } else { state.to_owned() };
    let epoch = route.gateway_epoch.to_string();
    let (device, gateway, key) = (or_dash(&route.device_id), or_dash(&route.gateway_addr), or_dash(&route.route_key));
    vec![device, platform(route.platform), gateway, epoch, state, time(route.bound_at_ms), key]
}

/// `ios`
pub fn platform(platform: i32) -> String {
    match Platform::try_from(platform) {
        Ok(Platform::Unspecified) => "-".to_owned(),
        Ok(platform) => platform.as_str_name().trim_start_matches("PLATFORM_").to_lowercase(),
        Err(_) => "?".to_owned(),
    }
}

/// `BUSY "in a meeting" since …`
pub fn with_text_and_since(status: i32, text: &str, since_ms: i64) -> String {
    let shown = with_text(name(status), text);
    if since_ms > 0 { format!("{shown} since {}", time(since_ms)) } else { shown }
}

/// `BUSY "in a meeting"`
pub fn with_text(status: &str, text: &str) -> String {
    if text.is_empty() { status.to_owned() } else { format!("{status} \"{}\"", harmless(text)) }
}

/// Without what all statuses begin with.
pub fn name(status: i32) -> &'static str {
    Status::try_from(status).map_or("?", |status| status.as_str_name().trim_start_matches("STATUS_"))
}

fn online(is_online: bool) -> &'static str {
    if is_online { "online" } else { "offline" }
}

pub fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// ` (CODE_REFUSED): why`
pub fn refusal(result: &Option<pb::Result>) -> String {
    let name = match code(result) {
        Code::Ok => String::new(),
        code => format!(" ({})", code.as_str_name()),
    };
    match result.as_ref().map(|result| &*result.msg) {
        Some(msg) if !msg.is_empty() => format!("{name}: {msg}"),
        _ => name,
    }
}

/// Columns as wide as their widest cell; nothing without rows.
pub fn table(headers: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0).max(headers[column].len());
    let widths: Vec<usize> = (0..headers.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut headers.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phone() -> pb::Route {
        pb::Route {
            device_id: "phone".into(),
            platform: Platform::Ios.into(),
            gateway_addr: "gw-1:7000".into(),
            gateway_epoch: 3,
            bound_at_ms: 1_700_000_000_123,
            route_key: "user:route:42:x".into(),
            state: RouteState::Live.into(),
            idle: true,
            ..Default::default()
        }
    }

    #[test]
    fn a_user_is_a_sentence_and_a_table() {
        let unnamed = pb::Route { gateway_addr: "gw-22:7000".into(), ..Default::default() };
        let online = pb::QueryRouteResp {
            is_online: true,
            status: Status::Busy.into(),
            status_text: "in a meeting".into(),
            status_since_ms: 1_000,
            routes: vec![phone(), unnamed],
            version: 17,
            source: Source::Local.into(),
            ..Default::default()
        };
        let want = "user 42 is online (BUSY \"in a meeting\" since 1970-01-01 00:00:01.000Z), version 17, from memory, 0 ms old\n\
            DEVICE  PLATFORM  GATEWAY     EPOCH  STATE       CONNECTED SINCE           ROUTE KEY\n\
            phone   ios       gw-1:7000   3      live, idle  2023-11-14 22:13:20.123Z  user:route:42:x\n\
            -       -         gw-22:7000  0      -           1970-01-01 00:00:00.000Z  -";
        assert_eq!(found(42, &online), want);
        let offline = pb::QueryRouteResp { status: Status::Offline.into(), source: Source::Durable.into(), ..Default::default() };
        assert_eq!(found(7, &offline), "user 7 is offline (OFFLINE), never seen, version 0, from SQL, 0 ms old");
    }

    #[test]
    fn a_refused_bind_says_why() {
        let result = Some(pb::Result { code: Code::Refused.into(), msg: "5 devices are online".into() });
        let answer = pb::BindRouteResp { result, ..Default::default() };
        assert_eq!(bound(42, "gw-1", &answer), "user 42 was not bound to gw-1 (CODE_REFUSED): 5 devices are online");
    }

    #[test]
    fn a_message_is_text_or_hexadecimal() {
        let plain = pb::Delivery { user_id: 42, payload: "grüß dich".into(), ..Default::default() };
        assert_eq!(heard(&plain), "1970-01-01 00:00:00.000Z user 42: grüß dich");
        let nasty = pb::Delivery { user_id: 42, message: "a\n\u{1b}[2Jb\\".into(), ..Default::default() };
        assert_eq!(heard(&nasty), "1970-01-01 00:00:00.000Z user 42: a\\n\\u{1b}[2Jb\\");
        let delivery = pb::Delivery {
            delivery_id: "n-7".into(),
            message_type: "chat".into(),
            payload: vec![0xff, 0x00].into(),
            device_ids: vec!["phone".into(), "pad".into()],
            ..plain
        };
        assert_eq!(heard(&delivery), "1970-01-01 00:00:00.000Z user 42 (type chat, delivery n-7, for phone pad): 0xff00");
    }

    #[test]
    fn json_has_the_names_of_the_proto_and_strings_for_64_bits() {
        let user = pb::UserRoute { user_id: i64::MAX, routes: vec![phone()], ..Default::default() };
        let text = json("BatchQueryRouteResp", &pb::BatchQueryRouteResp { result: None, users: vec![user] });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["users"][0]["user_id"], "9223372036854775807");
        assert_eq!(value["users"][0]["routes"][0]["platform"], "PLATFORM_IOS");
        assert_eq!(value["users"][0]["code"], "OK");
    }
}
