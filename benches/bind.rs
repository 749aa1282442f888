//! How many acknowledged, durable binds a second: the daemon's one write path against one transaction per bind.
//!
//! `BASELINE=path/of/its/binary cargo bench --bench bind` measures (about four minutes), also against another state of the
//! daemon; without it that is this one again; `cargo test` runs each contender for a moment, so that it does
//! not rot. The loader, the daemon and the database share this machine. Ratios of two columns of one run mean something;
//! absolute figures belong to the machine.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::config::Config;
use im_presence::domain::gateway::Life;
use im_presence::domain::history::Cause;
use im_presence::domain::history::LogLine;
use im_presence::domain::id::ConnId;
use im_presence::domain::id::DeviceId;
use im_presence::domain::id::GatewayAddr;
use im_presence::domain::id::UserId;
use im_presence::domain::route::Platform;
use im_presence::domain::route::Route;
use im_presence::domain::status::Status;
use im_presence::pb;
use im_presence::store::codec::OutboxBody;
use im_presence::store::connection::Connection;
use im_presence::store::connection::Purpose;
use im_presence::store::connection::SqlError;
use im_presence::store::database::Database;
use im_presence::store::users::UserChange;
use serde_json::json;

use crate::harness::cluster::Cluster;
use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::load::report::Figures;

const USERS: u64 = 100_000;
const GATEWAYS: u64 = 16;
const CONNECTIONS: u64 = 8;
const IN_FLIGHT: u64 = 64;
const BATCH: u64 = 1_000;
const BATCH_CONNECTIONS: u64 = 4;
const SQL_CONNECTIONS: usize = 8;
const SHOWN_WITHIN: Duration = Duration::from_secs(20);

struct Plan {
    rounds: usize,
    time: Duration,
}

fn main() {
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let plan = match measuring {
        true => Plan { rounds: 5, time: Duration::from_secs(5) },
        false => Plan { rounds: 1, time: Duration::from_millis(300) },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(&plan));
    println!("test result: ok. {} rounds", plan.rounds);
}

async fn measure(plan: &Plan) {
    let mysql = Cluster::mariadb(1, &[]).await;
    let redis = Cluster::with_redis(1, &[]).await;
    let sqlite = Cluster::sqlite(&[]).await;
    let alone = Cluster::mariadb(1, &[]).await; // lays the tables for the plain client
    let mut figures: [Vec<f64>; 5] = Default::default();
    for round in 0..=plan.rounds {
        let results = [
            bind_one_by_one(mysql.node(), plan.time).await,
            bind_and_show(&redis, plan.time).await,
            one_transaction_each(&alone.db.url, plan.time).await,
            bind_in_batches(mysql.node(), plan.time).await,
            bind_one_by_one(sqlite.node(), plan.time).await,
        ];
        if round > 0 || plan.rounds == 1 {
            // the first round warms up
            for (figures, result) in figures.iter_mut().zip(results) {
                figures.push(result);
            }
        }
    }
    for node in [mysql.node(), redis.node(), sqlite.node()] {
        let mut not_ok = node.series("im_presence_binds_total").await;
        not_ok.retain(|(labels, binds)| !labels.contains("\"ok\"") && *binds > 0.0);
        assert!(not_ok.is_empty(), "binds that were not done: {not_ok:?}");
    }
    report(figures);
    measure_history(plan).await;
    let left = redis.node().metric("im_presence_outbox_repaired_total").await;
    println!("batches that were not shown in Redis at once: {left}");
}

