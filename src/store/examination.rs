//! What the doctor asks the database.

use std::time::Duration;
use std::time::Instant;

use nix::sys::statvfs::statvfs;
use sqlx::Row;

use crate::store::cluster::ClusterRow;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::database::Database;
use crate::store::database::Durability;
use crate::store::schema;
pub use crate::store::schema::Steps;

/// What it is like, by a connection made for this.
#[derive(Debug)]
pub struct Examined {
    /// What connecting took.
    pub connected_in: Duration,
    pub cluster: ClusterRow,
    /// What reading `cluster` took: its clock is from some time within.
    pub read_in: Duration,
    pub durability: Durability,
    pub steps: Steps,
    /// Which process has a node's name. None: nobody.
    pub owner: Option<String>,
    /// Bytes that are free where the file of an embedded database is. None: there is no such file.
    pub free: Option<u64>,
}

impl Database {
    /// Looks at everything that a node relies on. `node_id`: whose name.
    pub async fn examine(&self, node_id: &str) -> Result<Examined, SqlError> {
        let began = Instant::now();
        let mut connection = self.connect(Purpose::Lane).await?;
        let connected_in = began.elapsed();
        let asked = Instant::now();
        let cluster = connection.read_cluster().await?;
        let read_in = asked.elapsed();
        let durability = self.durability(&mut connection).await?;
        let select = statement("SELECT incarnation FROM nodes WHERE node_id = ?").bind(node_id.to_owned());
        let owner = connection.fetch(select).await?.first().map(|row| row.try_get(0)).transpose()?;
        let steps = schema::steps(connection.raw()).await;
        Ok(Examined { connected_in, cluster, read_in, durability, steps, owner, free: self.free_bytes() })
    }

    fn free_bytes(&self) -> Option<u64> {
        let room = statvfs(self.file_path()?).ok()?;
        Some(room.blocks_available() * room.fragment_size())
    }
}
