//! Drains: what empties gateways.

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
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::cursor::Cursor;
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
    Routes::new().routes(routes!(list))
}

/// Drains of the last 30 days, the newest first.
#[utoipa::path(get, path = "/api/v1/drains", tag = "gateways", params(Which), responses((status = 200, body = Drains)))]
async fn list(State(rest): State<Arc<Rest>>, caller: Caller, Query(which): Query<Which>) -> Answer<Drains> {
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
