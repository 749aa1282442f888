//! Messages between wire and engine: what `Deliver` and `BatchDeliver` take and answer.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tonic::Status;
use tonic::codegen::http::Extensions;
use tonic::metadata::MetadataMap;

use crate::api::access::Admission;
use crate::api::convert;
use crate::api::status::item_code;
use crate::api::status::status;
use crate::domain::caller::Role;
use crate::domain::id::DeviceId;
use crate::domain::id::InvalidId;
use crate::domain::id::MAX_NAME_BYTES;
use crate::domain::id::UserId;
use crate::domain::id::check_ascii;
use crate::engine::messages::delivery::Deliveries;
use crate::engine::messages::message::Message;
use crate::engine::messages::message::Outcome;
use crate::engine::messages::message::Report;
use crate::engine::messages::message::Storing;
use crate::engine::messages::steps::Step;
use crate::engine::messages::steps::Steps;
use crate::error::Error;
use crate::pb;

const MAX_TYPE_BYTES: usize = 64;
/// A caller that sets no deadline waits this long at most.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(30);
/// The metadata by which an operator asks for the steps: `im-trace: 1`.
pub const TRACE: &str = "im-trace";
/// The answer has to be on its way before the caller gives up.
const ANSWER_MARGIN: Duration = Duration::from_millis(20);

/// Until when the caller waits, by its `grpc-timeout`.
pub fn deadline(metadata: &MetadataMap) -> Instant {
    let given = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(parse_timeout);
    Instant::now() + given.unwrap_or(DEFAULT_DEADLINE).min(DEFAULT_DEADLINE).saturating_sub(ANSWER_MARGIN)
}

/// At most eight digits and a unit, as the gRPC protocol has it.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3_600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

/// Takes down the steps of a delivery, if its caller wants to see them and may. None: nobody does.
pub fn steps(metadata: &MetadataMap, extensions: &Extensions) -> Option<Arc<Steps>> {
    let is_wanted = metadata.get(TRACE).is_some_and(|value| value == "1");
    let role = || Admission::of(extensions).map(|admission| admission.identity.caller.role);
    (is_wanted && role().is_none_or(|role| role == Role::Operator)).then(Steps::begin)
}

/// The steps as they are told.
pub fn told(steps: &Steps) -> Vec<pb::DeliveryStep> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let told = |step: Step| pb::DeliveryStep {
        at_us: micros(step.at),
        what: step.what.to_owned(),
        node_id: step.node,
        gateway_addr: step.gateway,
        device_id: step.device,
        took_us: micros(step.took),
        detail: step.detail,
    };
    steps.list().into_iter().map(told).collect()
}

pub fn message(request: pb::DeliverReq, max_bytes: usize, deliveries: &Deliveries) -> Result<(UserId, Message), Status> {
    let user = convert::user_id(request.user_id).map_err(|error| status(&error))?;
    if !request.device_ids.is_empty() && !deliveries.can_address_devices() {
        let reason = "needs gateways that attach, or delivery.payload = envelope".to_owned();
        return Err(status(&Error::Invalid { field: "device_ids", reason }));
    }
    let devices = request.device_ids.iter().map(|device| DeviceId::parse(device));
    let device_ids = devices.collect::<Result<_, _>>().map_err(|error| invalid("device_ids", &error))?;
    let message = Message {
        text: request.message.into(),
        binary: request.payload,
        message_type: request.message_type,
        message_id: request.message_id,
        device_ids,
        ack_timeout: (request.ack_timeout_ms > 0).then(|| Duration::from_millis(request.ack_timeout_ms.into())),
        store: request.store_offline.then(|| storing(request.expire_after_s)),
        steps: None,
        trace: None,
    };
    check(&message, max_bytes)?;
    Ok((user, message))
}

pub fn batch_message(request: pb::BatchDeliverReq, max_bytes: usize) -> Result<(Vec<UserId>, Message), Status> {
    let users = convert::user_ids(&request.user_ids, convert::MAX_BATCH).map_err(|error| status(&error))?;
    let message = Message {
        text: request.message.into(),
        binary: request.payload,
        message_type: request.message_type,
        message_id: request.message_id,
        device_ids: Vec::new(),
        ack_timeout: None,
        store: request.store_offline.then(|| storing(0)),
        steps: None,
        trace: None,
    };
    check(&message, max_bytes)?;
    Ok((users, message))
}

