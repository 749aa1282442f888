//! What a service would have instead of Watch: a channel that as many subscribe to, and PUBLISH.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::eventually;
use crate::harness::redis::RedisServer;
use crate::load::server::cpu_time;

const CHANNEL: &str = "presence";
/// A user, a status, a short text and times would fit.
const MESSAGE_BYTES: usize = 60;
const HEARD_WITHIN: Duration = Duration::from_secs(120);

/// So many who subscribe, each on a connection of its own, because a connection hears a channel once.
pub struct Subscribers {
    redis: RedisServer,
    pid: u32,
    count: u64,
    heard: Arc<AtomicU64>,
    _tasks: JoinSet<()>,
}

impl Subscribers {
    pub async fn open(count: u64) -> Self {
        let (redis, heard, mut tasks) = (RedisServer::start(), Arc::new(AtomicU64::new(0)), JoinSet::new());
        for _ in 0..count {
            let mut stream = TcpStream::connect(redis.address()).await.expect("connect to Redis");
            stream.write_all(format!("SUBSCRIBE {CHANNEL}\r\n").as_bytes()).await.expect("subscribe");
            let mut confirmed = vec![0; format!("*3\r\n$9\r\nsubscribe\r\n$8\r\n{CHANNEL}\r\n:1\r\n").len()];
            stream.read_exact(&mut confirmed).await.expect("subscribed");
            tasks.spawn(count_bytes(stream, heard.clone()));
        }
        let pid = redis.pid().await;
        Self { redis, pid, count, heard, _tasks: tasks }
    }

    /// Messages a second that all of them hear while redis-benchmark publishes as fast as it can.
    pub async fn most_per_second(&self, published: u64) -> f64 {
        let (port, calls, message) = (self.redis.port.to_string(), published.to_string(), message());
        let (before, began) = (self.heard.load(Ordering::Acquire), Instant::now());
        let mut publish = Command::new("redis-benchmark");
        publish.args(["-p", &port, "-c", "50", "-n", &calls, "--csv", "PUBLISH", CHANNEL, &message]);
        let output = tokio::task::spawn_blocking(move || publish.output()).await.expect("a thread").expect("redis-benchmark");
        assert!(output.status.success(), "{output:?}");
        self.hear(before, published).await as f64 / began.elapsed().as_secs_f64()
    }

    /// Microseconds of Redis for each message that is heard, while so many are published a second.
    pub async fn micros_each(&self, rate: f64, time: Duration) -> f64 {
        let published = (rate * time.as_secs_f64()) as u64;
        let (mut stream, message) = (TcpStream::connect(self.redis.address()).await.expect("connect to Redis"), message());
        let command = format!("*3\r\n$7\r\nPUBLISH\r\n$8\r\n{CHANNEL}\r\n${MESSAGE_BYTES}\r\n{message}\r\n");
        let (before, cpu, began) = (self.heard.load(Ordering::Acquire), cpu_time(self.pid), Instant::now());
        for n in 0..published {
            tokio::time::sleep_until((began + Duration::from_secs_f64(n as f64 / rate)).into()).await;
            stream.write_all(command.as_bytes()).await.expect("Redis reads");
        }
        let heard = self.hear(before, published).await;
        (cpu_time(self.pid) - cpu).as_secs_f64() * 1e6 / heard as f64
    }

    /// Waits until all have heard what was published, and says how many messages that were.
    async fn hear(&self, before: u64, published: u64) -> u64 {
        let bytes = format!("*3\r\n$7\r\nmessage\r\n$8\r\n{CHANNEL}\r\n${MESSAGE_BYTES}\r\n{}\r\n", message()).len() as u64;
        let all = self.count * published;
        let heard = async || self.heard.load(Ordering::Acquire) - before == all * bytes;
        eventually("all is heard", HEARD_WITHIN, heard).await;
        all
    }
}

fn message() -> String {
    "m".repeat(MESSAGE_BYTES)
}

/// Bytes, which costs the reader less than messages.
async fn count_bytes(mut stream: TcpStream, heard: Arc<AtomicU64>) {
    let mut chunk = vec![0; 1 << 16];
    while let Ok(n @ 1..) = stream.read(&mut chunk).await {
        heard.fetch_add(n as u64, Ordering::Release);
    }
}
