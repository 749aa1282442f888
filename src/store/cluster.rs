//! The one row all nodes agree on, and the nodes.

use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::time::CLOCK_SLACK;
use crate::domain::time::Timestamp;
use crate::store::column::clock_micros;
use crate::store::column::clock_millis;
use crate::store::column::duration_millis;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::greatest;
use crate::store::statement::unless_there;
use crate::store::users::DatabaseClock;

/// If no node could write for this long, nobody knows which gateways would have beaten meanwhile.
pub const MAX_SILENCE: Duration = Duration::from_secs(3);
/// [`CLOCK_SLACK`], as statements have it.
pub(super) const FUTURE_MS: i64 = CLOCK_SLACK.as_millis() as i64;
/// Begins the reason of a hold that a node began: it also ends by itself, once the gateways are heard again.
const BY_DOUBT: &str = "doubt: ";

/// What every node looks at once a second.
#[derive(Clone, Debug)]
pub struct ClusterRow {
    pub clock: DatabaseClock,
    pub store_id: String,
    /// Since when beats were recorded without a gap; now, if they are not.
    pub continuous_since: Timestamp,
    /// Raised whenever caches may hold what the database does not know.
    pub generation: u64,
    /// The Redis server whose records belong to this generation.
    pub cache_identity: String,
    /// The database server that was written to last: see [`Server::branch`](crate::store::server::Server::branch).
    pub branch: String,
    pub hold: Hold,
    pub step: Step,
    pub counts: Counts,
}

/// What one node has counted for all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub users_online: i64,
    pub users_counted_at: Timestamp,
    pub messages: i64,
    /// When the oldest message was stored.
    pub oldest: Option<Timestamp>,
}

/// The last time that the clock was set forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub at: Timestamp,
    pub ms: i64,
}

/// Until when no gateway is declared dead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hold {
    pub began: Timestamp,
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

/// A node, and which process of it. The name may be used again; an incarnation is one process's alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName {
    pub node_id: String,
    pub incarnation: String,
    /// Where other nodes reach it.
    pub addr: String,
    /// What fails together; empty: it does not say.
    pub zone: String,
}

/// A node, as the others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRow {
    pub name: NodeName,
    pub seen_at: Timestamp,
    /// It is about to stop.
    pub draining: bool,
}

/// What came of asking for a node's name.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    Taken,
    /// Another process said at `seen_at` that it has this name.
    InUse {
        addr: String,
        seen_at: Timestamp,
    },
}

impl Connection {
    pub async fn read_cluster(&mut self) -> Result<ClusterRow, SqlError> {
        let clock = clock_micros(self.engine());
        let since = continuous_since(self.engine());
        let sql = format!(
            "SELECT {clock}, store_id, {since}, generation, cache_identity, step_at, step_ms, users_online, \
             users_counted_at, inbox_messages, inbox_oldest, hold_began, hold_until, hold_rearm, hold_reason, server FROM cluster \
             WHERE id = 1"
        );
        let rows = self.fetch(statement(sql)).await?;
        let row = rows.first().ok_or_else(|| SqlError::Lost("the table `cluster` is empty".to_owned()))?;
        Ok(ClusterRow {
            clock: DatabaseClock::from_micros(row.try_get(0)?),
            store_id: row.try_get(1)?,
            continuous_since: Timestamp(row.try_get(2)?),
            generation: unsigned(row.try_get(3)?),
            cache_identity: row.try_get(4)?,
            branch: row.try_get(15)?,
            step: Step { at: Timestamp(row.try_get(5)?), ms: row.try_get(6)? },
            counts: Counts {
                users_online: row.try_get(7)?,
                users_counted_at: Timestamp(row.try_get(8)?),
                messages: row.try_get(9)?,
                oldest: Some(Timestamp(row.try_get(10)?)).filter(|oldest| oldest.0 > 0),
            },
            hold: Hold {
                began: Timestamp(row.try_get(11)?),
                until: Timestamp(row.try_get(12)?),
                rearm: Timestamp(row.try_get(13)?),
                reason: row.try_get(14)?,
            },
        })
    }

    /// Says that the database takes writes now. A gap tells that for a while it did not, or that no node was there: then no
    /// beat could be recorded either, and nobody may be declared dead for it. A beat of the future is a gap too: the clock went
    /// back.
    pub async fn beat_cluster(&mut self) -> Result<(), SqlError> {
        let (now, since) = (clock_millis(self.engine()), continuous_since(self.engine()));
        // MySQL assigns from left to right: last_beat has to come last.
        let sql = format!("UPDATE cluster SET continuous_since = {since}, last_beat = {now} WHERE id = 1");
        self.execute(statement(sql)).await.map(|_| ())
    }

