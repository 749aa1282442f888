//! Who lives: [`registry`] gives lives out, [`heartbeats`] extends them, [`reaper`] notices their end, [`sweep`] removes the
//! routes that are left; [`allocation`] says where users should go.

pub mod allocation;
pub mod attaching;
pub mod heartbeats;
pub mod reaper;
pub mod registry;
pub mod sweep;
pub mod tally;
