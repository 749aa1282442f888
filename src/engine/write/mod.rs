//! Change a user. [`lanes`] queues the change, a lane commits it with others, its projector shows it to the outside
//! ([`publisher`]), and [`repair`] what was left behind.

pub mod busiest;
pub mod change;
pub mod health;
pub mod inbox_queue;
mod lane;
pub mod lanes;
pub mod projection;
pub mod publisher;
pub mod rate;
pub mod repair;
mod transaction;
mod work;
