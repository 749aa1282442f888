//! `ctl allocate` and `ctl nodes`: where a user should connect, and which nodes there are.

use std::collections::HashMap;

use clap::Args;

use super::DONE;
use super::Outcome;
use super::code;
use super::exit;
use super::print;
use crate::client::security::Link;
use crate::pb;
use crate::pb::presence_service_client::PresenceServiceClient;

const HELP: &str = "\
Examples:
  im-presence ctl allocate 42 --region eu
  im-presence ctl allocate 42 --latency eu=20 --latency us=95 --count 2
  im-presence ctl allocate 42 --exclude gw-1:7000 --label version=2

Exit codes: as of ctl; 3 if no gateway takes the user.";

#[derive(Args)]
#[command(after_help = HELP)]
pub struct Allocate {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// Where the client is; without it, anywhere
    #[arg(long, value_name = "REGION", default_value = "", hide_default_value = true)]
    region: String,
    /// How far a region is from the client; may be repeated
    #[arg(long, value_name = "REGION=MS", value_parser = latency)]
    latency: Vec<(String, u32)>,
    /// Candidates, at most
    #[arg(long, value_name = "1-10", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10))]
    count: u32,
    /// An address that has just failed; may be repeated
    #[arg(long, value_name = "ADDR")]
    exclude: Vec<String>,
    /// Only gateways with this label; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn latency(text: &str) -> Result<(String, u32), String> {
    let (region, ms) = text.rsplit_once('=').ok_or("must be REGION=MS")?;
    let ms = ms.parse().map_err(|_| "must be REGION=MS, with whole milliseconds")?;
    Ok((region.to_owned(), ms))
}

impl Allocate {
    /// Asks.
    pub(super) async fn call(&self, client: &mut PresenceServiceClient<Link>, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::AllocateGatewayReq {
            user_id: self.user,
            region: self.region.clone(),
            latency_ms: self.latency.iter().cloned().collect(),
            count: self.count,
            exclude: self.exclude.clone(),
            labels: self.label.iter().cloned().collect::<HashMap<_, _>>(),
            ..Default::default()
        };
        let answer = client.allocate_gateway(request).await?.into_inner();
        let text = if json { print::json("AllocateGatewayResp", &answer) } else { allocated(self.user, &answer) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

/// Lists the nodes.
pub(super) async fn nodes(client: &mut PresenceServiceClient<Link>, json: bool) -> Result<Outcome, tonic::Status> {
    let answer = client.list_nodes(pb::ListNodesReq {}).await?.into_inner();
    Ok(Outcome { text: if json { print::json("ListNodesResp", &answer) } else { listed(&answer) }, exit: DONE })
}

fn allocated(user: i64, answer: &pb::AllocateGatewayResp) -> String {
    let wait = answer.retry_after_ms;
    let Some(first) = answer.candidates.first() else {
        return format!("nobody takes user {user}{}; ask again in {wait} ms", print::refusal(&answer.result));
    };
    let when = if wait == 0 { "now".to_owned() } else { format!("in {wait} ms") };
    let experiment = match answer.experiment.as_str() {
        "" => String::new(),
        name => format!(", experiment {name}"),
    };
    let (to, algorithm) = (&first.public_addr, &answer.algorithm);
    let sentence = format!("user {user} should connect to {to} {when} ({algorithm}{experiment})");
    let row = |one: &pb::Candidate| {
        let load = format!("{:.1}%", one.load * 100.0);
        vec![
            one.gateway_addr.clone(),
            one.public_addr.clone(),
            print::or_dash(&print::harmless(&one.region)),
            load,
            one.why.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = answer.candidates.iter().map(row).collect();
    format!("{sentence}\n{}", print::table(&["GATEWAY", "CLIENTS GO TO", "REGION", "LOAD", "WHY"], &rows))
}

fn listed(answer: &pb::ListNodesResp) -> String {
    let row = |node: &pb::Node| {
        let is = if node.draining { "draining" } else { "alive" };
        let seen = format!("{} ms ago", node.seen_ms_ago);
        vec![node.node_id.clone(), node.addr.clone(), print::or_dash(&node.zone), is.to_owned(), seen]
    };
    let rows: Vec<Vec<String>> = answer.nodes.iter().map(row).collect();
    let count = print::counted(u32::try_from(rows.len()).unwrap_or(u32::MAX), "node");
    [count, print::table(&["NODE", "ADDRESS", "ZONE", "IS", "SEEN"], &rows)].join("\n").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allocation_is_a_sentence_and_a_table() {
        let candidate = pb::Candidate {
            gateway_addr: "gw-1:7000".into(),
            public_addr: "wss://one".into(),
            region: "eu".into(),
            load: 0.125,
            why: "region".into(),
        };
        let answer = pb::AllocateGatewayResp {
            candidates: vec![candidate],
            retry_after_ms: 40,
            algorithm: "two_choices".into(),
            experiment: "canary".into(),
            ..Default::default()
        };
        let want = "user 42 should connect to wss://one in 40 ms (two_choices, experiment canary)\n\
            GATEWAY    CLIENTS GO TO  REGION  LOAD   WHY\n\
            gw-1:7000  wss://one      eu      12.5%  region";
        assert_eq!(allocated(42, &answer), want);
        let result = Some(pb::Result { code: pb::Code::NotFound.into(), msg: "no gateway takes users now".into() });
        let answer = pb::AllocateGatewayResp { result, retry_after_ms: 4_000, ..Default::default() };
        assert_eq!(allocated(42, &answer), "nobody takes user 42 (NOT_FOUND): no gateway takes users now; ask again in 4000 ms");
    }

    #[test]
    fn nodes_are_a_table() {
        let node =
            pb::Node { node_id: "n-1".into(), addr: "a:6000".into(), seen_ms_ago: 20, draining: true, ..Default::default() };
        let want = "1 node\nNODE  ADDRESS  ZONE  IS        SEEN\nn-1   a:6000   -     draining  20 ms ago";
        assert_eq!(listed(&pb::ListNodesResp { nodes: vec![node], ..Default::default() }), want);
        assert_eq!(listed(&pb::ListNodesResp::default()), "0 nodes");
    }
}
