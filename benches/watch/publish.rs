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

const CHANNEL: &str = "presence";
/// As long as a telling of Watch with a status text, its frame included.
const MESSAGE_BYTES: usize = 60;
const HEARD_WITHIN: Duration = Duration::from_secs(120);

/// Messages a second that so many subscribers hear, each on a connection of its own, because a connection hears a channel once.
pub async fn heard_per_second(redis: &RedisServer, subscribers: u64, published: u64) -> f64 {
    let (heard, mut tasks) = (Arc::new(AtomicU64::new(0)), JoinSet::new());
    for _ in 0..subscribers {
        let mut stream = TcpStream::connect(redis.address()).await.expect("connect to Redis");
        stream.write_all(format!("SUBSCRIBE {CHANNEL}\r\n").as_bytes()).await.expect("subscribe");
        let mut confirmed = vec![0; format!("*3\r\n$9\r\nsubscribe\r\n$8\r\n{CHANNEL}\r\n:1\r\n").len()];
        stream.read_exact(&mut confirmed).await.expect("subscribed");
        tasks.spawn(count(stream, heard.clone()));
    }
    let (port, calls, began) = (redis.port.to_string(), published.to_string(), Instant::now());
    let message = "m".repeat(MESSAGE_BYTES);
    let mut publish = Command::new("redis-benchmark");
    publish.args(["-p", &port, "-c", "50", "-n", &calls, "--csv", "PUBLISH", CHANNEL, &message]);
    let output = tokio::task::spawn_blocking(move || publish.output()).await.expect("a thread").expect("run redis-benchmark");
    assert!(output.status.success(), "{output:?}");
    let bytes = format!("*3\r\n$7\r\nmessage\r\n$8\r\n{CHANNEL}\r\n${MESSAGE_BYTES}\r\n{message}\r\n").len() as u64;
    let all = subscribers * published;
    eventually("all is heard", HEARD_WITHIN, async || heard.load(Ordering::Acquire) == all * bytes).await;
    all as f64 / began.elapsed().as_secs_f64()
}

/// Bytes, which costs the reader less than messages.
async fn count(mut stream: TcpStream, heard: Arc<AtomicU64>) {
    let mut chunk = vec![0; 1 << 16];
    while let Ok(n @ 1..) = stream.read(&mut chunk).await {
        heard.fetch_add(n as u64, Ordering::Release);
    }
}
