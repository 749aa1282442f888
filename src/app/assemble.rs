//! Builds the engine from the configuration, bottom to top, and starts its tasks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::attach;
use crate::api::binder::Binder;
use crate::api::gateway::Leases;
use crate::api::node::Node;
use crate::api::presence::Presence;
use crate::app::StartError;
use crate::app::neighbours;
use crate::app::serve::Services;
use crate::app::upkeep;
use crate::config;
use crate::config::Config;
use crate::config::OnOverflow;
use crate::config::Payload;
use crate::domain::inbox::Limits;
use crate::domain::policy;
use crate::domain::policy::DevicePolicy;
use crate::engine::acks::Acks;
use crate::engine::attaching::Attaching;
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
use crate::engine::inbox::DRAINERS;
use crate::engine::inbox::Drains;
use crate::engine::inbox::Inboxes;
use crate::engine::kicks::Kicks;
use crate::engine::l2::L2;
use crate::engine::l2::L2Check;
use crate::engine::lanes;
use crate::engine::lanes::Lanes;
use crate::engine::lanes::Tools;
use crate::engine::lives::Lives;
use crate::engine::loader::Loader;
use crate::engine::outlets::Outlets;
use crate::engine::peers::Call;
use crate::engine::peers::Peers;
use crate::engine::projection::Outside;
use crate::engine::projection::Repair;
use crate::engine::streams::Streams;
use crate::engine::sweep::Sweep;
use crate::engine::warm_up::WarmUp;
use crate::engine::watch::Seen;
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
    pub attaching: Arc<Attaching>,
    pub streams: Arc<Streams>,
    pub peers: Arc<Peers>,
    /// Calls to other nodes, for whoever speaks the protocol.
    pub peer_calls: Option<mpsc::Receiver<Call>>,
    pub acks: Arc<Acks>,
    pub inboxes: Arc<Inboxes>,
    pub lanes: Arc<Lanes>,
    pub hints: Option<Arc<Hints>>,
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
        let (bus, shared) = redis(config, &database).await?;
        let l2 = shared.map(|shared| L2::new(shared, metrics.clone()));
        let ids = (&*node_id, &*database.store_id);
        let hints = bus.clone().map(|bus| Hints::new(bus, ids, cache.clone(), lives.clone(), metrics.clone()));

        if let Some(hints) = &hints {
            tasks.spawn(hints.clone().keep_listening(stop.clone()));
            tasks.spawn(hints.clone().keep_beating(stop.clone()));
            hints.heard_itself(HEAR_PATIENCE).await;
        }
        let ((peers, peer_calls), streams) = (Peers::new((node_id.clone(), addr)), Streams::new(metrics.clone()));
        let acks = Acks::new(&node_id, metrics.clone());
        let outlets = Outlets { node_id: node_id.clone(), streams: streams.clone(), peers: peers.clone(), bus: bus.clone() };
        let outlets = Arc::new(outlets);
        let (kicks, unheard) = Kicks::new(outlets.clone(), lives.clone(), metrics.clone());
        tasks.spawn(kicks.clone().keep_repeating(unheard, stop.clone()));
        let outside = Arc::new(Outside {
            l2: l2.clone(),
            hints: hints.clone(),
            bus: bus.clone(),
            kicks,
            cache: cache.clone(),
            lives: lives.clone(),
            metrics: metrics.clone(),
            database: database.clone(),
            heartbeat_interval: config.gateway.heartbeat_interval,
        });
        let terms = terms(config);
        let gateways = Gateways::new(terms, &node_id, database.clone(), lives.clone(), outside.clone(), metrics.clone());
        let mut watch = Watch {
            database: database.clone(),
            lives: lives.clone(),
            cache: cache.clone(),
            metrics: metrics.clone(),
            gateways: gateways.clone(),
            hints: hints.clone(),
            peers: peers.clone(),
            streams: streams.clone(),
            seen: Seen::default(),
        };
        watch.step().await;
        tasks.spawn(upkeep::keep_watching(watch, stop.clone()));
        let (heartbeats, recorder) = Heartbeats::new(gateways.clone());
        tasks.spawn(recorder.run(stop.clone()));
        if let Some(l2) = &l2 {
            let mut check = L2Check::new(l2.clone(), database.clone(), cache.clone(), hints.clone(), metrics.clone());
            check.step().await;
            tasks.spawn(check.keep_checking(stop.clone()));
        }

        let drains = Arc::new(Drains::default());
        let tools = Arc::new(Tools {
            node_id: node_id.clone(),
            database: database.clone(),
            cache: cache.clone(),
            lives: lives.clone(),
            metrics: metrics.clone(),
            outside: outside.clone(),
            drains: drains.clone(),
            settings: lane_settings(config, database.engine),
        });
        let lanes = Lanes::start(&tools, tasks, stop);
        tasks.spawn(upkeep::keep_repairing(Repair::new(outside, &node_id), stop.clone()));
        let loader = Loader::new(database.clone(), cache.clone(), lives.clone(), l2, metrics.clone());
        for _ in 0..config.store.connections {
            tasks.spawn(loader.clone().work(stop.clone()));
        }
        let settings = directory_settings(config, database.engine, hints.clone());
        let directory = Arc::new(Directory::new(cache.clone(), lives.clone(), loader, metrics.clone(), settings));
        tasks.spawn(upkeep::keep_tidy(Sweep::new(tools, lanes.clone()), stop.clone()));
        tasks.spawn(WarmUp::new(database.clone(), directory.clone(), config.route.l1_capacity).run(stop.clone()));
        let deliveries = Deliveries::new(
            outlets,
            acks.clone(),
            directory.clone(),
            lanes.clone(),
            lives.clone(),
            metrics.clone(),
            delivery_settings(config),
        );
        let inboxes = Inboxes::new(
            &node_id,
            drains,
            deliveries.clone(),
            directory.clone(),
            lanes.clone(),
            lives.clone(),
            metrics.clone(),
            database.clone(),
        );
        for _ in 0..DRAINERS {
            tasks.spawn(inboxes.clone().keep_draining(stop.clone()));
        }
        tasks.spawn(upkeep::keep_looking(inboxes.clone(), stop.clone()));
        let attaching = Attaching { gateways: gateways.clone(), streams: streams.clone(), grace: config.gateway.stream_grace };
        let attaching = Arc::new(attaching);
        Ok(Self {
            node_id,
            database,
            metrics,
            cache,
            lives,
            gateways,
            heartbeats,
            attaching,
            streams,
            peers,
            peer_calls: Some(peer_calls),
            acks,
            inboxes,
            lanes,
            hints,
            directory,
            deliveries,
        })
    }

    /// The services in front of it. Streams are tasks of `attached`, and end when `draining` is cancelled.
    pub fn services(&self, config: &Config, draining: &CancellationToken, attached: &TaskTracker) -> Services<Presence> {
        let (lives, metrics) = (self.lives.clone(), self.metrics.clone());
        let binder = Arc::new(Binder { lanes: self.lanes.clone(), lives: lives.clone(), metrics: metrics.clone() });
        let stream_tools = Arc::new(attach::Tools {
            attaching: self.attaching.clone(),
            heartbeats: self.heartbeats.clone(),
            binder: binder.clone(),
            acks: self.acks.clone(),
            peers: self.peers.clone(),
            lives: lives.clone(),
            draining: draining.clone(),
        });
        let (directory, deliveries) = (self.directory.clone(), self.deliveries.clone());
        let max_message_bytes = config.delivery.max_message_bytes;
        let leases = Leases {
            gateways: self.gateways.clone(),
            heartbeats: self.heartbeats.clone(),
            lives: lives.clone(),
            inboxes: self.inboxes.clone(),
            stream_tools,
            attached: attached.clone(),
        };
        let (store_id, streams, acks) = (self.database.store_id.clone(), self.streams.clone(), self.acks.clone());
        Services {
            presence: Presence { binder, directory, deliveries, metrics, max_message_bytes },
            cluster: Some((leases, Node { store_id, streams, acks, peers: self.peers.clone(), lives })),
        }
    }
}

/// Both uses of Redis, as far as they are configured.
async fn redis(config: &Config, database: &Database) -> Result<(Option<Arc<Bus>>, Option<SharedCache>), StartError> {
    let bus = config.redis_queue.as_ref().map(bus).transpose()?.map(Arc::new);
    let cache = config.redis_cache.as_ref().map(|redis| shared(redis, config, &database.store_id)).transpose()?;
    if database.engine == Engine::Sqlite {
        neighbours::must_not_be(&database.store_id, cache.as_ref(), bus.as_deref()).await?;
    }
    Ok((bus, cache))
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
        inbox: Limits {
            messages: config.delivery.inbox_max_messages,
            bytes: config.delivery.inbox_max_bytes,
            ttl: config.delivery.inbox_ttl,
        },
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

fn delivery_settings(config: &Config) -> delivery::Settings {
    let format = match config.delivery.payload {
        Payload::Raw => Format::Raw,
        Payload::Envelope => Format::Envelope,
    };
    let (max_retries, retry_interval) = (config.route.max_retries, config.route.retry_interval);
    delivery::Settings { format, max_retries, retry_interval }
}
