//! Work that one node at a time does: a claim that ends by itself.

use std::time::Duration;

use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::users::clock_micros;

impl Connection {
    /// Takes or extends the claim of `node_id` on `job`. False: another node has it.
    pub async fn claim_job(&mut self, job: &str, node_id: &str, term: Duration) -> Result<bool, SqlError> {
        let now = format!("({} / 1000)", clock_micros(self.engine()));
        let insert = match self.engine() {
            Engine::MySql => "INSERT INTO jobs (name, node_id, until) VALUES (?, '', 0) ON DUPLICATE KEY UPDATE name = name",
            Engine::Sqlite => "INSERT INTO jobs (name, node_id, until) VALUES (?, '', 0) ON CONFLICT DO NOTHING",
        };
        let claim = format!("UPDATE jobs SET node_id = ?, until = {now} + ? WHERE name = ? AND (node_id = ? OR until < {now})");
        let term = i64::try_from(term.as_millis()).unwrap_or(i64::MAX);
        let claim = statement(claim).bind(node_id.to_owned()).bind(term).bind(job.to_owned()).bind(node_id.to_owned());
        self.execute(statement(insert).bind(job.to_owned())).await?;
        Ok(self.execute(claim).await? == 1)
    }
}
