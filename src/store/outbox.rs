//! The outbox: what a committed batch still has to show to the outside, written in the same transaction.

use prost::Message;
use sqlx::Row;

use crate::store::codec::OutboxBody;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::repeated;
use crate::store::users::clock_micros;

/// Names one outbox row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxId(String);

impl Connection {
    pub async fn add_outbox(&mut self, node_id: &str, body: &OutboxBody) -> Result<OutboxId, SqlError> {
        let id = uuid::Uuid::now_v7().to_string();
        let sql =
            format!("INSERT INTO outbox (id, node_id, created, body) VALUES (?, ?, {} / 1000, ?)", clock_micros(self.engine()));
        self.execute(statement(sql).bind(id.clone()).bind(node_id.to_owned()).bind(body.encode_to_vec())).await?;
        Ok(OutboxId(id))
    }

    /// Deletes rows that are done, except those another node has claimed.
    pub async fn delete_outbox(&mut self, ids: &[OutboxId]) -> Result<(), SqlError> {
        for (chunk, fill) in chunks(ids) {
            let sql = repeated("DELETE FROM outbox WHERE claimed_by = '' AND id IN (", "?", chunk.len() + fill, ")");
            let mut delete = statement(sql);
            for id in chunk.iter().chain(std::iter::repeat_n(chunk.last(), fill).flatten()) {
                delete = delete.bind(id.0.clone());
            }
            self.execute(delete).await?;
        }
        Ok(())
    }

    pub async fn count_outbox(&mut self) -> Result<i64, SqlError> {
        let rows = self.fetch(statement("SELECT COUNT(*) FROM outbox")).await?;
        Ok(rows.first().map_or(Ok(0), |row| row.try_get(0))?)
    }
}
