//! File descriptors: each connection is one, and what the node needs for itself must not be used up by clients.

use nix::sys::resource::Resource;
use nix::sys::resource::getrlimit;
use nix::sys::resource::setrlimit;
use tracing::warn;

use crate::api::listen;
use crate::app::admin_port;
use crate::config::Config;
use crate::engine::messages::inbox;
use crate::engine::overview::check::FileLimit;
use crate::engine::presence::history;

/// Standard streams, listeners, event queues, Redis, other nodes, files of the database.
const OTHERS: u64 = 96;
/// A node serves at least so many clients, whatever the limit.
const FEWEST_CONNECTIONS: usize = 16;

/// Raises the process's limit as far as it may go, and returns what fits into it beside what the node keeps for itself.
pub fn limit(config: &Config) -> FileLimit {
    let wanted = config.presence_service.max_connections;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return FileLimit { limit: u64::MAX, wanted, fits: wanted };
    };
    let limit = if setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    let store = config.store.connections as usize + 2 * config.store.lanes + inbox::READERS + history::READERS;
    let waiting = listen::MAX_NEWCOMERS + admin_port::MAX_NEWCOMERS + admin_port::MAX_CONNECTIONS;
    let left = limit.saturating_sub(OTHERS + (store + waiting) as u64);
    let fits = usize::try_from(left).unwrap_or(usize::MAX).max(FEWEST_CONNECTIONS);
    FileLimit { limit, wanted, fits }
}

/// How many client connections are taken: as many as are configured, or fewer.
pub fn max_connections(config: &Config) -> usize {
    let FileLimit { limit, wanted, fits } = limit(config);
    if fits < wanted {
        warn!(
            limit,
            "presence_service.max_connections = {wanted} does not fit into this process's limit of open files: it is {fits} \
             now; raise the limit (ulimit -n, LimitNOFILE)"
        );
    }
    fits.min(wanted)
}
