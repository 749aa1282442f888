//! What happens, as it is told while it happens.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::time::timeout;

use im_presence::pb;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::pki::Pki;
use crate::harness::pki::token;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;

/// Within this time everything is told that a test waits for.
const SOON: Duration = Duration::from_secs(20);
/// Credentials are read again within five seconds.
const REVOKED_WITHIN: Duration = Duration::from_secs(20);
/// Gateways of these tests do not beat.
const UNHURRIED: &[(&str, &str)] = &[("GATEWAY__LEASE", "3600000")];

struct Listener {
    lines: tokio::io::Lines<BufReader<TcpStream>>,
}

#[derive(Debug)]
struct Event {
    id: String,
    kind: String,
    data: Value,
}

impl Listener {
    async fn open(node: &Node, query: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(node.admin).await.expect("connect to the admin port");
        let request = format!("GET /api/v1/events{query} HTTP/1.1\r\nHost: {}\r\n{headers}\r\n", node.admin);
        stream.write_all(request.as_bytes()).await.expect("ask the admin port");
        let mut listener = Self { lines: BufReader::new(stream).lines() };
        let head = listener.lines.next_line().await.expect("an answer").unwrap_or_default();
        assert_eq!(head, "HTTP/1.1 200 OK");
        listener
    }

    /// The next event. None: the stream has ended.
    async fn next(&mut self) -> Option<Event> {
        timeout(SOON, self.read()).await.expect("something is told in time")
    }

    async fn read(&mut self) -> Option<Event> {
        let (mut id, mut kind) = (String::new(), String::new());
        loop {
            let line = self.lines.next_line().await.ok()??;
            match line.split_once(": ") {
                Some(("id", value)) => value.clone_into(&mut id),
                Some(("event", value)) => value.clone_into(&mut kind),
                Some(("data", value)) => {
                    let data = serde_json::from_str(value).unwrap_or_else(|error| panic!("{error}: {value}"));
                    return Some(Event { id, kind, data });
                }
                _ => {} // chunk sizes, headers, comments
            }
        }
    }

