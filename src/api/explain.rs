//! ExplainRoute, and what other nodes tell of their memory for it: between wire types and domain types.

use std::time::Duration;

use prost::Message;

use crate::api::admin::Admin;
use crate::api::convert;
use crate::api::fit::ROOM;
use crate::api::fit::fit;
use crate::api::statuses;
use crate::domain::explanation::Inspected;
use crate::domain::explanation::Look;
use crate::domain::explanation::RouteView;
use crate::domain::explanation::Tier;
use crate::domain::explanation::TierView;
use crate::domain::explanation::Verdict;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::engine::presence::explaining::Explanation;
use crate::error::Error;
use crate::pb;

impl Admin {
    pub(super) async fn explain(&self, request: &pb::ExplainRouteReq) -> Result<pb::ExplainRouteResp, Error> {
        let user = convert::user_id(request.user_id)?;
        let others = async { if request.this_node_only { Vec::new() } else { self.peers.inspect(user).await } };
        let (explanation, others) = tokio::join!(self.explaining.explain(user), others);
        let mut answer = self.explanation(user, explanation);
        for (node_id, inspected) in others {
            match inspected {
                Some(inspected) => tell_of(&mut answer, &node_id, &inspected),
                None => answer.silent_nodes.push(node_id),
            }
        }
        shorten(&mut answer);
        Ok(answer)
    }

    fn explanation(&self, user: UserId, it: Explanation) -> pb::ExplainRouteResp {
        let (record, look, own) = (it.record, it.look, &self.peers.own.node_id);
        pb::ExplainRouteResp {
            result: convert::result(pb::Code::Ok, ""),
            because: it.because,
            is_online: it.shown != Status::Offline,
            wanted: convert::status_to_pb(record.wanted()).into(),
            shown: convert::status_to_pb(it.shown).into(),
            status_text: record.text().to_owned(),
            status_until_ms: record.wish_until().map_or(0, |until| until.0),
            banned_until_ms: record.banned_for(look.now, look.slack).map_or(0, |_| record.banned_until().0),
            last_seen_ms: it.last_seen.0,
            shown_version: it.shown_version.0,
            routes: it.routes.into_iter().map(|view| self.route(user, view, &look)).collect(),
            tiers: it.tiers.iter().map(|view| tier(view, own)).collect(),
            inbox_messages: record.inbox_pending.into(),
            inbox_seq: record.inbox_seq,
            watchers: it.watchers,
            recent: it.recent.into_iter().map(statuses::change).collect(),
            node_id: own.clone(),
            silent_nodes: Vec::new(),
            lives_age_ms: convert::millis(look.lives_age),
            hold: look.hold,
        }
    }

    fn route(&self, user: UserId, view: RouteView, look: &Look) -> pb::RouteView {
        let state = match view.verdict {
            Verdict::Live => pb::RouteState::Live,
            _ if view.is_usable() => pb::RouteState::Suspect,
            _ => pb::RouteState::Unspecified,
        };
        let gateway = view.life.as_ref().map(|life| life.gateway.to_string()).unwrap_or_default();
        pb::RouteView {
            route: Some(pb::Route { state: state.into(), ..convert::route(user, &view.route, gateway) }),
            life: view.life.map(|life| self.life(&life, 0, look.hold, look.now)),
            verdict: view.verdict.name().to_owned(),
            why: view.why,
        }
    }
}

/// Adds what another node holds, and which lives it knows to be over that this one believes in.
fn tell_of(answer: &mut pb::ExplainRouteResp, node_id: &str, inspected: &Inspected) {
    answer.tiers.push(tier(&inspected.memory, node_id));
    let is_doubted = |view: &&mut pb::RouteView| {
        let epoch = view.route.as_ref().map_or(0, |route| route.gateway_epoch);
        view.verdict != Verdict::Over.name() && inspected.ended.contains(&Epoch(epoch))
    };
    for view in answer.routes.iter_mut().filter(is_doubted) {
        let and = if view.why.is_empty() { "" } else { "; " };
        view.why = format!("{}{and}node {node_id} takes its gateway's life for over", view.why);
    }
}

