//! `ctl explain`: why a user is online, suspect or offline, on the node's admin port.

use clap::Args;

use super::Outcome;
use super::code;
use super::exit;
use super::moment;
use super::print;
use super::print::counted;
use super::print::harmless;
use super::print::name;
use super::print::or_dash;
use super::print::table;
use super::print::with_text;
use super::shown;
use crate::client::security::Link;
use crate::pb;
use crate::pb::Code;
use crate::pb::admin_service_client::AdminServiceClient;

const HELP: &str = "\
Examples:
  im-presence ctl explain 42               what memory, Redis and SQL hold, what each route is worth, and why
  im-presence ctl explain 42 --this-node   without asking the other nodes what they remember
  im-presence ctl --json explain 42 | jq -r .because

A route is live; late (its gateway missed two beats); held (the same, and a hold keeps it from being declared dead); unsure (this
node does not know well enough who lives); over (its gateway's life is); or expired (its own time to live is).

Exit codes: as of ctl; 0 if there is an explanation, whether the user is online or not.";

#[derive(Args)]
#[command(after_help = HELP)]
pub struct Explain {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// Do not ask the other nodes what they remember
    #[arg(long)]
    this_node: bool,
    /// The node's admin address
    #[arg(long, value_name = "HOST:PORT", env = "IM_PRESENCE_ADMIN", default_value = "127.0.0.1:6001")]
    admin: String,
}

impl Explain {
    pub(super) fn addr(&self) -> &str {
        &self.admin
    }

    /// Makes the call.
    pub(super) async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::ExplainRouteReq { user_id: self.user, this_node_only: self.this_node };
        let answer = AdminServiceClient::new(link).explain_route(request).await?.into_inner();
        let text = if json { print::json("ExplainRouteResp", &answer) } else { explained(self.user, &answer) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

fn explained(user: i64, it: &pb::ExplainRouteResp) -> String {
    if code(&it.result) != Code::Ok {
        return format!("user {user} was not explained{}", print::refusal(&it.result));
    }
    let routes: Vec<_> = it.routes.iter().map(route).collect();
    let tiers: Vec<_> = it.tiers.iter().map(tier).collect();
    let parts = [
        [format!("user {user} is {}", harmless(&it.because)), status(it), node(it)].join("\n"),
        table(&["DEVICE", "GATEWAY", "EPOCH", "VERDICT", "LEASE LEFT", "CONNECTED SINCE", "WHY"], &routes),
        table(&["TIER", "NODE", "VERSION", "SHOWN VERSION", "GENERATION", "AGE", "ROUTES", "TRUSTED", "WHY"], &tiers),
        shown::changes(&it.recent),
    ];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n\n")
}

fn status(it: &pb::ExplainRouteResp) -> String {
    let at = |what: &str, ms: i64| if ms == 0 { String::new() } else { format!(", {what} {}", moment::shown(ms)) };
    let (wanted, until) = (with_text(name(it.wanted), &it.status_text), at("until", it.status_until_ms));
    let (banned, seen) = (at("banned until", it.banned_until_ms), at("last seen", it.last_seen_ms));
    let messages = counted(u32::try_from(it.inbox_messages).unwrap_or(u32::MAX), "message");
    let inbox = if it.inbox_messages == 0 { String::new() } else { format!(", {messages} stored") };
    format!("shown as {}, version {}; wanted {wanted}{until}{banned}{seen}{inbox}", name(it.shown), it.shown_version)
}

fn node(it: &pb::ExplainRouteResp) -> String {
    let hold = if it.hold { ", HOLD: no gateway is declared dead" } else { "" };
    let silent = if it.silent_nodes.is_empty() { String::new() } else { format!(", silent: {}", it.silent_nodes.join(" ")) };
    let watches = counted(it.watchers, "watch").replace("watchs", "watches");
    format!("node {}: {watches} of the user, knew {} ms ago who lives{hold}{silent}", it.node_id, it.lives_age_ms)
}

fn route(view: &pb::RouteView) -> Vec<String> {
    let route = view.route.clone().unwrap_or_default();
    let lease = view.life.as_ref().filter(|life| life.managed && life.alive);
    vec![
        or_dash(&harmless(&route.device_id)),
        or_dash(&harmless(&route.gateway_addr)),
        route.gateway_epoch.to_string(),
        view.verdict.clone(),
        lease.map_or_else(|| "-".to_owned(), |life| format!("{} ms", life.lease_left_ms)),
        moment::shown(route.bound_at_ms),
        or_dash(&harmless(&view.why)),
    ]
}

fn tier(view: &pb::TierView) -> Vec<String> {
    let number = |number: u64| if number == 0 { "-".to_owned() } else { number.to_string() };
    vec![
        view.tier.clone(),
        view.node_id.clone(),
        number(view.version),
        number(view.shown_version),
        number(view.generation),
        if view.present { format!("{} ms", view.age_ms) } else { "-".to_owned() },
        view.routes.to_string(),
        if view.trusted { "yes" } else { "no" }.to_owned(),
        or_dash(&harmless(&view.why)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::Status;

    #[test]
    fn an_explanation_is_a_sentence_and_tables() {
        let route = pb::Route { device_id: "phone".into(), gateway_addr: "gw-1:7000".into(), ..Default::default() };
        let life = pb::Life { managed: true, alive: true, lease_left_ms: 900, ..Default::default() };
        let view =
            pb::RouteView { route: Some(route), life: Some(life), verdict: "late".into(), why: "last heard 12 s ago".into() };
        let memory = pb::TierView {
            tier: "memory".into(),
            node_id: "n-1".into(),
            present: true,
            version: 17,
            shown_version: 16,
            age_ms: 20,
            trusted: true,
            routes: 1,
            ..Default::default()
        };
        let it = pb::ExplainRouteResp {
            because: "online, but suspect".into(),
            wanted: Status::Busy.into(),
            shown: Status::Busy.into(),
            status_text: "in a meeting".into(),
            shown_version: 16,
            banned_until_ms: 1,
            inbox_messages: 2,
            routes: vec![view],
            tiers: vec![memory],
            node_id: "n-1".into(),
            silent_nodes: vec!["n-2".into()],
            lives_age_ms: 800,
            hold: true,
            watchers: 2,
            ..Default::default()
        };
        let want = "user 42 is online, but suspect\n\
            shown as BUSY, version 16; wanted BUSY \"in a meeting\", banned until 1970-01-01 00:00:00.001Z, 2 messages stored\n\
            node n-1: 2 watches of the user, knew 800 ms ago who lives, HOLD: no gateway is declared dead, silent: n-2\n\n\
            DEVICE  GATEWAY    EPOCH  VERDICT  LEASE LEFT  CONNECTED SINCE           WHY\n\
            phone   gw-1:7000  0      late     900 ms      1970-01-01 00:00:00.000Z  last heard 12 s ago\n\n\
            TIER    NODE  VERSION  SHOWN VERSION  GENERATION  AGE    ROUTES  TRUSTED  WHY\n\
            memory  n-1   17       16             -           20 ms  1       yes      -";
        assert_eq!(explained(42, &it), want);
    }
}
