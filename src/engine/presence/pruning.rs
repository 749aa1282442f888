//! Removes history that is too old, or too long: by one node at a time, some rows at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use crate::engine::read::lives::Lives;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;

/// How often there is something to remove.
pub const PRUNE_INTERVAL: Duration = Duration::from_secs(60);
const TERM: Duration = Duration::from_secs(30);
/// Rests between statements, so that others come first.
const REST: Duration = Duration::from_millis(20);

pub struct Pruning {
    slot: ConnectionSlot,
    lives: Arc<Lives>,
    claimant: String,
    keep: Duration,
    /// Lines of one user.
    keep_rows: i64,
    /// Where the search for users with too many lines goes on.
    long_logs_from: i64,
}

impl Pruning {
    pub fn new(database: Arc<Database>, lives: Arc<Lives>, claimant: &str, keep: Duration, keep_rows: i64) -> Self {
        let slot = ConnectionSlot::new(database);
        Self { slot, lives, claimant: claimant.to_owned(), keep, keep_rows, long_logs_from: 0 }
    }

    /// Removes what is too old, unless the clock cannot be believed, and shortens some logs.
    pub async fn step(&mut self) -> Result<(), SqlError> {
        const JOB: &str = "history";
        let mut connection = self.slot.take().await?;
        while self.lives.clock.is_steady()
            && connection.claim_job(JOB, &self.claimant, TERM).await?
            && connection.prune_history(self.keep).await?
        {
            sleep(REST).await;
        }
        if connection.claim_job(JOB, &self.claimant, TERM).await? {
            let next = connection.prune_long_logs(self.long_logs_from, self.keep_rows).await?;
            self.long_logs_from = next.unwrap_or(0);
        }
        self.slot.give_back(connection);
        Ok(())
    }
}
