//! `NodeService`: what other nodes hand to gateways that are attached here, and the client that hands to them.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::join_all;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::codegen::http::HeaderMap;
use tonic::metadata::AsciiMetadataValue;

use crate::answers;
use crate::answers::Answer;
use crate::api::body::MAX_MESSAGE_BYTES;
use crate::api::contents;
use crate::api::convert;
use crate::api::explain;
use crate::api::report::Reporter;
use crate::api::status::status;
use crate::client::security::Link;
use crate::client::security::Security;
use crate::client::security::root_cause;
use crate::domain::caller::GatewayPatterns;
use crate::domain::explanation::Inspected;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::engine::messages::acks::Ack;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::dispatch::what;
use crate::engine::messages::peers::Call;
use crate::engine::messages::peers::FORWARD_LIMIT;
use crate::engine::messages::peers::Line;
use crate::engine::messages::peers::OLDER_RELEASE;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::peers::Question;
use crate::engine::messages::streams::Handed;
use crate::engine::messages::streams::Order;
use crate::engine::messages::streams::Streams;
use crate::engine::presence::explaining::Explaining;
use crate::engine::read::lives::Lives;
use crate::pb;
use crate::pb::node_service_client::NodeServiceClient;
use crate::pb::node_service_server::NodeService;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Span;
use crate::telemetry::spans::Spans;

/// Calls under way to one node.
const IN_FLIGHT: usize = 16;
/// Calls whose orders go together.
const TOGETHER: usize = 256;
/// A call waits for the one before it, so that what comes meanwhile goes together: a call costs more than its orders. It waits
/// no longer than this for one that takes its time.
const TURN_LIMIT: Duration = Duration::from_millis(1);
/// How long a gateway that is handed many orders at once has to read some of them. Well within what its caller waits.
const ROOM_LIMIT: Duration = Duration::from_millis(500);
/// Largest request of a node of the last release, which does not name its store and puts everything into one.
pub const MAX_FORWARD_BYTES: usize = 64 * 1024 * 1024;
/// Names the caller's store, so that a stranger's call is refused before its body is read.
const STORE_HEADER: &str = "im-presence-store";

/// Serves other nodes.
pub struct Node {
    pub store_id: Arc<str>,
    pub streams: Arc<Streams>,
    pub acks: Arc<Acks>,
    pub peers: Arc<Peers>,
    pub lives: Arc<Lives>,
    pub explaining: Arc<Explaining>,
    /// None: this node says nothing of itself.
    pub reporter: Option<Arc<Reporter>>,
    /// None: nothing is traced.
    pub spans: Option<Arc<Spans>>,
}

#[tonic::async_trait]
impl NodeService for Node {
    async fn forward(&self, request: Request<pb::ForwardReq>) -> Result<Response<pb::ForwardResp>, Status> {
        let request = request.into_inner();
        self.check_store(&request.store_id)?;
        if !request.node_id.is_empty() {
            self.peers.learn(&request.node_id, &request.addr);
        }
        let now = self.lives.clock.now().0;
        // A node that stood still must not hand over what its sender has given up or repeated since.
        let late = now > request.sent_at_ms.saturating_add(request.good_for_ms.into());
        let outcomes = match late {
            true => vec![pb::Handed::NotHere.into(); request.orders.len()],
            false => self.hand_all(request).await,
        };
        let incarnation = self.peers.own.incarnation.clone();
        Ok(Response::new(pb::ForwardResp { outcomes, incarnation, shares_contents: true }))
    }

    async fn forward_acks(&self, request: Request<pb::ForwardAcksReq>) -> Result<Response<pb::ForwardAcksResp>, Status> {
        let request = request.into_inner();
        self.check_store(&request.store_id)?;
        let speakers = request.speakers.iter().map(String::as_str).chain(std::iter::repeat(""));
        for (ack, speaker) in request.acks.iter().zip(speakers) {
            let by = (!speaker.is_empty()).then(|| Arc::new(GatewayPatterns::read(speaker)));
            if let Ok(ack) = convert::ack(ack) {
                self.acks.take(Ack { by, ..ack });
            }
        }
        Ok(Response::new(pb::ForwardAcksResp { result: convert::result(pb::Code::Ok, "") }))
    }

