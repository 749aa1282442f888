//! What is watched: metrics, alerts, the runbook and the dashboard agree with each other and with what real nodes export.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use im_presence::pb::AllocateGatewayReq;
use im_presence::pb::DrainGatewayReq;
use im_presence::pb::UnbindRouteReq;
use im_presence::pb::presence_service_client::PresenceServiceClient;
use sqlx::AssertSqlSafe;

use crate::acks::with_ack;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::scratch;
use crate::harness::node::Node;
use crate::harness::node::settings;
use crate::harness::pki::Pki;
use crate::harness::pki::bears;
use crate::harness::pki::link;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;
use crate::harness::watcher::Watcher;
use crate::tidy::none;
use crate::tidy::package;

const SOON: Duration = Duration::from_secs(30);
const RULES: &str = "deploy/prometheus/rules.yml";
const RULES_TEST: &str = "deploy/prometheus/rules_test.yml";
const DASHBOARD: &str = "deploy/grafana/im-presence.json";
const RUNBOOK: &str = "docs/runbook.md";
const SEVERITIES: [&str; 4] = ["critical", "warning", "info", "none"];

fn read(name: &str) -> String {
    fs::read_to_string(package().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Exit and output of a program.
fn run(program: &str, words: &[&str]) -> (bool, String) {
    let done = Command::new(program).args(words).current_dir(package()).output();
    let done = done.unwrap_or_else(|error| panic!("{program} (tests/run installs it): {error}"));
    (done.status.success(), format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr)))
}

/// Metrics that a text names, without what a histogram adds.
pub fn named(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let is_metric = |word: &&str| word.starts_with("im_presence_") && *word != "im_presence_" || word.starts_with("process_");
    let metrics = words.filter(is_metric);
    let of_histogram =
        |word: &str| ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end)).map(str::to_owned);
    metrics.map(|word| of_histogram(word).unwrap_or_else(|| word.to_owned())).collect()
}

/// Alerts of the rules, each with its lines.
fn alerts(rules: &str) -> Vec<(String, Vec<String>)> {
    let mut alerts: Vec<(String, Vec<String>)> = Vec::new();
    for line in rules.lines() {
        if let Some(name) = line.trim().strip_prefix("- alert: ") {
            alerts.push((name.to_owned(), Vec::new()));
        } else if let Some((_, lines)) = alerts.last_mut() {
            lines.push(line.trim().to_owned());
        }
    }
    assert!(alerts.len() > 20, "the alerts were found");
    alerts
}

#[test]
fn alerts_fire_when_they_should_and_are_silent_otherwise() {
    for words in [["check", "rules", RULES], ["test", "rules", RULES_TEST]] {
        let (is_good, said) = run("promtool", &words);
        assert!(is_good, "promtool {words:?}: {said}");
    }
    let tests = read(RULES_TEST);
    for (alert, _) in alerts(&read(RULES)) {
        let of_alert = tests.split("- expr: ").filter(|test| test.contains(&format!("alertname=\"{alert}\", alertstate")));
        let (fires, silent): (Vec<_>, Vec<_>) = of_alert.partition(|test| !test.contains("exp_samples: []"));
        assert!(!fires.is_empty(), "{alert} fires in a test");
        assert!(!silent.is_empty() || alert == "ImPresenceWatchdog", "{alert} is silent in a test");
    }
}

#[test]
fn a_rule_that_does_not_fire_fails_its_test() {
    let directory = scratch("rules");
    fs::create_dir_all(&directory).unwrap();
    let blunt = read(RULES).replace("im_presence_hold) == 1", "im_presence_hold) == 2");
    assert_ne!(blunt, read(RULES), "the rule was changed");
    fs::write(directory.join("rules.yml"), blunt).unwrap();
    fs::write(directory.join("rules_test.yml"), read(RULES_TEST)).unwrap();
    let (is_good, said) = run("promtool", &["test", "rules", text(&directory.join("rules_test.yml"))]);
    assert!(!is_good && said.contains("ImPresenceHold"), "{said}");
}

#[test]
fn each_alert_says_how_bad_it_is_and_where_it_stands_what_to_do() {
    let (rules, runbook) = (read(RULES), read(RUNBOOK));
    let headings: BTreeSet<&str> = runbook.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let alerts = alerts(&rules);
    let mut wrong = Vec::new();
    for (alert, lines) in &alerts {
        let after = |key: &str| lines.iter().find_map(|line| line.strip_prefix(key));
        if !after("severity: ").is_some_and(|severity| SEVERITIES.contains(&severity)) {
            wrong.push(format!("{alert}: severity"));
        }
        if after("summary: ").is_none() || after("description: ").is_none() {
            wrong.push(format!("{alert}: summary and description"));
        }
        let anchor = format!("runbook_url: {RUNBOOK}#{}", alert.to_lowercase());
        if !lines.contains(&anchor) || !headings.contains(alert.as_str()) {
            wrong.push(format!("{alert}: {anchor}"));
        }
    }
    let known = |heading: &&str| !alerts.iter().any(|(alert, _)| alert == *heading);
    wrong.extend(headings.into_iter().filter(known).map(|heading| format!("{heading}: no such alert")));
    none("alerts and runbook agree", wrong);
}

