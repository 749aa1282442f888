//! Drains: what empties gateways.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::Path;
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
use crate::api::rest::ask::limit;
use crate::api::rest::ask::reason;
use crate::api::rest::cursor::Cursor;
use crate::api::rest::problem::done;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// A drain, or one part of a rebalancing.
#[derive(Clone, Serialize, ToSchema)]
pub struct Drain {
    id: String,
    gateway_addr: String,
    epoch: String,
    /// Who are to move, when it began.
    users: u64,
    /// Who are bound elsewhere now, or gone.
    moved: u64,
    left: u64,
    /// Who were told to go.
    asked: u64,
    /// Of these, whose gateway did not take it.
    unheard: u64,
    began_ms: i64,
    /// Null: none.
    deadline_ms: Option<i64>,
    reason: String,
    /// waiting, running, done, cancelled, ended (the gateway's life is over); planned, with dry_run.
    state: String,
    /// Users per second.
    rate: u32,
    /// How often all are asked by now.
    pass: u32,
    /// Seconds until it is done, as it goes now; null: not known.
    eta_s: Option<u32>,
    share: f32,
    /// The node that carries it out.
    node_id: String,
}

impl From<pb::Drained> for Drain {
    fn from(drain: pb::Drained) -> Self {
        Self {
            id: drain.id,
            gateway_addr: drain.gateway_addr,
            epoch: drain.epoch.to_string(),
            users: drain.users,
            moved: drain.moved,
            left: drain.left,
            asked: drain.asked,
            unheard: drain.unheard,
            began_ms: drain.began_ms,
            deadline_ms: (drain.deadline_ms != 0).then_some(drain.deadline_ms),
            reason: drain.reason,
            state: drain.state,
            rate: drain.rate,
            pass: drain.pass,
            eta_s: (drain.eta_s != 0).then_some(drain.eta_s),
            share: drain.share,
            node_id: drain.node_id,
        }
    }
}

/// How many users go from where to where.
#[derive(Serialize, ToSchema)]
pub struct Move {
    from: String,
    to: String,
    users: u64,
}

impl From<pb::MovePlan> for Move {
    fn from(pb::MovePlan { from, to, users }: pb::MovePlan) -> Self {
        Self { from, to, users }
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only of this gateway.
    gateway: Option<String>,
    /// Only those that run.
    active_only: Option<bool>,
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// A page of drains.
#[derive(Serialize, ToSchema)]
struct Drains {
    items: Vec<Drain>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_drains)).routes(routes!(drain_gateway, cancel_drain)).routes(routes!(rebalance_gateways))
}

/// Drains of the last 30 days, the newest first.
#[utoipa::path(get, path = "/api/v1/drains", tag = "gateways", params(Which), responses((status = 200, body = Drains)))]
async fn list_drains(State(rest): State<Arc<Rest>>, caller: Caller, Query(which): Query<Which>) -> Answer<Drains> {
    let cursor = Cursor::of("drains", &(&which.gateway, which.active_only));
    let request = pb::ListDrainsReq {
        gateway_addr: which.gateway.unwrap_or_default(),
        active_only: which.active_only.unwrap_or_default(),
        page_size: limit(which.limit)?,
        page_token: cursor.read(which.cursor.as_deref())?,
    };
    let listed = rest.admin.list_drains(caller.asks(request)).await;
    let page = listed.map_err(|status| super::list_problem(status, "gateway"))?.into_inner();
    let items = page.drains.into_iter().map(Drain::from).collect();
    Ok(Json(Drains { items, next_cursor: cursor.next(&page.next_page_token), as_of_ms: rest.now_ms() }))
}

/// To empty a gateway, or to change the drain that does.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DrainOrder {
    /// For those who see it. At most 255 bytes.
    #[schema(pattern = "\\S", max_length = 255, example = "a new version")]
    reason: String,
    /// Users per second; not given: as configured.
    #[schema(minimum = 1, maximum = 1000000)]
    rate: Option<u32>,
    /// Then the rest is removed and kicked; not given: never.
    #[schema(maximum = 604800)]
    deadline_s: Option<u32>,
    /// Only these gateways take them; not given: by allocation. At most 64.
    #[schema(max_items = 64)]
    to: Option<Vec<String>>,
    /// Below 1: this share of its users, by hash; not given: all, and the gateway takes nobody new.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    share: Option<f32>,
    /// Before the first user is asked: for load balancers.
    #[schema(maximum = 604800)]
    wait_s: Option<u32>,
    /// Between asking and asking again; not given: as configured.
    #[schema(maximum = 604800)]
    settle_s: Option<u32>,
    /// Also if the others lack capacity; and who was asked twice and stays is removed.
    force: Option<bool>,
}

