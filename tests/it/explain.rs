//! ExplainRoute says what queries are answered by, on every node, also when something is away.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::RouteState;
use im_presence::pb::Status as Shown;

use crate::bad_input::check;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::gateway::on;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Proxy;
use crate::harness::watcher::Watcher;
use crate::harness::watcher::set_status;

const DAVE: i64 = 4;
const ERIN: i64 = 5;
const NOBODY: i64 = 99;
const BEAT: Duration = Duration::from_secs(1);
/// What one node does shows on the other.
const SEEN_WITHIN: Duration = Duration::from_millis(1_500);
/// Nodes look who lives once a second, and believe that for 3 s.
const STALE_WITHIN: Duration = Duration::from_secs(6);
/// Other nodes have a second to tell what they hold, SQL two.
const PATIENCE: Duration = Duration::from_millis(2_500);
const NOW_MS: &str = "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)";
/// How a node begins to look who lives.
const READ_CLUSTER: &str = "hold_reason, server FROM cluster";

async fn explain(node: &Node, user: i64) -> pb::ExplainRouteResp {
    let request = pb::ExplainRouteReq { user_id: user, this_node_only: false };
    let answer = node.operator().explain_route(request).await.expect("an explanation").into_inner();
    assert_eq!(code(&answer.result), Code::Ok);
    answer
}

fn verdicts(answer: &pb::ExplainRouteResp) -> Vec<&str> {
    answer.routes.iter().map(|view| view.verdict.as_str()).collect()
}

/// What the answering node says of its own tier.
fn tier<'a>(answer: &'a pb::ExplainRouteResp, name: &str) -> &'a pb::TierView {
    answer.tiers.iter().find(|tier| tier.tier == name && tier.node_id == answer.node_id).expect("each tier")
}

/// Whether a query of this node is answered with what is explained.
async fn is_what_is_answered(node: &Node, user: i64, explained: &pb::ExplainRouteResp) -> bool {
    let asked = node.query(user).await;
    let usable = explained.routes.iter().filter_map(|view| view.route.as_ref());
    let usable: Vec<_> = usable.filter(|route| route.state() != RouteState::Unspecified).collect();
    let is_same = |(one, other): (&&pb::Route, &pb::Route)| (&one.route_key, one.state) == (&other.route_key, other.state);
    (asked.is_online, asked.status) == (explained.is_online, explained.shown)
        && asked.routes.len() == usable.len()
        && usable.iter().zip(&asked.routes).all(is_same)
}

/// Every node explains the user so, which is also what it answers queries with.
async fn every_node_explains(nodes: &[Node], user: i64, expected: &[&str], sentence: &str) {
    for node in nodes {
        let mut last = None;
        eventually(sentence, SEEN_WITHIN, async || {
            let it = explain(node, user).await;
            let fits =
                it.because.starts_with(sentence) && verdicts(&it) == expected && is_what_is_answered(node, user, &it).await;
            if last.as_ref() != Some(&it.because) {
                println!("user {user}: {} {:?}", it.because, verdicts(&it));
                last = Some(it.because);
            }
            fits
        })
        .await;
    }
}