    /// Tells all nodes how many users were counted.
    pub async fn note_users_online(&mut self, users: i64) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!("UPDATE cluster SET users_online = ?, users_counted_at = {now} WHERE id = 1");
        self.execute(statement(sql).bind(users)).await.map(|_| ())
    }

    /// Tells all nodes how many messages were counted, and when the oldest was stored.
    pub async fn note_messages(&mut self, messages: i64, oldest: Option<Timestamp>) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE cluster SET inbox_messages = ?, inbox_oldest = ? WHERE id = 1";
        self.execute(statement(SQL).bind(messages).bind(oldest.unwrap_or_default().0)).await.map(|_| ())
    }

    /// Says that the clock was set forward by `ms`. The nodes see it at about the same time, so one that is larger and was
    /// seen within `lately` stays.
    pub async fn note_step(&mut self, ms: i64, lately: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE cluster SET step_ms = CASE WHEN step_ms > ? AND step_at > {now} - ? THEN step_ms ELSE ? END, \
             step_at = {now} WHERE id = 1"
        );
        self.execute(statement(sql).bind(ms).bind(duration_millis(lately)).bind(ms)).await.map(|_| ())
    }

    /// Begins a hold because gateways fell silent, unless one is on, or ended by time within the last `lease`. True: begun.
    pub async fn begin_hold(&mut self, length: Duration, lease: Duration, why: &str) -> Result<bool, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE cluster SET hold_began = {now}, hold_until = {now} + ?, hold_rearm = {now} + ?, hold_reason = ? \
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

    /// Cuts down to what it can be whatever ends in the future because the clock was ahead: a hold, and the time before the next
    /// one. A hold that a node of the last release began does not say when.
    pub async fn clamp_hold(&mut self, length: Duration, lease: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE cluster SET hold_until = {now} + ?, hold_rearm = {now} + ? \
             WHERE id = 1 AND hold_until > {now} + ? AND hold_reason LIKE '{BY_DOUBT}%'"
        );
        let began_ahead = format!(
            "UPDATE cluster SET hold_until = {now} + hold_until - hold_began, hold_rearm = {now} + hold_rearm - hold_began, \
             hold_began = {now} WHERE id = 1 AND hold_began > {now} + {FUTURE_MS}"
        );
        self.execute(statement(began_ahead)).await?;
        let (length, both) = (duration_millis(length), duration_millis(length + lease));
        self.execute(statement(sql).bind(length).bind(both).bind(length + FUTURE_MS)).await?;
        let rearm =
            format!("UPDATE cluster SET hold_rearm = {now} WHERE id = 1 AND hold_until < {now} AND hold_rearm > {now} + ?");
        self.execute(statement(rearm).bind(duration_millis(lease) + FUTURE_MS)).await.map(|_| ())
    }

    /// An operator begins, prolongs or shortens a hold. Zero calls it off: none begins by itself for one `lease` then.
    pub async fn set_hold(&mut self, length: Duration, lease: Duration, why: &str) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let until = if length.is_zero() { "0 * ?".to_owned() } else { format!("{now} + ?") };
        let sql = format!(
            "UPDATE cluster SET hold_began = {now}, hold_until = {until}, hold_rearm = {now} + ?, hold_reason = ? WHERE id = 1"
        );
        let set = statement(sql).bind(duration_millis(length)).bind(duration_millis(length + lease)).bind(why.to_owned());
        self.execute(set).await.map(|_| ())
    }

    /// Raises the generation, unless another node did so meanwhile.
    pub async fn raise_generation(&mut self, seen: u64) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE cluster SET generation = generation + 1 WHERE id = 1 AND generation = ?";
        self.execute(statement(SQL).bind(signed(seen))).await.map(|_| ())
    }

    /// Says that from now on this server is written to. If another was, it may have acknowledged what this one lacks: the
    /// generation is raised, above all that were raised there, by the clock, so that one is not raised twice.
    pub async fn move_to(&mut self, branch: &str, seen: &ClusterRow) -> Result<(), SqlError> {
        let (now, greatest) = (clock_millis(self.engine()), greatest(self.engine()));
        let raised = match seen.branch.is_empty() {
            true => "generation".to_owned(),
            false => format!("{greatest}(generation + 1, {now})"),
        };
        let sql = format!("UPDATE cluster SET generation = {raised}, server = ? WHERE id = 1 AND server = ?");
        self.execute(statement(sql).bind(branch.to_owned()).bind(seen.branch.clone())).await.map(|_| ())
    }

    /// Raises the generation because the shared cache is another server than before, unless another node did so meanwhile.
    pub async fn adopt_cache(&mut self, seen: &ClusterRow, identity: &str) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE cluster SET generation = generation + 1, cache_identity = ? WHERE id = 1 AND generation = ? AND cache_identity = ?";
        let update = statement(SQL).bind(identity.to_owned()).bind(signed(seen.generation)).bind(seen.cache_identity.clone());
        self.execute(update).await.map(|_| ())
    }

    /// Takes this node's name for a process that starts, if nobody has used it for `term`.
    pub async fn claim_node(&mut self, own: &NodeName, term: Duration) -> Result<Claim, SqlError> {
        let now = clock_millis(self.engine());
        let take = format!(
            "UPDATE nodes SET incarnation = ?, addr = ?, zone = ?, draining = 0, seen_at = {now} WHERE node_id = ? \
             AND (incarnation = ? OR seen_at < {now} - ? OR seen_at > {now} + ?)"
        );
        let take =
            statement(take).bind(own.incarnation.clone()).bind(own.addr.clone()).bind(own.zone.clone()).bind(own.node_id.clone());
        let (incarnation, term) = (own.incarnation.clone(), duration_millis(term));
        if self.execute(take.bind(incarnation).bind(term).bind(term)).await? == 1 {
            return Ok(Claim::Taken);
        }
        self.insert_node(own).await?;
        let select = "SELECT incarnation, addr, seen_at FROM nodes WHERE node_id = ?";
        let rows = self.fetch(statement(select).bind(own.node_id.clone())).await?;
        match rows.first() {
            Some(row) if row.try_get::<String, _>(0)? != own.incarnation => {
                Ok(Claim::InUse { addr: row.try_get(1)?, seen_at: Timestamp(row.try_get(2)?) })
            }
            _ => Ok(Claim::Taken),
        }
    }

    async fn insert_node(&mut self, own: &NodeName) -> Result<(), SqlError> {
        let (now, unless_there) = (clock_millis(self.engine()), unless_there(self.engine(), "node_id"));
        let insert =
            format!("INSERT INTO nodes (node_id, incarnation, addr, zone, seen_at) VALUES (?, ?, ?, ?, {now}){unless_there}");
        let insert = statement(insert).bind(own.node_id.clone()).bind(own.incarnation.clone());
        self.execute(insert.bind(own.addr.clone()).bind(own.zone.clone())).await.map(|_| ())
    }

    /// Says that this node is there, and returns the nodes that said so within `term`, as their newest process has it.
    pub async fn beat_node(&mut self, own: &NodeName, term: Duration) -> Result<Vec<NodeRow>, SqlError> {
        let now = clock_millis(self.engine());
        let beat = format!("UPDATE nodes SET seen_at = {now}, addr = ?, zone = ? WHERE node_id = ? AND incarnation = ?");
        let beat = statement(beat).bind(own.addr.clone()).bind(own.zone.clone());
        let beat = beat.bind(own.node_id.clone()).bind(own.incarnation.clone());
        if self.execute(beat).await? == 0 {
            self.insert_node(own).await?;
        }
        let select = format!(
            "SELECT node_id, incarnation, addr, zone, seen_at, draining FROM nodes WHERE seen_at > {now} - ? AND seen_at < {now} + ?"
        );
        let rows = self.fetch(statement(select).bind(duration_millis(term)).bind(duration_millis(term))).await?;
        rows.iter().map(read_node).collect()
    }

    /// All nodes whose rows are there: those that are alive, and those that ended without a word within the last hour.
    pub async fn list_nodes(&mut self) -> Result<Vec<NodeRow>, SqlError> {
        const SQL: &str = "SELECT node_id, incarnation, addr, zone, seen_at, draining FROM nodes ORDER BY node_id";
        self.fetch(statement(SQL)).await?.iter().map(read_node).collect()
    }

    /// Tells the others that this node is about to stop.
    pub async fn drain_node(&mut self, own: &NodeName) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE nodes SET draining = 1 WHERE node_id = ? AND incarnation = ?";
        self.execute(statement(SQL).bind(own.node_id.clone()).bind(own.incarnation.clone())).await.map(|_| ())
    }

    /// Gives this node's name back, so that its next process need not wait.
    pub async fn leave_node(&mut self, own: &NodeName) -> Result<(), SqlError> {
        const SQL: &str = "DELETE FROM nodes WHERE node_id = ? AND incarnation = ?";
        self.execute(statement(SQL).bind(own.node_id.clone()).bind(own.incarnation.clone())).await.map(|_| ())
    }

    /// Forgets nodes that have not been there for `term`.
    pub async fn forget_nodes(&mut self, term: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let delete = format!("DELETE FROM nodes WHERE seen_at < {now} - ? OR seen_at > {now} + ?");
        self.execute(statement(delete).bind(duration_millis(term)).bind(duration_millis(term))).await.map(|_| ())
    }
}

fn read_node(row: &AnyRow) -> Result<NodeRow, SqlError> {
    let (node_id, incarnation, addr, zone) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    let name = NodeName { node_id, incarnation, addr, zone };
    Ok(NodeRow { name, seen_at: Timestamp(row.try_get(4)?), draining: row.try_get::<i32, _>(5)? == 1 })
}

/// Since when beats were recorded without a gap; now, if the last one is too long ago, or of the future.
fn continuous_since(engine: Engine) -> String {
    let (now, silence) = (clock_millis(engine), duration_millis(MAX_SILENCE));
    format!(
        "CASE WHEN last_beat < {now} - {silence} OR last_beat > {now} + {silence} OR continuous_since > {now} THEN {now} \
         ELSE continuous_since END"
    )
}
