//! What operators do to users.

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
use crate::api::rest::ask::number;
use crate::api::rest::ask::reason;
use crate::api::rest::drains::Move;
use crate::api::rest::problem::Problem;
use crate::api::rest::problem::done;
use crate::api::rest::routes;
use crate::api::rest::routes::Route;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Offline {
    /// For the audit. At most 255 bytes.
    #[param(pattern = "\\S", max_length = 255, example = "reported")]
    reason: String,
    /// Nothing may be bound for so long, at most 10 years. Not given: a ban that is on stays.
    #[param(maximum = 315360000)]
    ban_for_s: Option<u32>,
    /// Only say what would happen.
    dry_run: Option<bool>,
}

/// To keep a user away.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Ban {
    /// At most 10 years.
    #[schema(minimum = 1, maximum = 315360000, example = 3600)]
    ban_for_s: u32,
    /// For the audit. At most 255 bytes.
    #[schema(pattern = "\\S", max_length = 255, example = "reported")]
    reason: String,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Why {
    /// For the audit. At most 255 bytes.
    #[param(max_length = 255)]
    reason: Option<String>,
    /// Only say what would happen.
    dry_run: Option<bool>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Device {
    /// Empty: the user's one unnamed device.
    #[param(pattern = "^[!-~]{0,128}$", example = "phone")]
    device_id: String,
    /// For the audit. At most 255 bytes.
    #[param(max_length = 255)]
    reason: Option<String>,
    /// Only say what would happen.
    dry_run: Option<bool>,
}

/// What was removed, or would be.
#[derive(Serialize, ToSchema)]
struct Kicked {
    dry_run: bool,
    kicked: Vec<Route>,
    version: String,
    /// Null: no ban is on, or nothing was said of one.
    banned_until_ms: Option<i64>,
    /// What is left out.
    note: Option<String>,
}

/// To move a user.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Migration {
    /// Not given: by allocation, not where they are.
    #[schema(pattern = "^[!-~]{1,255}$", example = "gw-2:7000")]
    to: Option<String>,
    /// Not given: all devices.
    #[schema(pattern = "^[!-~]{0,128}$")]
    device_id: Option<String>,
    /// For the audit. At most 255 bytes.
    #[schema(max_length = 255)]
    reason: Option<String>,
}

/// Who was told to go where, or would be.
#[derive(Serialize, ToSchema)]
struct Migrated {
    dry_run: bool,
    /// Devices.
    routes: u32,
    plan: Vec<Move>,
}

pub fn routes() -> Routes {
    Routes::new()
        .routes(routes!(force_offline))
        .routes(routes!(kick_device))
        .routes(routes!(kick_any_device))
        .routes(routes!(ban_user, lift_ban))
        .routes(routes!(migrate_user))
}

/// Takes all devices of a user off. They may come back at once, unless there is a ban.
#[utoipa::path(
    delete, path = "/api/v1/users/{user_id}/routes", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), Offline),
    responses((status = 200, body = Kicked))
)]
async fn force_offline(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(order): Query<Offline>,
) -> Answer<Kicked> {
    let request = pb::ForceOfflineReq {
        user_id: number("user_id", &user_id)?,
        reason: reason(order.reason)?,
        ban_for_s: order.ban_for_s.unwrap_or_default(),
        dry_run: order.dry_run.unwrap_or_default(),
        lift_ban: false,
    };
    force(&rest, &caller, request).await
}

/// Takes one device of a user off. It may come back at once.
#[utoipa::path(
    delete, path = "/api/v1/users/{user_id}/devices/{device_id}", tag = "users",
    params(
        ("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"),
        ("device_id" = String, Path, pattern = "^[!-.0-~]{1,128}$", example = "phone"),
        Why
    ),
    responses((status = 200, body = Kicked))
)]
async fn kick_device(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path((user_id, device_id)): Path<(String, String)>,
    Query(why): Query<Why>,
) -> Answer<Kicked> {
    kick(&rest, &caller, &user_id, device_id, why).await
}

