//! Reads watched users whenever they may have changed, and has the streams that watch them look at what is new.
//!
//! Interest comes first, then the reading: whoever changes after a user was registered is heard of. What may have been missed is
//! found out by looking: at those whose gateway's life has ended, and at everybody when hints were lost, paced. So nothing can
//! get lost but states that somebody else has overwritten meanwhile.

use std::collections::HashSet;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::domain::gateway::LifeTable;
use crate::domain::id::Epoch;
use crate::domain::id::Epochs;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::engine::presence::interest::SHARDS;
use crate::engine::presence::shown::Shown;
use crate::engine::presence::watches::Ended;
use crate::engine::presence::watches::Watches;
use crate::engine::read::cache::Cache;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::error::Error;

/// Users read at once, and how many such readings may be under way: SQL that stands still keeps nobody from what memory knows.
const BATCH: usize = 512;
const READINGS: usize = 4;
/// How often lives and the trust in memory are looked at, while anybody watches.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Between attempts to read somebody who could not be read.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Users whose gateways have died that are looked at per second: OFFLINE is told seconds later anyway.
const DEATHS_PER_SECOND: f64 = 40_000.0;
/// Users for whom a queue keeps room while it is empty.
const FEW: usize = 4 * BATCH;
/// Streams that are told of one user before others have their turn.
const SLICE: usize = 1_000;

/// Why a user is to be read.
#[derive(Clone, Copy, Debug, Default)]
struct Want {
    /// A version that is known to exist.
    floor: u64,
    /// A stream has not been told anything of the user yet.
    is_added: bool,
    /// The caches know less: SQL has to be read.
    past_caches: bool,
    /// Something has changed: this comes before looks for other reasons.
    is_urgent: bool,
}

/// Users to be read, each once, in the order in which they came.
#[derive(Default)]
struct Queue {
    wants: NumberMap<UserId, Want>,
    order: VecDeque<UserId>,
}

impl Queue {
    fn push(&mut self, user: UserId, want: Want) {
        let known = self.wants.entry(user).or_insert_with(|| {
            self.order.push_back(user);
            Want::default()
        });
        known.floor = known.floor.max(want.floor);
        known.is_added |= want.is_added;
        known.past_caches |= want.past_caches;
        known.is_urgent |= want.is_urgent;
    }

    fn pop(&mut self) -> Option<(UserId, Want)> {
        let Some(user) = self.order.pop_front() else {
            if self.order.capacity() > FEW {
                *self = Self::default(); // millions may have been there once
            }
            return None;
        };
        Some((user, self.wants.remove(&user).unwrap_or_default()))
    }
}

/// How many users may be looked at now, of so many per second.
struct Pace {
    rate: f64,
    allowance: f64,
    at: Instant,
}

impl Pace {
    fn new(rate: f64) -> Self {
        Self { rate, allowance: 0.0, at: Instant::now() }
    }

    /// What has become free since the last call, and what was left then, but not more than a tenth of a second's.
    fn refill(&mut self) {
        let now = Instant::now();
        let gained = now.duration_since(self.at).as_secs_f64() * self.rate;
        (self.allowance, self.at) = ((self.allowance + gained).min(self.rate / 10.0), now);
    }

    fn take(&mut self) -> bool {
        let is_there = self.allowance >= 1.0;
        self.allowance -= f64::from(u8::from(is_there));
        is_there
    }
}

/// A look at everybody, a part after the other.
struct Resync {
    /// The next part, and how many are left.
    shard: usize,
    shards_left: usize,
    left: Vec<UserId>,
    pace: Pace,
}

type Reading = BoxFuture<'static, Vec<(UserId, Want, Result<Answer, Error>)>>;

pub struct Teller {
    watches: Arc<Watches>,
    directory: Arc<Directory>,
    cache: Arc<Cache>,
    /// To be looked for in memory: those who have changed first.
    news: Queue,
    waiting: Queue,
    /// To be read, because memory does not know them: those who have changed first.
    changed: Queue,
    others: Queue,
    /// Users who could not be read.
    failed: Vec<(UserId, Want)>,
    failed_at: Instant,
    reading: HashSet<UserId>,
    readings: FuturesUnordered<Reading>,
    resync: Option<Resync>,
    /// Users with a route on a life that has ended.
    bereft: VecDeque<UserId>,
    deaths: Pace,
    ended: Option<Ended>,
    /// What was looked at last.
    table: Arc<LifeTable>,
    trust: u32,
}

impl Teller {
    pub fn new(watches: Arc<Watches>, directory: Arc<Directory>, cache: Arc<Cache>) -> Self {
        let (table, trust) = (watches.lives.table(), cache.trust());
        Self {
            watches,
            directory,
            cache,
            news: Queue::default(),
            waiting: Queue::default(),
            changed: Queue::default(),
            others: Queue::default(),
            failed: Vec::new(),
            failed_at: Instant::now(),
            reading: HashSet::new(),
            readings: FuturesUnordered::new(),
            resync: None,
            bereft: VecDeque::new(),
            deaths: Pace::new(DEATHS_PER_SECOND),
            ended: None,
            table,
            trust,
        }
    }

