//! Builds the engine from the configuration, bottom to top, and starts its tasks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::StartError;
use crate::app::upkeep;
use crate::config;
use crate::config::Config;
use crate::config::OnOverflow;
use crate::config::Payload;
use crate::domain::policy;
use crate::domain::policy::DevicePolicy;
use crate::engine::cache::Cache;
use crate::engine::delivery;
use crate::engine::delivery::Deliveries;
use crate::engine::delivery::Format;
use crate::engine::directory;
use crate::engine::directory::Directory;
use crate::engine::directory::Hearing;
use crate::engine::gateways::Gateways;
use crate::engine::gateways::Terms;
use crate::engine::heartbeats::Heartbeats;
use crate::engine::hints::Hints;
use crate::engine::l2::L2;
use crate::engine::l2::L2Check;
use crate::engine::lanes;
use crate::engine::lanes::Lanes;
use crate::engine::lanes::Tools;
use crate::engine::lives::Lives;
use crate::engine::loader::Loader;
use crate::engine::projection::Outside;
use crate::engine::projection::Repair;
use crate::engine::sweep::Sweep;
use crate::engine::warm_up::WarmUp;
use crate::engine::watch::Watch;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::connection::Engine;
use crate::store::database::Database;
use crate::store::shared::SharedCache;

/// How long a starting node waits to hear itself on the bus before it serves, deaf.
const HEAR_PATIENCE: Duration = Duration::from_secs(2);

/// The engine, running.
pub struct Assembled {
    pub node_id: String,
    pub database: Arc<Database>,
    pub metrics: Arc<Metrics>,
    pub cache: Arc<Cache>,
    pub lives: Arc<Lives>,
    pub gateways: Arc<Gateways>,
    pub heartbeats: Arc<Heartbeats>,
    pub lanes: Arc<Lanes>,
    pub directory: Arc<Directory>,
    pub deliveries: Arc<Deliveries>,
}

impl Assembled {
    /// In this order: subscribe, read the lives, start the lanes, warm the memory while queries are answered already.
    pub async fn start(
        config: &Config,
        database: Arc<Database>,
        data: SocketAddr,
        tasks: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let node_id = config.presence_service.node_id.clone().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let addr = config.presence_service.advertise.clone().unwrap_or_else(|| data.to_string());
        let (metrics, lives, cache) = (Metrics::new(), Lives::new(), Cache::new(config.route.l1_capacity));
        let bus = config.redis_queue.as_ref().map(bus).transpose()?.map(Arc::new);
        let l2 = config.redis_cache.as_ref().map(|redis| shared(redis, config, &database.store_id)).transpose()?;
        let l2 = l2.map(|shared| L2::new(shared, metrics.clone()));
        let ids = (&*node_id, &*database.store_id);
        let hints = bus.clone().map(|bus| Hints::new(bus, ids, cache.clone(), lives.clone(), metrics.clone()));

        if let Some(hints) = &hints {
            tasks.spawn(hints.clone().keep_listening(stop.clone()));
            tasks.spawn(hints.clone().keep_beating(stop.clone()));
            hints.heard_itself(HEAR_PATIENCE).await;
        }
        let outside = Arc::new(Outside {
            l2: l2.clone(),
            hints: hints.clone(),
            bus: bus.clone(),
            cache: cache.clone(),
            lives: lives.clone(),
            metrics: metrics.clone(),
            database: database.clone(),
            heartbeat_interval: config.gateway.heartbeat_interval,
        });
        let terms = terms(config);
        let gateways = Gateways::new(terms, &node_id, database.clone(), lives.clone(), outside.clone(), metrics.clone());
        let mut watch = Watch::new(gateways.clone(), cache.clone(), hints.clone(), (node_id.clone(), addr));
        watch.step().await;
        tasks.spawn(upkeep::keep_watching(watch, stop.clone()));
        let (heartbeats, recorder) = Heartbeats::new(gateways.clone());
        tasks.spawn(recorder.run(stop.clone()));
        if let Some(l2) = &l2 {
            let mut check = L2Check::new(l2.clone(), database.clone(), cache.clone(), hints.clone(), metrics.clone());
            check.step().await;
            tasks.spawn(check.keep_checking(stop.clone()));
        }

        let tools = Arc::new(Tools {
            node_id: node_id.clone(),
            database: database.clone(),
            cache: cache.clone(),
            lives: lives.clone(),
            metrics: metrics.clone(),
            outside: outside.clone(),
            settings: lane_settings(config, database.engine),
        });
        let lanes = Lanes::start(&tools, tasks, stop);
        tasks.spawn(upkeep::keep_repairing(Repair::new(outside, &node_id), stop.clone()));
        let loader = Loader::new(database.clone(), cache.clone(), lives.clone(), l2, metrics.clone());
        for _ in 0..config.store.connections {
            tasks.spawn(loader.clone().work(stop.clone()));
        }
        let settings = directory_settings(config, database.engine, hints);
        let directory = Arc::new(Directory::new(cache.clone(), lives.clone(), loader, metrics.clone(), settings));
        tasks.spawn(upkeep::keep_tidy(Sweep::new(tools, lanes.clone()), cache.clone(), stop.clone()));
        tasks.spawn(WarmUp::new(database.clone(), directory.clone(), config.route.l1_capacity).run(stop.clone()));
        let settings = delivery_settings(config, &node_id);
        let deliveries = Deliveries::new(bus, directory.clone(), lives.clone(), metrics.clone(), settings);
        Ok(Self { node_id, database, metrics, cache, lives, gateways, heartbeats, lanes, directory, deliveries })
    }
}

fn bus(queue: &config::RedisQueue) -> Result<Bus, StartError> {
    let section = "redis_queue";
    no_tls(&queue.server, section)?;
    Bus::new(queue).map_err(|cause| StartError::Redis { section, cause })
}

fn shared(redis: &config::Redis, config: &Config, store_id: &str) -> Result<SharedCache, StartError> {
    let section = "redis_cache";
    no_tls(redis, section)?;
    SharedCache::new(redis, &config.route, store_id).map_err(|cause| StartError::Redis { section, cause })
}

fn no_tls(redis: &config::Redis, section: &'static str) -> Result<(), StartError> {
    let tls = redis.tls || redis.url.as_ref().is_some_and(|url| url.expose().starts_with("rediss:"));
    if tls { Err(StartError::NoTls { section }) } else { Ok(()) }
}

fn terms(config: &Config) -> Terms {
    let config::Gateway { heartbeat_interval, lease, doubt_share, doubt_for, .. } = config.gateway;
    Terms { heartbeat_interval, lease, doubt_share, doubt_for }
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

fn directory_settings(config: &Config, engine: Engine, hints: Option<Arc<Hints>>) -> directory::Settings {
    let hearing = match (engine, hints) {
        (Engine::Sqlite, _) => Hearing::Alone,
        (Engine::MySql, Some(hints)) => Hearing::Hints(hints),
        (Engine::MySql, None) => Hearing::Deaf,
    };
    directory::Settings {
        hearing,
        l1_ttl: config.route.l1_ttl,
        heartbeat_interval: config.gateway.heartbeat_interval,
        patience: config.store.timeout,
    }
}

fn delivery_settings(config: &Config, node_id: &str) -> delivery::Settings {
    let format = match config.delivery.payload {
        Payload::Raw => Format::Raw,
        Payload::Envelope => Format::Envelope,
    };
    let (max_retries, retry_interval) = (config.route.max_retries, config.route.retry_interval);
    delivery::Settings { format, max_retries, retry_interval, node_id: node_id.to_owned() }
}
