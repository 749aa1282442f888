//! The read path: this node's memory, then SQL. Every answer says where it came from and how far it can be behind.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use arc_swap::Guard;
use tokio::time::timeout;

use crate::clock::AtomicInstant;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Liveness;
use crate::domain::history::OnlineSession;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::user::UserRecord;
use crate::engine::read::cache::Cache;
use crate::engine::read::cache::Entry;
use crate::engine::read::cache::L2_AGE;
use crate::engine::read::hints::Hints;
use crate::engine::read::lives::Lives;
use crate::engine::read::lives::SUSPECT_AFTER;
use crate::engine::read::loader::Loader;
use crate::engine::read::loads::Load;
use crate::engine::read::loads::Loads;
use crate::error::Error;
use crate::metrics::Metrics;

/// How long "no such user" is remembered: long enough to stop a storm, short enough not to hide a first log-in elsewhere.
const ABSENT_TTL: Duration = Duration::from_secs(1);
/// How old an entry may be while changes made by other nodes are not announced to this one.
const UNANNOUNCED_LIMIT: Duration = Duration::from_secs(1);
/// How long a reader who could be given an old answer waits for the database before it is given that.
const STALE_PATIENCE: Duration = Duration::from_millis(300);
/// After one load timed out, readers that have an older answer do not wait for SQL for this long, unless it answers.
const SLOW_MEMORY: Duration = Duration::from_secs(2);

/// What this node hears of changes made by others.
pub enum Announcements {
    /// There are no others.
    NotNeeded,
    /// There may be others, and no bus: entries are limited to a second.
    Missing,
    Hints(Arc<Hints>),
}

/// Which tier an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Local,
    Shared,
    Durable,
}

impl Source {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "memory",
            Self::Shared => "Redis",
            Self::Durable => "the database",
        }
    }
}

pub struct Settings {
    pub announcements: Announcements,
    pub l1_ttl: Duration,
    pub heartbeat_interval: Duration,
    /// The longest a reader waits.
    pub patience: Duration,
}

pub struct Directory {
    cache: Arc<Cache>,
    lives: Arc<Lives>,
    loader: Arc<Loader>,
    metrics: Arc<Metrics>,
    settings: Settings,
    database_slow: AtomicInstant,
}

/// Where a user is, as far as this node can tell.
#[derive(Clone, Debug)]
pub struct Answer {
    entry: Arc<Entry>,
    moment: Arc<Moment>,
    all_suspect: bool,
    pub source: Source,
    /// How far this answer can be behind.
    pub age: Duration,
}

/// What all answers of one call from memory rest on, looked at once.
#[derive(Debug)]
struct Moment {
    at: Instant,
    now: Timestamp,
    slack: Duration,
    /// A look at the lives as they were. It touches no memory that other threads use.
    table: Guard<Arc<LifeTable>>,
    lives_age: Duration,
    heartbeat_interval: Duration,
    /// How long ago all changes made until then were known. None: some may be missing.
    complete: Option<Duration>,
}

/// A route that leads to a device now.
pub struct LiveRoute<'a> {
    pub route: &'a Route,
    pub life: &'a Life,
    /// Not confirmed lately: still worth trying.
    pub suspect: bool,
}

impl LiveRoute<'_> {
    pub fn gateway(&self) -> &GatewayAddr {
        &self.life.gateway
    }
}

