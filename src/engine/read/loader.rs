//! Loading users from SQL: the only way past the cache.
//!
//! Whoever misses names the user and waits; workers with a connection each take all that is asked for, up to one statement's
//! worth, and read it at once. So there is one load per user at a time, misses of different callers share statements, and
//! the number of statements in flight is bounded. Loads are tasks of their own: a caller that gives up cancels nothing.
//! Full: the caller is told to come again. Where there is an L2, others ask it first, and only what it lacks comes here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use smallvec::SmallVec;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::backoff::Backoff;
use crate::domain::gateway::Life;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::domain::user::UserRecord;
use crate::engine::read::cache::Cache;
use crate::engine::read::cache::LoadTicket;
use crate::engine::read::cache::Loaded;
use crate::engine::read::l2::L2;
use crate::engine::read::lives::Lives;
use crate::engine::read::loads::Load;
use crate::engine::read::loads::Loads;
use crate::engine::read::loads::Waiter;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;
use crate::store::users::Records;

/// Users read by one statement.
const MAX_USERS_PER_LOAD: usize = 512;
/// Users waiting to be loaded. Ten of the largest batches.
const MAX_WAITING: usize = 100_000;

/// Tasks that ask L2. Each waits for one batch of users at a time.
pub const L2_READERS: usize = 4;
/// Between attempts to reach the database, from the second failure on.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LIMIT: Duration = Duration::from_secs(1);

/// Most users are asked for by one caller at a time.
type Waiters = SmallVec<[Waiter; 1]>;

#[derive(Default)]
struct Flight {
    /// Answered by the load in progress. None: no load is in progress.
    running: Option<Waiters>,
    /// Answered by the next load.
    waiting: Waiters,
    /// Somebody among them wants to hear SQL itself.
    past_l2: bool,
}

/// A user whose load begins.
#[derive(Clone, Copy)]
struct Wanted {
    user: UserId,
    since: Instant,
    past_l2: bool,
}

#[derive(Default)]
struct Queue {
    flights: NumberMap<UserId, Flight>,
    /// With the time since when.
    order: VecDeque<(UserId, Instant)>,
    /// Loads that L2 could not answer, with the time since when.
    for_sql: VecDeque<(LoadTicket, Instant)>,
}

pub struct Loader {
    queue: Mutex<Queue>,
    wake: Notify,
    wake_sql: Notify,
    database: Arc<Database>,
    cache: Arc<Cache>,
    lives: Arc<Lives>,
    l2: Option<Arc<L2>>,
    metrics: Arc<Metrics>,
}

