//! What operators order is done to its end, and taken down, also if they go away meanwhile.

use crate::error::Error;
use crate::security::audit::Audit;
use crate::security::audit::Entry;

/// Carries an order out, and takes down who gave it and whether it could be done. The task ends with the order.
///
/// # Errors
/// What it ended with.
pub async fn carry_out<T: Send + 'static>(
    audit: &Audit,
    entry: Entry,
    order: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let audit = audit.clone();
    let task = tokio::spawn(async move {
        let done = order.await;
        audit.note(match &done {
            Ok(_) => Entry { outcome: "ok", ..entry },
            Err(error) => Entry { outcome: "failed", reason: format!("{} {error}", entry.reason), ..entry },
        });
        done
    });
    task.await.unwrap_or_else(|_| Err(Error::internal("an operator's order has broken off")))
}
