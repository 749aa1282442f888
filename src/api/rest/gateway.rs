//! One gateway: its lives, and what operators do to it.

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
use crate::api::rest::ask::number;
use crate::api::rest::ask::reason;
use crate::api::rest::gateways;
use crate::api::rest::gateways::Gateway;
use crate::api::rest::gateways::HoldOn;
use crate::api::rest::gateways::LifeState;
use crate::api::rest::problem::Problem;
use crate::api::rest::problem::done;
use crate::domain::id::Epoch;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// Lives of one gateway that are shown.
const LAST_LIVES: u32 = 10;

/// A gateway and its last lives.
#[derive(Serialize, ToSchema)]
struct OneGateway {
    /// Its newest life.
    gateway: Gateway,
    /// The last ten, the newest first.
    lives: Vec<PastLife>,
    /// What came of the last look at its digest, as the answering node knows; null: another node has it, or there is none.
    digest: Option<String>,
    /// Null: none is on.
    hold: Option<HoldOn>,
    as_of_ms: i64,
}

/// A life, from its beginning to its end.
#[derive(Serialize, ToSchema)]
struct PastLife {
    epoch: String,
    state: LifeState,
    began_ms: i64,
    /// Null: it is not over.
    ended_ms: Option<i64>,
    /// expired, superseded, deregistered, operator, held (expired, in a hold or right after one); null: it is not over.
    end_reason: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Purge {
    /// For the audit. At most 200 bytes.
    #[param(pattern = "\\S", max_length = 200, example = "its machine is gone")]
    reason: String,
    /// Only say what would happen.
    dry_run: Option<bool>,
}

/// What was ended, or would be.
#[derive(Serialize, ToSchema)]
pub struct Purged {
    pub dry_run: bool,
    pub lives: u32,
    /// Routes that named them.
    pub routes: u64,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(get_gateway, purge_gateway)).routes(routes!(purge_life))
}

/// A gateway with its last ten lives.
#[utoipa::path(
    get, path = "/api/v1/gateways/{gateway_addr}", tag = "gateways",
    params(("gateway_addr" = String, Path, pattern = "^[!-~]{1,255}$", example = "gw-1:7000")),
    responses((status = 200, body = OneGateway))
)]
async fn get_gateway(State(rest): State<Arc<Rest>>, caller: Caller, Path(addr): Path<String>) -> Answer<OneGateway> {
    let page = lives_of(&rest, &caller, &addr).await?;
    let hold = gateways::hold_on(&rest, &page);
    let past = |life: &pb::Life| PastLife {
        epoch: life.epoch.to_string(),
        state: LifeState::of(life),
        began_ms: life.began_ms,
        ended_ms: (!life.alive).then_some(life.ended_ms),
        end_reason: (!life.alive).then(|| life.end_reason.clone()),
    };
    let (lives, as_of_ms) = (page.lives.iter().map(past).collect(), rest.now_ms());
    let newest = page.lives.into_iter().next().ok_or_else(|| Problem::not_found(format!("no gateway {addr} is known")))?;
    let digest = Some(newest.digest.clone()).filter(|digest| !digest.is_empty());
    let gateway = gateways::with_drains(&rest, &caller, vec![newest]).await?.remove(0);
    Ok(Json(OneGateway { gateway, lives, digest, hold, as_of_ms }))
}

/// Declares a gateway dead now: its users go offline.
#[utoipa::path(
    delete, path = "/api/v1/gateways/{gateway_addr}", tag = "gateways",
    params(("gateway_addr" = String, Path, pattern = "^[!-~]{1,255}$", example = "gw-1:7000"), Purge),
    responses((status = 200, body = Purged))
)]
async fn purge_gateway(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(addr): Path<String>,
    Query(order): Query<Purge>,
) -> Answer<Purged> {
    let living = lives_of(&rest, &caller, &addr).await?.lives.into_iter().filter(|life| life.alive).collect();
    purge(&rest, &caller, living, order, || format!("no gateway {addr} lives")).await
}

/// Declares one life of a gateway dead now.
#[utoipa::path(
    delete, path = "/api/v1/lives/{epoch}", tag = "gateways",
    params(("epoch" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "1795337805655461"), Purge),
    responses((status = 200, body = Purged))
)]
async fn purge_life(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(epoch): Path<String>,
    Query(order): Query<Purge>,
) -> Answer<Purged> {
    let epoch: u64 = number("epoch", &epoch)?;
    let known = rest.lives.table().get(Epoch(epoch)).map(|life| life.gateway.to_string());
    let living = match known {
        Some(addr) => lives_of(&rest, &caller, &addr).await?.lives,
        None => Vec::new(),
    };
    let living = living.into_iter().filter(|life| life.alive && life.epoch == epoch).collect();
    purge(&rest, &caller, living, order, || format!("no life {epoch} is known, or it is over")).await
}

/// The last lives of an address, the newest first.
async fn lives_of(rest: &Rest, caller: &Caller, addr: &str) -> Result<pb::ListGatewaysResp, Problem> {
    let newest_first = format!("{}@{addr}", u64::MAX);
    let sought = pb::ListGatewaysReq { include_dead: true, page_size: LAST_LIVES, ..Default::default() };
    let listed = gateways::page(rest, caller, &sought, newest_first).await;
    let mut page = listed.map_err(|problem| problem.renamed("cursor", "gateway_addr"))?;
    page.lives.retain(|life| life.gateway_addr == addr);
    Ok(page)
}

async fn purge(
    rest: &Rest,
    caller: &Caller,
    living: Vec<pb::Life>,
    order: Purge,
    missing: impl Fn() -> String,
) -> Answer<Purged> {
    let (reason, dry_run) = (reason(order.reason)?, order.dry_run.unwrap_or_default());
    let (epochs, routes): (Vec<u64>, Vec<u64>) = living.iter().map(|life| (life.epoch, life.routes)).unzip();
    if epochs.is_empty() {
        return Err(Problem::not_found(missing()));
    }
    let mut lives = u32::try_from(epochs.len()).unwrap_or(u32::MAX);
    if !dry_run {
        let request = pb::PurgeGatewaysReq { epochs, held: false, reason };
        let purged = rest.admin.purge_gateways(caller.asks(request)).await?.into_inner();
        done(purged.result)?;
        lives = purged.lives;
    }
    Ok(Json(Purged { dry_run, lives, routes: routes.iter().sum() }))
}
