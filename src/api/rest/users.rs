//! Who is online, and why somebody is, or is not.

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
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::ask::number;
use crate::api::rest::cursor::Cursor;
use crate::api::rest::gateways::Gateway;
use crate::api::rest::past::StatusChange;
use crate::api::rest::problem::done;
use crate::api::rest::routes;
use crate::api::rest::routes::Route;
use crate::api::rest::routes::RouteState;
use crate::api::rest::words::Platform;
use crate::api::rest::words::Status;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only with a device on this gateway; gateway, region and platform have to fit the same device.
    gateway: Option<String>,
    region: Option<String>,
    #[param(inline)]
    platform: Option<Platform>,
    /// As others see it; invisible: who hides. Not offline.
    #[param(inline)]
    status: Option<Status>,
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// Somebody who is online.
#[derive(Serialize, ToSchema)]
struct User {
    user_id: String,
    shown: Status,
    wanted: Status,
    routes: Vec<Route>,
    status_since_ms: i64,
}

/// A page of users. It may be short, or empty, and not the last.
#[derive(Serialize, ToSchema)]
struct Users {
    items: Vec<User>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

/// Whether a user can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Online,
    /// There are routes that are worth trying, and none that is sure.
    Suspect,
    Offline,
}

/// Everything that decides where a user is.
#[derive(Serialize, ToSchema)]
struct Explanation {
    user_id: String,
    verdict: Verdict,
    /// Why, in one sentence.
    because: String,
    /// As others see it.
    is_online: bool,
    wanted: Status,
    shown: Status,
    status_text: String,
    /// When the wanted status ends; null: it stays.
    status_until_ms: Option<i64>,
    /// Null: no ban is on.
    banned_until_ms: Option<i64>,
    /// When a device last connected or went, also if nobody could see it; null: never.
    last_seen_ms: Option<i64>,
    shown_version: String,
    routes: Vec<RouteView>,
    tiers: Vec<Tier>,
    inbox_messages: u64,
    /// The number of the newest message that was ever stored.
    inbox_seq: String,
    /// Watches of this user on the answering node.
    watchers: u32,
    /// The last five changes, the newest first, with those that nobody could see.
    recent: Vec<StatusChange>,
    /// Who answers.
    node_id: String,
    /// Nodes that did not answer in time.
    silent_nodes: Vec<String>,
    /// How old the answering node's table of lives is.
    lives_age_ms: u32,
    /// No gateway is declared dead now.
    hold: bool,
    /// What is left out.
    note: Option<String>,
}

/// A route, the life it is on, and what it is worth.
#[derive(Serialize, ToSchema)]
struct RouteView {
    route: Route,
    /// Null: nobody has heard of it. Its routes are not counted here.
    life: Option<Gateway>,
    /// live, late, held, unsure, over, expired.
    verdict: String,
    why: String,
}

/// What one tier holds of a user.
#[derive(Serialize, ToSchema)]
struct Tier {
    /// memory, shared (Redis), durable (SQL).
    tier: String,
    node_id: String,
    present: bool,
    version: String,
    shown_version: String,
    generation: u64,
    age_ms: u32,
    /// Queries may be answered from it.
    trusted: bool,
    /// If not, why not; or why it could not be looked at.
    why: String,
    routes: u32,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct How {
    /// Do not ask the other nodes what they remember.
    this_node_only: Option<bool>,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_users)).routes(routes!(explain_user))
}

