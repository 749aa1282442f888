//! What the other nodes say of themselves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::join_all;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::api::report::Reporter;
use crate::api::report::shapes::NodeMetrics;
use crate::api::report::shapes::NodeReport;
use crate::api::report::shapes::Overview;
use crate::api::report::shapes::StreamReport;
use crate::domain::time::Timestamp;
use crate::engine::messages::peers::FORWARD_LIMIT;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::peers::Question;
use crate::engine::overview::kept::Kept;
use crate::engine::overview::survey::Survey;

/// How old may be what SQL and the other nodes have said: where it is waited for, and where what was said before will do.
const MAX_AGE: Duration = Duration::from_secs(1);
const USABLE: Duration = Duration::from_secs(5);
/// How old may be which nodes there are.
const LIST_AGE: Duration = Duration::from_secs(2);
/// How long SQL is waited for: when it stands still, people look.
const SQL_PATIENCE: Duration = Duration::from_millis(250);
/// Nodes that are asked, and listed.
const MAX_NODES: usize = 256;
/// A node that has not said for so long that it is there is taken for gone.
const GONE_AFTER: Duration = Duration::from_secs(10);
/// Whoever is gone for longer is not missed any more.
const MISSED_FOR: Duration = Duration::from_secs(600);

/// The other nodes, and what each has said when it was asked.
#[derive(Debug, Default)]
pub struct Colleagues {
    nodes: Vec<Colleague>,
}

#[derive(Debug)]
struct Colleague {
    node_id: String,
    addr: String,
    zone: String,
    seen_at: Timestamp,
    said: Result<Overview, String>,
    at: Option<Instant>,
}

impl Colleagues {
    /// Asks all of them at the same time. Which there are SQL says, or memory, if SQL does not.
    pub async fn ask(peers: &Peers, survey: &Kept<Survey>) -> Self {
        let listed = match timeout(SQL_PATIENCE, survey.newest(LIST_AGE)).await {
            Ok(Ok(survey)) => survey.nodes.clone(),
            Ok(Err(_)) | Err(_) => peers.listed().to_vec(),
        };
        let others = listed.into_iter().filter(|node| node.name.node_id != peers.own.node_id).take(MAX_NODES);
        let asked = others.map(async |node| {
            let said = ask(peers, &node.name.addr, "overview").await;
            let said = said.and_then(|said: Overview| match said.report.node_id == node.name.node_id {
                true => Ok(said),
                false => Err(format!("at its address node {} answers", said.report.node_id)),
            });
            let (node_id, addr, zone) = (node.name.node_id, node.name.addr, node.name.zone);
            Colleague { node_id, addr, zone, seen_at: node.seen_at, said, at: Some(Instant::now()) }
        });
        Self { nodes: join_all(asked).await }
    }
}

impl Reporter {
    /// What all nodes say of themselves, this one among them; by id. Those that did not answer have an error.
    pub async fn nodes(&self) -> Vec<NodeReport> {
        let colleagues = self.colleagues.newest(MAX_AGE).await;
        self.reports(colleagues.ok().as_deref())
    }

    /// The same as it was known a moment ago, without waiting, and the metrics of those that answered.
    pub(super) async fn recent_nodes(&self) -> (Vec<NodeReport>, Vec<NodeMetrics>) {
        let colleagues = self.colleagues.recent(MAX_AGE, USABLE).await.ok();
        let mut metrics = vec![self.sampler.metrics(&self.peers.own.node_id)];
        let others = colleagues.iter().flat_map(|colleagues| &colleagues.nodes);
        metrics.extend(others.filter_map(|other| other.said.as_ref().ok().map(|said| said.metrics.clone())));
        (self.reports(colleagues.as_deref()), metrics)
    }

    fn reports(&self, colleagues: Option<&Colleagues>) -> Vec<NodeReport> {
        let now = self.operator.lives.clock.now();
        let mut reports: BTreeMap<String, NodeReport> = BTreeMap::new();
        for other in colleagues.into_iter().flat_map(|colleagues| &colleagues.nodes) {
            let age = now.since(other.seen_at);
            if age > MISSED_FOR {
                continue;
            }
            let seen_ms_ago = Some(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
            let report = match &other.said {
                Ok(said) => NodeReport {
                    seen_ms_ago: Some(other.at.map_or(0, |at| i64::try_from(at.elapsed().as_millis()).unwrap_or(0))),
                    node_id: other.node_id.clone(),
                    addr: other.addr.clone(),
                    ..said.report.clone()
                },
                Err(_) if age > GONE_AFTER => {
                    self.silent(other, seen_ms_ago, format!("it has not been there for {} s", age.as_secs()))
                }
                Err(why) => self.silent(other, seen_ms_ago, why.clone()),
            };
            reports.insert(other.node_id.clone(), report);
        }
        reports.insert(self.peers.own.node_id.clone(), self.own_report());
        reports.into_values().collect()
    }

    fn silent(&self, other: &Colleague, seen_ms_ago: Option<i64>, why: String) -> NodeReport {
        NodeReport {
            node_id: other.node_id.clone(),
            addr: other.addr.clone(),
            zone: other.zone.clone(),
            seen_ms_ago,
            error: Some(why),
            ..NodeReport::default()
        }
    }

    /// The streams of a node, those whose gateways read too slowly first. None: there is no such node.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn streams_of(&self, node_id: &str) -> Option<Result<Vec<StreamReport>, String>> {
        if node_id == self.peers.own.node_id {
            return Some(Ok(self.own_streams()));
        }
        self.ask(node_id, "streams").await
    }

    /// The numbers of a node. None: there is no such node.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn metrics_of(&self, node_id: &str) -> Option<Result<NodeMetrics, String>> {
        if node_id == self.peers.own.node_id {
            return Some(Ok(self.sampler.metrics(node_id)));
        }
        Some(self.ask::<Overview>(node_id, "overview").await?.map(|overview| overview.metrics))
    }

    /// Asks another node. None: there is no such node.
    pub(super) async fn ask<T: DeserializeOwned>(&self, node_id: &str, what: &'static str) -> Option<Result<T, String>> {
        let addr = match self.peers.addr_of(node_id) {
            Some(addr) => addr.to_string(),
            None => {
                let survey = self.survey.newest(LIST_AGE).await.ok()?;
                survey.nodes.iter().find(|node| node.name.node_id == node_id)?.name.addr.clone()
            }
        };
        Some(ask(&self.peers, &addr, what).await)
    }

    /// What SQL says of the whole, as it was known a moment ago; longer ago, if SQL does not answer. None: it never has.
    pub(super) async fn recent_survey(&self) -> Option<Arc<Survey>> {
        match timeout(SQL_PATIENCE, self.survey.recent(LIST_AGE, USABLE)).await {
            Ok(Ok(survey)) => Some(survey),
            Ok(Err(_)) | Err(_) => self.survey.last(),
        }
    }
}

/// Asks the node at this address.
pub(super) async fn ask<T: DeserializeOwned>(peers: &Peers, addr: &str, what: &'static str) -> Result<T, String> {
    let json = peers.ask(addr, Question { what, about: String::new() }, FORWARD_LIMIT).await?;
    serde_json::from_slice(&json).map_err(|_| "its answer makes no sense to this release".to_owned())
}
