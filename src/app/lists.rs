//! What operators ask of all users, and who counts them.

use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::lists::Lists;
use crate::app::assemble::Daemon;
use crate::app::settings;
use crate::app::upkeep;
use crate::config::Config;
use crate::engine::presence::census::Census;
use crate::engine::presence::census::Tallies;
use crate::engine::presence::online::Online;
use crate::engine::presence::preview::Previews;

/// Starts counting, too.
pub fn start(config: &Config, engine: &Daemon, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Arc<Lists> {
    let (database, lives) = (engine.database.clone(), engine.lives.clone());
    let census = Census::new(database.clone(), lives.clone(), engine.metrics.clone(), &engine.own.incarnation);
    tasks.spawn(upkeep::keep_counting(census, stop.clone()));
    let online = Arc::new(Online::new(database, engine.directory.clone(), lives.clone()));
    Arc::new(Lists {
        tallies: Tallies::new(online.clone()),
        previews: Previews::new(online.clone(), settings::policy(config).on_overflow),
        online,
        lanes: engine.lanes.clone(),
        lives,
        watches: engine.watches.clone(),
        streams: engine.streams.clone(),
        node_id: engine.own.node_id.clone(),
    })
}
