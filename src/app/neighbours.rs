//! Other stores on the same Redis. Nodes of two stores would mix their keys, and their gateways' messages. A node with an
//! embedded database is easily started in the wrong place, so it looks first. Several nodes on one database may already serve
//! people when such a neighbour comes: they warn, count, and go on.

use std::time::Duration;

use tokio::time::Instant;
use tokio::time::timeout_at;

use crate::app::StartError;
use crate::store::bus::Bus;
use crate::store::shared::Owner;
use crate::store::shared::SharedCache;

/// How long a Redis may take to say whose it is. One that does not answer is nobody's.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// How long to listen for beats, which every node sends once a second.
const LISTEN_FOR: Duration = Duration::from_millis(1_300);

/// # Errors
/// When nodes of another store are there.
pub async fn must_not_be(store_id: &str, cache: Option<&SharedCache>, bus: Option<&Bus>) -> Result<(), StartError> {
    if let Some(cache) = cache
        && let Ok(Owner::Another(store)) = cache.claim(ASK_LIMIT).await
    {
        return Err(StartError::CacheTaken { store });
    }
    match bus {
        Some(bus) => nobody_speaks(store_id, bus).await,
        None => Ok(()),
    }
}

async fn nobody_speaks(store_id: &str, bus: &Bus) -> Result<(), StartError> {
    let Ok(Ok(mut subscription)) = timeout_at(Instant::now() + ASK_LIMIT, bus.listen()).await else { return Ok(()) };
    let until = Instant::now() + LISTEN_FOR;
    while let Ok(Some(hint)) = timeout_at(until, subscription.next()).await {
        if hint.store_id() != store_id {
            return Err(StartError::ChannelsTaken { store: hint.store_id().to_owned() });
        }
    }
    Ok(())
}
