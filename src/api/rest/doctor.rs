//! What is wrong, and what to do.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::report::configuration::Configuration;
use crate::api::report::configuration::Differences;
use crate::api::report::diagnosis::CheckReport;
use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Query;
use crate::api::rest::nodes::OfNode;
use crate::api::rest::nodes::answered;
use crate::api::status::status;

/// All checks, those that failed first.
#[derive(Serialize, Deserialize, ToSchema)]
pub struct Diagnosis {
    /// The node that has looked.
    pub node_id: String,
    pub items: Vec<CheckReport>,
    /// Null: they are all here.
    pub next_cursor: Option<String>,
    pub as_of_ms: i64,
}

/// The configuration that is in force on a node.
#[derive(Serialize, ToSchema)]
struct InForce {
    node_id: String,
    sections: Configuration,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(examine)).routes(routes!(configuration)).routes(routes!(differences))
}

/// Looks at everything that the asked node relies on, and says what to do about what is wrong. It takes a second or two.
#[utoipa::path(get, path = "/api/v1/doctor", tag = "nodes", responses((status = 200, body = Diagnosis)))]
async fn examine(State(rest): State<Arc<Rest>>) -> Answer<Diagnosis> {
    let items = rest.reporter.examine().await.map_err(|error| status(&error))?;
    let node_id = rest.reporter.peers.own.node_id.clone();
    Ok(Json(Diagnosis { node_id, items, next_cursor: None, as_of_ms: rest.now_ms() }))
}

/// The configuration in force, and where each value was said. Secrets are not shown.
#[utoipa::path(get, path = "/api/v1/config", tag = "nodes", params(OfNode), responses((status = 200, body = InForce)))]
async fn configuration(State(rest): State<Arc<Rest>>, Query(of): Query<OfNode>) -> Answer<InForce> {
    let node_id = of.node.unwrap_or_else(|| rest.reporter.peers.own.node_id.clone());
    let sections = answered(rest.reporter.configuration_of(&node_id).await, &node_id)?;
    Ok(Json(InForce { node_id, sections }))
}

/// Keys that differ between nodes, but for names, addresses and ports.
#[utoipa::path(get, path = "/api/v1/config/diff", tag = "nodes", responses((status = 200, body = Differences)))]
async fn differences(State(rest): State<Arc<Rest>>) -> Answer<Differences> {
    let differences = rest.reporter.differences().await.map_err(|error| status(&error))?;
    Ok(Json(Differences::clone(&differences)))
}
