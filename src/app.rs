//! Puts the daemon together. The only place that connects, listens and starts tasks.

mod admin_port;
pub mod assemble;
mod audit;
mod files;
mod lists;
mod moving;
mod neighbours;
mod notify;
mod operators;
mod protection;
mod redis;
mod reporting;
pub mod serve;
mod settings;
mod spans;
pub mod threads;
mod upkeep;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::net::TcpListener;
use tokio::net::TcpSocket;
use tokio::net::lookup_host;
use tokio::signal::unix::Signal;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tracing::info;
use tracing::warn;

use crate::api::attach::DRAIN_TIME;
use crate::api::http;
use crate::api::node::Caller;
use crate::app::assemble::Daemon;
use crate::app::protection::Protection;
use crate::app::threads::Threads;
use crate::config::Config;
use crate::config::UNNAMED;
use crate::engine::gateways::registry::Registry;
use crate::engine::messages::delivery::Deliveries;
use crate::engine::overview::doctor::START;
use crate::metrics::Metrics;
use crate::security::audit::Audit;
use crate::security::audit::Entry;
use crate::security::files::Unusable;
use crate::store::cluster::NodeName;
use crate::store::connection::Engine;
use crate::store::connection::Purpose;
use crate::store::database::Database;
use crate::store::link_error::LinkError;
use crate::store::open_error::OpenError;
use crate::telemetry;

/// How long a starting node waits for its database.
const START_DEADLINE: Duration = Duration::from_secs(10);
const START_RETRY: Duration = Duration::from_millis(250);
/// A stopping node: how long it may take to say so, how long calls in progress may take, then how long the lanes may take to store what they have.
const SAY_DEADLINE: Duration = Duration::from_millis(500);
const CALLS_DEADLINE: Duration = Duration::from_secs(5);
const LANES_DEADLINE: Duration = Duration::from_secs(3);
/// Connections that the system keeps until they are accepted, so that all clients may come back at once. It keeps no more than
/// `net.core.somaxconn` says, and drops what comes then: such a client tries again after a second.
const BACKLOG: u32 = 4_096;

/// Why the daemon did not start, or ended: one line for an operator.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the database at {url} was not reachable for {} s: {cause}", START_DEADLINE.as_secs())]
    Unreachable { url: String, cause: OpenError },
    #[error(transparent)]
    Store(OpenError),
    #[error("[{section}] cannot be used: {cause}")]
    Redis { section: &'static str, cause: LinkError },
    #[error(
        "[redis_cache] is used by another store ({store}), and a node on SQLite shares no Redis: give it another \
         redis_cache.database or key_prefix, or store.url = mysql://... to join the others; a store that is gone is forgotten in 10 s"
    )]
    CacheTaken { store: String },
    #[error(
        "nodes of another store ({store}) speak on the channels of [redis_queue], and a node on SQLite shares none: give it \
         another redis_queue.channel_prefix, or store.url = mysql://... to join the others"
    )]
    ChannelsTaken { store: String },
    #[error(
        "another node with node_id {node_id} is running at {other}; this one would be at {own}: give each node a name of its \
         own, or leave node_id empty"
    )]
    Twin { node_id: String, other: String, own: String },
    #[error("[{section}] cannot be used: {cause}")]
    Security { section: &'static str, cause: Unusable },
    #[error("{UNNAMED}")]
    Unnamed,
    #[error("cannot listen on {addr}: {cause}")]
    Listen { addr: String, cause: io::Error },
    #[error("cannot start the serving threads: {0}")]
    Threads(io::Error),
    #[error("cannot watch for signals: {0}")]
    Signals(io::Error),
    #[error("a task of the daemon ended unexpectedly; the log says which")]
    TaskEnded,
}

