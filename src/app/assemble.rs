//! Builds the engine from the configuration, bottom to top, and starts its tasks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::allocation::AllocationCalls;
use crate::api::attach;
use crate::api::binder::Binder;
use crate::api::gateway::Leases;
use crate::api::node::Node;
use crate::api::presence::Presence;
use crate::api::queries::Queries;
use crate::api::report::Reporter;
use crate::api::watch::WatchContext;
use crate::app::StartError;
use crate::app::moving;
use crate::app::neighbours;
use crate::app::redis;
use crate::app::serve::Services;
use crate::app::settings;
use crate::app::upkeep;
use crate::config::Config;
use crate::engine::gateways::allocation::Allocator;
use crate::engine::gateways::attaching::Attaching;
use crate::engine::gateways::digests::Digests;
use crate::engine::gateways::drains::Drains;
use crate::engine::gateways::heartbeats::Heartbeats;
use crate::engine::gateways::reaper::Reaper;
use crate::engine::gateways::registry::Registry;
use crate::engine::gateways::sweep::Sweep;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::delivery::Deliveries;
use crate::engine::messages::inbox::DRAINERS;
use crate::engine::messages::inbox::Inboxes;
use crate::engine::messages::kicks::Kicks;
use crate::engine::messages::outlets::Outlets;
use crate::engine::messages::peers::Line;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::streams::Streams;
use crate::engine::presence::explaining::Explaining;
use crate::engine::presence::history::History;
use crate::engine::presence::pruning::Pruning;
use crate::engine::presence::status_ends::StatusEnds;
use crate::engine::presence::statuses::Statuses;
use crate::engine::presence::teller::Teller;
use crate::engine::presence::watches::Watches;
use crate::engine::read::cache::Cache;
use crate::engine::read::directory::Directory;
use crate::engine::read::feed::Feed;
use crate::engine::read::hints::Hints;
use crate::engine::read::inspection::Inspection;
use crate::engine::read::l2::L2;
use crate::engine::read::l2::L2Check;
use crate::engine::read::lives::Lives;
use crate::engine::read::loader::L2_READERS;
use crate::engine::read::loader::Loader;
use crate::engine::read::warm_up::WarmUp;
use crate::engine::write::change::LaneContext;
use crate::engine::write::inbox_queue::InboxQueue;
use crate::engine::write::lanes::Lanes;
use crate::engine::write::lanes::NEW_NAMES_AT_ONCE;
use crate::engine::write::lanes::NEW_NAMES_PER_SECOND;
use crate::engine::write::publisher::Publisher;
use crate::engine::write::rate::Rate;
use crate::engine::write::repair::Repair;
use crate::memory::Memory;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::cluster::NodeName;
use crate::store::connection::Engine;
use crate::store::database::Database;
use crate::store::posts::Posts;

/// How long a starting node waits to hear itself on the bus before it serves, deaf.
const HEAR_PATIENCE: Duration = Duration::from_secs(2);

/// The engine, running.
pub struct Daemon {
    pub own: NodeName,
    pub database: Arc<Database>,
    pub metrics: Arc<Metrics>,
    pub memory: Arc<Memory>,
    pub cache: Arc<Cache>,
    pub lives: Arc<Lives>,
    pub gateways: Arc<Registry>,
    pub heartbeats: Arc<Heartbeats>,
    pub attaching: Arc<Attaching>,
    pub allocator: Arc<Allocator>,
    pub digests: Arc<Digests>,
    pub streams: Arc<Streams>,
    pub peers: Arc<Peers>,
    /// Calls to other nodes, for whoever speaks the protocol.
    pub peer_lines: Option<mpsc::Receiver<Line>>,
    pub acks: Arc<Acks>,
    pub inboxes: Arc<Inboxes>,
    pub lanes: Arc<Lanes>,
    pub hints: Option<Arc<Hints>>,
    pub directory: Arc<Directory>,
    pub deliveries: Arc<Deliveries>,
    pub statuses: Arc<Statuses>,
    pub history: Arc<History>,
    pub watches: Arc<Watches>,
    pub drains: Arc<Drains>,
    pub explaining: Arc<Explaining>,
}

