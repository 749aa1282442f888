//! Lives of gateways and the row all nodes agree on.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::time::Timestamp;
use crate::store::codec;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;
use crate::store::users::DatabaseClock;
use crate::store::users::Records;
use crate::store::users::clock_micros;
use crate::store::users::corrupt;
use crate::store::users::signed;
use crate::store::users::unsigned;

/// What every node looks at once a second.
#[derive(Clone, Debug)]
pub struct ClusterRow {
    pub clock: DatabaseClock,
    /// Raised whenever caches may hold what the database does not know.
    pub generation: u64,
    /// The Redis server whose records belong to this generation.
    pub cache_identity: String,
}

const COLUMNS: &str = "SELECT epoch, gateway_addr, kind, alive, lease_until FROM lives WHERE ";

impl Connection {
    pub async fn read_cluster(&mut self) -> Result<ClusterRow, SqlError> {
        let sql = format!("SELECT {}, generation, cache_identity FROM cluster WHERE id = 1", clock_micros(self.engine()));
        let rows = self.fetch(statement(sql)).await?;
        let row = rows.first().ok_or_else(|| SqlError::Failed(sqlx::Error::RowNotFound))?;
        Ok(ClusterRow {
            clock: DatabaseClock::from_micros(row.try_get(0)?),
            generation: unsigned(row.try_get(1)?),
            cache_identity: row.try_get(2)?,
        })
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

    /// Says that this node is there, and returns the nodes that said so within `term`.
    pub async fn beat_node(&mut self, node_id: &str, addr: &str, term: Duration) -> Result<Vec<String>, SqlError> {
        let now = format!("{} DIV 1000", clock_micros(self.engine()));
        let now = if self.engine() == Engine::Sqlite { now.replace(" DIV ", " / ") } else { now };
        let upsert = match self.engine() {
            Engine::MySql => {
                format!("INSERT INTO nodes (node_id, addr, seen_at) VALUES (?, ?, {now}) ON DUPLICATE KEY UPDATE seen_at = {now}")
            }
            Engine::Sqlite => format!(
                "INSERT INTO nodes (node_id, addr, seen_at) VALUES (?, ?, {now}) ON CONFLICT (node_id) DO UPDATE SET seen_at = {now}"
            ),
        };
        self.execute(statement(upsert).bind(node_id.to_owned()).bind(addr.to_owned())).await?;
        let term = i64::try_from(term.as_millis()).unwrap_or(i64::MAX);
        let rows = self.fetch(statement(format!("SELECT node_id FROM nodes WHERE seen_at > {now} - ?")).bind(term)).await?;
        rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
    }

    /// Removes a node that ends.
    pub async fn remove_node(&mut self, node_id: &str) -> Result<(), SqlError> {
        self.execute(statement("DELETE FROM nodes WHERE node_id = ?").bind(node_id.to_owned())).await.map(|_| ())
    }

    /// All lives that a route may still name: the living, and the dead whose routes are not swept yet.
    pub async fn read_lives(&mut self) -> Result<Vec<Arc<Life>>, SqlError> {
        let rows = self.fetch(statement(format!("{COLUMNS}alive = 1 OR swept_at = 0"))).await?;
        rows.iter().map(read_life).collect()
    }

    pub async fn lives_by_epoch(&mut self, epochs: &[Epoch]) -> Result<Vec<Arc<Life>>, SqlError> {
        let mut lives = Vec::new();
        for (chunk, fill) in chunks(epochs) {
            let mut select = statement(repeated(&format!("{COLUMNS}epoch IN ("), "?", chunk.len() + fill, ")"));
            for epoch in filled(chunk, fill) {
                select = select.bind(signed(epoch.0));
            }
            for row in self.fetch(select).await? {
                lives.push(read_life(&row)?);
            }
        }
        Ok(lives)
    }

    /// Loads users, and then the lives their routes name: as fresh as the records.
    pub async fn load_users_with_lives(&mut self, users: &[UserId]) -> Result<(Records, Vec<Arc<Life>>), SqlError> {
        let records = self.load_users(users).await?.records;
        let mut epochs: Vec<Epoch> = records.values().flat_map(|record| &record.routes).map(|route| route.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let lives = self.lives_by_epoch(&epochs).await?;
        Ok((records, lives))
    }

    /// The lives that `gateways` live now. A gateway without one is left out.
    pub async fn current_lives(&mut self, gateways: &[GatewayAddr]) -> Result<Vec<Arc<Life>>, SqlError> {
        let mut lives = Vec::new();
        for (chunk, fill) in chunks(gateways) {
            let head = format!("{COLUMNS}alive = 1 AND gateway_addr IN (");
            let mut select = statement(repeated(&head, "?", chunk.len() + fill, ")"));
            for gateway in filled(chunk, fill) {
                select = select.bind(gateway.to_string());
            }
            for row in self.fetch(select).await? {
                lives.push(read_life(&row)?);
            }
        }
        Ok(lives)
    }

    /// Begins an unmanaged life of `gateway`, unless it has a life by now. A transaction of its own: the lock on the one row
    /// that issues epochs must not be held for the length of a batch.
    pub async fn begin_unmanaged_life(&mut self, gateway: &GatewayAddr) -> Result<(), SqlError> {
        let greatest = match self.engine() {
            Engine::MySql => "GREATEST",
            Engine::Sqlite => "MAX",
        };
        let clock = clock_micros(self.engine());
        self.begin().await?;
        let issue = format!("UPDATE cluster SET next_epoch = {greatest}(next_epoch + 1, {clock}) WHERE id = 1");
        self.execute(statement(issue)).await?;
        const INSERT: &str = "INSERT INTO lives (epoch, gateway_addr, kind, alive) \
            SELECT next_epoch, ?, ?, 1 FROM cluster WHERE id = 1 \
            AND NOT EXISTS (SELECT 1 FROM lives WHERE gateway_addr = ? AND alive = 1)";
        let kind = codec::kind_to_i32(LifeKind::Unmanaged);
        self.execute(statement(INSERT).bind(gateway.to_string()).bind(kind).bind(gateway.to_string())).await?;
        self.commit().await
    }
}

fn read_life(row: &AnyRow) -> Result<Arc<Life>, SqlError> {
    Ok(Arc::new(Life {
        epoch: Epoch(unsigned(row.try_get(0)?)),
        gateway: GatewayAddr::parse(row.try_get(1)?).map_err(|error| corrupt("gateway_addr", error))?,
        kind: codec::kind_from_i32(row.try_get(2)?).ok_or_else(|| corrupt("kind", "is none we know"))?,
        alive: row.try_get::<i32, _>(3)? == 1,
        lease_until: Timestamp(row.try_get(4)?),
    }))
}
