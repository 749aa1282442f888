//! The operator's port: `/metrics`, `/livez`, `/readyz`, `/healthz`.
//!
//! * `/livez` is 200 as long as the process answers. It looks at nothing outside.
//! * `/readyz` is 503 only if this node cannot do its job: it is draining, or it alone is cut off from the database. Whatever
//!   else is missing is named in `degraded`: the loss of a database must not empty the load balancer, because every node has
//!   lost it.
//! * `/healthz`: the database and each Redis that is configured answer, the nodes hear each other, and fewer users are online than `max_capacity`.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::Router;
use axum::extract::Request;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::HeaderName;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header::ACCEPT;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::response::Response;
use axum::routing::get;
use serde_json::Value;
use serde_json::json;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::api::access::Access;
use crate::api::access::asked;
use crate::api::access::says_grpc;
use crate::api::rest::problem::Problem;
use crate::engine::messages::streams::Streams;
use crate::engine::read::cache::Cache;
use crate::engine::read::hints::Hints;
use crate::engine::read::lives::Lives;
use crate::engine::write::lanes::Lanes;
use crate::memory::Memory;
use crate::metrics::Metrics;

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All that [`Operator::degraded`] may name.
const PARTS: [&str; 6] = ["store", "redis_cache", "redis_queue", "hints", "hold", "clock"];

#[derive(Clone)]
pub struct Operator {
    pub metrics: Arc<Metrics>,
    pub cache: Arc<Cache>,
    pub lanes: Arc<Lanes>,
    pub streams: Arc<Streams>,
    pub memory: Arc<Memory>,
    pub lives: Arc<Lives>,
    /// None: there is nobody to hear.
    pub hints: Option<Arc<Hints>>,
    /// Users online above which the node says it is full; 0: no limit.
    pub max_capacity: u64,
    pub dropped_log_lines: fn() -> u64,
    pub draining: CancellationToken,
}

/// Lets in who may make a call on this port: whoever reaches it, if `access` is None.
pub async fn guard(State(access): State<Option<Arc<Access>>>, mut request: Request, next: Next) -> Response {
    let (path, is_grpc) = (request.uri().path(), request.uri().path().starts_with("/mpim."));
    if is_grpc && !says_grpc(request.headers()) {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
    }
    let Some(access) = access else { return next.run(request).await };
    let call = if is_grpc { path.to_owned() } else { asked(request.method(), path) };
    match access.admit(&call, request.extensions().get(), request.headers()) {
        Ok(None) => {}
        Ok(Some(admission)) => _ = request.extensions_mut().insert(admission),
        Err(refused) => {
            sleep(refused.late).await;
            return if is_grpc { refused.status.into_http() } else { Problem::from(refused.status).into_response() };
        }
    }
    next.run(request).await
}

pub fn router(operator: Operator) -> Router {
    Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(readyz))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(operator)
}

async fn readyz(State(operator): State<Operator>) -> (StatusCode, Json<Value>) {
    let degraded = operator.degraded();
    if let Some(why) = operator.why_not_ready() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "why": why, "degraded": degraded })));
    }
    (StatusCode::OK, Json(json!({ "ready": true, "degraded": degraded })))
}

async fn healthz(State(operator): State<Operator>) -> (StatusCode, Json<Value>) {
    let users_online = operator.lives.users_online();
    let full = operator.max_capacity > 0 && u64::try_from(users_online).unwrap_or(0) >= operator.max_capacity;
    let healthy = operator.missing().is_empty() && !full;
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let max_capacity = operator.max_capacity;
    let body = json!({ "healthy": healthy, "store_up": operator.store_up(), "users_online": users_online, "max_capacity": max_capacity });
    (code, Json(body))
}

/// OpenMetrics for who asks for it, as Prometheus does; the classic format for everybody else.
async fn metrics(
    State(operator): State<Operator>,
    headers: HeaderMap,
) -> Result<([(HeaderName, &'static str); 1], String), StatusCode> {
    operator.refresh();
    let metrics = &operator.metrics;
    let accepts = |value: &HeaderValue| value.to_str().is_ok_and(|value| value.contains("application/openmetrics-text"));
    let (kind, text) = match headers.get_all(ACCEPT).iter().any(accepts) {
        true => (OPENMETRICS, metrics.openmetrics()),
        false => (CLASSIC, metrics.classic()),
    };
    text.map(|text| ([(CONTENT_TYPE, kind)], text)).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

impl Operator {
    /// Writes into the metrics what is only counted elsewhere.
    pub fn refresh(&self) {
        let metrics = &self.metrics;
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        metrics.l1_entries.set(gauge(self.cache.len()));
        metrics.users_online.set(self.lives.users_online());
        metrics.lane_queue_depth.set(gauge(self.lanes.depth() as u64));
        metrics.stream_queue_depth.set(gauge(self.streams.depth() as u64));
        metrics.held_bytes.set(gauge(self.memory.taken() as u64));
        metrics.shed_so_far("memory", self.memory.refused());
        metrics.rejected_so_far("l1", self.cache.offers_rejected());
        metrics.went_back_so_far(self.cache.went_back());
        metrics.log_lines_dropped_so_far((self.dropped_log_lines)());
        let degraded = self.degraded();
        PARTS.iter().for_each(|part| metrics.degraded(part, degraded.contains(part)));
    }

    /// Why this node cannot do its job. None: it can.
    pub fn why_not_ready(&self) -> Option<&'static str> {
        let cut_off = self.hints.as_ref().is_some_and(|hints| hints.is_cut_off());
        match (self.draining.is_cancelled(), cut_off) {
            (true, _) => Some("draining"),
            (_, true) => Some("this node alone cannot read the database"),
            _ => None,
        }
    }

    /// What an operator should look at, although this node goes on.
    pub fn degraded(&self) -> Vec<&'static str> {
        let mut degraded = self.missing();
        if self.metrics.hold.get() == 1 {
            degraded.push("hold");
        }
        if self.lives.clock.has_stepped() {
            degraded.push("clock");
        }
        degraded
    }

    /// What is configured and does not answer; `store` also if it answers and changes cannot be stored; `hints`: this node does not hear itself, or one of the others.
    fn missing(&self) -> Vec<&'static str> {
        let parts = [
            ("store", self.store_up() && self.lanes.are_healthy()),
            ("redis_cache", self.metrics.is_redis_up("cache").unwrap_or(true)),
            ("redis_queue", self.metrics.is_redis_up("queue").unwrap_or(true)),
            ("hints", self.hints.as_ref().is_none_or(|hints| hints.complete_since(Instant::now()).is_some())),
        ];
        parts.into_iter().filter(|(_, up)| !up).map(|(part, _)| part).collect()
    }

    /// Whether the database answered last time.
    pub fn store_up(&self) -> bool {
        self.metrics.store_up.get() == 1
    }
}
