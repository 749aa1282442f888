//! The product: one write path ([`lanes`]), one read path ([`directory`]), and what keeps the two consistent ([`cache`]).
//!
//! Order of the files: `rate`, `turns`, `write_health`, `cache`, `lives`, `streams`, `acks`, `hints`, `peers`, `l2`,
//! `outlets`, `kicks`, `loads`, `loader`, `directory`, `projection`, `gateways`, `attaching`, `heartbeats`, `watch`, `warm_up`,
//! `transaction`, `lane` with `lanes`, `sweep`, `delivery`, `inbox`.

pub mod acks;
pub mod attaching;
pub mod cache;
pub mod delivery;
pub mod directory;
pub mod gateways;
pub mod heartbeats;
pub mod hints;
pub mod inbox;
pub mod kicks;
pub mod l2;
mod lane;
pub mod lanes;
pub mod lives;
pub mod loader;
pub mod loads;
pub mod outlets;
pub mod peers;
pub mod projection;
pub mod rate;
pub mod streams;
pub mod sweep;
mod transaction;
pub mod turns;
pub mod warm_up;
pub mod watch;
pub mod write_health;
