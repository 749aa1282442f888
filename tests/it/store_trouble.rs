//! The database is there, and is not as it should be: callers hear that it is not their fault, and everything heals by itself.

use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code as ResultCode;
use im_presence::pb::UnbindRouteReq;
use tokio::task::JoinSet;
use tonic::Code;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::retry_delay;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::settings;

/// The longest pause between two attempts, and the time that an attempt may take.
const BACK_AGAIN: Duration = Duration::from_secs(8);
const SEEN_WITHIN: Duration = Duration::from_secs(7);

/// A node that is an ordinary user of a server of its own.
struct Tenant {
    server: MariaDb,
    db: TestDb,
    node: Node,
}

impl Tenant {
    async fn start() -> Self {
        let server = MariaDb::start();
        let db = TestDb::mariadb(&server).await;
        db.run(&format!("CREATE USER app; GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX, ALTER ON {}.* TO app", db.name()))
            .await;
        let url = db.url.replace("root@", "app@");
        let node = Node::start(settings(&[("STORE__URL", &url), ("STORE__LANES", "1")])).await;
        node.bind(a_bind(ALICE, PHONE, "c-0")).await;
        Self { server, db, node }
    }

    /// Binds are UNAVAILABLE for `time`, say when to come again, and the node says what is wrong.
    async fn refuses_for(&self, time: Duration) {
        let began = Instant::now();
        for n in 0.. {
            let refused = self.node.try_bind(a_bind(ALICE, PHONE, &format!("refused-{n}"))).await.expect_err("nothing is stored");
            assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
            assert!(retry_delay(&refused).is_some(), "{refused:?}");
            if began.elapsed() > time {
                break;
            }
        }
        assert!(self.node.degraded().await.contains(&"store".to_owned()), "a node that stores nothing says so");
        assert_eq!(self.node.http("/healthz").await.0, 503);
        let retries = self.node.series("im_presence_lane_retries_total").await;
        assert!(retries.iter().all(|(cause, n)| !cause.contains("failed") || *n == 0.0), "halved in vain: {retries:?}");
    }

    async fn connections(&self) -> i64 {
        let sql =
            "SELECT CAST(variable_value AS SIGNED) FROM information_schema.global_status WHERE variable_name = 'CONNECTIONS'";
        self.db.number(sql).await
    }

