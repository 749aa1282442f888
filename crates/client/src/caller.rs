//! For message services: query, deliver, watch, statuses and allocations, on whichever node answers.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::presence_service_client::PresenceServiceClient;
use tokio::time::sleep;
use tonic::Code;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::metadata::AsciiMetadataValue;
use tonic_types::StatusExt;

use crate::InvalidAddress;
use crate::jittered;
use crate::rendezvous;
use crate::security::Link;
use crate::security::Security;
use crate::tour::Tour;
use crate::watch::Watch;
use crate::watch::WatchError;

/// 2,000 users with all their routes may be larger than tonic's 4 MiB.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;
/// Before another try, if the node did not say when.
const RETRY_AFTER: Duration = Duration::from_millis(50);
/// For so long a node that could not be reached is asked only if there is no better one: from, to. As many times what it took
/// to find out, so that waiting for a silent node stays the exception.
const AVOIDED_FOR: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
const AVOIDED_TIMES: u32 = 4;

tokio::task_local! {
    static TRACEPARENT: AsciiMetadataValue;
}

/// Does `work`, and makes its calls part of the caller's trace: nodes and gateways go on from there. `traceparent`: as W3C Trace
/// Context has it; what cannot be a header is left out.
pub async fn traced<T>(traceparent: &str, work: impl Future<Output = T>) -> T {
    match AsciiMetadataValue::try_from(traceparent) {
        Ok(traceparent) => TRACEPARENT.scope(traceparent, work).await,
        Err(_) => work.await,
    }
}

/// Calls about one user go to that user's node ([`Caller::home_of`]), others to each node in turn. A call that a node could not
/// serve is made again, on the next one, as long as there is time.
pub struct Caller {
    /// First those of the own zone.
    nodes: Vec<Node>,
    near: usize,
    next: AtomicUsize,
    timeout: Duration,
}

struct Node {
    addr: String,
    link: Link,
    client: PresenceServiceClient<Link>,
    avoided_until: Mutex<Instant>,
}

impl Caller {
    /// `nodes`: `host:port` of each. `timeout`: of a call with all its retries; a node that says nothing is left for another
    /// after half of it. Connects when it is used.
    ///
    /// # Errors
    /// An address makes no sense, or there is none.
    pub fn new(nodes: &[&str], timeout: Duration) -> Result<Self, InvalidAddress> {
        Self::with_security(nodes, timeout, &Security::default())
    }

    /// The same, with a credential or over TLS.
    ///
    /// # Errors
    /// An address makes no sense, or there is none.
    pub fn with_security(nodes: &[&str], timeout: Duration, security: &Security) -> Result<Self, InvalidAddress> {
        Self::in_zone(nodes, &[], timeout, security)
    }

    /// The same where nodes stand in several zones: `nodes` are those of the caller's own, and the homes of all users; those of
    /// other zones are called when none of them can be. Which are which says [`Caller::nodes`], or whoever runs them.
    ///
    /// # Errors
    /// An address makes no sense, or there is none in the own zone.
    pub fn in_zone(nodes: &[&str], other_zones: &[&str], timeout: Duration, security: &Security) -> Result<Self, InvalidAddress> {
        if nodes.is_empty() {
            return Err(InvalidAddress { of: "a node", address: String::new() });
        }
        let near = nodes.len();
        let nodes = nodes.iter().chain(other_zones).map(|node| {
            let link = security.link(node, timeout)?;
            let client = PresenceServiceClient::new(link.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
            Ok(Node { addr: (*node).to_owned(), link, client, avoided_until: Mutex::new(Instant::now()) })
        });
        Ok(Self { nodes: nodes.collect::<Result<_, _>>()?, near, next: AtomicUsize::new(0), timeout })
    }

    /// Where a user is.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn query(&self, request: pb::QueryRouteReq) -> Result<pb::QueryRouteResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.query_route(request).await).await
    }

