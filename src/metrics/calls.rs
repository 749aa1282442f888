//! Calls on the data port: what came of each, and how long the answer took. They come by the hundred thousand, so each thread
//! counts on its own.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::EncodeMetric;
use prometheus_client::encoding::MetricEncoder;
use prometheus_client::encoding::NoLabelSet;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::family::Family;

use super::HotSeconds;
use super::Register;
use super::per_thread::PerThread;

/// Calls that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    QueryRoute,
    BatchQueryRoute,
    BindRoute,
    BatchBindRoute,
    UnbindRoute,
    Deliver,
    BatchDeliver,
    Heartbeat,
    /// All the others. Of a stream its opening.
    Other,
}

/// Those with a histogram: all but the last.
const TIMED: usize = 8;
const CALLS: [&str; TIMED + 1] = [
    "QueryRoute",
    "BatchQueryRoute",
    "BindRoute",
    "BatchBindRoute",
    "UnbindRoute",
    "Deliver",
    "BatchDeliver",
    "Heartbeat",
    "other",
];
/// As gRPC numbers them.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const UNKNOWN: usize = 2;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByCall {
    call: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByCallAndCode {
    call: &'static str,
    code: &'static str,
}

impl Call {
    /// The call of this path.
    pub fn of(path: &str) -> Self {
        match path {
            "/mpim.PresenceService/QueryRoute" => Self::QueryRoute,
            "/mpim.PresenceService/BatchQueryRoute" => Self::BatchQueryRoute,
            "/mpim.PresenceService/BindRoute" => Self::BindRoute,
            "/mpim.PresenceService/BatchBindRoute" => Self::BatchBindRoute,
            "/mpim.PresenceService/UnbindRoute" => Self::UnbindRoute,
            "/mpim.PresenceService/Deliver" => Self::Deliver,
            "/mpim.PresenceService/BatchDeliver" => Self::BatchDeliver,
            "/mpim.GatewayService/Heartbeat" => Self::Heartbeat,
            _ => Self::Other,
        }
    }
}

/// Counters by call and code.
#[derive(Clone, Debug, Default)]
struct Counts(Arc<PerThread<[[AtomicU64; CODES.len()]; CALLS.len()]>>);

/// A thread that counts often has a handle of its own: counting references in one place would slow all down.
#[derive(Clone)]
pub struct Calls {
    counts: Counts,
    seconds: [HotSeconds; TIMED],
}

impl Calls {
    pub(super) fn register(r: &mut Register<'_>) -> Arc<Self> {
        let counts = r.add("calls", "calls on the data port, by what gRPC says of them", Counts::default());
        let seconds: Family<ByCall, HotSeconds> = r.add("call_seconds", "time until a call was answered", Family::default());
        let seconds = std::array::from_fn(|call| seconds.get_or_create(&ByCall { call: CALLS[call] }).clone());
        Arc::new(Self { counts, seconds })
    }

    pub fn for_another_thread(&self) -> Arc<Self> {
        Arc::new(self.clone())
    }

    /// `code`: gRPC's.
    pub fn count(&self, call: Call, code: usize, took: Duration) {
        let code = if code < CODES.len() { code } else { UNKNOWN };
        self.counts.0.mine()[call as usize][code].fetch_add(1, Ordering::Relaxed);
        if let Some(seconds) = self.seconds.get(call as usize) {
            seconds.observe(took);
        }
    }
}

/// What was counted, and for each call how many went well, even if none did: rates need a beginning.
impl EncodeMetric for Counts {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), std::fmt::Error> {
        for (of_call, call) in CALLS.into_iter().enumerate() {
            for (of_code, code) in CODES.into_iter().enumerate() {
                let count: u64 = self.0.all().map(|counts| counts[of_call][of_code].load(Ordering::Relaxed)).sum();
                if count > 0 || of_code == 0 {
                    let labels = ByCallAndCode { call, code };
                    encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Counter
    }
}
