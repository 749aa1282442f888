//! Users and their routes: the statements of a lane's transaction, and loading.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::id::Epoch;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::time::Timestamp;
use crate::domain::user::UserRecord;
use crate::store::column::bind_epochs;
use crate::store::column::bind_users;
use crate::store::column::clock_micros;
use crate::store::column::clock_millis;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::column::user_id;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::or_update;
use crate::store::statement::repeated;
use crate::store::statement::unless_there;
use crate::store::user_row::ROUTE_COLUMNS;
use crate::store::user_row::USER_COLUMNS;
use crate::store::user_row::bind_route;
use crate::store::user_row::bind_user;
use crate::store::user_row::read_record;
use crate::store::user_row::read_route;

pub type Records = NumberMap<UserId, UserRecord>;

/// Records as one statement read them, and the database's clock then.
#[derive(Debug, Default)]
pub struct Loaded {
    pub records: Records,
    /// How many of the users have a row.
    pub rows: usize,
    pub clock: DatabaseClock,
}

/// The database's clock as a statement saw it.
#[derive(Clone, Copy, Debug, Default)]
pub struct DatabaseClock {
    micros: i64,
}

impl DatabaseClock {
    pub fn from_micros(micros: i64) -> Self {
        Self { micros }
    }

    pub fn now(self) -> Timestamp {
        Timestamp(self.micros / 1_000)
    }

    pub fn version(self) -> Version {
        Version(u64::try_from(self.micros).unwrap_or(0))
    }
}

/// The rows a batch changes: a user's former record and the one to store.
pub struct UserChange<'a> {
    pub user: UserId,
    pub before: &'a UserRecord,
    pub after: &'a UserRecord,
}

impl Connection {
    /// Locks `users` (sorted, none twice) until the transaction ends, in the order given, also those that do not exist yet.
    ///
    /// The statement is exactly this: `SELECT ... FOR UPDATE` locks nothing where there is no row, and together with inserts
    /// it deadlocks; `INSERT IGNORE` takes shared locks; a list of a thousand ids becomes a join that locks strangers.
    pub async fn lock_users(&mut self, users: &[UserId]) -> Result<(), SqlError> {
        let tail = unless_there(self.engine(), "user_id");
        for (chunk, fill) in chunks(users) {
            let sql = repeated("INSERT INTO users (user_id, version) VALUES ", "(?,0)", chunk.len() + fill, &tail);
            self.execute(bind_users(statement(sql), chunk, fill)).await?;
        }
        Ok(())
    }

    /// Locks those of `users` (sorted) that exist until the transaction ends, in the order given.
    pub(super) async fn lock_known_users(&mut self, users: &[UserId]) -> Result<(), SqlError> {
        let lock = match self.engine() {
            Engine::MySql => " ORDER BY user_id FOR UPDATE",
            Engine::Sqlite => "", // a transaction that writes has the whole file
        };
        for (chunk, fill) in chunks(users) {
            self.user_ids(chunk, fill, lock).await?;
        }
        Ok(())
    }

    /// Which of `users` another session has locked now. Waits for nothing and leaves no locks behind.
    pub async fn locked_users(&mut self, users: &[UserId]) -> Result<Vec<UserId>, SqlError> {
        let mut locked = Vec::new();
        for (chunk, fill) in chunks(users) {
            // Rows that an open transaction has only just inserted are seen by nothing but a dirty read.
            self.run("SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED").await?;
            let there = self.user_ids(chunk, fill, "").await?;
            self.begin().await?;
            let free = self.user_ids(chunk, fill, " FOR UPDATE SKIP LOCKED").await?;
            self.rollback().await?;
            locked.extend(there.into_iter().filter(|user| !free.contains(user)));
        }
        Ok(locked)
    }

    async fn user_ids(&mut self, chunk: &[UserId], fill: usize, lock: &str) -> Result<Vec<UserId>, SqlError> {
        let head = "SELECT user_id FROM users /*! FORCE INDEX (PRIMARY) */ WHERE user_id IN (";
        let sql = repeated(head, "?", chunk.len() + fill, &format!("){lock}"));
        let rows = self.fetch(bind_users(statement(sql), chunk, fill)).await?;
        rows.iter().map(|row| user_id(row.try_get(0)?)).collect()
    }