    /// Without any traffic.
    async fn recovers(&self) {
        eventually("the node is well again", BACK_AGAIN, async || self.node.degraded().await.is_empty()).await;
        self.node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let lines = |text: &str| self.node.log().iter().filter(|line| line.contains(text)).count();
        assert_eq!(lines("a lane cannot commit"), 1, "{:?}", self.node.log());
        assert_eq!(lines("a lane commits again"), 1, "{:?}", self.node.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_read_only_is_not_stormed_and_is_nobodys_fault() {
    let tenant = Tenant::start().await;
    tenant.db.run("SET GLOBAL read_only = 1").await;
    let (before, began) = (tenant.connections().await, Instant::now());
    tenant.refuses_for(Duration::from_secs(6)).await;
    let made = tenant.connections().await - before;
    println!("{made} connections in {:?}", began.elapsed());
    // The loops that look once a second make one each; the lane, and whoever calls, a few in all.
    assert!(made < 6 * began.elapsed().as_secs() as i64, "{made} connections in {:?}", began.elapsed());
    tenant.db.run("SET GLOBAL read_only = 0").await;
    tenant.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_missing_is_named_and_is_nobodys_fault() {
    let tenant = Tenant::start().await;
    let name = tenant.db.name();
    tenant.db.run(&format!("REVOKE INSERT ON {name}.* FROM app; KILL USER app")).await;
    tenant.refuses_for(Duration::from_secs(1)).await;
    let told =
        tenant.node.log().iter().any(|line| line.contains("ERROR") && line.contains("INSERT command denied to user 'app'"));
    assert!(told, "{:?}", tenant.node.log());
    tenant.db.run(&format!("GRANT INSERT ON {name}.* TO app")).await;
    tenant.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_missing_is_nobodys_fault() {
    let tenant = Tenant::start().await;
    tenant.db.run("RENAME TABLE routes TO routes_away").await;
    tenant.refuses_for(Duration::from_secs(1)).await;
    tenant.db.run("RENAME TABLE routes_away TO routes").await;
    tenant.recovers().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_somebody_has_locked_are_noticed() {
    let tenant = Tenant::start().await;
    let mut somebody = tenant.db.connect().await;
    sqlx::raw_sql("LOCK TABLES users WRITE").execute(&mut somebody).await.unwrap();
    let _ = tenant.node.try_bind(a_bind(ALICE, PHONE, "refused")).await.expect_err("nothing is stored");
    eventually("it is noticed", SEEN_WITHIN, async || tenant.node.degraded().await.contains(&"store".to_owned())).await;
    // Without any traffic it stays so: what is not locked can be written, and that is no recovery.
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(tenant.node.degraded().await.contains(&"store".to_owned()), "users cannot be bound");
    }
    sqlx::raw_sql("UNLOCK TABLES").execute(&mut somebody).await.unwrap();
    tenant.recovers().await;
    drop(tenant.server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_under_sqlite_is_noticed_and_is_nobodys_fault() {
    let db = TestDb::sqlite();
    let program = ["env", "--ignore-signal=XFSZ", PROGRAM].map(str::to_owned).to_vec();
    let node = Node::start_as(program, db.settings(&[])).await;
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let log = format!("{}-wal", db.url.strip_prefix("sqlite://").expect("a file"));
    let largest_file = |bytes: &str| {
        let limit = format!("--fsize={bytes}:unlimited");
        assert!(Command::new("prlimit").args(["--pid", &node.pid().to_string(), &limit]).status().unwrap().success());
    };
    largest_file(&std::fs::metadata(log).expect("SQLite's log").len().to_string());
    let binds = (0..100).map(|user| a_bind(1 + user, PHONE, &"x".repeat(100))).collect();
    match node.presence().batch_bind_route(BatchBindRouteReq { binds }).await {
        Ok(answer) => assert!(answer.get_ref().results.iter().all(|bind| code(&bind.result) == ResultCode::Unavailable)),
        Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
    }
    assert!(node.degraded().await.contains(&"store".to_owned()), "{:?}", node.log());
    assert_eq!(node.http("/healthz").await.0, 503);
    largest_file("unlimited");
    eventually("the node is well again", BACK_AGAIN, async || node.degraded().await.is_empty()).await;
    node.bind(a_bind(ALICE, PHONE, "c-2")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_own_defaults_change_nothing() {
    const HOSTILE: &str = "SET GLOBAL autocommit = 0, completion_type = 1, sql_select_limit = 1, max_join_size = 1, \
        sql_big_selects = 0, tx_isolation = 'SERIALIZABLE', tx_read_only = 1, sql_mode = 'ANSI,NO_BACKSLASH_ESCAPES', \
        time_zone = '+05:00', max_statement_time = 0.05, default_storage_engine = 'MyISAM', idle_transaction_timeout = 1, \
        wait_timeout = 2, sql_auto_is_null = 1, innodb_lock_wait_timeout = 1";
    const USERS: i64 = 300;
    let server = MariaDb::start();
    let db = TestDb::mariadb(&server).await;
    db.run(HOSTILE).await;
    let first = Node::start(db.settings(&[])).await;
    let binds = (1..=USERS).map(|user| a_bind(user, PHONE, "c-1")).collect();
    let bound = first.presence().batch_bind_route(BatchBindRouteReq { binds }).await.unwrap().into_inner().results;
    assert!(bound.iter().all(|bind| bind.result.as_ref().is_some_and(|result| result.code == 0)), "{bound:?}");
    let second = Node::start(db.settings(&[])).await;
    for node in [&first, &second] {
        let user_ids = (1..=USERS).collect();
        let request = BatchQueryRouteReq { user_ids, max_staleness_ms: Some(0), ..Default::default() };
        let answer = node.presence().batch_query_route(request).await.unwrap().into_inner();
        let online = answer.users.iter().filter(|user| user.is_online).count() as i64;
        assert_eq!(online, USERS, "as SQL says");
        assert_eq!(node.degraded().await, [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unbinds_of_strangers_leave_no_rows() {
    let cluster = Cluster::mariadb(1, &[("STORE__LANES", "1")]).await;
    let mut calls = JoinSet::new();
    for user in 1..=400 {
        let mut presence = cluster.node().presence();
        calls.spawn(async move {
            if user % 2 == 0 {
                presence.bind_route(a_bind(user, PHONE, "c-1")).await.map(|_| ())
            } else {
                let unbind = UnbindRouteReq { user_id: user, gateway_addr: GATEWAY.to_owned(), ..Default::default() };
                presence.unbind_route(unbind).await.map(|_| ())
            }
        });
    }
    calls.join_all().await.into_iter().collect::<Result<(), _>>().unwrap();
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM users").await, 200);
}
