//! The two servers: gRPC for gateways and services, HTTP and gRPC for operators. How they are configured stands here.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;
use tonic_health::server::health_reporter;
use tracing::error;

use crate::api::admin::Admin;
use crate::api::gateway::Leases;
use crate::api::http;
use crate::api::node::Node;
use crate::pb;
use crate::pb::admin_service_server::AdminServiceServer;
use crate::pb::gateway_service_server::GatewayServiceServer;
use crate::pb::node_service_server::NodeServiceServer;
use crate::pb::presence_service_server::PresenceService;
use crate::pb::presence_service_server::PresenceServiceServer;

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
    /// What gateways and other nodes need. None: a bare server, to be measured against.
    pub cluster: Option<(Leases, Node)>,
}

/// Everything served on the data port.
pub async fn data_routes<P: PresenceService>(services: Services<P>) -> (HealthReporter, Routes) {
    let (health, health_service) = health_reporter();
    health.set_serving::<PresenceServiceServer<P>>().await;
    let reflection =
        |builder: tonic_reflection::server::Builder<'static>| builder.register_encoded_file_descriptor_set(pb::DESCRIPTORS);
    let mut routes = Routes::builder();
    routes
        .add_service(PresenceServiceServer::new(services.presence).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(health_service);
    if let Some((leases, node)) = services.cluster {
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
    (health, routes.routes())
}

/// The gRPC server of the data port.
pub fn data_server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
}

pub async fn serve_admin(listener: TcpListener, operator: http::Operator, admin: Admin, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let grpc = Routes::new(AdminServiceServer::new(admin)).into_axum_router().reset_fallback();
    let served = stop.run_until_cancelled(axum::serve(listener, http::router(operator).merge(grpc)).into_future()).await;
    if let Some(Err(error)) = served {
        error!(%error, "the admin server ended");
    }
}
