//! A client library for gateways ([`gateway`]) and for message services ([`caller`]). A user of the gRPC API like any other:
//! what it does can be done in any language.

pub mod caller;
mod connections;
mod contacts;
mod dialogue;
mod digest;
mod event;
pub mod fields;
pub mod gateway;
mod idleness;
mod life;
mod pauses;
mod rendezvous;
pub mod security;
mod tour;
pub mod watch;
mod watched;

use std::time::Duration;
use std::time::Instant;

/// No address, or none that makes sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{of} must be host:port, not {address:?}")]
pub struct InvalidAddress {
    of: &'static str,
    address: String,
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

/// So long, more or less: clients that lost the same node must not come back at the same instant.
fn jittered(base: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    base.mul_f64(0.5 + random as f64 / 1_000.0)
}
