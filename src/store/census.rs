//! The census: how many users are online, by what they are counted by. Whole pages of users are counted, so sums of pages are
//! right; and the database adds up, so that no user leaves it.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::route::Platform;
use crate::domain::status::Activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::store::codec;
use crate::store::column::clock_millis;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::or_update;
use crate::store::statement::repeated;

/// What users are counted by. As a row says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Everybody, once.
    All,
    Platform,
    Region,
    /// As they are shown; those who hide are `invisible`.
    Status,
}

/// How many users each name of a kind has.
pub type Counts = BTreeMap<(Kind, String), u64>;

impl Kind {
    const ALL: [(Kind, &'static str); 4] =
        [(Kind::All, "all"), (Kind::Platform, "platform"), (Kind::Region, "region"), (Kind::Status, "status")];

    fn word(self) -> &'static str {
        Self::ALL.into_iter().find(|(kind, _)| *kind == self).map_or("", |(_, word)| word)
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known)| *known == word).map(|(kind, _)| kind)
    }
}

/// The routes on living lives of a page of users: each looked up by its key.
const LIVE: &str = "FROM routes r /*! FORCE INDEX (PRIMARY) */ CROSS JOIN lives l /*! FORCE INDEX (PRIMARY) */ \
    ON l.epoch = r.epoch AND l.alive = 1";
const PAGE: &str = "WHERE r.user_id > ? AND r.user_id <= ?";

impl Connection {
    /// Adds the users after `after` up to `last` to `counts`.
    pub async fn count_page(&mut self, after: i64, last: i64, counts: &mut Counts) -> Result<(), SqlError> {
        let by_platform =
            format!("SELECT /*! STRAIGHT_JOIN */ r.platform, COUNT(DISTINCT r.user_id) {LIVE} {PAGE} GROUP BY r.platform");
        for row in self.fetch(statement(by_platform).bind(after).bind(last)).await? {
            let platform = codec::platform_from_i32(row.try_get(0)?).unwrap_or_default();
            add(counts, Kind::Platform, platform_word(platform), row.try_get(1)?);
        }
        // Regions are told apart to the letter, which the column's collation does not.
        let by_region = format!(
            "SELECT /*! STRAIGHT_JOIN */ MIN(l.region), COUNT(DISTINCT r.user_id) {LIVE} {PAGE} GROUP BY /*! BINARY */ l.region"
        );
        for row in self.fetch(statement(by_region).bind(after).bind(last)).await? {
            add(counts, Kind::Region, row.try_get(0)?, row.try_get(1)?);
        }
        let by_status = format!(
            "SELECT status, idle, COUNT(*) FROM (SELECT /*! STRAIGHT_JOIN */ r.user_id, MIN(u.status) AS status, MIN(r.idle) AS idle \
             {LIVE} CROSS JOIN users u /*! FORCE INDEX (PRIMARY) */ ON u.user_id = r.user_id {PAGE} GROUP BY r.user_id) AS page \
             GROUP BY status, idle"
        );
        for row in self.fetch(statement(by_status).bind(after).bind(last)).await? {
            let users = row.try_get(2)?;
            add(counts, Kind::Status, shown_word(&row)?, users);
            add(counts, Kind::All, "", users);
        }
        Ok(())
    }

    /// How long ago the last census began. None: there was none, or one that has yet to come by this clock.
    pub async fn census_age(&mut self) -> Result<Option<Duration>, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!("SELECT {now} - at_ms FROM census WHERE kind = 'all' AND name = ''");
        let rows = self.fetch(statement(sql)).await?;
        let age: Option<i64> = rows.first().map(|row| row.try_get(0)).transpose()?;
        Ok(age.and_then(|age| u64::try_from(age).ok()).map(Duration::from_millis))
    }

    /// Puts a census that began `ago` in the place of the former one.
    pub async fn write_census(&mut self, counts: &Counts, ago: Duration) -> Result<(), SqlError> {
        let at = format!("{} - {}", clock_millis(self.engine()), ago.as_millis());
        let tail = or_update(self.engine(), "kind, name", &["users", "at_ms"], |_, new| new);
        self.begin().await?;
        self.execute(statement("DELETE FROM census")).await?;
        let rows: Vec<_> = counts.iter().collect();
        for (chunk, fill) in chunks(&rows) {
            let head = "INSERT INTO census (kind, name, users, at_ms) VALUES ";
            let mut insert = statement(repeated(head, &format!("(?,?,?,{at})"), chunk.len() + fill, &tail));
            for ((kind, name), users) in filled(chunk, fill) {
                insert = insert.bind(kind.word()).bind(name.clone()).bind(i64::try_from(**users).unwrap_or(i64::MAX));
            }
            self.execute(insert).await?;
        }
        self.commit().await
    }

    /// The last census, and when it began.
    pub async fn read_census(&mut self) -> Result<Option<(Counts, Timestamp)>, SqlError> {
        let (mut counts, mut at) = (Counts::new(), None);
        for row in self.fetch(statement("SELECT kind, name, users, at_ms FROM census")).await? {
            let Some(kind) = Kind::parse(row.try_get(0)?) else { continue };
            counts.insert((kind, row.try_get(1)?), unsigned(row.try_get(2)?));
            at = Some(Timestamp(row.try_get(3)?));
        }
        Ok(at.map(|at| (counts, at)))
    }
}

fn add(counts: &mut Counts, kind: Kind, name: &str, users: i64) {
    *counts.entry((kind, name.to_owned())).or_default() += unsigned(users);
}

fn shown_word(row: &AnyRow) -> Result<&'static str, SqlError> {
    let wanted = codec::status_from_i32(row.try_get(0)?).unwrap_or_default();
    let idle = row.try_get::<i32, _>(1)? != 0;
    Ok(match wanted.shown(if idle { Activity::AllIdle } else { Activity::Active }) {
        Status::Offline => "invisible",
        shown => codec::status_word(shown),
    })
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
