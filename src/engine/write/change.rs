//! A change on its way to a lane, and what lanes work with.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::oneshot;

use crate::answers;
use crate::answers::Answer;
use crate::domain::event::Bind;
use crate::domain::event::ForceOffline;
use crate::domain::event::Outcome;
use crate::domain::event::SetStatus;
use crate::domain::event::Unbind;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::Limits;
use crate::domain::policy::DevicePolicy;
use crate::engine::read::cache::Cache;
use crate::engine::read::cache::WriteGuard;
use crate::engine::read::feed::Feed;
use crate::engine::read::lives::Lives;
use crate::engine::write::health::WriteHealth;
use crate::engine::write::inbox_queue::InboxQueue;
use crate::engine::write::publisher::Publisher;
use crate::engine::write::rate::Rate;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::store::database::Database;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Place;
use crate::telemetry::spans::Span;

/// A change without a text, rounded up.
const SMALL_BYTES: usize = 512;

/// A change asked of a user.
#[derive(Debug)]
pub enum Change {
    Bind(Bind),
    Unbind(Unbind),
    /// Remove the routes that are not live.
    Sweep,
    Inbox(InboxChange),
    SetStatus(SetStatus),
    /// The wish returns to the default, if its time is over.
    EndStatus,
    ForceOffline(ForceOffline),
    /// Erase what is known of the user.
    Forget,
}

impl Change {
    /// What it adds to a transaction, roughly.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Inbox(InboxChange::Store(message)) => SMALL_BYTES + message.body.len(),
            _ => SMALL_BYTES,
        }
    }

    /// The life that whoever asks for it claims to live.
    pub(super) fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Bind(bind) => bind.epoch,
            Self::Unbind(unbind) => unbind.epoch(),
            _ => None,
        }
    }
}

/// What the lanes work by.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub lanes: usize,
    /// Events that may wait in a lane.
    pub queue: usize,
    /// Older events are dropped: their callers were told to repeat them, and may have done so elsewhere.
    pub max_event_age: Duration,
    pub policy: DevicePolicy,
    pub inbox: Limits,
    pub route_ttl: Duration,
    pub heartbeat_interval: Duration,
    /// None: no user is forgotten.
    pub forget_users_after: Option<Duration>,
    /// What is shown of users, and for how long they were online, is written down.
    pub keeps_history: bool,
    pub session_gap: Duration,
}

/// What the lanes work with.
pub struct LaneContext {
    pub node_id: String,
    /// This process, as its claims name it.
    pub claimant: String,
    pub database: Arc<Database>,
    pub cache: Arc<Cache>,
    pub lives: Arc<Lives>,
    /// Told of what this node commits.
    pub feed: Arc<Feed>,
    pub metrics: Arc<Metrics>,
    pub publisher: Arc<Publisher>,
    /// Gateways that nobody has registered.
    pub newcomers: Rate,
    /// Who has messages waiting, and a way to get them.
    pub inboxes: Arc<InboxQueue>,
    pub write_health: Arc<WriteHealth>,
    pub settings: Settings,
}

/// An event on its way. Dropping it unanswered tells its caller that the outcome is unknown.
pub(super) struct Pending {
    pub user: UserId,
    pub change: Change,
    pub received: Instant,
    pub answer: Answer<Result<Outcome, Error>>,
    /// Since the lane took the event: nothing older than what it commits may be answered.
    pub under_way: Option<WriteGuard>,
    /// Where its spans begin. None: it is not traced.
    pub trace: Option<Place>,
    _share: Option<OwnedSemaphorePermit>,
}

impl Pending {
    pub fn new(
        user: UserId,
        change: Change,
        received: Instant,
        share: Option<OwnedSemaphorePermit>,
    ) -> (Self, oneshot::Receiver<Result<Outcome, Error>>) {
        let (answer, outcome) = answers::channel();
        (Self { user, change, received, answer, under_way: None, trace: None, _share: share }, outcome)
    }

    /// A span of it, if it is traced.
    pub fn begin(&self, name: &'static str) -> Option<Span> {
        self.trace.as_ref().map(|place| place.begin(name, Kind::Internal))
    }

    /// A lane has taken it.
    pub fn note_taken(&self) {
        drop(self.trace.as_ref().map(|place| place.begin_at("lane wait", Kind::Internal, self.received)));
    }

    /// Whether somebody still waits for it. If not, its caller has been told to repeat it, and it must not be applied late.
    pub fn is_wanted(&self, max_age: Duration) -> bool {
        !self.answer.is_closed() && self.received.elapsed() < max_age
    }

    /// Whether its caller has gone.
    pub fn is_given_up(&self) -> bool {
        self.answer.is_closed()
    }

    pub fn answer(self, outcome: Result<Outcome, Error>) {
        self.answer.send(outcome);
    }
}
