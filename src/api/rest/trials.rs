//! What would be, if: an allocation, another device policy.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Body;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::number;
use crate::api::rest::problem::done;
use crate::api::rest::words::Platform;
use crate::api::status::status;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// Where a client is, and what it needs.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Ask {
    #[schema(pattern = "^[1-9][0-9]{0,17}$", example = "42")]
    user_id: String,
    /// Not given: anywhere.
    #[schema(max_length = 128, example = "eu")]
    region: Option<String>,
    /// How far the regions are. At most 64.
    latency_ms: Option<HashMap<String, u32>>,
    /// Not given: 3.
    #[schema(minimum = 1, maximum = 10)]
    count: Option<u32>,
    /// Addresses that have just failed. At most 64.
    #[schema(max_items = 64)]
    exclude: Option<Vec<String>>,
    /// Only gateways with all of these. At most 64.
    labels: Option<HashMap<String, String>>,
    platform: Option<Platform>,
}

/// Where the client would be sent.
#[derive(Serialize, ToSchema)]
struct Allocated {
    /// The best first.
    candidates: Vec<Candidate>,
    /// When it would be asked to come.
    retry_after_ms: u32,
    algorithm: String,
    /// The experiment that the user is part of; null: none.
    experiment: Option<String>,
}

/// A gateway that takes the client.
#[derive(Serialize, ToSchema)]
struct Candidate {
    gateway_addr: String,
    /// Where clients reach it.
    public_addr: String,
    region: String,
    /// Of its capacity, by its weight; 1 is full.
    load: f32,
    /// Why it stands where it stands, for people.
    why: String,
}

/// Another device policy. Not given, or 0: no limit.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Policy {
    max_devices: Option<u32>,
    per_platform: Option<u32>,
}

/// Whom it would cost a device.
#[derive(Serialize, ToSchema)]
struct Preview {
    users: u64,
    routes: u64,
    users_seen: u64,
    /// Of all users online; below 1: it was stopped after a minute.
    share_seen: f32,
    /// Some of them.
    examples: Vec<String>,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(try_allocation))
}

/// Those that may take longer than others.
pub fn slow_routes() -> Routes {
    Routes::new().routes(routes!(preview_policy))
}

/// Where a client would be sent now. Nothing is counted. 404: no gateway takes users now.
#[utoipa::path(
    post, path = "/api/v1/allocate", tag = "trials", request_body = Ask, responses((status = 200, body = Allocated))
)]
async fn try_allocation(State(rest): State<Arc<Rest>>, Body(ask): Body<Ask>) -> Answer<Allocated> {
    let request = pb::AllocateGatewayReq {
        user_id: number("user_id", &ask.user_id)?,
        region: ask.region.unwrap_or_default(),
        latency_ms: ask.latency_ms.unwrap_or_default(),
        count: ask.count.unwrap_or_default(),
        exclude: ask.exclude.unwrap_or_default(),
        labels: ask.labels.unwrap_or_default(),
        platform: ask.platform.map_or(0, |platform| platform.to_pb().into()),
    };
    let told = rest.presence.allocation.try_out(request).map_err(|error| status(&error))?;
    done(told.result)?;
    let candidate = |one: pb::Candidate| {
        let pb::Candidate { gateway_addr, public_addr, region, load, why } = one;
        Candidate { gateway_addr, public_addr, region, load, why }
    };
    Ok(Json(Allocated {
        candidates: told.candidates.into_iter().map(candidate).collect(),
        retry_after_ms: told.retry_after_ms,
        algorithm: told.algorithm,
        experiment: Some(told.experiment).filter(|experiment| !experiment.is_empty()),
    }))
}

/// Whom another device policy would cost devices. Looks at everybody, for a minute at most, one request at a time.
#[utoipa::path(
    post, path = "/api/v1/policy/preview", tag = "trials", request_body = Policy, responses((status = 200, body = Preview))
)]
async fn preview_policy(State(rest): State<Arc<Rest>>, caller: Caller, Body(policy): Body<Policy>) -> Answer<Preview> {
    let (max_devices, per_platform) = (policy.max_devices.unwrap_or_default(), policy.per_platform.unwrap_or_default());
    let request = pb::PreviewPolicyReq { max_devices, per_platform };
    let told = rest.admin.preview_policy(caller.asks(request)).await?.into_inner();
    done(told.result)?;
    Ok(Json(Preview {
        users: told.users,
        routes: told.routes,
        users_seen: told.users_seen,
        share_seen: told.share_seen,
        examples: told.examples.iter().map(i64::to_string).collect(),
    }))
}
