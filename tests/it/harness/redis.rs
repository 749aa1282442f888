//! Private Redis servers, and a plain client beside them. Needs `redis-server`; `tests/run` installs it.

use std::fs;
use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use nix::sys::signal::Signal;
use redis::FromRedisValue;
use redis::aio::MultiplexedConnection;
use redis::aio::PubSub;
use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::io::BufReader;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_stream::StreamExt;

use crate::harness::allowed;
use crate::harness::eventually;
use crate::harness::mariadb::free_port;
use crate::harness::mariadb::scratch;
use crate::harness::place::Place;
use crate::harness::process;

const START_DEADLINE: Duration = Duration::from_secs(20);
const START_ATTEMPTS: u32 = 3;
const SYNC_DEADLINE: Duration = Duration::from_secs(10);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// A server of one test. It saves nothing by itself.
pub struct RedisServer {
    child: Mutex<Child>,
    directory: PathBuf,
    /// Beyond what every server is started with.
    options: Vec<String>,
    place: Place,
    pub port: u16,
}

impl RedisServer {
    pub fn start() -> Self {
        Self::start_with(Vec::new())
    }

    pub fn start_with(options: Vec<String>) -> Self {
        Self::start_at(Place::default(), options)
    }

    /// The same elsewhere.
    pub fn start_at(place: Place, options: Vec<String>) -> Self {
        let directory = scratch("redis");
        fs::create_dir_all(&directory).expect("make a directory");
        for _ in 0..START_ATTEMPTS {
            let port = free_port();
            let mut child = launch(&place, &directory, port, &options);
            if answers(&mut child, &place.host, port) {
                return Self { child: Mutex::new(child), directory, options, place, port };
            }
        }
        panic!("redis-server does not start; its last words:\n{}", last_words(&directory));
    }

    /// It stands still: connections stay open, nothing is answered.
    pub fn stop(&self) {
        process::stand_still(&self.child());
    }

    pub fn cont(&self) {
        process::signal(&self.child(), Signal::SIGCONT);
    }

    /// Everything since the last [`RedisServer::dump`] is lost.
    pub fn kill(&self) {
        let mut child = self.child();
        child.kill().expect("kill redis-server");
        child.wait().expect("wait for redis-server");
    }

    /// After [`RedisServer::kill`]: on the same port, with what was dumped last.
    pub fn restart(&self) {
        let mut child = self.child();
        *child = launch(&self.place, &self.directory, self.port, &self.options);
        assert!(
            answers(&mut child, &self.place.host, self.port),
            "redis-server does not come back:\n{}",
            last_words(&self.directory)
        );
    }

    /// Writes everything to disk; done when this returns.
    pub async fn dump(&self) {
        self.client().await.run::<()>(&["SAVE"]).await;
    }

    /// Copies everything of `master`, and follows it from then on.
    pub async fn replica_of(&self, master: &RedisServer) {
        let client = self.client().await;
        client.run::<()>(&["REPLICAOF", &master.place.host, &master.port.to_string()]).await;
        eventually("the replica follows", SYNC_DEADLINE, async || {
            client.run::<String>(&["INFO", "replication"]).await.contains("master_link_status:up")
        })
        .await;
    }

    /// Follows nobody any more, and takes writes.
    pub async fn promote(&self) {
        self.client().await.run::<()>(&["REPLICAOF", "NO", "ONE"]).await;
    }

    /// A client that ends with its connection: after a restart, make another.
    pub async fn client(&self) -> RedisClient {
        let connection = self.open().get_multiplexed_async_connection().await.expect("connect to Redis");
        RedisClient { connection }
    }

    /// A key's value, over a connection of its own. None, too, if that ends.
    pub async fn try_get(&self, key: &str) -> Option<String> {
        let mut connection = self.open().get_multiplexed_async_connection().await.ok()?;
        redis::cmd("GET").arg(key).query_async(&mut connection).await.ok()?
    }

    /// Hears these channels from when this returns.
    pub async fn subscribe(&self, channels: &[&str]) -> Subscriber {
        let mut pubsub = self.open().get_async_pubsub().await.expect("connect to Redis");
        for channel in channels {
            pubsub.subscribe(*channel).await.expect("subscribe");
        }
        Subscriber { pubsub }
    }

