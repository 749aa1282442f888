//! What this node hears of the others, and how far its memory can be believed because of it.
//!
//! Hints are counted per sender, and every node beats once a second on the same channel. A gap in a sender's count, or a new
//! subscription, means that hints were lost: everything in memory is distrusted. This node's own beat, heard again, proves
//! that all that was sent before it has been read. Freshness is always a time compared when reading.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing::info;
use tracing::warn;

use crate::backoff::Backoff;
use crate::clock::AtomicInstant;
use crate::domain::id::Epoch;
use crate::domain::id::Version;
use crate::engine::read::cache::Cache;
use crate::engine::read::feed::Feed;
use crate::engine::read::lives::Lives;
use crate::engine::read::lives::SUSPECT_AFTER;
use crate::engine::read::outgoing::Outgoing;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::bus::Heard;
use crate::store::cluster::NodeName;
use crate::store::codec::ChangedUser;
use crate::store::codec::Hint;
use crate::store::codec::LivesHint;
use crate::store::link_error::LinkError;

const BEAT_INTERVAL: Duration = Duration::from_secs(1);
/// Silence of a living node, or of this node's own echo, after which hints may be missing.
const DEAF_AFTER: Duration = Duration::from_secs(3);
/// How long a beat may be held up by asking the server for its memory.
const MEMORY_LIMIT: Duration = Duration::from_millis(200);
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
const RESUBSCRIBE_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));

/// What a former process of this name has sent is heard within this time after the start of this one.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Send time of the last message from each other node that SQL says is alive.
type Others = HashMap<String, Arc<AtomicInstant>>;

pub struct Hints {
    bus: Arc<Bus>,
    own: NodeName,
    store_id: String,
    started: Instant,
    generation: AtomicU64,
    outgoing: Outgoing,
    /// When this node's newest beat that was heard again had been sent.
    echo: AtomicInstant,
    others: ArcSwap<Others>,
    /// When another node had said last that it reads the database.
    others_read: AtomicInstant,
    /// Of each other node: which process of it was heard last, and the number of its last message.
    heard: Mutex<HashMap<String, (String, u64)>>,
    cache: Arc<Cache>,
    lives: Arc<Lives>,
    feed: Arc<Feed>,
    metrics: Arc<Metrics>,
}

