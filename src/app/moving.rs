//! Puts together what moves users.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::settings;
use crate::app::upkeep;
use crate::config::Config;
use crate::engine::gateways::drain_run::Executor;
use crate::engine::gateways::drains::Drains;
use crate::engine::gateways::moving::Mover;
use crate::engine::messages::kicks::Kicks;
use crate::engine::messages::outlets::Outlets;
use crate::engine::read::lives::Lives;
use crate::engine::write::lanes::Lanes;
use crate::metrics::Metrics;
use crate::store::cluster::NodeName;
use crate::store::database::Database;

/// Starts to carry out what is ordered, too.
pub fn start(
    config: &Config,
    own: &NodeName,
    (database, lives, metrics): (Arc<Database>, Arc<Lives>, Arc<Metrics>),
    (lanes, outlets, kicks): (Arc<Lanes>, Arc<Outlets>, Arc<Kicks>),
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Arc<Drains> {
    let (node_id, claimant) = (own.node_id.clone(), own.incarnation.clone());
    let (rooms, settings) = (settings::rooms(config), settings::moving(config));
    let mover = Arc::new(Mover { node_id, claimant, database, lives, lanes, outlets, kicks, metrics, rooms, settings });
    tasks.spawn(upkeep::keep_draining(Executor::new(mover.clone(), stop.clone()), stop.clone()));
    Arc::new(Drains { mover })
}
