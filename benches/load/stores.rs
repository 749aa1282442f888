//! What people use instead: Redis and SQL, each by the plainest and fastest client there is.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use sqlx::AssertSqlSafe;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::load::scatter;

const SELECTERS: u64 = 4;

/// Redis as the only store: a user's route, status, device and address under a key each. Asked by redis-benchmark, whose one
/// event loop costs less than any client that a service could use.
pub struct PlainRedis {
    server: RedisServer,
    users: u64,
}

impl PlainRedis {
    pub fn start(users: u64) -> Self {
        let server = RedisServer::start();
        let fill = "for i = 0, ARGV[1] - 1 do \
            redis.call('SET', string.format('user:route:%012d', i), string.format('gw-%d.example.net:7000', i % 16)) end return 1";
        let (port, users_text) = (server.port.to_string(), users.to_string());
        let filled =
            Command::new("redis-cli").args(["-p", &port, "EVAL", fill, "0", &users_text]).output().expect("run redis-cli");
        assert_eq!(filled.stdout, b"1\n", "{filled:?}");
        Self { server, users }
    }

    /// GETs a second.
    pub async fn get(&self, connections: u64, calls: u64) -> f64 {
        self.ask((connections, 1), calls, &["GET".to_owned(), "user:route:__rand_int__".to_owned()]).await
    }

    /// MGETs a second of so many keys.
    pub async fn mget(&self, keys: u64, connections_pipelined: (u64, u64), calls: u64) -> f64 {
        let names = (0..keys).map(|_| "user:route:__rand_int__".to_owned());
        self.ask(connections_pipelined, calls, &["MGET".to_owned()].into_iter().chain(names).collect::<Vec<_>>()).await
    }

    async fn ask(&self, (connections, pipelined): (u64, u64), calls: u64, words: &[String]) -> f64 {
        let mut ask = Command::new("redis-benchmark");
        ask.args(["-h", "127.0.0.1", "--csv", "-p", &self.server.port.to_string(), "-r", &self.users.to_string()]);
        ask.args(["-c", &connections.to_string(), "-P", &pipelined.to_string(), "-n", &calls.to_string()]).args(words);
        let output = tokio::task::spawn_blocking(move || ask.output()).await.expect("a thread").expect("run redis-benchmark");
        rate_of(&output.stdout)
    }
}

/// What redis-benchmark says with `--csv`.
pub fn rate_of(output: &[u8]) -> f64 {
    let text = String::from_utf8_lossy(output);
    let rate = text.lines().last().and_then(|line| line.split("\",\"").nth(1)?.parse().ok());
    rate.unwrap_or_else(|| panic!("redis-benchmark says {text:?}"))
}

/// `SELECT ... IN` a second of `batch` users with their routes: one statement of plain text, no prepared one, nothing decoded.
pub async fn select_in(db: &TestDb, batch: u64, users: u64, time: Duration) -> f64 {
    let (done, began) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..SELECTERS {
        let (mut connection, done) = (db.connect().await, done.clone());
        clients.spawn(async move {
            for n in 0.. {
                if began.elapsed() >= time {
                    break;
                }
                let ids = (0..batch).map(|i| (1 + scatter(client << 48 | n << 16 | i) % users).to_string());
                let sql = format!(
                    "SELECT u.user_id, u.version, u.status, r.device_id, r.platform, r.epoch, r.conn_id, r.client_ip \
                     FROM users u LEFT JOIN routes r ON r.user_id = u.user_id WHERE u.user_id IN ({})",
                    ids.collect::<Vec<_>>().join(",")
                );
                let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut connection).await.expect("select");
                assert!(!rows.is_empty(), "users are there");
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    while clients.join_next().await.is_some() {}
    done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

/// Which share of a metric's series has this label value.
pub async fn share_of(node: &Node, metric: &str, label: &str) -> f64 {
    let series = node.series(metric).await;
    let sum: f64 = series.iter().map(|(_, value)| value).sum();
    series.iter().filter(|(labels, _)| labels.contains(&format!("\"{label}\""))).map(|(_, value)| value).sum::<f64>() / sum
}