async fn unbind(node: &Node, user: i64, gateway: &str) {
    let (gateway_addr, device_id) = (gateway.to_owned(), PHONE.to_owned());
    node.unbind(pb::UnbindRouteReq { user_id: user, gateway_addr, device_id, ..Default::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_there_hides_left_was_erased_or_banned_or_was_never_seen_is_explained_on_both_nodes() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[here], BEAT).await;
    here.bind_all([ALICE, BOB, CAROL, DAVE, ERIN], GATEWAY, gateway.epoch).await;
    let nodes = &cluster.nodes;

    every_node_explains(nodes, ALICE, &["live"], "online: phone is on gw-1:7000, which lives").await;
    let away = pb::SetStatusReq { text: Some("lunch".to_owned()), expire_after_s: 3_600, ..set_status(ALICE, Shown::Away) };
    here.set(away).await;
    every_node_explains(nodes, ALICE, &["live"], "online, and shown as wanted: phone is on gw-1:7000").await;
    here.set(set_status(BOB, Shown::Invisible)).await;
    every_node_explains(nodes, BOB, &["live"], "shown as OFFLINE because INVISIBLE is wanted, though phone is on gw-1").await;
    unbind(here, CAROL, GATEWAY).await;
    every_node_explains(nodes, CAROL, &[], "offline: the last device logged out ").await;
    every_node_explains(nodes, NOBODY, &[], "offline: never seen").await;
    let forget = pb::ForgetUserReq { user_id: DAVE, dry_run: false };
    here.operator().forget_user(forget).await.expect("an answer");
    every_node_explains(nodes, DAVE, &[], "offline: erased by an operator, and not back since").await;
    unbind(here, ERIN, GATEWAY).await;
    cluster.db.run(&format!("UPDATE users SET banned_until_ms = {NOW_MS} + 3600000 WHERE user_id = {ERIN}")).await;
    every_node_explains(nodes, ERIN, &[], "offline: banned for 59 min more").await;

    let it = explain(there, ALICE).await;
    assert_eq!((it.wanted(), it.shown(), it.status_text.as_str()), (Shown::Away, Shown::Away, "lunch"), "{it:?}");
    assert!(it.status_until_ms > it.last_seen_ms && it.banned_until_ms == 0, "{it:?}");
    assert_eq!(it.recent.iter().map(|change| change.cause.as_str()).collect::<Vec<_>>(), ["set", "login"]);
    let life = it.routes[0].life.as_ref().expect("a life");
    assert_eq!((life.epoch, life.managed, life.alive, life.held), (gateway.epoch, true, true, false));
    let hidden = explain(there, BOB).await;
    assert!(hidden.recent.iter().any(|change| change.hidden) || hidden.recent[0].shown() == Shown::Offline, "{hidden:?}");
    assert!(explain(there, ERIN).await.banned_until_ms > it.last_seen_ms);
    assert!(!tier(&explain(there, NOBODY).await, "durable").present);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_tier_says_what_it_has_and_nothing_is_changed_by_looking() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[here], BEAT).await;
    let bound = here.bind(on(GATEWAY, gateway.epoch, a_bind(ALICE, PHONE, "c"))).await;
    let stored = pb::DeliverReq { user_id: BOB, message: "later".to_owned(), store_offline: true, ..Default::default() };
    here.bind(on(GATEWAY, gateway.epoch, a_bind(BOB, PHONE, "c"))).await;
    unbind(here, BOB, GATEWAY).await;
    assert!(here.presence().deliver(stored).await.expect("an answer").into_inner().stored);
    assert_eq!(explain(here, BOB).await.inbox_messages, 1);

    let of = |it: &pb::ExplainRouteResp, view: &pb::TierView| {
        (view.tier.clone(), view.node_id == it.node_id, view.present, view.trusted, view.routes)
    };
    let said = |tier: &str, own, has| (tier.to_owned(), own, has, has, u32::from(has));
    let expected =
        [said("memory", true, false), said("shared", true, true), said("durable", true, true), said("memory", false, true)];
    eventually("each tier has what it should", SEEN_WITHIN, async || {
        here.query(ALICE).await; // its memory may begin anew when it hears of the other node
        let it = explain(there, ALICE).await;
        it.tiers.iter().map(|view| of(&it, view)).eq(expected.iter().cloned())
    })
    .await;
    let it = explain(there, ALICE).await;
    assert_eq!(tier(&it, "memory").why, "it has no record", "what was found before was not kept");
    assert!(it.tiers.iter().filter(|tier| tier.present).all(|tier| tier.version == bound.version), "{it:#?}");
    assert!(it.silent_nodes.is_empty(), "{it:?}");
    let _watcher = Watcher::of(there, [ALICE]).await;
    eventually("it remembers, and is watched", SEEN_WITHIN, async || {
        there.query(ALICE).await;
        let it = explain(there, ALICE).await;
        (tier(&it, "memory").trusted, it.watchers) == (true, 1)
    })
    .await;
    assert_eq!(explain(here, ALICE).await.watchers, 0, "watches of the answering node");
    let alone = pb::ExplainRouteReq { user_id: ALICE, this_node_only: true };
    assert_eq!(there.operator().explain_route(alone).await.expect("an explanation").get_ref().tiers.len(), 3);

    // A server that comes back with old data has records like this.
    let old = "local is = redis.call('GET', KEYS[1]) \
        redis.call('SET', KEYS[1], string.rep('0', 39) .. '1' .. string.sub(is, 41)) return 'old'";
    let redis = cluster.cache().client().await;
    redis.run::<String>(&["EVAL", old, "1", "user:record:1"]).await;
    for node in &cluster.nodes {
        let it = explain(node, ALICE).await;
        let shared = tier(&it, "shared");
        assert_eq!((shared.present, shared.trusted, shared.generation, shared.version), (true, false, 0, 1), "{shared:?}");
        let sentence = "online: phone is on gw-1:7000, which lives; Redis has an older record, which is not used: it is of \
            generation 0, and the caches are in ";
        assert!(it.because.starts_with(sentence), "{}", it.because);
        assert!(is_what_is_answered(node, ALICE, &it).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_late_held_dead_or_never_registered_is_told_from_one_that_lives() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    let nodes = &cluster.nodes;
    let late = here.register(GATEWAY).await;
    here.bind_all([ALICE], GATEWAY, late).await;
    // So much is left after two missed beats, as often as somebody looks.
    let missed = format!("UPDATE lives SET lease_until = {NOW_MS} + 5000, last_beat = {NOW_MS} - 10000 WHERE epoch = {late}");
    for node in nodes {
        eventually("its users are suspect", SEEN_WITHIN, async || {
            cluster.db.run(&missed).await;
            let it = explain(node, ALICE).await;
            println!("{} {:?}", it.because, verdicts(&it));
            it.because.starts_with("online, but suspect: phone is on gw-1:7000; its gateway was last heard 1")
                && verdicts(&it) == ["late"]
                && is_what_is_answered(node, ALICE, &it).await
        })
        .await;
    }
    let hold = pb::HoldGatewaysReq { for_ms: 3_600_000, reason: "a switch".to_owned() };
    here.operator().hold_gateways(hold).await.expect("a hold");
    cluster.db.run(&format!("UPDATE lives SET lease_until = {NOW_MS} - 1 WHERE epoch = {late}")).await;
    let held = "online, but suspect: phone is on gw-1:7000; its gateway missed beats, and a hold keeps all from";
    every_node_explains(nodes, ALICE, &["held"], held).await;
    let it = explain(there, ALICE).await;
    assert!(it.hold && it.routes[0].life.as_ref().is_some_and(|life| life.held), "{it:?}");

    let dead = here.register(OTHER_GATEWAY).await;
    here.bind_all([BOB], OTHER_GATEWAY, dead).await;
    here.bind(pb::BindRouteReq { gateway_addr: "gw-3:7000".to_owned(), ..a_bind(CAROL, PHONE, "c") }).await;
    every_node_explains(nodes, CAROL, &["live"], "online: phone is on gw-3:7000, which lives").await;
    cluster.db.another_sweeps().await;
    here.operator()
        .purge_gateways(pb::PurgeGatewaysReq { epochs: vec![dead], held: false, ..Default::default() })
        .await
        .expect("a purge");
    let purged = "offline: phone was on gw-2:7000; an operator declared it dead ";
    every_node_explains(nodes, BOB, &["over"], purged).await;
    cluster.db.run(&format!("UPDATE routes SET expires_at_ms = {NOW_MS} - 1 WHERE user_id = {CAROL}")).await;
    for node in nodes {
        node.query_sql(CAROL).await; // else memory knows the time to live that it was bound with
    }
    let outlived = "offline: phone was on gw-3:7000, which never registered; it was not bound again, and its time to live ended ";
    every_node_explains(nodes, CAROL, &["expired"], outlived).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_know_who_lives_says_so_and_hears_of_a_death_from_the_other() {
    let proxy = Proxy::start(MariaDb::shared().port).await;
    let mut cluster = Cluster::mariadb(1, &[]).await;
    cluster.add_node_through(&proxy, &[]).await;
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[here], BEAT).await;
    here.bind_all([ALICE], GATEWAY, gateway.epoch).await;
    every_node_explains(&cluster.nodes, ALICE, &["live"], "online: phone is on gw-1:7000, which lives").await;
    proxy.hold_requests(READ_CLUSTER);
    proxy.struck().await;
    let stale = "online, but suspect: phone is on gw-1:7000; this node knew ";
    eventually("it does not know", STALE_WITHIN, async || {
        let it = explain(there, ALICE).await;
        it.because.starts_with(stale) && verdicts(&it) == ["unsure"] && it.lives_age_ms > 3_000
    })
    .await;
    let it = explain(there, ALICE).await;
    assert!(tier(&it, "durable").trusted, "SQL answers: {it:?}");
    every_node_explains(&cluster.nodes[..1], ALICE, &["live"], "online: phone is on gw-1:7000, which lives").await;

    cluster.db.another_sweeps().await;
    proxy.cut_off();
    here.operator()
        .purge_gateways(pb::PurgeGatewaysReq { epochs: vec![gateway.epoch], held: false, ..Default::default() })
        .await
        .expect("a purge");
    every_node_explains(&cluster.nodes[..1], ALICE, &["over"], "offline: phone was on gw-1:7000; an operator declared it").await;
    let it = explain(there, ALICE).await;
    let heard = format!("; node {} takes its gateway's life for over", explain(here, ALICE).await.node_id);
    assert!(it.routes[0].why.ends_with(&heard) && verdicts(&it) == ["unsure"], "{it:?}");
    proxy.release();
    every_node_explains(&cluster.nodes, ALICE, &["over"], "offline: phone was on gw-1:7000; an operator declared it").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_sql_users_are_explained_by_what_memory_and_redis_have() {
    let server = MariaDb::shared();
    let proxies = [Proxy::start(server.port).await, Proxy::start(server.port).await];
    let mut cluster = Cluster::with_redis(0, &[]).await;
    for proxy in &proxies {
        cluster.add_node_through(proxy, &[]).await;
    }
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    let gateway = Gateway::start(GATEWAY, &[here], BEAT).await;
    here.bind_all([ALICE, BOB], GATEWAY, gateway.epoch).await;
    for node in &cluster.nodes {
        node.query(ALICE).await;
        every_node_explains(std::slice::from_ref(node), ALICE, &["live"], "online: phone is on gw-1:7000, which lives").await;
    }
    proxies.iter().for_each(Proxy::cut_off);
    for node in &cluster.nodes {
        let asked = Instant::now();
        let it = explain(node, ALICE).await;
        assert!(asked.elapsed() < allowed(PATIENCE), "after {:?}", asked.elapsed());
        let (durable, memory) = (tier(&it, "durable"), tier(&it, "memory"));
        assert_eq!((it.is_online, durable.present, durable.trusted, memory.present), (true, false, false, true), "{it:?}");
        assert_eq!(durable.why, "it did not answer within 2000 ms");
        assert!(it.because.ends_with("; SQL does not answer: so says this node's memory"), "{}", it.because);
        assert!(it.silent_nodes.is_empty() && it.tiers.len() == 4, "the other node tells what it has: {it:?}");
    }
    eventually("who lives is not known any more", STALE_WITHIN, async || {
        let it = explain(there, ALICE).await;
        println!("{}", it.because);
        it.because.starts_with("online, but suspect: phone is on gw-1:7000; this node knew ") && verdicts(&it) == ["unsure"]
    })
    .await;
    let it = explain(there, BOB).await;
    assert!(it.is_online && it.because.ends_with("; SQL does not answer: so says Redis"), "{it:?}");
    let it = explain(there, NOBODY).await;
    assert_eq!((it.because.as_str(), it.is_online), ("unknown: SQL does not answer, and nothing else has a record", false));
    proxies.iter().for_each(Proxy::release);
    every_node_explains(&cluster.nodes, ALICE, &["live"], "online: phone is on gw-1:7000, which lives").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stands_still_is_named_and_costs_a_second() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [here, there] = &cluster.nodes[..] else { panic!("two nodes") };
    here.bind(a_bind(ALICE, PHONE, "c")).await;
    let silent = explain(there, ALICE).await.node_id;
    eventually("they know of each other", SEEN_WITHIN, async || explain(here, ALICE).await.tiers.len() == 4).await;
    there.stop();
    let beat = format!("UPDATE nodes SET seen_at = {NOW_MS} WHERE node_id = '{silent}'");
    eventually("it is named", SEEN_WITHIN, async || {
        cluster.db.run(&beat).await; // else it is soon taken for a node that has gone
        let asked = Instant::now();
        let it = explain(here, ALICE).await;
        assert!(asked.elapsed() < allowed(PATIENCE), "after {:?}", asked.elapsed());
        assert!(it.is_online, "{it:?}");
        it.silent_nodes == [silent.as_str()] && it.tiers.len() == 3
    })
    .await;
    there.cont();
    eventually("it is heard again", SEEN_WITHIN, async || explain(here, ALICE).await.silent_nodes.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_reads_the_explanation_in_a_terminal() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let (exit, text) = node.ctl(&["explain", "1"]);
    assert_eq!(exit, 0, "{text}");
    println!("{text}");
    for part in ["online: phone is on gw-1:7000, which lives", "VERDICT", "TIER", "durable", "login"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let (exit, text) = node.ctl(&["--json", "explain", "1"]);
    let explained: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((exit, explained["routes"][0]["verdict"].as_str()), (0, Some("live")), "{text}");
    assert_eq!(node.ctl(&["explain", "0"]).0, 2, "no user has this number");
    let nobody = pb::ExplainRouteReq { user_id: 0, this_node_only: false };
    check("explain", node.operator().explain_route(nobody).await, "user_id", "above 0");
}
