//! The one row all nodes agree on, and the nodes.

use std::time::Duration;

use sqlx::Row;

use crate::domain::time::Timestamp;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::users::DatabaseClock;
use crate::store::users::clock_micros;
use crate::store::users::clock_millis;
use crate::store::users::duration_millis;
use crate::store::users::signed;
use crate::store::users::unsigned;

/// If no node could write for this long, nobody knows which gateways would have beaten meanwhile.
pub const MAX_SILENCE: Duration = Duration::from_secs(3);
/// Begins the reason of a hold that a node began: it also ends by itself, once the gateways are heard again.
const BY_DOUBT: &str = "doubt: ";

/// What every node looks at once a second.
#[derive(Clone, Debug)]
pub struct ClusterRow {
    pub clock: DatabaseClock,
    /// Raised whenever caches may hold what the database does not know.
    pub generation: u64,
    /// The Redis server whose records belong to this generation.
    pub cache_identity: String,
    pub hold: Hold,
}

/// Until when no gateway is declared dead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    pub until: Timestamp,
    /// Before this no other one begins by itself.
    pub rearm: Timestamp,
    pub reason: String,
}

impl Hold {
    pub fn is_on(&self, now: Timestamp) -> bool {
        self.until > now
    }

    /// Whether it was begun because gateways fell silent, not by an operator.
    pub fn is_by_doubt(&self) -> bool {
        self.reason.starts_with(BY_DOUBT)
    }
}

impl Connection {
    pub async fn read_cluster(&mut self) -> Result<ClusterRow, SqlError> {
        let clock = clock_micros(self.engine());
        let sql =
            format!("SELECT {clock}, generation, cache_identity, hold_until, hold_rearm, hold_reason FROM cluster WHERE id = 1");
        let rows = self.fetch(statement(sql)).await?;
        let row = rows.first().ok_or_else(|| SqlError::Lost("the table `cluster` is empty".to_owned()))?;
        Ok(ClusterRow {
            clock: DatabaseClock::from_micros(row.try_get(0)?),
            generation: unsigned(row.try_get(1)?),
            cache_identity: row.try_get(2)?,
            hold: Hold { until: Timestamp(row.try_get(3)?), rearm: Timestamp(row.try_get(4)?), reason: row.try_get(5)? },
        })
    }

    /// Says that the database takes writes now. A gap tells that for a while it did not, or that no node was there: then no
    /// beat could be recorded either, and nobody may be declared dead for it.
    pub async fn beat_cluster(&mut self) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        // MySQL assigns from left to right: last_beat has to come last.
        let sql = format!(
            "UPDATE cluster SET continuous_since = CASE WHEN last_beat < {now} - ? THEN {now} ELSE continuous_since END, \
             last_beat = {now} WHERE id = 1"
        );
        self.execute(statement(sql).bind(duration_millis(MAX_SILENCE))).await.map(|_| ())
    }

    /// Begins a hold because gateways fell silent, unless one is on, or ended by time within the last `lease`. True: begun.
    pub async fn begin_hold(&mut self, length: Duration, lease: Duration, why: &str) -> Result<bool, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE cluster SET hold_until = {now} + ?, hold_rearm = {now} + ?, hold_reason = ? \
             WHERE id = 1 AND hold_until < {now} AND hold_rearm < {now}"
        );
        let begin = statement(sql).bind(duration_millis(length)).bind(duration_millis(length + lease));
        Ok(self.execute(begin.bind(format!("{BY_DOUBT}{why}"))).await? == 1)
    }

    /// Ends the hold that was `seen`, because the gateways are heard again. Another one may begin at once.
    pub async fn end_hold(&mut self, seen: &Hold) -> Result<bool, SqlError> {
        const SQL: &str = "UPDATE cluster SET hold_until = 0, hold_rearm = 0 WHERE id = 1 AND hold_until = ?";
        Ok(self.execute(statement(SQL).bind(seen.until.0)).await? == 1)
    }

    /// An operator begins, prolongs or shortens a hold. Zero calls it off: none begins by itself for one `lease` then.
    pub async fn set_hold(&mut self, length: Duration, lease: Duration, why: &str) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let until = if length.is_zero() { "0 * ?".to_owned() } else { format!("{now} + ?") };
        let sql = format!("UPDATE cluster SET hold_until = {until}, hold_rearm = {now} + ?, hold_reason = ? WHERE id = 1");
        let set = statement(sql).bind(duration_millis(length)).bind(duration_millis(length + lease)).bind(why.to_owned());
        self.execute(set).await.map(|_| ())
    }

    /// Raises the generation, unless another node did so meanwhile.
    pub async fn raise_generation(&mut self, seen: u64) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE cluster SET generation = generation + 1 WHERE id = 1 AND generation = ?";
        self.execute(statement(SQL).bind(signed(seen))).await.map(|_| ())
    }

    /// Raises the generation because the shared cache is another server than before, unless another node did so meanwhile.
    pub async fn adopt_cache(&mut self, seen: &ClusterRow, identity: &str) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE cluster SET generation = generation + 1, cache_identity = ? WHERE id = 1 AND generation = ? AND cache_identity = ?";
        let update = statement(SQL).bind(identity.to_owned()).bind(signed(seen.generation)).bind(seen.cache_identity.clone());
        self.execute(update).await.map(|_| ())
    }

    /// Says that this node is there, and returns id and address of the nodes that said so within `term`.
    pub async fn beat_node(&mut self, node_id: &str, addr: &str, term: Duration) -> Result<Vec<(String, String)>, SqlError> {
        let now = clock_millis(self.engine());
        let known = match self.engine() {
            Engine::MySql => "ON DUPLICATE KEY UPDATE",
            Engine::Sqlite => "ON CONFLICT (node_id) DO UPDATE SET",
        };
        let upsert = format!("INSERT INTO nodes (node_id, addr, seen_at) VALUES (?, ?, {now}) {known} seen_at = {now}");
        self.execute(statement(upsert).bind(node_id.to_owned()).bind(addr.to_owned())).await?;
        let select = format!("SELECT node_id, addr FROM nodes WHERE seen_at > {now} - ?");
        let rows = self.fetch(statement(select).bind(duration_millis(term))).await?;
        rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
    }

    /// Forgets nodes that have not been there for `term`.
    pub async fn forget_nodes(&mut self, term: Duration) -> Result<(), SqlError> {
        let delete = format!("DELETE FROM nodes WHERE seen_at < {} - ?", clock_millis(self.engine()));
        self.execute(statement(delete).bind(duration_millis(term))).await.map(|_| ())
    }
}
