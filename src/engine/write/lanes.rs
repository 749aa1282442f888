//! The one write path. Every change of a user is an event in the lane that the user's number decides, so changes of one user
//! are made in order and many users share a commit.
//!
//! Queues are bounded. A full one turns the caller away at once, with the time after which to come again. Batch calls hold
//! at most half of a queue between them and take their share 256 events at a time, so that single calls always find room.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use crate::domain::event::Outcome;
use crate::domain::id::UserId;
use crate::engine::write::busiest::Busiest;
use crate::engine::write::change::Change;
use crate::engine::write::change::LaneContext;
use crate::engine::write::change::Pending;
use crate::engine::write::health::WriteHealth;
use crate::engine::write::lane::Lane;
use crate::engine::write::projection::ToProjector;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::telemetry::spans::Place;

/// Events a batch call puts into a lane at a time.
const BATCH_SHARE: usize = 256;
/// Background events that may wait in a lane.
const BACKGROUND_QUEUE: usize = 1024;
/// Gateways whose first bind may come without a registration, in the long run and at once: each is a row until it has had no
/// route for `route_ttl`, and any name makes one.
pub const NEW_NAMES_PER_SECOND: u32 = 20;
pub const NEW_NAMES_AT_ONCE: u32 = 2_000;
/// Their size: two or three transactions' worth, so that none of them waits long enough to grow too old.
const BACKGROUND_BYTES: u32 = 4 * 1024 * 1024;

/// A change that has its place in a lane.
pub struct Begun {
    received: Instant,
    answer: oneshot::Receiver<Result<Outcome, Error>>,
}

struct Entrance {
    callers: mpsc::Sender<Pending>,
    background: mpsc::Sender<Pending>,
    /// What batch calls may hold of the queue.
    batch_share: Arc<Semaphore>,
    /// Bytes of messages that wait to be stored.
    background_bytes: Arc<Semaphore>,
    busiest: Arc<ArcSwap<Busiest>>,
}

pub struct Lanes {
    entrances: Vec<Entrance>,
    taken: AtomicU64,
    metrics: Arc<Metrics>,
    write_health: Arc<WriteHealth>,
    max_event_age: Duration,
}

impl Lanes {
    /// Starts the lanes. At `shutdown` they take no more events, finish what they have, and end.
    pub fn start(tools: &Arc<LaneContext>, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) -> Arc<Self> {
        let settings = tools.settings;
        let mut entrances = Vec::new();
        for _ in 0..settings.lanes {
            let (callers, from_callers) = mpsc::channel(settings.queue);
            let (background, from_background) = mpsc::channel(BACKGROUND_QUEUE);
            let projector = ToProjector::start(&tools.publisher, tasks, shutdown);
            let busiest = Arc::<ArcSwap<Busiest>>::default();
            let shown = busiest.clone();
            let lane = Lane::new(tools.clone(), from_callers, from_background, projector, shown, shutdown.clone());
            tasks.spawn(lane.run(shutdown.clone()));
            let batch_share = Arc::new(Semaphore::new(settings.queue / 2));
            let background_bytes = Arc::new(Semaphore::new(BACKGROUND_BYTES as usize));
            entrances.push(Entrance { callers, background, batch_share, background_bytes, busiest });
        }
        let (taken, metrics, write_health) = (AtomicU64::new(0), tools.metrics.clone(), tools.write_health.clone());
        Arc::new(Self { entrances, taken, metrics, write_health, max_event_age: settings.max_event_age })
    }

    /// Makes one change. When this returns an outcome, the change is durable.
    ///
    /// # Errors
    /// [`Error::Overloaded`]: nothing was done. [`Error::Unavailable`]: it may or may not have been done; repeating it is
    /// harmless. [`Error::Internal`]: this change cannot be stored.
    pub async fn submit(&self, user: UserId, change: Change) -> Result<Outcome, Error> {
        self.submit_traced(user, change, None).await
    }

