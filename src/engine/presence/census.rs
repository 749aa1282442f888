//! How many users are online. By gateway SQL counts when somebody asks; by anything else one node counts once a minute for
//! everybody, some users at a time, and writes it down.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::domain::id::Epoch;
use crate::domain::time::Timestamp;
use crate::engine::presence::online::Online;
use crate::error::Error;
use crate::metrics::Metrics;
pub use crate::store::census::Counts;
pub use crate::store::census::Kind;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;

/// How old a count may be before it is made again.
const CENSUS_EVERY: Duration = Duration::from_secs(60);
/// How often a node looks whether it is.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long a node that stops keeps the others from counting.
const TERM: Duration = Duration::from_secs(30);
/// Routes that one statement counts.
const PAGE: i64 = 20_000;
/// How long a count by gateway is good for further callers.
const KEPT: Duration = Duration::from_secs(5);

/// Counts once a minute, unless another node has.
pub struct Census {
    slot: ConnectionSlot,
    metrics: Arc<Metrics>,
    /// This process, as its claims name it.
    claimant: String,
}

impl Census {
    pub fn new(database: Arc<Database>, metrics: Arc<Metrics>, claimant: &str) -> Self {
        Self { slot: ConnectionSlot::new(database), metrics, claimant: claimant.to_owned() }
    }

    /// Counts, if it is time and this node's turn.
    pub async fn step(&mut self) -> Result<(), SqlError> {
        let mut connection = self.slot.take().await?;
        // Looked at again with the claim: somebody may have finished in between.
        if is_due(&mut connection).await? && claim(&mut connection, &self.claimant).await? && is_due(&mut connection).await? {
            if count(&mut connection, &self.claimant).await? {
                self.metrics.presence.censuses.inc();
            }
        }
        self.slot.give_back(connection);
        Ok(())
    }
}

async fn claim(connection: &mut Connection, claimant: &str) -> Result<bool, SqlError> {
    connection.claim_job("census", claimant, TERM).await
}

/// Half of the time is left to others. False: it stood still for so long that another node counts.
async fn count(connection: &mut Connection, claimant: &str) -> Result<bool, SqlError> {
    let (began, mut after) = (Instant::now(), 0);
    let mut counts = Counts::from([((Kind::All, String::new()), 0)]);
    loop {
        let page_began = Instant::now();
        let Some(last) = connection.last_of_page(after, PAGE).await? else { break };
        connection.count_page(after, last, &mut counts).await?;
        if !claim(connection, claimant).await? {
            return Ok(false);
        }
        after = last;
        sleep(page_began.elapsed()).await;
    }
    connection.write_census(&counts, began.elapsed()).await?;
    Ok(true)
}

async fn is_due(connection: &mut Connection) -> Result<bool, SqlError> {
    Ok(connection.census_age().await?.is_none_or(|age| age >= CENSUS_EVERY))
}

/// Counts, for whoever asks.
pub struct Tallies {
    online: Arc<Online>,
    /// Also has callers wait for the one who counts.
    by_gateway: Mutex<Option<(Instant, Arc<Tally>)>>,
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
        let mut kept = self.by_gateway.lock().await;
        if let Some((at, tally)) = kept.as_ref().filter(|(at, _)| at.elapsed() < KEPT) {
            return Ok((tally.clone(), at.elapsed()));
        }
        let began = Instant::now();
        let tally = Arc::new(self.count_gateways().await?);
        *kept = Some((began, tally.clone()));
        Ok((tally, began.elapsed()))
    }

    async fn count_gateways(&self) -> Result<Tally, Error> {
        let living = self.online.read(|connection| connection.living(None).boxed()).await?;
        self.online.lives.learn(&living);
        let table = self.online.lives.table();
        let epochs: Arc<[Epoch]> = living.iter().map(|life| life.epoch).collect();
        let over: Arc<[Epoch]> = table.iter().filter(|life| !life.is_alive()).map(|life| life.epoch).collect();
        let counted = self
            .online
            .read(move |connection| {
                let epochs = epochs.clone();
                async move { connection.count_users_of(&epochs).await }.boxed()
            })
            .await?;
        let mut tally = Tally::default();
        for life in &living {
            let users = counted.get(&life.epoch).copied().unwrap_or(0);
            *tally.counts.entry(life.gateway.to_string()).or_default() += users;
        }
        let mut after = 0;
        while let Some(last) = self.online.read(move |connection| connection.last_of_page(after, 5 * PAGE).boxed()).await? {
            let over = over.clone();
            tally.users += self
                .online
                .read(move |connection| {
                    let over = over.clone();
                    async move { connection.count_users_between(after, last, &over).await }.boxed()
                })
                .await?;
            after = last;
        }
        Ok(tally)
    }
}
