//! Other stores on the same Redis. Nodes of two stores would mix their keys, and their gateways' messages. A node with an
//! embedded database is easily started in the wrong place, so it looks first. Several nodes on one database may already serve
//! people when such a neighbour comes: they warn, count, and go on.
//!
//! Two processes with one `node_id` would take each other's messages for their own. The newer one does not start.

use std::time::Duration;

use tokio::time::Instant;
use tokio::time::sleep;
use tokio::time::timeout_at;
use tracing::warn;

use crate::api::node::who_answers;
use crate::app::StartError;
use crate::client::security::Security;
use crate::engine::gateways::reaper::NODE_TERM;
use crate::engine::overview::doctor::START;
use crate::security::audit::Entry;
use crate::store::bus::Bus;
use crate::store::cluster::Claim;
use crate::store::cluster::NodeName;
use crate::store::connection::Purpose;
use crate::store::database::Database;
use crate::store::shared::Owner;
use crate::store::shared::SharedCache;

/// How long a Redis may take to say whose it is. One that does not answer is nobody's.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// How long to listen for beats, which every node sends once a second.
const LISTEN_FOR: Duration = Duration::from_millis(1_300);

/// Between looks whether a process of this name still says that it is there.
const TWIN_INTERVAL: Duration = Duration::from_millis(250);

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

/// Takes the node's name, once nobody has used it for [`NODE_TERM`]: a process that was killed is not waited for longer.
///
/// # Errors
/// When another process with this name lives.
pub async fn must_not_be_twins(own: &NodeName, database: &Database) -> Result<(), StartError> {
    let mut first_seen = None;
    loop {
        let claimed = async {
            let mut connection = database.connect(Purpose::General).await?;
            connection.claim_node(own, NODE_TERM).await
        };
        match claimed.await.map_err(|error| StartError::Store(error.into()))? {
            Claim::Taken => return Ok(()),
            Claim::InUse { addr, seen_at } if first_seen.is_some_and(|first| seen_at > first) => {
                leave_word(own, database, &addr).await;
                return Err(StartError::Twin { node_id: own.node_id.clone(), other: addr, own: own.addr.clone() });
            }
            Claim::InUse { seen_at, .. } => first_seen = first_seen.or(Some(seen_at)),
        }
        sleep(TWIN_INTERVAL).await;
    }
}

/// So that operators of the other process hear of this one, which does not start.
async fn leave_word(own: &NodeName, database: &Database, other: &str) {
    let reason = format!("a process at {} has the same node_id as the node at {other}: it did not start", own.addr);
    let entry = Entry { action: START.to_owned(), target: own.node_id.clone(), outcome: "failed", reason, ..Entry::default() };
    if let Ok(mut connection) = database.connect(Purpose::General).await {
        let _ = connection.add_audit(&own.node_id, std::process::id().into(), &[entry]).await; // the log has it, too
    }
}

/// Calls this node by the address that others are told, and warns if they would not reach it.
pub async fn call_oneself(own: NodeName, store_id: String, security: Security) {
    match who_answers(&own.addr, &store_id, &security).await {
        Ok(incarnation) if incarnation == own.incarnation => {}
        Ok(_) => warn!("at {}, where other nodes are told to find this one, another answers: see advertise", own.addr),
        Err(why) => warn!("at {}, where other nodes are told to find this one, nobody answers ({why}): see advertise", own.addr),
    }
}
