//! Gateways that register, beat, and die.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

use crate::harness::node::Node;

/// With a lease of five beats: nobody who beats looks late, and the dead need not be waited for long.
const BEAT: Duration = Duration::from_secs(1);
pub const LEASE: Duration = Duration::from_secs(5);
/// The settings that go with it.
pub const LEASES: [(&str, &str); 3] =
    [("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "5000"), ("GATEWAY__STREAM_GRACE", "1000")];

/// A gateway that beats until it is dropped, or dies.
pub struct Gateway {
    pub epoch: u64,
    /// When its lease ends, as far as it was told last.
    lease_end: Arc<Mutex<Instant>>,
    stop: CancellationToken,
    beating: JoinHandle<()>,
}

impl Gateway {
    pub async fn register(node: &Node, addr: &str) -> Self {
        let mut client = gateways(node);
        let request = pb::RegisterGatewayReq { gateway_addr: addr.to_owned(), ..Default::default() };
        let registered = client.register_gateway(request).await.expect("a registration").into_inner();
        let (epoch, gateway_addr) = (registered.gateway_epoch, addr.to_owned());
        let lease_end = Arc::new(Mutex::new(Instant::now()));
        let (end, stop) = (lease_end.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let beating = tokio::spawn(async move {
            while !stopped.is_cancelled() {
                let beat = pb::HeartbeatReq { gateway_addr: gateway_addr.clone(), gateway_epoch: epoch, ..Default::default() };
                if let Ok(answer) = client.heartbeat(beat).await {
                    let left = Duration::from_millis(answer.into_inner().lease_ms.into());
                    *end.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + left;
                }
                stopped.run_until_cancelled(tokio::time::sleep(BEAT)).await;
            }
        });
        Self { epoch, lease_end, stop, beating }
    }

    /// Sends no further beat, and returns when the lease ends. The answer to the last beat is waited for: a beat that is
    /// recorded and not answered would extend the lease unseen.
    pub async fn fall_silent(mut self) -> Instant {
        self.stop.cancel();
        (&mut self.beating).await.expect("the last beat");
        *self.lease_end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn gateways(node: &Node) -> GatewayServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{}", node.data)).expect("an address");
    GatewayServiceClient::new(endpoint.connect_lazy())
}
