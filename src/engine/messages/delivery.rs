//! Handing messages to the gateways that hold a user's devices: down the streams of those that attach, on `user:<id>` for the
//! others; receivers are counted, and devices may acknowledge.
//!
//! If no gateway takes a message, or memory knows no live route, the user is read from SQL before the delivery fails. Then it
//! is retried until the caller's deadline, for devices that have not acknowledged. Only delivered outcomes
//! are remembered, so a repeated message is never lost and seldom doubled; receivers drop what they have seen by its id. One
//! user's messages wait for each other, so a retry keeps its place.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::join_all;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio::time::timeout_at;

use crate::domain::event as lane;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::InboxOutcome;
use crate::domain::time::Timestamp;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::dispatch::Dispatcher;
use crate::engine::messages::dispatch::Format;
use crate::engine::messages::message::Message;
use crate::engine::messages::message::Outcome;
use crate::engine::messages::message::Report;
use crate::engine::messages::outlets::Outlets;
use crate::engine::messages::parcel::Done;
use crate::engine::messages::parcel::Parcel;
use crate::engine::messages::parcel::Targets;
use crate::engine::messages::turns::Turn;
use crate::engine::messages::turns::Turns;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::ByOutcome;
use crate::metrics::Metrics;
use crate::store::inbox::StoredMessage;
use crate::telemetry::spans::Kind;

/// Deliveries, counted in users, that may be under way at a time.
const UNDER_WAY: u32 = 50_000;
/// A message to more users goes in parts of so many: while other nodes and Redis take one part, the next is looked up.
const PART: usize = 1_000;
/// Outcomes that are remembered for repeats, and for how long.
const REMEMBERED: u64 = 200_000;
const REMEMBERED_FOR: Duration = Duration::from_secs(300);
/// How long devices have to acknowledge a message from the inbox.
const STORED_ACK_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Settings {
    pub format: Format,
    pub max_retries: u32,
    pub retry_interval: Duration,
}

/// Turns of messages: repeats of one wait for each other.
type MessageTurn = Turn<(UserId, String)>;

pub struct Deliveries {
    dispatcher: Dispatcher,
    acks: Arc<Acks>,
    directory: Arc<Directory>,
    lanes: Arc<Lanes>,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    settings: Settings,
    under_way: Semaphore,
    /// What came of messages, for repeats.
    outcomes: moka::sync::Cache<(UserId, String), Report>,
    /// Held while a message is being delivered.
    messages: Arc<Turns<(UserId, String)>>,
    /// Held while a message for this user is on its way.
    queues: Arc<Turns<UserId>>,
    /// Held while this user's inbox is being emptied.
    drains: Arc<Turns<UserId>>,
}

/// What came of stored messages that were brought to a user's devices.
pub(super) struct Pushed {
    /// Those that were acknowledged; on channels without envelopes, where nobody can acknowledge, that were received.
    pub done: Vec<u64>,
    /// Who acknowledged any of them.
    pub acked: BTreeSet<DeviceId>,
    /// Dropped when those that are done have been removed.
    _drain: Turn<UserId>,
}

