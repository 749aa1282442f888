//! A system that is well, with all that goes on in one: nobody is called.

use std::collections::BTreeSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::Code;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::acks::with_ack;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::gateway::Gateway;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::node::Node;
use crate::harness::node::Presence;
use crate::harness::percentile;
use crate::harness::prometheus::Prometheus;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;
use crate::harness::watcher::Watcher;
use crate::observed::exported;
use crate::observed::named;
use crate::tidy::none;

/// How long it goes on, in minutes. Below an hour the windows and waits of the rules are shorter by as much.
const MINUTES: &str = "IM_PRESENCE_WELL_MINUTES";
const DEFAULT_MINUTES: u64 = 5;
const HOUR: u64 = 60;
const USERS: u64 = 2_000;
const GATEWAYS: usize = 6;
const SCRAPE_INTERVAL: Duration = Duration::from_secs(5);
const SHORT_SCRAPE_INTERVAL: Duration = Duration::from_secs(1);
/// Between calls of one caller.
const PACE: Duration = Duration::from_millis(10);
/// Between starts and ends of a gateway that comes and goes.
const COMING_AND_GOING: Duration = Duration::from_secs(10);
const BEAT: Duration = Duration::from_secs(5);
/// Sleeps that are remembered: the last two minutes.
const FELT: usize = 12_000;
/// Half of what the alert about queries allows.
const STARVED: Duration = Duration::from_millis(5);
/// What is slow when others take the processors.
const TIMES: [&str; 2] = ["ImPresenceQueriesSlow", "ImPresenceDeliverySlow"];
/// Between restarts of a node.
const RESTARTS: Duration = Duration::from_secs(60);
/// Of devices that answer at once.
const ACK_TIMEOUT_MS: u32 = 5_000;
/// A prime, so that all users have their turn.
const STRIDE: u64 = 7_919;

#[derive(Default)]
struct Done {
    binds: AtomicU64,
    queries: AtomicU64,
    messages: AtomicU64,
    lives: AtomicU64,
    /// Calls that met a node which restarts, mostly.
    failed: AtomicU64,
}

impl Done {
    fn count(&self, what: &AtomicU64, is_good: bool) {
        if is_good { what } else { &self.failed }.fetch_add(1, Ordering::Relaxed);
    }
}

fn user(turn: u64) -> i64 {
    i64::try_from(1 + turn * STRIDE % USERS).expect("not so many")
}

/// Users log in on one gateway after the other.
async fn log_in(gateways: Arc<Vec<TestGateway>>, done: Arc<Done>) {
    for turn in 0.. {
        let gateway = &gateways[usize::try_from(turn).unwrap_or(0) % gateways.len()];
        let bound = gateway.try_bind(user(turn), PHONE, &format!("c-{turn}")).await;
        done.count(&done.binds, bound == Some(Code::Ok));
        sleep(PACE).await;
    }
}

async fn ask(mut node: Presence, done: Arc<Done>) {
    for turn in 0.. {
        let query = im_presence::pb::QueryRouteReq { user_id: user(turn), max_staleness_ms: None };
        done.count(&done.queries, node.query_route(query).await.is_ok());
        sleep(PACE).await;
    }
}

async fn send(mut node: Presence, done: Arc<Done>) {
    for turn in 0.. {
        done.count(&done.messages, node.deliver(with_ack(user(turn), "hello", ACK_TIMEOUT_MS)).await.is_ok());
        sleep(4 * PACE).await;
    }
}

/// Whether the machine itself is well: by how much a thread that only sleeps is late.
#[derive(Default)]
struct Machine(Mutex<VecDeque<Duration>>);

impl Machine {
    async fn feel(self: Arc<Self>) {
        loop {
            let began = Instant::now();
            sleep(PACE).await;
            let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            late.push_back(began.elapsed().saturating_sub(PACE));
            if late.len() > FELT {
                late.pop_front();
            }
        }
    }

    /// One of a hundred of the last two minutes' sleeps was late by half of what a query may take.
    fn is_starved(&self) -> bool {
        let mut late: Vec<Duration> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let worst = percentile(&mut late, 0.99);
        println!("a thread that only sleeps is {worst:?} late");
        worst > STARVED
    }
}

/// A gateway that says when it comes and when it goes.
async fn come_and_go(node: &Node, done: &Done) {
    let addr = "gw-guest:7000";
    let guest = Gateway::start(addr, &[node], BEAT).await;
    node.bind_all(10_001..=10_050, addr, guest.epoch).await;
    sleep(COMING_AND_GOING).await;
    let gone = node.deregister(addr, guest.epoch).await;
    done.count(&done.lives, gone == Code::Ok);
}