    async fn inspect(&self, request: Request<pb::InspectReq>) -> Result<Response<pb::InspectResp>, Status> {
        let request = request.into_inner();
        self.check_store(&request.store_id)?;
        let user = convert::user_id(request.user_id).map_err(|error| status(&error))?;
        let inspected = self.explaining.inspect(user);
        Ok(Response::new(explain::inspected(&inspected, &self.peers.own.node_id)))
    }

    async fn inspect_node(&self, request: Request<pb::InspectNodeReq>) -> Result<Response<pb::InspectNodeResp>, Status> {
        let request = request.into_inner();
        self.check_store(&request.store_id)?;
        let Some(reporter) = &self.reporter else {
            return Err(Status::unimplemented("this node does not say how it is"));
        };
        let json = reporter.answer(&request.what, &request.about).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::InspectNodeResp { json: json.into() }))
    }
}

impl Node {
    fn check_store(&self, store_id: &str) -> Result<(), Status> {
        if *store_id == *self.store_id { Ok(()) } else { Err(strange()) }
    }

    async fn hand_all(&self, request: pb::ForwardReq) -> Vec<i32> {
        let known = contents::orders(request);
        let places: Vec<usize> = (0..known.len()).filter(|i| known[*i].is_some()).collect();
        let mut outcomes = vec![pb::Handed::NotHere.into(); known.len()];
        let mut known: Vec<_> = known.into_iter().flatten().collect();
        let spans = self.resume(&mut known);
        let handed = self.streams.hand_all(&known, Instant::now() + ROOM_LIMIT).await;
        for (mut span, handed) in spans.into_iter().map(|(i, span)| (span, handed[i])) {
            if handed != Handed::Taken {
                span.fail(what(handed));
            }
        }
        for (i, handed) in places.into_iter().zip(handed) {
            outcomes[i] = match handed {
                Handed::Taken => pb::Handed::Taken.into(),
                Handed::Full => pb::Handed::Full.into(),
                Handed::NotHere => pb::Handed::NotHere.into(),
            };
        }
        outcomes
    }

    /// Begins spans for the orders that are traced, each with its place among all; their gateways are told of them.
    fn resume(&self, orders: &mut [(Epoch, Order)]) -> Vec<(usize, Span)> {
        let Some(spans) = &self.spans else { return Vec::new() };
        let mut begun = Vec::new();
        for (i, (_, order)) in orders.iter_mut().enumerate() {
            if let Order::Delivery(envelope) = order
                && let Some(place) = spans.resume(&envelope.traceparent)
            {
                let span = place.begin("hand over", Kind::Server);
                Arc::make_mut(envelope).traceparent = span.place().traceparent();
                begun.push((i, span));
            }
        }
        begun
    }
}

fn strange() -> Status {
    Status::failed_precondition("this node belongs to another store")
}

/// Whether a call may come from a node of this store, and how large its message may be. A node of the last release says in its
/// body which store it belongs to.
pub fn check_caller(headers: &HeaderMap, own: &str) -> Result<usize, Status> {
    match headers.get(STORE_HEADER) {
        Some(store_id) if store_id.as_bytes() != own.as_bytes() => Err(strange()),
        Some(_) => Ok(MAX_MESSAGE_BYTES),
        None => Ok(MAX_FORWARD_BYTES),
    }
}

/// A call from a node of this store. It is given up in time by itself.
fn signed<T>(message: T, store_id: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(FORWARD_LIMIT);
    if let Ok(store_id) = AsciiMetadataValue::try_from(store_id) {
        request.metadata_mut().insert(STORE_HEADER, store_id);
    }
    request
}

/// Calls other nodes for the engine, each over one connection, until `stop`.
pub struct Caller {
    pub store_id: String,
    pub peers: Arc<Peers>,
    pub lives: Arc<Lives>,
    pub security: Security,
}