/// A running daemon.
pub struct App {
    pub data: SocketAddr,
    pub admin: SocketAddr,
    health: HealthReporter,
    /// Says that it stops, and sends attached gateways to other nodes.
    draining: CancellationToken,
    /// Stops accepting; calls in progress are finished.
    closing: CancellationToken,
    attached: TaskTracker,
    /// Stops everything else.
    stop: CancellationToken,
    threads: Threads,
    tasks: JoinSet<()>,
    gateways: Arc<Registry>,
    deliveries: Arc<Deliveries>,
    own: NodeName,
    database: Arc<Database>,
    audit: Audit,
    /// None: there is nothing to be read again.
    read_again: Option<Arc<Notify>>,
}

/// Runs the daemon until SIGTERM or SIGINT. A second signal ends it at once. SIGHUP reads certificates and tokens again; a node
/// that has none ends, because then it is a terminal that went away.
///
/// # Errors
/// When it cannot start, or one of its tasks ended.
pub async fn run(config: Config) -> Result<(), StartError> {
    let drain = config.presence_service.drain_ms;
    let mut signals = Signals::watch().map_err(StartError::Signals)?;
    let app = tokio::select! {
        app = App::start(config) => app?,
        () = signals.next() => return Ok(()),
    };
    notify::ready();
    let ended = app.stop.clone();
    tokio::select! {
        () = signals.next_but_reload(&app.read_again) => {}
        () = ended.cancelled() => {
            app.shutdown(drain).await;
            return Err(StartError::TaskEnded);
        }
    }
    notify::stopping(SAY_DEADLINE + drain.max(DRAIN_TIME) + CALLS_DEADLINE + LANES_DEADLINE);
    info!("stopping: calls in progress are finished; a second signal ends them");
    tokio::select! {
        () = app.shutdown(drain) => info!("stopped"),
        () = signals.next() => warn!("ended by a second signal"),
    }
    Ok(())
}

/// The signals that ask the daemon to end.
struct Signals([Signal; 3]);

impl Signals {
    fn watch() -> io::Result<Self> {
        Ok(Self([signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?, signal(SignalKind::hangup())?]))
    }

    /// The next one that does not ask for files to be read again.
    async fn next_but_reload(&mut self, read_again: &Option<Arc<Notify>>) {
        while let (true, Some(read_again)) = (self.next_is_hangup().await, read_again) {
            read_again.notify_one();
        }
    }

    async fn next(&mut self) {
        self.next_is_hangup().await;
    }

    async fn next_is_hangup(&mut self) -> bool {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => false,
            _ = interrupt.recv() => false,
            _ = hangup.recv() => true,
        }
    }
}

impl App {
    /// Connects, creates the tables, starts the engine, and serves last of all.
    ///
    /// # Errors
    /// When the database cannot be reached or used, or an address cannot be listened on.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        let (max_connections, metrics) = (files::max_connections(&config), Metrics::new());
        let mut protection = Protection::prepare(&config, &metrics)?;
        let database = Arc::new(open(&config).await?.counted_by(metrics.sql.clone()));
        let (data_listener, data) = bind(&config.presence_service.host, config.presence_service.port).await?;
        let (admin_listener, admin) = bind(&config.admin.host, config.admin.port).await?;
        let (draining, closing, stop) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let attached = TaskTracker::new();
        let mut tasks = JoinSet::new();
        let mut engine = Daemon::start(&config, database, data, metrics, &mut tasks, &stop).await?;
        let read_again = protection.start(&config, &engine, &mut tasks, &stop);
        let Protection { access, audit, peers, .. } = &protection;
        let operator = operator(&config, &engine, &draining);
        let reporting = reporting::start(&config, &engine, &operator, &protection, &mut tasks, &stop).await;
        let spans = spans::start(&config, &engine, &mut tasks, &stop);
        let services = engine.services(&config, &draining, &attached, Some(reporting.reporter.clone())).traced(spans);
        let rest = operators::start(&config, &engine, audit, services.presence.clone(), reporting, &mut tasks, &stop);
        let router = serve::admin_router(operator, rest);
        if let Some(lines) = engine.peer_lines.take() {
            let (store_id, others, lives) = (engine.database.store_id.clone(), engine.peers.clone(), engine.lives.clone());
            let caller = Caller { store_id, peers: others, lives, security: peers.clone() };
            tasks.spawn(Arc::new(caller).run(lines, stop.clone()));
        }
        let (memory, calls) = (engine.memory.clone(), engine.metrics.calls.clone());
        let (health, service) = serve::data_service(services, memory, calls, access.clone(), config.auth.reflection).await;
        let (count, busy) = (config.presence_service.thread_count, &engine.metrics.threads);
        let (threads, serving) = Threads::start(count, &service, busy, &closing, &stop).map_err(StartError::Threads)?;
        protection.announce(&config, !data.ip().is_loopback() || !admin.ip().is_loopback());
        let Protection { data: entrance, admin: admin_entrance, access, audit, peers, .. } = protection;
        let (hosts, memory) = (settings::hosts(&config), engine.memory.clone());
        tasks.spawn(admin_port::serve(admin_listener, admin_entrance, router, access, hosts, memory, stop.clone()));
        let accepting = threads.accept(data_listener, entrance, max_connections, serving, closing.clone(), stop.clone());
        accepting.map_err(StartError::Threads)?;

