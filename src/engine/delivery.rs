//! Handing messages to the gateways that hold a user's devices: published on `user:<id>`, receivers counted.
//!
//! Nobody heard it, or memory knows no live route: the user is looked up past every cache before the answer is no. Then it
//! is tried again, never beyond the caller's deadline. Only delivered outcomes are remembered, so a repeated message is
//! never lost and seldom doubled; receivers drop what they have seen by its message id.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use prost::Message as _;
use tokio::sync::OwnedMutexGuard;
use tokio::sync::Semaphore;
use tokio::time::sleep;

use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::engine::directory::Directory;
use crate::engine::lives::Lives;
use crate::error::Error;
use crate::metrics::ByOutcome;
use crate::metrics::Metrics;
use crate::store::bus::Bus;
use crate::store::codec::Envelope;

/// Deliveries, counted in users, that may be under way at a time.
const MAX_UNDER_WAY: usize = 50_000;
/// Outcomes that are remembered for repeats, and for how long.
const REMEMBERED: u64 = 200_000;
const REMEMBERED_FOR: Duration = Duration::from_secs(300);

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
    pub node_id: String,
}

/// A message to deliver.
#[derive(Clone, Debug)]
pub struct Message {
    pub text: String,
    pub binary: Vec<u8>,
    pub message_type: String,
    /// Empty: never a repeat.
    pub message_id: String,
    /// Empty: all devices.
    pub device_ids: Vec<String>,
}

/// What came of a message to one user.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// So many subscribers took it.
    Delivered { receivers: u64 },
    /// The user has no live route.
    Offline,
    /// There are live routes, but nobody took it.
    Undelivered,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub delivery_id: String,
    pub timestamp: Timestamp,
    pub attempts: u32,
}

type Remembered = Arc<tokio::sync::Mutex<Option<Report>>>;

pub struct Deliveries {
    bus: Option<Arc<Bus>>,
    directory: Arc<Directory>,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    settings: Settings,
    under_way: Semaphore,
    outcomes: moka::sync::Cache<(UserId, String), Remembered>,
    counter: AtomicU64,
}

impl Deliveries {
    pub fn new(
        bus: Option<Arc<Bus>>,
        directory: Arc<Directory>,
        lives: Arc<Lives>,
        metrics: Arc<Metrics>,
        settings: Settings,
    ) -> Arc<Self> {
        let outcomes = moka::sync::Cache::builder().max_capacity(REMEMBERED).time_to_live(REMEMBERED_FOR).build();
        let (under_way, counter) = (Semaphore::new(MAX_UNDER_WAY), AtomicU64::new(0));
        Arc::new(Self { bus, directory, lives, metrics, settings, under_way, outcomes, counter })
    }

    /// Whether messages can be addressed to single devices.
    pub fn can_address_devices(&self) -> bool {
        self.settings.format == Format::Envelope
    }

    /// Delivers `message` to each of `users` by `deadline`; a user named twice gets it once. In the order of `users`.
    ///
    /// # Errors
    /// The whole call when too much is under way or there is no queue; a user's own when it cannot be looked up or the queue
    /// cannot be reached.
    pub async fn deliver(
        &self,
        users: &[UserId],
        message: &Message,
        deadline: Instant,
    ) -> Result<Vec<Result<Report, Error>>, Error> {
        let Some(bus) = &self.bus else { return Err(Error::unavailable("no [redis_queue] is configured to deliver through")) };
        let share = u32::try_from(users.len()).unwrap_or(u32::MAX);
        let Ok(_share) = self.under_way.try_acquire_many(share) else {
            self.metrics.shed("deliveries");
            return Err(Error::overloaded("too many messages are being delivered"));
        };
        let mut distinct = users.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let (mut done, mut turns) = self.take_turns(&distinct, message).await;
        distinct.retain(|user| !done.contains_key(user));
        done.extend(self.attempt(bus, distinct, message, deadline).await);
        for (user, turn) in &mut turns {
            if let Some(Ok(report)) = done.get(user).filter(|report| is_delivered(report)) {
                **turn = Some(report.clone());
            }
        }
        let answers =
            users.iter().map(|user| done.get(user).cloned().unwrap_or_else(|| Err(Error::unavailable("not delivered"))));
        Ok(answers.collect())
    }

    /// Waits for deliveries of the same message that are under way, and returns what is known of it already. While its turn
    /// is held, a repeat waits.
    async fn take_turns(&self, users: &[UserId], message: &Message) -> (HashMap<UserId, Result<Report, Error>>, Turns) {
        let (mut done, mut turns) = (HashMap::new(), Vec::new());
        if message.message_id.is_empty() {
            return (done, turns);
        }
        for user in users {
            let remembered = self.outcomes.get_with((*user, message.message_id.clone()), Remembered::default);
            let turn = remembered.lock_owned().await;
            match &*turn {
                Some(report) => {
                    done.insert(*user, Ok(report.clone()));
                }
                None => turns.push((*user, turn)),
            }
        }
        (done, turns)
    }

