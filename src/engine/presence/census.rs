//! How many users are online. By gateway SQL counts when somebody asks; by anything else one node counts once a minute for
//! everybody, some users at a time, and writes it down.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio::try_join;
use tokio_util::task::AbortOnDropHandle;

use crate::domain::id::Epoch;
use crate::domain::route::Platform;
use crate::domain::status::Activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::engine::presence::online::Online;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::metrics::Metrics;
pub use crate::store::census::Counts;
pub use crate::store::census::Kind;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;
use crate::store::online::Alike;
use crate::store::online::RouteSketch;

/// How old a count may be before it is made again.
const CENSUS_EVERY: Duration = Duration::from_secs(60);
/// How often a node looks whether it is.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long a node that stops keeps the others from counting.
const TERM: Duration = Duration::from_secs(30);
/// Routes that one statement counts.
const PAGE: i64 = 20_000;
/// How long a count by gateway is good for further callers, once it is done.
const KEPT: Duration = Duration::from_secs(5);

/// If the census has found more users than these, `users` beside a count by gateway is what it has found.
const COUNTED_NOW: u64 = 200_000;

/// Counts once a minute, unless another node has.
pub struct Census {
    slot: ConnectionSlot,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    /// This process, as its claims name it.
    claimant: String,
}

impl Census {
    pub fn new(database: Arc<Database>, lives: Arc<Lives>, metrics: Arc<Metrics>, claimant: &str) -> Self {
        Self { slot: ConnectionSlot::new(database), lives, metrics, claimant: claimant.to_owned() }
    }

    /// Counts, if it is time and this node's turn.
    pub async fn step(&mut self) -> Result<(), SqlError> {
        let mut connection = self.slot.take().await?;
        // Looked at again with the claim: somebody may have finished in between.
        let is_ours =
            is_due(&mut connection).await? && claim(&mut connection, &self.claimant).await? && is_due(&mut connection).await?;
        if is_ours && count(&mut connection, &self.lives, &self.claimant).await? {
            self.metrics.presence.censuses.inc();
        }
        self.slot.give_back(connection);
        Ok(())
    }
}

async fn claim(connection: &mut Connection, claimant: &str) -> Result<bool, SqlError> {
    connection.claim_job("census", claimant, TERM).await
}

/// Half of the time is left to others. False: it stood still for so long that another node counts.
async fn count(connection: &mut Connection, lives: &Lives, claimant: &str) -> Result<bool, SqlError> {
    let (began, mut after) = (Instant::now(), 0);
    let mut counts = Counts::from([((Kind::All, String::new()), 0)]);
    lives.learn(&connection.living(None).await?);
    loop {
        let page_began = Instant::now();
        let Some(last) = connection.last_of_page(after, PAGE).await? else { break };
        let users = connection.alike(after, last, lives.clock.over_by()).await?;
        add(&mut counts, &users, lives);
        if !claim(connection, claimant).await? {
            return Ok(false);
        }
        after = last;
        sleep(page_began.elapsed()).await;
    }
    connection.write_census(&counts, began.elapsed()).await?;
    Ok(true)
}

fn add(counts: &mut Counts, users: &[Alike], lives: &Lives) {
    let table = lives.glance();
    let is_live = |route: &&RouteSketch| table.get(route.epoch).is_some_and(|life| life.is_alive());
    for Alike { users, routes, wanted } in users {
        let mut some = |kind: Kind, name: &str| match counts.get_mut(&(kind, name.to_owned())) {
            Some(counted) => *counted += users,
            None => _ = counts.insert((kind, name.to_owned()), *users),
        };
        let live = || routes.iter().filter(is_live);
        if live().next().is_none() {
            continue;
        }
        some(Kind::All, "");
        some(Kind::Status, shown_word(wanted.shown(Activity::of(live().map(|route| route.idle)))));
        let region = |route: &RouteSketch| table.get(route.epoch).map_or("", |life| life.profile.region.as_str());
        live().map(region).collect::<BTreeSet<_>>().into_iter().for_each(|region| some(Kind::Region, region));
        let platforms: BTreeSet<_> = live().map(|route| platform_word(route.platform)).collect();
        platforms.into_iter().for_each(|platform| some(Kind::Platform, platform));
    }
}

/// Only who hides is online and shown as `OFFLINE`.
fn shown_word(shown: Status) -> &'static str {
    match shown {
        Status::Online => "online",
        Status::Away => "away",
        Status::Busy => "busy",
        Status::Invisible | Status::Offline => "invisible",
    }
}

fn platform_word(platform: Platform) -> &'static str {
    match platform {
        Platform::Unspecified => "unspecified",
        Platform::Ios => "ios",
        Platform::Android => "android",
        Platform::Windows => "windows",
        Platform::Macos => "macos",
        Platform::Linux => "linux",
        Platform::Web => "web",
        Platform::Tablet => "tablet",
        Platform::Other => "other",
    }
}