fn report(figures: [Vec<f64>; 5]) {
    let [binds, shown, plain, batches, embedded] = figures.map(Figures::of);
    println!("| acknowledged binds a second | median | lowest | highest | against one transaction each |");
    println!("|---|---|---|---|---|");
    for (what, figures) in [
        ("BindRoute, MariaDB", &binds),
        ("BindRoute, MariaDB, shown in Redis (cache and queue)", &shown),
        ("one transaction per bind, 8 connections, MariaDB", &plain),
        ("BatchBindRoute of 1,000, MariaDB", &batches),
        ("BindRoute, SQLite (WAL, synchronous = FULL)", &embedded),
    ] {
        let ratio = figures.median / plain.median;
        println!("| {what} | {:.0} | {:.0} | {:.0} | {ratio:.1}x |", figures.median, figures.lowest, figures.highest);
    }
    let [bind, bind_shown, one_transaction_each, batch, sqlite] =
        [binds, shown, plain, batches, embedded].map(|figures| figures.median.round());
    let line = json!({
        "bench": "bind", "bind": bind, "bind_shown_in_redis": bind_shown, "one_transaction_each": one_transaction_each,
        "batch": batch, "sqlite": sqlite,
    });
    println!("{line}");
}

/// What it costs to write history: log-ins of users who were never there, each of which is a line of the log.
async fn measure_history(plan: &Plan) {
    let baseline = std::env::var("BASELINE").unwrap_or_else(|_| PROGRAM.to_owned());
    let with = Cluster::mariadb(1, &[]).await;
    let without = Cluster::mariadb(1, &[("HISTORY__ENABLED", "false")]).await;
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let before = Node::start_as(vec![baseline], db.settings(&[])).await;
    let mut figures: [Vec<f64>; 5] = Default::default();
    for round in 0..=plan.rounds {
        let results = [
            log_in(with.node(), round, plan.time).await,
            log_in(without.node(), round, plan.time).await,
            log_in(&before, round, plan.time).await,
            bind_one_by_one(with.node(), plan.time).await,
            bind_one_by_one(&before, plan.time).await,
        ];
        if round > 0 || plan.rounds == 1 {
            figures.iter_mut().zip(results).for_each(|(figures, result)| figures.push(result));
        }
    }
    let [with, without, before, binds, binds_before] = figures.map(Figures::of);
    println!("| a second | median | lowest | highest | history on against it |");
    println!("|---|---|---|---|---|");
    for (what, figures, ours) in [
        ("log-ins, history on", &with, &with),
        ("log-ins, history off", &without, &with),
        ("log-ins, baseline", &before, &with),
        ("BindRoute, history on", &binds, &binds),
        ("BindRoute, baseline", &binds_before, &binds),
    ] {
        let ratio = ours.median / figures.median;
        println!("| {what} | {:.0} | {:.0} | {:.0} | {ratio:.2}x |", figures.median, figures.lowest, figures.highest);
    }
    let [on, off, baseline] = [with, without, before].map(|figures| figures.median.round());
    println!("{}", json!({ "bench": "bind history", "on": on, "off": off, "baseline": baseline }));
}

/// Users who were never there, others in each round.
async fn log_in(node: &Node, round: usize, time: Duration) -> f64 {
    const PER_CONNECTION: u64 = 10_000_000;
    let server = node.data;
    let new = move |connection: u64, n: u64| {
        let place = (1 + round as u64) * CONNECTIONS + connection;
        pb::BindRouteReq { user_id: (place * PER_CONNECTION + n) as i64, ..request(connection, n) }
    };
    let run = move || load::run(server, "/mpim.PresenceService/BindRoute", CONNECTIONS, IN_FLIGHT, time, new);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

/// A bind of a new connection: it replaces the user's route and is never a no-op.
fn request(connection: u64, n: u64) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: 1 + ((connection * 7_919 + n * 31) % USERS) as i64,
        gateway_addr: format!("gw-{}:7000", n % GATEWAYS),
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        device_id: "phone".to_owned(),
        platform: pb::Platform::Ios.into(),
        conn_id: format!("{connection}-{n}"),
        ..Default::default()
    }
}

