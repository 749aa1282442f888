//! Where traces go.

use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::millis;
use super::forms::or_empty;

/// Spans for a collector. They are made if there is one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// `http://HOST:PORT` of a collector that speaks OTLP over gRPC.
    #[serde(with = "or_empty")]
    pub endpoint: Option<String>,
    /// Of calls without a `traceparent`; 0 to 1.
    pub sample: f64,
    /// Spans that wait to be sent.
    pub queue: usize,
    /// Spans that are sent together.
    pub batch: usize,
    #[serde(with = "millis")]
    pub timeout: Duration,
}
