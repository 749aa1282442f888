//! What is counted of those who come in.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::ByMode;
use super::ByResult;
use super::ByRole;
use super::HotCounter;
use super::Register;

/// Something that is read again, and whether that went well.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByReload {
    pub what: &'static str,
    pub result: &'static str,
}

/// Where a certificate is used, and which of its two ends it is: leaf or ca.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ByCertificate {
    pub r#use: &'static str,
    pub which: &'static str,
}

/// What was done, and what came of it.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByAction {
    action: String,
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByCaller {
    caller: String,
}

/// Where certificates are used.
const USES: [&str; 6] = ["data", "admin", "peer", "store", "redis_cache", "redis_queue"];

pub struct SecurityMetrics {
    handshakes: Family<ByResult, Counter>,
    auth_failures: Family<ByMode, Counter>,
    denied: Family<ByRole, Counter>,
    reloads: Family<ByReload, Counter>,
    certificate_not_after: Family<ByCertificate, Gauge>,
    audit: Family<ByAction, Counter>,
    caller_calls: Family<ByCaller, HotCounter>,
}

impl SecurityMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            handshakes: r.family("handshakes", "TLS handshakes on either port, by what came of them"),
            auth_failures: r.family("auth_failures", "calls without a valid credential, by the kind that was tried"),
            denied: r.family("denied", "calls that the role of their caller may not make, or not for that gateway"),
            reloads: r.family("reloads", "certificates and tokens that were read again because they had changed"),
            certificate_not_after: r.gauges("certificate_not_after_seconds", "end of a certificate, in seconds since 1970"),
            audit: r.family("audit", "lines of the audit, by what was done and what came of it"),
            caller_calls: r
                .family("caller_calls", "calls by the name of their caller's token, or by the role of its certificate"),
        }
    }

    pub fn handshake(&self, result: &'static str) {
        self.handshakes.get_or_create(&ByResult { result }).inc();
    }

    pub fn auth_failed(&self, mode: &'static str) {
        self.auth_failures.get_or_create(&ByMode { mode }).inc();
    }

    pub fn denied(&self, role: &'static str) {
        self.denied.get_or_create(&ByRole { role }).inc();
    }

    pub fn reloaded(&self, what: &'static str, result: &'static str) {
        self.reloads.get_or_create(&ByReload { what, result }).inc();
    }

    /// `at_s`: in Unix seconds.
    pub fn certificate_ends(&self, r#use: &'static str, which: &'static str, at_s: u64) {
        self.certificate_not_after.get_or_create(&ByCertificate { r#use, which }).set(i64::try_from(at_s).unwrap_or(i64::MAX));
    }

    /// Certificates that are in use: where, which end (leaf or ca), and when they end, in Unix seconds.
    pub fn certificates(&self) -> Vec<(&'static str, &'static str, i64)> {
        let known = USES.iter().flat_map(|r#use| ["leaf", "ca"].map(|which| (*r#use, which)));
        let end = |r#use, which| self.certificate_not_after.get(&ByCertificate { r#use, which }).map(|end| end.get());
        known.filter_map(|(r#use, which)| Some((r#use, which, end(r#use, which)?))).collect()
    }

    /// `action`: of a fixed set.
    pub fn audited(&self, action: &str, outcome: &'static str) {
        self.audit.get_or_create(&ByAction { action: action.to_owned(), outcome }).inc();
    }

    /// `caller`: of a set that is configured.
    pub fn calls_of(&self, caller: &str) -> HotCounter {
        self.caller_calls.get_or_create(&ByCaller { caller: caller.to_owned() }).clone()
    }
}
