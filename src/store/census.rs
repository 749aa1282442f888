//! The last census: how many users were online, by what they are counted by.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;

use crate::domain::time::Timestamp;
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

impl Connection {
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
