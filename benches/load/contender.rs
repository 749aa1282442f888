//! Servers to compare with, each a process of its own: this program, started again.

use std::env;
use std::sync::Arc;

use im_presence::api::listen;
use im_presence::api::listen::ServingThread;
use im_presence::api::transport::Entrance;
use im_presence::app::assemble::Daemon;
use im_presence::app::serve;
use im_presence::app::threads::Threads;
use im_presence::config::Config;
use im_presence::memory::Memory;
use im_presence::metrics::Metrics;
use im_presence::pb;
use im_presence::pb::presence_service_server::PresenceService;
use im_presence::store::database::Database;
use im_presence::telemetry;
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::transport::server::TcpIncoming;
use tracing::info;

use crate::harness::cluster::TestDb;
use crate::harness::node::Node;
use crate::harness::node::Settings;
use crate::harness::node::settings;

const WHICH: &str = "BENCH_CONTENDER";
const EMPTY: &str = "empty";
const READY: &str = "ready";
const ONE_RUNTIME: &str = "one-runtime";

/// A handler that does nothing, on the daemon's server.
pub async fn empty(core: Option<usize>, more: &[(&str, &str)]) -> Node {
    start(EMPTY, core, settings(more)).await
}

/// A handler that answers with the same answer as the daemon, made beforehand.
pub async fn ready(core: Option<usize>, more: &[(&str, &str)]) -> Node {
    start(READY, core, settings(more)).await
}

/// The daemon's service, on one multi-threaded runtime with everything else.
pub async fn one_runtime(db: &TestDb, more: &[(&str, &str)]) -> Node {
    start(ONE_RUNTIME, None, db.settings(more)).await
}

/// The program to run, on `core` if one is given.
pub fn on_core(core: Option<usize>, program: &str) -> Vec<String> {
    let pin = core.map(|core| ["taskset".to_owned(), "-c".to_owned(), core.to_string()]);
    pin.into_iter().flatten().chain([program.to_owned()]).collect()
}

async fn start(which: &str, core: Option<usize>, settings: Settings) -> Node {
    let itself = env::current_exe().expect("the path of this program");
    let mut program = on_core(core, "env");
    program.extend([format!("{WHICH}={which}"), itself.display().to_string()]);
    Node::start_as(program, settings).await
}

/// Serves for ever, if this process was started as a contender.
pub fn serve_if_asked() {
    let Ok(which) = env::var(WHICH) else { return };
    let config = Config::load(None).expect("settings");
    let _logging = telemetry::init_logging(&config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let addr = listener.local_addr().expect("an address");
        info!(listen.data = %addr, listen.admin = %addr, "listening on {addr}");
        match which.as_str() {
            EMPTY => serve_on_threads(listener, &config, Fixed(pb::QueryRouteResp::default())).await,
            READY => serve_on_threads(listener, &config, Fixed(answer())).await,
            _ => serve_on_one_runtime(listener, &config).await,
        }
    });
}

async fn serve_on_threads(listener: TcpListener, config: &Config, handler: impl PresenceService) {
    let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
    let (services, memory) = (serve::Services { presence: handler, more: None }, Memory::new(config.limits.memory_bytes));
    let metrics = Metrics::new();
    let (_health, service) = serve::data_service(services, memory, metrics.calls.clone(), None, true).await;
    let started = Threads::start(config.presence_service.thread_count, &service, &metrics.threads, &draining, &stop);
    let (_threads, threads_): (_, Vec<ServingThread>) = started.expect("threads");
    let entrance = Entrance { tls: None, handshake_timeout: config.tls.handshake_timeout, accept_plain: false, metrics };
    listen::accept(listener, entrance, config.presence_service.max_connections, threads_, draining, stop).await;
}

async fn serve_on_one_runtime(listener: TcpListener, config: &Config) {
    let database = Arc::new(Database::open(&config.store).await.expect("open the database"));
    let (mut tasks, stop) = (JoinSet::new(), CancellationToken::new());
    let addr = listener.local_addr().expect("an address");
    let engine = Daemon::start(config, database, addr, Metrics::new(), &mut tasks, &stop).await.expect("start the engine");
    let services = engine.services(config, &CancellationToken::new(), &TaskTracker::new(), None);
    let (_health, service) = serve::data_service(services, engine.memory.clone(), engine.metrics.calls.clone(), None, true).await;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    serve::data_server().serve_with_incoming(service, incoming).await.expect("serve");
}

struct Fixed(pb::QueryRouteResp);

#[tonic::async_trait]
impl PresenceService for Fixed {
    async fn query_route(&self, _: Request<pb::QueryRouteReq>) -> Result<Response<pb::QueryRouteResp>, Status> {
        Ok(Response::new(self.0.clone()))
    }
}

/// Of the daemon's answer as a message of gRPC.
pub fn answer_bytes() -> usize {
    const PREFIX: usize = 5; // whether it is compressed, and its length
    PREFIX + answer().encoded_len()
}

/// As the daemon answers for the users that the benches make.
fn answer() -> pb::QueryRouteResp {
    let gateway_addr = "gw-12.example.net:7000".to_owned();
    let route = pb::Route {
        device_id: "phone".to_owned(),
        platform: pb::Platform::Ios.into(),
        gateway_addr: gateway_addr.clone(),
        gateway_epoch: 12,
        conn_id: "c-123456".to_owned(),
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        bound_at_ms: 1_800_000_000_000,
        route_key: "user:route:123456:1800000000000000".to_owned(),
        state: pb::RouteState::Live.into(),
        idle: false,
    };
    pb::QueryRouteResp {
        result: Some(pb::Result { code: pb::Code::Ok.into(), msg: String::new() }),
        gateway_addr,
        is_online: true,
        status: pb::Status::Online.into(),
        routes: vec![route],
        version: 1_800_000_000_000_000,
        last_seen_ms: 1_800_000_000_000,
        source: pb::Source::Local.into(),
        age_ms: 1_000,
        status_text: String::new(),
        status_since_ms: 1_800_000_000_000,
    }
}
