//! The log of what users were shown as, and their time online by day.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::history::Cause;
use crate::domain::history::DayShare;
use crate::domain::history::LogLine;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::time::DAY_MS;
use crate::domain::time::Timestamp;
use crate::store::codec;
use crate::store::column::clock_millis;
use crate::store::column::corrupt;
use crate::store::column::duration_millis;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::or_update;
use crate::store::statement::repeated;
use crate::store::statement::unless_there;

/// Rows removed by one statement: others must not wait for long.
const PRUNED_AT_ONCE: u64 = 1_000;
/// Rows that one look for users with too many of them reads, in the index.
const COUNTED_AT_ONCE: i64 = 100_000;

/// A line of the log, with the address of the gateway that was bound last.
#[derive(Clone, Debug, PartialEq)]
pub struct LoggedLine {
    pub version: Version,
    pub at: Timestamp,
    pub shown: Status,
    pub hidden: bool,
    pub cause: Cause,
    pub devices: u32,
    /// Empty: offline.
    pub gateway: String,
}

/// Which part of a user's log.
#[derive(Clone, Copy)]
pub struct LogPage {
    pub user: UserId,
    /// Only lines before this version.
    pub before: Version,
    pub from: Timestamp,
    pub to: Timestamp,
    pub with_hidden: bool,
    pub limit: usize,
}

impl Connection {
    /// Writes lines down, each with the address of the gateway. The users have to be locked.
    pub async fn add_log(&mut self, lines: &[(UserId, LogLine, String)]) -> Result<(), SqlError> {
        const HEAD: &str =
            "INSERT INTO status_log (user_id, version, at_ms, shown, hidden, cause, devices, gateway_addr) VALUES ";
        let tail = unless_there(self.engine(), "user_id"); // as those that fill a chunk up
        for (chunk, fill) in chunks(lines) {
            let mut insert = statement(repeated(HEAD, "(?,?,?,?,?,?,?,?)", chunk.len() + fill, &tail));
            for (user, line, gateway) in filled(chunk, fill) {
                insert = insert.bind(user.get()).bind(signed(line.version.0)).bind(line.at.0);
                insert = insert.bind(codec::status_to_i32(line.shown)).bind(i32::from(line.hidden));
                insert = insert.bind(codec::cause_to_i32(line.cause)).bind(i64::from(line.devices)).bind(gateway.clone());
            }
            self.execute(insert).await?;
        }
        Ok(())
    }

    /// Adds time online to the days. The users have to be locked.
    pub async fn add_days(&mut self, shares: &[(UserId, DayShare)]) -> Result<(), SqlError> {
        const HEAD: &str = "INSERT INTO online_days (user_id, day, online_ms, hidden_ms, sessions, hidden_sessions) VALUES ";
        const SUMS: [&str; 4] = ["online_ms", "hidden_ms", "sessions", "hidden_sessions"];
        let tail = or_update(self.engine(), "user_id, day", &SUMS, |sum, more| format!("online_days.{sum} + {more}"));
        for (chunk, fill) in chunks(shares) {
            let nothing = chunk.last().map(|(user, share)| (*user, DayShare { day: share.day, ..DayShare::default() }));
            let rows = chunk.iter().copied().chain(std::iter::repeat_n(nothing, fill).flatten());
            let mut insert = statement(repeated(HEAD, "(?,?,?,?,?,?)", chunk.len() + fill, &tail));
            for (user, share) in rows {
                insert = insert.bind(user.get()).bind(share.day).bind(share.online_ms).bind(share.hidden_ms);
                insert = insert.bind(i64::from(share.sessions)).bind(i64::from(share.hidden_sessions));
            }
            self.execute(insert).await?;
        }
        Ok(())
    }

    /// Lines of a user's log, the newest first.
    pub async fn read_log(&mut self, page: &LogPage) -> Result<Vec<LoggedLine>, SqlError> {
        let hidden = if page.with_hidden { "" } else { " AND hidden = 0" };
        let sql = format!(
            "SELECT version, at_ms, shown, hidden, cause, devices, gateway_addr FROM status_log \
             WHERE user_id = ? AND version < ? AND at_ms >= ? AND at_ms < ?{hidden} ORDER BY version DESC LIMIT ?"
        );
        let limit = i64::try_from(page.limit).unwrap_or(i64::MAX);
        let select = statement(sql).bind(page.user.get()).bind(signed(page.before.0)).bind(page.from.0).bind(page.to.0);
        let rows = self.fetch(select.bind(limit)).await?;
        let line = |row: &AnyRow| {
            let unknown = |column| move || corrupt(column, "is a number that nobody has written");
            Ok(LoggedLine {
                version: Version(unsigned(row.try_get(0)?)),
                at: Timestamp(row.try_get(1)?),
                shown: codec::status_from_i32(row.try_get(2)?).ok_or_else(unknown("shown"))?,
                hidden: row.try_get::<i32, _>(3)? != 0,
                cause: codec::cause_from_i32(row.try_get(4)?).ok_or_else(unknown("cause"))?,
                devices: u32::try_from(row.try_get::<i32, _>(5)?).unwrap_or_default(),
                gateway: row.try_get(6)?,
            })
        };
        rows.iter().map(line).collect()
    }

