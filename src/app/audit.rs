//! Writes the audit to SQL.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::interval;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::security::audit::Entry;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;

/// Rows of the audit in one statement, and how long to wait before one that failed is tried again.
const ROWS_AT_ONCE: usize = 64;
const AUDIT_RETRY: Duration = Duration::from_secs(1);
const PRUNE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Writes the audit's rows, the last ones at shutdown, and removes those that are too old.
pub async fn keep_writing(
    mut rows: mpsc::Receiver<Entry>,
    database: Arc<Database>,
    node_id: String,
    keep: Duration,
    stop: CancellationToken,
) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let (mut slot, mut batch, mut seq) = (ConnectionSlot::new(database), Vec::new(), 0);
    let mut prune = interval(PRUNE_INTERVAL);
    loop {
        tokio::select! {
            biased;
            received = rows.recv_many(&mut batch, ROWS_AT_ONCE), if batch.is_empty() => if received == 0 { return },
            () = stop.cancelled() => return,
            _ = prune.tick(), if !keep.is_zero() => {
                if let Err(error) = prune_audit(&mut slot, keep).await {
                    warn!(%error, "old rows of the audit were not removed; next try in {PRUNE_INTERVAL:?}");
                }
            }
        }
        let mut at_once = ROWS_AT_ONCE;
        while !batch.is_empty() {
            let rows = &batch[..at_once.min(batch.len())];
            match add_audit(&mut slot, &node_id, seq, rows).await {
                Ok(()) => {
                    let written = rows.len();
                    seq += i64::try_from(written).unwrap_or(i64::MAX);
                    batch.drain(..written);
                }
                Err(error @ SqlError::Failed(_)) if at_once == 1 => {
                    warn!(%error, "a row of the audit cannot be stored; the log has it");
                    batch.remove(0);
                }
                Err(SqlError::Failed(_)) => at_once = 1, // about one of them: the others must not wait for it
                Err(error) => {
                    warn!(%error, "rows of the audit wait for the database; the log has them");
                    if stop.run_until_cancelled(sleep(AUDIT_RETRY)).await.is_none() {
                        return;
                    }
                }
            }
        }
    }
}

async fn add_audit(slot: &mut ConnectionSlot, node_id: &str, seq: i64, rows: &[Entry]) -> Result<(), SqlError> {
    let mut connection = slot.take().await?;
    connection.add_audit(node_id, seq, rows).await?;
    slot.give_back(connection);
    Ok(())
}

async fn prune_audit(slot: &mut ConnectionSlot, keep: Duration) -> Result<(), SqlError> {
    let mut connection = slot.take().await?;
    while connection.prune_audit(keep).await? {}
    slot.give_back(connection);
    Ok(())
}
