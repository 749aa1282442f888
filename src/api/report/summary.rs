//! The first page: nothing is counted for it and nobody is waited for, so that it costs little however large the system is.

use crate::api::report::Reporter;
use crate::api::report::sampler;
use crate::api::report::shapes::GatewayCounts;
use crate::api::report::shapes::HoldReport;
use crate::api::report::shapes::InboxReport;
use crate::api::report::shapes::NodeMetrics;
use crate::api::report::shapes::NodeReport;
use crate::api::report::shapes::NodeState;
use crate::api::report::shapes::Rates;
use crate::api::report::shapes::Summary;
use crate::domain::gateway::Liveness;
use crate::domain::time::DAY_MS;

/// Of a number that every node may have and one counts for all.
fn most(nodes: &[NodeMetrics], name: &str) -> u64 {
    let values = nodes.iter().flat_map(|node| &node.items).filter(|item| item.name == name).map(|item| item.value);
    values.fold(0.0, f64::max) as u64
}

impl Reporter {
    /// From the copy of the table of lives, the row all nodes agree on, and what the other nodes said a moment ago.
    pub async fn summary(&self) -> Summary {
        let lives = &self.operator.lives;
        let (reports, metrics) = self.recent_nodes().await;
        let survey = self.recent_survey().await;
        let cluster = lives.cluster();
        let (gateways, devices, suspect_users, hold) = self.gateways();
        let (now, counts) = (lives.clock.now(), cluster.as_ref().map(|cluster| cluster.counts).unwrap_or_default());
        let oldest_s = counts.oldest.map_or(0, |oldest| now.since(oldest).as_secs());
        let because = because(&reports, &gateways, hold.as_ref());
        let stores = |report: &NodeReport| report.sql_ok == Some(true);
        let verdict = match (reports.iter().any(stores), because.is_empty()) {
            (false, _) => "down",
            (true, false) => "degraded",
            (true, true) => "ok",
        };
        Summary {
            as_of_ms: now.0,
            system: self.facts.system.clone(),
            store_id: self.facts.store_id.clone(),
            generation: cluster.as_ref().map_or(0, |cluster| cluster.generation),
            version: self.facts.version.to_owned(),
            verdict: verdict.to_owned(),
            because,
            users_online: u64::try_from(lives.users_online()).unwrap_or(0),
            users_as_of_ms: counts.users_counted_at.0,
            devices,
            suspect_users,
            gateways,
            deaths_last_hour: survey.as_ref().map_or(0, |survey| survey.deaths_last_hour),
            hold,
            drains: survey.as_ref().map_or(0, |survey| survey.drains.iter().filter(|one| one.state.is_active()).count() as u64),
            inbox: InboxReport { messages: u64::try_from(counts.messages).unwrap_or(0), oldest_s },
            outbox_rows: most(&metrics, "outbox_rows"),
            sweep_backlog: most(&metrics, "sweep_backlog"),
            rates: rates(&metrics),
            latency_ms: sampler::slowest(&metrics),
            hit_share: sampler::hit_share(&metrics),
            nodes: reports.into_iter().map(in_short).collect(),
        }
    }

    /// Counts of gateways, their connections, those of silent ones, and the hold.
    fn gateways(&self) -> (GatewayCounts, u64, u64, Option<HoldReport>) {
        let lives = &self.operator.lives;
        let (table, now) = (lives.table(), lives.clock.now());
        let hold = lives.cluster().map(|cluster| cluster.hold.clone()).filter(|hold| hold.is_on(now));
        let (mut counts, mut devices, mut suspect, mut silent) = (GatewayCounts::default(), 0, 0, 0);
        for life in table.iter().filter(|life| life.is_alive()) {
            let connections = u64::from(life.connections);
            devices += connections;
            if !life.is_managed() {
                counts.unmanaged += 1;
                continue;
            }
            let is_late = life.liveness(now, self.heartbeat_interval) == Liveness::Late;
            if is_late {
                suspect += connections;
                silent += 1;
            }
            match (is_late, hold.is_some(), life.draining) {
                (true, true, _) => counts.held += 1,
                (true, false, _) => counts.late += 1,
                (false, _, true) => counts.draining += 1,
                (false, _, false) => counts.alive += 1,
            }
        }
        let hold = hold.map(|hold| HoldReport { until_ms: hold.until.0, reason: hold.reason, silent });
        (counts, devices, suspect, hold)
    }
}