impl Loader {
    pub fn new(
        database: Arc<Database>,
        cache: Arc<Cache>,
        lives: Arc<Lives>,
        l2: Option<Arc<L2>>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue: Mutex::default(),
            wake: Notify::new(),
            wake_sql: Notify::new(),
            database,
            cache,
            lives,
            l2,
            metrics,
        })
    }

    /// Asks for `users`. `fresh`: only a load that begins after this call will do; otherwise one in progress is joined.
    /// `past_l2`: SQL itself has to be read.
    ///
    /// # Errors
    /// [`Error::Overloaded`] if too many users wait already; then none of these does.
    pub fn request(&self, users: &[UserId], fresh: bool, past_l2: bool) -> Result<Loads, Error> {
        let mut queue = self.queue();
        if queue.order.len() + queue.for_sql.len() + users.len() > MAX_WAITING {
            self.metrics.shed("loads");
            return Err(Error::overloaded("too many users wait to be read from the database"));
        }
        let (now, (loads, waiters)) = (Instant::now(), Loads::of(users.len()));
        users.iter().zip(waiters).for_each(|(user, waiter)| queue.join(*user, (fresh, past_l2), waiter, now));
        drop(queue);
        self.wake_first();
        Ok(loads)
    }

    /// Whoever takes requests first: those who ask L2, if there is one.
    fn wake_first(&self) {
        if self.l2.is_some() { self.wake.notify_one() } else { self.wake_sql.notify_one() }
    }

    /// Answers requests from L2 as far as it goes, until `shutdown`, and leaves the others to those who read SQL: a database
    /// that stands still keeps nobody from what Redis has.
    pub async fn work_ahead(self: Arc<Self>, shutdown: CancellationToken) {
        let _stop_node_on_panic = shutdown.clone().drop_guard();
        while let Some(wanted) = shutdown.run_until_cancelled(self.take()).await {
            let tickets = wanted.iter().map(|wanted| self.cache.begin_load(wanted.user)).collect();
            let left = self.ask_l2(tickets, &wanted).await;
            if !left.is_empty() {
                let now = Instant::now();
                self.queue().for_sql.extend(left.into_iter().map(|ticket| (ticket, now)));
                self.wake_sql.notify_one();
            }
        }
    }

    async fn take(&self) -> Vec<Wanted> {
        loop {
            let users = self.queue().take();
            if !users.is_empty() {
                self.wake.notify_one(); // there may be more than one batch
                return users;
            }
            self.wake.notified().await;
        }
    }

    /// Reads SQL over one connection until `shutdown`.
    pub async fn work(self: Arc<Self>, shutdown: CancellationToken) {
        let _stop_node_on_panic = shutdown.clone().drop_guard();
        let mut reader = Reader { connection: None, backoff: Backoff::new(RETRY_FIRST, RETRY_LIMIT), not_before: Instant::now() };
        while let Some(tickets) = shutdown.run_until_cancelled(self.take_for_sql()).await {
            let mut unanswered: Vec<UserId> = tickets.iter().map(LoadTicket::user).collect();
            if let Err(error) = self.load(&mut reader, tickets, &mut unanswered).await {
                reader.connection = None;
                self.metrics.store_error("load");
                if let SqlError::Failed(_) = error {
                    error!(%error, "users cannot be loaded");
                }
                let told = Error::unavailable("the database does not answer");
                self.answer(unanswered.into_iter().map(|user| (user, Err(told.clone()))));
            }
        }
    }

    async fn take_for_sql(&self) -> Vec<LoadTicket> {
        loop {
            let tickets = self.next_for_sql();
            if !tickets.is_empty() {
                self.wake_sql.notify_one();
                return tickets;
            }
            self.wake_sql.notified().await;
        }
    }

    fn next_for_sql(&self) -> Vec<LoadTicket> {
        let mut queue = self.queue();
        if self.l2.is_none() {
            let wanted = queue.take();
            drop(queue);
            self.count_wait(wanted.first().map(|first| first.since));
            return wanted.iter().map(|wanted| self.cache.begin_load(wanted.user)).collect();
        }
        let batch = queue.for_sql.len().min(MAX_USERS_PER_LOAD);
        self.count_wait(queue.for_sql.front().map(|(_, since)| *since));
        queue.for_sql.drain(..batch).map(|(ticket, _)| ticket).collect()
    }

    /// Somebody has waited for a connection since then.
    fn count_wait(&self, since: Option<Instant>) {
        if let Some(since) = since {
            self.metrics.sql.wait_seconds.observe(since.elapsed().as_secs_f64());
        }
    }

    /// Reads the users of `tickets`, and answers those who wait. Leaves in `users` whom it could not answer.
    async fn load(&self, reader: &mut Reader, mut tickets: Vec<LoadTicket>, users: &mut Vec<UserId>) -> Result<(), SqlError> {
        let began = Instant::now();
        while !tickets.is_empty() {
            let generation = self.l2.as_ref().map_or(0, |l2| l2.generation());
            let (mut records, lives) = reader.read(&self.database, users).await?;
            self.lives.learn(&lives);
            if let Some(l2) = &self.l2 {
                let fills: Vec<_> = records.iter().map(|(user, record)| (*user, record.clone())).collect();
                l2.fill(&fills, began, generation).await;
            }
            let went_back = self.cache.went_back();
            let mut answers = Vec::with_capacity(tickets.len());
            let mut again = Vec::new();
            for ticket in tickets {
                let user = ticket.user();
                let record = records.remove(&user).unwrap_or_default();
                match self.cache.end_load(ticket, record, true) {
                    Loaded::Answer(entry) => answers.push((user, Ok(entry))),
                    Loaded::Again(ticket) => again.push(ticket),
                }
            }
            self.answer(answers.into_iter());
            users.clear();
            users.extend(again.iter().map(LoadTicket::user));
            tickets = again;
            if self.cache.went_back() > went_back {
                self.raise_generation(&mut reader.connection).await?;
            }
        }
        Ok(())
    }

    /// Answers what L2 has and may answer; returns the loads that have to go on to SQL.
    async fn ask_l2(&self, tickets: Vec<LoadTicket>, wanted: &[Wanted]) -> Vec<LoadTicket> {
        let Some((l2, generation)) = self.l2.as_ref().and_then(|l2| Some((l2, l2.believed()?))) else { return tickets };
        let asked: Vec<UserId> = wanted.iter().filter(|wanted| !wanted.past_l2).map(|wanted| wanted.user).collect();
        let mut found = l2.read(&asked, generation).await;
        let table = self.lives.table();
        let mut answers = Vec::new();
        let mut on_to_sql = Vec::new();
        for ticket in tickets {
            let user = ticket.user();
            let known = |record: &UserRecord| record.routes.iter().all(|route| table.get(route.epoch).is_some());
            match found.remove(&user).filter(|record| ticket.accepts(record.version) && known(record)) {
                Some(record) => match self.cache.end_load(ticket, record, false) {
                    Loaded::Answer(entry) => answers.push((user, Ok(entry))),
                    Loaded::Again(ticket) => on_to_sql.push(ticket),
                },
                None => on_to_sql.push(ticket),
            }
        }
        self.answer(answers.into_iter());
        on_to_sql
    }

    /// Answers those who wait, and has the users loaded again whom others have asked for meanwhile.
    fn answer(&self, answers: impl Iterator<Item = (UserId, Load)>) {
        self.queue().answer(answers);
        self.wake_first();
    }

    async fn raise_generation(&self, connection: &mut Option<Connection>) -> Result<(), SqlError> {
        error!("the database holds less than it had acknowledged: it was set back; every cache starts anew");
        if let Some(connection) = connection {
            let seen = connection.read_cluster().await?.generation;
            connection.raise_generation(seen).await?;
        }
        Ok(())
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Read = (Records, Vec<Arc<Life>>);

/// One connection for reading. A database that cannot be reached is not asked for by every query.
struct Reader {
    connection: Option<Connection>,
    backoff: Backoff,
    not_before: Instant,
}

impl Reader {
    /// Reads on the connection kept from before if it still works, else on a new one.
    async fn read(&mut self, database: &Database, users: &[UserId]) -> Result<Read, SqlError> {
        self.connection = self.connection.take().filter(|kept| database.is_current(kept));
        if let Some(kept) = &mut self.connection {
            match kept.load_users_with_lives(users).await {
                Err(error) if error.ends_connection() => self.connection = None,
                done => return done,
            }
        }
        if Instant::now() < self.not_before {
            return Err(SqlError::Lost("it could not be reached a moment ago".to_owned()));
        }
        let read = async {
            let mut fresh = database.connect(Purpose::General).await?;
            let read = fresh.load_users_with_lives(users).await?;
            Ok((fresh, read))
        };
        match read.await {
            Ok((fresh, read)) => {
                self.connection = Some(fresh);
                self.backoff.reset();
                Ok(read)
            }
            Err(error) => {
                self.not_before = Instant::now() + self.backoff.pause();
                Err(error)
            }
        }
    }
}

impl Queue {
    fn join(&mut self, user: UserId, (fresh, past_l2): (bool, bool), waiter: Waiter, now: Instant) {
        let flight = self.flights.entry(user).or_default();
        match &mut flight.running {
            Some(running) if !fresh => running.push(waiter),
            running => {
                if flight.waiting.is_empty() && running.is_none() {
                    self.order.push_back((user, now));
                }
                flight.waiting.push(waiter);
                flight.past_l2 |= past_l2;
            }
        }
    }

    /// The users of the next load. Those whose callers have all gone are left out.
    fn take(&mut self) -> Vec<Wanted> {
        let mut users = Vec::new();
        while users.len() < MAX_USERS_PER_LOAD {
            let Some((user, since)) = self.order.pop_front() else { break };
            let Some(flight) = self.flights.get_mut(&user) else { continue };
            flight.waiting.retain(|waiter| waiter.is_awaited());
            if flight.waiting.is_empty() {
                self.flights.remove(&user);
                continue;
            }
            flight.running = Some(std::mem::take(&mut flight.waiting));
            users.push(Wanted { user, since, past_l2: std::mem::take(&mut flight.past_l2) });
        }
        users
    }

    fn answer(&mut self, answers: impl Iterator<Item = (UserId, Load)>) {
        let now = Instant::now();
        for (user, answer) in answers {
            let Some(flight) = self.flights.get_mut(&user) else { continue };
            for waiter in flight.running.take().into_iter().flatten() {
                waiter.answer(answer.clone());
            }
            if flight.waiting.is_empty() {
                self.flights.remove(&user);
            } else {
                self.order.push_back((user, now));
            }
        }
    }
}
