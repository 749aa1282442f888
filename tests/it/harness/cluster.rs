//! Nodes on one database, and short ways to ask them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use im_presence::pb::BindRouteReq;
use im_presence::pb::BindRouteResp;
use im_presence::pb::Code;
use im_presence::pb::QueryRouteReq;
use im_presence::pb::QueryRouteResp;
use im_presence::pb::Result as Outcome;
use im_presence::pb::UnbindRouteReq;
use im_presence::pb::UnbindRouteResp;
use sqlx::AnyConnection;
use sqlx::AssertSqlSafe;
use sqlx::Connection;
use sqlx::Row;
use tonic::Status;
use tonic_types::StatusExt;

use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::scratch;
use crate::harness::mariadb::unique;
use crate::harness::node::Node;
use crate::harness::node::Settings;
use crate::harness::node::settings;
use crate::harness::proxy::Proxy;
use crate::harness::redis::RedisServer;

/// A node that has started sweeps, if no other does.
const SWEEPS_WITHIN: Duration = Duration::from_millis(1_500);

pub const ALICE: i64 = 1;
pub const BOB: i64 = 2;
pub const CAROL: i64 = 3;
pub const PHONE: &str = "phone";
pub const LAPTOP: &str = "laptop";
pub const GATEWAY: &str = "gw-1:7000";
pub const OTHER_GATEWAY: &str = "gw-2:7000";

/// A database of one test.
pub struct TestDb {
    pub url: String,
    /// Removed with everything in it.
    directory: Option<PathBuf>,
}

pub struct Cluster {
    pub nodes: Vec<Node>,
    pub db: TestDb,
    redis: Option<Redis>,
}

/// The servers behind the two uses of Redis. They may be the same.
#[derive(Clone)]
pub struct Redis {
    pub cache: Arc<RedisServer>,
    pub queue: Arc<RedisServer>,
}

impl TestDb {
    pub async fn mariadb(server: &MariaDb) -> Self {
        let name = unique("im");
        let mut connection = connect(&server.url("")).await;
        let create = AssertSqlSafe(format!("CREATE DATABASE {name}"));
        sqlx::raw_sql(create).execute(&mut connection).await.expect("create a database");
        Self { url: server.url(&name), directory: None }
    }

    pub fn sqlite() -> Self {
        let directory = scratch("sqlite");
        std::fs::create_dir_all(&directory).expect("make a directory");
        Self { url: format!("sqlite://{}", directory.join("presence.db").display()), directory: Some(directory) }
    }

    pub fn name(&self) -> &str {
        self.url.rsplit('/').next().expect("a URL has a path")
    }

    pub async fn connect(&self) -> AnyConnection {
        connect(&self.url).await
    }

    pub async fn run(&self, sql: &str) {
        let mut connection = self.connect().await;
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    }

    /// As if nodes had beaten for the ten minutes after which something may be deleted for its age.
    pub async fn clock_was_steady(&self) {
        self.run("UPDATE cluster SET continuous_since = continuous_since - 700000").await;
    }

    /// Waits until it is the turn of one of the nodes to sweep.
    pub async fn somebody_sweeps(&self) {
        let claimed = async || self.number("SELECT COUNT(*) FROM jobs WHERE name = 'sweep'").await == 1;
        eventually("a node sweeps", SWEEPS_WITHIN, claimed).await;
    }

    /// From now on, and for 40 s, it is another node's turn to sweep.
    pub async fn another_sweeps(&self) {
        self.somebody_sweeps().await;
        self.run("UPDATE jobs SET node_id = 'another', until = until + 40000 WHERE name = 'sweep'").await;
    }

    /// Whoever looks first sweeps.
    pub async fn anybody_sweeps(&self) {
        self.run("DELETE FROM jobs WHERE name = 'sweep'").await;
    }

    /// Lanes that wait for a user's row, to judge by their patience. (InnoDB renews its table of transactions only when nobody
    /// has looked at it for 100 ms, and other tests look.)
    pub async fn waiting_for_a_row(&self) -> i64 {
        const SQL: &str = "SELECT COUNT(*) FROM information_schema.processlist \
            WHERE db = DATABASE() AND info LIKE 'INSERT INTO users%' AND time_ms > 150";
        self.number(SQL).await
    }