fn rates(nodes: &[NodeMetrics]) -> Rates {
    let deliveries = sampler::pace(nodes, &["deliveries"]);
    // To whom was nobody to bring it is no failure.
    let to_somebody = deliveries - sampler::pace(nodes, &["offline", "stored"]);
    let delivered = sampler::pace(nodes, &["delivered"]);
    Rates {
        queries: sampler::pace(nodes, &["queries", "batch_users"]),
        binds: sampler::pace(nodes, &["binds"]),
        deliveries,
        delivered_share: (to_somebody > 0.0).then_some((delivered / to_somebody).min(1.0)),
        errors: sampler::pace(nodes, &["store_errors", "redis_errors", "turned_away"]),
    }
}

fn in_short(report: NodeReport) -> NodeState {
    let degraded = if report.error.is_some() { vec!["silent".to_owned()] } else { report.degraded };
    NodeState { node_id: report.node_id, ready: report.ready.unwrap_or(false), degraded }
}

/// All that keeps the system from being well, each as a sentence.
fn because(reports: &[NodeReport], gateways: &GatewayCounts, hold: Option<&HoldReport>) -> Vec<String> {
    let managed = gateways.alive + gateways.late + gateways.held + gateways.draining;
    let mut because = Vec::new();
    if let Some(hold) = hold {
        let (silent, until) = (hold.silent, time_of_day(hold.until_ms));
        because.push(format!("hold: {silent} of {managed} gateways are silent; users stay online until {until}"));
    } else if gateways.late > 0 {
        because.push(format!("{} of {managed} gateways are late with their heartbeats", gateways.late));
    }
    for report in reports {
        let node = &report.node_id;
        if let Some(why) = &report.error {
            because.push(format!("node {node}: {why}"));
        }
        because.extend(report.degraded.iter().filter_map(|part| Some(format!("node {node}: {}", in_words(part)?))));
    }
    because
}

/// None: it is said already.
fn in_words(degraded: &str) -> Option<&str> {
    Some(match degraded {
        "hold" => return None,
        "store" => "the database does not answer, or takes no changes",
        "redis_cache" => "[redis_cache] does not answer, or is behind",
        "redis_queue" => "[redis_queue] does not answer",
        "hints" => "it does not hear itself or another node, and trusts its memory for a second only",
        "clock" => "the database's clock was set within the last minute",
        other => other,
    })
}

/// `03:12:41Z`
fn time_of_day(at_ms: i64) -> String {
    let s = at_ms.rem_euclid(DAY_MS) / 1_000;
    format!("{:02}:{:02}:{:02}Z", s / 3_600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::report::shapes::NumberReport;

    #[test]
    fn what_found_nobody_or_was_stored_is_not_counted_among_what_should_have_been_delivered() {
        let paced = |name: &str, per_s| NumberReport { name: name.into(), value: 0.0, per_s: Some(per_s) };
        let share = |numbers: &[(&str, f64)]| {
            let items = numbers.iter().map(|(name, per_s)| paced(name, *per_s)).collect();
            rates(&[NodeMetrics { items, ..NodeMetrics::default() }]).delivered_share
        };
        assert_eq!(share(&[("deliveries", 10.0), ("delivered", 3.0), ("offline", 4.0), ("stored", 2.0)]), Some(0.75));
        assert_eq!(share(&[("deliveries", 6.0), ("offline", 4.0), ("stored", 2.0)]), None, "nobody was there");
    }

    #[test]
    fn a_healthy_system_needs_no_words_and_each_trouble_has_some() {
        let fine = NodeReport { node_id: "node-1".into(), ready: Some(true), sql_ok: Some(true), ..NodeReport::default() };
        let gateways = GatewayCounts { alive: 8, held: 12, unmanaged: 1, ..GatewayCounts::default() };
        assert_eq!(because(std::slice::from_ref(&fine), &GatewayCounts { alive: 20, ..GatewayCounts::default() }, None), [""; 0]);
        let hold = HoldReport { until_ms: 1_795_337_561_000, reason: "doubt".into(), silent: 12 };
        let silent =
            NodeReport { node_id: "node-2".into(), error: Some("no answer within 1000 ms".into()), ..NodeReport::default() };
        let degraded = NodeReport { degraded: vec!["hold".into(), "redis_cache".into()], ..fine };
        let said = because(&[degraded, silent], &gateways, Some(&hold));
        let want = [
            "hold: 12 of 20 gateways are silent; users stay online until 08:52:41Z",
            "node node-1: [redis_cache] does not answer, or is behind",
            "node node-2: no answer within 1000 ms",
        ];
        assert_eq!(said, want);
    }
}
