//! Work that one node at a time does: a claim that ends by itself.

use std::time::Duration;

use crate::store::column::clock_micros;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::unless_there;

/// No job is claimed for longer.
const LONGEST_MS: i64 = 60_000;
/// The clock counts microseconds, and what is stored is rounded to the next millisecond: a claim of this instant ends that much
/// later than it can.
const ROUNDING_MS: i64 = 1;
/// Stands where a process's name would, when a job is done for good.
const DONE: &str = "done";
/// Nodes of the last release know no such mark: for them it is a claim that ends in the year 3000.
const FOR_EVER_MS: i64 = 32_503_680_000_000;

impl Connection {
    /// Takes or extends the claim of `claimant`, a process, on `job`. False: another has it, or it is done for good. A claim
    /// that ends later than any can was made when the clock was wrong.
    pub async fn claim_job(&mut self, job: &str, claimant: &str, term: Duration) -> Result<bool, SqlError> {
        let now = format!("({} / 1000)", clock_micros(self.engine()));
        let unless_there = unless_there(self.engine(), "name");
        let insert = format!("INSERT INTO jobs (name, node_id, until) VALUES (?, '', 0){unless_there}");
        let claim = format!(
            "UPDATE jobs SET node_id = ?, until = {now} + ? WHERE name = ? \
             AND node_id <> '{DONE}' AND (node_id = ? OR until < {now} OR until > {now} + {LONGEST_MS} + {ROUNDING_MS})"
        );
        let term = i64::try_from(term.as_millis()).unwrap_or(i64::MAX);
        let claim = statement(claim).bind(claimant.to_owned()).bind(term).bind(job.to_owned()).bind(claimant.to_owned());
        self.execute(statement(insert).bind(job.to_owned())).await?;
        Ok(self.execute(claim).await? == 1)
    }

    /// Nobody has to do `job` again, nor any other whose name begins with `family`: those are forgotten.
    pub async fn finish_job(&mut self, job: &str, family: &str) -> Result<(), SqlError> {
        let finish = format!("UPDATE jobs SET node_id = '{DONE}', until = {FOR_EVER_MS} WHERE name = ?");
        self.execute(statement(finish).bind(job.to_owned())).await?;
        const FORGET: &str = "DELETE FROM jobs WHERE name LIKE ? AND name <> ?";
        self.execute(statement(FORGET).bind(format!("{family}%")).bind(job.to_owned())).await.map(|_| ())
    }
}
