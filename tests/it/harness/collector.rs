//! A collector of traces, which keeps what it is sent and can stand still.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceResponse;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::TraceService;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::TraceServiceServer;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use crate::harness::eventually;

const ARRIVES_WITHIN: Duration = Duration::from_secs(5);

/// Ends when it is dropped.
pub struct Collector {
    pub addr: SocketAddr,
    kept: Kept,
    holds: watch::Sender<bool>,
    server: JoinHandle<()>,
}

type Kept = Arc<Mutex<Vec<Seen>>>;

/// A span, and the node that sent it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub node: String,
    pub span: Span,
}

struct Receiver {
    kept: Kept,
    holds: watch::Receiver<bool>,
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let _ = self.holds.clone().wait_for(|holds| !holds).await; // gone: the test is over
        for resource in request.into_inner().resource_spans {
            let node = text(&resource.resource.unwrap_or_default().attributes, "service.instance.id");
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let seen = spans.map(|span| Seen { node: node.clone(), span });
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(seen);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub async fn start() -> Self {
        Self::at("127.0.0.1:0".parse().expect("an address")).await
    }

    pub async fn at(addr: SocketAddr) -> Self {
        let incoming = TcpIncoming::bind(addr).expect("a port for the collector");
        let addr = incoming.local_addr().expect("an address");
        let (kept, (holds, held)) = (Kept::default(), watch::channel(false));
        let service = TraceServiceServer::new(Receiver { kept: kept.clone(), holds: held });
        let serving = Server::builder().add_service(service).serve_with_incoming(incoming);
        let server = tokio::spawn(async move { serving.await.expect("the collector serves") });
        Self { addr, kept, holds, server }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// While true, it takes everything and answers nothing.
    pub fn hold(&self, holds: bool) {
        self.holds.send_replace(holds);
    }

    pub fn all(&self) -> Vec<Seen> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spans of this trace, once these names are among them.
    pub async fn trace(&self, trace_id: &str, names: &[&str]) -> Vec<Seen> {
        let of_it = || self.all().into_iter().filter(|seen| seen.trace() == trace_id).collect::<Vec<_>>();
        let is_there = |name: &&str| of_it().iter().any(|seen| seen.span.name == *name);
        eventually(&format!("{names:?} of {trace_id}"), ARRIVES_WITHIN, async || names.iter().all(is_there)).await;
        of_it()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Seen {
    pub fn trace(&self) -> String {
        hex(&self.span.trace_id)
    }

    pub fn id(&self) -> String {
        hex(&self.span.span_id)
    }

    /// Empty: it is the first of its trace.
    pub fn parent(&self) -> String {
        hex(&self.span.parent_span_id)
    }

    /// As text.
    pub fn attribute(&self, key: &str) -> String {
        text(&self.span.attributes, key)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    let value = attributes.iter().find(|attribute| attribute.key == key).and_then(|attribute| attribute.value.clone());
    match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}
