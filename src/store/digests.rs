//! The routes of one life as digests: what is compared with what its gateway says.

use sqlx::Row;

use crate::domain::digest::Stored;
use crate::domain::digest::Sum;
use crate::domain::digest::Sums;
use crate::domain::digest::element;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::time::Timestamp;
use crate::store::column::bind_users;
use crate::store::column::corrupt;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::column::user_id;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;

/// Rows of one page of elements.
const PAGE: i64 = 10_000;

/// Users with the digests of their routes, and where the next page begins.
pub struct Elements {
    pub of_users: Vec<(UserId, u64)>,
    /// None: this was the last page.
    pub next_after: Option<i64>,
}

impl Connection {
    /// Digest and number of a life's routes, for each bucket of users: of an index alone.
    pub async fn route_sums(&mut self, epoch: Epoch) -> Result<Sums, SqlError> {
        const SQL: &str = "SELECT CAST(user_id & 255 AS SIGNED), COUNT(*), CAST(BIT_XOR(digest) AS SIGNED) \
            FROM routes FORCE INDEX (routes_by_life) WHERE epoch = ? GROUP BY 1";
        let mut sums = Sums::default();
        if self.engine() == Engine::MySql {
            for row in self.fetch(statement(SQL).bind(signed(epoch.0))).await? {
                let bucket = u8::try_from(row.try_get::<i64, _>(0)?).map_err(|error| corrupt("user_id", error))?;
                let digest = row.try_get::<i64, _>(2)?.cast_unsigned();
                sums.set(bucket, Sum { digest, routes: unsigned(row.try_get(1)?) });
            }
            return Ok(sums);
        }
        let (all, mut after) = ((0..=u8::MAX).collect::<Vec<_>>(), Some(0));
        while let Some(from) = after {
            let page = self.route_elements(epoch, &all, from).await?;
            page.of_users.iter().for_each(|(user, element)| sums.add(*user, *element));
            after = page.next_after;
        }
        Ok(sums)
    }

    /// A page of the routes in these buckets, of users after `after`: all routes of each user that it has.
    pub async fn route_elements(&mut self, epoch: Epoch, buckets: &[u8], after: i64) -> Result<Elements, SqlError> {
        let head = "SELECT user_id, digest FROM routes /*! FORCE INDEX (routes_by_life) */ \
            WHERE epoch = ? AND user_id > ? AND user_id & 255 IN (";
        let size = buckets.len().next_power_of_two(); // few different statements
        let mut select = statement(repeated(head, "?", size, ") ORDER BY user_id LIMIT ?"));
        select = select.bind(signed(epoch.0)).bind(after);
        for bucket in filled(buckets, size - buckets.len()) {
            select = select.bind(i64::from(*bucket));
        }
        let mut of_users = Vec::new();
        for row in self.fetch(select.bind(PAGE)).await? {
            of_users.push((user_id(row.try_get(0)?)?, row.try_get::<i64, _>(1)?.cast_unsigned()));
        }
        let is_last = of_users.len() < PAGE as usize;
        if let (false, Some((last, _))) = (is_last, of_users.last().copied()) {
            of_users.retain(|(user, _)| *user != last); // the page may have cut the last user's routes in two
        }
        let next_after = of_users.last().map(|(user, _)| user.get()).filter(|_| !is_last);
        Ok(Elements { of_users, next_after })
    }

    /// The routes of `users` on a life.
    pub async fn routes_on(&mut self, epoch: Epoch, users: &[UserId]) -> Result<Vec<Stored>, SqlError> {
        let head = "SELECT user_id, device_id, conn_id, bound_version, bound_at_ms, digest \
            FROM routes /*! FORCE INDEX (PRIMARY) */ WHERE epoch = ? AND user_id IN (";
        let mut routes = Vec::new();
        for (chunk, fill) in chunks(users) {
            let select = statement(repeated(head, "?", chunk.len() + fill, ")")).bind(signed(epoch.0));
            for row in self.fetch(bind_users(select, chunk, fill)).await? {
                let user = user_id(row.try_get(0)?)?;
                let device = DeviceId::parse(row.try_get(1)?).map_err(|error| corrupt("device_id", error))?;
                let conn = ConnId::parse(row.try_get(2)?).map_err(|error| corrupt("conn_id", error))?;
                routes.push(Stored {
                    user,
                    element: element(user, &device, &conn),
                    conn,
                    bound_version: Version(unsigned(row.try_get(3)?)),
                    bound_at: Timestamp(row.try_get(4)?),
                    digest: row.try_get::<i64, _>(5)?.cast_unsigned(),
                });
            }
        }
        Ok(routes)
    }

    /// Lets rows say the digests that they ought to, if they are still of the same binds. Returns how many. Users are locked
    /// first and in order, as the write path does: neither waits for the other in a circle.
    pub async fn correct_digests(&mut self, mut routes: Vec<&Stored>) -> Result<u64, SqlError> {
        routes.sort_unstable_by_key(|route| route.user);
        let (head, row, between, tail) = match self.engine() {
            Engine::MySql => (
                "UPDATE (",
                "SELECT CAST(? AS SIGNED) AS user_id, CAST(? AS SIGNED) AS bound_version, CAST(? AS SIGNED) AS digest",
                " UNION ALL ",
                ") AS new STRAIGHT_JOIN routes AS r FORCE INDEX (PRIMARY) \
                 ON r.user_id = new.user_id AND r.bound_version = new.bound_version SET r.digest = new.digest",
            ),
            Engine::Sqlite => (
                "WITH new (user_id, bound_version, digest) AS (VALUES ",
                "(?,?,?)",
                ",",
                ") UPDATE routes SET digest = new.digest FROM new WHERE routes.user_id = new.user_id AND routes.bound_version = new.bound_version",
            ),
        };
        let mut corrected = 0;
        for (chunk, fill) in chunks(&routes) {
            let users: Vec<UserId> = chunk.iter().map(|route| route.user).collect();
            self.begin().await?;
            self.lock_known_users(&users).await?;
            let rows = [row].repeat(chunk.len() + fill).join(between);
            let mut update = statement(format!("{head}{rows}{tail}"));
            for route in filled(chunk, fill) {
                update = update.bind(route.user.get()).bind(signed(route.bound_version.0)).bind(route.element.cast_signed());
            }
            corrected += self.execute(update).await?;
            self.commit().await?;
        }
        Ok(corrected)
    }
}
