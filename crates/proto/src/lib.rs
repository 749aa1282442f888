//! The wire types and services, generated from `proto/`. `Result` and `Status` shadow well-known names: import by name.

pub mod codec;

tonic::include_proto!("mpim");

/// Every file of `proto/`, encoded: for gRPC reflection and for printing messages as proto3 JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
