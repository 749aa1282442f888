//! The loops behind the engine's steps, too short to be wrong. Each ends at shutdown; one that panics stops the node.

use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::engine::expiry::CENSUS_INTERVAL;
use crate::engine::expiry::EXPIRY_INTERVAL;
use crate::engine::expiry::Expiry;
use crate::engine::lives::LivesPoll;
use crate::engine::lives::POLL_INTERVAL;
use crate::engine::projection::REPAIR_INTERVAL;
use crate::engine::projection::Repair;
use crate::engine::projection::log_repair;

pub async fn keep_polling(mut poll: LivesPoll, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        stop.run_until_cancelled(poll.step()).await;
    }
}

pub async fn keep_tidy(mut expiry: Expiry, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let (mut ticks, mut census) = (interval(EXPIRY_INTERVAL), interval(CENSUS_INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let done = tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => stop.run_until_cancelled(expiry.step()).await.map(|done| done.map(|_| ())),
            _ = census.tick() => stop.run_until_cancelled(expiry.census()).await,
        };
        if let Some(Err(error)) = done {
            warn!(%error, "tidying up failed; next try in {EXPIRY_INTERVAL:?}");
        }
    }
}

pub async fn keep_repairing(mut repair: Repair, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(REPAIR_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(done) = stop.run_until_cancelled(repair.step()).await {
            log_repair(done);
        }
    }
}