impl Deliveries {
    #[allow(clippy::too_many_arguments)] // parts of the engine, named once, in its assembly
    pub fn new(
        outlets: Arc<Outlets>,
        acks: Arc<Acks>,
        directory: Arc<Directory>,
        lanes: Arc<Lanes>,
        lives: Arc<Lives>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Arc<Self> {
        let outcomes = moka::sync::Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build();
        let (messages, queues, drains) = (Turns::new(), Turns::new(), Turns::new());
        let dispatcher = Dispatcher::new(outlets, acks.clone(), lanes.clone(), metrics.clone(), settings.format);
        let under_way = Semaphore::new(UNDER_WAY as usize);
        Arc::new(Self {
            dispatcher,
            acks,
            directory,
            lanes,
            lives,
            metrics,
            settings,
            under_way,
            outcomes,
            messages,
            queues,
            drains,
        })
    }

    /// Whether messages can be addressed to single devices: on the channels only in an envelope.
    pub fn can_address_devices(&self) -> bool {
        self.settings.format == Format::Envelope || self.lives.table().iter().any(|life| life.attached.is_some())
    }

    /// Delivers `message` to each of `users` by `deadline`; a user named twice gets it once. In the order of `users`.
    ///
    /// # Errors
    /// The whole call when too much is under way; a user's own when it cannot be looked up, or the queue, which its gateways
    /// listen to, cannot be reached.
    pub async fn deliver(
        &self,
        users: &[UserId],
        message: &Message,
        deadline: Instant,
    ) -> Result<Vec<Result<Report, Error>>, Error> {
        let began = Instant::now();
        let share = u32::try_from(users.len()).unwrap_or(u32::MAX);
        let _share = self.under_way.try_acquire_many(share).map_err(|_| {
            self.metrics.shed("deliveries");
            Error::overloaded("too many messages are being delivered, or this node stops")
        })?;
        let mut distinct = users.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let is_repeating = distinct.len() < users.len();
        let (repeats, _turns) = self.take_turns(&distinct, message, deadline).await?;
        if !repeats.is_empty() {
            message.note("repeat", began, |step| step.detail = "delivered or stored by an earlier call".to_owned());
        }
        distinct.retain(|user| !repeats.contains_key(user));
        if message.store.is_some() {
            self.let_drain(&distinct, deadline).await;
        }
        let _place = self.queue_up(&distinct, deadline).await?;
        if !distinct.is_empty() {
            message.note("turn", began, |_| {});
        }
        let message = Arc::new(message.clone());
        let mut done = match distinct.len() <= PART {
            true => self.attempt(&distinct, &message, deadline).await,
            false => self.in_parts(&distinct, &message, deadline).await,
        };
        if !message.message_id.is_empty() {
            for (user, report) in distinct.iter().zip(&done) {
                if let Some(Ok(report)) = report.as_ref().filter(|report| report.as_ref().is_ok_and(Report::is_settled)) {
                    self.outcomes.insert((*user, message.message_id.clone()), report.clone());
                }
            }
        }
        self.metrics.delivery_stage("total", began.elapsed());
        let answers = users.iter().map(|user| match distinct.binary_search(user) {
            Ok(place) if is_repeating => done[place].clone(),
            Ok(place) => done[place].take(),
            Err(_) => repeats.get(user).cloned().map(Ok),
        });
        Ok(answers.map(|answer| answer.unwrap_or_else(|| Err(Error::unavailable("not delivered")))).collect())
    }

    /// Takes no more messages, and waits for those under way.
    pub async fn finish(&self) {
        if let Ok(all) = self.under_way.acquire_many(UNDER_WAY).await {
            all.forget();
        }
    }

    /// Waits for deliveries of the same message that are under way, and returns what is known of it already. While its turn
    /// is held, a repeat waits. `users` are in order, so two batches cannot wait for each other.
    async fn take_turns(
        &self,
        users: &[UserId],
        message: &Message,
        deadline: Instant,
    ) -> Result<(HashMap<UserId, Report>, Vec<MessageTurn>), Error> {
        let (mut repeats, mut turns) = (HashMap::new(), Vec::new());
        if message.message_id.is_empty() {
            return Ok((repeats, turns));
        }
        for user in users {
            let key = (*user, message.message_id.clone());
            let turn = timeout_at(deadline.into(), self.messages.take(key.clone())).await;
            let turn =
                turn.map_err(|_| Error::unavailable("the same message is still being delivered by a call before this one"))?;
            match self.outcomes.get(&key) {
                Some(report) => drop(repeats.insert(*user, report)),
                None => turns.push(turn),
            }
        }
        Ok((repeats, turns))
    }

    /// Waits for the messages before this one. A batch does not: one user whose message is being retried would hold up all.
    async fn queue_up(&self, users: &[UserId], deadline: Instant) -> Result<Option<Turn<UserId>>, Error> {
        let [user] = users else { return Ok(None) };
        let place = timeout_at(deadline.into(), self.queues.take(*user)).await;
        place.map(Some).map_err(|_| Error::unavailable("messages for this user that came before are still being tried"))
    }

    /// What can be stored does not queue up in an inbox, perhaps a full one, that is empty in a moment. But half of the time
    /// is left for storing it.
    async fn let_drain(&self, users: &[UserId], deadline: Instant) {
        if let [user] = users
            && self.drains.is_taken(user)
        {
            let _ = timeout(deadline.saturating_duration_since(Instant::now()) / 2, self.drains.take(*user)).await;
        }
    }

    /// All parts are under way at the same time.
    async fn in_parts(&self, users: &[UserId], message: &Arc<Message>, deadline: Instant) -> Done {
        let parts = users.chunks(PART).map(|part| self.attempt(part, message, deadline));
        join_all(parts).await.into_iter().flatten().collect()
    }

    async fn attempt(&self, users: &[UserId], message: &Arc<Message>, deadline: Instant) -> Done {
        let (mut done, mut to_store): (Done, _) = (users.iter().map(|_| None).collect(), Vec::new());
        let now = self.lives.clock.now();
        let parcel = |(place, user): (usize, &UserId)| self.parcel((place, *user), message.clone(), now, 0);
        let mut parcels: Vec<Parcel<'_>> = users.iter().enumerate().map(parcel).collect();
        let mut past_caches = false;
        // The second attempt follows at once, past every cache; only those after it are retries that wait.
        for attempts in 1..=self.settings.max_retries.max(1) + 1 {
            // Between two attempts devices may have answered the one before.
            for parcel in parcels.extract_if(.., Parcel::is_acknowledged) {
                parcel.end(Ok(Outcome::Delivered), &mut done);
            }
            if parcels.is_empty() {
                break;
            }
            parcels.iter_mut().for_each(|parcel| parcel.report.attempts = attempts);
            let mut live = self.live(parcels, past_caches, &mut done).await;
            for (parcel, _) in live.extract_if(.., |(parcel, targets)| targets.has_stored && parcel.message.store.is_some()) {
                parcel.message.note("behind", Instant::now(), |_| {});
                to_store.push(parcel);
            }
            let tried = self.dispatcher.answers(self.dispatcher.hand_out(live, deadline).await, deadline).await;
            parcels = Vec::new();
            let pause = if past_caches { self.settings.retry_interval } else { Duration::ZERO };
            let last = past_caches && attempts > self.settings.max_retries || Instant::now() + pause >= deadline;
            for (parcel, all_suspect, result) in tried {
                // A gateway that is late and does not take it is probably dead: the inbox is where it should wait.
                let nowhere = past_caches && result == Ok(Outcome::NoWay);
                let give_up = last || nowhere || (all_suspect && parcel.message.store.is_some());
                match result {
                    Err(_) | Ok(Outcome::Undelivered | Outcome::NoWay) if !give_up => {
                        parcel.tell_retry(&result, pause);
                        parcels.push(parcel);
                    }
                    result => parcel.end(result, &mut done),
                }
            }
            if last {
                break;
            }
            if !parcels.is_empty() {
                sleep(pause).await;
            }
            past_caches = true;
        }
        if message.store.is_some() {
            let unreached =
                |result: &Result<Report, Error>| !result.as_ref().is_ok_and(|report| report.outcome == Outcome::Delivered);
            let again = users.iter().enumerate().filter(|(place, _)| done[*place].as_ref().is_some_and(unreached));
            to_store.extend(again.map(parcel));
            self.store(to_store, &mut done).await;
        }
        self.count(&done);
        done
    }

    fn parcel(&self, (place, user): (usize, UserId), message: Arc<Message>, timestamp: Timestamp, inbox_seq: u64) -> Parcel<'_> {
        let (outcome, delivery_id) = (Outcome::Undelivered, self.acks.next_id());
        let report =
            Report { outcome, delivery_id, timestamp, attempts: 0, receivers: 0, uncounted: false, acked: BTreeSet::new() };
        Parcel { place, user, message, inbox_seq, report, expected: None }
    }

