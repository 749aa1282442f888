//! One process of im-presence.

use std::io::BufRead;
use std::io::BufReader;
use std::net::SocketAddr;
use std::process::Child;
use std::process::ChildStderr;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::presence_service_client::PresenceServiceClient;
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

use crate::harness::eventually;
use crate::harness::ports::free_port;
use crate::harness::process;

const START_DEADLINE: Duration = Duration::from_secs(20);
/// The product promises 10 s from SIGTERM; a machine that builds something else meanwhile is given a little more.
const STOP_DEADLINE: Duration = Duration::from_secs(15);
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_im-presence");
const ENVIRONMENT_PREFIX: &str = "IM_PRESENCE__";

pub type Presence = PresenceServiceClient<Channel>;
/// Keys of the configuration and their values: `("ROUTE__MAX_DEVICES", "5")`.
pub type Settings = Vec<(String, String)>;

pub fn settings(pairs: &[(&str, &str)]) -> Settings {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub struct Node {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    program: Vec<String>,
    settings: Settings,
    process: Process,
    client: Presence,
}

/// What the admin port has answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// In lower case.
    pub head: String,
    pub body: String,
}

/// A process and what it logs.
pub struct Process {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Node {
    /// Starts a node and waits until it listens.
    pub async fn start(settings: Settings) -> Self {
        Self::start_as(vec![PROGRAM.to_owned()], settings).await
    }

    /// Starts a node whose wall clock is shifted, as in `+1h`. None: libfaketime is not installed.
    pub async fn start_with_clock(shift: &str, settings: Settings) -> Option<Self> {
        Self::start_with_faketime(format!("FAKETIME={shift}"), settings).await
    }

    /// Starts a node whose wall clock is shifted by what `file` says, whenever it says something else.
    pub async fn start_with_clock_of(file: &std::path::Path, settings: Settings) -> Option<Self> {
        Self::start_with_faketime(format!("FAKETIME_TIMESTAMP_FILE={}", file.display()), settings).await
    }

    async fn start_with_faketime(shift: String, settings: Settings) -> Option<Self> {
        let places = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib"];
        let mut libraries = places.iter().map(|place| format!("{place}/faketime/libfaketime.so.1"));
        let library = libraries.find(|library| std::path::Path::new(library).exists())?;
        let how = ["FAKETIME_DONT_FAKE_MONOTONIC=1", "FAKETIME_NO_CACHE=1"].map(str::to_owned);
        let program = ["env".to_owned(), format!("LD_PRELOAD={library}"), shift].into_iter().chain(how);
        Some(Self::start_as(program.chain([PROGRAM.to_owned()]).collect(), settings).await)
    }

    /// The same with another program, or in front of the daemon. It says where it listens, as the daemon does.
    pub async fn start_as(program: Vec<String>, settings: Settings) -> Self {
        let process = Process::start_as(&program, &settings);
        let (data, admin) = process.listening().await;
        let channel = Endpoint::from_shared(format!("http://{data}")).expect("an address").connect_lazy();
        // A node that is started again is found where it was.
        let ports = [("PRESENCE_SERVICE__PORT", data.port()), ("ADMIN__PORT", admin.port())];
        let mut settings = settings;
        settings.extend(ports.map(|(key, port)| (key.to_owned(), port.to_string())));
        Self { data, admin, program, settings, process, client: PresenceServiceClient::new(channel) }
    }

    /// All clients from here share a connection, which is made again when it breaks.
    pub fn presence(&self) -> Presence {
        self.client.clone()
    }

    /// A client with a connection of its own.
    pub fn new_connection(&self) -> Presence {
        PresenceServiceClient::new(Endpoint::from_shared(format!("http://{}", self.data)).expect("an address").connect_lazy())
    }

    /// The status and body that the admin port answers `GET path` with.
    pub async fn http(&self, path: &str) -> (u16, String) {
        self.http_as(path, None).await
    }

    /// The same, with this in the header `authorization`.
    pub async fn http_as(&self, path: &str, authorization: Option<&str>) -> (u16, String) {
        let headers: Vec<_> = authorization.map(|value| ("Authorization", value)).into_iter().collect();
        let answer = self.ask("GET", path, &headers, "").await;
        (answer.status, answer.body)
    }

    /// What the admin port answers. A header `Host` replaces that of the port's address.
    pub async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        ask(self.admin, method, path, headers, body).await
    }

    /// Exit code and output of `im-presence ctl` with these words, on this node.
    pub fn ctl(&self, words: &[&str]) -> (i32, String) {
        let mut command = Command::new(PROGRAM);
        let (data, admin) = (self.data.to_string(), self.admin.to_string());
        command.arg("ctl").args(words).env("IM_PRESENCE_ADDR", data).env("IM_PRESENCE_ADMIN", admin);
        let output = command.stdin(Stdio::null()).output().expect("run im-presence ctl");
        (output.status.code().expect("an exit code"), String::from_utf8(output.stdout).expect("text"))
    }

