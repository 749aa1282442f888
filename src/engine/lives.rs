//! Every node's copy of the small table of gateway lives, read whole once a second, and the database's clock with it.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::Guard;
use tracing::info;
use tracing::warn;

use crate::clock::AtomicInstant;
use crate::clock::Clock;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::engine::cache::Cache;
use crate::engine::hints::Hints;
use crate::metrics::Metrics;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;

/// How often the table is read whole.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A node that has not said for this long that it is there is not missed on the bus.
const NODE_TERM: Duration = Duration::from_secs(3);
/// A table older than this makes routes suspect: a life may have ended without this node's knowing.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(3);

pub struct Lives {
    table: ArcSwap<LifeTable>,
    /// Serialises changes; holds what was learnt since a poll was sent, so that its answer does not undo it.
    learnt: Mutex<Vec<(Instant, Arc<Life>)>>,
    as_of: AtomicInstant,
    pub clock: Clock,
}

impl Lives {
    pub fn new() -> Arc<Self> {
        let (table, learnt) = (ArcSwap::default(), Mutex::default());
        Arc::new(Self { table, learnt, as_of: AtomicInstant::never(), clock: Clock::default() })
    }

    /// The lives as known now, for a look that is soon over: it costs no write to memory that other threads use.
    pub fn glance(&self) -> Guard<Arc<LifeTable>> {
        self.table.load()
    }

    /// The lives as known now.
    pub fn table(&self) -> Arc<LifeTable> {
        self.table.load_full()
    }

    /// Since when the table may be incomplete.
    pub fn age(&self, now: Instant) -> Duration {
        self.as_of.age(now)
    }

    /// Takes over what a transaction or a load has read.
    pub fn learn(&self, lives: &[Arc<Life>]) {
        let known = self.table.load();
        let news: Vec<_> = lives.iter().filter(|life| known.get(life.epoch).is_none_or(|known| known != *life)).collect();
        if news.is_empty() {
            return;
        }
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = LifeTable::clone(&self.table.load());
        for life in news {
            table.learn(life.clone());
            learnt.push((Instant::now(), life.clone()));
        }
        self.table.store(Arc::new(table));
    }

    /// Takes over the whole table, as read by a statement that was sent at `asked`.
    fn replace(&self, lives: Vec<Arc<Life>>, asked: Instant) {
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        learnt.retain(|(when, _)| *when >= asked);
        let mut table = LifeTable::default();
        for life in lives.into_iter().chain(learnt.iter().map(|(_, life)| life.clone())) {
            table.learn(life);
        }
        self.table.store(Arc::new(table));
        self.as_of.set(asked);
    }
}

/// Keeps the table fresh, and watches the database while it is at it.
pub struct LivesPoll {
    pub database: Arc<Database>,
    pub lives: Arc<Lives>,
    pub cache: Arc<Cache>,
    pub metrics: Arc<Metrics>,
    /// This node's id, and where other nodes reach it.
    node: (String, String),
    hints: Option<Arc<Hints>>,
    connection: Option<Connection>,
    generation: Option<u64>,
    reported_down: bool,
}

impl LivesPoll {
    pub fn new(
        database: Arc<Database>,
        lives: Arc<Lives>,
        cache: Arc<Cache>,
        metrics: Arc<Metrics>,
        node: (String, String),
        hints: Option<Arc<Hints>>,
    ) -> Self {
        Self { database, lives, cache, metrics, node, hints, connection: None, generation: None, reported_down: false }
    }

    /// Reads the cluster's row and all lives once.
    pub async fn step(&mut self) {
        let result = self.poll().await;
        self.metrics.store_up.set(i64::from(result.is_ok()));
        match result {
            Ok(()) if self.reported_down => {
                self.reported_down = false;
                info!("the database answers again");
            }
            Ok(()) => {}
            Err(error) => {
                self.connection = None;
                self.metrics.store_error("poll");
                if !self.reported_down {
                    self.reported_down = true;
                    warn!(%error, "the database does not answer: cached users are answered with their age, binds are refused");
                }
            }
        }
    }

    async fn poll(&mut self) -> Result<(), SqlError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => self.database.connect(Purpose::General).await?,
        };
        let asked = Instant::now();
        let cluster = connection.read_cluster().await?;
        self.lives.clock.learn(cluster.clock.now(), asked);
        self.metrics.cache_generation.set(i64::try_from(cluster.generation).unwrap_or(i64::MAX));
        if self.generation.is_some_and(|known| known != cluster.generation) {
            warn!(generation = cluster.generation, "the caches' generation was raised: memory is not trusted any more");
            self.cache.distrust();
        }
        self.generation = Some(cluster.generation);
        let asked = Instant::now();
        let lives = connection.read_lives().await?;
        self.lives.replace(lives, asked);
        if let Some(hints) = &self.hints {
            hints.set_generation(cluster.generation);
            hints.nodes_alive(connection.beat_node(&self.node.0, &self.node.1, NODE_TERM).await?.into_iter());
        }
        self.connection = Some(connection);
        Ok(())
    }
}