impl Hints {
    pub fn new(
        bus: Arc<Bus>,
        (own, store_id): (&NodeName, &str),
        cache: Arc<Cache>,
        lives: Arc<Lives>,
        feed: Arc<Feed>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            bus,
            own: own.clone(),
            store_id: store_id.to_owned(),
            started: Instant::now(),
            generation: AtomicU64::new(0),
            outgoing: Outgoing::default(),
            echo: AtomicInstant::never(),
            others: ArcSwap::default(),
            others_read: AtomicInstant::never(),
            heard: Mutex::default(),
            cache,
            lives,
            feed,
            metrics,
        })
    }

    /// How long ago all changes made until then were known. None: hints may be missing.
    pub fn complete_since(&self, now: Instant) -> Option<Duration> {
        // A node that was heard had told everything before; of one that is silent, nothing is known since.
        let silence = self.others.load().values().map(|heard| heard.age(now)).max().unwrap_or_default();
        let since = self.echo.age(now).max(silence);
        (since <= DEAF_AFTER).then_some(since)
    }

    /// Whether this node alone does not read the database: others say that they do.
    pub fn is_cut_off(&self) -> bool {
        let now = Instant::now();
        self.lives.age(now) > SUSPECT_AFTER && self.others_read.age(now) < DEAF_AFTER
    }

    /// Waits until this node has heard itself, that is, until it hears others too.
    pub async fn heard_itself(&self, patience: Duration) {
        let began = Instant::now();
        while self.complete_since(Instant::now()).is_none() && began.elapsed() < patience {
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Takes over which other nodes SQL says are alive. One that is new has a moment to be heard.
    pub fn nodes_alive(&self, nodes: impl Iterator<Item = String>) {
        let known = self.others.load();
        let heard = |node: &String| known.get(node).cloned().unwrap_or_else(|| Arc::new(AtomicInstant::now()));
        let alive: Others = nodes.filter(|node| *node != self.own.node_id).map(|node| (node.clone(), heard(&node))).collect();
        self.others.store(Arc::new(alive));
    }

    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Ordering::Relaxed);
    }

    /// Tells the other nodes who has changed. If it is lost, they see the gap.
    pub async fn tell(&self, users: Vec<ChangedUser>) {
        let send = async |number, users| {
            self.metrics.hint("sent");
            if self.bus.hint(&self.message(number, users)).await.is_err() {
                self.metrics.redis_error("queue");
            }
        };
        self.outgoing.tell(users, || self.bus.is_up(), send).await;
    }

    /// Beats until `stop`.
    pub async fn keep_beating(self: Arc<Self>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut ticks = interval(BEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            stop.run_until_cancelled(self.beat_and_look()).await;
        }
    }

    /// What is published at a replica reaches nobody, and nobody says so.
    async fn beat_and_look(&self) {
        let beaten = self.beat().await;
        let server = self.bus.look(MEMORY_LIMIT).await;
        let is_wrong = matches!(server, Err(LinkError::Replica | LinkError::ClusterDown));
        self.metrics.redis_up("queue", beaten && !is_wrong);
        match server {
            Ok(server) => self.metrics.redis_memory("queue", server.used_memory),
            Err(error) if is_wrong => warn!(%error, "Redis (queue) passes nothing on: its connections are made anew"),
            Err(_) => {} // it may keep this to itself
        }
    }

    async fn beat(&self) -> bool {
        self.outgoing.beat(async |number| self.bus.hint(&self.message(number, Vec::new())).await.is_ok()).await
    }

    /// Listens until `stop`, and subscribes again whenever the subscription ends.
    pub async fn keep_listening(self: Arc<Self>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let (mut hearing, mut backoff) = (true, Backoff::new(RESUBSCRIBE_PAUSES.0, RESUBSCRIBE_PAUSES.1));
        while !stop.is_cancelled() {
            match stop.run_until_cancelled(self.bus.listen()).await {
                None => return,
                Some(Ok(mut subscription)) => {
                    // Only what is loaded from here on is covered by what will be heard.
                    self.cache.distrust();
                    self.heard().clear();
                    if !std::mem::replace(&mut hearing, true) {
                        info!("hears hints of the other nodes again");
                    }
                    while let Some(Some(heard)) = stop.run_until_cancelled(subscription.next()).await {
                        backoff.reset();
                        match heard {
                            Heard::Users(hint) if self.is_of_a_twin(&hint) => {
                                error!("another process with node_id {} is heard: this one ends", self.own.node_id);
                                stop.cancel();
                            }
                            Heard::Users(hint) => self.take(&hint),
                            Heard::Lives(hint) => self.take_ended(&hint),
                        }
                    }
                }
                Some(Err(error)) => {
                    self.metrics.redis_error("queue");
                    if std::mem::replace(&mut hearing, false) {
                        warn!(%error, "hears no hints of the other nodes: cached records are used for one second only");
                    }
                }
            }
            stop.run_until_cancelled(sleep(backoff.pause())).await;
        }
    }

    /// Whether a process of the same name has sent it that lives beside this one. The former process's last words are not.
    fn is_of_a_twin(&self, hint: &Hint) -> bool {
        let own_name = hint.store_id == self.store_id && hint.node_id == self.own.node_id;
        let later = self.lives.clock.at(self.started + LAST_WORDS).0;
        own_name && hint.incarnation != self.own.incarnation && self.started.elapsed() > LAST_WORDS && hint.sent_at_ms > later
    }

    fn take(&self, hint: &Hint) {
        if hint.store_id != self.store_id {
            self.metrics.hint("of_another_store");
            return;
        }
        if hint.node_id == self.own.node_id && hint.incarnation == self.own.incarnation {
            self.echo.set(self.started + Duration::from_millis(hint.sent_ms));
            return;
        }
        self.metrics.hint("received");
        if hint.reads_database {
            self.others_read.set(Instant::now());
        }
        if hint.generation < self.generation.load(Ordering::Relaxed) {
            return; // its sender has not heard yet that the database was set back
        }
        // What was sent between this subscription and the first message that is heard here may not have arrived at all.
        let expected = hint.seq.saturating_sub(u64::from(!hint.users.is_empty()));
        let before = self.heard().insert(hint.node_id.clone(), (hint.incarnation.clone(), hint.seq));
        let before = before.filter(|(incarnation, _)| *incarnation == hint.incarnation).map(|(_, seq)| seq);
        if before.unwrap_or(0) != expected {
            if before.is_some() {
                self.metrics.hint_gaps.inc();
            }
            self.cache.distrust();
        }
        let changed = || hint.users.iter().filter_map(|changed| Some((changed.user()?, changed)));
        changed().for_each(|(user, changed)| self.cache.hint(user, Version(changed.version)));
        self.feed.push(changed().map(|(user, changed)| (user, changed.shown()))); // memory has let go of what is older
        self.note_heard(hint);
    }

    fn take_ended(&self, hint: &LivesHint) {
        if hint.store_id != self.store_id {
            self.metrics.hint("of_another_store");
            return;
        }
        self.lives.learn_ended(&hint.ended.iter().copied().map(Epoch).collect::<Vec<_>>());
    }

    /// Tells the other nodes of lives that are over. False: it could not be told.
    pub async fn tell_ended(&self, epochs: &[Epoch]) -> bool {
        let hint = LivesHint { store_id: self.store_id.clone(), ended: epochs.iter().map(|epoch| epoch.0).collect() };
        self.bus.lives_ended(&hint).await.is_ok()
    }

    /// Everything its sender had told when it sent this has been taken in. That may be long ago; the database's clock, which
    /// both nodes know, tells.
    fn note_heard(&self, hint: &Hint) {
        let Some(heard) = self.others.load().get(&hint.node_id).cloned() else { return };
        let now = Instant::now();
        let under_way = u64::try_from(self.lives.clock.at(now).0 - hint.sent_at_ms).unwrap_or(0);
        if let Some(sent) = now.checked_sub(Duration::from_millis(under_way)) {
            heard.set(sent);
        }
    }

    fn message(&self, seq: u64, users: Vec<ChangedUser>) -> Hint {
        Hint {
            store_id: self.store_id.clone(),
            generation: self.generation.load(Ordering::Relaxed),
            node_id: self.own.node_id.clone(),
            incarnation: self.own.incarnation.clone(),
            seq,
            sent_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            users,
            sent_at_ms: self.lives.clock.now().0,
            reads_database: self.lives.age(Instant::now()) <= SUSPECT_AFTER,
        }
    }

    fn heard(&self) -> std::sync::MutexGuard<'_, HashMap<String, (String, u64)>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