/// Who is online, by user, from the database past the caches.
#[utoipa::path(get, path = "/api/v1/users", tag = "users", params(Which), responses((status = 200, body = Users)))]
async fn list_users(State(rest): State<Arc<Rest>>, caller: Caller, Query(which): Query<Which>) -> Answer<Users> {
    let cursor = Cursor::of("users", &(&which.gateway, &which.region, which.platform, which.status));
    let request = pb::ListOnlineReq {
        gateway_addr: which.gateway.unwrap_or_default(),
        region: which.region.unwrap_or_default(),
        platform: which.platform.map_or(0, |platform| platform.to_pb().into()),
        status: which.status.map_or(0, |status| status.to_pb().into()),
        page_size: limit(which.limit)?,
        page_token: cursor.read(which.cursor.as_deref())?,
    };
    let listed = rest.admin.list_online(caller.asks(request)).await;
    let page = listed.map_err(|status| super::list_problem(status, "gateway"))?.into_inner();
    done(page.result)?;
    let items = page.users.into_iter().map(user).collect();
    Ok(Json(Users { items, next_cursor: cursor.next(&page.next_page_token), as_of_ms: rest.now_ms() }))
}

/// Why a user is online, suspect or offline: what each tier holds, what each route is worth. It looks past every cache.
#[utoipa::path(
    get, path = "/api/v1/users/{user_id}", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), How),
    responses((status = 200, body = Explanation))
)]
async fn explain_user(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(how): Query<How>,
) -> Answer<Explanation> {
    let this_node_only = how.this_node_only.unwrap_or_default();
    let request = pb::ExplainRouteReq { user_id: number("user_id", &user_id)?, this_node_only };
    let told = rest.admin.explain_route(caller.asks(request)).await?.into_inner();
    let note = done(told.result.clone())?;
    Ok(Json(explanation(user_id, told, note)))
}

fn user(user: pb::OnlineUser) -> User {
    User {
        user_id: user.user_id.to_string(),
        shown: Status::of(user.shown()),
        wanted: Status::of(user.wanted()),
        routes: routes::all(user.routes),
        status_since_ms: user.status_since_ms,
    }
}

fn explanation(user_id: String, told: pb::ExplainRouteResp, note: Option<String>) -> Explanation {
    let time = |ms: i64| (ms != 0).then_some(ms);
    Explanation {
        user_id,
        verdict: Verdict::of(&told.routes),
        is_online: told.is_online,
        wanted: Status::of(told.wanted()),
        shown: Status::of(told.shown()),
        because: told.because,
        status_text: told.status_text,
        status_until_ms: time(told.status_until_ms),
        banned_until_ms: time(told.banned_until_ms),
        last_seen_ms: time(told.last_seen_ms),
        shown_version: told.shown_version.to_string(),
        routes: told.routes.into_iter().map(RouteView::of).collect(),
        tiers: told.tiers.into_iter().map(Tier::of).collect(),
        inbox_messages: told.inbox_messages,
        inbox_seq: told.inbox_seq.to_string(),
        watchers: told.watchers,
        recent: told.recent.into_iter().map(StatusChange::from).collect(),
        node_id: told.node_id,
        silent_nodes: told.silent_nodes,
        lives_age_ms: told.lives_age_ms,
        hold: told.hold,
        note,
    }
}

impl Verdict {
    fn of(routes: &[pb::RouteView]) -> Self {
        let states = routes.iter().flat_map(|view| &view.route).filter_map(|route| RouteState::of(route.state()));
        let sure = states.map(|state| matches!(state, RouteState::Live)).max();
        match sure {
            Some(true) => Self::Online,
            Some(false) => Self::Suspect,
            None => Self::Offline,
        }
    }
}

impl RouteView {
    fn of(view: pb::RouteView) -> Self {
        let (route, life) = (view.route.unwrap_or_default().into(), view.life.map(|life| Gateway::of(life, None)));
        Self { route, life, verdict: view.verdict, why: view.why }
    }
}

impl Tier {
    fn of(view: pb::TierView) -> Self {
        Self {
            tier: view.tier,
            node_id: view.node_id,
            present: view.present,
            version: view.version.to_string(),
            shown_version: view.shown_version.to_string(),
            generation: view.generation,
            age_ms: view.age_ms,
            trusted: view.trusted,
            why: view.why,
            routes: view.routes,
        }
    }
}
