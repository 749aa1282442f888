//! How many users are online.

use std::sync::Arc;
use std::time::Duration;

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
use crate::api::rest::problem::Problem;
use crate::api::rest::problem::done;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// Until somebody has counted.
const COUNTED_SOON: Duration = Duration::from_secs(5);

/// What is counted apart.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum By {
    Gateway,
    Region,
    Platform,
    Status,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Asked {
    /// Not given: only all together.
    #[param(inline)]
    by: Option<By>,
}

/// Who has devices on two gateways counts for both; `users` counts everybody once.
#[derive(Serialize, ToSchema)]
struct Counts {
    /// The greatest first.
    items: Vec<Count>,
    users: u64,
    /// When it was counted.
    as_of_ms: i64,
    /// What of it is left out.
    note: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Count {
    /// A gateway's address, a region, a platform or a status.
    key: String,
    users: u64,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(count_users))
}

/// How many users are online: by gateway as of now, by anything else as of the last minute.
#[utoipa::path(get, path = "/api/v1/counts", tag = "users", params(Asked), responses((status = 200, body = Counts)))]
async fn count_users(State(rest): State<Arc<Rest>>, caller: Caller, Query(asked): Query<Asked>) -> Answer<Counts> {
    let by = match asked.by {
        None => pb::CountBy::Unspecified,
        Some(By::Gateway) => pb::CountBy::Gateway,
        Some(By::Region) => pb::CountBy::Region,
        Some(By::Platform) => pb::CountBy::Platform,
        Some(By::Status) => pb::CountBy::Status,
    };
    let request = caller.asks(pb::CountOnlineReq { by: by.into() });
    let pb::CountOnlineResp { result, counts, users, age_ms } = rest.admin.count_online(request).await?.into_inner();
    if let Some(pb::Result { code, msg }) = &result
        && *code == i32::from(pb::Code::NotFound)
    {
        return Err(Problem::unavailable(msg, COUNTED_SOON));
    }
    let note = done(result)?;
    let items = counts.into_iter().map(|count| Count { key: count.name, users: count.users }).collect();
    Ok(Json(Counts { items, users, as_of_ms: rest.now_ms() - i64::from(age_ms), note }))
}
