//! The span of a call that is traced.

use std::convert::Infallible;
use std::sync::Arc;

use tonic::Code;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http::HeaderName;
use tonic::codegen::http::Request;
use tonic::codegen::http::Response;

use crate::api::access::Rule;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Span;
use crate::telemetry::spans::Spans;

static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Calls of which nothing is to be learnt: they last as long as a gateway, or are made for all its users at once.
const NEVER: [&str; 6] = [
    "/mpim.GatewayService/Attach",
    "/mpim.GatewayService/Heartbeat",
    "/mpim.PresenceService/Watch",
    "/mpim.NodeService/Forward",
    "/mpim.NodeService/ForwardAcks",
    "/mpim.NodeService/Inspect",
];

/// The span of a call. None: it is not traced.
pub fn begin<B>(spans: &Arc<Spans>, request: &Request<B>) -> Option<Span> {
    let place = spans.pick(request.headers().get(&TRACEPARENT).map(|value| value.as_bytes()))?;
    let call = Rule::find(request.uri().path()).filter(|rule| !rule.is_open() && !NEVER.contains(&rule.call))?.call;
    let name = call.trim_start_matches('/');
    let (service, method) = name.split_once('/')?;
    let mut span = place.begin(name, Kind::Server);
    span.note("rpc.system", "grpc");
    span.note("rpc.service", service);
    span.note("rpc.method", method);
    Some(span)
}

/// The answer, at which the span ends.
pub fn until_answered(mut span: Span, answer: BoxFuture<Response<Body>, Infallible>) -> BoxFuture<Response<Body>, Infallible> {
    Box::pin(async move {
        let answer = answer.await?;
        // An answer with a message says so behind it, and is OK.
        let code = answer.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
        span.note("rpc.grpc.status_code", code as u64);
        if is_fault(code) {
            span.fail(code.description());
        }
        Ok(answer)
    })
}

/// Whether it is the server's, as OpenTelemetry's conventions for gRPC have it.
fn is_fault(code: Code) -> bool {
    const FAULTS: [Code; 6] =
        [Code::Unknown, Code::DeadlineExceeded, Code::Unimplemented, Code::Internal, Code::Unavailable, Code::DataLoss];
    FAULTS.contains(&code)
}
