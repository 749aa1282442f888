//! The REST API for operators, under `/api/v1`: a translation onto the calls of gRPC. A handler makes the message of a call, has it
//! carried out as if it had come by gRPC, and tells what came of it. Routes and their description come from one place.

pub mod ask;
pub mod audit;
pub mod counts;
pub mod cursor;
pub mod doctor;
pub mod document;
pub mod drains;
pub mod events;
pub mod gate;
pub mod gateway;
pub mod gateways;
pub mod hold;
pub mod index;
pub mod messages;
pub mod nodes;
pub mod orders;
pub mod past;
pub mod places;
pub mod problem;
pub mod routes;
pub mod trials;
pub mod users;
pub mod words;

use std::sync::Arc;

use axum::Extension;
use axum::Json;
use axum::Router;
use axum::middleware::from_fn;
use axum::middleware::from_fn_with_state;
use tonic::Status;
use utoipa_axum::router::OpenApiRouter;

use crate::api::admin::Admin;
use crate::api::presence::Presence;
use crate::api::report::Reporter;
use crate::api::rest::events::Listening;
use crate::api::rest::index::Document;
use crate::api::rest::places::Places;
use crate::api::rest::places::in_places;
use crate::api::rest::problem::Problem;
use crate::engine::messages::inbox::Inboxes;
use crate::engine::read::audit_log::AuditLog;
use crate::engine::read::lives::Lives;

/// What the handlers call.
pub struct Rest {
    pub admin: Arc<Admin>,
    pub presence: Arc<Presence>,
    pub lives: Arc<Lives>,
    pub inboxes: Arc<Inboxes>,
    pub audit_log: AuditLog,
    pub reporter: Arc<Reporter>,
    pub listening: Listening,
}

/// What a handler answers.
pub type Answer<T> = Result<Json<T>, Problem>;

/// The routes of a part of the API.
pub type Routes = OpenApiRouter<Arc<Rest>>;

impl Rest {
    /// Milliseconds since 1970, by the database's clock.
    pub fn now_ms(&self) -> i64 {
        self.lives.clock.now().0
    }
}

/// What a list answers that could not be read, with REST's names of what its caller gave. `gateway`: where it named a gateway.
fn list_problem(status: Status, gateway: &str) -> Problem {
    let problem = Problem::from(status).renamed("page_token", "cursor").renamed("page_size", "limit");
    problem.renamed("gateway_addr", gateway)
}

/// All of it, with its description.
pub fn router(rest: Rest) -> Router {
    let routes = Routes::new()
        .merge(index::routes())
        .merge(counts::routes())
        .merge(users::routes())
        .merge(past::routes())
        .merge(orders::routes())
        .merge(messages::routes())
        .merge(gateways::routes())
        .merge(gateway::routes())
        .merge(drains::routes())
        .merge(hold::routes())
        .merge(trials::routes())
        .merge(audit::routes())
        .merge(nodes::routes())
        .merge(events::routes())
        .merge(doctor::routes())
        .layer(from_fn(gate::in_time))
        .merge(trials::slow_routes())
        .layer(from_fn_with_state(Arc::new(Places::default()), in_places));
    let (router, api) = routes.split_for_parts();
    router.layer(Extension(Document(document::text(api)))).with_state(Arc::new(rest))
}
