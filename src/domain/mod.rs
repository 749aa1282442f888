//! The rules of presence, pure: no IO, no clock, no wire types. They take the time as an argument and fail with values.

pub mod allocation;
pub mod caller;
pub mod digest;
pub mod doubt;
pub mod drain;
pub mod event;
pub mod explanation;
pub mod gateway;
pub mod history;
pub mod id;
pub mod inbox;
pub mod policy;
pub mod rebalancing;
pub mod route;
pub mod session;
pub mod status;
pub mod time;
pub mod top;
pub mod user;