impl Answer {
    pub fn live_routes(&self) -> impl Iterator<Item = LiveRoute<'_>> {
        self.entry.record.routes.iter().filter_map(|route| {
            let Moment { table, now, slack, heartbeat_interval, .. } = &*self.moment;
            let life = table.get(route.epoch)?;
            let liveness = route.liveness(table, *now, *slack, *heartbeat_interval);
            let suspect = self.all_suspect || liveness == Liveness::Late;
            (liveness != Liveness::Over).then_some(LiveRoute { route, life, suspect })
        })
    }

    /// Routes on lives that are not over, whatever their own time to live says: the sweep's change tells of that.
    pub fn routes_on_lives(&self) -> impl Iterator<Item = (&Route, &Life)> {
        let living = |route: &&Route| self.moment.table.get(route.epoch).filter(|life| life.is_alive());
        self.entry.record.routes.iter().filter_map(move |route| Some((route, &**living(&route)?)))
    }

    /// As the user wants to be seen.
    pub fn wanted(&self) -> Status {
        self.entry.record.wanted()
    }

    /// The live route that was bound last.
    pub fn newest(&self) -> Option<LiveRoute<'_>> {
        self.live_routes().max_by_key(|live| live.route.bound_version)
    }

    /// What others are shown.
    pub fn status(&self) -> Status {
        let record = &self.entry.record;
        record.wanted().shown(activity(self.live_routes().map(|live| live.route)))
    }

    /// What the user says of themselves; nothing is said of users who are shown as `OFFLINE`.
    pub fn text(&self, shown: Status) -> &str {
        if shown == Status::Offline { "" } else { self.entry.record.text() }
    }

    /// Since when `shown` is what others are shown.
    pub fn status_since(&self, shown: Status) -> Timestamp {
        let record = &self.entry.record;
        let has_died = shown == Status::Offline && record.standing().shown() != shown;
        if has_died { self.ended_at().max(record.shown().since) } else { record.shown().since }
    }

    /// When the last of the record's routes was good last.
    pub fn ended_at(&self) -> Timestamp {
        let ends = self.entry.record.routes.iter().filter_map(|route| route.end(&self.moment.table));
        ends.max().unwrap_or_default().max(self.entry.record.last_seen)
    }

    /// Live ones or not.
    pub fn has_routes(&self) -> bool {
        !self.entry.record.routes.is_empty()
    }

    /// Whether the user is INVISIBLE.
    pub fn is_hidden(&self) -> bool {
        self.entry.record.is_hidden()
    }

    /// The part of the running session that is not in the user's days.
    pub fn session(&self) -> OnlineSession {
        self.entry.record.session()
    }

    /// The version of what is shown. It grows with each change that others could see, also when a life ends with routes on it.
    pub fn token(&self) -> u64 {
        let is_over = |route: &Route| self.moment.table.get(route.epoch).is_some_and(|life| !life.is_alive());
        self.entry.record.shown_version(is_over).0
    }

    /// Lives that the record's routes are on.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> {
        self.entry.record.routes.iter().map(|route| route.epoch)
    }

    /// Whether messages wait in the user's inbox.
    pub fn has_stored_messages(&self) -> bool {
        self.entry.record.inbox_pending > 0
    }

    pub fn version(&self) -> Version {
        self.entry.record.version
    }

    /// When a device last connected or went, as far as others could see it.
    pub fn last_seen(&self) -> Timestamp {
        self.entry.record.shown().seen
    }
}

impl Directory {
    pub fn new(cache: Arc<Cache>, lives: Arc<Lives>, loader: Arc<Loader>, metrics: Arc<Metrics>, settings: Settings) -> Self {
        Self { cache, lives, loader, metrics, settings, database_slow: AtomicInstant::never() }
    }

    /// Where `user` is, if memory can tell at `now`. `bound`: how far the answer may be behind; zero: SQL is read.
    pub fn recall(&self, user: UserId, bound: Option<Duration>, now: Instant) -> Option<Answer> {
        let answer = self.in_memory(user, bound, &Arc::new(self.moment(now)))?;
        self.metrics.l1_hits.inc();
        Some(answer)
    }

    /// Where `user` is, if need be by asking beyond memory.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read and nothing good enough is known.
    pub async fn get(&self, user: UserId, bound: Option<Duration>) -> Result<Answer, Error> {
        match self.recall(user, bound, Instant::now()) {
            Some(answer) => Ok(answer),
            None => self.look_up(user, bound).await,
        }
    }

    /// As [`Directory::get`], after memory could not tell.
    pub async fn look_up(&self, user: UserId, bound: Option<Duration>) -> Result<Answer, Error> {
        self.load(&[user], bound).await.pop().unwrap_or_else(|| Err(no_answer()))
    }

