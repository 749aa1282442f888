//! Who lives: [`registry`] gives lives out, [`heartbeats`] extends them, [`reaper`] notices their end, [`sweep`] removes the
//! routes that are left, [`digests`] those that no gateway holds; [`allocation`] says where users should go, [`drains`] takes orders to
//! move them, [`drain_run`] carries them out.

pub mod allocation;
pub mod attaching;
pub mod destinations;
pub mod digests;
pub mod drain_run;
pub mod drains;
pub mod heartbeats;
pub mod holdings;
pub mod moving;
pub mod reaper;
pub mod rebalance;
pub mod registry;
pub mod sweep;
pub mod tally;
pub mod verdict;