    /// Stores what could not be delivered, each under its user's lock.
    async fn store(&self, parcels: Vec<Parcel<'_>>, done: &mut Done) {
        let began = Instant::now();
        let changes = parcels.iter().map(|parcel| (parcel.user, Change::Inbox(InboxChange::Store(parcel.message.to_store()))));
        let span = parcels.first().and_then(|parcel| parcel.message.begin("store", Kind::Internal));
        let outcomes = self.lanes.store(changes.collect()).await;
        drop(span);
        for (parcel, outcome) in parcels.into_iter().zip(outcomes) {
            let result = match outcome {
                Ok(lane::Outcome::Inbox(InboxOutcome::Stored { seq, .. })) => {
                    parcel.message.note("stored", began, |step| step.detail = format!("number {seq} in the inbox"));
                    Ok(Outcome::Stored)
                }
                Ok(lane::Outcome::Inbox(InboxOutcome::Full)) => {
                    parcel.message.note("inbox_full", began, |_| {});
                    Ok(Outcome::InboxFull)
                }
                Ok(_) => Err(Error::internal("storing a message had the outcome of another change")),
                Err(error) => Err(error),
            };
            let attempts = done[parcel.place].iter().flatten().next().map_or(0, |report| report.attempts);
            Parcel { report: Report { attempts, ..parcel.report.clone() }, ..parcel }.end(result, done);
        }
    }

