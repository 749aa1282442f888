//! The operators' port. It has few connections and little patience, so that it answers when everything else is in trouble:
//! half a request holds nobody else up.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::body::to_bytes;
use axum::extract::Request;
use axum::extract::State;
use axum::http::Method;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::middleware::from_fn;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::response::Response;
use hyper::body::Body as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioExecutor;
use hyper_util::rt::TokioIo;
use hyper_util::rt::TokioTimer;
use tokio::net::TcpListener;
use tokio::sync::SetOnce;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::codegen::Service;

use crate::api::access::Access;
use crate::api::http::guard;
use crate::api::listen::ACCEPT_PAUSE;
use crate::api::rest::gate::Hosts;
use crate::api::rest::gate::check_host;
use crate::api::rest::problem::dress;
use crate::api::room::Guest;
use crate::api::room::Room;
use crate::api::transport::Entered;
use crate::api::transport::Entrance;
use crate::api::transport::Transport;
use crate::memory::Memory;
use crate::memory::Share;

/// Connections that have not made a whole request yet, and those that have: of each, one more closes the oldest.
pub const MAX_NEWCOMERS: usize = 64;
pub const MAX_CONNECTIONS: usize = 128;
/// How long the head of a request may take, and then its body.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
const BODY_LIMIT: Duration = Duration::from_secs(10);
const MAX_BODY_BYTES: usize = 256 * 1024;
/// Calls in progress on one connection.
const MAX_CALLS_PER_CONNECTION: u32 = 64;
/// A peer that is gone without a word is noticed after both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves `router` until `stop`.
pub async fn serve(
    listener: TcpListener,
    entrance: Entrance,
    router: Router,
    access: Option<Arc<Access>>,
    hosts: Hosts,
    memory: Arc<Memory>,
    stop: CancellationToken,
) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    // Who asks is known before a body is read.
    let router = router.layer(from_fn_with_state(memory, with_whole_body)).layer(from_fn_with_state(access, guard));
    let router = router.layer(from_fn_with_state(Arc::new(hosts), check_host)).layer(from_fn(dress));
    let (newcomers, settled) = (Room::new(MAX_NEWCOMERS), Room::new(MAX_CONNECTIONS));
    let (mut connections, entrance) = (JoinSet::new(), Arc::new(entrance));
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        while connections.try_join_next().is_some() {}
        while connections.len() > MAX_NEWCOMERS + MAX_CONNECTIONS {
            connections.join_next().await; // one that had to make room has not gone yet
        }
        let Ok((stream, addr)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (newcomer, settled, router) = (newcomers.enter_in_turn().await, settled.clone(), router.clone());
        let entrance = entrance.clone();
        connections.spawn(async move {
            let newcomer = Arc::new(newcomer);
            tokio::select! {
                () = newcomer.closed() => {}
                () = async {
                    if let Ok(entered) = entrance.enter(stream, addr).await {
                        connection(entered, newcomer.clone(), settled, router).await;
                    }
                } => {}
            }
        });
    }
}

async fn connection(entered: Entered, newcomer: Arc<Guest>, settled: Arc<Room>, router: Router) {
    let Entered { transport, peer, is_http2 } = entered;
    let place = Arc::new(SetOnce::new()); // from its first request on
    let taken = place.clone();
    let answer = service_fn(move |request: hyper::Request<Incoming>| {
        if !taken.initialized() {
            newcomer.leave();
            let _ = taken.set(settled.enter()); // one request is the first
        }
        let (mut router, mut request) = (router.clone(), request.map(Body::new));
        request.extensions_mut().insert(peer.clone());
        async move { router.call(request).await }
    });
    tokio::select! {
        () = serve_http(transport, is_http2, answer) => {}
        () = async { place.wait().await.closed().await } => {} // it may not even read its answers
    }
}

/// Serves one connection. How it ends is the client's business.
async fn serve_http<S>(transport: Transport, is_http2: bool, answer: S)
where
    S: hyper::service::Service<hyper::Request<Incoming>, Response = Response, Error = Infallible>,
    S::Future: Send + 'static,
{
    let io = TokioIo::new(transport);
    let _ = match is_http2 {
        true => {
            let mut server = http2::Builder::new(TokioExecutor::new());
            server.timer(TokioTimer::new()).keep_alive_interval(Some(KEEPALIVE_INTERVAL)).keep_alive_timeout(KEEPALIVE_TIMEOUT);
            server.max_concurrent_streams(MAX_CALLS_PER_CONNECTION).serve_connection(io, answer).await
        }
        false => {
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).serve_connection(io, answer).await
        }
    };
}

/// No request is begun before all of it is there.
async fn with_whole_body(State(memory): State<Arc<Memory>>, request: Request, next: Next) -> Response {
    if request.method() == Method::GET {
        return next.run(request).await; // whatever body it has is not read
    }
    let (head, body) = request.into_parts();
    let bytes = if body.is_end_stream() { 0 } else { MAX_BODY_BYTES };
    let Some(_held) = memory.take(Share::Leases, bytes) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "out of memory (limits.memory_bytes)\n").into_response();
    };
    match timeout(BODY_LIMIT, to_bytes(body, MAX_BODY_BYTES)).await {
        Ok(Ok(body)) => next.run(Request::from_parts(head, Body::from(body))).await,
        Ok(Err(_)) => StatusCode::PAYLOAD_TOO_LARGE.into_response(),
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}