async fn is_due(connection: &mut Connection) -> Result<bool, SqlError> {
    Ok(connection.census_age().await?.is_none_or(|age| age >= CENSUS_EVERY))
}

/// Counts, for whoever asks.
pub struct Tallies {
    online: Arc<Online>,
    by_gateway: Mutex<Option<Count>>,
}

/// A count by gateway that is under way, or done. It goes on without those who wait for it: whoever asks again, because it took
/// longer than he waits, finds it done.
struct Count {
    began: Instant,
    done: watch::Receiver<Option<Counted>>,
    _task: AbortOnDropHandle<()>,
}

/// When it was done, and what came of it.
type Counted = (Instant, Result<Arc<Tally>, Error>);

impl Count {
    fn begin(online: Arc<Online>) -> Self {
        let (doing, done) = watch::channel(None);
        let task = tokio::spawn(async move {
            let tally = count_gateways(&online).await.map(Arc::new);
            doing.send_replace(Some((Instant::now(), tally)));
        });
        Self { began: Instant::now(), done, _task: AbortOnDropHandle::new(task) }
    }

    fn is_good(&self) -> bool {
        match &*self.done.borrow() {
            Some((at, tally)) => tally.is_ok() && at.elapsed() < KEPT,
            None => self.done.has_changed().is_ok(), // not broken off
        }
    }
}

/// Users by name, and everybody once.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub counts: BTreeMap<String, u64>,
    pub users: u64,
}

impl Tallies {
    pub fn new(online: Arc<Online>) -> Self {
        Self { online, by_gateway: Mutex::default() }
    }

    /// What the last census says, and how old it is. None: nobody has counted yet.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn by(&self, kind: Kind) -> Result<Option<(Tally, Duration)>, Error> {
        let Some((counts, at)) = self.online.read(|connection| connection.read_census().boxed()).await? else { return Ok(None) };
        let users = counts.get(&(Kind::All, String::new())).copied().unwrap_or(0);
        let of_kind = counts.into_iter().filter(|((of, _), _)| *of == kind && kind != Kind::All);
        let tally = Tally { counts: of_kind.map(|((_, name), users)| (name, users)).collect(), users };
        let now: Timestamp = self.online.lives.clock.now();
        Ok(Some((tally, now.since(at))))
    }

    /// Users of each gateway that lives, counted now or a moment ago, and how long ago that is. Callers at the same time share
    /// a count. A route whose time to live is over counts until it is swept.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn by_gateway(&self) -> Result<(Arc<Tally>, Duration), Error> {
        let (began, mut done) = {
            let mut last = self.by_gateway.lock().unwrap_or_else(PoisonError::into_inner);
            let good = last.take().filter(Count::is_good);
            let count = last.insert(good.unwrap_or_else(|| Count::begin(self.online.clone())));
            (count.began, count.done.clone())
        };
        let counted = done.wait_for(Option::is_some).await.ok().and_then(|done| done.clone());
        let (_, tally) = counted.ok_or_else(|| Error::internal("a count by gateway has broken off"))?;
        Ok((tally?, began.elapsed()))
    }
}

/// The lives on two connections. Everybody once takes longer: it is counted on one more if they are few, else the census has.
async fn count_gateways(online: &Online) -> Result<Tally, Error> {
    let living = online.read(|connection| connection.living(None).boxed()).await?;
    online.lives.learn(&living);
    let epochs: Vec<Epoch> = living.iter().map(|life| life.epoch).collect();
    let (one, other) = epochs.split_at(epochs.len() / 2);
    let (one, other, users) = try_join!(count_users_of(online, one), count_users_of(online, other), count_users(online))?;
    let mut tally = Tally { users, ..Tally::default() };
    for life in &living {
        let users = one.get(&life.epoch).or(other.get(&life.epoch)).copied().unwrap_or(0);
        *tally.counts.entry(life.gateway.to_string()).or_default() += users;
    }
    Ok(tally)
}

async fn count_users_of(online: &Online, epochs: &[Epoch]) -> Result<HashMap<Epoch, u64>, Error> {
    let epochs: Arc<[Epoch]> = epochs.into();
    let count = online.read(move |connection| {
        let epochs = epochs.clone();
        async move { connection.count_users_of(&epochs).await }.boxed()
    });
    count.await
}

async fn count_users(online: &Online) -> Result<u64, Error> {
    let counts = online.read(|connection| connection.read_census().boxed()).await?;
    let users = counts.and_then(|(counts, _)| counts.get(&(Kind::All, String::new())).copied());
    if let Some(users) = users.filter(|users| *users > COUNTED_NOW) {
        return Ok(users);
    }
    let count = online.read(|connection| {
        async move {
            let over = connection.named_in_vain().await?;
            connection.count_users_online(&over).await
        }
        .boxed()
    });
    Ok(u64::try_from(count.await?).unwrap_or(0))
}