    /// Where many users are. Who could not be looked up is asked for again; CODE_UNAVAILABLE if there was no time for it.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn query_many(&self, mut request: pb::BatchQueryRouteReq) -> Result<pb::BatchQueryRouteResp, Status> {
        let deadline = self.deadline();
        let call = async |client: &mut PresenceServiceClient<Link>, request| client.batch_query_route(request).await;
        let mut answer = self.call(&self.in_turn(), deadline, &request, call).await?;
        loop {
            let missing = answer.users.iter().filter(|user| user.code() == pb::Code::Unavailable);
            request.user_ids = missing.map(|user| user.user_id).collect();
            if request.user_ids.is_empty() || !is_time_for_more(deadline).await {
                return Ok(answer);
            }
            let Ok(again) = self.call(&self.in_turn(), deadline, &request, call).await else { return Ok(answer) };
            let found: HashMap<i64, pb::UserRoute> = again.users.into_iter().map(|user| (user.user_id, user)).collect();
            let replace = |user: &mut pb::UserRoute| found.get(&user.user_id).map(|found| user.clone_from(found)).is_some();
            answer.users.retain_mut(|user| user.code() != pb::Code::Unavailable || replace(user));
        }
    }

    /// Delivers a message. With a `message_id`, a retry is no second message for receivers that drop repeats. Messages for a
    /// user go through the same node as long as that is there: those that are sent one after the other's answer keep their order.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn deliver(&self, request: pb::DeliverReq) -> Result<pb::DeliverResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.deliver(request).await).await
    }

    /// Delivers a message to many users; again to those to whom it could not be done at once.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn deliver_many(&self, mut request: pb::BatchDeliverReq) -> Result<pb::BatchDeliverResp, Status> {
        let deadline = self.deadline();
        let call = async |client: &mut PresenceServiceClient<Link>, request| client.batch_deliver(request).await;
        let mut answer = self.call(&self.in_turn(), deadline, &request, call).await?;
        loop {
            let missing = answer.users.iter().filter(|user| is_unavailable(user));
            request.user_ids = missing.map(|user| user.user_id).collect();
            if request.user_ids.is_empty() || !is_time_for_more(deadline).await {
                return Ok(answer);
            }
            let Ok(again) = self.call(&self.in_turn(), deadline, &request, call).await else { return Ok(answer) };
            let done: HashMap<i64, pb::UserDelivery> = again.users.into_iter().map(|user| (user.user_id, user)).collect();
            for user in answer.users.iter_mut().filter(|user| is_unavailable(user)) {
                if let Some(done) = done.get(&user.user_id) {
                    user.clone_from(done);
                }
            }
        }
    }

    /// Says how a user wants to be seen, or whether a device is idle.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn set_status(&self, request: pb::SetStatusReq) -> Result<pb::SetStatusResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.set_status(request).await).await
    }

    /// A page of what a user was shown as, the newest first.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn status_history(&self, request: pb::GetStatusHistoryReq) -> Result<pb::GetStatusHistoryResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.get_status_history(request).await).await
    }

    /// How long a user was online, by day.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn online_time(&self, request: pb::GetOnlineTimeReq) -> Result<pb::GetOnlineTimeResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.get_online_time(request).await).await
    }

    /// What these users are shown as, now and whenever that changes. More may be added to the watch, and removed.
    ///
    /// # Errors
    /// There are too many, or one is no user.
    pub fn watch(&self, users: impl IntoIterator<Item = i64>) -> Result<Watch, WatchError> {
        let (nodes, users) = (self.nodes.iter().map(|node| node.link.clone()).collect(), users.into_iter().collect::<Vec<_>>());
        Watch::start(nodes, self.tour(), &users)
    }

    /// Where a user's client should connect, and when. Each answer counts as a log-in that is on its way.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn allocate(&self, request: pb::AllocateGatewayReq) -> Result<pb::AllocateGatewayResp, Status> {
        let order = self.order_for(request.user_id);
        self.call(&order, self.deadline(), &request, async |client, request| client.allocate_gateway(request).await).await
    }

    /// Which nodes there are now. This caller goes on with those that it was given.
    ///
    /// # Errors
    /// What the last node tried said.
    pub async fn nodes(&self) -> Result<pb::ListNodesResp, Status> {
        let call = async |client: &mut PresenceServiceClient<Link>, request| client.list_nodes(request).await;
        self.call(&self.in_turn(), self.deadline(), &pb::ListNodesReq {}, call).await
    }

    /// The node that this user's calls go to, as long as it answers.
    pub fn home_of(&self, user_id: i64) -> &str {
        self.order_for(user_id).first().map_or("", |place| &self.nodes[*place].addr)
    }

    fn order_for(&self, user_id: i64) -> Vec<usize> {
        let (near, others) = self.nodes.split_at(self.near);
        let order = |nodes: &[Node]| rendezvous::order(user_id, nodes.iter().map(|node| node.addr.as_str()));
        order(near).into_iter().chain(order(others).into_iter().map(|place| place + self.near)).collect()
    }

    fn in_turn(&self) -> Vec<usize> {
        self.tour().places()
    }

    fn tour(&self) -> Tour {
        Tour::new(self.near, self.nodes.len(), self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// Calls the first node of `order`, then others.
    async fn call<Q: Clone, A>(
        &self,
        order: &[usize],
        deadline: Instant,
        request: &Q,
        call: impl AsyncFn(&mut PresenceServiceClient<Link>, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Status> {
        let mut tried = 0;
        loop {
            let node = self.node(order, tried);
            tried += 1;
            let began = Instant::now();
            let left = deadline.saturating_duration_since(began);
            let mut attempt = Request::new(request.clone());
            attempt.set_timeout(if tried == 1 && self.nodes.len() > 1 { left / 2 } else { left });
            if let Ok(traceparent) = TRACEPARENT.try_with(Clone::clone) {
                attempt.metadata_mut().insert("traceparent", traceparent);
            }
            let status = match call(&mut node.client.clone(), attempt).await {
                Ok(answer) => {
                    node.avoid_until(began);
                    return Ok(answer.into_inner());
                }
                Err(status) => status,
            };
            if status.code() == Code::Unauthenticated && node.link.renew() {
                continue; // with what the files say now
            }
            let broken = std::error::Error::source(&status).is_some(); // a node's own refusal has none
            if broken {
                let time = (AVOIDED_TIMES * began.elapsed()).clamp(AVOIDED_FOR.0, AVOIDED_FOR.1);
                node.avoid_until(Instant::now() + time);
            }
            let pause = match status.get_details_retry_info().and_then(|info| info.retry_delay) {
                Some(delay) => delay + jittered(RETRY_AFTER),
                None if tried < self.nodes.len() => Duration::ZERO,
                None => jittered(RETRY_AFTER),
            };
            let is_worth_a_retry = match status.code() {
                Code::Unimplemented => tried < self.nodes.len(), // a node of a former release stands beside newer ones
                code => broken || matches!(code, Code::Unavailable | Code::ResourceExhausted),
            };
            if !is_worth_a_retry || Instant::now() + pause >= deadline {
                return Err(status);
            }
            sleep(pause).await;
        }
    }

    /// The node that comes after so many others, or the next one that was not out of reach lately.
    fn node(&self, order: &[usize], tried: usize) -> &Node {
        let (count, now) = (order.len(), Instant::now());
        let from_there = (tried..tried + count).map(|n| &self.nodes[order[n % count]]);
        from_there.min_by_key(|node| node.avoided_until().max(now)).unwrap_or(&self.nodes[0])
    }
}

impl Node {
    fn avoid_until(&self, until: Instant) {
        *self.avoided_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    fn avoided_until(&self) -> Instant {
        *self.avoided_until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits a moment. False: that would be too long.
async fn is_time_for_more(deadline: Instant) -> bool {
    let pause = jittered(RETRY_AFTER);
    sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
    Instant::now() < deadline
}

fn is_unavailable(user: &pb::UserDelivery) -> bool {
    user.result.as_ref().is_some_and(|result| result.code() == pb::Code::Unavailable)
}
