//! The daemon: users on a gateway that registered, whose one lease holds all of them.

use std::time::Duration;

use im_presence::pb;

use crate::Figures;
use crate::Rival;
use crate::Shape;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::redis::RedisServer;
use crate::load;
use crate::load::contender;
use crate::load::gateway::Gateway;
use crate::load::on_core;
use crate::load::queries;
use crate::load::scatter;

const BATCH_BIND: &str = "/mpim.PresenceService/BatchBindRoute";
const BIND: &str = "/mpim.PresenceService/BindRoute";
/// Binds of one call while everybody is put there. They have to fit into the window of a connection that is just opened.
const BATCH: u64 = 500;
/// Users asked for, spread over all.
const SAMPLE: u64 = 1_000;
const OFFLINE_WITHIN: Duration = Duration::from_secs(60);
const DYING: &str = "gw-dying:7000";
/// A gateway that registers nowhere: its routes end by themselves, later than this bench.
const ADDR: &str = "gw-12.example.net:7000";

pub struct Ours {
    node: Node,
    name: &'static str,
    _redis: Option<RedisServer>,
    _db: TestDb,
}

impl Ours {
    /// Alone, with its database in a file.
    pub async fn on_sqlite(lease: Duration) -> Self {
        Self::start("im-presence on SQLite", TestDb::sqlite(), None, lease).await
    }

    pub async fn on_mariadb_and_redis(lease: Duration) -> Self {
        let (db, redis) = (TestDb::mariadb(MariaDb::shared()).await, RedisServer::start());
        Self::start("im-presence on MariaDB and Redis", db, Some(redis), lease).await
    }

    async fn start(name: &'static str, db: TestDb, redis: Option<RedisServer>, lease: Duration) -> Self {
        let port = redis.as_ref().map(|redis| redis.port.to_string()).unwrap_or_default();
        let [lease_ms, beat] = [lease, lease / 5].map(|time| time.as_millis().to_string());
        let mut more = vec![("GATEWAY__LEASE", &*lease_ms), ("GATEWAY__HEARTBEAT_INTERVAL", &*beat)];
        more.extend([("GATEWAY__STREAM_GRACE", &*beat), ("ROUTE__L1_TTL", "3600")]);
        if redis.is_some() {
            more.extend([("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)]);
        }
        let node = Node::start_as(contender::on_core(Some(crate::SERVER), PROGRAM), db.settings(&more)).await;
        Self { node, name, _redis: redis, _db: db }
    }

    /// Binds users from `first` on, and returns when all are acknowledged.
    async fn bind(&self, first: u64, users: u64, (addr, epoch): (&str, u64)) {
        let (server, addr) = (self.node.data, addr.to_owned());
        let calls = users.div_ceil(BATCH);
        let request = move |_, call: u64| {
            let of_call = first + call * BATCH..(first + users).min(first + (call + 1) * BATCH);
            pb::BatchBindRouteReq { binds: of_call.map(|user| bind(user, user, &addr, epoch)).collect() }
        };
        let done = on_core(None, move || load::run_all(server, BATCH_BIND, 1, calls, request)).await;
        assert_eq!((done.answered, done.failed), (calls, 0), "batches of binds");
    }

    async fn online(&self, first: u64, users: u64, sample: u64) -> u64 {
        let count = sample.min(users);
        let user_ids = (0..count).map(|n| (first + n * (users / count)) as i64).collect();
        let request = pb::BatchQueryRouteReq { user_ids, online_only: true, ..Default::default() };
        self.node.presence().batch_query_route(request).await.expect("a query").into_inner().users.len() as u64
    }
}

impl Rival for Ours {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    async fn fill(&mut self, users: u64) {
        self.bind(1, users, (ADDR, 0)).await;
        let all = async || self.online(1, users, SAMPLE).await == SAMPLE.min(users);
        eventually("all are online", OFFLINE_WITHIN, all).await;
    }

    async fn lookups(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        queries::query(&self.node, Some(crate::LOADER), shape, users, time).await
    }

    async fn binds(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let request = move |c: u64, n: u64| bind(1 + scatter(c << 32 | n) % users, c << 32 | n, ADDR, 0);
        crate::calls(self.node.data, BIND, shape, time, request).await
    }

    async fn death(&mut self, users: u64, _: Duration) -> Figures {
        let dying = Gateway::register(&self.node, DYING).await;
        let _healthy = Gateway::register(&self.node, "gw-healthy:7000").await; // one of two that dies is no mass expiry
        self.bind(crate::FIRST_DYING, users, (DYING, dying.epoch)).await;
        let all = async || self.online(crate::FIRST_DYING, users, SAMPLE).await == SAMPLE.min(users);
        eventually("all are online", OFFLINE_WITHIN, all).await;
        let cpu = self.node.cpu_time();
        self.node.beat(DYING, dying.epoch).await;
        let cpu_of_a_beat = self.node.cpu_time() - cpu;
        let end = dying.fall_silent().await;
        while self.online(crate::FIRST_DYING, users, SAMPLE).await > 0 {
            assert!(end.elapsed() < OFFLINE_WITHIN, "users stay online");
            tokio::time::sleep(crate::LOOK).await;
        }
        Figures { beyond_the_lease: end.elapsed(), cpu_of_a_beat }
    }

    fn rss_bytes(&self) -> u64 {
        self.node.rss_bytes()
    }

    async fn lost(&mut self, users: u64) -> u64 {
        self.bind(crate::FIRST_LOST, users, (ADDR, 0)).await;
        self.node.kill();
        self.node.restart().await;
        users - self.online(crate::FIRST_LOST, users, users).await
    }
}

/// A bind of a new connection: it replaces the user's route and is never a no-op.
fn bind(user: u64, conn: u64, gateway_addr: &str, gateway_epoch: u64) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: user as i64,
        gateway_addr: gateway_addr.to_owned(),
        gateway_epoch,
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        device_id: PHONE.to_owned(),
        platform: pb::Platform::Ios.into(),
        conn_id: conn.to_string(),
        ..Default::default()
    }
}
