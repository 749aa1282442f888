//! Puts the daemon together. The only place that connects, listens and starts tasks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::net::TcpListener;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tonic_health::server::health_reporter;
use tracing::info;
use tracing::warn;

use crate::api::admin::Admin;
use crate::api::gateway::Gateways;
use crate::api::http;
use crate::api::listen;
use crate::api::presence::Presence;
use crate::config::Config;
use crate::config::OnOverflow;
use crate::domain::policy;
use crate::domain::policy::DevicePolicy;
use crate::engine::cache::Cache;
use crate::engine::directory;
use crate::engine::directory::Directory;
use crate::engine::directory::Hearing;
use crate::engine::expiry::CENSUS_INTERVAL;
use crate::engine::expiry::EXPIRY_INTERVAL;
use crate::engine::expiry::Expiry;
use crate::engine::lanes;
use crate::engine::lanes::Lanes;
use crate::engine::lanes::Tools;
use crate::engine::lives::Lives;
use crate::engine::lives::LivesPoll;
use crate::engine::lives::POLL_INTERVAL;
use crate::engine::loader::Loader;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::admin_service_server::AdminServiceServer;
use crate::pb::gateway_service_server::GatewayServiceServer;
use crate::pb::presence_service_server::PresenceServiceServer;
use crate::store::connection::Engine;
use crate::store::connection::Purpose;
use crate::store::database::Database;
use crate::store::database::OpenError;

/// How long a starting node waits for its database.
const START_DEADLINE: Duration = Duration::from_secs(10);
const START_RETRY: Duration = Duration::from_millis(250);
/// A stopping node: how long calls in progress may take, then how long the lanes may take to store what they have.
const CALLS_DEADLINE: Duration = Duration::from_secs(5);
const LANES_DEADLINE: Duration = Duration::from_secs(3);
/// Largest request.
const MAX_REQUEST_BYTES: usize = 4 * 1024 * 1024;
/// Calls in progress on one connection.
const MAX_CALLS_PER_CONNECTION: u32 = 1024;
/// Storms of calls cancelled by their deadline must not end the connection.
const MAX_PENDING_RESETS: usize = 1024;
/// A peer that is gone without a word is noticed after both.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the daemon did not start, or ended: one line for an operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the database at {url} was not reachable for {} s: {cause}", START_DEADLINE.as_secs())]
    Unreachable { url: String, cause: OpenError },
    #[error(transparent)]
    Store(OpenError),
    #[error("cannot listen on {addr}: {cause}")]
    Listen { addr: String, cause: std::io::Error },
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
    #[error("a task of the daemon ended unexpectedly; the log says which")]
    TaskEnded,
}

/// A running daemon.
pub struct App {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    health: HealthReporter,
    /// Stops accepting; calls in progress are finished.
    draining: CancellationToken,
    /// Stops everything else.
    stop: CancellationToken,
    server: JoinSet<()>,
    tasks: JoinSet<()>,
}

/// Runs the daemon until SIGTERM or SIGINT. A second signal ends it at once.
///
/// # Errors
/// When it cannot start, or one of its tasks ended.
pub async fn run(config: Config) -> Result<(), StartError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    let app = tokio::select! {
        app = App::start(config) => app?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let ended = app.stop.clone();
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = ended.cancelled() => {
            app.shutdown().await;
            return Err(StartError::TaskEnded);
        }
    }
    info!("stopping: calls in progress are finished; a second signal ends them");
    tokio::select! {
        () = app.shutdown() => info!("stopped"),
        _ = terminate.recv() => warn!("ended by a second signal"),
        _ = interrupt.recv() => warn!("ended by a second signal"),
    }
    Ok(())
}

impl App {
    /// Connects, lays the tables, starts the engine, and listens last of all.
    ///
    /// # Errors
    /// When the database cannot be reached or used, or an address cannot be listened on.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let database = Arc::new(open(&config).await?);
        let node_id = config.presence_service.node_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let (metrics, lives, cache) = (Metrics::new(), Lives::new(), Cache::new(config.route.l1_capacity));
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut tasks = JoinSet::new();