    /// The number that `sql` selects.
    pub async fn number(&self, sql: &str) -> i64 {
        let mut connection = self.connect().await;
        let row = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await;
        row.and_then(|row| row.try_get(0)).unwrap_or_else(|e| panic!("{sql}: {e}"))
    }

    /// Settings of a node that reaches this database through `proxy`.
    pub fn settings_through(&self, proxy: &Proxy, more: &[(&str, &str)]) -> Settings {
        let mut all = settings(more);
        all.push(("STORE__URL".to_owned(), proxy.url(self.name())));
        all
    }

    pub fn settings(&self, more: &[(&str, &str)]) -> Settings {
        let mut all = settings(more);
        all.push(("STORE__URL".to_owned(), self.url.clone()));
        all
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        if let Some(directory) = &self.directory {
            let _ = std::fs::remove_dir_all(directory); // the next run removes what is left
        }
    }
}

pub async fn connect(url: &str) -> AnyConnection {
    sqlx::any::install_default_drivers();
    AnyConnection::connect(url).await.unwrap_or_else(|error| panic!("connect to {url}: {error}"))
}

impl Cluster {
    /// `nodes` nodes on a fresh database of the shared MariaDB.
    pub async fn mariadb(nodes: usize, more: &[(&str, &str)]) -> Self {
        Self::on(MariaDb::shared(), nodes, more).await
    }

    pub async fn on(server: &MariaDb, nodes: usize, more: &[(&str, &str)]) -> Self {
        Self::start(TestDb::mariadb(server).await, nodes, more).await
    }

    pub async fn sqlite(more: &[(&str, &str)]) -> Self {
        Self::start(TestDb::sqlite(), 1, more).await
    }

    /// `nodes` nodes on a fresh database of the shared MariaDB, and one Redis for both uses.
    pub async fn with_redis(nodes: usize, more: &[(&str, &str)]) -> Self {
        Self::on_all(MariaDb::shared(), Redis::one(), nodes, more).await
    }

    /// The same, with a Redis for each use.
    pub async fn with_two_redis(nodes: usize, more: &[(&str, &str)]) -> Self {
        Self::on_all(MariaDb::shared(), Redis::two(), nodes, more).await
    }

    /// The same; `cache` may be out of the nodes' sight if `more` says where they find theirs.
    pub async fn with_cache(nodes: usize, more: &[(&str, &str)], cache: RedisServer) -> Self {
        let redis = Redis { cache: Arc::new(cache), queue: Arc::new(RedisServer::start()) };
        Self::on_all(MariaDb::shared(), redis, nodes, more).await
    }

    pub async fn on_all(server: &MariaDb, redis: Redis, nodes: usize, more: &[(&str, &str)]) -> Self {
        let mut cluster = Self { nodes: Vec::new(), db: TestDb::mariadb(server).await, redis: Some(redis) };
        for _ in 0..nodes {
            cluster.add_node(more).await;
        }
        cluster
    }

    async fn start(db: TestDb, count: usize, more: &[(&str, &str)]) -> Self {
        let mut cluster = Self { nodes: Vec::new(), db, redis: None };
        for _ in 0..count {
            cluster.add_node(more).await;
        }
        cluster
    }

    /// One more node on the same stores.
    pub async fn add_node(&mut self, more: &[(&str, &str)]) {
        self.launch(self.db.settings(more), more).await;
    }

    /// One more, which reaches the database through `proxy`.
    pub async fn add_node_through(&mut self, proxy: &Proxy, more: &[(&str, &str)]) {
        self.launch(self.db.settings_through(proxy, more), more).await;
    }

    /// One more, which finds the database by `url`.
    pub async fn add_node_at(&mut self, url: &str, more: &[(&str, &str)]) {
        let mut settings = settings(more);
        settings.push(("STORE__URL".to_owned(), url.to_owned()));
        self.launch(settings, more).await;
    }

