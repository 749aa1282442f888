//! What operators tell for users: a status, a test message.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::Path;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use tonic::metadata::MetadataValue;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::delivery::TRACE;
use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Body;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::number;
use crate::api::rest::gate::MAX_TIME;
use crate::api::rest::problem::done;
use crate::api::rest::words::Status;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

/// What a delivery leaves of a request's time for its answer.
const MARGIN: Duration = Duration::from_secs(1);

/// How a user wants to be seen. What is not given stays as it is.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Wish {
    /// Not offline.
    #[schema(example = "busy")]
    status: Option<Status>,
    /// Up to 256 bytes, shown to others; empty: none.
    #[schema(max_length = 256, pattern = "^[ -~]*$", example = "in a meeting")]
    text: Option<String>,
    /// Status and text return to online and none after so many seconds, at most 31 days.
    #[schema(maximum = 2678400)]
    expire_after_s: Option<u32>,
    /// The device that `idle` is about.
    #[schema(pattern = "^[!-~]{0,128}$")]
    device_id: Option<String>,
    /// Whether nobody uses it.
    idle: Option<bool>,
}

/// What others are shown now.
#[derive(Serialize, ToSchema)]
struct StatusSet {
    shown: Status,
    version: String,
}

/// A message for one user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Message {
    #[schema(example = "dinner is ready")]
    message: String,
    /// For the receivers; it means nothing here.
    #[schema(pattern = "^[!-~]{0,64}$")]
    message_type: Option<String>,
    /// A repeat is answered with the first outcome.
    #[schema(pattern = "^[!-~]{0,128}$")]
    message_id: Option<String>,
    /// How long to wait for a device to say that it has it; not given: do not wait. A request takes no longer than 10 s.
    ack_timeout_ms: Option<u32>,
    /// Store it for a user who cannot be reached.
    store_offline: Option<bool>,
    /// How long it may be stored; not given: as long as is allowed.
    expire_after_s: Option<u32>,
    /// Not given: all.
    device_ids: Option<Vec<String>>,
}

/// What came of a message.
#[derive(Serialize, ToSchema)]
struct Delivered {
    delivered: bool,
    stored: bool,
    /// OK, NOT_FOUND (no live route) or CODE_UNDELIVERED.
    code: &'static str,
    /// Why, if not OK.
    msg: String,
    timestamp: i64,
    delivery_id: String,
    /// Gateways that took it.
    receivers: u32,
    acked_devices: Vec<String>,
    /// How often it was tried.
    attempts: u32,
    /// What was done, in its order.
    steps: Vec<Step>,
}

/// One step of a delivery.
#[derive(Serialize, ToSchema)]
struct Step {
    /// When it began, in microseconds since the delivery did.
    at_us: u64,
    /// As looked_up, handed, acked, stored.
    what: String,
    node_id: String,
    gateway_addr: String,
    device_id: String,
    took_us: u64,
    /// For people.
    detail: String,
}

impl From<pb::DeliveryStep> for Step {
    fn from(step: pb::DeliveryStep) -> Self {
        let pb::DeliveryStep { at_us, what, node_id, gateway_addr, device_id, took_us, detail } = step;
        Self { at_us, what, node_id, gateway_addr, device_id, took_us, detail }
    }
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(set_status)).routes(routes!(deliver))
}

/// Says for a user how they want to be seen.
#[utoipa::path(
    put, path = "/api/v1/users/{user_id}/status", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42")),
    request_body = Wish,
    responses((status = 200, body = StatusSet))
)]
async fn set_status(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Body(wish): Body<Wish>,
) -> Answer<StatusSet> {
    let request = pb::SetStatusReq {
        user_id: number("user_id", &user_id)?,
        status: wish.status.map_or(0, |status| status.to_pb().into()),
        text: wish.text,
        expire_after_s: wish.expire_after_s.unwrap_or_default(),
        device_id: wish.device_id.unwrap_or_default(),
        idle: wish.idle,
    };
    let set = rest.presence.set_status(caller.asks(request)).await?.into_inner();
    let (shown, version) = (Status::of(set.shown()), set.version.to_string());
    done(set.result)?;
    Ok(Json(StatusSet { shown, version }))
}

/// Hands a message to a user's devices, to see whether it arrives.
#[utoipa::path(
    post, path = "/api/v1/users/{user_id}/deliver", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42")),
    request_body = Message,
    responses((status = 200, body = Delivered))
)]
async fn deliver(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Body(message): Body<Message>,
) -> Answer<Delivered> {
    let request = pb::DeliverReq {
        user_id: number("user_id", &user_id)?,
        message: message.message,
        message_type: message.message_type.unwrap_or_default(),
        message_id: message.message_id.unwrap_or_default(),
        ack_timeout_ms: message.ack_timeout_ms.unwrap_or_default(),
        store_offline: message.store_offline.unwrap_or_default(),
        expire_after_s: message.expire_after_s.unwrap_or_default(),
        device_ids: message.device_ids.unwrap_or_default(),
        ..Default::default()
    };
    let mut request = caller.asks_within(MAX_TIME - MARGIN, request);
    request.metadata_mut().insert(TRACE, MetadataValue::from_static("1"));
    let told = rest.presence.deliver(request).await?.into_inner();
    let result = told.result.unwrap_or_default();
    Ok(Json(Delivered {
        delivered: told.delivered,
        stored: told.stored,
        code: result.code().as_str_name(),
        msg: result.msg,
        timestamp: told.timestamp,
        delivery_id: told.delivery_id,
        receivers: told.receivers,
        acked_devices: told.acked_devices,
        attempts: told.attempts,
        steps: told.steps.into_iter().map(Step::from).collect(),
    }))
}
