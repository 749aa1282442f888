//! The loops that repeat the engine's steps. Each ends at shutdown; if one panics, the node stops.

use std::sync::Arc;

use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use tracing::warn;

use crate::engine::gateways::drain_run;
use crate::engine::gateways::drain_run::Executor;
use crate::engine::gateways::reaper::Reaper;
use crate::engine::gateways::sweep::CENSUS_INTERVAL;
use crate::engine::gateways::sweep::SWEEP_INTERVAL;
use crate::engine::gateways::sweep::Sweep;
use crate::engine::messages::inbox::Inboxes;
use crate::engine::messages::inbox::LOOK_INTERVAL;
use crate::engine::presence::census;
use crate::engine::presence::census::Census;
use crate::engine::presence::pruning::PRUNE_INTERVAL;
use crate::engine::presence::pruning::Pruning;
use crate::engine::presence::status_ends;
use crate::engine::presence::status_ends::StatusEnds;
use crate::engine::write::repair::REPAIR_INTERVAL;
use crate::engine::write::repair::Repair;
use crate::engine::write::repair::log_repair;

pub async fn keep_watching(mut watch: Reaper, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    while stop.run_until_cancelled(sleep(watch.pause())).await.is_some() {
        stop.run_until_cancelled(watch.step()).await;
    }
}

pub async fn keep_tidy(mut sweep: Sweep, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let (mut ticks, mut census) = (interval(SWEEP_INTERVAL), interval(CENSUS_INTERVAL));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let done = tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => stop.run_until_cancelled(sweep.step()).await.map(|done| done.map(|_| ())),
            _ = census.tick() => stop.run_until_cancelled(sweep.census()).await,
        };
        if let Some(Err(error)) = done {
            warn!(%error, "tidying up failed; next try in {SWEEP_INTERVAL:?}");
        }
    }
}

pub async fn keep_looking(inboxes: Arc<Inboxes>, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(inboxes.look()).await {
            warn!(%error, "looking for stored messages failed; next try in {LOOK_INTERVAL:?}");
        }
    }
}

pub async fn keep_ending_statuses(mut ends: StatusEnds, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(status_ends::LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(ends.step()).await {
            debug!(%error, "statuses whose time is over cannot be ended yet");
        }
    }
}

pub async fn keep_draining(mut drains: Executor, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(drain_run::LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(drains.step()).await {
            debug!(%error, "drains cannot be looked at");
        }
    }
    drains.finish().await;
}

pub async fn keep_pruning(mut pruning: Pruning, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(PRUNE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(pruning.step()).await {
            warn!(%error, "old history cannot be removed; next try in {PRUNE_INTERVAL:?}");
        }
    }
}

pub async fn keep_counting(mut census: Census, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(census::LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        if let Some(Err(error)) = stop.run_until_cancelled(census.step()).await {
            debug!(%error, "who is online cannot be counted yet");
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
