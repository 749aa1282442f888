//! The REST API: what it answers, whom it lets in, and how it fails.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use im_presence::domain::caller::Role;
use im_presence::pb;
use im_presence::pb::Code;
use serde_json::Value;
use serde_json::json;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::gateway::on;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Answer;
use crate::harness::node::Node;
use crate::harness::pki::Pki;
use crate::harness::pki::token;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;

const SOON: Duration = Duration::from_secs(5);
const JSON: (&str, &str) = ("Content-Type", "application/json");
const DOCUMENT: &str = "/api/v1/openapi.json";
/// Gateways of these tests do not beat.
const UNHURRIED: &[(&str, &str)] = &[("GATEWAY__LEASE", "3600000"), ("STATUS__RATE", "0")];
/// Bodies are read up to here by the API, and up to the second by the port.
const MAX_BODY_BYTES: usize = 64 * 1024;
const MAX_PORT_BODY_BYTES: usize = 256 * 1024;

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn has(&self, header: &str) -> bool {
        self.head.lines().any(|line| line == header)
    }

    /// Insists on a problem with this status, code and field.
    #[track_caller]
    fn is_problem(&self, status: u16, code: &str, field: Option<&str>) -> Value {
        let problem = self.json();
        assert!(self.has("content-type: application/problem+json") && self.has("cache-control: no-store"), "{self:?}");
        let told = (self.status, problem["status"].as_u64(), problem["code"].as_str(), problem["field"].as_str());
        assert_eq!(told, (status, Some(status.into()), Some(code), field), "{problem}");
        assert_eq!(problem["type"], format!("urn:im-presence:problem:{code}"));
        assert!(problem["instance"].as_str().is_some_and(|id| id.starts_with("urn:uuid:")), "{problem}");
        problem
    }
}

impl Node {
    async fn rest(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        let body = body.map(Value::to_string);
        let headers: Vec<_> = body.iter().map(|_| JSON).collect();
        self.ask(method, &format!("/api/v1{path}"), &headers, body.as_deref().unwrap_or_default()).await
    }

    /// What is answered with 200.
    async fn got(&self, path: &str) -> Value {
        self.did("GET", path, None).await
    }

    async fn did(&self, method: &str, path: &str, body: Option<Value>) -> Value {
        let answer = self.rest(method, path, body.as_ref()).await;
        assert_eq!(answer.status, 200, "{method} {path}: {answer:?}");
        assert!(answer.has("content-type: application/json") && answer.has("cache-control: no-store"), "{answer:?}");
        answer.json()
    }

    /// All items of a list, page by page.
    async fn all(&self, path: &str, limit: usize) -> Vec<Value> {
        let (mut items, mut cursor) = (Vec::new(), String::new());
        let and = if path.contains('?') { '&' } else { '?' };
        loop {
            let page = self.got(&format!("{path}{and}limit={limit}{cursor}")).await;
            let found = page["items"].as_array().expect("a list");
            assert!(found.len() <= limit, "{page}");
            items.extend(found.iter().cloned());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return items,
            }
        }
    }
}

fn texts(items: &[Value], field: &str) -> Vec<String> {
    items.iter().map(|item| item[field].as_str().expect("a text").to_owned()).collect()
}

/// Method, path and operation of each route that the document names.
async fn operations(node: &Node) -> Vec<(String, String, Value)> {
    let document = node.ask("GET", DOCUMENT, &[], "").await.json();
    let paths = document["paths"].as_object().expect("paths").clone();
    let each = paths.into_iter().flat_map(|(path, item)| {
        let item = item.as_object().expect("a path").clone();
        item.into_iter().map(move |(method, operation)| (method.to_uppercase(), path.clone(), operation))
    });
    each.collect()
}

