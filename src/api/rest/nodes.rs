//! How the system is, and each of its nodes.

use std::sync::Arc;

use axum::Json;
use axum::extract::Path;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::report::shapes::NodeMetrics;
use crate::api::report::shapes::NodeReport;
use crate::api::report::shapes::StreamReport;
use crate::api::report::shapes::Summary;
use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::problem::Problem;
use crate::error::RETRY_AFTER;

/// All nodes.
#[derive(Serialize, ToSchema)]
struct Nodes {
    /// By id. Also those that were there within the last ten minutes and ended without a word.
    items: Vec<NodeReport>,
    /// Null: they are all here.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

/// How the system is, and who asked whom.
#[derive(Serialize, ToSchema)]
struct Look {
    /// The node that answers.
    node_id: String,
    /// Null: nobody has to say who they are.
    caller: Option<Asker>,
    #[serde(flatten)]
    summary: Summary,
}

/// Whose credential came with the request.
#[derive(Serialize, ToSchema)]
struct Asker {
    name: String,
    /// viewer or operator.
    role: &'static str,
}

/// Streams of a node.
#[derive(Serialize, ToSchema)]
struct Streams {
    /// Those whose gateways read too slowly first.
    items: Vec<StreamReport>,
    /// Null: whatever is left out does better.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

/// By what streams are sorted.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Sort {
    /// The longest queue first.
    Queue,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// There is no other order yet.
    #[param(inline)]
    #[allow(dead_code)] // that it is known is all
    sort: Option<Sort>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// One of the nodes.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct OfNode {
    /// Its node_id. Not given: the one that is asked.
    pub node: Option<String>,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(summary)).routes(routes!(list_nodes)).routes(routes!(list_streams)).routes(routes!(metrics))
}

/// How the system is, at a glance. It waits for nobody: what other nodes do is what they said a moment ago.
#[utoipa::path(get, path = "/api/v1/summary", tag = "nodes", responses((status = 200, body = Look)))]
async fn summary(State(rest): State<Arc<Rest>>, caller: Caller) -> Json<Look> {
    let caller = caller.admission().map(|admission| {
        let caller = &admission.identity.caller;
        Asker { name: caller.name.to_string(), role: caller.role.name() }
    });
    Json(Look { node_id: rest.reporter.peers.own.node_id.clone(), caller, summary: rest.reporter.summary().await })
}

/// Which nodes there are, and how each of them is. One that does not answer within a second is listed with an error.
#[utoipa::path(get, path = "/api/v1/nodes", tag = "nodes", responses((status = 200, body = Nodes)))]
async fn list_nodes(State(rest): State<Arc<Rest>>) -> Json<Nodes> {
    Json(Nodes { items: rest.reporter.nodes().await, next_cursor: None, as_of_ms: rest.now_ms() })
}

/// The gateways that are attached to a node, the worst first.
#[utoipa::path(
    get, path = "/api/v1/nodes/{node_id}/streams", tag = "nodes",
    params(("node_id" = String, Path, example = "node-1"), Which),
    responses((status = 200, body = Streams))
)]
async fn list_streams(State(rest): State<Arc<Rest>>, Path(node_id): Path<String>, Query(which): Query<Which>) -> Answer<Streams> {
    let limit = limit(which.limit)?;
    let mut items = answered(rest.reporter.streams_of(&node_id).await, &node_id)?;
    items.truncate(limit as usize);
    Ok(Json(Streams { items, next_cursor: None, as_of_ms: rest.now_ms() }))
}

/// What a node counts, and how fast it grows.
#[utoipa::path(get, path = "/api/v1/metrics", tag = "nodes", params(OfNode), responses((status = 200, body = NodeMetrics)))]
async fn metrics(State(rest): State<Arc<Rest>>, Query(of): Query<OfNode>) -> Answer<NodeMetrics> {
    let node_id = of.node.unwrap_or_else(|| rest.reporter.peers.own.node_id.clone());
    Ok(Json(answered(rest.reporter.metrics_of(&node_id).await, &node_id)?))
}

/// What another node has said.
///
/// # Errors
/// There is no such node, or it is silent.
pub fn answered<T>(said: Option<Result<T, String>>, node_id: &str) -> Result<T, Problem> {
    let said = said.ok_or_else(|| Problem::not_found(format!("there is no node {node_id}")))?;
    said.map_err(|why| Problem::unavailable(format!("node {node_id}: {why}"), RETRY_AFTER))
}