    async fn launch(&mut self, mut settings: Settings, more: &[(&str, &str)]) {
        let section = |key: &str| key.split("__").next().unwrap_or_default().to_owned();
        let given: Vec<String> = more.iter().filter(|(key, _)| key.ends_with("__URL")).map(|(key, _)| section(key)).collect();
        // A Redis that `more` tells of is not the cluster's own.
        settings.extend(self.redis.iter().flat_map(Redis::settings).filter(|(key, _)| !given.contains(&section(key))));
        self.nodes.push(Node::start(settings).await);
    }

    pub fn redis(&self) -> &Redis {
        self.redis.as_ref().expect("a cluster with Redis")
    }

    pub fn cache(&self) -> &RedisServer {
        &self.redis().cache
    }

    pub fn queue(&self) -> &RedisServer {
        &self.redis().queue
    }

    pub fn node(&self) -> &Node {
        &self.nodes[0]
    }
}

impl Redis {
    /// One server for both uses.
    pub fn one() -> Self {
        let server = Arc::new(RedisServer::start());
        Self { cache: server.clone(), queue: server }
    }

    /// A server for each use.
    pub fn two() -> Self {
        Self { cache: Arc::new(RedisServer::start()), queue: Arc::new(RedisServer::start()) }
    }

    fn settings(&self) -> Settings {
        let (cache, queue) = (self.cache.port.to_string(), self.queue.port.to_string());
        let host = "127.0.0.1";
        settings(&[
            ("REDIS_CACHE__HOST", host),
            ("REDIS_CACHE__PORT", &cache),
            ("REDIS_QUEUE__HOST", host),
            ("REDIS_QUEUE__PORT", &queue),
        ])
    }
}

/// Runs a test on a node with SQLite, then on one with MariaDB.
pub async fn each_engine(more: &[(&str, &str)], test: impl AsyncFn(&Cluster)) {
    for cluster in [Cluster::sqlite(more).await, Cluster::mariadb(1, more).await] {
        println!("on {}", cluster.db.url);
        test(&cluster).await;
    }
}

pub fn a_bind(user: i64, device: &str, conn: &str) -> BindRouteReq {
    let (device_id, conn_id) = (device.to_owned(), conn.to_owned());
    BindRouteReq { user_id: user, gateway_addr: GATEWAY.to_owned(), device_id, conn_id, ..Default::default() }
}

impl Node {
    pub async fn try_bind(&self, request: BindRouteReq) -> Result<BindRouteResp, Status> {
        self.presence().bind_route(request).await.map(tonic::Response::into_inner)
    }

    /// Binds, and insists that it was done.
    pub async fn bind(&self, request: BindRouteReq) -> BindRouteResp {
        let response = self.try_bind(request).await.expect("a bind");
        assert_eq!(code(&response.result), Code::Ok, "{response:?}");
        response
    }

    pub async fn unbind(&self, request: UnbindRouteReq) -> UnbindRouteResp {
        let response = self.presence().unbind_route(request).await.expect("an unbind").into_inner();
        assert_eq!(code(&response.result), Code::Ok, "{response:?}");
        response
    }

    pub async fn try_query(&self, user: i64, max_staleness_ms: Option<u32>) -> Result<QueryRouteResp, Status> {
        let request = QueryRouteReq { user_id: user, max_staleness_ms };
        self.presence().query_route(request).await.map(tonic::Response::into_inner)
    }

    /// What any tier says.
    pub async fn query(&self, user: i64) -> QueryRouteResp {
        self.try_query(user, None).await.expect("a query")
    }

    /// What SQL says.
    pub async fn query_sql(&self, user: i64) -> QueryRouteResp {
        self.try_query(user, Some(0)).await.expect("a query")
    }
}

pub fn code(result: &Option<Outcome>) -> Code {
    result.as_ref().expect("every answer has a result").code()
}

pub fn devices(answer: &QueryRouteResp) -> Vec<&str> {
    let mut devices: Vec<&str> = answer.routes.iter().map(|route| route.device_id.as_str()).collect();
    devices.sort_unstable();
    devices
}

/// After which time this refusal asks to come again.
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_error_details().retry_info().and_then(|info| info.retry_delay)
}
