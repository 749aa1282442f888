//! What security costs: TLS against plaintext, tokens against no question asked, handshakes, binds over TLS to the database, and
//! what a crowd that never finishes its handshake costs the others.
//!
//! `cargo bench --bench security` measures (about three minutes); `cargo test` runs all of it for a moment.

#[allow(dead_code, unused_imports)] // tests use more of it
#[path = "../tests/it/harness/mod.rs"]
mod harness;
#[allow(dead_code)] // other benches use more of it
mod load;

use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::json;

use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::TestDb;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::Settings;
use crate::harness::node::settings;
use crate::harness::percentile;
use crate::harness::pki::Ca;
use crate::harness::pki::Pki;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::load::Target;
use crate::load::contender;
use crate::load::on_core;
use crate::load::paced;
use crate::load::queries::QUERY;
use crate::load::queries::query_at;
use crate::load::queries::query_of;
use crate::load::report::Row;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc; // the daemon's

/// The core of the server that has one for itself, and the loader's.
const SERVER: usize = 0;
const LOADER: usize = 1;
const USERS: u64 = 10_000;
const BIND: &str = "/mpim.PresenceService/BindRoute";
/// Calls a second beside which the crowd comes.
const PACE: f64 = 2_000.0;
const HALF_OPEN: usize = 2_000;
const GARBAGE_PER_SECOND: u32 = 500;

fn main() {
    contender::serve_if_asked();
    let measuring = std::env::args().any(|arg| arg == "--bench");
    let (rounds, time, crowd) =
        if measuring { (7, Duration::from_secs(2), HALF_OPEN) } else { (1, Duration::from_millis(50), 20) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(measure(rounds, time, crowd));
    println!("test result: ok. {rounds} rounds");
}

/// Nodes that differ in one thing each, on one serving thread with a core of its own, with the same users in memory.
struct Nodes {
    plain: Node,
    tls: Node,
    token: Node,
    client: Arc<ClientConfig>,
    bearer: String,
    _dbs: Vec<TestDb>,
    _pki: Pki,
}

/// Makes a whole handshake each time.
fn client(ca: &Ca) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("a CA")).expect("a root");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Arc::new(config)
}

impl Nodes {
    async fn start() -> Self {
        let (pki, mut dbs) = (Pki::new(), Vec::new());
        let ca = pki.ca("ca");
        let pair = ca.issue("node", &["127.0.0.1"]);
        let (bearer, entry) = token("service", "service", "");
        let tokens = pki.write("tokens.toml", &entry);
        let mut start = async |more: &[(&str, &str)]| {
            let db = TestDb::sqlite();
            let all = db.settings(&[&[("PRESENCE_SERVICE__THREAD_COUNT", "1"), ("ROUTE__L1_TTL", "3600")], more].concat());
            dbs.push(db);
            Node::start_as(contender::on_core(Some(SERVER), PROGRAM), all).await
        };
        let plain = start(&[]).await;
        let certificate = [("TLS__CERT_FILE", text(&pair.cert)), ("TLS__KEY_FILE", text(&pair.key))];
        let tls = start(&[&certificate[..], &[("TLS__ACCEPT_PLAIN", "true")]].concat()).await;
        let token = start(&[("AUTH__MODE", "token"), ("AUTH__TOKENS_FILE", text(&tokens))]).await;
        Self { plain, tls, token, client: client(&ca), bearer, _dbs: dbs, _pki: pki }
    }

    fn targets(&self) -> [Target; 3] {
        let plain = |node: &Node| Target { server: node.data, tls: None, token: None };
        let tls = Target { tls: Some(self.client.clone()), ..plain(&self.tls) };
        let token = Target { token: Some(self.bearer.clone()), ..plain(&self.token) };
        [plain(&self.plain), tls, token]
    }
}

async fn queries(target: Target, time: Duration) -> f64 {
    query_at(&target, Some(LOADER), (4, 32), USERS, time).await
}

/// Handshakes a second of one core: clients have the other one.
async fn handshakes(node: &Node, client: &Arc<ClientConfig>, time: Duration) -> f64 {
    let (server, client, before) = (node.data, client.clone(), node.cpu_time());
    let made = on_core(Some(LOADER), move || {
        let (began, mut made) = (Instant::now(), 0_u32);
        while began.elapsed() < time {
            drop(load::encrypted(server, &client));
            made += 1;
        }
        made
    })
    .await;
    f64::from(made) / (node.cpu_time() - before).as_secs_f64().max(0.01)
}

/// p99 of queries at a steady rate, in milliseconds.
async fn p99(server: SocketAddr, time: Duration) -> f64 {
    let mut took = on_core(Some(LOADER), move || paced::run(server, QUERY, 4, PACE, time, |c, n| query_of(c, n, USERS))).await;
    percentile(&mut took, 0.99).as_secs_f64() * 1_000.0
}

