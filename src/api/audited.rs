//! What operators order is done to its end and taken down, also if the caller goes away meanwhile.

use tonic::Status;
use tonic::codegen::http::Extensions;

use crate::api::access;
use crate::api::status::status;
use crate::error::Error;
use crate::security::audit::Audit;
use crate::security::audit::Entry;

/// Does what was ordered in a task of its own, so that it is taken down even if nobody waits for it any more. `entry` says what
/// was ordered; `refusal`, of an outcome that is no error, why nothing was done.
///
/// # Errors
/// It could not be done, as the caller is told.
pub async fn audited<T: Send + 'static>(
    audit: &Audit,
    extensions: &Extensions,
    entry: Entry,
    refusal: fn(&T) -> Option<String>,
    order: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Status> {
    let Entry { who, role, from_addr, .. } = access::actor(extensions);
    let (audit, entry) = (audit.clone(), Entry { who, role, from_addr, ..entry });
    // Its owner is this call; what outlives the call ends with the deadlines of its statements.
    let done = tokio::spawn(async move {
        let done = order.await;
        let failure = match &done {
            Ok(outcome) => refusal(outcome),
            Err(error) => Some(error.to_string()),
        };
        audit.note(match failure {
            None => Entry { outcome: "ok", ..entry },
            Some(why) => {
                let reason = if entry.reason.is_empty() { why } else { format!("{}: {why}", entry.reason) };
                Entry { outcome: "failed", reason, ..entry }
            }
        });
        done
    });
    let done = done.await.unwrap_or_else(|_| Err(Error::internal("an operator's order was not finished")));
    done.map_err(|error| status(&error))
}

/// Of what is done, or an error.
pub fn never<T>(_: &T) -> Option<String> {
    None
}