    /// Reads `users` with their routes, version and routes by one statement, so that they belong together. Users nobody has
    /// heard of are returned as empty records.
    pub async fn load_users(&mut self, users: &[UserId]) -> Result<Loaded, SqlError> {
        let head = format!(
            "SELECT u.user_id, u.version, u.status, u.last_seen_ms, {}, r.device_id, r.platform, r.epoch, r.conn_id, \
             r.connected_at_ms, r.client_ip, r.client_port, r.bound_version, r.bound_at_ms, r.expires_at_ms, r.idle, \
             u.inbox_seq, u.inbox_pending, u.shown_version, u.shown_for, u.shown_seen_ms, u.status_since_ms, \
             u.status_until_ms, u.status_text, u.online_since_ms, u.session_counted, u.banned_until_ms \
             FROM users u /*! FORCE INDEX (PRIMARY) */ LEFT JOIN routes r /*! FORCE INDEX (PRIMARY) */ \
             ON r.user_id = u.user_id WHERE u.user_id IN (",
            clock_micros(self.engine())
        );
        let mut loaded = Loaded::default();
        for (chunk, fill) in chunks(users) {
            let sql = repeated(&head, "?", chunk.len() + fill, ")");
            for row in self.fetch(bind_users(statement(sql), chunk, fill)).await? {
                read_row(&row, &mut loaded)?;
            }
        }
        loaded.rows = loaded.records.len();
        for record in loaded.records.values_mut() {
            let read = std::mem::take(record);
            let presence = read.presence();
            *record = read.with(presence); // now that the routes are there
        }
        for user in users {
            loaded.records.entry(*user).or_default();
        }
        Ok(loaded)
    }

    /// Deletes the rows of `users` that locking them has made, and that nothing was written to.
    pub async fn remove_strangers(&mut self, users: &[UserId]) -> Result<(), SqlError> {
        for (chunk, fill) in chunks(users) {
            let sql = repeated("DELETE FROM users WHERE version = 0 AND user_id IN (", "?", chunk.len() + fill, ")");
            self.execute(bind_users(statement(sql), chunk, fill)).await?;
        }
        Ok(())
    }

