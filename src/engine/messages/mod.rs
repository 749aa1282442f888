//! Reach a user: [`delivery`] by the ways of [`outlets`], [`inbox`] for those who are not there, [`kicks`] for gateways.

pub mod acks;
pub mod delivery;
pub mod dispatch;
pub mod figures;
pub mod inbox;
pub mod kicks;
pub mod message;
pub mod outlets;
mod parcel;
pub mod peers;
pub mod streams;
pub mod turns;
