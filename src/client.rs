//! A client library for gateways ([`gateway`]) and for message services ([`caller`]). A plain user of the gRPC API: what it
//! does, others can do in any language.

pub mod caller;
pub mod gateway;

use std::time::Duration;

use tonic::transport::Channel;
use tonic::transport::Endpoint;

/// A connection to a node that is made when it is needed.
fn channel(node: &str, timeout: Duration) -> Result<Channel, InvalidNode> {
    let endpoint = Endpoint::from_shared(format!("http://{node}")).map_err(|_| InvalidNode(node.to_owned()))?;
    Ok(endpoint.connect_timeout(timeout).tcp_nodelay(true).http2_keep_alive_interval(KEEPALIVE).connect_lazy())
}

/// A node that is gone without a word is noticed after this and hyper's own time-out for the answer.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Not `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a node must be host:port, not {0:?}")]
pub struct InvalidNode(String);

/// So long, more or less: clients that lost the same node must not come back at the same instant.
fn jittered(base: Duration) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 1_000;
    base.mul_f64(0.5 + random as f64 / 1_000.0)
}