    /// Writes what changed. The users have to be locked.
    pub async fn write_users(&mut self, changes: &[UserChange<'_>]) -> Result<(), SqlError> {
        let mut emptied = Vec::new();
        let mut routes = Vec::new();
        for change in changes {
            let removes = change.before.routes.iter().any(|old| change.after.routes.iter().all(|new| new.device != old.device));
            if removes {
                emptied.push(change.user);
            }
            let rewritten = change.after.routes.iter().filter(|route| removes || !change.before.routes.contains(route));
            routes.extend(rewritten.map(|route| (change.user, route)));
        }
        self.delete_routes(&emptied).await?;
        self.upsert_routes(&routes).await?;
        self.upsert_users(changes).await
    }

    /// Deletes all routes of `users`. The join makes MySQL look each user up in our order, by key, and lock nothing else.
    async fn delete_routes(&mut self, users: &[UserId]) -> Result<(), SqlError> {
        for (chunk, fill) in chunks(users) {
            let rows = chunk.len() + fill;
            let sql = match self.engine() {
                Engine::MySql => {
                    let head = "DELETE r FROM (SELECT CAST(? AS SIGNED) AS user_id";
                    let tail = ") AS gone STRAIGHT_JOIN routes AS r FORCE INDEX (PRIMARY) ON r.user_id = gone.user_id";
                    format!("{head}{}{tail}", " UNION ALL SELECT CAST(? AS SIGNED)".repeat(rows - 1))
                }
                Engine::Sqlite => repeated("DELETE FROM routes WHERE user_id IN (", "?", rows, ")"),
            };
            self.execute(bind_users(statement(sql), chunk, fill)).await?;
        }
        Ok(())
    }

    async fn upsert_routes(&mut self, routes: &[(UserId, &Route)]) -> Result<(), SqlError> {
        let head = format!("INSERT INTO routes (user_id, device_id, {}) VALUES ", ROUTE_COLUMNS.join(", "));
        let tail = or_update(self.engine(), "user_id, device_id", &ROUTE_COLUMNS, |_, new| new);
        for (chunk, fill) in chunks(routes) {
            let mut insert = statement(repeated(&head, "(?,?,?,?,?,?,?,?,?,?,?,?,?)", chunk.len() + fill, &tail));
            for (user, route) in filled(chunk, fill) {
                insert = bind_route(insert, *user, route);
            }
            self.execute(insert).await?;
        }
        Ok(())
    }

    async fn upsert_users(&mut self, changes: &[UserChange<'_>]) -> Result<(), SqlError> {
        let head = format!("INSERT INTO users (user_id, {}) VALUES ", USER_COLUMNS.join(", "));
        let tail = or_update(self.engine(), "user_id", &USER_COLUMNS, |_, new| new);
        for (chunk, fill) in chunks(changes) {
            let mut insert = statement(repeated(&head, "(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", chunk.len() + fill, &tail));
            for change in filled(chunk, fill) {
                insert = bind_user(insert, change.user, change.after);
            }
            self.execute(insert).await?;
        }
        Ok(())
    }

    /// Up to `limit` users with a route that ended before `now`, those that ended first first.
    pub async fn expired_users(&mut self, now: Timestamp, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT user_id FROM routes WHERE expires_at_ms <= ? ORDER BY expires_at_ms LIMIT ?";
        self.users_of(statement(SQL).bind(now.0).bind(limit)).await
    }

    /// Up to `limit` users with a route that ends after `latest`, the latest first.
    pub async fn users_who_expire_after(&mut self, latest: Timestamp, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT user_id FROM routes WHERE expires_at_ms > ? ORDER BY expires_at_ms DESC LIMIT ?";
        self.users_of(statement(SQL).bind(latest.0).bind(limit)).await
    }

    /// Looks at the next `page` users after `after`, and forgets those with nothing whose last change is older than `before`, but
    /// not that they want to be INVISIBLE, nor a ban; and those who were erased before `erased`. Returns how many these were, and the last
    /// that was looked at: none if there was nobody.
    pub async fn forget_users(
        &mut self,
        after: i64,
        before: Version,
        erased: Version,
        page: i64,
    ) -> Result<(u64, Option<i64>), SqlError> {
        const LAST: &str =
            "SELECT MAX(user_id) FROM (SELECT user_id FROM users WHERE user_id > ? ORDER BY user_id LIMIT ?) AS page";
        let now = clock_millis(self.engine());
        let old = format!(
            "version > 0 AND inbox_pending = 0 AND banned_until_ms < {now} \
             AND (version < ? AND status <> 4 OR version < ? AND online_since_ms = 0 AND session_counted = 1) \
             AND NOT EXISTS (SELECT 1 FROM routes WHERE routes.user_id = users.user_id) \
             AND NOT EXISTS (SELECT 1 FROM inbox WHERE inbox.user_id = users.user_id)"
        );
        let rows = self.fetch(statement(LAST).bind(after).bind(page)).await?;
        let Some(last) = rows.first().map_or(Ok(None), |row| row.try_get::<Option<i64>, _>(0))? else { return Ok((0, None)) };
        let find = statement(format!("SELECT user_id FROM users WHERE user_id > ? AND user_id <= ? AND {old}"));
        let users = self.users_of(find.bind(after).bind(last).bind(signed(before.0)).bind(signed(erased.0))).await?; // locks nobody
        let mut forgotten = 0;
        for (chunk, fill) in chunks(&users) {
            let tail = format!(") AND {old}"); // still: a change may have come meanwhile
            let delete = repeated("DELETE FROM users WHERE user_id IN (", "?", chunk.len() + fill, &tail);
            forgotten +=
                self.execute(bind_users(statement(delete), chunk, fill).bind(signed(before.0)).bind(signed(erased.0))).await?;
        }
        Ok((forgotten, Some(last)))
    }

    /// Up to `limit` users with a route, by number, after `after`.
    pub async fn users_with_routes(&mut self, after: i64, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT DISTINCT user_id FROM routes WHERE user_id > ? ORDER BY user_id LIMIT ?";
        self.users_of(statement(SQL).bind(after).bind(limit)).await
    }

    /// Up to `limit` users with a route on a life, by number, after `after`. By index and cursor: the rows of users already
    /// swept are not looked at again.
    pub async fn users_of_life(&mut self, epoch: Epoch, after: i64, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT DISTINCT user_id FROM routes /*! FORCE INDEX (routes_by_life) */ \
            WHERE epoch = ? AND user_id > ? ORDER BY user_id LIMIT ?";
        self.users_of(statement(SQL).bind(signed(epoch.0)).bind(after).bind(limit)).await
    }

    /// How many routes there are on each of these lives that has one.
    pub async fn count_routes(&mut self, epochs: &[Epoch]) -> Result<HashMap<Epoch, u64>, SqlError> {
        let mut counts = HashMap::with_capacity(epochs.len());
        for (chunk, fill) in chunks(epochs) {
            let head = "SELECT epoch, COUNT(*) FROM routes WHERE epoch IN (";
            let select = statement(repeated(head, "?", chunk.len() + fill, ") GROUP BY epoch"));
            for row in self.fetch(bind_epochs(select, chunk, fill)).await? {
                counts.insert(Epoch(unsigned(row.try_get(0)?)), unsigned(row.try_get(1)?));
            }
        }
        Ok(counts)
    }

    /// The users that a statement selects.
    pub(super) async fn users_of(&mut self, select: Statement) -> Result<Vec<UserId>, SqlError> {
        self.fetch(select).await?.iter().map(|row| user_id(row.try_get(0)?)).collect()
    }

    pub async fn count_routes_of(&mut self, epoch: Epoch) -> Result<i64, SqlError> {
        let rows = self.fetch(statement("SELECT COUNT(*) FROM routes WHERE epoch = ?").bind(signed(epoch.0))).await?;
        Ok(rows.first().map_or(Ok(0), |row| row.try_get(0))?)
    }
}

fn read_row(row: &AnyRow, loaded: &mut Loaded) -> Result<(), SqlError> {
    let user = user_id(row.try_get(0)?)?;
    loaded.clock = loaded.clock.later(DatabaseClock::from_micros(row.try_get(4)?));
    let record = match loaded.records.entry(user) {
        std::collections::hash_map::Entry::Occupied(there) => there.into_mut(),
        std::collections::hash_map::Entry::Vacant(free) => free.insert(read_record(row)?),
    };
    if let Some(device) = row.try_get::<Option<&str>, _>(5)? {
        record.routes.push(read_route(row, device)?);
    }
    Ok(())
}

impl DatabaseClock {
    fn later(self, other: Self) -> Self {
        Self { micros: self.micros.max(other.micros) }
    }
}
