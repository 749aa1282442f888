//! Puts together what operators may ask and order.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::admin::Admin;
use crate::api::moves::Moves;
use crate::api::presence::Presence;
use crate::api::rest::Rest;
use crate::app::assemble::Daemon;
use crate::app::lists;
use crate::app::reporting::Reporting;
use crate::config::Config;
use crate::engine::read::audit_log::AuditLog;
use crate::security::audit::Audit;

/// Starts counting users, too.
pub fn start(
    config: &Config,
    engine: &Daemon,
    audit: &Audit,
    presence: Presence,
    reporting: Reporting,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Rest {
    let admin = Admin {
        gateways: engine.gateways.clone(),
        digests: engine.digests.clone(),
        lives: engine.lives.clone(),
        audit: audit.clone(),
        lanes: engine.lanes.clone(),
        history: engine.history.clone(),
        moves: Moves { drains: engine.drains.clone(), audit: audit.clone() },
        metrics: engine.metrics.clone(),
        lists: lists::start(config, engine, tasks, stop),
        explaining: engine.explaining.clone(),
        peers: engine.peers.clone(),
    };
    Rest {
        admin: Arc::new(admin),
        presence: Arc::new(presence),
        lives: engine.lives.clone(),
        inboxes: engine.inboxes.clone(),
        audit_log: AuditLog::new(engine.database.clone()),
        reporter: reporting.reporter,
        listening: reporting.listening,
    }
}
