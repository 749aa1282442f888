//! Sends spans to a collector that speaks OTLP over gRPC, together and one batch at a time. Whatever the collector does, nobody
//! waits for it but this.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::AnyValue;
use opentelemetry_proto::tonic::common::v1::InstrumentationScope;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::ResourceSpans;
use opentelemetry_proto::tonic::trace::v1::ScopeSpans;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::Status;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::transport::Endpoint;
use tracing::warn;

use crate::config::Trace;
use crate::metrics::Metrics;
use crate::telemetry::spans::Finished;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Value;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const NAME: &str = "im-presence";
/// How long the first span of a batch waits for others.
const TOGETHER: Duration = Duration::from_millis(200);
/// How long a node that stops goes on sending.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The one who sends.
pub struct Exporter {
    client: TraceServiceClient<Channel>,
    resource: Resource,
    finished: mpsc::Receiver<Finished>,
    batch: usize,
    timeout: Duration,
    metrics: Arc<Metrics>,
}

impl Exporter {
    /// For the node of this name. It connects when there is something to send. None: no collector is configured.
    ///
    /// # Errors
    /// Its address makes no sense.
    pub fn new(
        settings: &Trace,
        node_id: &str,
        finished: mpsc::Receiver<Finished>,
        metrics: Arc<Metrics>,
    ) -> Result<Option<Self>, tonic::transport::Error> {
        let Some(endpoint) = settings.endpoint.clone() else { return Ok(None) };
        let channel = Endpoint::from_shared(endpoint)?.connect_timeout(settings.timeout).connect_lazy();
        let about = [("service.name", NAME), ("service.version", VERSION), ("service.instance.id", node_id)];
        let attributes = about.into_iter().map(|(key, value)| attribute(key, value.into())).collect();
        let (client, resource) = (TraceServiceClient::new(channel), Resource { attributes, ..Resource::default() });
        Ok(Some(Self { client, resource, finished, batch: settings.batch, timeout: settings.timeout, metrics }))
    }

    /// Sends until `stop`, and then for a second what there is.
    pub async fn run(mut self, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let is_over = async {
            stop.cancelled().await;
            sleep(LAST_WORDS).await;
        };
        tokio::select! {
            () = self.send_all(&stop) => {}
            () = is_over => warn!("the collector at trace.endpoint took too long: the last spans are lost"),
        }
    }

    async fn send_all(&mut self, stop: &CancellationToken) {
        let mut batch = Vec::with_capacity(self.batch);
        loop {
            let got = stop.run_until_cancelled(self.finished.recv_many(&mut batch, 1)).await;
            if got.is_some_and(|got| got == 0) {
                return; // nobody makes spans any more
            }
            let until = Instant::now() + TOGETHER;
            while batch.len() < self.batch && !stop.is_cancelled() {
                let room = self.batch - batch.len();
                let more = timeout_at(until.into(), self.finished.recv_many(&mut batch, room));
                if !stop.run_until_cancelled(more).await.is_some_and(|more| more.is_ok_and(|more| more > 0)) {
                    break;
                }
            }
            while batch.len() < self.batch
                && let Ok(span) = self.finished.try_recv()
            {
                batch.push(span);
            }
            if batch.is_empty() {
                return; // it stops, and all is sent
            }
            self.send(batch.drain(..)).await;
        }
    }

    async fn send(&mut self, batch: impl ExactSizeIterator<Item = Finished>) {
        let number = batch.len() as u64;
        let scope = InstrumentationScope { name: NAME.to_owned(), version: VERSION.to_owned(), ..Default::default() };
        let scope_spans = vec![ScopeSpans { scope: Some(scope), spans: batch.map(span).collect(), ..Default::default() }];
        let resource_spans = vec![ResourceSpans { resource: Some(self.resource.clone()), scope_spans, ..Default::default() }];
        let sent = timeout(self.timeout, self.client.export(ExportTraceServiceRequest { resource_spans })).await;
        let why = match sent {
            Ok(Ok(answer)) => {
                let partial = answer.into_inner().partial_success.unwrap_or_default();
                let rejected = u64::try_from(partial.rejected_spans).unwrap_or(0).min(number);
                self.metrics.spans("sent", number - rejected);
                self.metrics.spans("failed", rejected);
                partial.error_message
            }
            Ok(Err(status)) => {
                self.metrics.spans("failed", number);
                status.to_string()
            }
            Err(_) => {
                self.metrics.spans("failed", number);
                format!("no answer within {} ms", self.timeout.as_millis())
            }
        };
        if !why.is_empty() {
            warn!(error = why, "spans could not be sent to the collector at trace.endpoint");
        }
    }
}

fn span(span: Finished) -> Span {
    let kind = match span.kind {
        Kind::Internal => SpanKind::Internal,
        Kind::Server => SpanKind::Server,
        Kind::Client => SpanKind::Client,
        Kind::Producer => SpanKind::Producer,
    };
    let parent_span_id = if span.parent == 0 { Vec::new() } else { span.parent.to_be_bytes().to_vec() };
    let failed = |message| Status { message, code: StatusCode::Error.into() };
    Span {
        trace_id: span.trace_id.to_be_bytes().to_vec(),
        span_id: span.span_id.to_be_bytes().to_vec(),
        parent_span_id,
        name: span.name.to_owned(),
        kind: kind.into(),
        start_time_unix_nano: span.start_ns,
        end_time_unix_nano: span.end_ns,
        attributes: span.attributes.into_iter().map(|(key, value)| attribute(key, value)).collect(),
        status: span.error.map(failed),
        flags: 1,
        ..Span::default()
    }
}

fn attribute(key: &str, value: Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => any_value::Value::StringValue(text),
        Value::Number(number) => any_value::Value::IntValue(number),
    };
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}
