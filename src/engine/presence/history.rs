//! What users were shown as, and how long they were online: read from SQL.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use crate::domain::history::Cause;
use crate::domain::history::DayShare;
use crate::domain::history::SCORE_DAYS;
use crate::domain::history::activity_score;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::store::connection::Connection;
use crate::store::database::Database;
pub use crate::store::history::LogPage;
pub use crate::store::history::LoggedLine;
use crate::store::readers::Readers;
use crate::store::readers::Reading;

/// Connections that read history.
pub const READERS: usize = 2;

/// How long a user was online.
#[derive(Debug, Default)]
pub struct OnlineTime {
    /// Days on which they were.
    pub days: Vec<DayShare>,
    /// 0 to 100.
    pub score: u32,
    pub online_now: bool,
}

pub struct History {
    directory: Arc<Directory>,
    lives: Arc<Lives>,
    readers: Readers,
}

impl History {
    pub fn new(database: Arc<Database>, directory: Arc<Directory>, lives: Arc<Lives>) -> Self {
        Self { directory, lives, readers: Readers::new(database, READERS) }
    }

    /// A page of a user's log, the newest line first. True: there are more.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn log(&self, page: LogPage) -> Result<(Vec<LoggedLine>, bool), Error> {
        let page = LogPage { limit: page.limit + 1, ..page };
        let mut lines = match page.before.0 >= Version::MAX.0 {
            true => self.newest(page).await?,
            false => self.read(move |connection| async move { connection.read_log(&page).await }.boxed()).await?,
        };
        let has_more = lines.len() >= page.limit;
        lines.truncate(page.limit - 1);
        Ok((lines, has_more))
    }

    /// The first page, with an end that is not in the log yet.
    async fn newest(&self, page: LogPage) -> Result<Vec<LoggedLine>, Error> {
        let newest = LogPage { from: Timestamp(0), limit: 1, ..page };
        let (answer, (newest, mut lines)) = self
            .read_beside(page.user, move |connection| {
                async move { Ok((connection.read_log(&newest).await?, connection.read_log(&page).await?)) }.boxed()
            })
            .await?;
        let died = death(&answer, newest.first(), page.with_hidden);
        lines.splice(0..0, died.filter(|line| (page.from..page.to).contains(&line.at)));
        Ok(lines)
    }

    /// The days from one to another, and what the last weeks tell of the user. Without `with_hidden` as others could see it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn online_time(&self, user: UserId, (from, to): (i32, i32), with_hidden: bool) -> Result<OnlineTime, Error> {
        let today = self.today();
        let first = from.min(today - SCORE_DAYS + 1);
        let last = to.max(today);
        let (answer, mut days) =
            self.read_beside(user, move |connection| connection.read_days(user, first, last).boxed()).await?;
        let session = answer.session();
        if session.since.0 > 0 && session.since >= self.lives.clock.set_at() {
            add_running(&mut days, &answer, self.lives.clock.now());
        }
        if !with_hidden {
            days.values_mut().for_each(|day| *day = DayShare { hidden_ms: 0, hidden_sessions: 0, ..*day });
        }
        let online = |day: &DayShare| day.online_ms + day.hidden_ms;
        let of_score = days.range(today - SCORE_DAYS + 1..=today).map(|(_, day)| online(day));
        let score = activity_score(of_score);
        let is_seen = answer.status() != Status::Offline;
        let online_now = is_seen || with_hidden && answer.live_routes().next().is_some();
        let asked =
            days.into_iter().filter(|(day, share)| (from..=to).contains(day) && (online(share) > 0 || share.sessions > 0));
        Ok(OnlineTime { days: asked.map(|(_, share)| share).collect(), score, online_now })
    }

    /// Reads of a user, and the record that it goes with: a session may end, and be written down, meanwhile.
    async fn read_beside<T>(&self, user: UserId, read: impl Fn(&mut Connection) -> Reading<'_, T>) -> Result<(Answer, T), Error> {
        const TRIES: usize = 3;
        let mut answer = self.directory.get(user, Some(Duration::ZERO)).await?;
        let mut tries = 1;
        loop {
            let found = self.read(&read).await?;
            let again = self.directory.get(user, Some(Duration::ZERO)).await?;
            if again.version() == answer.version() || tries == TRIES {
                return Ok((again, found));
            }
            (answer, tries) = (again, tries + 1);
        }
    }

    /// By the database's clock, in UTC.
    pub fn today(&self) -> i32 {
        self.lives.clock.now().day()
    }

    /// How many rows there are about a user.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn count_rows(&self, user: UserId) -> Result<u64, Error> {
        self.read(move |connection| connection.count_rows_of(user).boxed()).await
    }

    async fn read<T>(&self, read: impl Fn(&mut Connection) -> Reading<'_, T>) -> Result<T, Error> {
        self.readers.read(read).await.map_err(|_| Error::unavailable("the history cannot be read now"))
    }
}

/// The end of a user's gateway that nobody has written down yet.
fn death(answer: &Answer, newest: Option<&LoggedLine>, with_hidden: bool) -> Option<LoggedLine> {
    let newest = newest.filter(|line| line.shown != Status::Offline && line.version <= answer.version())?;
    let is_over = answer.live_routes().next().is_none() && answer.has_routes();
    let hidden = answer.is_hidden();
    (is_over && (with_hidden || !hidden)).then(|| LoggedLine {
        version: Version(newest.version.0.max(answer.version().0) + 1),
        at: answer.ended_at().max(newest.at),
        shown: Status::Offline,
        hidden,
        cause: Cause::Expired,
        devices: 0,
        gateway: String::new(),
    })
}

/// The session that runs counts until now, or until its gateway was last heard.
fn add_running(days: &mut BTreeMap<i32, DayShare>, answer: &Answer, now: Timestamp) {
    let session = answer.session();
    let until = if answer.live_routes().next().is_some() { now } else { answer.ended_at() };
    for share in session.shares(answer.is_hidden(), true, until) {
        let day = days.entry(share.day).or_insert(DayShare { day: share.day, ..DayShare::default() });
        day.online_ms += share.online_ms;
        day.hidden_ms += share.hidden_ms;
        day.sessions += share.sessions;
        day.hidden_sessions += share.hidden_sessions;
    }
}
