//! The protocols: gRPC for gateways and services, HTTP for operators. They translate and decide nothing.

pub mod access;
pub mod admin;
pub mod allocation;
pub mod answer;
pub mod attach;
pub mod binder;
pub mod body;
pub mod contents;
pub mod convert;
pub mod credential;
pub mod delivery;
mod digests;
pub mod explain;
pub mod gateway;
pub mod http;
pub mod listen;
pub mod lists;
pub mod moves;
pub mod node;
pub mod presence;
pub mod queries;
pub mod room;
pub mod status;
pub mod statuses;
pub mod transport;
mod users;
pub mod watch;