    /// The same, as a part of a traced call.
    ///
    /// # Errors
    /// The same.
    pub async fn submit_traced(&self, user: UserId, change: Change, trace: Option<Place>) -> Result<Outcome, Error> {
        let begun = self.take_place(user, change, trace)?;
        self.finish(begun).await
    }

    /// The first half of [`Lanes::submit`]: takes the change's place in the lane. Changes begun one after the other are made in
    /// this order.
    pub fn begin(&self, user: UserId, change: Change) -> Result<Begun, Error> {
        self.take_place(user, change, None)
    }

    fn take_place(&self, user: UserId, change: Change, trace: Option<Place>) -> Result<Begun, Error> {
        let received = Instant::now();
        let (mut pending, answer) = Pending::new(user, change, received, None);
        pending.trace = trace;
        self.enter(self.lane_of(user), pending)?;
        Ok(Begun { received, answer })
    }

    /// The second half: waits for the outcome.
    pub async fn finish(&self, begun: Begun) -> Result<Outcome, Error> {
        self.outcome(begun.answer, begun.received).await
    }

    /// Makes many changes; each has its own outcome. In the order given, per user.
    pub async fn submit_many(self: &Arc<Self>, changes: Vec<(UserId, Change)>) -> Vec<Result<Outcome, Error>> {
        let received = Instant::now();
        let mut outcomes: Vec<_> = changes.iter().map(|_| Err(Error::unavailable("the lane was busy for too long"))).collect();
        let mut by_lane: HashMap<usize, Vec<(usize, UserId, Change)>> = HashMap::new();
        for (i, (user, change)) in changes.into_iter().enumerate() {
            by_lane.entry(self.lane_of(user)).or_default().push((i, user, change));
        }
        let mut lanes = JoinSet::new();
        for (lane, changes) in by_lane {
            lanes.spawn(self.clone().submit_to(lane, changes, received));
        }
        while let Some(done) = lanes.join_next().await {
            for (i, outcome) in done.into_iter().flatten() {
                outcomes[i] = outcome;
            }
        }
        outcomes
    }

    /// Makes one change when there is nothing more urgent.
    async fn submit_in_background(&self, user: UserId, change: Change) -> Result<Outcome, Error> {
        let received = Instant::now();
        let (pending, answer) = Pending::new(user, change, received, None);
        let entrance = &self.entrances[self.lane_of(user)];
        entrance.background.send(pending).await.map_err(|_| stopping())?;
        self.outcome(answer, received).await
    }

    /// Stores messages when there is nothing more urgent, but always at a share of the pace: a message to thousands of users
    /// must not stand before everybody's binds. Each has its own outcome, in the order given.
    pub async fn store(self: &Arc<Self>, messages: Vec<(UserId, Change)>) -> Vec<Result<Outcome, Error>> {
        let mut waiting = Vec::with_capacity(messages.len());
        let mut is_stuck = false;
        for (user, change) in messages {
            let entered = if is_stuck { None } else { self.enter_background(user, change).await };
            is_stuck |= entered.is_none();
            waiting.push(entered.ok_or_else(|| Error::unavailable("the database did not store the messages before it")));
        }
        let mut outcomes = Vec::with_capacity(waiting.len());
        for answer in waiting {
            outcomes.push(match answer {
                Ok((answer, received)) => self.outcome(answer, received).await,
                Err(error) => Err(error),
            });
        }
        outcomes
    }

    /// None: there was no room for as long as a change may wait.
    async fn enter_background(
        &self,
        user: UserId,
        change: Change,
    ) -> Option<(oneshot::Receiver<Result<Outcome, Error>>, Instant)> {
        let entrance = &self.entrances[self.lane_of(user)];
        let bytes = u32::try_from(change.bytes()).unwrap_or(u32::MAX).min(BACKGROUND_BYTES);
        let until = Instant::now() + self.max_event_age;
        let share = timeout_at(until.into(), entrance.background_bytes.clone().acquire_many_owned(bytes)).await.ok()?.ok()?;
        let place = timeout_at(until.into(), entrance.background.reserve()).await.ok()?.ok()?;
        let received = Instant::now();
        let (pending, answer) = Pending::new(user, change, received, Some(share));
        place.send(pending);
        Some((answer, received))
    }

