//! Who lives: [`registry`] gives lives out, [`heartbeats`] extends them, [`reaper`] notices their end, [`sweep`] removes the
//! routes that are left.

pub mod attaching;
pub mod heartbeats;
pub mod reaper;
pub mod registry;
pub mod sweep;