/// Leaves out labels, then routes, for which there is no room, and says so.
fn shorten(answer: &mut pb::ExplainRouteResp) {
    if answer.encoded_len() <= ROOM {
        return;
    }
    let mut routes = std::mem::take(&mut answer.routes);
    routes.iter_mut().filter_map(|view| view.life.as_mut()).for_each(|life| life.labels.clear());
    let left_out = fit(&mut routes, ROOM.saturating_sub(answer.encoded_len()));
    answer.routes = routes;
    let msg = format!("there is no room for the labels of gateways, nor for {left_out} more routes");
    answer.result = convert::result(pb::Code::Ok, msg);
}

fn tier(view: &TierView, node_id: &str) -> pb::TierView {
    pb::TierView {
        tier: view.tier.name().to_owned(),
        node_id: node_id.to_owned(),
        present: view.present,
        version: view.version.0,
        shown_version: view.shown_version.0,
        generation: view.generation,
        age_ms: convert::millis(view.age),
        trusted: view.trusted,
        why: view.why.clone(),
        routes: view.routes,
    }
}

/// What this node holds, for another one.
pub fn inspected(inspected: &Inspected, node_id: &str) -> pb::InspectResp {
    pb::InspectResp {
        memory: Some(tier(&inspected.memory, node_id)),
        lives_age_ms: convert::millis(inspected.lives_age),
        watchers: inspected.watchers,
        ended: inspected.ended.iter().map(|epoch| epoch.0).collect(),
    }
}

/// What another node holds.
pub fn inspected_by(answer: &pb::InspectResp) -> Inspected {
    let view = answer.memory.clone().unwrap_or_default();
    Inspected {
        memory: TierView {
            tier: Tier::Memory,
            present: view.present,
            version: Version(view.version),
            shown_version: Version(view.shown_version),
            generation: view.generation,
            age: Duration::from_millis(view.age_ms.into()),
            trusted: view.trusted,
            why: view.why,
            routes: view.routes,
        },
        lives_age: Duration::from_millis(answer.lives_age_ms.into()),
        watchers: answer.watchers,
        ended: answer.ended.iter().map(|epoch| Epoch(*epoch)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(routes: usize, label: &str) -> pb::ExplainRouteResp {
        let labels = [("rack".to_owned(), label.to_owned())].into();
        let life = Some(pb::Life { gateway_addr: "gw-1:7000".to_owned(), labels, ..Default::default() });
        let route = Some(pb::Route { device_id: "d".repeat(200), ..Default::default() });
        let view = pb::RouteView { route, life, ..Default::default() };
        pb::ExplainRouteResp { result: convert::result(pb::Code::Ok, ""), routes: vec![view; routes], ..Default::default() }
    }

    #[test]
    fn an_explanation_is_no_larger_than_clients_take_and_says_what_it_leaves_out() {
        let label = "x".repeat(convert::MAX_LABEL_BYTES);
        for (routes, label, has_labels, left) in
            [(10, &*label, true, 10), (10_000, &label, false, 10_000), (40_000, "", false, 15_000)]
        {
            let mut answer = explained(routes, label);
            shorten(&mut answer);
            let labels = answer.routes.iter().flat_map(|view| &view.life).flat_map(|life| &life.labels).count();
            let msg = answer.result.as_ref().map_or("", |result| &result.msg);
            assert!(answer.encoded_len() <= convert::MAX_ANSWER_BYTES && answer.routes.len() >= left, "{}", answer.routes.len());
            assert_eq!((labels > 0, msg.is_empty()), (has_labels, has_labels), "{msg}");
            let left_out = format!("nor for {} more routes", routes - answer.routes.len());
            assert!(has_labels || msg.ends_with(&left_out), "{msg}");
        }
    }
}
