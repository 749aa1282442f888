//! What is around the process: who reads its log, signals, file limits, half requests, its own address.

use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Process;
use crate::harness::process;

const SOON: Duration = Duration::from_secs(2);
const STOPS_WITHIN: Duration = Duration::from_secs(10);
const ENDS_WITHIN: Duration = Duration::from_secs(15);

/// A daemon whose stderr goes to `stderr`, with its admin port. Only `/livez` and signals tell how it is.
struct Bare {
    child: std::process::Child,
    data: u16,
    admin: u16,
    _db: TestDb,
}

impl Bare {
    async fn start(stderr: impl Into<Stdio>) -> Self {
        Self::start_with(Stdio::null(), stderr).await
    }

    async fn start_with(stdout: impl Into<Stdio>, stderr: impl Into<Stdio>) -> Self {
        let (db, data, admin) = (TestDb::sqlite(), free_port(), free_port());
        let mut command = Command::new(PROGRAM);
        command.env("IM_PRESENCE__STORE__URL", &db.url).env("IM_PRESENCE__LOG__LEVEL", "trace");
        command.env("IM_PRESENCE__PRESENCE_SERVICE__PORT", data.to_string()).env("IM_PRESENCE__ADMIN__PORT", admin.to_string());
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let this = Self { child: process::spawn(command).expect("start im-presence"), data, admin, _db: db };
        eventually("it answers", ENDS_WITHIN, async || this.is_alive()).await;
        this
    }