    /// Hears this channel of the shard that the server is of.
    pub async fn subscribe_to_shard(&self, channel: &str) -> ShardSubscriber {
        let mut stream = BufReader::new(TcpStream::connect((&*self.place.host, self.port)).await.expect("connect to Redis"));
        stream.write_all(format!("SSUBSCRIBE {channel}\r\n").as_bytes()).await.expect("subscribe");
        let mut subscriber = ShardSubscriber { stream };
        let confirmed = subscriber.texts().await;
        assert_eq!(confirmed[0], b"ssubscribe", "{confirmed:?}");
        subscriber
    }

    /// Hears every channel.
    pub async fn subscribe_to_all(&self) -> Subscriber {
        let mut pubsub = self.open().get_async_pubsub().await.expect("connect to Redis");
        pubsub.psubscribe("*").await.expect("subscribe");
        Subscriber { pubsub }
    }

    /// Of the server itself, whatever started it.
    #[allow(dead_code)] // benches need it
    pub async fn pid(&self) -> u32 {
        let info: String = self.client().await.run(&["INFO", "server"]).await;
        info.lines().find_map(|line| line.strip_prefix("process_id:")?.parse().ok()).expect("a process id")
    }

    pub fn address(&self) -> (&str, u16) {
        (&self.place.host, self.port)
    }

    fn open(&self) -> redis::Client {
        redis::Client::open((&*self.place.host, self.port)).expect("an address")
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        let mut child = self.child();
        let _ = (child.kill(), child.wait()); // a test may have killed it
        drop(child);
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}

/// A port behind which now one server stands, now another: what a failover looks like to clients.
pub struct Switch {
    pub port: u16,
    server: Arc<watch::Sender<u16>>,
    cut: watch::Sender<()>,
    _connections: JoinSet<()>,
}

impl Switch {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let (server, mut connections) = (Arc::new(watch::Sender::new(server_port)), JoinSet::new());
        let (current, cut) = (server.clone(), watch::Sender::new(()));
        let cuts = cut.subscribe();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                links.spawn(link(client, *current.borrow(), cuts.clone()));
            }
        });
        Self { port, server, cut, _connections: connections }
    }

    /// Cuts all connections; who connects from now on meets this server.
    pub fn to(&self, server_port: u16) {
        self.send_new_ones_to(server_port);
        self.cut.send_replace(());
    }

    /// Who connects from now on meets this server; who is connected stays where they are.
    pub fn send_new_ones_to(&self, server_port: u16) {
        self.server.send_replace(server_port);
    }
}

async fn link(mut client: TcpStream, port: u16, mut cut: watch::Receiver<()>) {
    cut.mark_unchanged();
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true)); // slower, not wrong, without
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        _ = cut.changed() => {}
    }
}

/// What another service, or an operator with `redis-cli`, can do.
#[derive(Clone)]
pub struct RedisClient {
    connection: MultiplexedConnection,
}

impl RedisClient {
    pub async fn run<T: FromRedisValue>(&self, words: &[&str]) -> T {
        let mut command = redis::cmd(words[0]);
        command.arg(&words[1..]);
        command.query_async(&mut self.connection.clone()).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub async fn get(&self, key: &str) -> Option<String> {
        self.run(&["GET", key]).await
    }

    pub async fn get_many(&self, keys: &[String]) -> Vec<Option<Vec<u8>>> {
        let words: Vec<&str> = std::iter::once("MGET").chain(keys.iter().map(String::as_str)).collect();
        self.run(&words).await
    }

    /// The same one by one, for keys that are in several slots. What cannot be read is None.
    pub async fn get_each(&self, keys: &[&str]) -> Vec<Option<Vec<u8>>> {
        if keys.is_empty() {
            return Vec::new();
        }
        let mut pipe = redis::pipe();
        for key in keys {
            pipe.cmd("GET").arg(key);
        }
        let mut connection = self.connection.clone();
        let read = pipe.ignore_errors().query_async::<Vec<redis::RedisResult<Option<Vec<u8>>>>>(&mut connection).await;
        let values = read.unwrap_or_else(|error| panic!("{keys:?}: {error}"));
        values.into_iter().map(|value| value.ok().flatten()).collect()
    }

    /// In seconds; -1: the key is there for good; -2: there is no such key.
    pub async fn ttl(&self, key: &str) -> i64 {
        self.run(&["TTL", key]).await
    }

    pub async fn has(&self, key: &str) -> bool {
        self.run(&["EXISTS", key]).await
    }

    pub async fn keys(&self, pattern: &str) -> Vec<String> {
        self.run(&["KEYS", pattern]).await
    }
}

pub struct Subscriber {
    pubsub: PubSub,
}

impl Subscriber {
    /// The next message, as channel and body.
    pub async fn next(&mut self, deadline: Duration) -> Option<(String, Vec<u8>)> {
        let message = timeout(deadline, self.pubsub.on_message().next()).await.ok()??;
        Some((message.get_channel_name().to_owned(), message.get_payload_bytes().to_vec()))
    }

