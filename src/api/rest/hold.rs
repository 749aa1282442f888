//! Holds: times in which no gateway is declared dead.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Body;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::DryRun;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::reason;
use crate::api::rest::gateway::Purged;
use crate::api::rest::gateways;
use crate::api::rest::gateways::HoldOn;
use crate::api::rest::gateways::LifeState;
use crate::api::rest::problem::Problem;
use crate::api::rest::problem::done;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// Silent gateways that are named.
const MAX_NAMED: usize = 1_000;

/// Which gateways are silent, and what follows if nothing is done.
#[derive(Serialize, ToSchema)]
struct Hold {
    /// Null: none is on, and who is silent dies when its lease ends.
    hold: Option<HoldOn>,
    /// Who has missed beats, by address. At most 1,000 are named.
    silent: Vec<Silent>,
    /// How many there are.
    silent_gateways: u64,
    /// Routes on them: as many users go offline, if nobody has two devices on them.
    will_die: u64,
    as_of_ms: i64,
}

/// A gateway that has missed beats.
#[derive(Serialize, ToSchema)]
struct Silent {
    gateway_addr: String,
    epoch: String,
    /// Late, or held.
    state: LifeState,
    /// Negative: it is over.
    lease_left_ms: i64,
    routes: u64,
}

/// To begin a hold, or to change its length.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct HoldOrder {
    #[schema(minimum = 1, example = 600000)]
    for_ms: u32,
    /// For those who see the hold. At most 200 bytes.
    #[schema(pattern = "\\S", max_length = 200, example = "the network is being changed")]
    reason: String,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Why {
    /// For the audit. At most 200 bytes.
    #[param(max_length = 200)]
    reason: Option<String>,
}

/// To declare dead who is held.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Confirmation {
    /// For the audit. At most 200 bytes.
    #[schema(pattern = "\\S", max_length = 200, example = "the machines are gone")]
    reason: String,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(get_hold, put_hold, end_hold)).routes(routes!(confirm_hold))
}

/// Which gateways are silent, whether a hold keeps them, and what follows.
#[utoipa::path(get, path = "/api/v1/hold", tag = "gateways", responses((status = 200, body = Hold)))]
async fn get_hold(State(rest): State<Arc<Rest>>, caller: Caller) -> Answer<Hold> {
    seen(&rest, &caller).await
}

/// Begins a hold, or changes the one that is on.
#[utoipa::path(
    put, path = "/api/v1/hold", tag = "gateways", request_body = HoldOrder, responses((status = 200, body = Hold))
)]
async fn put_hold(State(rest): State<Arc<Rest>>, caller: Caller, Body(order): Body<HoldOrder>) -> Answer<Hold> {
    if order.for_ms == 0 {
        return Err(Problem::invalid("for_ms", "must be at least 1"));
    }
    let request = pb::HoldGatewaysReq { for_ms: order.for_ms, reason: reason(order.reason)? };
    done(rest.admin.hold_gateways(caller.asks(request)).await?.into_inner().result)?;
    seen(&rest, &caller).await
}

/// Calls a hold off: who is silent for longer than its lease dies.
#[utoipa::path(delete, path = "/api/v1/hold", tag = "gateways", params(Why), responses((status = 200, body = Hold)))]
async fn end_hold(State(rest): State<Arc<Rest>>, caller: Caller, Query(why): Query<Why>) -> Answer<Hold> {
    let request = pb::HoldGatewaysReq { for_ms: 0, reason: why.reason.unwrap_or_default() };
    done(rest.admin.hold_gateways(caller.asks(request)).await?.into_inner().result)?;
    seen(&rest, &caller).await
}

/// Says that who is held is really dead: ends their lives, and the hold.
#[utoipa::path(
    post, path = "/api/v1/hold/confirm", tag = "gateways", params(DryRun), request_body = Confirmation,
    responses((status = 200, body = Purged))
)]
async fn confirm_hold(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Query(dry): Query<DryRun>,
    Body(order): Body<Confirmation>,
) -> Answer<Purged> {
    let (reason, dry_run) = (reason(order.reason)?, dry.is_dry());
    let (late, hold) = gateways::late(&rest, &caller).await?;
    let held = || late.iter().filter(|life| life.held && life.lease_left_ms < 0);
    let (routes, mut lives) = (held().map(|life| life.routes).sum(), u32::try_from(held().count()).unwrap_or(u32::MAX));
    match hold {
        None if dry_run => return Err(Problem::not_found("no hold is on")),
        Some(_) if dry_run => {}
        _ => {
            let request = pb::PurgeGatewaysReq { epochs: Vec::new(), held: true, reason };
            let purged = rest.admin.purge_gateways(caller.asks(request)).await?.into_inner();
            done(purged.result)?;
            lives = purged.lives;
        }
    }
    Ok(Json(Purged { dry_run, lives, routes }))
}

async fn seen(rest: &Rest, caller: &Caller) -> Answer<Hold> {
    let (late, hold) = gateways::late(rest, caller).await?;
    let named = late.iter().take(MAX_NAMED).map(|life| Silent {
        gateway_addr: life.gateway_addr.clone(),
        epoch: life.epoch.to_string(),
        state: LifeState::of(life),
        lease_left_ms: life.lease_left_ms,
        routes: life.routes,
    });
    Ok(Json(Hold {
        hold,
        silent: named.collect(),
        silent_gateways: late.len() as u64,
        will_die: late.iter().map(|life| life.routes).sum(),
        as_of_ms: rest.now_ms(),
    }))
}