async fn bind_one_by_one(node: &Node, time: Duration) -> f64 {
    let server = node.data;
    let path = "/mpim.PresenceService/BindRoute";
    let run = move || load::run(server, path, CONNECTIONS, IN_FLIGHT, time, request);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

/// Redis has everything before the next contender begins.
async fn bind_and_show(cluster: &Cluster, time: Duration) -> f64 {
    let rate = bind_one_by_one(cluster.node(), time).await;
    let rows = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await;
    eventually("everything is shown", SHOWN_WITHIN, async || rows().await == 0).await;
    rate
}

async fn bind_in_batches(node: &Node, time: Duration) -> f64 {
    let server = node.data;
    let path = "/mpim.PresenceService/BatchBindRoute";
    let batch = |c, n| pb::BatchBindRouteReq { binds: (0..BATCH).map(|i| request(c, n * BATCH + i)).collect() };
    let run = move || load::run(server, path, BATCH_CONNECTIONS, 1, time, batch);
    let done = tokio::task::spawn_blocking(run).await.expect("the loader");
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second() * BATCH as f64
}

/// The same statements as the daemon's, one transaction per bind.
async fn one_transaction_each(url: &str, time: Duration) -> f64 {
    let mut store = Config::load(None).expect("the defaults").store;
    store.url = url.to_owned().into();
    let database = Arc::new(Database::open(&store).await.expect("open the database"));
    let (done, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for c in 0..SQL_CONNECTIONS {
        let mut connection = database.connect(Purpose::Lane).await.expect("connect");
        let (done, stop) = (done.clone(), stop.clone());
        tasks.spawn(async move {
            let lives = lives(&mut connection).await.expect("lives");
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                bind_alone(&mut connection, &request(c as u64, n), &lives).await;
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(time).await;
    stop.store(true, Ordering::Relaxed);
    while tasks.join_next().await.is_some() {}
    done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

async fn lives(connection: &mut Connection) -> Result<Vec<Arc<Life>>, SqlError> {
    for gateway in (0..GATEWAYS).map(|n| GatewayAddr::parse(&format!("gw-{n}:7000")).expect("an address")) {
        connection.begin_unmanaged_life(&gateway).await?;
    }
    connection.read_lives(Duration::ZERO, None).await
}

async fn bind_alone(connection: &mut Connection, request: &pb::BindRouteReq, lives: &[Arc<Life>]) {
    loop {
        match try_bind_alone(connection, request, lives).await {
            Ok(()) => return,
            Err(SqlError::Deadlock | SqlError::Locked) => connection.rollback().await.expect("roll back"),
            Err(error) => panic!("{error}"),
        }
    }
}

async fn try_bind_alone(connection: &mut Connection, request: &pb::BindRouteReq, lives: &[Arc<Life>]) -> Result<(), SqlError> {
    let user = UserId::parse(request.user_id).expect("a user");
    let gateway = GatewayAddr::parse(&request.gateway_addr).expect("an address");
    connection.begin().await?;
    connection.lock_users(&[user]).await?;
    let loaded = connection.load_users(&[user]).await?;
    connection.current_lives(std::slice::from_ref(&gateway)).await?;
    let before = &loaded.records[&user];
    let (version, now) = (before.version.next(loaded.clock.version()), loaded.clock.now());
    let route = Route {
        device: DeviceId::parse(&request.device_id).expect("a device"),
        platform: Platform::Ios,
        epoch: lives.iter().find(|life| life.gateway == gateway).expect("a life").epoch,
        conn: ConnId::parse(&request.conn_id).expect("a connection"),
        connected_at: now,
        client_ip: request.client_ip.parse().ok(),
        client_port: 40_000,
        bound_version: version,
        bound_at: now,
        expires_at: Some(now.plus(Duration::from_secs(3_600))).into(),
        idle: false,
    };
    let mut after = before.clone();
    (after.version, after.last_seen, after.routes) = (version, now, vec![route].into());
    connection.write_users(&[UserChange { user, before, after: &after }]).await?;
    let mut body = OutboxBody::default();
    body.changed(user, &after);
    let (shown, cause, epoch) = (Status::Online, Cause::Login, Some(after.routes[0].epoch));
    let line = LogLine { version, at: now, shown, hidden: false, cause, devices: 1, epoch };
    connection.add_log(&[(user, line, gateway.to_string())]).await?;
    let row = connection.add_outbox("bench", &body).await?;
    connection.delete_outbox(&[row]).await?;
    connection.commit().await
}
