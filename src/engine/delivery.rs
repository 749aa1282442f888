//! Handing messages to the gateways that hold a user's devices: down the streams of those that attach, on `user:<id>` for the
//! others; receivers are counted, and devices may acknowledge.
//!
//! Nobody took it, or memory knows no live route: the user is looked up past every cache before the answer is no. Then it
//! is tried again, never beyond the caller's deadline, and only for devices that have not acknowledged. Only delivered outcomes
//! are remembered, so a repeated message is never lost and seldom doubled; receivers drop what they have seen by its id. One
//! user's messages wait for each other, so a retry keeps its place.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use prost::Message as _;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio::time::timeout_at;

use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::InboxOutcome;
use crate::domain::inbox::NewMessage;
use crate::domain::time::Timestamp;
use crate::domain::user as lane;
use crate::domain::user::Unbind;
use crate::engine::acks::Acks;
use crate::engine::acks::Answered;
use crate::engine::acks::Expected;
use crate::engine::directory::Answer;
use crate::engine::directory::Directory;
use crate::engine::lanes::Change;
use crate::engine::lanes::Lanes;
use crate::engine::lives::Lives;
use crate::engine::outlets::Addressed;
use crate::engine::outlets::Outlets;
use crate::engine::streams::Handed;
use crate::engine::streams::Order;
use crate::engine::turns::Turn;
use crate::engine::turns::Turns;
use crate::error::Error;
use crate::metrics::ByOutcome;
use crate::metrics::Metrics;
use crate::store::codec::Envelope;
use crate::store::inbox::StoredMessage;

/// Deliveries, counted in users, that may be under way at a time.
const UNDER_WAY: u32 = 50_000;
/// What is published with one round trip, and what an envelope may add to each message.
const PUBLISHED_TOGETHER_BYTES: usize = 4 * 1024 * 1024;
const ENVELOPE_BYTES: usize = 1024;
/// Outcomes that are remembered for repeats, and for how long.
const REMEMBERED: u64 = 200_000;
const REMEMBERED_FOR: Duration = Duration::from_secs(300);
/// How long devices have to acknowledge a message from the inbox.
const STORED_ACK_TIMEOUT: Duration = Duration::from_secs(5);
/// Routes that were refused once: remembered for a while after.
const REFUSED: u64 = 100_000;
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// How a message stands on `user:<id>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes as given.
    Raw,
    /// A protobuf `Delivery`.
    Envelope,
}

#[derive(Clone, Debug)]
pub struct Settings {
    pub format: Format,
    pub max_retries: u32,
    pub retry_interval: Duration,
}

/// A message to deliver.
#[derive(Clone, Debug)]
pub struct Message {
    /// UTF-8. One copy, however many users get it.
    pub text: Bytes,
    pub binary: Bytes,
    pub message_type: String,
    /// Empty: never a repeat.
    pub message_id: String,
    /// Empty: all devices.
    pub device_ids: Vec<DeviceId>,
    /// How long devices have for an acknowledgement. None: nobody waits for one.
    pub ack_timeout: Option<Duration>,
    /// Store it for a user who cannot be reached. None: do not.
    pub store: Option<Storing>,
}

/// How a message is stored.
#[derive(Clone, Copy, Debug)]
pub struct Storing {
    /// None: as long as is allowed.
    pub expires_after: Option<Duration>,
}

/// What came of a message to one user.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A gateway took it; a device acknowledged it, if that was asked for.
    Delivered,
    /// The user has no live route to the devices in question.
    Offline,
    /// There are live routes, but nobody took it, or no device acknowledged it.
    Undelivered,
    /// Its gateways have never attached, and there is no queue to reach them by: trying again will not help.
    NoWay,
    /// It waits in the user's inbox.
    Stored,
    /// It could be neither delivered nor stored: the inbox is full.
    InboxFull,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub delivery_id: String,
    pub timestamp: Timestamp,
    pub attempts: u32,
    /// Gateways that took it at the last attempt.
    pub receivers: u64,
    pub acked: BTreeSet<DeviceId>,
}