        announce(&config, &engine.database).await;
        audit.note(Entry { action: START.to_owned(), outcome: "ok", ..Entry::default() });
        info!(
            listen.data = %data, listen.admin = %admin, node.id = engine.own.node_id,
            "listening on {data}, admin on {admin}, store {}", config.store
        );
        if engine.database.engine == Engine::MySql {
            tasks.spawn(neighbours::call_oneself(engine.own.clone(), engine.database.store_id.clone(), peers));
        }
        let (gateways, deliveries, own, database) = (engine.gateways, engine.deliveries, engine.own, engine.database);
        Ok(Self {
            data,
            admin,
            health,
            draining,
            closing,
            attached,
            stop,
            threads,
            tasks,
            gateways,
            deliveries,
            own,
            database,
            audit,
            read_again,
        })
    }

    /// Says that it stops, and still serves for `drain`, in which others take note. Then finishes calls in progress, stores what
    /// the lanes have taken, and ends every task; within 9 s more.
    pub async fn shutdown(mut self, drain: Duration) {
        self.health.set_service_status("", ServingStatus::NotServing).await;
        self.draining.cancel();
        self.say_that_it_stops().await;
        // Gateways that move away acknowledge what they have through their new node, which has to reach this one for that.
        let least = if self.attached.is_empty() { Duration::ZERO } else { DRAIN_TIME };
        sleep(drain.max(least)).await;
        let calls = async {
            self.deliveries.finish().await; // while acknowledgements still come in
            self.closing.cancel();
            self.threads.ended().await
        };
        if timeout(CALLS_DEADLINE, calls).await.is_err() {
            warn!("some calls took longer than {} s; their connections are closed", CALLS_DEADLINE.as_secs());
        }
        self.closing.cancel();
        self.audit.note(Entry { action: "stop".to_owned(), outcome: "ok", ..Entry::default() });
        self.stop.cancel();
        let all = async {
            self.gateways.finish().await;
            while self.tasks.join_next().await.is_some() {}
            if let Ok(mut connection) = self.database.connect(Purpose::General).await {
                let _ = connection.leave_node(&self.own).await; // else the next process of this name waits a moment
            }
        };
        if timeout(LANES_DEADLINE, all).await.is_err() {
            warn!("the database took too long: changes that were not acknowledged are given up");
        }
    }

    /// To those who choose among the nodes.
    async fn say_that_it_stops(&self) {
        let say = async {
            if let Ok(mut connection) = self.database.connect(Purpose::General).await {
                let _ = connection.drain_node(&self.own).await; // they notice when it is gone
            }
        };
        let _ = timeout(SAY_DEADLINE, say).await;
    }
}