    /// The next message's body as text.
    pub async fn text(&mut self, deadline: Duration) -> String {
        let (_, body) = self.next(allowed(deadline)).await.unwrap_or_else(|| panic!("no message within {deadline:?}"));
        String::from_utf8(body).expect("text")
    }

    /// Waits for a message with this body; others are passed over.
    pub async fn hears(&mut self, body: &str, deadline: Duration) {
        let began = Instant::now();
        while let Some((_, heard)) = self.next(allowed(deadline).saturating_sub(began.elapsed())).await {
            if heard == body.as_bytes() {
                return;
            }
        }
        panic!("{body:?} was not heard within {deadline:?}");
    }
}

/// The client library of the tests has no word for this.
pub struct ShardSubscriber {
    stream: BufReader<TcpStream>,
}

impl ShardSubscriber {
    /// The next message, as channel and body.
    pub async fn next(&mut self, deadline: Duration) -> Option<(String, Vec<u8>)> {
        let [_, channel, body] = timeout(deadline, self.texts()).await.ok()?.try_into().expect("a message");
        Some((String::from_utf8(channel).expect("text"), body))
    }

    /// The three texts, or numbers, of a list.
    async fn texts(&mut self) -> Vec<Vec<u8>> {
        let mut texts = Vec::new();
        assert_eq!(self.line().await, "*3");
        for _ in 0..3 {
            let line = self.line().await;
            match line.strip_prefix('$') {
                None => texts.push(line.into_bytes()),
                Some(length) => {
                    let mut text = vec![0; length.parse::<usize>().expect("a length") + 2];
                    self.stream.read_exact(&mut text).await.expect("a text");
                    text.truncate(text.len() - 2);
                    texts.push(text);
                }
            }
        }
        texts
    }

    async fn line(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).await.expect("a line");
        line.trim_end().to_owned()
    }
}

fn launch(place: &Place, directory: &Path, port: u16, options: &[String]) -> Child {
    let log = File::options().create(true).append(true).open(directory.join("stderr.log")).expect("open the server's log");
    let output = log.try_clone().expect("share the server's log");
    let mut command = place.command("redis-server");
    command
        .args(["--save", "", "--appendonly", "no", "--bind", &place.host, "--protected-mode", "no"])
        .args(["--repl-diskless-sync-delay", "0"])
        .arg("--dir")
        .arg(directory)
        .args(["--port", &port.to_string()])
        .args(options)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(log);
    process::spawn(command).expect("start redis-server: run tests/run, or apt-get install redis-server")
}

/// Whether the server answers a ping. False: it has ended.
fn answers(child: &mut Child, host: &str, port: u16) -> bool {
    let began = Instant::now();
    while began.elapsed() < START_DEADLINE {
        if child.try_wait().expect("look after redis-server").is_some() {
            return false;
        }
        if pong(host, port) {
            return true;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    panic!("redis-server did not answer within {START_DEADLINE:?}");
}

fn pong(host: &str, port: u16) -> bool {
    let Ok(mut stream) = std::net::TcpStream::connect((host, port)) else { return false };
    let mut answer = [0; 5];
    let asked = stream.set_read_timeout(Some(START_DEADLINE)).and_then(|()| stream.write_all(b"PING\r\n"));
    asked.and_then(|()| stream.read_exact(&mut answer)).is_ok() && &answer == b"+PONG"
}

fn last_words(directory: &Path) -> String {
    let text = fs::read_to_string(directory.join("stderr.log")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