/// Turns of messages: repeats of one wait for each other.
type MessageTurn = Turn<(UserId, String)>;
type Done = HashMap<UserId, Result<Report, Error>>;

pub struct Deliveries {
    outlets: Arc<Outlets>,
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
    /// Routes of which their gateway has said once that the device is not there.
    refused: moka::sync::Cache<(UserId, Version), ()>,
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

/// One user's part of a delivery, through all attempts.
struct Parcel<'a> {
    user: UserId,
    message: Arc<Message>,
    /// Its number in the user's inbox; 0: it does not come from there.
    inbox_seq: u64,
    report: Report,
    expected: Option<Expected<'a>>,
}

/// Where a parcel goes.
#[derive(Default)]
struct Targets {
    /// Live routes to the devices in question that have not acknowledged.
    routes: BTreeMap<DeviceId, Version>,
    streams: BTreeMap<Epoch, Arc<str>>,
    /// There are gateways without a stream among them.
    channel: bool,
    /// None of the gateways has ever had a stream.
    none_attaches: bool,
    /// None of the gateways has been heard lately.
    all_suspect: bool,
    /// Messages wait in the user's inbox: what can be stored queues up behind them.
    has_stored: bool,
}

/// Messages that gateways have, as far as they took them, and why a channel could not be reached.
struct HandedOut<'a> {
    parcels: Vec<(Parcel<'a>, Targets, Option<Error>)>,
    at: Instant,
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
        let refused = moka::sync::Cache::builder().max_capacity(REFUSED).time_to_live(REFUSED_FOR).build();
        let under_way = Semaphore::new(UNDER_WAY as usize);
        Arc::new(Self {
            outlets,
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
            refused,
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
        let (mut done, _turns) = self.take_turns(&distinct, message, deadline).await?;
        distinct.retain(|user| !done.contains_key(user));
        if message.store.is_some() {
            self.let_drain(&distinct, deadline).await;
        }
        let _place = self.queue_up(&distinct, deadline).await?;
        done.extend(self.attempt(&distinct, &Arc::new(message.clone()), deadline).await);
        if !message.message_id.is_empty() {
            for user in &distinct {
                if let Some(Ok(report)) = done.get(user).filter(|report| is_settled(report)) {
                    self.outcomes.insert((*user, message.message_id.clone()), report.clone());
                }
            }
        }
        self.metrics.delivery_stage("total", began.elapsed());
        let answers =
            users.iter().map(|user| done.get(user).cloned().unwrap_or_else(|| Err(Error::unavailable("not delivered"))));
        Ok(answers.collect())
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
    ) -> Result<(Done, Vec<MessageTurn>), Error> {
        let (mut done, mut turns) = (Done::new(), Vec::new());
        if message.message_id.is_empty() {
            return Ok((done, turns));
        }
        for user in users {
            let key = (*user, message.message_id.clone());
            let turn = timeout_at(deadline.into(), self.messages.take(key.clone())).await;
            let turn =
                turn.map_err(|_| Error::unavailable("the same message is still being delivered by a call before this one"))?;
            match self.outcomes.get(&key) {
                Some(report) => drop(done.insert(*user, Ok(report))),
                None => turns.push(turn),
            }
        }
        Ok((done, turns))
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

    async fn attempt(&self, users: &[UserId], message: &Arc<Message>, deadline: Instant) -> Done {
        let (mut done, mut to_store) = (Done::new(), Vec::new());
        let mut parcels: Vec<Parcel<'_>> = users.iter().map(|user| self.parcel(*user, message.clone(), 0)).collect();
        let mut past_caches = false;
        // The second attempt follows at once, past every cache; only those after it are retries that wait.
        for attempts in 1..=self.settings.max_retries.max(1) + 1 {
            // Between two attempts devices may have answered the one before.
            for parcel in parcels.extract_if(.., Parcel::is_acknowledged) {
                done.insert(parcel.user, Ok(Report { outcome: Outcome::Delivered, ..parcel.report }));
            }
            if parcels.is_empty() {
                break;
            }
            parcels.iter_mut().for_each(|parcel| parcel.report.attempts = attempts);
            let (live, queued): (Vec<_>, Vec<_>) = self
                .live(parcels, past_caches, &mut done)
                .await
                .into_iter()
                .partition(|(parcel, targets)| !targets.has_stored || parcel.message.store.is_none());
            to_store.extend(queued.into_iter().map(|(parcel, _)| parcel));
            let tried = self.answers(self.hand_out(live, deadline).await, deadline).await;
            parcels = Vec::new();
            let pause = if past_caches { self.settings.retry_interval } else { Duration::ZERO };
            let last = past_caches && attempts > self.settings.max_retries || Instant::now() + pause >= deadline;
            for (parcel, all_suspect, result) in tried {
                // A gateway that is late and does not take it is probably dead: the inbox is where it should wait.
                let nowhere = past_caches && result == Ok(Outcome::NoWay);
                let give_up = last || nowhere || (all_suspect && parcel.message.store.is_some());
                match result {
                    Err(_) | Ok(Outcome::Undelivered | Outcome::NoWay) if !give_up => parcels.push(parcel),
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
            let again = users.iter().filter(|user| done.get(user).is_some_and(unreached));
            to_store.extend(again.map(|user| self.parcel(*user, message.clone(), 0)));
            self.store(to_store, &mut done).await;
        }
        done.values().for_each(|report| self.count(report));
        done
    }

    fn parcel(&self, user: UserId, message: Arc<Message>, inbox_seq: u64) -> Parcel<'_> {
        let (outcome, delivery_id, timestamp) = (Outcome::Undelivered, self.acks.next_id(), self.lives.clock.now());
        let report = Report { outcome, delivery_id, timestamp, attempts: 0, receivers: 0, acked: BTreeSet::new() };
        Parcel { user, message, inbox_seq, report, expected: None }
    }

    /// Stores what could not be delivered, each under its user's lock.
    async fn store(&self, parcels: Vec<Parcel<'_>>, done: &mut Done) {
        let changes = parcels.iter().map(|parcel| (parcel.user, Change::Inbox(InboxChange::Store(parcel.message.to_store()))));
        let outcomes = self.lanes.store(changes.collect()).await;
        for (parcel, outcome) in parcels.into_iter().zip(outcomes) {
            let result = match outcome {
                Ok(lane::Outcome::Inbox(InboxOutcome::Stored { .. })) => Ok(Outcome::Stored),
                Ok(lane::Outcome::Inbox(InboxOutcome::Full)) => Ok(Outcome::InboxFull),
                Ok(_) => Err(Error::internal("storing a message had the outcome of another change")),
                Err(error) => Err(error),
            };
            let attempts = done.get(&parcel.user).and_then(|known| known.as_ref().ok()).map_or(0, |report| report.attempts);
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
            let mut parcel = self.parcel(user, Arc::new(message), stored.seq);
            parcel.report.timestamp = stored.stored_at;
            if !targets.routes.is_empty() {
                live.push((parcel, targets));
            }
        }
        let deadline = Instant::now() + STORED_ACK_TIMEOUT;
        let handed_out = self.hand_out(live, deadline).await;
        drop(place);
        let tried = self.answers(handed_out, deadline).await;
        let mut pushed = Pushed { done: Vec::new(), acked: BTreeSet::new(), _drain: drain };
        for (parcel, ..) in tried.into_iter().filter(|(.., result)| *result == Ok(Outcome::Delivered)) {
            pushed.done.push(parcel.inbox_seq);
            pushed.acked.extend(parcel.report.acked);
        }
        pushed
    }

    /// Those who have a live route, looked up past every cache if need be, with where they are. The others are done.
    async fn live<'a>(&self, parcels: Vec<Parcel<'a>>, past_caches: bool, done: &mut Done) -> Vec<(Parcel<'a>, Targets)> {
        let (mut live, mut doubted) = (Vec::new(), Vec::new());
        let first_look = if past_caches { Some(Duration::ZERO) } else { None };
        let users: Vec<UserId> = parcels.iter().map(|parcel| parcel.user).collect();
        for (parcel, answer) in parcels.into_iter().zip(self.directory.get_many(&users, first_look).await) {
            match answer.map(|answer| Targets::of(&answer, &parcel.message, &parcel.report.acked)) {
                Ok(targets) if !targets.routes.is_empty() => live.push((parcel, targets)),
                _ => doubted.push(parcel),
            }
        }
        let users: Vec<UserId> = doubted.iter().map(|parcel| parcel.user).collect();
        for (parcel, answer) in doubted.into_iter().zip(self.directory.get_many(&users, Some(Duration::ZERO)).await) {
            match answer.map(|answer| Targets::of(&answer, &parcel.message, &parcel.report.acked)) {
                Ok(targets) if !targets.routes.is_empty() => live.push((parcel, targets)),
                Ok(_) => parcel.end(Ok(Outcome::Offline), done),
                Err(error) => parcel.end(Err(error), done),
            }
        }
        live
    }

    /// Hands messages to every gateway concerned, in their order.
    async fn hand_out<'a>(&'a self, mut live: Vec<(Parcel<'a>, Targets)>, deadline: Instant) -> HandedOut<'a> {
        let began = Instant::now();
        for (parcel, targets) in live.iter_mut().filter(|(parcel, _)| parcel.message.ack_timeout.is_some()) {
            let devices = targets.routes.keys().cloned().collect();
            match &parcel.expected {
                Some(expected) => expected.again(devices),
                None => parcel.expected = Some(self.acks.wait_for(&parcel.report.delivery_id, parcel.user, devices)),
            }
        }
        let (streams, channels) = tokio::join!(self.down_streams(&live, deadline), self.on_channels(&live, deadline));
        self.metrics.delivery_stage("handed", began.elapsed());
        let received = streams.into_iter().zip(channels);
        let parcels = live.into_iter().zip(received).map(|((mut parcel, targets), (taken, received))| {
            parcel.report.receivers = taken + received.as_ref().copied().unwrap_or(0);
            (parcel, targets, received.err())
        });
        HandedOut { parcels: parcels.collect(), at: Instant::now() }
    }

    /// Waits for devices, where that is asked for. Says of each message also whether none of its gateways has been heard
    /// lately.
    async fn answers<'a>(&self, out: HandedOut<'a>, deadline: Instant) -> Vec<(Parcel<'a>, bool, Result<Outcome, Error>)> {
        let mut tried = Vec::with_capacity(out.parcels.len());
        for (mut parcel, targets, error) in out.parcels {
            let result = match (error, parcel.report.receivers) {
                (Some(_), 0) if targets.none_attaches && self.outlets.bus.is_none() => Ok(Outcome::NoWay),
                (Some(error), 0) => Err(error),
                (None, 0) => Ok(Outcome::Undelivered),
                _ => Ok(self.acknowledged(&mut parcel, &targets, out.at, deadline).await),
            };
            tried.push((parcel, targets.all_suspect, result));
        }
        tried
    }

    /// How many streams of each parcel's gateways took it.
    async fn down_streams(&self, live: &[(Parcel<'_>, Targets)], deadline: Instant) -> Vec<u64> {
        let (mut owners, mut orders) = (Vec::new(), Vec::new());
        for (i, (parcel, targets)) in live.iter().enumerate().filter(|(_, (_, targets))| !targets.streams.is_empty()) {
            let envelope = Arc::new(parcel.envelope());
            for (epoch, node) in &targets.streams {
                owners.push(i);
                orders.push(Addressed { epoch: *epoch, node: node.clone(), order: Order::Delivery(envelope.clone()) });
            }
        }
        let mut taken = vec![0; live.len()];
        for (owner, handed) in owners.into_iter().zip(self.outlets.hand(orders, deadline).await) {
            taken[owner] += u64::from(handed == Handed::Taken);
        }
        taken
    }

    /// How many subscribers each parcel had, where it has gateways without a stream.
    async fn on_channels(&self, live: &[(Parcel<'_>, Targets)], deadline: Instant) -> Vec<Result<u64, Error>> {
        let mut received: Vec<Result<u64, Error>> = live.iter().map(|_| Ok(0)).collect();
        // Raw bytes cannot say which device they are for.
        let says_it_all = |message: &Message| message.device_ids.is_empty() || self.settings.format == Format::Envelope;
        let places: Vec<usize> = (0..live.len()).filter(|i| live[*i].1.channel && says_it_all(&live[*i].0.message)).collect();
        let Some(bus) = &self.outlets.bus else {
            let none = || Error::unavailable("its gateway has no stream, and no [redis_queue] is configured");
            places.into_iter().for_each(|i| received[i] = Err(none()));
            return received;
        };
        if places.is_empty() {
            return received;
        }
        // All of them at once could be as large as the message times the users.
        let together = live.first().map_or(1, |(parcel, _)| parcel.message.as_many_as(PUBLISHED_TOGETHER_BYTES));
        for places in places.chunks(together) {
            let bodies = places.iter().map(|i| (bus.channels.user(live[*i].0.user), self.body(&live[*i].0)));
            let limit = deadline.saturating_duration_since(Instant::now()).min(bus.link.timeout());
            let published = bus.publish(&bodies.collect::<Vec<_>>(), limit).await;
            for (n, i) in places.iter().enumerate() {
                let unreachable = |_| Error::unavailable("the queue (redis_queue) cannot be reached");
                received[*i] = published.as_ref().map(|published| published[n]).map_err(unreachable);
            }
        }
        received
    }

    /// Waits for devices to acknowledge, if that is asked for.
    async fn acknowledged(&self, parcel: &mut Parcel<'_>, targets: &Targets, handed: Instant, deadline: Instant) -> Outcome {
        let (Some(patience), Some(expected)) = (parcel.message.ack_timeout, &parcel.expected) else { return Outcome::Delivered };
        let until = (handed + patience).min(deadline);
        // A stored message is done when one device has it.
        let answers = if parcel.inbox_seq > 0 { expected.first(until).await } else { expected.answers(until).await };
        let Answered { acked, not_here } = answers;
        self.metrics.delivery_stage("acknowledged", handed.elapsed());
        for version in not_here.iter().filter_map(|device| targets.routes.get(device)) {
            self.note_refused(parcel.user, *version).await;
        }
        parcel.report.acked.extend(acked);
        if parcel.report.acked.is_empty() { Outcome::Undelivered } else { Outcome::Delivered }
    }

    /// A gateway says that a device is not there. The second time its route is unbound: exactly this one.
    async fn note_refused(&self, user: UserId, bound_version: Version) {
        if self.refused.get(&(user, bound_version)).is_none() {
            return self.refused.insert((user, bound_version), ());
        }
        self.refused.invalidate(&(user, bound_version));
        let unbind = Change::Unbind(Unbind::Exact { bound_version, conn: None, epoch: None });
        let _ = self.lanes.submit(user, unbind).await; // if not, it will be refused again
    }

    fn body(&self, parcel: &Parcel<'_>) -> Bytes {
        let message = &parcel.message;
        match self.settings.format {
            Format::Raw if message.binary.is_empty() => message.text.clone(),
            Format::Raw => message.binary.clone(),
            Format::Envelope => parcel.envelope().encode_to_vec().into(),
        }
    }

    fn count(&self, report: &Result<Report, Error>) {
        let outcome = match report.as_ref().map(|report| &report.outcome) {
            Ok(Outcome::Delivered) => "delivered",
            Ok(Outcome::Offline) => "offline",
            Ok(Outcome::Undelivered | Outcome::NoWay) => "undelivered",
            Ok(Outcome::Stored) => "stored",
            Ok(Outcome::InboxFull) => "inbox_full",
            Err(_) => "error",
        };
        self.metrics.deliveries.get_or_create(&ByOutcome { outcome }).inc();
    }
}

impl Message {
    /// A message as it comes out of an inbox.
    fn stored(stored: NewMessage) -> Self {
        let (text, binary) = match stored.is_binary {
            true => (Bytes::new(), stored.body),
            false => (stored.body, Bytes::new()),
        };
        let device_ids = stored.devices.into_iter().flatten().collect();
        let NewMessage { message_type, message_id, .. } = stored;
        Self { text, binary, message_type, message_id, device_ids, ack_timeout: None, store: None }
    }

    /// How many copies of it are not larger than `bytes`.
    fn as_many_as(&self, bytes: usize) -> usize {
        (bytes / (self.text.len() + self.binary.len() + ENVELOPE_BYTES)).max(1)
    }

    fn to_store(&self) -> NewMessage {
        let is_binary = !self.binary.is_empty();
        let body = if is_binary { self.binary.clone() } else { self.text.clone() };
        NewMessage {
            message_id: self.message_id.clone(),
            message_type: self.message_type.clone(),
            body,
            is_binary,
            devices: (!self.device_ids.is_empty()).then(|| self.device_ids.iter().cloned().collect()),
            expires_after: self.store.and_then(|store| store.expires_after),
        }
    }
}

impl Parcel<'_> {
    fn end(self, result: Result<Outcome, Error>, done: &mut Done) {
        done.insert(self.user, result.map(|outcome| Report { outcome, ..self.report }));
    }

    fn envelope(&self) -> Envelope {
        let message = &self.message;
        Envelope {
            delivery_id: self.report.delivery_id.clone(),
            user_id: self.user.get(),
            message: message.text.clone(),
            message_type: message.message_type.clone(),
            payload: message.binary.clone(),
            timestamp: self.report.timestamp.0,
            device_ids: message.device_ids.iter().map(DeviceId::to_string).collect(),
            wants_ack: message.ack_timeout.is_some(),
            message_id: message.message_id.clone(),
            inbox_seq: self.inbox_seq,
        }
    }

    fn is_acknowledged(&mut self) -> bool {
        self.report.acked.extend(self.expected.iter().flat_map(Expected::acked));
        !self.report.acked.is_empty()
    }
}

impl Targets {
    fn of(answer: &Answer, message: &Message, acked: &BTreeSet<DeviceId>) -> Self {
        let mut targets =
            Self { all_suspect: true, none_attaches: true, has_stored: answer.has_stored_messages(), ..Self::default() };
        for live in answer.live_routes() {
            let device = &live.route.device;
            if acked.contains(device) || !(message.device_ids.is_empty() || message.device_ids.contains(device)) {
                continue;
            }
            targets.routes.insert(device.clone(), live.route.bound_version);
            targets.all_suspect &= live.suspect;
            targets.none_attaches &= live.life.attach_no == 0;
            match Outlets::stream_of(live.life) {
                Some((epoch, node)) => {
                    targets.streams.insert(epoch, node);
                }
                None => targets.channel = true,
            }
        }
        targets
    }
}

/// Whether a repeat is answered with this.
fn is_settled(report: &Result<Report, Error>) -> bool {
    matches!(report, Ok(Report { outcome: Outcome::Delivered | Outcome::Stored, .. }))
}