    /// Brings stored messages to a user's devices, in their order. Messages that come meanwhile wait until these are handed
    /// out, not for the devices: what is not acknowledged stays in the inbox, and what can be stored queues up behind it there
    /// if its deadline is short.
    pub(super) async fn push_stored(&self, user: UserId, answer: &Answer, window: &[StoredMessage]) -> Pushed {
        let drain = self.drains.take(user).await;
        let place = self.queues.take(user).await;
        let mut live = Vec::with_capacity(window.len());
        for stored in window {
            let mut message = Message::stored(stored.message.clone());
            let targets = Targets::of(answer, &message, &BTreeSet::new());
            let can_acknowledge = !targets.streams.is_empty() || self.settings.format == Format::Envelope;
            message.ack_timeout = can_acknowledge.then_some(STORED_ACK_TIMEOUT);
            let parcel = self.parcel((0, user), Arc::new(message), stored.stored_at, stored.seq);
            if !targets.routes.is_empty() {
                live.push((parcel, targets));
            }
        }
        let deadline = Instant::now() + STORED_ACK_TIMEOUT;
        let handed_out = self.dispatcher.hand_out(live, deadline).await;
        drop(place);
        let tried = self.dispatcher.answers(handed_out, deadline).await;
        let mut pushed = Pushed { done: Vec::new(), acked: BTreeSet::new(), _drain: drain };
        for (parcel, ..) in tried.into_iter().filter(|(.., result)| *result == Ok(Outcome::Delivered)) {
            pushed.done.push(parcel.inbox_seq);
            pushed.acked.extend(parcel.report.acked);
        }
        pushed
    }

    /// Those who have a live route, looked up past every cache if need be, with where they are. The others are done.
    async fn live<'a>(&self, parcels: Vec<Parcel<'a>>, past_caches: bool, done: &mut Done) -> Vec<(Parcel<'a>, Targets)> {
        let (mut live, mut doubted) = (Vec::with_capacity(parcels.len()), Vec::new());
        let first_look = if past_caches { Some(Duration::ZERO) } else { None };
        let (answers, began) = self.look_up(&parcels, first_look).await;
        for (parcel, answer) in parcels.into_iter().zip(answers) {
            match answer.map(|answer| parcel.targets(&answer, began)) {
                Ok(targets) if !targets.routes.is_empty() => live.push((parcel, targets)),
                _ => doubted.push(parcel),
            }
        }
        let (answers, began) = self.look_up(&doubted, Some(Duration::ZERO)).await;
        for (parcel, answer) in doubted.into_iter().zip(answers) {
            match answer.map(|answer| parcel.targets(&answer, began)) {
                Ok(targets) if !targets.routes.is_empty() => live.push((parcel, targets)),
                Ok(_) => parcel.end(Ok(Outcome::Offline), done),
                Err(error) => parcel.end(Err(error), done),
            }
        }
        live
    }

    /// Where they are, and when that was asked.
    async fn look_up(&self, parcels: &[Parcel<'_>], bound: Option<Duration>) -> (Vec<Result<Answer, Error>>, Instant) {
        let (users, began): (Vec<UserId>, _) = (parcels.iter().map(|parcel| parcel.user).collect(), Instant::now());
        let span = parcels.first().and_then(|parcel| parcel.message.begin("lookup", Kind::Internal));
        let answers = self.directory.get_many(&users, bound).await;
        if let (Some(mut span), Some(answer)) = (span, answers.first()) {
            match answer {
                Ok(answer) => span.note("im_presence.tier", answer.source.name()),
                Err(error) => span.fail(error.to_string()),
            }
            span.note("im_presence.users", users.len() as u64);
        }
        (answers, began)
    }

    fn count(&self, done: &Done) {
        let mut counts = BTreeMap::<&str, u64>::new();
        for report in done.iter().flatten() {
            let outcome = match report.as_ref().map(|report| &report.outcome) {
                Ok(Outcome::Delivered) => "delivered",
                Ok(Outcome::Offline) => "offline",
                Ok(Outcome::Undelivered | Outcome::NoWay) => "undelivered",
                Ok(Outcome::Stored) => "stored",
                Ok(Outcome::InboxFull) => "inbox_full",
                Err(_) => "error",
            };
            *counts.entry(outcome).or_default() += 1;
        }
        for (outcome, count) in counts {
            self.metrics.deliveries.get_or_create(&ByOutcome { outcome }).inc_by(count);
        }
    }
}
