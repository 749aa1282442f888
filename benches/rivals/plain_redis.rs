//! Plain Redis: keys with a time to live, which whoever holds them has to renew. Looked up and written by redis-benchmark, whose
//! one event loop costs less than any client that a service could use; filled by a pipeline.

use std::process::Command;
use std::time::Duration;
use std::time::Instant;

use redis::Pipeline;

use crate::Figures;
use crate::Rival;
use crate::Shape;
use crate::VALUE;
use crate::harness::redis::RedisServer;
use crate::load::server::cpu_time;
use crate::load::server::rss_bytes;
use crate::load::stores::rate_of;

/// Users of one pipeline.
const PIPELINED: u64 = 1_000;
/// What redis-benchmark puts a number of twelve digits for. They stand for users from 0 on.
const RANDOM: &str = "__rand_int__";
const GONE_WITHIN: Duration = Duration::from_secs(60);

/// What is under the keys of a user.
#[derive(Clone, Copy, PartialEq)]
pub enum Keys {
    /// All in one.
    One,
    /// Route, status, device and address, each under a key of its own.
    Four,
}

/// When it is written to the disk.
#[derive(Clone, Copy)]
pub enum Log {
    /// As Debian ships it: a snapshot now and then.
    Snapshots,
    /// Before each answer.
    Always,
}

pub struct PlainRedis {
    server: RedisServer,
    pid: u32,
    keys: Keys,
    log: Log,
}

impl PlainRedis {
    pub async fn start(keys: Keys, log: Log) -> Self {
        let options: &[&str] = match log {
            Log::Snapshots => &["--save", "3600 1 300 100 60 10000"],
            Log::Always => &["--appendonly", "yes", "--appendfsync", "always"],
        };
        let server = RedisServer::start_with(options.iter().map(|option| (*option).to_owned()).collect());
        let pid = server.pid().await;
        let mut pin = Command::new("taskset");
        let pinned = pin.args(["-a", "-p", "-c", &crate::SERVER.to_string(), &pid.to_string()]).output();
        assert!(pinned.is_ok_and(|output| output.status.success()), "taskset");
        Self { server, pid, keys, log }
    }

    /// Redis is busy freeing them for longer than a client waits, unless it does so beside its work.
    async fn forget_all(&self) {
        self.server.client().await.run::<()>(&["FLUSHALL", "ASYNC"]).await;
    }

    /// The keys of a user, and what is there.
    fn of(&self, user: &str) -> Vec<(String, &'static str)> {
        match self.keys {
            Keys::One => vec![(format!("user:{user}"), VALUE)],
            Keys::Four => {
                let parts =
                    [("route", "gw-12.example.net:7000"), ("status", "1"), ("device", "phone"), ("addr", "192.0.2.17:40000")];
                parts.map(|(part, value)| (format!("user:{part}:{user}"), value)).into()
            }
        }
    }

    /// Writes users from `first` on, for good or for `lease`. All are acknowledged when this returns.
    async fn write(&self, first: u64, users: u64, lease: Option<Duration>) {
        let client = redis::Client::open(("127.0.0.1", self.server.port)).expect("an address");
        let mut connection = client.get_multiplexed_async_connection().await.expect("connect to Redis");
        let mut from = first;
        while from < first + users {
            let to = (first + users).min(from + PIPELINED);
            let mut pipe = Pipeline::new();
            for (key, value) in (from..to).flat_map(|user| self.of(&digits(user))) {
                let set = pipe.cmd("SET").arg(key).arg(value);
                if let Some(lease) = lease {
                    set.arg("PX").arg(lease.as_millis() as u64);
                }
                set.ignore();
            }
            pipe.query_async::<()>(&mut connection).await.expect("Redis answers");
            from = to;
        }
    }

    async fn count(&self) -> u64 {
        let keys: u64 = self.server.client().await.run(&["DBSIZE"]).await;
        keys / self.of("").len() as u64
    }

    /// How often a second redis-benchmark is answered to these words, for about `time`.
    async fn ask(&self, (connections, pipelined): Shape, users: u64, time: Duration, words: &[String]) -> f64 {
        const TRIED: u64 = 2_000;
        let rate = self.ask_times((connections, pipelined), users, TRIED, words).await;
        let calls = (rate * time.as_secs_f64()) as u64;
        self.ask_times((connections, pipelined), users, calls.max(TRIED), words).await
    }

    async fn ask_times(&self, (connections, pipelined): Shape, users: u64, calls: u64, words: &[String]) -> f64 {
        let mut ask = Command::new("taskset");
        ask.args(["-c", &crate::LOADER.to_string(), "redis-benchmark", "-h", "127.0.0.1", "--csv"]);
        ask.args(["-p", &self.server.port.to_string(), "-r", &users.to_string(), "-n", &calls.to_string()]);
        ask.args(["-c", &connections.to_string(), "-P", &pipelined.to_string()]).args(words);
        let output = tokio::task::spawn_blocking(move || ask.output()).await.expect("a thread").expect("run redis-benchmark");
        rate_of(&output.stdout)
    }
}

impl Rival for PlainRedis {
    fn name(&self) -> String {
        let keys = if self.keys == Keys::One { "one key a user" } else { "four keys a user" };
        let log = match self.log {
            Log::Snapshots => "snapshots (as Debian has it)",
            Log::Always => "appendfsync always",
        };
        format!("plain Redis, {keys}, {log}")
    }

    async fn fill(&mut self, users: u64) {
        self.write(0, users, None).await;
    }

    async fn lookups(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let key = &self.of(RANDOM)[0].0;
        // Each of a user's keys is asked for by itself, one after the other.
        self.ask(shape, users, time, &["GET".to_owned(), key.clone()]).await / self.of("").len() as f64
    }

    async fn binds(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let pairs = self.of(RANDOM).into_iter().flat_map(|(key, value)| [key, value.to_owned()]);
        self.ask(shape, users, time, &["MSET".to_owned()].into_iter().chain(pairs).collect::<Vec<_>>()).await
    }

    async fn death(&mut self, users: u64, lease: Duration) -> Figures {
        self.forget_all().await;
        self.write(0, users, Some(lease)).await;
        let cpu = cpu_time(self.pid);
        self.write(0, users, Some(lease)).await;
        let end = Instant::now() + lease;
        let cpu_of_a_beat = cpu_time(self.pid) - cpu;
        // The last one renewed is the last to be seen.
        let (last, _) = self.of(&digits(users - 1)).pop().expect("a key");
        let client = self.server.client().await;
        while client.has(&last).await {
            assert!(end.elapsed() < GONE_WITHIN, "keys stay");
            tokio::time::sleep(crate::LOOK).await;
        }
        Figures { beyond_the_lease: end.elapsed(), cpu_of_a_beat }
    }

    fn rss_bytes(&self) -> u64 {
        rss_bytes(self.pid)
    }

    async fn lost(&mut self, users: u64) -> u64 {
        self.forget_all().await;
        self.write(crate::FIRST_LOST, users, None).await;
        self.server.kill();
        self.server.restart();
        users - self.count().await
    }
}

/// As redis-benchmark writes numbers.
fn digits(user: u64) -> String {
    format!("{user:012}")
}
