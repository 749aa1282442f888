//! The protocols: gRPC for gateways and services, HTTP for operators. They translate and decide nothing.

pub mod admin;
pub mod convert;
pub mod delivery;
pub mod gateway;
pub mod http;
pub mod listen;
pub mod presence;
pub mod status;