/// What each panel of the dashboard asks for has an answer, if these nodes export what it is about.
async fn every_panel_shows_something(prometheus: &Prometheus, nodes: &[Node]) {
    let dashboard: Value = serde_json::from_str(include_str!("../../deploy/grafana/im-presence.json")).expect("JSON");
    let targets = dashboard["panels"].as_array().expect("panels").iter().flat_map(|panel| panel["targets"].as_array());
    let there = exported(&nodes.iter().collect::<Vec<_>>()).await;
    let (mut shown, mut wrong) = (0, Vec::new());
    for target in targets.flatten() {
        let expression = target["expr"].as_str().expect("an expression");
        let metrics = named(expression);
        let filled = [("$__rate_interval", "1m"), ("$job", "im-presence"), ("$instance", ".*")];
        let asked = filled.iter().fold(expression.to_owned(), |text, (variable, value)| text.replace(variable, value));
        let answer = prometheus.query(&asked).await.expect("an answer");
        let is_empty = answer["data"]["result"].as_array().is_none_or(Vec::is_empty);
        if answer["status"] != "success" || is_empty && !metrics.is_empty() && metrics.is_subset(&there) {
            wrong.push(format!("{asked}: {answer}"));
        }
        shown += usize::from(!is_empty);
    }
    println!("{shown} targets of the dashboard show something");
    none("each panel shows something", wrong);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_all_is_well_no_alert_fires() {
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let minutes = std::env::var(MINUTES).map_or(DEFAULT_MINUTES, |minutes| minutes.parse().expect("a number of minutes"));
    let shorter = (HOUR / minutes.clamp(1, HOUR)).max(1);
    let every = if shorter > 1 { SHORT_SCRAPE_INTERVAL } else { SCRAPE_INTERVAL };
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let mut gateways = Vec::new();
    for n in 0..GATEWAYS {
        gateways.push(TestGateway::start(&cluster.nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await);
    }
    let (gateways, done) = (Arc::new(gateways), Arc::<Done>::default());
    for turn in 0..USERS {
        let bound = gateways[usize::try_from(turn).unwrap_or(0) % GATEWAYS].try_bind(user(turn), PHONE, "c-first").await;
        assert_eq!(bound, Some(Code::Ok));
    }
    let watcher = Watcher::of(&cluster.nodes[0], (1..=100).map(user)).await;
    let prometheus = Prometheus::start(&cluster.nodes.iter().collect::<Vec<_>>(), shorter, every).await;
    let (mut churn, machine, mut excused) = (JoinSet::new(), Arc::<Machine>::default(), BTreeSet::new());
    churn.spawn(machine.clone().feel());
    churn.spawn(log_in(gateways.clone(), done.clone()));
    for node in &cluster.nodes {
        churn.spawn(ask(node.new_connection(), done.clone()));
        churn.spawn(send(node.new_connection(), done.clone()));
    }
    let (began, mut restarted, mut restarts) = (Instant::now(), Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(60) * u32::try_from(minutes).expect("not so long") {
        come_and_go(&cluster.nodes[0], &done).await;
        let alerts = prometheus.alerts().await;
        let waiting: Vec<_> = alerts.iter().filter(|alert| !alert.is_firing).collect();
        println!("{:?}: {waiting:?}", began.elapsed());
        let firing = prometheus.firing().await;
        if machine.is_starved() {
            excused.extend(firing.iter().filter(|alert| TIMES.contains(&alert.as_str())).cloned());
        }
        assert!(firing.is_subset(&excused), "after {:?}: {alerts:?}", began.elapsed());
        if restarted.elapsed() >= RESTARTS {
            let node = &mut cluster.nodes[1]; // watchers and the guest are at the other one
            node.terminate();
            assert!(node.ended().await.success());
            node.restart().await;
            (restarted, restarts) = (Instant::now(), restarts + 1);
        }
    }
    every_panel_shows_something(&prometheus, &cluster.nodes).await;
    churn.shutdown().await;
    drop(watcher);
    let count = |what: &AtomicU64| what.load(Ordering::Relaxed);
    let Done { binds, queries, messages, lives, failed } = &*done;
    println!(
        "{minutes} minutes, rules {shorter} times shorter: {} log-ins, {} queries, {} messages, {} gateways that came and went, \
         {restarts} restarts, {} calls failed",
        count(binds),
        count(queries),
        count(messages),
        count(lives),
        count(failed)
    );
    let ever = "count by (alertname) (count_over_time(ALERTS{alertname!=\"ImPresenceWatchdog\", alertstate=\"firing\"}[2h]))";
    let fired = prometheus.query(ever).await.expect("an answer");
    let fired = fired["data"]["result"].as_array().expect("a list").iter().filter_map(|of| of["metric"]["alertname"].as_str());
    none("no alert fires", fired.filter(|alert| !excused.contains(*alert)).map(str::to_owned).collect());
    println!("others took the processors, which excuses {excused:?}");
    assert!(count(binds) > 60 * minutes && count(messages) > 60 * minutes, "something went on");
}
