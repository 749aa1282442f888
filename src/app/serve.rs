//! The two servers: gRPC for gateways and services, HTTP and gRPC for operators. How they are configured stands here.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use axum::Router;
use tokio::time::sleep;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::Service;
use tonic::codegen::http;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;
use tonic_health::server::health_reporter;

use crate::api::access::Access;
use crate::api::access::Refused;
use crate::api::access::says_grpc;
use crate::api::body;
use crate::api::body::Arriving;
use crate::api::body::Leaving;
use crate::api::body::MAX_MESSAGE_BYTES;
use crate::api::console;
use crate::api::counted::Begun;
use crate::api::counted::Counted;
use crate::api::gateway::Leases;
use crate::api::http as operators;
use crate::api::node;
use crate::api::node::Node;
use crate::api::queries::Queries;
use crate::api::rest;
use crate::api::rest::Rest;
use crate::api::traced;
use crate::memory::Memory;
use crate::memory::Share;
use crate::metrics::calls::Calls;
use crate::pb;
use crate::pb::admin_service_server::AdminServiceServer;
use crate::pb::gateway_service_server::GatewayServiceServer;
use crate::pb::node_service_server::NodeServiceServer;
use crate::pb::presence_service_server::PresenceService;
use crate::pb::presence_service_server::PresenceServiceServer;
use crate::telemetry::spans::Place;
use crate::telemetry::spans::Spans;

/// How the paths of our services begin, and those of two of them.
const OURS: &str = "/mpim.";
const PRESENCE: &str = "/mpim.PresenceService/";
const NODES: &str = "/mpim.NodeService/";
/// Our calls with more than one message.
const STREAMS: [&str; 2] = ["/mpim.GatewayService/Attach", "/mpim.PresenceService/Watch"];
/// Largest message to a service that is not ours: health and reflection are asked for names.
const MAX_FOREIGN_BYTES: usize = 16 * 1024;
/// What a call takes beside its message and its answer, roughly.
const CALL_BYTES: usize = 4 * 1024;
/// Calls in progress on one connection.
const MAX_CALLS_PER_CONNECTION: u32 = 1024;
/// What a stream, and all streams of a connection, may send while nobody reads it.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
const MAX_HEADER_BYTES: u32 = 8 * 1024;
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

impl<P> Services<P> {
    /// With spans of the calls that are traced.
    pub fn traced(mut self, spans: Option<Arc<Spans>>) -> Self {
        if let Some((.., node)) = &mut self.more {
            node.spans = spans;
        }
        self
    }
}

/// Everything served on the data port. It is cloned for each call, so each thread counts references of its own.
pub struct DataService<P>(Arc<Served<P>>);

/// The calls that come by the thousand do not go through the router of the others.
struct Served<P> {
    queries: Option<Queries>,
    presence: PresenceServiceServer<P>,
    others: Routes,
    memory: Arc<Memory>,
    calls: Arc<Calls>,
    /// None: there are no other nodes.
    store_id: Option<Arc<str>>,
    /// None: everybody may do everything.
    access: Option<Arc<Access>>,
    /// None: no call is traced.
    spans: Option<Arc<Spans>>,
}

impl<P> Clone for DataService<P> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<P> DataService<P> {
    pub fn for_another_thread(&self) -> Self {
        let Served { queries, presence, others, memory, calls, store_id, access, spans } = &*self.0;
        let memory = memory.for_another_thread();
        Self(Arc::new(Served {
            queries: queries.as_ref().map(|queries| queries.for_another_thread(&memory)),
            presence: presence.clone(),
            others: others.clone(),
            memory,
            calls: calls.for_another_thread(),
            store_id: store_id.clone(),
            access: access.clone(),
            spans: spans.clone(),
        }))
    }
}

impl<P: PresenceService> Service<http::Request<Body>> for DataService<P> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Counted;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(())) // as all of them are
    }

    fn call(&mut self, request: http::Request<Body>) -> Counted {
        let begun = Begun::new(&self.0.calls, request.uri().path());
        begun.counted(self.0.answer(request))
    }
}

impl<P: PresenceService> Served<P> {
    fn answer(&self, mut request: http::Request<Body>) -> BoxFuture<http::Response<Body>, Infallible> {
        if !says_grpc(request.headers()) {
            let mut refused = http::Response::new(Body::empty());
            *refused.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return Box::pin(async { Ok(refused) });
        }
        if let Some(access) = &self.access {
            match access.admit(request.uri().path(), request.extensions().get(), request.headers()) {
                Ok(None) => {}
                Ok(Some(admission)) => _ = request.extensions_mut().insert(admission),
                Err(Refused { status, late }) => {
                    return Box::pin(async move {
                        sleep(late).await;
                        Ok(status.into_http())
                    });
                }
            }
        }
        let Some(span) = self.spans.as_ref().and_then(|spans| traced::begin(spans, &request)) else {
            return self.call(request, None);
        };
        let place = span.place().clone();
        request.extensions_mut().insert(place.clone());
        traced::until_answered(span, self.call(request, Some(place)))
    }