#[test]
fn the_dashboard_can_be_shown() {
    const CHECK: &str = "deploy/grafana/check.py";
    let (is_good, said) = run("python3", &[CHECK]);
    assert!(is_good && said.is_empty(), "{said}");
    let directory = scratch("dashboard");
    fs::create_dir_all(&directory).unwrap();
    let all = read(DASHBOARD);
    for (what, from, to) in [
        ("promtool", "max(im_presence_hold{", "max(im_presence_hold{{"),
        ("lies over", "\"x\": 3,", "\"x\": 2,"),
        ("one id", "\"id\": 2,", "\"id\": 3,"),
        ("wider", "\"w\": 24,", "\"w\": 25,"),
        ("sums away", "{{instance}}\"", "{{pod}}\""),
        ("never bind", "\"panels\": [", "\"__inputs\": [], \"panels\": ["),
        ("another data source", "\"uid\": \"${datasource}\"", "\"uid\": \"P1\""),
    ] {
        let broken = all.replace(from, to);
        assert_ne!(broken, all, "{from}");
        let file = directory.join("broken.json");
        fs::write(&file, broken).unwrap();
        let (is_good, said) = run("python3", &[CHECK, text(&file)]);
        assert!(!is_good && (said.contains(what) || what == "promtool" && said.contains("parse error")), "{what}: {said}");
    }
}

/// What these nodes export, counters with their ending.
pub async fn exported(nodes: &[&Node]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for node in nodes {
        let (_, text) = node.http("/metrics").await;
        names.extend(text.lines().filter_map(|line| Some(line.strip_prefix("# TYPE ")?.split(' ').next()?.to_owned())));
    }
    names
}

/// Two nodes that serve gateways, services and operators, and then lose Redis and the database.
async fn a_life_of_two_nodes() -> BTreeSet<String> {
    let server = MariaDb::start();
    let more = [("DIGEST__INTERVAL", "100"), ("DIGEST__SETTLE", "200"), ("STORE__TIMEOUT", "1000")];
    let cluster = Cluster::on_all(&server, Redis::one(), 2, &more).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = TestGateway::start(&cluster.nodes, "gw-0:7000", Devices::Acknowledge).await;
    let _watcher = Watcher::of(other, [ALICE, BOB]).await;
    gateway.bind(ALICE, PHONE, "c-1").await;
    gateway.bind(BOB, PHONE, "c-1").await;
    let epoch = node.register(OTHER_GATEWAY).await;
    node.bind_all([BOB], OTHER_GATEWAY, epoch).await; // BOB's phone is kicked from the other one
    node.deliver(with_ack(ALICE, "hello", 5_000)).await;
    node.query(ALICE).await;
    node.presence().allocate_gateway(AllocateGatewayReq { user_id: ALICE, ..Default::default() }).await.expect("an answer");
    node.unbind(UnbindRouteReq {
        user_id: BOB,
        device_id: LAPTOP.to_owned(),
        gateway_addr: OTHER_GATEWAY.to_owned(),
        gateway_epoch: epoch,
        ..Default::default()
    })
    .await;
    assert_eq!(node.ctl(&["kick", "2", PHONE, "--reason", "test"]).0, 0);
    assert_eq!(node.deregister(OTHER_GATEWAY, epoch).await, im_presence::pb::Code::Ok);
    let late = node.presence().bind_route(on(OTHER_GATEWAY, epoch, a_bind(BOB, LAPTOP, "c-2"))).await.expect("an answer");
    println!("a bind of an ended life: {late:?}");
    let drain = DrainGatewayReq { gateway_addr: "gw-0:7000".to_owned(), force: true, ..Default::default() };
    node.operator().drain_gateway(drain).await.expect("a drain");
    let sum = async |name: &str| node.metric(name).await + other.metric(name).await;
    let mut connection = cluster.db.connect().await;
    sqlx::query(AssertSqlSafe("UPDATE routes SET digest = 0".to_owned())).execute(&mut connection).await.expect("SQL");
    eventually("what differs is mended", SOON, async || sum("im_presence_digest_mended_total").await > 0.0).await;
    eventually("users are asked to go", SOON, async || sum("im_presence_drain_users_total").await > 0.0).await;
    eventually("a node tells of gateways", SOON, async || sum("im_presence_gateway_users").await > 0.0).await;
    let mut names = exported(&[node, other]).await;

    cluster.cache().kill();
    let is_deaf = async || other.degraded().await.contains(&"hints".to_owned());
    eventually("they are deaf", SOON, is_deaf).await;
    eventually("watched users are looked at", SOON, async || sum("im_presence_watch_resyncs_total").await > 0.0).await;
    server.kill();
    let retried = async || {
        let _ = node.try_bind(a_bind(ALICE, LAPTOP, "c-3")).await; // it cannot be stored
        sum("im_presence_lane_retries_total").await > 0.0
    };
    eventually("the lanes try again", SOON, retried).await;
    names.extend(exported(&[node, other]).await);
    names
}

