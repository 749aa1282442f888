//! The two servers: gRPC for gateways and services, HTTP and gRPC for operators.

use std::io;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;
use tonic_health::server::health_reporter;
use tracing::error;

use crate::api::admin::Admin;
use crate::api::gateway::Leases;
use crate::api::http;
use crate::api::listen;
use crate::api::node::Node;
use crate::api::presence::Presence;
use crate::pb;
use crate::pb::admin_service_server::AdminServiceServer;
use crate::pb::gateway_service_server::GatewayServiceServer;
use crate::pb::node_service_server::NodeServiceServer;
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
pub struct Services {
    pub presence: Presence,
    pub leases: Leases,
    pub node: Node,
}

/// Everything served on the data port.
pub async fn data_routes(services: Services) -> (HealthReporter, Routes) {
    let (health, health_service) = health_reporter();
    health.set_serving::<PresenceServiceServer<Presence>>().await;
    let reflection =
        |builder: tonic_reflection::server::Builder<'static>| builder.register_encoded_file_descriptor_set(pb::DESCRIPTORS);
    let mut routes = Routes::builder();
    routes
        .add_service(PresenceServiceServer::new(services.presence).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(GatewayServiceServer::new(services.leases).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(NodeServiceServer::new(services.node).max_decoding_message_size(MAX_FORWARD_BYTES))
        .add_service(health_service);
    if let Ok(v1) = reflection(tonic_reflection::server::Builder::configure()).build_v1() {
        routes.add_service(v1);
    }
    if let Ok(v1alpha) = reflection(tonic_reflection::server::Builder::configure()).build_v1alpha() {
        routes.add_service(v1alpha); // for clients of before 2023
    }
    (health, routes.routes())
}

/// Serves until `closing`, then finishes the calls in progress.
pub async fn serve_data(
    routes: Routes,
    connections: ReceiverStream<io::Result<listen::Connection>>,
    closing: CancellationToken,
    stop: CancellationToken,
) {
    let _stop_node_on_panic = stop.drop_guard();
    let served = Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, closing.cancelled_owned())
        .await;
    if let Err(error) = served {
        error!(%error, "the gRPC server ended");
    }
}

pub async fn serve_admin(listener: TcpListener, operator: http::Operator, admin: Admin, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let grpc = Routes::new(AdminServiceServer::new(admin)).into_axum_router().reset_fallback();
    let served = stop.run_until_cancelled(axum::serve(listener, http::router(operator).merge(grpc)).into_future()).await;
    if let Some(Err(error)) = served {
        error!(%error, "the admin server ended");
    }
}