    /// A call that was let in. Its spans begin at `place`, if it is traced.
    fn call(&self, request: http::Request<Body>, place: Option<Place>) -> BoxFuture<http::Response<Body>, Infallible> {
        match (request.uri().path().strip_prefix(PRESENCE), self.queries.clone()) {
            (Some("QueryRoute"), Some(queries)) => Box::pin(queries.traced(place).serve::<pb::QueryRouteReq>(request)),
            (Some("BatchQueryRoute"), Some(queries)) => Box::pin(queries.traced(place).serve::<pb::BatchQueryRouteReq>(request)),
            _ if !request.uri().path().starts_with(OURS) => self.call_foreign(request),
            _ if is_stream(request.uri().path()) => {
                let is_presence = request.uri().path().starts_with(PRESENCE);
                let request = request.map(|body| Body::new(Arriving::stream(body, &self.memory)));
                match is_presence {
                    true => self.presence.clone().call(request),
                    false => Box::pin(self.others.clone().call(request)),
                }
            }
            _ => self.call_counted(request),
        }
    }

    /// A call of health or reflection, which anybody may make: its messages are small, and it is counted until its answers have
    /// left.
    fn call_foreign(&self, request: http::Request<Body>) -> BoxFuture<http::Response<Body>, Infallible> {
        let Some(call) = self.memory.take(Share::Streams, CALL_BYTES).map(Arc::new) else {
            return Box::pin(async { Ok(body::out_of_memory().into_http()) });
        };
        let arriving = |body| Body::new(Arriving::stream(body, &self.memory).with_limit(MAX_FOREIGN_BYTES));
        let answer = self.others.clone().call(request.map(arriving));
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Leaving::new(body, call)))) })
    }

    /// A call with one message and one answer. Its memory is taken from when it comes until its answer has left.
    fn call_counted(&self, request: http::Request<Body>) -> BoxFuture<http::Response<Body>, Infallible> {
        let path = request.uri().path();
        let (is_presence, is_node) = (path.starts_with(PRESENCE), path.starts_with(NODES));
        let checked = match self.store_id.as_ref().filter(|_| is_node) {
            Some(own) => node::check_caller(request.headers(), own),
            None => Ok(MAX_MESSAGE_BYTES),
        };
        let max_bytes = match checked {
            Ok(max_bytes) => max_bytes,
            Err(status) => return Box::pin(async move { Ok(status.into_http()) }), // before it has sent more
        };
        let share = if is_presence || is_node { Share::Calls } else { Share::Leases };
        let Some(call) = self.memory.take(share, CALL_BYTES).map(Arc::new) else {
            return Box::pin(async { Ok(body::out_of_memory().into_http()) });
        };
        let request = request.map(|body| Arriving::message(body, &self.memory, Some(call.clone())).with_limit(max_bytes));
        let answer = if is_presence {
            self.presence.clone().call(request)
        } else {
            Box::pin(self.others.clone().call(request.map(Body::new)))
        };
        Box::pin(async move { Ok(answer.await?.map(|body| Body::new(Leaving::new(body, call)))) })
    }
}

/// Whether a call has more than one message: what is not ours may have.
fn is_stream(path: &str) -> bool {
    STREAMS.contains(&path) || !path.starts_with(OURS)
}

pub async fn data_service<P: PresenceService>(
    services: Services<P>,
    memory: Arc<Memory>,
    calls: Arc<Calls>,
    access: Option<Arc<Access>>,
    has_reflection: bool,
) -> (HealthReporter, DataService<P>) {
    let (health, health_service) = health_reporter();
    health.set_serving::<PresenceServiceServer<P>>().await;
    let reflection =
        |builder: tonic_reflection::server::Builder<'static>| builder.register_encoded_file_descriptor_set(pb::DESCRIPTORS);
    let presence = PresenceServiceServer::new(services.presence).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut routes = Routes::builder();
    routes.add_service(health_service);
    let (mut queries, mut store_id, mut spans) = (None, None, None);
    if let Some((resolving, leases, nodes)) = services.more {
        spans = nodes.spans.clone();
        queries = Some(resolving);
        store_id = Some(nodes.store_id.clone());
        routes
            .add_service(GatewayServiceServer::new(leases).max_decoding_message_size(MAX_MESSAGE_BYTES))
            .add_service(NodeServiceServer::new(nodes).max_decoding_message_size(node::MAX_FORWARD_BYTES));
    }
    if has_reflection && let Ok(v1) = reflection(tonic_reflection::server::Builder::configure()).build_v1() {
        routes.add_service(v1);
    }
    if has_reflection && let Ok(v1alpha) = reflection(tonic_reflection::server::Builder::configure()).build_v1alpha() {
        routes.add_service(v1alpha); // for clients of before 2023
    }
    let others = routes.routes().prepare();
    (health, DataService(Arc::new(Served { queries, presence, others, memory, calls, store_id, access, spans })))
}

/// The gRPC server of the data port.
pub fn data_server() -> Server {
    Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
}

/// What the admin port offers: HTTP for probes, collectors and browsers, gRPC for `ctl`.
pub fn admin_router(operator: operators::Operator, rest: Rest) -> Router {
    let grpc = Routes::new(AdminServiceServer::from_arc(rest.admin.clone())).into_axum_router().reset_fallback();
    operators::router(operator).merge(console::router()).merge(grpc).merge(rest::router(rest))
}

#[cfg(test)]
mod tests {
    use prost_reflect::DescriptorPool;

    use super::*;

    #[test]
    fn every_call_with_more_than_one_message_is_known_as_a_stream() {
        let pool = DescriptorPool::decode(pb::DESCRIPTORS).expect("compiled in");
        for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
            let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
            assert_eq!(is_stream(&path), method.is_client_streaming() || method.is_server_streaming(), "{path}");
        }
    }
}
