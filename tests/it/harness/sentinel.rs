//! Redis Sentinels: `redis-server --sentinel`.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use redis::RedisResult;
use redis::aio::MultiplexedConnection;

use crate::harness::eventually;
use crate::harness::mariadb::free_port;
use crate::harness::mariadb::scratch;
use crate::harness::node::Settings;
use crate::harness::place::Place;
use crate::harness::process;
use crate::harness::redis::RedisServer;

pub const MASTER: &str = "mymaster";
/// How long a primary has to be silent to be believed dead.
pub const DOWN_AFTER: Duration = Duration::from_millis(1_000);
const START_DEADLINE: Duration = Duration::from_secs(20);

pub struct Sentinel {
    child: Child,
    directory: PathBuf,
    place: Place,
    pub port: u16,
}

impl Sentinel {
    /// Watches over a primary, of whose death so many sentinels have to be sure.
    pub fn start(primary: &RedisServer, quorum: usize) -> Self {
        Self::start_with(primary, quorum, "")
    }

    /// The same, with more lines in its file.
    pub fn start_with(primary: &RedisServer, quorum: usize, more: &str) -> Self {
        Self::start_at(Place::default(), primary, quorum, more)
    }

    /// The same elsewhere.
    pub fn start_at(place: Place, primary: &RedisServer, quorum: usize, more: &str) -> Self {
        let (host, primary_port) = primary.address();
        let (directory, port) = (scratch("sentinel"), free_port());
        fs::create_dir_all(&directory).expect("make a directory");
        let file = directory.join("sentinel.conf");
        let settings = format!(
            "port {port}\nbind {}\nprotected-mode no\ndir {}\nsentinel monitor {MASTER} {host} {primary_port} {quorum}\n\
             sentinel down-after-milliseconds {MASTER} {}\nsentinel failover-timeout {MASTER} 6000\n{more}",
            place.host,
            directory.display(),
            DOWN_AFTER.as_millis()
        );
        fs::write(&file, settings).expect("write the sentinel's file");
        let log = fs::File::create(directory.join("log")).expect("make a log");
        let mut command = place.command("redis-server");
        command.arg(&file).arg("--sentinel").stdin(Stdio::null()).stdout(log).stderr(Stdio::null());
        let child = process::spawn(command).expect("start a sentinel");
        Self { child, directory, place, port }
    }

    /// Three that know of each other and of the primary's replicas.
    pub async fn three(primary: &RedisServer, replicas: usize) -> Vec<Self> {
        let all: Vec<Self> = (0..3).map(|_| Self::start(primary, 2)).collect();
        Self::know_each_other(&all, replicas).await;
        all
    }

    /// Three wait until each of them knows the others and the primary's replicas.
    pub async fn know_each_other(all: &[Self], replicas: usize) {
        for one in all {
            eventually("the sentinel knows the others", START_DEADLINE, async || {
                let said = one.says().await.unwrap_or_default();
                let number = |name: &str| said.get(name).and_then(|value| value.parse().ok()) == Some(2_usize);
                let followed = said.get("num-slaves").and_then(|value| value.parse().ok()) == Some(replicas);
                number("num-other-sentinels") && followed
            })
            .await;
        }
    }

    /// What it says of the primary.
    pub async fn says(&self) -> RedisResult<HashMap<String, String>> {
        self.run(&["SENTINEL", "MASTER", MASTER]).await
    }

    pub async fn run<T: redis::FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let client = redis::Client::open((&*self.place.host, self.port))?;
        let mut connection: MultiplexedConnection = client.get_multiplexed_async_connection().await?;
        redis::cmd(words[0]).arg(&words[1..]).query_async(&mut connection).await
    }

    pub fn kill(&mut self) {
        let _ = (self.child.kill(), self.child.wait()); // it may be dead
    }

    /// It stands still: connections are taken, and nothing is answered.
    pub fn stop(&self) {
        process::stand_still(&self.child);
    }

    pub fn cont(&self) {
        process::signal(&self.child, Signal::SIGCONT);
    }
}

/// Both uses of Redis, found by these sentinels.
pub fn settings_of(sentinels: &[&Sentinel]) -> Settings {
    let nodes: Vec<String> = sentinels.iter().map(|one| format!("\"{}:{}\"", one.place.host, one.port)).collect();
    let nodes = format!("[{}]", nodes.join(", "));
    let keys = ["REDIS_CACHE", "REDIS_QUEUE"]
        .map(|section| [(format!("{section}__MODE"), "sentinel".to_owned()), (format!("{section}__NODES"), nodes.clone())]);
    keys.into_iter().flatten().collect()
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}