/// A node that is called.
#[derive(Clone)]
struct Callee {
    link: Link,
    client: NodeServiceClient<Link>,
    /// It has said that it knows contents that several orders share. One of the last release that took its place refuses such
    /// orders, and says so.
    shares: Arc<AtomicBool>,
}

/// Orders that go together, and who waits for which of the outcomes.
#[derive(Default)]
struct Together {
    orders: Vec<(Epoch, Order)>,
    answers: Vec<(usize, Answer<Vec<Handed>>)>,
    acks: Vec<Ack>,
    hello: bool,
    inspections: Vec<(UserId, oneshot::Sender<Inspected>)>,
    questions: Vec<Asked>,
}

/// What a node is asked about itself, and who waits for the answer.
type Asked = (Question, oneshot::Sender<Result<Vec<u8>, String>>);

/// Which process answers at `addr` for the nodes of a store.
///
/// # Errors
/// Why nobody does.
pub async fn who_answers(addr: &str, store_id: &str, security: &Security) -> Result<String, String> {
    let channel = security.connect(addr, FORWARD_LIMIT).await.map_err(|error| root_cause(&*error))?;
    let hello = pb::ForwardReq { store_id: store_id.to_owned(), ..Default::default() };
    let hello = signed(hello, store_id);
    let answer = NodeServiceClient::new(channel).forward(hello).await.map_err(|status| status.message().to_owned())?;
    Ok(answer.into_inner().incarnation)
}

impl Caller {
    pub async fn run(self: Arc<Self>, mut lines: mpsc::Receiver<Line>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut tasks = JoinSet::new();
        while let Some(Some((addr, queue))) = stop.run_until_cancelled(lines.recv()).await {
            tasks.spawn(self.clone().call_node(addr, queue));
            while tasks.try_join_next().is_some() {}
        }
        drop(lines);
        self.peers.close();
        while tasks.join_next().await.is_some() {}
    }

    async fn call_node(self: Arc<Self>, addr: Arc<str>, mut queue: mpsc::Receiver<Call>) {
        let Ok(link) = self.security.link(&addr, FORWARD_LIMIT) else { return };
        let node = Callee { client: NodeServiceClient::new(link.clone()), link, shares: Arc::default() };
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        let (mut calls, mut waiting) = (JoinSet::new(), Vec::new());
        while queue.recv_many(&mut waiting, TOGETHER).await > 0 {
            let Ok(place) = in_flight.clone().acquire_owned().await else { return };
            let together = Together::of(waiting.drain(..));
            let (this, node) = (self.clone(), node.clone());
            calls.spawn(async move {
                this.call(node, together).await;
                drop(place);
            });
            let _ = timeout(TURN_LIMIT, calls.join_next()).await;
            while calls.try_join_next().is_some() {}
        }
        while calls.join_next().await.is_some() {}
    }

    /// Orders do not wait for acknowledgements and inspections, nor the other way round.
    async fn call(&self, node: Callee, mut together: Together) {
        let (acks, inspections) = (std::mem::take(&mut together.acks), std::mem::take(&mut together.inspections));
        let inspect = self.inspect(node.client.clone(), inspections);
        let ask = self.ask(node.clone(), std::mem::take(&mut together.questions));
        tokio::join!(self.forward_acks(node.client.clone(), &acks), inspect, ask, self.forward(node, together));
    }

    async fn ask(&self, node: Callee, questions: Vec<Asked>) {
        let ask = |(question, answer): Asked| {
            let mut node = node.clone();
            let request =
                pb::InspectNodeReq { store_id: self.store_id.clone(), what: question.what.to_owned(), about: question.about };
            async move {
                let said = node.client.inspect_node(signed(request, &self.store_id)).await;
                let said = said.map(|said| said.into_inner().json.to_vec()).map_err(|status| match status.code() {
                    Code::Unimplemented => OLDER_RELEASE.to_owned(),
                    Code::Unauthenticated | Code::PermissionDenied => {
                        node.link.renew(); // with the certificate of now
                        format!("it takes this node for none of its own: {}", status.message())
                    }
                    _ => format!("it does not answer: {}", root_cause(&status)),
                });
                let _ = answer.send(said); // whoever gave up needs no answer
            }
        };
        join_all(questions.into_iter().map(ask)).await;
    }