        let mut poll = LivesPoll::new(database.clone(), lives.clone(), cache.clone(), metrics.clone());
        poll.step().await;
        tasks.spawn(keep_polling(poll, stop.clone()));
        let settings = lane_settings(&config, database.engine);
        let (database, cache_, lives_, metrics_) = (database, cache.clone(), lives.clone(), metrics.clone());
        let tools = Arc::new(Tools { node_id, database, cache: cache_, lives: lives_, metrics: metrics_, settings });
        let lanes = Lanes::start(&tools, &mut tasks, &stop);
        let loader = Loader::new(tools.database.clone(), cache.clone(), lives.clone(), metrics.clone());
        for _ in 0..config.store.connections {
            tasks.spawn(loader.clone().work(stop.clone()));
        }
        let settings = directory_settings(&config, tools.database.engine);
        let directory = Arc::new(Directory::new(cache.clone(), lives.clone(), loader, metrics.clone(), settings));
        tasks.spawn(keep_tidy(Expiry::new(tools.clone(), lanes.clone()), cache.clone(), stop.clone()));

        let (data_listener, data) = bind(&config.presence_service.host, config.presence_service.port).await?;
        let (admin_listener, admin) = bind(&config.admin.host, config.admin.port).await?;
        let max_capacity = config.presence_service.max_capacity;
        let operator =
            http::Operator { metrics: metrics.clone(), cache, lanes: lanes.clone(), max_capacity, draining: draining.clone() };
        tasks.spawn(serve_admin(admin_listener, operator, stop.clone()));
        let presence = Presence { lanes, directory, lives, metrics: metrics.clone() };
        let (health, routes) = data_routes(presence).await;
        let connections = listen::accept(data_listener, config.presence_service.max_connections, metrics, draining.clone());
        let mut server = JoinSet::new();
        server.spawn(serve_data(routes, connections, draining.clone(), stop.clone()));

        announce(&config, &tools, data, admin).await;
        Ok(Self { data, admin, health, draining, stop, server, tasks })
    }

    /// Finishes calls in progress, stores what the lanes have taken, and ends every task; within 10 s.
    pub async fn shutdown(mut self) {
        self.health.set_service_status("", ServingStatus::NotServing).await;
        self.draining.cancel();
        if timeout(CALLS_DEADLINE, self.server.join_next()).await.is_err() {
            warn!("some calls took longer than {} s; their connections are closed", CALLS_DEADLINE.as_secs());
        }
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(LANES_DEADLINE, all).await.is_err() {
            warn!("the database took too long: changes that were not acknowledged are given up");
        }
    }
}

/// Opens the database, with patience: in a cluster that starts it may come up later than we do.
async fn open(config: &Config) -> Result<Database, StartError> {
    let began = Instant::now();
    loop {
        let left = START_DEADLINE.saturating_sub(began.elapsed());
        let opened = timeout(left.max(START_RETRY), Database::open(&config.store)).await;
        let cause = match opened {
            Ok(Ok(database)) => return Ok(database),
            Ok(Err(error @ (OpenError::InUse(_) | OpenError::Lock { .. } | OpenError::Migrate(_)))) => {
                return Err(StartError::Store(error));
            }
            Ok(Err(error)) => error,
            Err(_) => OpenError::NoAnswer,
        };
        if began.elapsed() + START_RETRY >= START_DEADLINE {
            return Err(StartError::Unreachable { url: config.store.url.to_string(), cause });
        }
        sleep(START_RETRY).await;
    }
}

async fn bind(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |cause| StartError::Listen { addr: format!("{host}:{port}"), cause };
    let listener = TcpListener::bind((host, port)).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    Ok((listener, addr))
}

fn lane_settings(config: &Config, engine: Engine) -> lanes::Settings {
    let on_overflow = match config.route.on_overflow {
        OnOverflow::KickOldest => policy::OnOverflow::KickOldest,
        OnOverflow::RefuseNew => policy::OnOverflow::RefuseNew,
    };
    let policy = DevicePolicy { max_devices: config.route.max_devices, per_platform: config.route.per_platform, on_overflow };
    lanes::Settings {
        lanes: if engine == Engine::Sqlite { 1 } else { config.store.lanes },
        queue: config.store.queue,
        max_event_age: config.store.max_event_age,
        policy,
        route_ttl: config.route.route_ttl,
        heartbeat_interval: config.gateway.heartbeat_interval,
    }
}

