//! For message services: query and deliver, on whichever node answers.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use tokio::time::sleep;
use tonic::Code;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::transport::Channel;
use tonic_types::StatusExt;

use crate::client::InvalidNode;
use crate::client::channel;
use crate::client::jittered;
use crate::pb;
use crate::pb::presence_service_client::PresenceServiceClient;

/// 2,000 users with all their routes may be larger than tonic's 4 MiB.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;
/// Before another try, if the node did not say when.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Calls nodes in turn. A call that a node could not serve is made again, on the next one, as long as there is time.
pub struct Caller {
    nodes: Vec<PresenceServiceClient<Channel>>,
    next: AtomicUsize,
    timeout: Duration,
}

impl Caller {
    /// `nodes`: `host:port` of each. `timeout`: of a call with all its retries. Connects when it is used.
    ///
    /// # Errors
    /// An address makes no sense, or there is none.
    pub fn new(nodes: &[&str], timeout: Duration) -> Result<Self, InvalidNode> {
        if nodes.is_empty() {
            return Err(InvalidNode(String::new()));
        }
        let clients = nodes.iter().map(|node| {
            let client = PresenceServiceClient::new(channel(node, timeout)?);
            Ok(client.max_decoding_message_size(MAX_ANSWER_BYTES))
        });
        Ok(Self { nodes: clients.collect::<Result<_, _>>()?, next: AtomicUsize::new(0), timeout })
    }

    /// Where a user is.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn query(&self, request: pb::QueryRouteReq) -> Result<pb::QueryRouteResp, Status> {
        self.call(&request, async |client, request| client.query_route(request).await).await
    }

    /// Where many users are.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn query_many(&self, request: pb::BatchQueryRouteReq) -> Result<pb::BatchQueryRouteResp, Status> {
        self.call(&request, async |client, request| client.batch_query_route(request).await).await
    }

    /// Delivers a message. With a `message_id`, a retry is no second message for receivers that drop repeats.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn deliver(&self, request: pb::DeliverReq) -> Result<pb::DeliverResp, Status> {
        self.call(&request, async |client, request| client.deliver(request).await).await
    }

    /// Delivers a message to many users.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn deliver_many(&self, request: pb::BatchDeliverReq) -> Result<pb::BatchDeliverResp, Status> {
        self.call(&request, async |client, request| client.batch_deliver(request).await).await
    }

    async fn call<Q: Clone, A>(
        &self,
        request: &Q,
        call: impl AsyncFn(&mut PresenceServiceClient<Channel>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Status> {
        let began = Instant::now();
        loop {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            let mut client = self.nodes[turn % self.nodes.len()].clone();
            let mut attempt = Request::new(request.clone());
            attempt.set_timeout(self.timeout.saturating_sub(began.elapsed()));
            let status = match call(&mut client, attempt).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => status,
            };
            let pause = jittered(retry_after(&status));
            if !is_worth_a_retry(&status) || began.elapsed() + pause >= self.timeout {
                return Err(status);
            }
            sleep(pause).await;
        }
    }
}

/// The node could not, another one or a later moment may; or the connection broke.
fn is_worth_a_retry(status: &Status) -> bool {
    let broken = std::error::Error::source(status).is_some_and(|cause| cause.is::<tonic::transport::Error>());
    broken || matches!(status.code(), Code::Unavailable | Code::ResourceExhausted)
}

fn retry_after(status: &Status) -> Duration {
    status.get_details_retry_info().and_then(|info| info.retry_delay).unwrap_or(RETRY_AFTER)
}