    async fn attempt(
        &self,
        bus: &Bus,
        mut users: Vec<UserId>,
        message: &Message,
        deadline: Instant,
    ) -> HashMap<UserId, Result<Report, Error>> {
        let mut done = HashMap::new();
        let mut past_caches = false;
        // The second attempt follows at once, past every cache; only those after it are retries that wait.
        for attempts in 1..=self.settings.max_retries.max(1) + 1 {
            if users.is_empty() {
                break;
            }
            let no_time = Instant::now() + self.settings.retry_interval >= deadline;
            let last = past_caches && (attempts > self.settings.max_retries || no_time);
            let live = self.live(&users, past_caches, &mut done, attempts).await;
            users = self.publish(bus, live, message, attempts, last, deadline, &mut done).await;
            if !users.is_empty() && !last {
                sleep(if past_caches { self.settings.retry_interval } else { Duration::ZERO }).await;
            }
            past_caches = true;
            if last {
                break;
            }
        }
        for report in done.values() {
            self.count(report);
        }
        done
    }

    /// Those of `users` who have a live route, looked up past every cache if need be. The others are done.
    async fn live(
        &self,
        users: &[UserId],
        past_caches: bool,
        done: &mut HashMap<UserId, Result<Report, Error>>,
        attempts: u32,
    ) -> Vec<UserId> {
        let mut live = Vec::new();
        let mut doubted = Vec::new();
        let first_look = if past_caches { Some(Duration::ZERO) } else { None };
        for (user, answer) in users.iter().zip(self.directory.get_many(users, first_look).await) {
            match answer {
                Ok(answer) if answer.live_routes().next().is_some() => live.push(*user),
                _ => doubted.push(*user),
            }
        }
        for (user, answer) in doubted.iter().zip(self.directory.get_many(&doubted, Some(Duration::ZERO)).await) {
            match answer {
                Ok(answer) if answer.live_routes().next().is_some() => live.push(*user),
                Ok(_) => {
                    done.insert(*user, Ok(self.report(Outcome::Offline, attempts)));
                }
                Err(error) => {
                    done.insert(*user, Err(error));
                }
            }
        }
        live
    }

    /// Publishes to `users` and returns whom to try again.
    #[allow(clippy::too_many_arguments)] // one attempt needs all of it, and nothing else does
    async fn publish(
        &self,
        bus: &Bus,
        users: Vec<UserId>,
        message: &Message,
        attempts: u32,
        last: bool,
        deadline: Instant,
        done: &mut HashMap<UserId, Result<Report, Error>>,
    ) -> Vec<UserId> {
        if users.is_empty() {
            return users;
        }
        let reports: Vec<Report> = users.iter().map(|_| self.report(Outcome::Undelivered, attempts)).collect();
        let bodies =
            users.iter().zip(&reports).map(|(user, report)| (bus.channels.user(*user), self.body(*user, message, report)));
        let limit = deadline.saturating_duration_since(Instant::now()).min(bus.link.timeout());
        let received = bus.publish(&bodies.collect::<Vec<_>>(), limit).await;
        let mut again = Vec::new();
        for (i, (user, report)) in users.into_iter().zip(reports).enumerate() {
            match received.as_ref().map(|received| received[i]) {
                Ok(receivers) if receivers > 0 => {
                    done.insert(user, Ok(Report { outcome: Outcome::Delivered { receivers }, ..report }));
                }
                _ if !last => again.push(user),
                Ok(_) => {
                    done.insert(user, Ok(report));
                }
                Err(_) => {
                    done.insert(user, Err(Error::unavailable("the queue (redis_queue) cannot be reached")));
                }
            }
        }
        again
    }

    fn body(&self, user: UserId, message: &Message, report: &Report) -> Vec<u8> {
        if self.settings.format == Format::Raw {
            return if message.binary.is_empty() { message.text.clone().into_bytes() } else { message.binary.clone() };
        }
        let envelope = Envelope {
            delivery_id: report.delivery_id.clone(),
            user_id: user.get(),
            message: message.text.clone(),
            message_type: message.message_type.clone(),
            payload: message.binary.clone(),
            timestamp: report.timestamp.0,
            device_ids: message.device_ids.clone(),
            message_id: message.message_id.clone(),
        };
        envelope.encode_to_vec()
    }

    fn report(&self, outcome: Outcome, attempts: u32) -> Report {
        let delivery_id = format!("{}-{}", self.settings.node_id, self.counter.fetch_add(1, Ordering::Relaxed));
        Report { outcome, delivery_id, timestamp: self.lives.clock.now(), attempts }
    }

    fn count(&self, report: &Result<Report, Error>) {
        let outcome = match report.as_ref().map(|report| &report.outcome) {
            Ok(Outcome::Delivered { .. }) => "delivered",
            Ok(Outcome::Offline) => "offline",
            Ok(Outcome::Undelivered) => "undelivered",
            Err(_) => "error",
        };
        self.metrics.deliveries.get_or_create(&ByOutcome { outcome }).inc();
    }
}

type Turns = Vec<(UserId, OwnedMutexGuard<Option<Report>>)>;

fn is_delivered(report: &Result<Report, Error>) -> bool {
    matches!(report, Ok(Report { outcome: Outcome::Delivered { .. }, .. }))
}
