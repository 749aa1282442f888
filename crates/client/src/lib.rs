//! A client library for gateways ([`gateway`]) and for message services ([`caller`]). A user of the gRPC API like any other:
//! what it does can be done in any language.

pub mod caller;
mod connections;
mod event;
pub mod fields;
pub mod gateway;
mod life;

use std::time::Duration;

use tonic::transport::Channel;
use tonic::transport::Endpoint;

/// A connection to a node that is made when it is needed.
fn channel(node: &str, timeout: Duration) -> Result<Channel, InvalidAddress> {
    let endpoint = Endpoint::from_shared(format!("http://{node}"));
    let endpoint = endpoint.map_err(|_| InvalidAddress { of: "a node", address: node.to_owned() })?;
    let endpoint = endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE_LIMIT);
    Ok(endpoint.connect_timeout(timeout).tcp_nodelay(true).connect_lazy())
}

/// A node that is gone without a word is noticed after both.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(5);

/// No address, or none that makes sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{of} must be host:port, not {address:?}")]
pub struct InvalidAddress {
    of: &'static str,
    address: String,
}

/// So long, more or less: clients that lost the same node must not come back at the same instant.
fn jittered(base: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    base.mul_f64(0.5 + random as f64 / 1_000.0)
}
