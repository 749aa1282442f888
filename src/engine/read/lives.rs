//! Every node's copy of the small table of gateway lives, and the database's clock with it.
//!
//! Memory may only refuse, and only by what never changes back: that a life is over. Leases move on all the time; they are as
//! the watch has read them last.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use arc_swap::ArcSwapOption;
use arc_swap::Guard;

use crate::clock::AtomicInstant;
use crate::clock::Clock;
use crate::domain::gateway::End;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::id::Epoch;
use crate::store::cluster::ClusterRow;

/// A table older than this makes routes suspect: a life may have ended without this node's knowing.
pub const SUSPECT_AFTER: Duration = Duration::from_secs(3);

pub struct Lives {
    table: ArcSwap<LifeTable>,
    /// Serialises changes; holds what was learnt since a poll was sent, so that its answer does not undo it.
    learnt: Mutex<Vec<(Instant, Arc<Life>)>>,
    as_of: AtomicInstant,
    /// Users online beyond the connections that gateways report: as the last count found.
    unreported: AtomicI64,
    /// The row that all nodes agree on, as it was read last.
    cluster: ArcSwapOption<ClusterRow>,
    pub clock: Clock,
}

impl Lives {
    pub fn new() -> Arc<Self> {
        let (table, learnt) = (ArcSwap::default(), Mutex::default());
        let (as_of, unreported) = (AtomicInstant::never(), AtomicI64::new(0));
        Arc::new(Self { table, learnt, as_of, unreported, cluster: ArcSwapOption::empty(), clock: Clock::default() })
    }

    /// The row that all nodes agree on was read.
    pub fn set_cluster(&self, cluster: ClusterRow) {
        self.cluster.store(Some(Arc::new(cluster)));
    }

    /// The row that all nodes agree on, as it was read last. None: not yet.
    pub fn cluster(&self) -> Option<Arc<ClusterRow>> {
        self.cluster.load_full()
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

    /// Users online: the connections that living gateways report, corrected by the last count in SQL.
    pub fn users_online(&self) -> i64 {
        (self.reported() + self.unreported.load(Ordering::Relaxed)).max(0)
    }

    /// SQL has `counted` users online now.
    pub fn count_users(&self, counted: i64) {
        self.unreported.store(counted - self.reported(), Ordering::Relaxed);
    }

    fn reported(&self) -> i64 {
        self.table.load().iter().filter(|life| life.is_alive()).map(|life| i64::from(life.connections)).sum()
    }

    /// Takes over what a transaction or a load has read.
    pub fn learn(&self, lives: &[Arc<Life>]) {
        let known = self.table.load();
        let news: Vec<_> = lives.iter().filter(|life| known.is_news(life)).collect();
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

    /// Lives that are said to be over. Believed from anybody: it never changes back. Why, the next look into SQL tells.
    pub fn learn_ended(&self, epochs: &[Epoch]) {
        let (table, end) = (self.table(), End { at: self.clock.now(), reason: EndReason::Untold });
        let ended = epochs.iter().filter_map(|epoch| table.get(*epoch)).map(|life| Arc::new(life.ended(end)));
        self.learn(&ended.collect::<Vec<_>>());
    }

    /// Takes over the table as read by a statement that was sent at `asked`; with the unmanaged lives that are known, unless
    /// those were read too.
    pub fn replace(&self, lives: Vec<Arc<Life>>, is_whole: bool, asked: Instant) {
        let mut learnt = self.learnt.lock().unwrap_or_else(PoisonError::into_inner);
        learnt.retain(|(when, _)| *when >= asked);
        let mut table = LifeTable::default();
        let known = self.table.load();
        let kept = known.iter().filter(|life| !is_whole && !life.is_managed() && life.is_alive());
        kept.for_each(|life| table.learn(life.clone()));
        for life in lives.into_iter().chain(learnt.iter().map(|(_, life)| life.clone())) {
            table.learn(life);
        }
        self.table.store(Arc::new(table));
        self.as_of.set(asked);
    }
}
