//! Who is online, page by page: read from SQL past the caches, judged by this node's lives. A walk goes by user, so who stays is
//! met exactly once, whoever comes and goes meanwhile.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;

use futures_util::FutureExt;

use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::route::Platform;
use crate::domain::status::Status;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::store::connection::Connection;
use crate::store::database::Database;
use crate::store::readers::Readers;
use crate::store::readers::Reading;

/// Connections that read lists and counts.
pub const READERS: usize = 4;
/// Routes that one call looks at, when few of their users are wanted.
pub const MAX_LOOKED_AT: usize = 20_000;
/// Users that are read at a time, at least and at most.
const MIN_STEP: usize = 16;
const MAX_STEP: usize = 1_000;
/// Of each of several lives more are read than its share: a step ends where the first of them does.
const SPARE: usize = 4;

/// Who is wanted. What is given has to fit: gateway, region and platform one and the same device.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub gateway: Option<GatewayAddr>,
    pub region: Option<String>,
    pub platform: Option<Platform>,
    /// As others see it. INVISIBLE: who hides.
    pub status: Option<Status>,
}

/// A part of the walk.
#[derive(Debug, Default)]
pub struct Page {
    pub users: Vec<(UserId, Answer)>,
    /// The last user who was looked at. None: there are no more.
    pub last: Option<i64>,
}

/// Users in order, whether there are more, and how many routes were looked at.
struct Step {
    users: Vec<UserId>,
    is_last: bool,
    looked_at: usize,
}

pub struct Online {
    pub directory: Arc<Directory>,
    pub lives: Arc<Lives>,
    readers: Readers,
}

impl Filter {
    fn is_on(&self, life: &Life) -> bool {
        self.gateway.as_ref().is_none_or(|gateway| *gateway == life.gateway)
            && self.region.as_ref().is_none_or(|region| *region == life.profile.region)
    }

    fn fits(&self, answer: &Answer) -> bool {
        let platform = |of: Platform| self.platform.is_none_or(|platform| platform == of);
        let has_device = answer.live_routes().any(|live| platform(live.route.platform) && self.is_on(live.life));
        has_device
            && match self.status {
                None => true,
                Some(Status::Invisible) => answer.is_hidden(),
                Some(status) => answer.status() == status,
            }
    }

    /// The lives to walk. None: all routes there are.
    fn names_lives(&self) -> bool {
        self.gateway.is_some() || self.region.is_some()
    }
}

impl Online {
    pub fn new(database: Arc<Database>, directory: Arc<Directory>, lives: Arc<Lives>) -> Self {
        Self { directory, lives, readers: Readers::new(database, READERS) }
    }

    /// Up to `limit` users after `after` who fit. There may be fewer, or none, and more to come.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn list(&self, filter: &Filter, after: i64, limit: usize) -> Result<Page, Error> {
        let walked = if filter.names_lives() { Some(self.living(filter).await?) } else { None };
        let (mut page, mut after, mut looked_at) = (Page::default(), after, 0);
        let is_picky = filter.platform.is_some() || filter.status.is_some();
        loop {
            let missing = limit - page.users.len();
            let wanted = if is_picky { MAX_STEP } else { missing.clamp(MIN_STEP, MAX_STEP) };
            let step = match &walked {
                Some(epochs) => self.step_on(epochs, after, wanted).await?,
                None => self.step(after, wanted).await?,
            };
            looked_at += step.looked_at;
            for (user, answer) in self.answers(step.users).await? {
                after = user.get();
                if filter.fits(&answer) {
                    page.users.push((user, answer));
                }
                if page.users.len() == limit {
                    return Ok(Page { last: Some(after), ..page });
                }
            }
            if step.is_last || looked_at >= MAX_LOOKED_AT {
                return Ok(Page { last: (!step.is_last).then_some(after), ..page });
            }
        }
    }

    /// The lives that fit, as SQL has them.
    async fn living(&self, filter: &Filter) -> Result<Vec<Epoch>, Error> {
        let gateway = filter.gateway.clone();
        let lives = self
            .read(move |connection| {
                let gateway = gateway.clone();
                async move { connection.living(gateway.as_ref()).await }.boxed()
            })
            .await?;
        self.lives.learn(&lives);
        Ok(lives.iter().filter(|life| filter.is_on(life)).map(|life| life.epoch).collect())
    }

    async fn step(&self, after: i64, wanted: usize) -> Result<Step, Error> {
        let limit = i64::try_from(wanted).unwrap_or(i64::MAX);
        let users = self.read(move |connection| connection.users_with_routes(after, limit).boxed()).await?;
        Ok(Step { is_last: users.len() < wanted, looked_at: users.len(), users })
    }

    /// The same on some lives. Of each a part is read; what is beyond the end of the shortest part comes with the next step. If
    /// each life has users of its own that is nearly all, so what counts is what was read, not how many users came of it.
    async fn step_on(&self, epochs: &[Epoch], after: i64, wanted: usize) -> Result<Step, Error> {
        let lives = epochs.len().max(1);
        let each = (2 * wanted / lives + SPARE).min(wanted).min((MAX_LOOKED_AT / lives).max(1));
        let limit = i64::try_from(each).unwrap_or(i64::MAX);
        let walked: Arc<[Epoch]> = epochs.into();
        let found = self
            .read(move |connection| {
                let walked = walked.clone();
                async move { connection.users_of_lives(&walked, after, limit).await }.boxed()
            })
            .await?;
        let mut parts: HashMap<Epoch, (usize, UserId)> = HashMap::new();
        for (epoch, user) in &found {
            let (length, last) = parts.entry(*epoch).or_insert((0, *user));
            (*length, *last) = (*length + 1, *user.max(last));
        }
        let end = parts.values().filter(|(length, _)| *length == each).map(|(_, last)| *last).min();
        let looked_at = found.len();
        let users: BTreeSet<UserId> = found.into_iter().map(|(_, user)| user).collect();
        let mut users: Vec<UserId> = users.into_iter().filter(|user| end.is_none_or(|end| *user <= end)).collect();
        let is_last = end.is_none() && users.len() <= wanted;
        users.truncate(wanted);
        Ok(Step { users, is_last, looked_at })
    }

    /// Where these users are, in their order.
    pub async fn answers(&self, users: Vec<UserId>) -> Result<Vec<(UserId, Answer)>, Error> {
        let asked: Arc<[UserId]> = users.into();
        let (records, lives) = self
            .read(move |connection| {
                let asked = asked.clone();
                async move { connection.load_users_with_lives(&asked).await }.boxed()
            })
            .await?;
        self.lives.learn(&lives);
        let mut answers = self.directory.judge(records);
        answers.sort_unstable_by_key(|(user, _)| *user);
        Ok(answers)
    }

    /// Reads on one of the connections for lists.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn read<T>(&self, read: impl Fn(&mut Connection) -> Reading<'_, T>) -> Result<T, Error> {
        self.readers.read(read).await.map_err(|_| Error::unavailable("the database cannot be read now"))
    }
}