    /// Until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        loop {
            let watches = self.watches.clone();
            let is_idle = watches.streams() == 0 && watches.interest.len() == 0;
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(read) = self.readings.next() => self.settle_all(read).await,
                () = watches.wake.notified() => {}
                () = watches.feed.pushed() => {}
                () = sleep(LOOK_INTERVAL), if !is_idle => {}
            }
            self.step().await;
        }
    }

    async fn step(&mut self) {
        self.forget_ended();
        self.take_changes();
        if self.watches.interest.len() == 0 {
            self.rest();
        }
        self.look_at_lives().await;
        self.look_at_bereft();
        self.go_on_with_resync();
        self.recall().await;
        self.read();
        self.report();
    }

    fn report(&self) {
        let (metrics, users) = (&self.watches.metrics.presence, self.watches.interest.len());
        let queues = [&self.news, &self.waiting, &self.changed, &self.others];
        let waiting: usize = queues.iter().map(|queue| queue.order.len()).sum();
        let resync = self.resync.as_ref();
        let to_visit = resync.map_or(0, |resync| resync.left.len() + users * resync.shards_left.min(SHARDS) / SHARDS);
        let dirty = waiting + self.bereft.len() + self.reading.len() + self.failed.len() + to_visit;
        metrics.watch_dirty.set(dirty as i64);
        metrics.watch_streams.set(self.watches.streams() as i64);
        metrics.watch_pairs.set(self.watches.pairs() as i64);
        metrics.watch_users.set(users as i64);
    }

    /// Lets go of some users of streams that have ended.
    fn forget_ended(&mut self) {
        let Some(mut ended) = self.ended.take().or_else(|| self.watches.take_ended()) else { return };
        if !self.watches.forget(&mut ended) {
            self.ended = Some(ended);
        }
        self.watches.wake.notify_one(); // there may be more
    }

    /// Nobody is watched: there is nobody whom a look that is not done yet could be for.
    fn rest(&mut self) {
        self.resync = None;
        self.failed = Vec::new();
        self.bereft = VecDeque::new();
    }

    /// Who has changed, and who was added.
    fn take_changes(&mut self) {
        let (changes, has_lost) = self.watches.feed.take();
        for changed in changes {
            let is_known = |shown: Arc<Shown>| shown.token >= changed.shown.0;
            let interest = &self.watches.interest;
            if interest.is_watched(changed.user) && !interest.shown(changed.user).is_some_and(is_known) {
                self.news.push(changed.user, Want { floor: changed.shown.0, is_urgent: true, ..Want::default() });
            }
        }
        for added in self.watches.take_added() {
            self.waiting.push(added.user, Want { floor: added.floor, is_added: true, ..Want::default() });
        }
        let trust = self.cache.trust();
        if has_lost || std::mem::replace(&mut self.trust, trust) != trust {
            self.begin_resync(if has_lost { "overflow" } else { "gap" });
        }
        if self.resync.is_none() && self.directory.complete_since(Instant::now()).is_none() && self.watches.interest.len() > 0 {
            self.begin_resync("deaf");
        }
        if !self.failed.is_empty() && self.failed_at.elapsed() >= RETRY_AFTER {
            std::mem::take(&mut self.failed).into_iter().for_each(|(user, want)| self.waiting.push(user, want));
        }
    }

    /// A life that has ended changes what is shown of its users, and no version says so.
    async fn look_at_lives(&mut self) {
        let table = self.watches.lives.table();
        if Arc::ptr_eq(&table, &self.table) {
            return;
        }
        let before = std::mem::replace(&mut self.table, table);
        let ended: Epochs =
            before.iter().filter(|life| life.is_alive() && self.is_over(life.epoch)).map(|life| life.epoch).collect();
        if ended.is_empty() || self.watches.interest.len() == 0 {
            return;
        }
        for shard in 0..SHARDS {
            let users = self.watches.interest.users_on(shard, &ended);
            self.bereft.extend(users);
            tokio::task::yield_now().await;
        }
    }

    /// Has as many of those looked at whose gateways have died as the pace allows.
    fn look_at_bereft(&mut self) {
        self.deaths.refill();
        while !self.bereft.is_empty() && self.deaths.take() {
            if let Some(user) = self.bereft.pop_front() {
                self.news.push(user, Want { is_urgent: true, ..Want::default() });
            }
        }
    }

    fn is_over(&self, epoch: Epoch) -> bool {
        self.table.get(epoch).is_none_or(|life| !life.is_alive())
    }

    /// One that is under way goes round once more, from where it is.
    fn begin_resync(&mut self, cause: &'static str) {
        self.watches.metrics.presence.watch_resync(cause);
        let pace = Pace::new(self.watches.settings.resync_rate.into());
        let begun = Resync { shard: 0, shards_left: 0, left: Vec::new(), pace };
        self.resync.get_or_insert(begun).shards_left = SHARDS + 1; // the part that it is in counts again, too
    }

    /// Has as many users looked at as the pace allows.
    fn go_on_with_resync(&mut self) {
        let Some(resync) = &mut self.resync else { return };
        resync.pace.refill();
        while self.waiting.order.len() + self.others.order.len() < READINGS * BATCH && resync.pace.take() {
            match resync.left.pop() {
                Some(user) => self.waiting.push(user, Want::default()),
                None if resync.shards_left == 0 => {
                    self.resync = None;
                    return;
                }
                None => {
                    resync.left = self.watches.interest.users_of(resync.shard);
                    (resync.shard, resync.shards_left) = ((resync.shard + 1) % SHARDS, resync.shards_left - 1);
                }
            }
        }
    }

    /// Tells at once what memory knows of those who wait; the others have to be read.
    async fn recall(&mut self) {
        let now = Instant::now();
        for _ in 0..READINGS * BATCH {
            let Some((user, want)) = self.news.pop().or_else(|| self.waiting.pop()) else { return };
            let is_readable = !want.past_caches && !self.reading.contains(&user);
            match self.directory.recall(user, None, now).filter(|_| is_readable) {
                Some(answer) => self.settle(user, want, &answer).await,
                None if want.is_urgent => self.changed.push(user, want),
                None => self.others.push(user, want),
            }
        }
        self.watches.wake.notify_one(); // there may be more
    }

    /// Begins as many readings as there may be.
    fn read(&mut self) {
        let mut again = Vec::new();
        while self.readings.len() < READINGS {
            let (mut batch, mut past_caches) = (Vec::new(), false);
            while batch.len() < BATCH
                && let Some((user, want)) = self.changed.pop().or_else(|| self.others.pop())
            {
                match self.reading.insert(user) {
                    true => batch.push((user, want)),
                    false => again.push((user, want)), // what is being read may have been read too early
                }
                past_caches |= want.past_caches;
            }
            if batch.is_empty() {
                break;
            }
            self.readings.push(self.reading(batch, past_caches));
        }
        again.into_iter().for_each(|(user, want)| self.changed.push(user, want));
    }

    fn reading(&self, mut batch: Vec<(UserId, Want)>, past_caches: bool) -> Reading {
        let (directory, metrics) = (self.directory.clone(), self.watches.metrics.clone());
        let bound = past_caches.then_some(Duration::ZERO);
        let reading = async move {
            let began = Instant::now();
            let users: Vec<UserId> = batch.iter().map(|(user, _)| *user).collect();
            let answers = directory.get_many(&users, bound).await;
            metrics.presence.watch_read_seconds.observe(began.elapsed().as_secs_f64());
            batch.iter_mut().for_each(|(_, want)| want.past_caches = past_caches);
            batch.into_iter().zip(answers).map(|((user, want), answer)| (user, want, answer)).collect()
        };
        reading.boxed()
    }

    async fn settle_all(&mut self, read: Vec<(UserId, Want, Result<Answer, Error>)>) {
        for (user, want, answer) in read {
            self.reading.remove(&user);
            match answer {
                Ok(answer) => self.settle(user, want, &answer).await,
                Err(_) => self.give_up(user, want),
            }
        }
    }

    /// Takes over what was read, unless more is known to be true.
    async fn settle(&mut self, user: UserId, want: Want, answer: &Answer) {
        if answer.routes_on_lives().any(|(route, _)| self.is_over(route.epoch)) {
            return self.wait(user, want); // its end was heard of while this was read
        }
        let before = self.watches.interest.shown(user);
        let shown = Shown::of(answer, before.as_deref(), Instant::now());
        let floor = want.floor.max(before.map_or(0, |before| before.token));
        if shown.token < floor && !want.past_caches {
            self.watches.metrics.presence.version_floor_reads.inc();
            return self.wait(user, Want { floor, past_caches: true, ..want });
        }
        let certain = want.past_caches.then_some(shown.token);
        let Some(settled) = self.watches.interest.settle(user, shown) else { return };
        if !settled.is_new && !want.is_added {
            self.watches.metrics.presence.watch_same.inc();
            return;
        }
        for slice in settled.watchers.chunks(SLICE) {
            let coalesced = slice.iter().filter(|watcher| !watcher.mark(user, certain)).count();
            self.watches.metrics.presence.watch_coalesced.inc_by(coalesced as u64);
            if slice.len() == SLICE {
                tokio::task::yield_now().await;
            }
        }
    }

    fn wait(&mut self, user: UserId, want: Want) {
        if want.is_urgent { self.news.push(user, want) } else { self.waiting.push(user, want) }
    }

    /// Those who wait for an answer hear that there is none now; the user is read again later.
    fn give_up(&mut self, user: UserId, want: Want) {
        self.watches.interest.watchers(user).iter().for_each(|watcher| watcher.give_up(user));
        if self.failed.is_empty() {
            self.failed_at = Instant::now();
        }
        self.failed.push((user, want));
    }
}