fn storing(expire_after_s: u32) -> Storing {
    Storing { expires_after: (expire_after_s > 0).then(|| Duration::from_secs(expire_after_s.into())) }
}

fn check(message: &Message, max_bytes: usize) -> Result<(), Status> {
    check_ascii(&message.message_type, 0, MAX_TYPE_BYTES).map_err(|error| invalid("message_type", &error))?;
    check_ascii(&message.message_id, 0, MAX_NAME_BYTES).map_err(|error| invalid("message_id", &error))?;
    if !message.text.is_empty() && !message.binary.is_empty() {
        return Err(status(&Error::Invalid { field: "payload", reason: "message or payload, not both".to_owned() }));
    }
    for (field, bytes) in [("message", message.text.len()), ("payload", message.binary.len())] {
        if bytes > max_bytes {
            let reason = format!("at most {max_bytes} bytes (delivery.max_message_bytes), is {bytes}");
            return Err(status(&Error::Invalid { field, reason }));
        }
    }
    Ok(())
}

fn invalid(field: &'static str, error: &InvalidId) -> Status {
    status(&Error::Invalid { field, reason: error.to_string() })
}

pub fn delivered(reports: Vec<Result<Report, Error>>) -> Result<pb::DeliverResp, Status> {
    let report =
        reports.into_iter().next().unwrap_or_else(|| Err(Error::unavailable("not delivered"))).map_err(|error| status(&error))?;
    let (code, msg) = said(&report);
    Ok(pb::DeliverResp {
        result: convert::result(code, msg),
        delivered: report.outcome == Outcome::Delivered,
        timestamp: report.timestamp.0,
        delivery_id: report.delivery_id,
        receivers: u32::try_from(report.receivers).unwrap_or(u32::MAX),
        acked_devices: report.acked.iter().map(DeviceId::to_string).collect(),
        stored: report.outcome == Outcome::Stored,
        attempts: report.attempts,
        steps: Vec::new(),
    })
}

pub fn batch_delivered(users: &[UserId], reports: &[Result<Report, Error>]) -> pb::BatchDeliverResp {
    let users = users.iter().zip(reports).map(|(user, report)| {
        let (code, msg) = match report {
            Ok(report) => said(report),
            Err(error) => (item_code(error).0, "could not be delivered now; repeat it"),
        };
        let delivered = report.as_ref().is_ok_and(|report| report.outcome == Outcome::Delivered);
        let receivers = report.as_ref().map_or(0, |report| u32::try_from(report.receivers).unwrap_or(u32::MAX));
        let stored = report.as_ref().is_ok_and(|report| report.outcome == Outcome::Stored);
        pb::UserDelivery { user_id: user.get(), result: convert::result(code, msg), delivered, stored, receivers }
    });
    pb::BatchDeliverResp { users: users.collect() }
}

/// What whoever runs the nodes, or the gateway, can do.
const NO_WAY: &str = "the user's gateway does not attach, and no [redis_queue] is configured to publish to it: attach it, or \
    configure [redis_queue], which the gateway subscribes to";

/// What the caller cannot know of a message to a gateway that does not attach.
const UNCOUNTED: &str = "published in a Redis Cluster, which does not say how many have received it";

fn said(report: &Report) -> (pb::Code, &'static str) {
    match report.outcome {
        Outcome::Delivered if report.uncounted && report.acked.is_empty() => (pb::Code::Ok, UNCOUNTED),
        Outcome::Delivered | Outcome::Stored => (pb::Code::Ok, ""),
        Outcome::InboxFull => (pb::Code::Undelivered, "the user cannot be reached, and the inbox is full"),
        Outcome::Offline => (pb::Code::NotFound, "the user has no live route"),
        Outcome::NoWay => (pb::Code::Undelivered, NO_WAY),
        Outcome::Undelivered if report.receivers > 0 => (pb::Code::Undelivered, "no device acknowledged it in time"),
        Outcome::Undelivered => (pb::Code::Undelivered, "no gateway took it: none is attached or has subscribed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_has_digits_and_a_unit() {
        for (text, want) in [
            ("5S", Some(Duration::from_secs(5))),
            ("250m", Some(Duration::from_millis(250))),
            ("99999999u", Some(Duration::from_micros(99_999_999))),
            ("123456789m", None),
            ("m", None),
            ("", None),
            ("5x", None),
        ] {
            assert_eq!(parse_timeout(text), want, "{text:?}");
        }
    }
}