    /// As [`Directory::get`] for each of `users`, in their order. A user who cannot be looked up costs the others nothing.
    pub async fn get_many(&self, users: &[UserId], bound: Option<Duration>) -> Vec<Result<Answer, Error>> {
        let moment = Arc::new(self.moment(Instant::now()));
        let known: Vec<Option<Answer>> = users.iter().map(|user| self.in_memory(*user, bound, &moment)).collect();
        let missing: Vec<UserId> = users.iter().zip(&known).filter(|(_, known)| known.is_none()).map(|(user, _)| *user).collect();
        self.metrics.l1_hits.inc_by(count(users.len() - missing.len()));
        let mut loaded = if missing.is_empty() { Vec::new() } else { self.load(&missing, bound).await }.into_iter();
        known.into_iter().map(|known| known.map_or_else(|| loaded.next().unwrap_or_else(|| Err(no_answer())), Ok)).collect()
    }

    /// As each of `users` is beyond memory; if that cannot be told soon, as it was.
    async fn load(&self, users: &[UserId], bound: Option<Duration>) -> Vec<Result<Answer, Error>> {
        self.metrics.l1_misses.inc_by(count(users.len()));
        let asked = Instant::now();
        let loads = match self.loader.request(users, bound.is_some(), is_close(bound)) {
            Ok(loads) => self.wait(loads, users, bound, asked).await,
            Err(overloaded) => vec![Some(Err(overloaded)); users.len()],
        };
        let moment = Arc::new(self.moment(Instant::now()));
        let answer = |(user, load): (&UserId, Option<Load>)| match load.unwrap_or_else(|| Err(no_answer())) {
            Ok(entry) => {
                let joined = bound.map_or_else(|| asked.saturating_duration_since(entry.began()), |_| Duration::ZERO);
                Ok(self.loaded(entry, joined, &moment))
            }
            Err(error) => self.outdated(*user, bound, &moment).ok_or(error),
        };
        users.iter().zip(loads).map(answer).collect()
    }

    /// Waits for all of them, but not for long if each can be given an old answer.
    async fn wait(&self, loads: Loads, users: &[UserId], bound: Option<Duration>, asked: Instant) -> Vec<Option<Load>> {
        let moment = Arc::new(self.moment(asked));
        let is_known = |user: &UserId| self.outdated(*user, bound, &moment).is_some();
        let patience = match users.iter().all(is_known) {
            false => self.settings.patience,
            true if self.database_slow.age(asked) < SLOW_MEMORY => Duration::ZERO,
            true => STALE_PATIENCE,
        };
        match timeout(patience, loads.complete()).await {
            Ok(()) => self.database_slow.clear(),
            Err(_) if patience.is_zero() => {} // nobody waited: that tells nothing new
            Err(_) => self.database_slow.set(Instant::now()),
        }
        loads.take()
    }

    /// What follows now from records that were just read from SQL, with the lives of their routes. They do not stay in memory.
    pub fn judge(&self, records: impl IntoIterator<Item = (UserId, UserRecord)>) -> Vec<(UserId, Answer)> {
        let now = Instant::now();
        let moment = Arc::new(self.moment(now));
        let answer = |(user, record)| (user, self.loaded(Arc::new(Entry::passing(record, now)), Duration::ZERO, &moment));
        records.into_iter().map(answer).collect()
    }

    /// How long ago all changes made until then were known. None: some may be missing.
    pub fn complete_since(&self, at: Instant) -> Option<Duration> {
        match &self.settings.announcements {
            Announcements::NotNeeded => Some(Duration::ZERO),
            Announcements::Missing => None,
            Announcements::Hints(hints) => hints.complete_since(at),
        }
    }

    /// Whether changes reach this node late: it cannot hear the others, or does not read the database.
    pub fn is_behind(&self) -> bool {
        let now = Instant::now();
        self.complete_since(now).is_none() || self.lives.age(now) > SUSPECT_AFTER
    }

    fn moment(&self, at: Instant) -> Moment {
        let complete = self.complete_since(at);
        let (table, heartbeat_interval) = (self.lives.glance(), self.settings.heartbeat_interval);
        let now = self.lives.clock.at(at);
        let (slack, lives_age) = (self.lives.clock.slack(now), self.lives.age(at));
        Moment { at, now, slack, table, lives_age, heartbeat_interval, complete }
    }