/// A node with TLS and tokens, called by those who may and by those who may not.
async fn a_node_that_is_guarded() -> BTreeSet<String> {
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let pair = ca.issue("node", &["127.0.0.1"]);
    let (secret, viewer) = token("viewer", "viewer", "");
    let (tokens, bearer) = (pki.write("tokens.toml", &viewer), pki.write("viewer", &secret));
    let node = Node::start(settings(&[
        ("STORE__URL", &db.url),
        ("TLS__CERT_FILE", text(&pair.cert)),
        ("TLS__KEY_FILE", text(&pair.key)),
        ("TLS__ACCEPT_PLAIN", "true"),
        ("AUTH__MODE", "token"),
        ("AUTH__TOKENS_FILE", text(&tokens)),
    ]))
    .await;
    let mut encrypted = im_presence::client::security::Security { ca_file: Some(ca.file.clone()), ..bears(&bearer) };
    encrypted.token_file = Some(bearer.clone());
    let mut viewing = PresenceServiceClient::new(link(&encrypted, node.data));
    viewing.bind_route(a_bind(ALICE, PHONE, "c-1")).await.expect_err("a viewer may not");
    node.presence().bind_route(a_bind(ALICE, PHONE, "c-1")).await.expect_err("nobody may without a token");
    exported(&[&node]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_metric_that_is_named_is_exported_and_every_one_that_is_exported_is_explained() {
    let _turn = heavy().await;
    let mut there = a_life_of_two_nodes().await;
    there.extend(a_node_that_is_guarded().await);
    let mut wrong = Vec::new();
    for name in [RULES, DASHBOARD, RUNBOOK, "docs/operations.md", "docs/security.md", "docs/moves.md", "docs/digests.md"] {
        let missing = named(&read(name)).into_iter().filter(|metric| !there.contains(metric));
        wrong.extend(missing.map(|metric| format!("{name} names {metric}, which nobody exports")));
    }
    let explained = named(&read("docs/operations.md"));
    wrong.extend(there.difference(&explained).map(|metric| format!("docs/operations.md does not explain {metric}")));
    assert!(there.len() > 90, "they were found: {}", there.len());
    none("names and metrics agree", wrong);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_counted_by_what_came_of_them() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    node.query(ALICE).await;
    node.try_query(-1, None).await.expect_err("no such user");
    let gateway = TestGateway::start(&cluster.nodes, OTHER_GATEWAY, Devices::AreSilent).await;
    gateway.bind(BOB, PHONE, "c-1").await;
    let mut presence = node.presence();
    let given_up = tokio::spawn(async move { presence.deliver(with_ack(BOB, "to nobody", 60_000)).await });
    eventually("it is under way", SOON, async || !gateway.deliveries().is_empty()).await;
    given_up.abort();
    let is_counted = async |labels: &str, times: f64| {
        let calls = node.series("im_presence_calls_total").await;
        calls.contains(&(labels.to_owned(), times))
    };
    let cancelled = "{call=\"Deliver\",code=\"CANCELLED\"}";
    eventually("it was given up", SOON, async || is_counted(cancelled, 1.0).await).await;
    for (labels, times) in [
        ("{call=\"BindRoute\",code=\"OK\"}", 1.0),
        ("{call=\"QueryRoute\",code=\"OK\"}", 1.0),
        ("{call=\"QueryRoute\",code=\"INVALID_ARGUMENT\"}", 1.0),
        ("{call=\"UnbindRoute\",code=\"OK\"}", 0.0),
    ] {
        assert!(is_counted(labels, times).await, "{labels} {times}: {:?}", node.series("im_presence_calls_total").await);
    }
    assert_eq!(node.metric("im_presence_call_seconds_count").await, node_calls(node, "other").await);
}

/// Calls that are timed: all but those named here.
async fn node_calls(node: &Node, but: &str) -> f64 {
    let calls = node.series("im_presence_calls_total").await;
    calls.iter().filter(|(labels, _)| !labels.contains(&format!("\"{but}\""))).map(|(_, value)| value).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_nodes_one_tells_how_many_connections_each_gateway_has() {
    let mut cluster = Cluster::mariadb(2, &[]).await;
    let _gateway = TestGateway::start(&cluster.nodes, "gw-0:7000", Devices::Acknowledge).await;
    let tell = async |nodes: &[Node]| {
        let mut telling = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            if !node.series("im_presence_gateway_users").await.is_empty() {
                telling.push(n);
            }
        }
        telling
    };
    cluster.db.another_sweeps().await;
    eventually("whoever does not sweep tells nothing", SOON, async || tell(&cluster.nodes).await.is_empty()).await;
    cluster.db.anybody_sweeps().await;
    eventually("one tells", SOON, async || tell(&cluster.nodes).await.len() == 1).await;
    let first = tell(&cluster.nodes).await[0];
    cluster.nodes[first].kill();
    let rest = cluster.nodes.remove(1 - first);
    eventually("the other takes over", SOON, async || !rest.series("im_presence_gateway_users").await.is_empty()).await;
}