/// The drain that was begun or changed, or would be.
#[derive(Serialize, ToSchema)]
struct Drained {
    dry_run: bool,
    drain: Option<Drain>,
    /// With dry_run.
    plan: Vec<Move>,
    /// What speaks against it, with dry_run.
    note: Option<String>,
}

/// To level the loads of gateways.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Rebalance {
    /// For those who see it. At most 255 bytes.
    #[schema(pattern = "\\S", max_length = 255, example = "two new gateways")]
    reason: String,
    /// Only of this region; not given: of each.
    #[schema(max_length = 255)]
    region: Option<String>,
    /// Only gateways with all of these. At most 64.
    labels: Option<HashMap<String, String>>,
    /// How far from the mean loads may be; not given: 0.1.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    tolerance: Option<f32>,
    /// Users per second and gateway; not given: as configured.
    #[schema(minimum = 1, maximum = 1000000)]
    rate: Option<u32>,
}

/// What moves, or would, and what moves it.
#[derive(Serialize, ToSchema)]
struct Rebalanced {
    dry_run: bool,
    plan: Vec<Move>,
    drains: Vec<Drain>,
    /// What speaks against it, with dry_run.
    note: Option<String>,
}

/// Moves the users of a gateway elsewhere, or changes the drain that does it. 409: the others lack capacity, or another share of its
/// users is being moved.
#[utoipa::path(
    post, path = "/api/v1/gateways/{gateway_addr}/drain", tag = "gateways",
    params(("gateway_addr" = String, Path, pattern = "^[!-~]{1,255}$", example = "gw-1:7000"), DryRun),
    request_body = DrainOrder,
    responses((status = 200, body = Drained))
)]
async fn drain_gateway(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(gateway_addr): Path<String>,
    Query(dry): Query<DryRun>,
    Body(order): Body<DrainOrder>,
) -> Answer<Drained> {
    let request = pb::DrainGatewayReq {
        gateway_addr,
        rate: order.rate.unwrap_or_default(),
        deadline_s: order.deadline_s.unwrap_or_default(),
        dry_run: dry.is_dry(),
        reason: reason(order.reason)?,
        to: order.to.unwrap_or_default(),
        share: order.share.unwrap_or_default(),
        wait_s: order.wait_s.unwrap_or_default(),
        settle_s: order.settle_s.unwrap_or_default(),
        force: order.force.unwrap_or_default(),
    };
    let drained = rest.admin.drain_gateway(caller.asks(request)).await?.into_inner();
    let note = done(drained.result)?;
    let plan = drained.plan.into_iter().map(Move::from).collect();
    Ok(Json(Drained { dry_run: dry.is_dry(), drain: drained.drain.map(Drain::from), plan, note }))
}

/// Stops a drain: whoever has not gone stays, and the gateway takes users again.
#[utoipa::path(
    delete, path = "/api/v1/gateways/{gateway_addr}/drain", tag = "gateways",
    params(("gateway_addr" = String, Path, pattern = "^[!-~]{1,255}$", example = "gw-1:7000")),
    responses((status = 200, body = Drained))
)]
async fn cancel_drain(State(rest): State<Arc<Rest>>, caller: Caller, Path(gateway_addr): Path<String>) -> Answer<Drained> {
    let request = pb::CancelDrainReq { gateway_addr, id: String::new() };
    let cancelled = rest.admin.cancel_drain(caller.asks(request)).await?.into_inner();
    let note = done(cancelled.result)?;
    Ok(Json(Drained { dry_run: false, drain: cancelled.drain.map(Drain::from), plan: Vec::new(), note }))
}

/// Levels the loads of gateways by moving as few users as that takes. 409: users of one of them are being moved.
#[utoipa::path(
    post, path = "/api/v1/gateways/rebalance", tag = "gateways", params(DryRun), request_body = Rebalance,
    responses((status = 200, body = Rebalanced))
)]
async fn rebalance_gateways(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Query(dry): Query<DryRun>,
    Body(order): Body<Rebalance>,
) -> Answer<Rebalanced> {
    let request = pb::RebalanceGatewaysReq {
        region: order.region.unwrap_or_default(),
        labels: order.labels.unwrap_or_default(),
        tolerance: order.tolerance.unwrap_or_default(),
        rate: order.rate.unwrap_or_default(),
        dry_run: dry.is_dry(),
        reason: reason(order.reason)?,
    };
    let levelled = rest.admin.rebalance_gateways(caller.asks(request)).await?.into_inner();
    let note = done(levelled.result)?;
    let (plan, drains) = (levelled.plan.into_iter().map(Move::from).collect(), levelled.drains.into_iter().map(Drain::from));
    Ok(Json(Rebalanced { dry_run: dry.is_dry(), plan, drains: drains.collect(), note }))
}