    /// An answer from this node's memory, if it is good enough.
    fn in_memory(&self, user: UserId, bound: Option<Duration>, moment: &Arc<Moment>) -> Option<Answer> {
        if is_zero(bound) {
            return None;
        }
        let entry = self.cache.get(user)?;
        let age = self.fit(&entry, moment).ok()?;
        if bound.is_some_and(|bound| age > bound) {
            return None;
        }
        Some(self.answer(entry, Source::Local, age, moment))
    }

    /// How far an entry can be behind, if it is good enough to answer from.
    ///
    /// # Errors
    /// Why it is not.
    fn fit(&self, entry: &Entry, moment: &Moment) -> Result<Duration, &'static str> {
        let since = moment.at.saturating_duration_since(entry.as_of());
        let (limit, age) = match (&self.settings.announcements, moment.complete) {
            (Announcements::NotNeeded, _) => (self.settings.l1_ttl, Duration::ZERO),
            (_, Some(complete)) => (self.settings.l1_ttl + L2_AGE, self.known(entry, since, complete).max(moment.lives_age)),
            (_, None) => (UNANNOUNCED_LIMIT, since.max(moment.lives_age)),
        };
        if since > self.limit(entry, limit) {
            return Err("it was read too long ago");
        }
        let renewed = |end: Timestamp| end <= moment.now && end > self.lives.clock.at(entry.as_of());
        if entry.record.routes.iter().any(|route| route.expires_at.at().is_some_and(renewed)) {
            return Err("a route's time to live has ended since, unless it was bound again");
        }
        if entry.record.routes.iter().any(|route| moment.table.get(route.epoch).is_none()) {
            return Err("it names a life that this node has not heard of");
        }
        Ok(age)
    }

    /// What memory has of `user`, and how far that can be behind if it may be answered, or why it may not. None: nothing.
    pub fn remembered(&self, user: UserId) -> Option<(Arc<Entry>, Result<Duration, &'static str>)> {
        let (entry, trusted) = self.cache.peek(user)?;
        let fit = match trusted {
            true => self.fit(&entry, &self.moment(Instant::now())),
            false => Err("it was read before the caches began anew"),
        };
        Some((entry, fit))
    }

    fn limit(&self, entry: &Entry, limit: Duration) -> Duration {
        let limit = limit.min(self.settings.l1_ttl + L2_AGE);
        if entry.record.version == Version::NONE { limit.min(ABSENT_TTL) } else { limit }
    }

    /// How far an entry can be behind, if every change until `complete` ago was heard of. What came from L2 may have been
    /// behind when it was read, and stays so until a hint tells.
    fn known(&self, entry: &Entry, since: Duration, complete: Duration) -> Duration {
        if entry.from_l2 { since.min(complete + L2_AGE) } else { since.min(complete) }
    }

    /// What a load brought that had begun so long before its caller asked.
    fn loaded(&self, entry: Arc<Entry>, before: Duration, moment: &Arc<Moment>) -> Answer {
        let (source, age) = if entry.from_l2 { (Source::Shared, L2_AGE) } else { (Source::Durable, Duration::ZERO) };
        self.answer(entry, source, age + before, moment)
    }

    /// What was known once, for when the database cannot be read: marked, and only if the caller's bound allows it.
    fn outdated(&self, user: UserId, bound: Option<Duration>, moment: &Arc<Moment>) -> Option<Answer> {
        let entry = self.cache.get(user).filter(|_| !is_zero(bound))?;
        let age = moment.at.saturating_duration_since(entry.as_of()).max(moment.lives_age);
        if bound.is_some_and(|bound| age > bound) {
            return None;
        }
        let mut answer = self.answer(entry, Source::Local, age, moment);
        answer.all_suspect = true;
        Some(answer)
    }

    fn answer(&self, entry: Arc<Entry>, source: Source, age: Duration, moment: &Arc<Moment>) -> Answer {
        let all_suspect = source != Source::Durable && moment.lives_age > SUSPECT_AFTER;
        Answer { entry, moment: moment.clone(), all_suspect, source, age }
    }
}

fn is_zero(bound: Option<Duration>) -> bool {
    bound == Some(Duration::ZERO)
}

/// Closer than what L2 can promise: SQL itself has to be read.
fn is_close(bound: Option<Duration>) -> bool {
    bound.is_some_and(|bound| bound < L2_AGE)
}

fn no_answer() -> Error {
    Error::unavailable("the database did not answer in time")
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
