//! Who lives: [`registry`] gives lives out, [`heartbeats`] extends them, [`reaper`] notices their end, [`sweep`] removes the
//! routes that are left, [`digests`] those that no gateway holds.

pub mod attaching;
pub mod digests;
pub mod heartbeats;
pub mod holdings;
pub mod reaper;
pub mod registry;
pub mod sweep;