    /// What `/readyz` says is missing. The node has to be ready nevertheless.
    pub async fn degraded(&self) -> Vec<String> {
        let (status, body) = self.http("/readyz").await;
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).expect("JSON");
        let parts = body["degraded"].as_array().expect("a list");
        parts.iter().filter_map(|part| part.as_str().map(str::to_owned)).collect()
    }

    /// The sum over all series of this metric; 0 if there is none.
    pub async fn metric(&self, name: &str) -> f64 {
        self.series(name).await.iter().map(|(_, value)| value).sum()
    }

    /// Labels and value of each series of this metric.
    pub async fn series(&self, name: &str) -> Vec<(String, f64)> {
        let (_, text) = self.http("/metrics").await;
        let series = text.lines().filter_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            (labels.is_empty() || labels.starts_with('{')).then(|| (labels.to_owned(), value.parse().expect("a number")))
        });
        series.collect()
    }

    pub fn log(&self) -> Vec<String> {
        self.process.log()
    }

    pub fn stop(&self) {
        process::stand_still(&self.process.child);
    }

    pub fn cont(&self) {
        process::signal(&self.process.child, Signal::SIGCONT);
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    pub fn signal(&self, signal: Signal) {
        process::signal(&self.process.child, signal);
    }

    /// Asks it to end; [`Node::ended`] waits for that.
    pub fn terminate(&self) {
        process::signal(&self.process.child, Signal::SIGTERM);
    }

    pub async fn ended(&mut self) -> ExitStatus {
        self.process.ended(STOP_DEADLINE).await
    }

    /// Ends it and starts it again on the same ports, with these settings besides.
    pub async fn restart_with(&mut self, more: &[(&str, &str)]) {
        self.terminate();
        assert!(self.ended().await.success());
        let replaced = |key: &str| more.iter().any(|(other, _)| *other == key);
        self.settings.retain(|(key, _)| !replaced(key));
        self.settings.extend(settings(more));
        self.restart().await;
    }

    /// After it ended: with the same settings, on the same ports.
    pub async fn restart(&mut self) {
        self.process = Process::start_as(&self.program, &self.settings);
        self.process.listening().await;
    }

    /// What all its threads have used so far.
    #[allow(dead_code)] // benches do
    pub fn cpu_time(&self) -> Duration {
        const TICK: Duration = Duration::from_millis(10); // USER_HZ is 100 on every Linux
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.process.child.id())).expect("a running node");
        let (_, after_name) = text.rsplit_once(") ").expect("a name in parentheses");
        let numbers = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u32>().expect("a number"));
        TICK * numbers.sum()
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    pub fn rss_bytes(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.process.child.id())).expect("a running node");
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
        kib * 1024
    }
}

/// What an admin port answers. A header `Host` replaces that of the port's address.
pub async fn ask(admin: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut stream = TcpStream::connect(admin).await.expect("connect to the admin port");
    let host = headers.iter().any(|(name, _)| *name == "Host").then(String::new);
    let host = host.unwrap_or_else(|| format!("Host: {}\r\n", admin));
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    let request = format!("{method} {path} HTTP/1.1\r\n{host}{headers}{length}Connection: close\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.expect("ask the admin port");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("hear the admin port");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an HTTP answer");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer { status: status.expect("an HTTP status"), head: head.to_lowercase(), body: body.to_owned() }
}

impl Process {
    /// Runs the daemon with the given settings; whatever is not set has its default, the ports excepted.
    pub fn start(settings: &Settings) -> Self {
        Self::start_as(&[PROGRAM.to_owned()], settings)
    }

    /// The same with another program, or in front of the daemon.
    pub fn start_as(program: &[String], settings: &Settings) -> Self {
        let mut command = Command::new(&program[0]);
        command.args(&program[1..]);
        command.current_dir(std::env::temp_dir()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Not those that kernels give to others: a node that is started again has to find them free.
        let ports = [free_port(), free_port()].map(|port| port.to_string());
        command.env("IM_PRESENCE__PRESENCE_SERVICE__PORT", &ports[0]).env("IM_PRESENCE__ADMIN__PORT", &ports[1]);
        command.env("IM_PRESENCE__LOG__FORMAT", "json").env("RUST_BACKTRACE", "1");
        if program.iter().any(|word| word == PROGRAM) {
            command.env("IM_PRESENCE__PRESENCE_SERVICE__DRAIN_MS", "0"); // nobody here takes time to notice; other builds may not know the key
        }
        for (key, value) in settings {
            command.env(format!("{ENVIRONMENT_PREFIX}{key}"), value);
        }
        let mut child = process::spawn(command).expect("start im-presence");
        let lines = Arc::default();
        let reader = child.stderr.take().map(|stderr| collect(stderr, &lines));
        Self { child, lines, reader }
    }

    pub async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("look after im-presence") {
                if let Some(reader) = self.reader.take() {
                    reader.join().expect("read the log to its end");
                }
                return status;
            }
            assert!(began.elapsed() < deadline, "im-presence did not end within {deadline:?}:\n{}", self.log().join("\n"));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn log(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn listening(&self) -> (SocketAddr, SocketAddr) {
        eventually("the node listens", START_DEADLINE, async || self.addresses().is_some() || self.log_ended()).await;
        self.addresses().unwrap_or_else(|| panic!("im-presence did not start:\n{}", self.log().join("\n")))
    }

    fn log_ended(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn addresses(&self) -> Option<(SocketAddr, SocketAddr)> {
        let lines = self.log();
        let mut parsed = lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let line = parsed.find(|line| line["message"].as_str().is_some_and(|text| text.starts_with("listening")))?;
        let address = |key: &str| line[key].as_str().and_then(|address| address.parse().ok());
        Some((address("listen.data")?, address("listen.admin")?))
    }

    fn kill(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        self.child.wait().expect("wait for im-presence");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("read the log to its end");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let log = self.log();
        if std::thread::panicking() {
            eprintln!("--- log of im-presence, process {}\n{}", self.child.id(), log.join("\n"));
            return;
        }
        assert!(!log.iter().any(|line| line.contains("panicked at")), "im-presence panicked:\n{}", log.join("\n"));
    }
}

fn collect(stderr: ChildStderr, lines: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let lines = lines.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    })
}