/// The same, also for a device whose name fits no path, because it is empty or of dots only.
#[utoipa::path(
    delete, path = "/api/v1/users/{user_id}/devices", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), Device),
    responses((status = 200, body = Kicked))
)]
async fn kick_any_device(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(named): Query<Device>,
) -> Answer<Kicked> {
    let Device { device_id, reason, dry_run } = named;
    kick(&rest, &caller, &user_id, device_id, Why { reason, dry_run }).await
}

async fn kick(rest: &Rest, caller: &Caller, user_id: &str, device_id: String, why: Why) -> Answer<Kicked> {
    let (dry_run, reason) = (why.dry_run.unwrap_or_default(), why.reason.unwrap_or_default());
    let request = pb::KickDeviceReq { user_id: number("user_id", user_id)?, device_id, reason, dry_run };
    let done_to = rest.admin.kick_device(caller.asks(request)).await?.into_inner();
    let note = done(done_to.result)?;
    let (kicked, version) = (routes::all(done_to.kicked), done_to.version.to_string());
    Ok(Json(Kicked { dry_run, kicked, version, banned_until_ms: None, note }))
}

/// Takes all devices of a user off, and lets none come back for a while.
#[utoipa::path(
    put, path = "/api/v1/users/{user_id}/ban", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), DryRun),
    request_body = Ban,
    responses((status = 200, body = Kicked))
)]
async fn ban_user(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(dry): Query<DryRun>,
    Body(ban): Body<Ban>,
) -> Answer<Kicked> {
    if ban.ban_for_s == 0 {
        return Err(Problem::invalid("ban_for_s", "must be at least 1 second"));
    }
    let request = pb::ForceOfflineReq {
        user_id: number("user_id", &user_id)?,
        reason: reason(ban.reason)?,
        ban_for_s: ban.ban_for_s,
        dry_run: dry.is_dry(),
        lift_ban: false,
    };
    force(&rest, &caller, request).await
}

/// Ends a ban. Without one nothing happens.
#[utoipa::path(
    delete, path = "/api/v1/users/{user_id}/ban", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), Why),
    responses((status = 200, body = Kicked))
)]
async fn lift_ban(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(why): Query<Why>,
) -> Answer<Kicked> {
    let request = pb::ForceOfflineReq {
        user_id: number("user_id", &user_id)?,
        reason: why.reason.unwrap_or_default(),
        ban_for_s: 0,
        dry_run: why.dry_run.unwrap_or_default(),
        lift_ban: true,
    };
    force(&rest, &caller, request).await
}

async fn force(rest: &Rest, caller: &Caller, request: pb::ForceOfflineReq) -> Answer<Kicked> {
    let dry_run = request.dry_run;
    let forced = rest.admin.force_offline(caller.asks(request)).await?.into_inner();
    let note = done(forced.result)?;
    let banned_until_ms = (forced.banned_until_ms != 0).then_some(forced.banned_until_ms);
    let (kicked, version) = (routes::all(forced.kicked), forced.version.to_string());
    Ok(Json(Kicked { dry_run, kicked, version, banned_until_ms, note }))
}

/// Asks a user's devices to go elsewhere.
#[utoipa::path(
    post, path = "/api/v1/users/{user_id}/migrate", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), DryRun),
    request_body = Migration,
    responses((status = 200, body = Migrated))
)]
async fn migrate_user(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(dry): Query<DryRun>,
    Body(order): Body<Migration>,
) -> Answer<Migrated> {
    let dry_run = dry.is_dry();
    let request = pb::MigrateUserReq {
        user_id: number("user_id", &user_id)?,
        to: order.to.unwrap_or_default(),
        device_id: order.device_id.unwrap_or_default(),
        reason: order.reason.unwrap_or_default(),
        dry_run,
    };
    let migrated = rest.admin.migrate_user(caller.asks(request)).await?.into_inner();
    done(migrated.result)?;
    let plan = migrated.plan.into_iter().map(Move::from).collect();
    Ok(Json(Migrated { dry_run, routes: migrated.routes, plan }))
}
