//! What this node says of itself.

use std::time::Duration;

use crate::api::report::Reporter;
use crate::api::report::shapes::CertificateReport;
use crate::api::report::shapes::NodeReport;
use crate::api::report::shapes::StreamReport;
use crate::engine::messages::streams::STREAM_QUEUE;

/// Streams of one answer, the worst first: the rest is doing better.
pub const MAX_STREAMS: usize = 1_000;

impl Reporter {
    /// What this node is and does now.
    pub fn own_report(&self) -> NodeReport {
        let (operator, own, facts) = (&self.operator, &self.peers.own, &self.facts);
        let is_up = |part, configured: bool| configured.then(|| operator.metrics.is_redis_up(part).unwrap_or(true));
        let count = |count: usize| Some(u64::try_from(count).unwrap_or(u64::MAX));
        let why = operator.why_not_ready();
        let degraded = why.into_iter().chain(operator.degraded()).map(str::to_owned).collect();
        NodeReport {
            node_id: own.node_id.clone(),
            addr: own.addr.clone(),
            zone: own.zone.clone(),
            version: Some(facts.version.to_owned()),
            up_since_ms: Some(operator.lives.clock.at(facts.started).0),
            seen_ms_ago: Some(0),
            ready: Some(why.is_none()),
            degraded,
            streams: u64::try_from(operator.metrics.streams.get()).ok(),
            stream_queue_depth: count(operator.streams.depth()),
            l1_entries: Some(operator.cache.len()),
            connections: u64::try_from(operator.metrics.open_connections()).ok(),
            lane_queue_depth: count(operator.lanes.depth()),
            sql_ok: Some(operator.store_up() && operator.lanes.are_healthy()),
            redis_cache_ok: is_up("cache", facts.has_cache),
            redis_queue_ok: is_up("queue", facts.has_queue),
            tls: Some(facts.tls.clone()),
            certificates: self.own_certificates(),
            error: None,
        }
    }

    pub(super) fn own_certificates(&self) -> Vec<CertificateReport> {
        let name = |r#use: &str, which| if which == "ca" { format!("{use} (ca)") } else { r#use.to_owned() };
        let ends = self.operator.metrics.security.certificates().into_iter();
        ends.map(|(r#use, which, at_s)| CertificateReport { r#use: name(r#use, which), not_after_ms: at_s * 1_000 }).collect()
    }

    /// The streams of this node, those whose gateways read too slowly first.
    pub fn own_streams(&self) -> Vec<StreamReport> {
        let (table, clock) = (self.operator.lives.table(), &self.operator.lives.clock);
        let mut streams = self.operator.streams.view();
        streams.sort_unstable_by_key(|one| (std::cmp::Reverse((one.queue, one.shed, one.silence)), one.epoch));
        streams.truncate(MAX_STREAMS);
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let report = |one: &crate::engine::messages::figures::StreamView| StreamReport {
            gateway_addr: table.get(one.epoch).map_or(String::new(), |life| life.gateway.to_string()),
            epoch: one.epoch.0.to_string(),
            since_ms: clock.now().minus(one.age).0,
            queue: one.queue as u64,
            queue_max: STREAM_QUEUE as u64,
            delivered: one.written,
            shed: one.shed,
            last_frame_ms_ago: millis(one.silence),
            caller: one.caller.to_string(),
        };
        streams.iter().map(report).collect()
    }
}