/// What every part of the engine stands on, and how its tasks are started.
struct Foundation<'a> {
    config: &'a Config,
    own: NodeName,
    database: Arc<Database>,
    metrics: Arc<Metrics>,
    memory: Arc<Memory>,
    lives: Arc<Lives>,
    cache: Arc<Cache>,
    feed: Arc<Feed>,
    bus: Option<Arc<Bus>>,
    l2: Option<Arc<L2>>,
    hints: Option<Arc<Hints>>,
    tasks: &'a mut JoinSet<()>,
    stop: &'a CancellationToken,
}

impl Daemon {
    /// In this order: subscribe, look at Redis, read the lives, start the lanes, warm the memory while queries are answered
    /// already.
    pub async fn start(
        config: &Config,
        database: Arc<Database>,
        data: SocketAddr,
        metrics: Arc<Metrics>,
        tasks: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) -> Result<Self, StartError> {
        let mut base = Foundation::lay(config, database, data, metrics, tasks, stop).await?;
        base.listen().await;
        let (outlets, peer_lines) = base.outlets();
        let kicks = base.kicks(&outlets);
        let publisher = base.publisher(&kicks);
        base.check_l2().await; // it may raise the generation; whoever has seen the one before trusts no memory then
        let (gateways, heartbeats) = base.gateways(&outlets, &publisher).await;
        let inbox_queue = Arc::new(InboxQueue::default());
        let lanes = base.lanes(publisher, &inbox_queue);
        let directory = base.directory();
        let acks = Acks::new(&base.own.node_id, base.metrics.clone());
        let deliveries = Deliveries::new(
            outlets.clone(),
            acks.clone(),
            directory.clone(),
            lanes.clone(),
            base.lives.clone(),
            base.metrics.clone(),
            settings::delivery(config),
        );
        let inboxes = base.inboxes(inbox_queue, &deliveries, &directory, &lanes);
        let (statuses, history, watches) = base.presence(&directory, &lanes);
        let drains = base.drains(&outlets, &kicks, &lanes);
        let explaining = base.explaining(&directory, &watches);
        let digests = base.digests(&lanes);
        let (streams, peers, grace) = (outlets.streams.clone(), outlets.peers.clone(), config.gateway.stream_grace);
        let attaching = Arc::new(Attaching { registry: gateways.clone(), streams: streams.clone(), kicks, grace });
        let allocator = Allocator::new(settings::allocation(config), base.lives.clone(), peers.clone(), base.metrics.clone());
        let Foundation { own, database, metrics, memory, cache, lives, hints, .. } = base;
        Ok(Self {
            own,
            database,
            metrics,
            memory,
            cache,
            lives,
            gateways,
            heartbeats,
            attaching,
            allocator,
            digests,
            streams,
            peers,
            peer_lines: Some(peer_lines),
            acks,
            inboxes,
            lanes,
            hints,
            directory,
            deliveries,
            statuses,
            history,
            watches,
            drains,
            explaining,
        })
    }