    /// A user's days from one to another, as far as they were online.
    pub async fn read_days(&mut self, user: UserId, from: i32, to: i32) -> Result<BTreeMap<i32, DayShare>, SqlError> {
        const SQL: &str = "SELECT day, online_ms, hidden_ms, sessions, hidden_sessions FROM online_days \
            WHERE user_id = ? AND day >= ? AND day <= ?";
        let rows = self.fetch(statement(SQL).bind(user.get()).bind(from).bind(to)).await?;
        let share = |row: &AnyRow| {
            let day: i32 = row.try_get(0)?;
            let count = |column| Ok::<_, sqlx::Error>(u32::try_from(row.try_get::<i32, _>(column)?).unwrap_or_default());
            let (online_ms, hidden_ms) = (row.try_get(1)?, row.try_get(2)?);
            Ok((day, DayShare { day, online_ms, hidden_ms, sessions: count(3)?, hidden_sessions: count(4)? }))
        };
        rows.iter().map(share).collect()
    }

    /// Removes some of what is older than `keep`. True: there may be more.
    pub async fn prune_history(&mut self, keep: Duration) -> Result<bool, SqlError> {
        let too_old = format!("{} - {}", clock_millis(self.engine()), duration_millis(keep));
        let log = self.prune("status_log", &format!("at_ms < {too_old}")).await?;
        let days = self.prune("online_days", &format!("day < ({too_old}) / {DAY_MS} - 1")).await?;
        Ok(log.max(days) == PRUNED_AT_ONCE)
    }

    async fn prune(&mut self, table: &str, which: &str) -> Result<u64, SqlError> {
        let sql = match self.engine() {
            Engine::MySql => format!("DELETE FROM {table} WHERE {which} LIMIT {PRUNED_AT_ONCE}"),
            Engine::Sqlite => {
                let rows = format!("SELECT rowid FROM {table} WHERE {which} LIMIT {PRUNED_AT_ONCE}");
                format!("DELETE FROM {table} WHERE rowid IN ({rows})")
            }
        };
        self.execute(statement(sql)).await
    }

    /// Looks at the next part of the log, from user `from` on, and removes the oldest lines of users who have more than `keep`.
    /// Returns where to go on; None: from the beginning.
    pub async fn prune_long_logs(&mut self, from: i64, keep: i64) -> Result<Option<i64>, SqlError> {
        let page = COUNTED_AT_ONCE.max(2 * keep);
        let counted = format!(
            "SELECT user_id, COUNT(*) FROM (SELECT user_id FROM status_log WHERE user_id >= ? \
             ORDER BY user_id, version LIMIT {page}) AS page GROUP BY user_id ORDER BY user_id"
        );
        let rows = self.fetch(statement(counted).bind(from)).await?;
        let counts =
            rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<Vec<(i64, i64)>, sqlx::Error>>()?;
        for (user, _) in counts.iter().filter(|(_, lines)| *lines > keep) {
            self.shorten_log(*user, keep).await?;
        }
        let is_last = counts.iter().map(|(_, lines)| lines).sum::<i64>() < page;
        // The last one may have more than was counted, unless nobody else was: then their log was shortened just now.
        let next = counts.last().map(|(user, _)| if counts.len() == 1 { user.saturating_add(1) } else { *user });
        Ok(next.filter(|_| !is_last))
    }

    async fn shorten_log(&mut self, user: i64, keep: i64) -> Result<(), SqlError> {
        const OLDEST_KEPT: &str = "SELECT version FROM status_log WHERE user_id = ? ORDER BY version DESC LIMIT 1 OFFSET ?";
        let rows = self.fetch(statement(OLDEST_KEPT).bind(user).bind(keep - 1)).await?;
        let Some(row) = rows.first() else { return Ok(()) };
        let oldest: i64 = row.try_get(0)?;
        while self.prune("status_log", &format!("user_id = {user} AND version < {oldest}")).await? == PRUNED_AT_ONCE {}
        Ok(())
    }

    /// Up to `limit` users whose wish ends by `now`, the first to end first.
    pub async fn users_whose_status_ends(&mut self, now: Timestamp, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT user_id FROM users WHERE status_until_ms <= ? ORDER BY status_until_ms LIMIT ?";
        self.users_of(statement(SQL).bind(now.0).bind(limit)).await
    }

    /// How many rows there are about a user, besides the one that says that there is such a user.
    pub async fn count_rows_of(&mut self, user: UserId) -> Result<u64, SqlError> {
        let mut rows = 0;
        for table in ["routes", "inbox", "status_log", "online_days"] {
            let count = statement(format!("SELECT COUNT(*) FROM {table} WHERE user_id = ?")).bind(user.get());
            rows += self.fetch(count).await?.first().map_or(Ok(0), |row| row.try_get::<i64, _>(0))?;
        }
        Ok(unsigned(rows))
    }

    /// Erases stored messages and history of a user, who has to be locked. Returns how many rows there were.
    pub async fn erase(&mut self, user: UserId) -> Result<u64, SqlError> {
        let mut rows = 0;
        for table in ["inbox", "status_log", "online_days"] {
            rows += self.execute(statement(format!("DELETE FROM {table} WHERE user_id = ?")).bind(user.get())).await?;
        }
        Ok(rows)
    }
}