/// What the admin port looks at.
fn operator(config: &Config, engine: &Daemon, draining: &CancellationToken) -> http::Operator {
    http::Operator {
        metrics: engine.metrics.clone(),
        cache: engine.cache.clone(),
        lanes: engine.lanes.clone(),
        streams: engine.streams.clone(),
        memory: engine.memory.clone(),
        lives: engine.lives.clone(),
        hints: engine.hints.clone(),
        max_capacity: config.presence_service.max_capacity,
        dropped_log_lines: telemetry::dropped_lines,
        draining: draining.clone(),
    }
}

/// Opens the database, with patience: in a cluster that starts it may come up later than we do.
async fn open(config: &Config) -> Result<Database, StartError> {
    let (began, mut said) = (Instant::now(), None);
    loop {
        let left = START_DEADLINE.saturating_sub(began.elapsed());
        let opened = timeout(left.max(START_RETRY), Database::open(&config.store)).await;
        let cause = match opened {
            Ok(Ok(database)) => return Ok(database),
            Ok(Err(error @ (OpenError::InUse(_) | OpenError::Lock { .. }))) => return Err(StartError::Store(error)),
            Ok(Err(error)) => Some(error),
            Err(_) => None,
        };
        said = cause.or(said); // what it said once says more than that it said nothing in the end
        if began.elapsed() + START_RETRY >= START_DEADLINE {
            let cause = said.unwrap_or(OpenError::NoAnswer);
            return Err(StartError::Unreachable { url: config.store.to_string(), cause });
        }
        sleep(START_RETRY).await;
    }
}

async fn bind(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let mut refused = io::ErrorKind::AddrNotAvailable.into();
        for addr in lookup_host((host, port)).await? {
            match listen_at(addr) {
                Ok(listener) => return Ok((listener.local_addr()?, listener)),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    };
    let (addr, listener) = bound.await.map_err(|cause| StartError::Listen { addr: format!("{host}:{port}"), cause })?;
    Ok((listener, addr))
}

fn listen_at(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?; // connections of a former process may still be closing
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Says what the daemon rests on, and warns of what is weaker than it may look.
async fn announce(config: &Config, database: &Database) {
    if let Ok(mut connection) = database.connect(Purpose::General).await
        && let Ok(durability) = database.durability(&mut connection).await
    {
        info!(store.id = database.store_id, "durable means: {}", durability.rests_on);
        durability.weaknesses.iter().for_each(|weakness| warn!("{weakness}"));
        if let Ok(Some((cipher, is_verified))) = database.protection(&mut connection).await {
            match (&*cipher, is_verified) {
                ("", _) => info!("to the database: plaintext"),
                (cipher, true) => {
                    let ca = config.store.ca_file.as_ref().map_or(String::new(), |file| format!(" or {}", file.display()));
                    info!("to the database: TLS ({cipher}), the server has proved who it is by the system's CAs{ca}");
                }
                (cipher, false) => warn!(
                    "to the database: TLS ({cipher}), but nobody has verified the server: whoever stands between could read the \
                     password; set store.ca_file, or store.tls = verify_full"
                ),
            }
        }
    }
    let cache = config.redis_cache.as_ref().map(|cache| &cache.server);
    let queue = config.redis_queue.as_ref().map(|queue| &queue.server);
    for (tier, redis) in [("redis_cache", cache), ("redis_queue", queue)] {
        match redis {
            None => info!("[{tier}] is not configured: this node runs without it"),
            Some(redis) if redis.speaks_tls() => {
                let ca = redis.ca_file.as_ref().map_or("the system's CAs".into(), |file| file.display().to_string());
                info!("to [{tier}]: TLS, the server has to prove who it is by {ca}");
            }
            Some(_) => info!("to [{tier}]: plaintext"),
        }
    }
}