    async fn inspect(&self, client: NodeServiceClient<Link>, inspections: Vec<(UserId, oneshot::Sender<Inspected>)>) {
        let ask = |(user, answer): (UserId, oneshot::Sender<Inspected>)| {
            let mut client = client.clone();
            let request = pb::InspectReq { store_id: self.store_id.clone(), user_id: user.get() };
            async move {
                if let Ok(inspected) = client.inspect(signed(request, &self.store_id)).await {
                    let _ = answer.send(explain::inspected_by(&inspected.into_inner())); // whoever gave up needs no answer
                }
            }
        };
        let awaited = inspections.into_iter().filter(|(_, answer)| !answer.is_closed());
        join_all(awaited.map(ask)).await;
    }

    async fn forward_acks(&self, mut client: NodeServiceClient<Link>, acks: &[Ack]) {
        if !acks.is_empty() {
            let speaker = |ack: &Ack| ack.by.as_ref().map(|by| by.to_string()).unwrap_or_default();
            let (speakers, acks) = (acks.iter().map(speaker).collect(), acks.iter().map(convert::ack_to_pb).collect());
            let request = pb::ForwardAcksReq { store_id: self.store_id.clone(), acks, speakers };
            let _ = client.forward_acks(signed(request, &self.store_id)).await; // lost: repeated
        }
    }

    async fn forward(&self, mut node: Callee, together: Together) {
        if together.orders.is_empty() && !together.hello {
            return;
        }
        let mut outcomes = Vec::with_capacity(together.orders.len());
        loop {
            let left = &together.orders[outcomes.len()..];
            let Some(handed) = self.forward_part(&mut node, left).await else { return }; // whoever waits hears of nobody
            outcomes.extend(handed);
            if outcomes.len() == together.orders.len() {
                break;
            }
        }
        let mut outcomes = outcomes.into_iter();
        let each = together.answers.into_iter();
        answers::send_all(each.map(|(count, answer)| (answer, outcomes.by_ref().take(count).collect())));
    }

    /// One outcome for each of the first of `orders`. None: the node did not answer.
    async fn forward_part(&self, node: &mut Callee, orders: &[(Epoch, Order)]) -> Option<Vec<Handed>> {
        let (orders, contents) = contents::next_part(orders, node.shares.load(Ordering::Relaxed));
        let sent = orders.len();
        let request = pb::ForwardReq {
            store_id: self.store_id.clone(),
            sent_at_ms: self.lives.clock.now().0,
            good_for_ms: convert::millis(FORWARD_LIMIT),
            node_id: self.peers.own.node_id.clone(),
            addr: self.peers.own.addr.clone(),
            orders,
            contents,
        };
        let handed = |outcome: i32| match pb::Handed::try_from(outcome) {
            Ok(pb::Handed::Taken) => Handed::Taken,
            Ok(pb::Handed::Full) => Handed::Full,
            Ok(pb::Handed::NotHere | pb::Handed::Unspecified) | Err(_) => Handed::NotHere,
        };
        let answer = match node.client.forward(signed(request, &self.store_id)).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                if status.code() == Code::Unauthenticated {
                    node.link.renew(); // with the certificate of now
                }
                return None;
            }
        };
        node.shares.store(answer.shares_contents, Ordering::Relaxed);
        (answer.outcomes.len() == sent).then(|| answer.outcomes.into_iter().map(handed).collect())
    }
}

impl Together {
    fn of(calls: impl Iterator<Item = Call>) -> Self {
        let mut together = Self::default();
        for call in calls {
            match call {
                Call::Forward { orders, answer } => {
                    together.answers.push((orders.len(), answer));
                    together.orders.extend(orders);
                }
                Call::Acks(acks) => together.acks.extend(acks),
                Call::Hello => together.hello = true,
                Call::Inspect { user, answer } => together.inspections.push((user, answer)),
                Call::Ask { question, answer } => together.questions.push((question, answer)),
            }
        }
        together
    }
}