    /// The same change for each of `users`.
    pub async fn submit_all_in_background(
        self: &Arc<Self>,
        users: impl IntoIterator<Item = UserId>,
        change: impl Fn() -> Change,
    ) -> Vec<Result<Outcome, Error>> {
        self.submit_each_in_background(users.into_iter().map(|user| (user, change()))).await
    }

    /// Many changes; the outcomes come in any order.
    pub async fn submit_each_in_background(
        self: &Arc<Self>,
        changes: impl IntoIterator<Item = (UserId, Change)>,
    ) -> Vec<Result<Outcome, Error>> {
        let mut submitted = JoinSet::new();
        for (user, change) in changes {
            let lanes = self.clone();
            submitted.spawn(async move { lanes.submit_in_background(user, change).await });
        }
        submitted.join_all().await
    }

    /// What each lane has counted lately.
    pub fn busiest(&self) -> Vec<Arc<Busiest>> {
        self.entrances.iter().map(|entrance| entrance.busiest.load_full()).collect()
    }

    /// How many changes callers have asked for.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Whether changes can be stored now.
    pub fn are_healthy(&self) -> bool {
        self.write_health.is_good()
    }

    /// Events that wait.
    pub fn depth(&self) -> usize {
        self.entrances.iter().map(|entrance| entrance.callers.max_capacity() - entrance.callers.capacity()).sum()
    }

    async fn submit_to(
        self: Arc<Self>,
        lane: usize,
        changes: Vec<(usize, UserId, Change)>,
        received: Instant,
    ) -> Vec<(usize, Result<Outcome, Error>)> {
        let mut waiting = Vec::with_capacity(changes.len());
        let mut outcomes = Vec::with_capacity(changes.len());
        let mut changes = changes.into_iter();
        loop {
            let share: Vec<_> = changes.by_ref().take(BATCH_SHARE).collect();
            let Some(mut permits) = self.share(lane, share.len(), received).await else { break };
            for (i, user, change) in share {
                let (pending, answer) = Pending::new(user, change, received, permits.split(1));
                match self.enter(lane, pending) {
                    Ok(()) => waiting.push((i, answer)),
                    Err(error) => outcomes.push((i, Err(error))),
                }
            }
        }
        for (i, answer) in waiting {
            outcomes.push((i, self.outcome(answer, received).await));
        }
        outcomes
    }

    /// None: nothing is left to ask for, or the time is up.
    async fn share(&self, lane: usize, events: usize, received: Instant) -> Option<OwnedSemaphorePermit> {
        let events = u32::try_from(events).ok().filter(|events| *events > 0)?;
        let permits = self.entrances[lane].batch_share.clone().acquire_many_owned(events);
        timeout_at((received + self.max_event_age).into(), permits).await.ok()?.ok()
    }

    fn enter(&self, lane: usize, pending: Pending) -> Result<(), Error> {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.entrances[lane].callers.try_send(pending).map_err(|error| match error {
            TrySendError::Full(_) => {
                self.metrics.shed("changes");
                self.write_health.note_refused();
                Error::overloaded("too many changes wait to be stored")
            }
            TrySendError::Closed(_) => stopping(),
        })
    }

    async fn outcome(&self, answer: oneshot::Receiver<Result<Outcome, Error>>, received: Instant) -> Result<Outcome, Error> {
        match timeout_at((received + self.max_event_age).into(), answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) | Err(_) => {
                self.write_health.note_refused();
                Err(Error::unavailable("the database did not confirm the change in time"))
            }
        }
    }

    fn lane_of(&self, user: UserId) -> usize {
        usize::try_from(user.hash() % self.entrances.len() as u64).unwrap_or(0)
    }
}

fn stopping() -> Error {
    Error::unavailable("this node is stopping")
}