    /// The services in front of it. Streams are tasks of `attached`, and end when `draining` is cancelled.
    pub fn services(
        &self,
        config: &Config,
        draining: &CancellationToken,
        attached: &TaskTracker,
        reporter: Option<Arc<Reporter>>,
    ) -> Services<Presence> {
        let (lives, metrics) = (self.lives.clone(), self.metrics.clone());
        let binder = Arc::new(Binder { lanes: self.lanes.clone(), lives: lives.clone(), metrics: metrics.clone() });
        let watching =
            Arc::new(WatchContext { directory: self.directory.clone(), lives: lives.clone(), draining: draining.clone() });
        let (statuses, watches, history) = (self.statuses.clone(), self.watches.clone(), self.history.clone());
        let stream_tools = Arc::new(attach::StreamContext {
            attaching: self.attaching.clone(),
            digests: self.digests.clone(),
            heartbeats: self.heartbeats.clone(),
            binder: binder.clone(),
            acks: self.acks.clone(),
            peers: self.peers.clone(),
            lives: lives.clone(),
            statuses: statuses.clone(),
            watches: watches.clone(),
            watching: watching.clone(),
            draining: draining.clone(),
        });
        let (directory, deliveries) = (self.directory.clone(), self.deliveries.clone());
        let queries = Queries::new(directory.clone(), metrics, self.memory.clone());
        let max_message_bytes = config.delivery.max_message_bytes;
        let leases = Leases {
            gateways: self.gateways.clone(),
            heartbeats: self.heartbeats.clone(),
            lives: lives.clone(),
            inboxes: self.inboxes.clone(),
            directory,
            stream_tools,
            attached: attached.clone(),
        };
        let allocation = AllocationCalls { allocator: self.allocator.clone(), peers: self.peers.clone(), lives: lives.clone() };
        let (store_id, streams, acks) = (self.database.store_id.as_str().into(), self.streams.clone(), self.acks.clone());
        let (peers, explaining) = (self.peers.clone(), self.explaining.clone());
        let node = Node { store_id, streams, acks, peers, lives, explaining, reporter, spans: None };
        Services {
            presence: Presence { binder, deliveries, max_message_bytes, statuses, history, watches, watching, allocation },
            more: Some((queries, leases, node)),
        }
    }
}

impl<'a> Foundation<'a> {
    async fn lay(
        config: &'a Config,
        database: Arc<Database>,
        data: SocketAddr,
        metrics: Arc<Metrics>,
        tasks: &'a mut JoinSet<()>,
        stop: &'a CancellationToken,
    ) -> Result<Self, StartError> {
        let advertise = config.presence_service.advertise.clone();
        if advertise.is_none() && database.engine == Engine::MySql && data.ip().to_canonical().is_unspecified() {
            return Err(StartError::Unnamed); // a name that stands for every address
        }
        let incarnation = uuid::Uuid::new_v4().to_string();
        let node_id = config.presence_service.node_id.clone();
        let is_given = node_id.is_some();
        let node_id = node_id.unwrap_or_else(|| incarnation.clone());
        let own = NodeName {
            node_id,
            incarnation,
            addr: advertise.unwrap_or_else(|| data.to_string()),
            zone: config.node.zone.clone(),
        };
        if is_given {
            neighbours::must_not_be_twins(&own, &database).await?;
        }
        let (lives, cache) = (Lives::new(), Cache::new(config.route.l1_capacity));
        let memory = Memory::new(config.limits.memory_bytes);
        settings::tell_limits(config, database.engine, &metrics);
        let (bus, shared) = redis::open(config, &database).await?;
        let l2 = shared.map(|shared| L2::new(shared, metrics.clone()));
        let ids = (&own, &*database.store_id);
        let feed = Arc::<Feed>::default();
        let hints = bus.clone().map(|bus| Hints::new(bus, ids, cache.clone(), lives.clone(), feed.clone(), metrics.clone()));
        Ok(Self { config, own, database, metrics, memory, lives, cache, feed, bus, l2, hints, tasks, stop })
    }

    fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task);
    }

    /// Hears the other nodes from here on.
    async fn listen(&mut self) {
        if let Some(hints) = self.hints.clone() {
            self.spawn(hints.clone().keep_listening(self.stop.clone()));
            self.spawn(hints.clone().keep_beating(self.stop.clone()));
            hints.heard_itself(HEAR_PATIENCE).await;
        }
    }

    fn outlets(&mut self) -> (Arc<Outlets>, mpsc::Receiver<Line>) {
        let (peers, lines) = Peers::new(self.own.clone());
        let streams = Streams::new(self.config.gateway.lease, self.memory.clone(), self.metrics.clone());
        let posts = self.bus.clone().map(|bus| Posts::start(bus, self.tasks, self.stop));
        (Arc::new(Outlets { node_id: self.own.node_id.clone(), streams, peers, bus: self.bus.clone(), posts }), lines)
    }

    fn kicks(&mut self, outlets: &Arc<Outlets>) -> Arc<Kicks> {
        let (kicks, unheard) = Kicks::new(outlets.clone(), self.lives.clone(), self.metrics.clone(), self.database.clone());
        self.spawn(kicks.clone().keep_repeating(unheard, self.stop.clone()));
        kicks
    }

    fn publisher(&mut self, kicks: &Arc<Kicks>) -> Arc<Publisher> {
        let publisher = Arc::new(Publisher {
            l2: self.l2.clone(),
            hints: self.hints.clone(),
            bus: self.bus.clone(),
            gateways: kicks.clone(),
            cache: self.cache.clone(),
            feed: self.feed.clone(),
            lives: self.lives.clone(),
            metrics: self.metrics.clone(),
            database: self.database.clone(),
            heartbeat_interval: self.config.gateway.heartbeat_interval,
        });
        self.spawn(upkeep::keep_repairing(Repair::new(publisher.clone(), &self.own.incarnation), self.stop.clone()));
        publisher
    }

    /// Knows who lives when this returns, unless the database does not answer.
    async fn gateways(&mut self, outlets: &Outlets, publisher: &Arc<Publisher>) -> (Arc<Registry>, Arc<Heartbeats>) {
        let (terms, database, metrics) = (settings::terms(self.config), self.database.clone(), self.metrics.clone());
        let gateways = Registry::new(terms, &self.own.node_id, database, self.lives.clone(), publisher.clone(), metrics);
        let longest = self.config.route.route_ttl.max(self.config.delivery.inbox_ttl);
        let mut watch =
            Reaper::new(gateways.clone(), self.cache.clone(), self.hints.clone(), outlets, longest, self.stop.clone());
        watch.step().await;
        self.spawn(upkeep::keep_watching(watch, self.stop.clone()));
        let (heartbeats, recorder) = Heartbeats::new(gateways.clone());
        self.spawn(recorder.run(self.stop.clone()));
        (gateways, heartbeats)
    }

    fn digests(&mut self, lanes: &Arc<Lanes>) -> Arc<Digests> {
        let (database, lives, metrics) = (self.database.clone(), self.lives.clone(), self.metrics.clone());
        let (digests, due) = Digests::new(settings::digests(self.config), database, lanes.clone(), lives, metrics);
        self.spawn(digests.clone().run(due, self.stop.clone()));
        digests
    }

    async fn check_l2(&mut self) {
        if let Some(l2) = self.l2.clone() {
            let (database, cache, hints) = (self.database.clone(), self.cache.clone(), self.hints.clone());
            let mut check = L2Check::new(l2, database, cache, hints, self.metrics.clone());
            check.step().await;
            self.spawn(check.keep_checking(self.stop.clone()));
        }
    }

    fn lanes(&mut self, publisher: Arc<Publisher>, inbox_queue: &Arc<InboxQueue>) -> Arc<Lanes> {
        let tools = Arc::new(LaneContext {
            node_id: self.own.node_id.clone(),
            claimant: self.own.incarnation.clone(),
            database: self.database.clone(),
            cache: self.cache.clone(),
            lives: self.lives.clone(),
            feed: self.feed.clone(),
            metrics: self.metrics.clone(),
            publisher,
            inboxes: inbox_queue.clone(),
            write_health: Arc::default(),
            newcomers: Rate::new(NEW_NAMES_PER_SECOND, NEW_NAMES_AT_ONCE),
            settings: settings::lanes(self.config, self.database.engine),
        });
        let lanes = Lanes::start(&tools, self.tasks, self.stop);
        self.spawn(upkeep::keep_tidy(Sweep::new(tools, lanes.clone()), self.stop.clone()));
        lanes
    }

    fn directory(&mut self) -> Arc<Directory> {
        let (database, cache, lives, metrics) =
            (self.database.clone(), self.cache.clone(), self.lives.clone(), self.metrics.clone());
        let loader = Loader::new(database.clone(), cache.clone(), lives.clone(), self.l2.clone(), metrics.clone());
        for _ in 0..self.config.store.connections {
            self.spawn(loader.clone().work(self.stop.clone()));
        }
        if self.l2.is_some() {
            for _ in 0..L2_READERS {
                self.spawn(loader.clone().work_ahead(self.stop.clone()));
            }
        }
        let settings = settings::directory(self.config, database.engine, self.hints.clone());
        let directory = Arc::new(Directory::new(cache, lives, loader, metrics, settings));
        let warm_up = WarmUp::new(database, directory.clone(), self.config.route.l1_capacity);
        self.spawn(warm_up.run(self.stop.clone()));
        directory
    }

    fn presence(&mut self, directory: &Arc<Directory>, lanes: &Arc<Lanes>) -> (Arc<Statuses>, Arc<History>, Arc<Watches>) {
        let (config, database, lives, metrics) = (self.config, self.database.clone(), self.lives.clone(), self.metrics.clone());
        let pace = (config.status.rate, config.status.burst);
        let statuses = Statuses::new(lanes.clone(), pace, config.status.text_bytes, metrics.clone());
        let history = History::new(database.clone(), directory.clone(), lives.clone());
        let watches = Watches::new(settings::watches(config), self.feed.clone(), lives.clone(), metrics);
        let teller = Teller::new(watches.clone(), directory.clone(), self.cache.clone());
        self.spawn(teller.run(self.stop.clone()));
        let claimant = self.own.incarnation.clone();
        let ends = StatusEnds::new(database.clone(), lanes.clone(), lives.clone(), &claimant);
        self.spawn(upkeep::keep_ending_statuses(ends, self.stop.clone()));
        let keep = Duration::from_secs(86_400) * config.history.keep_days;
        let pruning = Pruning::new(database, lives, &claimant, keep, config.history.keep_rows.into());
        self.spawn(upkeep::keep_pruning(pruning, self.stop.clone()));
        (Arc::new(statuses), Arc::new(history), watches)
    }

    fn drains(&mut self, outlets: &Arc<Outlets>, kicks: &Arc<Kicks>, lanes: &Arc<Lanes>) -> Arc<Drains> {
        let on = (self.database.clone(), self.lives.clone(), self.metrics.clone());
        let with = (lanes.clone(), outlets.clone(), kicks.clone());
        moving::start(self.config, &self.own, on, with, self.tasks, self.stop)
    }

    fn explaining(&self, directory: &Arc<Directory>, watches: &Arc<Watches>) -> Arc<Explaining> {
        let (lives, database) = (self.lives.clone(), self.database.clone());
        let inspection = Inspection::new(directory.clone(), lives, self.l2.clone(), database);
        let heartbeat_interval = self.config.gateway.heartbeat_interval;
        Arc::new(Explaining { inspection, watches: watches.clone(), heartbeat_interval })
    }

    fn inboxes(
        &mut self,
        inbox_queue: Arc<InboxQueue>,
        deliveries: &Arc<Deliveries>,
        directory: &Arc<Directory>,
        lanes: &Arc<Lanes>,
    ) -> Arc<Inboxes> {
        let inboxes = Inboxes::new(
            &self.own.incarnation,
            inbox_queue,
            deliveries.clone(),
            directory.clone(),
            lanes.clone(),
            self.lives.clone(),
            self.database.clone(),
            self.memory.clone(),
        );
        for _ in 0..DRAINERS {
            self.spawn(inboxes.clone().keep_draining(self.stop.clone()));
        }
        self.spawn(upkeep::keep_looking(inboxes.clone(), self.stop.clone()));
        inboxes
    }
}
