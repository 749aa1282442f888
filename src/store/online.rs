//! Who has a route: read by index and cursor, so that a page at the end costs as much as the first.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::route::Platform;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::store::codec;
use crate::store::column::bind_epochs;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::column::user_id;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;

/// Lives that one statement walks: none may take long.
const WALKED_AT_ONCE: usize = 64;

/// Rows that one statement counts.
pub(super) const COUNTED_AT_ONCE: i64 = 100_000;

/// Users who are alike to whoever counts them: what has to be known of their routes, and of themselves.
#[derive(Debug)]
pub struct Alike {
    pub users: u64,
    pub routes: Vec<RouteSketch>,
    /// As they want to be seen.
    pub wanted: Status,
}

#[derive(Debug)]
pub struct RouteSketch {
    pub epoch: Epoch,
    pub platform: Platform,
    pub idle: bool,
}

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

    /// How many users there are on each of these lives that has one. One by one: together they could take longer than one
    /// statement may, and grouping them takes several times as long.
    pub async fn count_users_of(&mut self, epochs: &[Epoch]) -> Result<HashMap<Epoch, u64>, SqlError> {
        const SQL: &str = "SELECT COUNT(*) FROM \
            (SELECT DISTINCT user_id FROM routes /*! FORCE INDEX (routes_by_life) */ WHERE epoch = ?) AS users";
        let mut counts = HashMap::with_capacity(epochs.len());
        for epoch in epochs {
            let rows = self.fetch(statement(SQL).bind(signed(epoch.0))).await?;
            counts.insert(*epoch, rows.first().map_or(Ok(0), |row| row.try_get(0).map(unsigned))?);
        }
        Ok(counts)
    }

    /// Lives that routes name, and that nobody on them is online by: they are over, or unknown.
    pub async fn named_in_vain(&mut self) -> Result<Vec<Epoch>, SqlError> {
        const SQL: &str = "SELECT named.epoch FROM (SELECT DISTINCT epoch FROM routes) AS named \
            LEFT JOIN lives ON lives.epoch = named.epoch WHERE lives.epoch IS NULL OR lives.alive = 0";
        let rows = self.fetch(statement(SQL)).await?;
        rows.iter().map(|row| Ok(Epoch(unsigned(row.try_get(0)?)))).collect()
    }

    /// How many users have a route that is on none of the lives `over`. Statement by statement: all together could take longer
    /// than one may.
    pub async fn count_users_online(&mut self, over: &[Epoch]) -> Result<i64, SqlError> {
        const HEAD: &str = "SELECT COUNT(*), MAX(user_id) FROM \
            (SELECT DISTINCT user_id FROM routes /*! FORCE INDEX (PRIMARY) */ WHERE user_id > ?";
        const TAIL: &str = " ORDER BY user_id LIMIT ?) AS page";
        let fill = over.len().next_power_of_two() - over.len();
        let living = if over.is_empty() { String::new() } else { repeated(" AND epoch NOT IN (", "?", over.len() + fill, ")") };
        let page = |after| {
            let select = statement(format!("{HEAD}{living}{TAIL}")).bind(after);
            bind_epochs(select, over, fill).bind(COUNTED_AT_ONCE)
        };
        self.count_by_page(page).await?.iter().map(|row| Ok(row.try_get::<i64, _>(0)?)).sum()
    }

    /// What counts so many users at once, statement by statement: `page` begins after a user, and its one row says first how many
    /// users it has counted, then the last of them.
    pub(super) async fn count_by_page(&mut self, page: impl Fn(i64) -> Statement) -> Result<Vec<AnyRow>, SqlError> {
        let (mut pages, mut after) = (Vec::new(), 0);
        loop {
            let Some(row) = self.fetch(page(after)).await?.into_iter().next() else { return Ok(pages) };
            let (counted, last) = (row.try_get::<i64, _>(0)?, row.try_get::<Option<i64>, _>(1)?);
            pages.push(row);
            match last {
                Some(last) if counted == COUNTED_AT_ONCE => after = last,
                _ => return Ok(pages),
            }
        }
    }

    /// The last user of the next `limit` routes after `after`, by user. None: there are no more.
    pub async fn last_of_page(&mut self, after: i64, limit: i64) -> Result<Option<i64>, SqlError> {
        const SQL: &str = "SELECT MAX(user_id) FROM (SELECT user_id FROM routes /*! FORCE INDEX (PRIMARY) */ \
            WHERE user_id > ? ORDER BY user_id LIMIT ?) AS page";
        let rows = self.fetch(statement(SQL).bind(after).bind(limit)).await?;
        Ok(rows.first().map_or(Ok(None), |row| row.try_get(0))?)
    }

    /// The users after `after` up to `last`, with those of their routes whose time is not over at `now`. Those with one route,
    /// who are most, are counted where they are: to fetch each of them costs far more. Who gets another just then may be
    /// counted twice.
    pub async fn alike(&mut self, after: i64, last: i64, now: Timestamp) -> Result<Vec<Alike>, SqlError> {
        const ALONE: &str = "SELECT /*! STRAIGHT_JOIN */ r.epoch, r.platform, r.idle, u.status, COUNT(*) FROM \
            (SELECT user_id, MIN(epoch) AS epoch, MIN(platform) AS platform, MIN(idle) AS idle \
            FROM routes /*! FORCE INDEX (PRIMARY) */ WHERE user_id > ? AND user_id <= ? \
            AND (expires_at_ms IS NULL OR expires_at_ms > ?) GROUP BY user_id HAVING COUNT(*) = 1) AS r \
            CROSS JOIN users u /*! FORCE INDEX (PRIMARY) */ ON u.user_id = r.user_id \
            GROUP BY r.epoch, r.platform, r.idle, u.status";
        const SEVERAL: &str = "SELECT /*! STRAIGHT_JOIN */ r.epoch, r.platform, r.idle, u.status, r.user_id FROM \
            (SELECT user_id FROM routes /*! FORCE INDEX (PRIMARY) */ WHERE user_id > ? AND user_id <= ? \
            AND (expires_at_ms IS NULL OR expires_at_ms > ?) GROUP BY user_id HAVING COUNT(*) > 1) AS several \
            CROSS JOIN routes r /*! FORCE INDEX (PRIMARY) */ ON r.user_id = several.user_id \
            CROSS JOIN users u /*! FORCE INDEX (PRIMARY) */ ON u.user_id = r.user_id \
            WHERE r.expires_at_ms IS NULL OR r.expires_at_ms > ? ORDER BY r.user_id";
        let mut all = Vec::new();
        for row in self.fetch(statement(ALONE).bind(after).bind(last).bind(now.0)).await? {
            let (route, wanted) = sketch(&row)?;
            all.push(Alike { users: unsigned(row.try_get(4)?), routes: vec![route], wanted });
        }
        let mut user_before = None;
        for row in self.fetch(statement(SEVERAL).bind(after).bind(last).bind(now.0).bind(now.0)).await? {
            let ((route, wanted), user) = (sketch(&row)?, row.try_get::<i64, _>(4)?);
            let is_anew = user_before.replace(user) != Some(user);
            match all.last_mut().filter(|_| !is_anew) {
                Some(alike) => alike.routes.push(route),
                None => all.push(Alike { users: 1, routes: vec![route], wanted }),
            }
        }
        Ok(all)
    }
}

fn sketch(row: &AnyRow) -> Result<(RouteSketch, Status), SqlError> {
    let route = RouteSketch {
        epoch: Epoch(unsigned(row.try_get(0)?)),
        platform: codec::platform_from_i32(row.try_get(1)?).unwrap_or_default(),
        idle: row.try_get::<i32, _>(2)? != 0,
    };
    Ok((route, codec::status_from_i32(row.try_get(3)?).unwrap_or_default()))
}