/// Clients that begin a handshake and say no more, and others that talk nonsense, until it is dropped.
struct Crowd {
    ended: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Crowd {
    fn gather(server: SocketAddr, half_open: usize) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let stop = ended.clone();
        let thread = thread::spawn(move || {
            let speak = |bytes: &[u8]| {
                let mut stream = TcpStream::connect(server).ok()?;
                stream.write_all(bytes).ok()?;
                Some(stream)
            };
            let hello_of_500_bytes = b"\x16\x03\x01\x01\xf4\x01\x00\x01\xf0\x03\x03";
            let _silent: Vec<_> = (0..half_open).filter_map(|_| speak(hello_of_500_bytes)).collect();
            while !stop.load(Ordering::Relaxed) {
                drop(speak(b"\x16\x03\x01\x00\x07garbage"));
                thread::sleep(Duration::from_secs(1) / GARBAGE_PER_SECOND);
            }
        });
        Self { ended, thread: Some(thread) }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(thread::JoinHandle::join); // what it met is no concern of this
    }
}

/// Binds a second on MariaDB, which is reached with TLS or without.
struct Binders {
    plain: Node,
    tls: Node,
    _db: TestDb,
    _server: MariaDb,
    _pki: Pki,
}

impl Binders {
    async fn start() -> Self {
        let pki = Pki::new();
        let ca = pki.ca("sql");
        let pair = ca.issue("mariadb", &["127.0.0.1"]);
        let options = [format!("--ssl-cert={}", text(&pair.cert)), format!("--ssl-key={}", text(&pair.key))];
        let server = MariaDb::start_with(options.to_vec());
        let db = TestDb::mariadb(&server).await;
        let with = |more: &[(&str, &str)]| -> Settings { [db.settings(&[]), settings(more)].concat() };
        let plain = Node::start(with(&[("STORE__TLS", "disabled")])).await;
        let tls = Node::start(with(&[("STORE__CA_FILE", text(&ca.file))])).await;
        Self { plain, tls, _db: db, _server: server, _pki: pki }
    }
}

async fn binds(node: &Node, round: usize, time: Duration) -> f64 {
    let (target, round) = (Target { server: node.data, tls: None, token: None }, round as u64);
    let bind = move |c: u64, n: u64| pb::BindRouteReq {
        user_id: i64::try_from(1 + (round << 40 | c << 32 | n)).expect("not that many"),
        gateway_addr: GATEWAY.to_owned(),
        ..Default::default()
    };
    let done = on_core(None, move || load::run_on(&target, BIND, (4, 64), time, bind)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done.per_second()
}

fn rows() -> [Row; 5] {
    [
        Row::new("tls", ("QueryRoute over TLS, one thread on its own core", "in plaintext"), (0.75, 0.9)),
        Row::new("token", ("QueryRoute with a token", "auth.mode = off"), (0.98, 1.0)),
        Row::new("binds", ("BindRoute on MariaDB over TLS", "over plaintext"), (0.8, 0.95)),
        Row::new("crowd", ("p99 of 2,000 queries a second beside a crowd of handshakes", "without it"), (2.0, 1.2))
            .less_is_better("ms"),
        Row::new("handshakes", ("whole handshakes per second of the daemon's CPU", ""), (0.0, 0.0)),
    ]
}

async fn measure(rounds: usize, time: Duration, crowd: usize) {
    let (nodes, binders, mut rows) = (Nodes::start().await, Binders::start().await, rows());
    for round in 0..=rounds {
        let [plain, tls, token] = nodes.targets();
        let without = queries(plain.clone(), time).await;
        let (tls, between) = (queries(tls, time).await, queries(plain, time).await);
        let token = queries(token, time).await;
        let bound = (binds(&binders.tls, 2 * round, time).await, binds(&binders.plain, 2 * round + 1, time).await);
        // These callers are in plaintext, for the loader's sake; the crowd is at the same port.
        let quiet = p99(nodes.tls.data, time).await;
        let crowded = {
            let _crowd = Crowd::gather(nodes.tls.data, crowd);
            p99(nodes.tls.data, time).await
        };
        let shaken = handshakes(&nodes.tls, &nodes.client, time).await;
        if round > 0 {
            // the first round warms up
            rows[0].add(tls, without);
            rows[1].add(token, between);
            rows[2].add(bound.0, bound.1);
            rows[3].add(crowded, quiet);
            rows[4].add(shaken, 1.0);
        }
    }
    load::report::print("security", &rows, &json!({ "half_open": crowd, "garbage_per_second": GARBAGE_PER_SECOND }));
}
