//! Who has a route: read by index and cursor, so that a page at the end costs as much as the first.

use std::collections::HashMap;

use sqlx::Row;

use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::store::column::bind_epochs;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::column::user_id;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;

/// Lives that one statement walks, or counts: none may take long.
const WALKED_AT_ONCE: usize = 64;
const COUNTED_AT_ONCE: usize = 16;

impl Connection {
    /// Up to `each` users after `after` with a route on each of these lives, by number.
    pub async fn users_of_lives(&mut self, epochs: &[Epoch], after: i64, each: i64) -> Result<Vec<(Epoch, UserId)>, SqlError> {
        const ONE: &str = "SELECT epoch, user_id FROM (SELECT DISTINCT epoch, user_id FROM routes /*! FORCE INDEX (routes_by_life) */ \
            WHERE epoch = ? AND user_id > ? ORDER BY user_id LIMIT ?) AS walked";
        let mut users = Vec::new();
        for (chunk, fill) in epochs.chunks(WALKED_AT_ONCE).flat_map(chunks) {
            let rest = format!(" UNION {ONE}").repeat(chunk.len() + fill - 1);
            let mut select = statement(format!("{ONE}{rest}"));
            for epoch in filled(chunk, fill) {
                select = select.bind(signed(epoch.0)).bind(after).bind(each);
            }
            for row in self.fetch(select).await? {
                users.push((Epoch(unsigned(row.try_get(0)?)), user_id(row.try_get(1)?)?));
            }
        }
        Ok(users)
    }

    /// Up to `limit` users after `after` with a route, by number, and how many each has.
    pub async fn routes_by_user(&mut self, after: i64, limit: i64) -> Result<Vec<(UserId, i64)>, SqlError> {
        const SQL: &str = "SELECT user_id, COUNT(*) FROM routes /*! FORCE INDEX (PRIMARY) */ \
            WHERE user_id > ? GROUP BY user_id ORDER BY user_id LIMIT ?";
        let rows = self.fetch(statement(SQL).bind(after).bind(limit)).await?;
        rows.iter().map(|row| Ok((user_id(row.try_get(0)?)?, row.try_get(1)?))).collect()
    }

    /// How many users there are on each of these lives that has one.
    pub async fn count_users_of(&mut self, epochs: &[Epoch]) -> Result<HashMap<Epoch, u64>, SqlError> {
        let head = "SELECT epoch, COUNT(DISTINCT user_id) FROM routes /*! FORCE INDEX (routes_by_life) */ WHERE epoch IN (";
        let mut counts = HashMap::with_capacity(epochs.len());
        for (chunk, fill) in epochs.chunks(COUNTED_AT_ONCE).flat_map(chunks) {
            let select = statement(repeated(head, "?", chunk.len() + fill, ") GROUP BY epoch"));
            for row in self.fetch(bind_epochs(select, chunk, fill)).await? {
                counts.insert(Epoch(unsigned(row.try_get(0)?)), unsigned(row.try_get(1)?));
            }
        }
        Ok(counts)
    }

    /// The last user of the next `limit` routes after `after`, by user. None: there are no more.
    pub async fn last_of_page(&mut self, after: i64, limit: i64) -> Result<Option<i64>, SqlError> {
        const SQL: &str = "SELECT MAX(user_id) FROM (SELECT user_id FROM routes /*! FORCE INDEX (PRIMARY) */ \
            WHERE user_id > ? ORDER BY user_id LIMIT ?) AS page";
        let rows = self.fetch(statement(SQL).bind(after).bind(limit)).await?;
        Ok(rows.first().map_or(Ok(None), |row| row.try_get(0))?)
    }

    /// How many of the users after `after` up to `last` have a route that is on none of the lives `over`.
    pub async fn count_users_between(&mut self, after: i64, last: i64, over: &[Epoch]) -> Result<u64, SqlError> {
        const ALL: &str = "SELECT COUNT(DISTINCT user_id) FROM routes /*! FORCE INDEX (PRIMARY) */ \
            WHERE user_id > ? AND user_id <= ?";
        let mut sql = ALL.to_owned();
        if !over.is_empty() {
            sql.push_str(&repeated(" AND epoch NOT IN (", "?", over.len(), ")"));
        }
        let rows = self.fetch(bind_epochs(statement(sql).bind(after).bind(last), over, 0)).await?;
        Ok(rows.first().map_or(Ok(0), |row| row.try_get(0).map(unsigned))?)
    }
}