/// A path that names something.
fn filled(path: &str) -> String {
    let path = path.replace("{user_id}", "1").replace("{gateway_addr}", GATEWAY);
    let path = path.replace("{device_id}", PHONE).replace("{epoch}", "1").replace("{node_id}", "node-1");
    path.replace("/events", "/events?follow=false") // else it does not end
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_route_is_described_and_each_described_route_is_there() {
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let operations = operations(cluster.node()).await;
    let ids: BTreeSet<_> = operations.iter().map(|(.., operation)| operation["operationId"].to_string()).collect();
    assert!(operations.len() >= 29 && ids.len() == operations.len(), "each has a name of its own: {ids:?}");
    for (method, path, operation) in &operations {
        // Neither query nor body: it is served, or found wanting, but never unknown.
        let answer = cluster.node().ask(method, &filled(path), &[], "").await;
        let is_known = answer.status == 200
            || ["INVALID_ARGUMENT", "UNSUPPORTED_MEDIA_TYPE", "UNAVAILABLE"]
                .contains(&answer.json()["code"].as_str().unwrap_or_default())
            || answer.json()["detail"].as_str().is_some_and(|detail| !detail.starts_with(method.as_str()));
        assert!(is_known, "{method} {path}: {answer:?}");
        assert_eq!(
            operation["responses"]["default"]["content"]["application/problem+json"]["schema"]["$ref"],
            "#/components/schemas/Problem"
        );
        let known: BTreeSet<_> =
            operations.iter().filter(|(_, other, _)| other == path).map(|(method, ..)| method.as_str()).collect();
        let other = cluster.node().ask("PATCH", &filled(path), &[], "").await;
        other.is_problem(405, "METHOD_NOT_ALLOWED", None);
        let allow = other.head.lines().find_map(|line| line.strip_prefix("allow: ")).expect("Allow").to_uppercase();
        assert_eq!(allow.split(',').filter(|method| *method != "HEAD").collect::<BTreeSet<_>>(), known, "{path}");
    }
}

#[test]
fn no_route_is_served_that_is_not_described() {
    let parts = crate::tidy::sources();
    let parts: Vec<_> = parts.iter().filter(|source| source.name.starts_with("src/api/rest")).collect();
    assert!(parts.len() > 10, "the parts are there");
    for part in parts {
        assert!(!part.text.contains(".route(") && !part.text.contains("fallback("), "{}", part.name);
    }
}

/// A node that asks for tokens.
async fn guarded(pki: &Pki, more: &[(&str, &str)]) -> (Cluster, Vec<(Role, String)>) {
    let (mut entries, mut tokens) = (String::new(), Vec::new());
    for role in Role::ALL {
        let gateways = if role == Role::Gateway { format!("gateways = [\"{GATEWAY}\"]") } else { String::new() };
        let (token, entry) = token(role.name(), role.name(), &gateways);
        entries.push_str(&entry);
        tokens.push((role, format!("Bearer {token}")));
    }
    let file = pki.write("tokens.toml", &entries);
    let settings = [("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", file.to_str().expect("a path"))];
    (Cluster::sqlite(&[&settings, UNHURRIED, more].concat()).await, tokens)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_may_look_and_change_nothing_and_strangers_may_not_even_look() {
    let pki = Pki::new();
    let (cluster, tokens) = guarded(&pki, &[]).await;
    let node = cluster.node();
    let mut denied = 0;
    for (method, path, operation) in operations(node).await {
        let is_open = operation["security"].as_array().is_some_and(|needs| needs == &[json!({})]);
        assert_eq!(is_open, path == "/api" || path == DOCUMENT, "{path}");
        let asked = filled(&path);
        for stranger in [None, Some("Bearer imp_wrong")] {
            let headers: Vec<_> = stranger.map(|token| ("Authorization", token)).into_iter().collect();
            let answer = node.ask(&method, &asked, &headers, "").await;
            if is_open {
                assert_eq!(answer.status, 200, "{asked}: {answer:?}");
                continue;
            }
            answer.is_problem(401, "UNAUTHENTICATED", None);
            assert!(answer.has("www-authenticate: bearer"), "{answer:?}");
        }
        let may_viewers = method == "GET" || path == "/api/v1/allocate" || path == "/api/v1/policy/preview";
        for (role, token) in &tokens {
            let answer = node.ask(&method, &asked, &[("Authorization", token)], "").await;
            let may = is_open || *role == Role::Operator || (*role == Role::Viewer && may_viewers);
            if may {
                assert!(![401, 403].contains(&answer.status), "{method} {path} as {role:?}: {answer:?}");
            } else {
                answer.is_problem(403, "PERMISSION_DENIED", None);
                denied += usize::from(*role == Role::Viewer);
            }
        }
    }
    assert!(denied >= 14, "what changes something: {denied}");
    // Also with a dry run: that is for operators, too.
    let viewer = &tokens.iter().find(|(role, _)| *role == Role::Viewer).expect("a viewer").1;
    let dry = node.ask("DELETE", "/api/v1/users/1/routes?reason=x&dry_run=true", &[("Authorization", viewer)], "").await;
    dry.is_problem(403, "PERMISSION_DENIED", None);
    let denials = "SELECT COUNT(*) FROM audit WHERE outcome = 'denied' AND target = 'DELETE /api/v1/lives/1'";
    eventually("a denied attempt is taken down", SOON, async || cluster.db.number(denials).await >= 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_request_is_said_by_name() {
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let node = cluster.node();
    for (path, field) in [
        ("/gateways?limit=0", "limit"),
        ("/gateways?limit=1001", "limit"),
        ("/gateways?limit=many", "limit"),
        ("/gateways?limit=1&limit=2", "limit"),
        ("/gateways?colour=red", "colour"),
        ("/gateways?state=tired", "state"),
        ("/gateways?cursor=x", "cursor"),
        ("/users?gateway=a%20b", "gateway"),
        ("/users?status=offline", "status"),
        ("/users/0", "user_id"),
        ("/users/alice", "user_id"),
        ("/users/99999999999999999999", "user_id"),
        ("/users/1/online-time?from_day=yesterday", "from_day"),
        ("/users/0/inbox", "user_id"),
        ("/counts?by=colour", "by"),
        ("/audit?action=%C3%A4", "action"),
        ("/audit?from=x", "from"),
        ("/gateways/%20", "gateway_addr"),
    ] {
        let problem = node.rest("GET", path, None).await.is_problem(400, "INVALID_ARGUMENT", Some(field));
        assert!(problem["detail"].as_str().is_some_and(|detail| detail.starts_with(&format!("{field}: "))), "{path}: {problem}");
    }
    for (method, path, body, field) in [
        ("PUT", "/hold", json!({"for_ms": 1000}), "reason"),
        ("PUT", "/hold", json!({"for_ms": 1000, "reason": " "}), "reason"),
        ("PUT", "/hold", json!({"for_ms": 0, "reason": "x"}), "for_ms"),
        ("PUT", "/hold", json!({"for_ms": "long", "reason": "x"}), "for_ms"),
        ("PUT", "/hold", json!({"for_ms": 1000, "reason": "x", "colour": "red"}), "colour"),
        ("PUT", "/hold", json!({"for_ms": 1000, "reason": "x".repeat(201)}), "reason"),
        ("POST", "/hold/confirm", json!({}), "reason"),
        ("POST", "/gateways/gw-1:7000/drain", json!({}), "reason"),
        ("POST", "/gateways/gw-1:7000/drain", json!({"reason": "x", "share": 2.0}), "share"),
        ("POST", "/gateways/rebalance", json!({}), "reason"),
        ("PUT", "/users/1/ban", json!({"ban_for_s": 1}), "reason"),
        ("PUT", "/users/1/ban", json!({"ban_for_s": 0, "reason": "x"}), "ban_for_s"),
        ("PUT", "/users/1/status", json!({}), "status"),
        ("PUT", "/users/1/status", json!({"status": "offline"}), "status"),
        ("POST", "/users/1/deliver", json!({"message": "x", "message_type": "a b"}), "message_type"),
        ("POST", "/allocate", json!({"user_id": "x"}), "user_id"),
        ("POST", "/allocate", json!({"user_id": "1", "latency_ms": {"eu": -1}}), "latency_ms.eu"),
    ] {
        node.rest(method, path, Some(&body)).await.is_problem(400, "INVALID_ARGUMENT", Some(field));
    }
    for path in ["/users/1/routes", "/gateways/gw-1:7000", "/lives/1"] {
        node.rest("DELETE", path, None).await.is_problem(400, "INVALID_ARGUMENT", Some("reason"));
    }
    for body in ["{", "[]", "{\"for_ms\":1000,\"reason\":\"x\"} {}", "\"\u{1}\""] {
        node.ask("PUT", "/api/v1/hold", &[JSON], body).await.is_problem(400, "INVALID_ARGUMENT", None);
    }
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""] {
        let answer = node.ask("PUT", "/api/v1/hold", &[("Content-Type", kind)], "{\"for_ms\":1000,\"reason\":\"x\"}").await;
        answer.is_problem(415, "UNSUPPORTED_MEDIA_TYPE", None);
    }
    for bytes in [MAX_BODY_BYTES + 1, MAX_PORT_BODY_BYTES + 1] {
        node.ask("PUT", "/api/v1/hold", &[JSON], &" ".repeat(bytes)).await.is_problem(413, "TOO_LARGE", None);
    }
    for path in ["/api/v1/nothing-there", "/api/v2/users", "/api/"] {
        node.ask("GET", path, &[], "").await.is_problem(404, "NOT_FOUND", None);
    }
    assert_eq!(node.got("/hold").await["hold"], Value::Null, "nothing of it was done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_hold_together_and_a_cursor_is_good_for_its_own_list_only() {
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let node = cluster.node();
    for number in 0..5 {
        let (addr, region) = (format!("gw-{number}:7000"), if number < 3 { "eu" } else { "us" }.to_owned());
        let request = pb::RegisterGatewayReq { gateway_addr: addr.clone(), region, ..Default::default() };
        let epoch = node.gateways().register_gateway(request).await.expect("an answer").into_inner().gateway_epoch;
        node.bind_all([i64::from(number) + 1], &addr, epoch).await;
    }
    assert_eq!(
        texts(&node.all("/gateways", 2).await, "gateway_addr"),
        ["gw-0:7000", "gw-1:7000", "gw-2:7000", "gw-3:7000", "gw-4:7000"]
    );
    assert_eq!(texts(&node.all("/gateways?region=us", 1).await, "gateway_addr"), ["gw-3:7000", "gw-4:7000"]);
    assert_eq!(texts(&node.all("/gateways?prefix=gw-1", 1).await, "gateway_addr"), ["gw-1:7000"]);
    assert_eq!(texts(&node.all("/gateways?state=alive", 3).await, "gateway_addr").len(), 5);
    assert!(node.all("/gateways?state=over", 3).await.is_empty());
    assert_eq!(texts(&node.all("/users", 2).await, "user_id"), ["1", "2", "3", "4", "5"]);
    assert_eq!(texts(&node.all("/users?region=eu", 2).await, "user_id"), ["1", "2", "3"]);
    for user in 0..3 {
        node.did(
            "POST",
            "/users/99/deliver",
            Some(json!({"message": "abc", "message_id": format!("m{user}"), "store_offline": true})),
        )
        .await;
    }
    let stored = node.all("/users/99/inbox", 2).await;
    assert_eq!(texts(&stored, "message_id"), ["m0", "m1", "m2"]);
    assert!(stored.iter().all(|message| message["bytes"] == 3 && message.get("message").is_none()), "{stored:?}");

    let cursor = |page: Value| page["next_cursor"].as_str().expect("a cursor").to_owned();
    let next = cursor(node.got("/gateways?region=eu&limit=1").await);
    node.rest("GET", &format!("/gateways?limit=1&cursor={next}"), None).await.is_problem(400, "INVALID_ARGUMENT", Some("cursor"));
    node.rest("GET", &format!("/users?region=eu&cursor={next}"), None).await.is_problem(400, "INVALID_ARGUMENT", Some("cursor"));
    node.got(&format!("/gateways?region=eu&limit=3&cursor={next}")).await;
    let next = cursor(node.got("/users/99/inbox?limit=1").await);
    node.rest("GET", &format!("/users/98/inbox?cursor={next}"), None).await.is_problem(400, "INVALID_ARGUMENT", Some("cursor"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_that_was_led_here_under_another_name_is_turned_away() {
    let cluster = Cluster::sqlite(&[("ADMIN__ALLOWED_HOSTS", "[\"presence.example\"]")]).await;
    let node = cluster.node();
    for host in ["localhost:6001", "127.0.0.1", "[::1]:6001", "presence.example", "PRESENCE.example:6001"] {
        for path in ["/api/v1/gateways", "/metrics"] {
            assert_eq!(node.ask("GET", path, &[("Host", host)], "").await.status, 200, "{path} {host}");
        }
    }
    for host in ["evil.example", "evil.example:6001", "presence.example.evil.example", ""] {
        let foreign = [("Host", host)];
        node.ask("GET", "/api/v1/gateways", &foreign, "").await.is_problem(403, "PERMISSION_DENIED", None);
        let grpc = [("Host", host), ("Content-Type", "application/grpc")];
        assert_eq!(node.ask("POST", "/mpim.AdminService/ListGateways", &grpc, "").await.status, 403, "{host}");
        for path in ["/metrics", "/", "/web/app.js"] {
            assert_eq!(node.ask("GET", path, &foreign, "").await.status, 403, "{path} {host}");
        }
        for probe in ["/livez", "/readyz", "/healthz"] {
            assert_eq!(node.ask("GET", probe, &foreign, "").await.status, 200, "{probe}: load balancers call nodes by any name");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_answers_for_all_and_what_is_ordered_is_done_and_taken_down() {
    let cluster = Cluster::with_redis(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = TestGateway::start(&cluster.nodes, GATEWAY, Devices::Acknowledge).await;
    gateway.bind(ALICE, PHONE, "c1").await;
    gateway.bind(ALICE, LAPTOP, "c2").await;
    gateway.bind(BOB, PHONE, "c3").await;
    let epoch = one.register(OTHER_GATEWAY).await;
    two.bind(on(OTHER_GATEWAY, epoch, a_bind(CAROL, PHONE, "c4"))).await;

    for node in [one, two] {
        assert_eq!(texts(&node.all("/users", 10).await, "user_id"), ["1", "2", "3"]);
        let alice = node.got("/users/1").await;
        assert_eq!(
            (&alice["verdict"], &alice["shown"], alice["routes"].as_array().map(Vec::len)),
            (&json!("online"), &json!("online"), Some(2))
        );
        assert_eq!(alice["routes"][0]["life"]["state"], "alive", "{alice}");
    }
    let told = two.did("POST", "/users/2/deliver", Some(json!({"message": "hi", "ack_timeout_ms": 5000}))).await;
    assert_eq!(
        (&told["delivered"], &told["code"], &told["acked_devices"]),
        (&json!(true), &json!("OK"), &json!([PHONE])),
        "{told}"
    );
    let steps: Vec<_> = told["steps"].as_array().expect("a list").iter().map(|step| step["what"].as_str()).collect();
    assert!(["looked_up", "handed", "acked"].iter().all(|what| steps.contains(&Some(what))), "{told}");
    assert_eq!(gateway.texts(), ["hi"]);
    assert_eq!(two.did("PUT", "/users/2/status", Some(json!({"status": "busy", "text": "lunch"}))).await["shown"], "busy");
    assert_eq!(two.all("/users?status=busy", 10).await.len(), 1);

    let dry = one.did("DELETE", "/users/1/devices/phone?dry_run=true", None).await;
    assert_eq!((&dry["dry_run"], &dry["kicked"][0]["device_id"]), (&json!(true), &json!(PHONE)), "{dry}");
    one.did("DELETE", "/users/1/devices/phone?reason=lost", None).await;
    one.rest("DELETE", "/users/1/devices/phone?reason=lost", None).await.is_problem(404, "NOT_FOUND", None);
    let banned = one.did("PUT", "/users/1/ban", Some(json!({"ban_for_s": 3600, "reason": "spam"}))).await;
    assert_eq!((banned["kicked"].as_array().map(Vec::len), banned["banned_until_ms"].is_i64()), (Some(1), true), "{banned}");
    let refused = two.try_bind(on(OTHER_GATEWAY, epoch, a_bind(ALICE, PHONE, "c5"))).await.expect("an answer");
    assert_eq!(code(&refused.result), Code::Refused);
    assert_eq!(two.got("/users/1").await["verdict"], "offline");
    assert_eq!(two.did("DELETE", "/users/1/ban?reason=sorry", None).await["banned_until_ms"], Value::Null);
    assert_eq!(two.did("DELETE", "/users/2/routes?reason=spam", None).await["kicked"][0]["gateway_addr"], GATEWAY);
    assert_eq!(one.got("/users/2/history").await["items"][0]["cause"], "operator");
    assert!(one.got("/users/2/online-time").await["sessions"].as_u64() >= Some(1));

    let rows = "SELECT COUNT(*) FROM audit WHERE outcome = 'ok' AND action IN ('KickDevice', 'ForceOffline')";
    eventually("it is taken down", SOON, async || cluster.db.number(rows).await == 4).await;
    for node in [one, two] {
        let lines = node.all("/audit?action=ForceOffline", 2).await;
        assert_eq!(texts(&lines, "target"), ["user 2", "user 1", "user 1"]);
        assert_eq!(texts(&lines, "reason"), ["spam", "sorry", "spam"]);
        let from = lines[0]["at_ms"].as_i64().expect("a time");
        assert_eq!(node.all(&format!("/audit?action=ForceOffline&from={from}"), 10).await.len(), 1);
        assert!(node.all("/audit?who=nobody", 10).await.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_are_drained_held_and_declared_dead() {
    let cluster = Cluster::mariadb(2, UNHURRIED).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (first, second) = (one.register(GATEWAY).await, one.register(OTHER_GATEWAY).await);
    one.bind_all([ALICE, BOB], GATEWAY, first).await;

    let plan = two.did("POST", "/gateways/gw-1:7000/drain?dry_run=true", Some(json!({"reason": "new version"}))).await;
    assert_eq!((&plan["drain"]["state"], &plan["plan"][0]["to"]), (&json!("planned"), &json!(OTHER_GATEWAY)), "{plan}");
    assert!(two.all("/drains", 10).await.is_empty(), "that was a plan");
    let begun = two.did("POST", "/gateways/gw-1:7000/drain", Some(json!({"reason": "new version", "wait_s": 3600}))).await;
    assert_eq!((&begun["drain"]["users"], &begun["dry_run"]), (&json!(2), &json!(false)), "{begun}");
    let shown = one.got("/gateways/gw-1:7000").await;
    assert_eq!(shown["gateway"]["drain"]["reason"], "new version", "{shown}");
    assert_eq!(texts(&one.all("/drains?active_only=true", 1).await, "gateway_addr"), [GATEWAY]);
    one.did("DELETE", "/gateways/gw-1:7000/drain", None).await;
    one.rest("DELETE", "/gateways/gw-1:7000/drain", None).await.is_problem(404, "NOT_FOUND", None);
    one.rest("POST", "/gateways/gw-9:7000/drain", Some(&json!({"reason": "x"}))).await.is_problem(404, "NOT_FOUND", None);
    let level = one.did("POST", "/gateways/rebalance?dry_run=true", Some(json!({"reason": "two more"}))).await;
    assert_eq!((&level["dry_run"], level["drains"].as_array().map(Vec::len)), (&json!(true), Some(0)), "{level}");
    one.rest("POST", "/users/9/migrate", Some(&json!({}))).await.is_problem(404, "NOT_FOUND", None);
    let nowhere = one.rest("POST", "/users/1/migrate?dry_run=true", Some(&json!({"to": "gw-9:7000"}))).await;
    nowhere.is_problem(400, "INVALID_ARGUMENT", Some("to"));
    let plan = one.did("POST", "/users/1/migrate?dry_run=true", Some(json!({}))).await;
    assert_eq!((&plan["routes"], &plan["plan"][0]["to"]), (&json!(1), &json!(OTHER_GATEWAY)), "{plan}");
    let half = one.did("POST", "/gateways/gw-1:7000/drain", Some(json!({"reason": "x", "share": 0.5, "wait_s": 3600}))).await;
    assert_eq!(half["drain"]["share"], 0.5, "{half}");
    let other = one.rest("POST", "/gateways/gw-1:7000/drain", Some(&json!({"reason": "x", "share": 0.25}))).await;
    other.is_problem(409, "CODE_REFUSED", None);
    one.did("DELETE", "/gateways/gw-1:7000/drain", None).await;

    let held = one.did("PUT", "/hold", Some(json!({"for_ms": 600_000, "reason": "the network"}))).await;
    assert_eq!(held["hold"]["reason"], "operator: the network", "{held}");
    assert!(two.got("/gateways").await["hold"]["left_ms"].as_i64().is_some_and(|left| left > 500_000));
    let dry = two.did("POST", "/hold/confirm?dry_run=true", Some(json!({"reason": "dead"}))).await;
    assert_eq!((&dry["lives"], &dry["dry_run"]), (&json!(0), &json!(true)), "both live");
    assert_eq!(one.did("DELETE", "/hold?reason=over", None).await["hold"], Value::Null);
    two.rest("POST", "/hold/confirm", Some(&json!({"reason": "dead"}))).await.is_problem(404, "NOT_FOUND", None);

    let dry = two.did("DELETE", "/gateways/gw-1:7000?reason=gone&dry_run=true", None).await;
    assert_eq!((&dry["lives"], &dry["routes"]), (&json!(1), &json!(2)), "{dry}");
    assert_eq!(one.online([ALICE, BOB]).await, 2, "it was only tried");
    two.did("DELETE", "/gateways/gw-1:7000?reason=gone", None).await;
    eventually("its users are offline", SOON, async || one.online([ALICE, BOB]).await == 0).await;
    two.rest("DELETE", "/gateways/gw-1:7000?reason=gone", None).await.is_problem(404, "NOT_FOUND", None);
    one.did("DELETE", &format!("/lives/{second}?reason=gone"), None).await;
    one.rest("DELETE", &format!("/lives/{second}?reason=gone"), None).await.is_problem(404, "NOT_FOUND", None);
    let past = two.got("/gateways/gw-1:7000").await;
    assert_eq!((&past["lives"][0]["end_reason"], &past["gateway"]["state"]), (&json!("operator"), &json!("over")), "{past}");
    assert_eq!(past["lives"][0]["epoch"], first.to_string());
    let gone = one.rest("POST", "/allocate", Some(&json!({"user_id": "1"}))).await;
    gone.is_problem(404, "NOT_FOUND", None);
    let rows = "SELECT COUNT(*) FROM audit WHERE action = 'PurgeGateways' AND outcome = 'ok' AND reason = 'gone'";
    eventually("why is taken down", SOON, async || cluster.db.number(rows).await == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_tells_who_is_silent_and_how_many_go_offline_if_it_ends() {
    let cluster = Cluster::mariadb(2, &[("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "12000")]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let _beats = Gateway::start(OTHER_GATEWAY, &[one], Duration::from_millis(500)).await;
    let silent = one.register(GATEWAY).await;
    one.did("PUT", "/hold", Some(json!({"for_ms": 3_600_000, "reason": "a look"}))).await;
    one.bind_all([ALICE, BOB], GATEWAY, silent).await;
    let over = async || two.got("/hold").await["silent"][0]["lease_left_ms"].as_i64().is_some_and(|left| left < 0);
    eventually("its lease is over", Duration::from_secs(30), over).await;
    for node in [one, two] {
        let hold = node.got("/hold").await;
        assert_eq!((&hold["silent_gateways"], &hold["will_die"]), (&json!(1), &json!(2)), "{hold}");
        let named = &hold["silent"][0];
        assert_eq!((&named["gateway_addr"], &named["state"]), (&json!(GATEWAY), &json!("held")), "{hold}");
        assert_eq!(texts(&node.all("/gateways?state=held", 1).await, "gateway_addr"), [GATEWAY]);
        assert_eq!(texts(&node.all("/gateways?state=alive", 1).await, "gateway_addr"), [OTHER_GATEWAY]);
        assert!(node.all("/gateways?state=late", 1).await.is_empty());
    }
    let dry = two.did("POST", "/hold/confirm?dry_run=true", Some(json!({"reason": "dead"}))).await;
    let done = two.did("POST", "/hold/confirm", Some(json!({"reason": "dead"}))).await;
    for purged in [dry, done] {
        assert_eq!((&purged["lives"], &purged["routes"]), (&json!(1), &json!(2)), "{purged}");
    }
    eventually("they are offline", SOON, async || one.online([ALICE, BOB]).await == 0).await;
    assert_eq!(one.got("/hold").await["silent"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trial_counts_nothing() {
    let cluster = Cluster::sqlite(&[UNHURRIED, &[("ALLOCATION__LOGIN_RATE", "1")]].concat()).await;
    let node = cluster.node();
    node.register(GATEWAY).await;
    for _ in 0..5 {
        let tried = node.did("POST", "/allocate", Some(json!({"user_id": "1", "count": 1}))).await;
        assert_eq!((&tried["candidates"][0]["gateway_addr"], &tried["retry_after_ms"]), (&json!(GATEWAY), &json!(0)), "{tried}");
    }
    assert_eq!(node.metric("im_presence_allocations_total").await, 0.0);
    for _ in 0..3 {
        let ask = pb::AllocateGatewayReq { user_id: ALICE, ..Default::default() };
        node.presence().allocate_gateway(ask).await.expect("an answer");
    }
    let tried = node.did("POST", "/allocate", Some(json!({"user_id": "1"}))).await;
    assert!(tried["retry_after_ms"].as_u64() > Some(1_000), "who was sent there in earnest counts: {tried}");
    let preview = node.did("POST", "/policy/preview", Some(json!({"max_devices": 1}))).await;
    assert_eq!(preview["users"], 0, "{preview}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_name_that_a_gateway_or_a_device_may_have_can_be_asked_for() {
    let cluster = Cluster::sqlite(UNHURRIED).await;
    let node = cluster.node();
    let epoch = node.register("rebalance").await;
    for (conn, device) in ["", ".", "..", "a/b?c#d%e"].into_iter().enumerate() {
        node.bind(on("rebalance", epoch, a_bind(ALICE, device, &format!("c{conn}")))).await;
    }
    for (path, device) in [
        ("devices?device_id=&", ""),
        ("devices?device_id=.&", "."),
        ("devices?device_id=..&", ".."),
        ("devices/a%2Fb%3Fc%23d%25e?", "a/b?c#d%e"),
    ] {
        let kicked = node.did("DELETE", &format!("/users/1/{path}reason=lost"), None).await;
        assert_eq!(texts(kicked["kicked"].as_array().expect("a list"), "device_id"), [device]);
    }
    node.rest("DELETE", "/users/1/devices?reason=lost", None).await.is_problem(400, "INVALID_ARGUMENT", Some("device_id"));
    assert_eq!(node.got("/gateways/%72ebalance").await["gateway"]["gateway_addr"], "rebalance");
    node.did("POST", "/gateways/%72ebalance/drain", Some(json!({"reason": "x", "wait_s": 3600, "force": true}))).await;
    node.did("DELETE", "/gateways/%72ebalance/drain", None).await;
    node.did("DELETE", "/gateways/%72ebalance?reason=gone", None).await;
}

/// Who looks, and who acts; each with a token.
async fn crowd(pki: &Pki, proxy: &Proxy) -> (Cluster, [String; 4]) {
    let roles = [("one", "viewer"), ("two", "viewer"), ("three", "viewer"), ("operator", "operator"), ("node", "node")];
    let credentials = roles.map(|(name, role)| token(name, role, ""));
    let entries: String = credentials.iter().map(|(_, entry)| entry.as_str()).collect();
    let (file, own) = (pki.write("tokens.toml", &entries), pki.write("node", &credentials[4].0));
    let settings = [
        ("AUTH__MODE", "token"),
        ("AUTH__TOKENS_FILE", file.to_str().expect("a path")),
        ("PEER__TOKEN_FILE", own.to_str().expect("a path")),
        ("STORE__TIMEOUT", "60000"),
    ];
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(proxy, &settings).await;
    let [one, two, three, operator, _] = credentials.map(|(token, _)| format!("Bearer {token}"));
    (cluster, [one, two, three, operator])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_look_never_keep_those_from_acting_who_have_to_and_nobody_takes_all_places() {
    const SHARE: usize = 16;
    const AUDIT: &str = "outcome, reason FROM audit";
    let (pki, proxy) = (Pki::new(), Proxy::start(MariaDb::shared().port).await);
    let (cluster, [one, two, three, operator]) = crowd(&pki, &proxy).await;
    let node = cluster.node();
    let ask = async |who: &str, method: &str, path: &str, body: &str| {
        node.ask(method, &format!("/api/v1{path}"), &[JSON, ("Authorization", who)], body).await
    };
    proxy.hold_answers(Kind::Reader, AUDIT);
    let mut looks = FuturesUnordered::new();
    for (who, beyond) in [(&one, 4), (&two, 1)] {
        (0..SHARE + beyond).for_each(|_| looks.push(ask(who, "GET", "/audit", "")));
        for _ in 0..beyond {
            // All the others have their places, or this one would have one.
            let answer = looks.next().await.expect("an answer");
            let problem = answer.is_problem(429, "RESOURCE_EXHAUSTED", None);
            assert_eq!(problem["detail"], "16 requests of this caller are served already");
            assert!(answer.has("retry-after: 1") && problem["retry_after_ms"] == 1_000, "{answer:?}");
        }
    }
    let trial = json!({"user_id": "1"}).to_string();
    for (who, method, path, body) in
        [(&three, "GET", "/gateways", ""), (&three, "POST", "/allocate", &*trial), (&operator, "GET", "/gateways", "")]
    {
        let answer = ask(who, method, path, body).await;
        assert_eq!(answer.is_problem(503, "UNAVAILABLE", None)["detail"], "32 requests are served already");
        assert!(answer.has("retry-after: 1"), "{answer:?}");
    }
    let ban = json!({"ban_for_s": 60, "reason": "spam"}).to_string();
    let banned = ask(&operator, "PUT", "/users/1/ban", &ban).await;
    assert_eq!(banned.status, 200, "who has to act does not wait: {banned:?}");
    assert_eq!((node.http("/livez").await.0, node.http_as("/metrics", Some(&three)).await.0), (200, 200));
    proxy.release();
    while looks.next().await.is_some() {}
    assert_eq!(ask(&three, "GET", "/audit", "").await.status, 200, "places are free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_much_for_the_node_is_not_the_callers_fault_and_what_is_too_much_for_a_user_is() {
    const LOOK: &str = "SELECT user_id, COUNT(*) FROM routes";
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(&proxy, &[("STORE__TIMEOUT", "60000"), ("STATUS__RATE", "1"), ("STATUS__BURST", "1")]).await;
    let node = cluster.node();
    proxy.hold_answers(Kind::Reader, LOOK);
    let (policy, busy) = (json!({"max_devices": 1}), json!({"status": "busy"}));
    let first = node.rest("POST", "/policy/preview", Some(&policy));
    let others = async {
        proxy.struck().await;
        let second = node.rest("POST", "/policy/preview", Some(&policy)).await;
        second.is_problem(503, "UNAVAILABLE", None);
        assert!(second.has("retry-after: 1"), "{second:?}");
        node.did("PUT", "/users/1/status", Some(busy.clone())).await;
        let again = join_all((0..8).map(|_| node.rest("PUT", "/users/1/status", Some(&busy)))).await;
        let refused = again.iter().find(|answer| answer.status != 200).expect("one a second");
        refused.is_problem(429, "RESOURCE_EXHAUSTED", None);
        assert!(refused.has("retry-after: 1"), "{refused:?}");
        proxy.release();
    };
    let (first, ()) = tokio::join!(first, others);
    assert_eq!(first.status, 200, "{first:?}");
}