fn directory_settings(config: &Config, engine: Engine) -> directory::Settings {
    directory::Settings {
        hearing: if engine == Engine::Sqlite { Hearing::Alone } else { Hearing::Deaf },
        l1_ttl: config.route.l1_ttl,
        heartbeat_interval: config.gateway.heartbeat_interval,
        patience: config.store.timeout,
    }
}

async fn keep_polling(mut poll: LivesPoll, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        stop.run_until_cancelled(poll.step()).await;
    }
}

async fn keep_tidy(mut expiry: Expiry, cache: Arc<Cache>, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let (mut ticks, mut census) = (interval(EXPIRY_INTERVAL), interval(CENSUS_INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let done = tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {
                cache.tidy();
                stop.run_until_cancelled(expiry.step()).await.map(|done| done.map(|_| ()))
            }
            _ = census.tick() => stop.run_until_cancelled(expiry.census()).await,
        };
        if let Some(Err(error)) = done {
            warn!(%error, "tidying up failed; next try in {EXPIRY_INTERVAL:?}");
        }
    }
}

async fn data_routes(presence: Presence) -> (HealthReporter, Routes) {
    let (health, health_service) = health_reporter();
    health.set_serving::<PresenceServiceServer<Presence>>().await;
    let reflection =
        |builder: tonic_reflection::server::Builder<'static>| builder.register_encoded_file_descriptor_set(pb::DESCRIPTORS);
    let mut routes = Routes::builder();
    routes
        .add_service(PresenceServiceServer::new(presence).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(GatewayServiceServer::new(Gateways).max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(health_service);
    if let Ok(v1) = reflection(tonic_reflection::server::Builder::configure()).build_v1() {
        routes.add_service(v1);
    }
    if let Ok(v1alpha) = reflection(tonic_reflection::server::Builder::configure()).build_v1alpha() {
        routes.add_service(v1alpha); // for clients of before 2023
    }
    (health, routes.routes())
}

async fn serve_data(
    routes: Routes,
    connections: tokio_stream::wrappers::ReceiverStream<std::io::Result<listen::Connection>>,
    draining: CancellationToken,
    stop: CancellationToken,
) {
    let _stop_node_on_panic = stop.drop_guard();
    let served = Server::builder()
        .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
        .add_routes(routes)
        .serve_with_incoming_shutdown(connections, draining.cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the gRPC server ended");
    }
}

async fn serve_admin(listener: TcpListener, operator: http::Operator, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let grpc = Routes::new(AdminServiceServer::new(Admin)).into_axum_router().reset_fallback();
    let served = stop.run_until_cancelled(axum::serve(listener, http::router(operator).merge(grpc)).into_future()).await;
    if let Some(Err(error)) = served {
        tracing::error!(%error, "the admin server ended");
    }
}

/// Says where the daemon listens and what it rests on, and warns of what is weaker than it may look.
async fn announce(config: &Config, tools: &Tools, data: SocketAddr, admin: SocketAddr) {
    if let Ok(mut connection) = tools.database.connect(Purpose::General).await
        && let Ok(durability) = tools.database.durability(&mut connection).await
    {
        info!(store.id = tools.database.store_id, "durable means: {}", durability.rests_on);
        durability.weaknesses.iter().for_each(|weakness| warn!("{weakness}"));
    }
    if config.redis_cache.is_some() || config.redis_queue.is_some() {
        warn!("[redis_cache] and [redis_queue] are not used yet: this node reads through its memory and SQL");
    }
    if !data.ip().is_loopback() || !admin.ip().is_loopback() {
        warn!("listening beyond this machine without authentication: whoever reaches the port can bind, query and unbind");
    }
    let store = &config.store.url;
    info!(listen.data = %data, listen.admin = %admin, node.id = tools.node_id, "listening on {data}, admin on {admin}, store {store}");
}
