//! The two servers: gRPC for gateways and services, HTTP and gRPC for operators. How they are configured stands here.

use std::convert::Infallible;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::Service;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;
use tonic_health::server::health_reporter;

use crate::api::admin::Admin;
use crate::api::gateway::Leases;
use crate::api::http as operators;
use crate::api::node::Node;
use crate::api::queries::Queries;
use crate::pb;
use crate::pb::admin_service_server::AdminServiceServer;
use crate::pb::gateway_service_server::GatewayServiceServer;
use crate::pb::node_service_server::NodeServiceServer;
use crate::pb::presence_service_server::PresenceService;
use crate::pb::presence_service_server::PresenceServiceServer;

/// How the paths of the presence service begin.
const PRESENCE: &str = "/mpim.PresenceService/";
/// Largest request.
const MAX_REQUEST_BYTES: usize = 4 * 1024 * 1024;
/// Largest request of another node, which puts many calls into one.
const MAX_FORWARD_BYTES: usize = 64 * 1024 * 1024;
/// Calls in progress on one connection.
const MAX_CALLS_PER_CONNECTION: u32 = 1024;
/// Storms of calls cancelled by their deadline must not end the connection.
const MAX_PENDING_RESETS: usize = 1024;
/// A peer that is gone without a word is noticed after both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the data port offers.
pub struct Services<P> {
    pub presence: P,
    /// What the daemon offers besides. None: a bare server, to be measured against.
    pub more: Option<(Queries, Leases, Node)>,
}

/// Everything served on the data port. The calls that come by the thousand do not go through the router of the others.
pub struct DataService<P> {
    queries: Option<Queries>,
    presence: PresenceServiceServer<P>,
    others: Routes,
}

impl<P> Clone for DataService<P> {
    fn clone(&self) -> Self {
        Self { queries: self.queries.clone(), presence: self.presence.clone(), others: self.others.clone() }
    }
}

impl<P> DataService<P> {
    pub fn for_another_thread(&self) -> Self {
        Self { queries: self.queries.as_ref().map(Queries::for_another_thread), ..self.clone() }
    }
}

impl<P: PresenceService> Service<http::Request<Body>> for DataService<P> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(())) // as all of them are
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match (request.uri().path().strip_prefix(PRESENCE), self.queries.clone()) {
            (Some("QueryRoute"), Some(queries)) => Box::pin(queries.serve::<pb::QueryRouteReq>(request, MAX_REQUEST_BYTES)),
            (Some("BatchQueryRoute"), Some(queries)) => {
                Box::pin(queries.serve::<pb::BatchQueryRouteReq>(request, MAX_REQUEST_BYTES))
            }
            (Some(_), _) => self.presence.call(request),
            (None, _) => Box::pin(self.others.call(request)),
        }
    }
}

pub async fn data_service<P: PresenceService>(services: Services<P>) -> (HealthReporter, DataService<P>) {
    let (health, health_service) = health_reporter();
    health.set_serving::<PresenceServiceServer<P>>().await;
    let reflection =
        |builder: tonic_reflection::server::Builder<'static>| builder.register_encoded_file_descriptor_set(pb::DESCRIPTORS);
    let presence = PresenceServiceServer::new(services.presence).max_decoding_message_size(MAX_REQUEST_BYTES);
    let mut routes = Routes::builder();
    routes.add_service(health_service);
    let mut queries = None;
    if let Some((resolving, leases, node)) = services.more {
        queries = Some(resolving);
        routes
            .add_service(GatewayServiceServer::new(leases).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(NodeServiceServer::new(node).max_decoding_message_size(MAX_FORWARD_BYTES));
    }
    if let Ok(v1) = reflection(tonic_reflection::server::Builder::configure()).build_v1() {
        routes.add_service(v1);
    }
    if let Ok(v1alpha) = reflection(tonic_reflection::server::Builder::configure()).build_v1alpha() {
        routes.add_service(v1alpha); // for clients of before 2023
    }
    (health, DataService { queries, presence, others: routes.routes().prepare() })
}

/// The gRPC server of the data port.
pub fn data_server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
}

/// What the admin port offers: HTTP for probes and collectors, gRPC for `ctl`.
pub fn admin_router(operator: operators::Operator, admin: Admin) -> Router {
    let grpc = Routes::new(AdminServiceServer::new(admin)).into_axum_router().reset_fallback();
    operators::router(operator).merge(grpc)
}