    /// The next one of this kind that `fits`.
    async fn hears(&mut self, kind: &str, fits: impl Fn(&Value) -> bool) -> Event {
        let heard = async {
            loop {
                let event = self.next().await.unwrap_or_else(|| panic!("the stream ended before {kind}"));
                if event.kind == kind && fits(&event.data) {
                    return event;
                }
            }
        };
        timeout(allowed(SOON), heard).await.unwrap_or_else(|_| panic!("{kind} is told in time"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deaths_holds_drains_and_the_audit_are_told_by_a_node_that_did_none_of_it() {
    let cluster = Cluster::mariadb(2, &[("GATEWAY__LEASE", "3000"), ("GATEWAY__HEARTBEAT_INTERVAL", "1000")]).await;
    let (one, two) = (&cluster.nodes[0], &cluster.nodes[1]);
    let mut listener = Listener::open(two, "?last=0", "").await;
    // Kinds come from different places, so one of them may be told before the other.
    let mut audits = Listener::open(two, "?last=0&kinds=audit", "").await;

    let hold = pb::HoldGatewaysReq { for_ms: 60_000, reason: "we look at the network".into() };
    one.operator().hold_gateways(hold).await.expect("a hold");
    let began = listener.hears("hold", |data| data["state"] == "began").await;
    assert!(began.data["until_ms"].as_i64().is_some_and(|at| at > 0), "{began:?}");
    let audit = audits.hears("audit", |data| data["action"] == "HoldGateways").await;
    assert_eq!((&audit.data["outcome"], audit.data["node_id"].is_string()), (&Value::from("ok"), true), "{audit:?}");
    one.operator().hold_gateways(pb::HoldGatewaysReq::default()).await.expect("an end");
    listener.hears("hold", |data| data["state"] == "ended").await;

    let epoch = one.register("gw-dies:7000").await;
    let death = listener.hears("death", |data| data["gateway_addr"] == "gw-dies:7000").await;
    assert_eq!((&death.data["epoch"], &death.data["why"]), (&Value::from(epoch.to_string()), &Value::from("its lease ran out")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_says_good_bye_is_no_death() {
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let mut listener = Listener::open(node, "?last=0&kinds=death", "").await;
    let epoch = node.register("gw-leaves:7000").await;
    node.deregister("gw-leaves:7000", epoch).await;
    let epoch = node.register("gw-dies:7000").await;
    let purge = pb::PurgeGatewaysReq { epochs: vec![epoch], ..Default::default() };
    node.operator().purge_gateways(purge).await.expect("a purge");
    let death = listener.next().await.expect("a death");
    assert_eq!(
        (&death.data["epoch"], &death.data["why"]),
        (&Value::from(epoch.to_string()), &Value::from("an operator said so"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn why_a_gateway_is_dead_is_left_open_until_the_database_says_so() {
    const LIVES: &str = "FROM lives";
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::with_two_redis(1, UNHURRIED).await;
    cluster.add_node_through(&proxy, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let epoch = one.register("gw-dies:7000").await;
    one.bind_all([ALICE], "gw-dies:7000", epoch).await;
    let sees = async |state: &str| explained(two, ALICE).await.contains(state);
    // A query makes it learn the life; an explanation only looks at what SQL has.
    let answer = two.query_sql(ALICE).await;
    assert!(answer.is_online, "{answer:?}");
    let mut deaths = Listener::open(two, "?last=0&kinds=death", "").await;
    let mut degraded = Listener::open(two, "?last=0&kinds=degraded", "").await;
    cluster.db.another_sweeps().await;
    // The watch is held too, or it would read why at once: that the life is over comes by Redis alone.
    proxy.hold_answers(Kind::Anybody, LIVES);
    proxy.struck().await;
    let purge = pb::PurgeGatewaysReq { epochs: vec![epoch], ..Default::default() };
    one.operator().purge_gateways(purge).await.expect("a purge");
    let open = "gw-dies:7000; its life ended (SQL has not said yet why)";
    eventually("the other node has heard of it", SOON, async || sees(open).await).await;
    // It looks for what has happened, twice.
    let mut cache =
        async |state: &str| degraded.hears("degraded", |data| data["part"] == "redis_cache" && data["state"] == state).await;
    cluster.cache().kill();
    cache("began").await;
    cluster.cache().restart();
    cache("ended").await;
    proxy.release();
    let death = deaths.next().await.expect("a death");
    assert_eq!(
        (&death.data["epoch"], &death.data["why"]),
        (&Value::from(epoch.to_string()), &Value::from("an operator said so"))
    );
}

/// The sentence about where a user is.
async fn explained(node: &Node, user: i64) -> String {
    let ask = pb::ExplainRouteReq { user_id: user, this_node_only: true };
    node.operator().explain_route(ask).await.expect("an explanation").into_inner().because
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_down_late_is_told_once_and_what_was_denied_is_not() {
    let pki = Pki::new();
    let (viewer, entry) = token("viewer", "viewer", "");
    let (operator, other_entry) = token("operator", "operator", "");
    let file = pki.write("tokens.toml", &format!("{entry}{other_entry}"));
    let settings = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", file.to_str().expect("a path"))];
    let cluster = Cluster::sqlite(&settings).await;
    let node = cluster.node();
    let bearer = |token: &str| format!("Bearer {token}");
    let (viewer, operator) = (bearer(&viewer), bearer(&operator));
    let mut listener = Listener::open(node, "?last=0&kinds=audit", &format!("Authorization: {viewer}\r\n")).await;
    let bans = async |who: &str, reason: &str| {
        let path = format!("/api/v1/users/1/ban?reason={reason}");
        node.ask("DELETE", &path, &[("Authorization", who)], "").await.status
    };
    assert_eq!(bans(&operator, "first").await, 200);
    listener.hears("audit", |data| data["reason"] == "first").await;

    assert_eq!(bans(&viewer, "denied").await, 403);
    let denied = "SELECT COUNT(*) FROM audit WHERE outcome = 'denied'";
    eventually("it is taken down", SOON, async || cluster.db.number(denied).await == 1).await;
    // As another node writes it whose commit has taken a while.
    let late = "INSERT INTO audit (at_ms, node_id, seq, who, role, from_addr, action, target, args, outcome, reason) \
        SELECT MAX(at_ms) - 60000, 'another', 1, 'somebody', 'operator', '', 'KickDevice', '', '', 'ok', 'late' FROM audit";
    cluster.db.run(late).await;
    let mut told = Vec::new();
    for reason in ["second", "third"] {
        assert_eq!(bans(&operator, reason).await, 200);
        while told.last().is_none_or(|last| last != reason) {
            let event = listener.next().await.expect("an event");
            told.push(event.data["reason"].as_str().expect("a reason").to_owned());
        }
    }
    told.sort_unstable();
    assert_eq!(told, ["late", "second", "third"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_come_and_go_and_what_is_degraded_are_told() {
    let mut cluster = Cluster::with_two_redis(1, &[]).await;
    let mut listener = Listener::open(cluster.node(), "?last=0&kinds=node,degraded", "").await;
    cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", "two")]).await;
    listener.hears("node", |data| data["node_id"] == "two" && data["state"] == "came").await;
    cluster.nodes[1].terminate();
    listener.hears("node", |data| data["node_id"] == "two" && data["state"] == "gone").await;
    cluster.nodes[1].ended().await;
    cluster.cache().kill();
    listener.hears("degraded", |data| data["part"] == "redis_cache" && data["state"] == "began").await;
    cluster.cache().restart();
    listener.hears("degraded", |data| data["part"] == "redis_cache" && data["state"] == "ended").await;
}

/// Makes one more event: a line of the audit.
async fn something_happens(node: &Node, what: &str) {
    let hold = pb::HoldGatewaysReq { for_ms: 60_000, reason: what.to_owned() };
    node.operator().hold_gateways(hold).await.expect("a hold");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_goes_on_where_it_was_and_after_a_restart_is_told_that_something_is_missing() {
    let mut cluster = Cluster::sqlite(&[]).await;
    let mut listener = Listener::open(cluster.node(), "?last=0&kinds=audit", "").await;
    something_happens(cluster.node(), "first").await;
    let first = listener.hears("audit", |data| data["reason"] == "first").await;
    drop(listener);
    something_happens(cluster.node(), "second").await;
    let last_seen = format!("Last-Event-ID: {}\r\n", first.id);
    let mut again = Listener::open(cluster.node(), "?kinds=audit", &last_seen).await;
    let second = again.next().await.expect("an event");
    assert_eq!((&*second.kind, &second.data["reason"]), ("audit", &Value::from("second")), "no gap, and nothing twice");
    drop(again);

    cluster.nodes[0].terminate();
    cluster.nodes[0].ended().await;
    cluster.nodes[0].restart().await;
    let mut other = Listener::open(cluster.node(), "", &last_seen).await;
    let gap = other.next().await.expect("an event");
    assert_eq!(gap.kind, "gap", "{gap:?}");
    let run = |id: &str| id.split('-').next().unwrap_or_default().to_owned();
    assert_ne!(run(&gap.id), run(&first.id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_events_ends_with_its_credential_and_with_the_node() {
    let pki = Pki::new();
    let (viewer, entry) = token("viewer", "viewer", "");
    let (other, other_entry) = token("other", "viewer", "");
    let file = pki.write("tokens.toml", &format!("{entry}{other_entry}"));
    let settings = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", file.to_str().expect("a path"))];
    let mut cluster = Cluster::sqlite(&settings).await;
    let (status, _) = cluster.node().http("/api/v1/events").await;
    assert_eq!(status, 401);
    let mut revoked = Listener::open(cluster.node(), "?last=0", &format!("Authorization: Bearer {viewer}\r\n")).await;
    let mut stays = Listener::open(cluster.node(), "?last=0&kinds=node", &format!("Authorization: Bearer {other}\r\n")).await;
    pki.write("tokens.toml", &other_entry);
    cluster.node().signal(Signal::SIGHUP);
    let ended = async { while revoked.next().await.is_some() {} };
    timeout(REVOKED_WITHIN, ended).await.expect("it ends with its credential");
    cluster.nodes[0].terminate();
    timeout(SOON, async { while stays.next().await.is_some() {} }).await.expect("it ends with the node");
    assert!(cluster.nodes[0].ended().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ctl_prints_events_the_audit_and_the_system_at_a_glance() {
    let cluster = Cluster::sqlite(&[("PRESENCE_SERVICE__NODE_ID", "one")]).await;
    let node = cluster.node();
    let (mut audits, mut holds) =
        (Listener::open(node, "?last=0&kinds=audit", "").await, Listener::open(node, "?last=0&kinds=hold", "").await);
    something_happens(node, "we look at the network").await;
    audits.hears("audit", |data| data["reason"] == "we look at the network").await;
    holds.hears("hold", |data| data["state"] == "began").await;

    let (exit, events) = node.ctl(&["events", "--kinds", "audit,hold"]);
    let ordered = "HoldGateways, for 60s: ok; reason: we look at the network";
    assert!(exit == 0 && events.contains(ordered) && events.contains("no gateway is declared dead until 20"), "{events}");
    let (exit, line) = node.ctl(&["events", "--kinds", "audit", "--last", "1", "--json"]);
    let event: Value = serde_json::from_str(line.trim()).expect("JSON on one line");
    assert_eq!((exit, &event["event"]), (0, &Value::from("audit")), "{line}");
    assert_eq!(node.ctl(&["events", "--kinds", "weather"]).0, 2);

    let (exit, audit) = node.ctl(&["audit", "--action", "HoldGateways"]);
    assert!(exit == 0 && audit.contains("for 60s  ok       we look at the network"), "{audit}");
    let (exit, audit) = node.ctl(&["audit", "--action", "start"]);
    assert!(exit == 0 && audit.contains("Z  one  -     start "), "what a node did by itself is told with its name: {audit}");
    let (exit, audit) = node.ctl(&["audit", "--action", "Hold"]);
    assert!(exit == 0 && audit.contains("the whole name, as in DrainGateway"), "{audit}");
    let (exit, audit) = node.ctl(&["audit", "--action", "Nothing", "--json"]);
    assert!(exit == 0 && serde_json::from_str::<Value>(&audit).expect("JSON")["items"] == Value::Array(Vec::new()), "{audit}");

    let (exit, top) = node.ctl(&["top", "--once"]);
    assert!(exit == 0 && top.contains("users online") && top.contains("no streams on this node"), "{top}");
    let (exit, top) = node.ctl(&["top", "--once", "--json"]);
    assert_eq!((exit, &serde_json::from_str::<Value>(&top).expect("JSON")["node_id"]), (0, &Value::from("one")));
    assert_eq!(node.ctl(&["top", "changes"]).0, 0, "as before");
}