    fn get(&self, path: &str) -> Option<String> {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.admin)).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    fn log_lines_dropped(&self) -> f64 {
        let metrics = self.get("/metrics").unwrap_or_default();
        let line = metrics.lines().find(|line| line.starts_with("im_presence_log_lines_dropped_total"));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0.0)
    }

    fn is_alive(&self) -> bool {
        self.get("/livez").is_some_and(|answer| answer.contains("alive"))
    }

    fn bind(&self, user: i64) -> bool {
        let (user, addr) = (user.to_string(), format!("127.0.0.1:{}", self.data));
        let mut bind = Command::new(PROGRAM);
        bind.args(["ctl", "--addr", &addr, "bind", &user, "gw-1:7000"]).stdout(Stdio::null());
        bind.status().expect("run ctl").success()
    }

    async fn stops(mut self) {
        process::signal(&self.child, Signal::SIGTERM);
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("look after im-presence") {
                break status;
            }
            assert!(began.elapsed() < allowed(STOPS_WITHIN), "SIGTERM does nothing");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(status.code(), Some(0), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_who_reads_the_log_can_stop_the_service() {
    let (unread, full) = std::io::pipe().unwrap();
    let (closed, broken) = std::io::pipe().unwrap();
    drop(closed);
    let disk_full = File::options().write(true).open("/dev/full").unwrap();
    for (what, stderr) in
        [("nobody reads", OwnedFd::from(full)), ("closed", OwnedFd::from(broken)), ("disk full", OwnedFd::from(disk_full))]
    {
        let node = Bare::start(stderr).await;
        // Each call of ctl leaves hundreds of lines at this level. Far more than a pipe and the queue hold.
        for user in 1..=3 {
            assert!(node.bind(user), "{what}");
        }
        if what == "nobody reads" {
            eventually("lines are dropped", 2 * ENDS_WITHIN, async || node.bind(ALICE) && node.log_lines_dropped() > 0.0).await;
        }
        assert!(node.is_alive(), "{what}");
        node.stops().await;
    }
    drop(unread);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_two_outputs_are_one_pipe_that_nobody_reads_still_stops() {
    let (unread, full) = std::io::pipe().unwrap();
    let node = Bare::start_with(full.try_clone().unwrap(), full).await;
    eventually("lines are dropped", 2 * ENDS_WITHIN, async || node.bind(ALICE) && node.log_lines_dropped() > 0.0).await;
    node.stops().await;
    drop(unread);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_start_ends_although_nobody_reads_why() {
    let (unread, full) = std::io::pipe().unwrap();
    let mut filler = full.try_clone().unwrap();
    let filled = std::thread::spawn(move || while filler.write_all(b"x").is_ok() {}); // ends with its reader
    tokio::time::sleep(SOON / 4).await;
    let mut command = Command::new(PROGRAM);
    command.env("IM_PRESENCE__STORE__URL", "sqlite::memory:").stdin(Stdio::null()).stdout(full.try_clone().unwrap()).stderr(full);
    let mut child = process::spawn(command).expect("start im-presence");
    eventually("it ends", allowed(Duration::from_secs(5)), async || child.try_wait().expect("look").is_some()).await;
    assert_eq!(child.wait().expect("it ended").code(), Some(2));
    drop((unread, child));
    filled.join().unwrap();
}

#[test]
fn a_closed_pipe_ends_every_command_quietly() {
    for words in [&["--help"][..], &["check-config"], &["ctl", "--help"], &["ctl", "query", "1"], &["health"], &["no-such"]] {
        let (read, write) = std::io::pipe().unwrap();
        drop(read);
        let mut command = Command::new(PROGRAM);
        command.args(words).stdin(Stdio::null()).stdout(write.try_clone().unwrap()).stderr(write);
        let status = command.status().expect("run im-presence");
        assert!(status.code().is_some_and(|code| code < 100), "{words:?}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hangup_drains_like_a_request_to_end() {
    let mut cluster = Cluster::sqlite(&[]).await;
    let node = &mut cluster.nodes[0];
    let bound = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    node.signal(Signal::SIGHUP);
    assert!(node.ended().await.success());
    assert!(node.log().iter().any(|line| line.contains("\"stopped\"")), "{:?}", node.log());
    node.restart().await;
    assert_eq!(node.query_sql(ALICE).await.version, bound.version);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_what_prometheus_reads_in_both_formats() {
    let cluster = Cluster::with_redis(1, &[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    node.query(ALICE).await;
    let get = async |accept: &str| {
        let mut stream = TcpStream::connect(node.admin).await.unwrap();
        let request = format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_lowercase(), body.to_owned())
    };
    let (head, body) = get("application/openmetrics-text;version=1.0.0,text/plain;q=0.5").await;
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{head}");
    assert!(body.contains("# EOF"), "{body}");
    let (head, classic) = get("*/*").await;
    assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().expect("promtool is installed: run tests/run");
    promtool.stdin.take().unwrap().write_all(classic.as_bytes()).unwrap();
    let said = promtool.wait_with_output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success() && text.is_empty(), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_would_tell_others_an_address_of_nobody_does_not_start() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    for (host, advertise, why) in [
        ("0.0.0.0", "", "set presence_service.advertise"),
        ("::", "", "set presence_service.advertise"),
        ("0", "", "set presence_service.advertise"),
        ("127.0.0.1", "0.0.0.0:6000", "must be HOST:PORT"),
        ("127.0.0.1", "[::]:6000", "must be HOST:PORT"),
        ("127.0.0.1", "node-1:0", "must be HOST:PORT"),
    ] {
        let more = [("PRESENCE_SERVICE__HOST", host), ("PRESENCE_SERVICE__ADVERTISE", advertise)];
        let mut process = Process::start(&db.settings(&more));
        let status = process.ended(ENDS_WITHIN).await;
        assert_eq!(status.code(), Some(2), "{host} {advertise}: {:?}", process.log());
        assert!(process.log().iter().any(|line| line.contains(why)), "{host} {advertise}: {:?}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_requests_hold_up_neither_port() {
    const HALF: usize = 1_100;
    let program = ["prlimit", "--nofile=1024:1024", PROGRAM].map(str::to_owned).to_vec();
    let db = TestDb::sqlite();
    let node = Node::start_as(program, db.settings(&[])).await;
    let fits = node.log().iter().any(|line| line.contains("does not fit into this process's limit of open files"));
    assert!(fits, "{:?}", node.log());
    let mut half = Vec::new();
    for addr in [node.admin, node.data] {
        for n in 0..HALF {
            let mut stream = TcpStream::connect(addr).await.unwrap();
            let _ = stream.write_all([&b"GET /livez HT"[..], b"PRI * HTTP", b""][n % 3]).await; // it may be closed already
            half.push(stream);
        }
        assert_eq!(node.http("/livez").await.0, 200);
        node.new_connection().bind_route(a_bind(ALICE, PHONE, &addr.to_string())).await.expect("a bind");
    }
    assert_eq!(node.degraded().await, [""; 0]);
}

/// What the system drops comes again after a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_who_all_come_at_once_are_let_in_though_the_node_is_slow_to_accept_them() {
    const AT_ONCE: usize = 500;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let kept: usize = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap().trim().parse().unwrap();
    node.stop();
    let mut clients = Vec::new();
    for addr in [node.data, node.admin] {
        for n in 1..=AT_ONCE.min(kept) {
            let connected = timeout(Duration::from_millis(900), TcpStream::connect(addr)).await;
            clients.push(connected.unwrap_or_else(|_| panic!("connection {n} to {addr} waits for another attempt")).unwrap());
        }
    }
    node.cont();
    drop(clients);
    eventually("the node serves", SOON, async || node.try_bind(a_bind(ALICE, PHONE, "c")).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_gets_little_of_its_processor_turns_nobody_away_who_has_spoken() {
    const AT_ONCE: usize = 500;
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.stop();
    let mut clients = Vec::new();
    for _ in 0..AT_ONCE {
        let mut client = TcpStream::connect(node.data).await.unwrap();
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        clients.push(client);
    }
    for _ in 0..40 {
        node.cont();
        tokio::time::sleep(Duration::from_millis(1)).await;
        node.stop();
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    node.cont();
    for (n, client) in (1..).zip(&clients) {
        let answered = timeout(SOON, client.peek(&mut [0])).await.expect("an answer in time");
        assert_eq!(answered.unwrap_or_else(|error| panic!("client {n} was turned away: {error}")), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_what_the_admin_port_says_keeps_nobody_else_out() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let mut silent = Vec::new();
    for _ in 0..260 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap(); // little is sent before it has to wait
        let stream = socket.connect(node.admin).await.unwrap();
        let many = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(60);
        let _ = stream.try_write(many.as_bytes());
        let answered = timeout(Duration::from_secs(4), stream.peek(&mut [0])).await; // the silent ones are given up after 10 s
        answered.expect("a new one is let in at once").expect("its first answer waits to be read");
        silent.push(stream);
    }
    assert_eq!(node.http("/livez").await.0, 200);
    assert_eq!(node.http("/healthz").await.0, 200);
    drop(silent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_use_up_no_descriptor_that_the_node_needs_itself() {
    let server = MariaDb::start();
    let db = TestDb::mariadb(&server).await;
    let program = ["prlimit", "--nofile=600:600", PROGRAM].map(str::to_owned).to_vec();
    let node = Node::start_as(program, db.settings(&[("PRESENCE_SERVICE__MAX_CONNECTIONS", "1000")])).await;
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let mut clients = Vec::new();
    for _ in 0..700 {
        let mut client = TcpStream::connect(node.data).await.unwrap();
        let _ = client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await; // it may be refused
        clients.push(client);
    }
    let open = || std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count();
    assert!(open() < 560, "a reserve is left of 600: {}", open());
    server.kill();
    server.restart(); // every connection to the database has to be made anew
    eventually("the node is well again", ENDS_WITHIN, async || {
        node.http("/healthz").await.0 == 200 && node.try_bind(a_bind(ALICE, PHONE, "c-2")).await.is_ok()
    })
    .await;
}

#[test]
fn a_secret_in_the_wrong_place_is_never_shown() {
    const SECRET: &str = "hunter2-s3cret";
    for (key, value) in [
        ("STORE__URL", format!("mysql://u:{SECRET}")),
        ("STORE__URL", format!("mysql://u:{SECRET}@:x/y?{SECRET}=1")),
        ("STORE__URL", format!("mysql://u:{SECRET}:3306/y")),
        ("REDIS_CACHE__URL", format!("redis://h:6379?token={SECRET}")),
        ("REDIS_CACHE__URL", format!("redis://:{SECRET}")),
        ("REDIS_QUEUE__URL", format!("redis://u:{SECRET}@:999999")),
        ("LOG__LEVEL", SECRET.to_owned()),
        ("LOG__FORMAT", SECRET.to_owned()),
        ("ROUTE__ON_OVERFLOW", SECRET.to_owned()),
        ("STORE__TIMEOUT", SECRET.to_owned()),
        ("GATEWAY__DOUBT_SHARE", SECRET.to_owned()),
        ("ROUTE__MPIM_KEYS", SECRET.to_owned()),
        ("PRESENCE_SERVICE__HOST", format!("{SECRET} x")),
        ("PRESENCE_SERVICE__ADVERTISE", SECRET.to_owned()),
    ] {
        let mut command = Command::new(PROGRAM);
        command.arg("check-config").env(format!("IM_PRESENCE__{key}"), &value).stdin(Stdio::null());
        let output = command.output().expect("run check-config");
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!said.contains(SECRET), "{key} = {value}: {said}");
    }
    for url in
        ["mysql://u@h/d?ssl-mod=required", "sqlite://x.db?cache=shared", "sqlite::memory:", "sqlite:", "sqlite://x?mode=memory"]
    {
        let output = Command::new(PROGRAM).arg("check-config").env("IM_PRESENCE__STORE__URL", url).output().expect("run it");
        assert_eq!(output.status.code(), Some(2), "{url}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("store.url"), "{url}: {output:?}");
    }
}
