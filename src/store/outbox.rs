//! The outbox: what a committed batch still has to show to the outside, written in the same transaction.

use std::time::Duration;

use prost::Message;
use sqlx::Row;

use crate::domain::time::Timestamp;
use crate::store::cluster::FUTURE_MS;
use crate::store::codec::OutboxBody;
use crate::store::column::clock_micros;
use crate::store::column::corrupt;
use crate::store::column::duration_millis;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;

/// Names one outbox row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxId(String);

impl Connection {
    pub async fn add_outbox(&mut self, node_id: &str, body: &OutboxBody) -> Result<OutboxId, SqlError> {
        self.add_aged_outbox(node_id, body, Duration::ZERO).await
    }

    /// Adds a row that looks as if it had been left behind for `age` already.
    pub async fn add_aged_outbox(&mut self, node_id: &str, body: &OutboxBody, age: Duration) -> Result<OutboxId, SqlError> {
        let (id, now) = (uuid::Uuid::now_v7().to_string(), clock_micros(self.engine()));
        let sql = format!("INSERT INTO outbox (id, node_id, created, body) VALUES (?, ?, {now} / 1000 - ?, ?)");
        let add = statement(sql).bind(id.clone()).bind(node_id.to_owned()).bind(duration_millis(age)).bind(body.encode_to_vec());
        self.execute(add).await?;
        Ok(OutboxId(id))
    }

    /// Commits a transaction that needs what any change needs: room on the disk, and each of the tables. It leaves nothing behind.
    pub async fn probe_write(&mut self, node_id: &str) -> Result<(), SqlError> {
        let nobody = -i64::from(uuid::Uuid::new_v4().as_fields().0) - 1; // no user has such a number
        self.begin().await?;
        self.execute(statement("INSERT INTO users (user_id, version) VALUES (?, 0)").bind(nobody)).await?;
        self.execute(statement("DELETE FROM routes WHERE user_id = ?").bind(nobody)).await?;
        self.execute(statement("DELETE FROM users WHERE user_id = ?").bind(nobody)).await?;
        let row = self.add_outbox(node_id, &OutboxBody::default()).await?;
        self.delete_outbox(&[row]).await?;
        self.commit().await
    }

    /// Deletes rows that are done, except those another node has claimed. Returns how many it deleted: fewer than given
    /// means that another node has shown, or is showing, what the rows say.
    pub async fn delete_outbox(&mut self, ids: &[OutboxId]) -> Result<usize, SqlError> {
        let mut deleted = 0;
        for (chunk, fill) in chunks(ids) {
            let sql = repeated("DELETE FROM outbox WHERE claimed_by = '' AND id IN (", "?", chunk.len() + fill, ")");
            let mut delete = statement(sql);
            for id in filled(chunk, fill) {
                delete = delete.bind(id.0.clone());
            }
            deleted += self.execute(delete).await?;
        }
        Ok(usize::try_from(deleted).unwrap_or(usize::MAX))
    }

    /// Takes up to `limit` rows that nobody has shown for `age`, or whose claim has run out. What was written, or is claimed
    /// until, later than can be is of a time when the clock was wrong, and as good as old.
    pub async fn claim_outbox(
        &mut self,
        claimant: &str,
        age: Duration,
        term: Duration,
        limit: i64,
    ) -> Result<Vec<(OutboxId, OutboxBody)>, SqlError> {
        let now = format!("({} / 1000)", clock_micros(self.engine()));
        let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let find = format!(
            "SELECT id, body FROM outbox WHERE (created < {now} - ? OR created > {now} + {FUTURE_MS}) \
             AND (claimed_until < {now} OR claimed_until > {now} + ?) ORDER BY id LIMIT ?"
        );
        let rows = self.fetch(statement(find).bind(millis(age)).bind(millis(term)).bind(limit)).await?;
        let mut claimed = Vec::new();
        for row in rows {
            let (id, body): (String, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            let claim = format!(
                "UPDATE outbox SET claimed_by = ?, claimed_until = {now} + ? WHERE id = ? \
                 AND (claimed_until < {now} OR claimed_until > {now} + ?)"
            );
            let claim = statement(claim).bind(claimant.to_owned()).bind(millis(term)).bind(id.clone()).bind(millis(term));
            if self.execute(claim).await? == 1 {
                let body = OutboxBody::decode(body.as_slice()).map_err(|error| corrupt("outbox.body", error))?;
                claimed.push((OutboxId(id), body));
            }
        }
        Ok(claimed)
    }

    /// Ends the claims on rows that this node could not show: nobody has to wait until they end by themselves.
    pub async fn release_claimed(&mut self, claimant: &str) -> Result<(), SqlError> {
        const SQL: &str = "UPDATE outbox SET claimed_until = 0 WHERE claimed_by = ?";
        self.execute(statement(SQL).bind(claimant.to_owned())).await.map(|_| ())
    }

    /// Deletes a row that this node has claimed and shown.
    pub async fn delete_claimed(&mut self, id: &OutboxId, claimant: &str) -> Result<(), SqlError> {
        const SQL: &str = "DELETE FROM outbox WHERE id = ? AND claimed_by = ?";
        self.execute(statement(SQL).bind(id.0.clone()).bind(claimant.to_owned())).await.map(|_| ())
    }

    /// Deletes the rows up to `until`: a generation raised since then has made void what they are about.
    pub async fn void_outbox(&mut self, until: Timestamp) -> Result<(), SqlError> {
        self.execute(statement("DELETE FROM outbox WHERE created <= ?").bind(until.0)).await.map(|_| ())
    }

    /// Deletes the rows up to `until`, if no shared cache is in use: the next one begins a new generation.
    pub async fn void_outbox_without_cache(&mut self, until: Timestamp) -> Result<u64, SqlError> {
        const SQL: &str =
            "DELETE FROM outbox WHERE created <= ? AND EXISTS (SELECT 1 FROM cluster WHERE id = 1 AND cache_identity = '')";
        self.execute(statement(SQL).bind(until.0)).await
    }

    /// Whether a row of before `until` is still there.
    pub async fn has_outbox_before(&mut self, until: Timestamp) -> Result<bool, SqlError> {
        let rows = self.fetch(statement("SELECT id FROM outbox WHERE created <= ? LIMIT 1").bind(until.0)).await?;
        Ok(!rows.is_empty())
    }

    pub async fn count_outbox(&mut self) -> Result<i64, SqlError> {
        let rows = self.fetch(statement("SELECT COUNT(*) FROM outbox")).await?;
        Ok(rows.first().map_or(Ok(0), |row| row.try_get(0))?)
    }
}
