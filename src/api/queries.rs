//! `PresenceService`: QueryRoute and BatchQueryRoute. They answer in bytes that are written straight from memory.

use std::convert::Infallible;
use std::future::Ready;
use std::future::ready;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use prost::Message;
use tokio_util::either::Either;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http;
use tonic::server::Grpc;
use tonic::server::UnaryService;

use crate::api::access;
use crate::api::answer;
use crate::api::body::Arriving;
use crate::api::body::Leaving;
use crate::api::body::MAX_MESSAGE_BYTES;
use crate::api::body::out_of_memory;
use crate::api::convert;
use crate::api::presence::unless_all_failed;
use crate::api::status::status;
use crate::domain::id::UserId;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::engine::read::directory::Source;
use crate::error::Error;
use crate::memory::Held;
use crate::memory::Memory;
use crate::memory::Share;
use crate::metrics::HotCounter;
use crate::metrics::LookedUp;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::codec::Written;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Place;

/// Answers that are larger are counted until they have left.
const SMALL_ANSWER_BYTES: usize = 4 * 1024;

/// Cloning it counts references, and threads that count in one place slow each other down: each has one of its own.
#[derive(Clone)]
pub struct Queries(Arc<Tools>, Option<Place>);

#[derive(Clone)]
struct Tools {
    directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    memory: Arc<Memory>,
}

impl Queries {
    pub fn new(directory: Arc<Directory>, metrics: Arc<Metrics>, memory: Arc<Memory>) -> Self {
        Self(Arc::new(Tools { directory, metrics, memory }), None)
    }

    pub fn for_another_thread(&self, memory: &Arc<Memory>) -> Self {
        Self(Arc::new(Tools { memory: memory.clone(), ..Tools::clone(&self.0) }), None)
    }

    /// For a call whose spans begin here.
    pub fn traced(self, place: Option<Place>) -> Self {
        Self(self.0, place)
    }

    /// Serves the call that is asked by `Q`.
    pub async fn serve<Q>(self, request: http::Request<Body>) -> Result<http::Response<Body>, Infallible>
    where
        Self: UnaryService<Q, Response = Vec<u8>>,
        Q: Message + Default + Send + 'static,
    {
        let request = request.map(|body| Arriving::message(body, &self.0.memory, None));
        let mut call = Grpc::new(Written::default()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut response = call.unary(self, request).await;
        Ok(match response.extensions_mut().remove::<Arc<Held>>() {
            Some(held) => response.map(|body| Body::new(Leaving::counted(body, held))),
            None => response,
        })
    }

    /// An answer, counted if it is large.
    fn written(&self, answer: Vec<u8>) -> Result<Response<Vec<u8>>, Status> {
        let length = answer.len();
        let mut response = Response::new(answer);
        if length > SMALL_ANSWER_BYTES {
            let held = self.0.memory.take(Share::Calls, length).ok_or_else(out_of_memory)?;
            response.extensions_mut().insert(Arc::new(held));
        }
        Ok(response)
    }

    /// Where a user is, if this takes no waiting.
    fn one_at_once(&self, user: UserId, bound: Option<Duration>, asked: Instant) -> Option<Result<Response<Vec<u8>>, Status>> {
        self.0.directory.recall(user, bound, asked).map(|answer| self.about_one(user, &answer, asked))
    }

    async fn one_later(self, user: UserId, bound: Option<Duration>, asked: Instant) -> Result<Response<Vec<u8>>, Status> {
        let answer = self.0.directory.look_up(user, bound).await.map_err(|error| status(&error))?;
        self.about_one(user, &answer, asked)
    }

    fn about_one(&self, user: UserId, answer: &Answer, asked: Instant) -> Result<Response<Vec<u8>>, Status> {
        by_source(&self.0.metrics.queries, answer.source).inc();
        self.0.metrics.query_seconds.observe(asked.elapsed());
        if let Some(place) = &self.1 {
            place.begin_at("lookup", Kind::Internal, asked).note("im_presence.tier", answer.source.name());
        }
        self.written(answer::about_one(user, answer))
    }

    /// Where many users are.
    async fn many(self, request: Request<pb::BatchQueryRouteReq>) -> Result<Response<Vec<u8>>, Status> {
        access::take_users(request.extensions(), request.get_ref().user_ids.len())?;
        let request = request.into_inner();
        let limit = if request.with_routes { convert::MAX_BATCH_WITH_ROUTES } else { convert::MAX_BATCH };
        let users = convert::user_ids(&request.user_ids, limit).map_err(|error| status(&error))?;
        let span = self.1.as_ref().map(|place| place.begin("lookup", Kind::Internal));
        let answers = self.0.directory.get_many(&users, bound(request.max_staleness_ms)).await;
        span.into_iter().for_each(|mut span| span.note("im_presence.users", users.len() as u64));
        unless_all_failed(&answers)?;
        self.count_batch(&answers);
        self.written(answer::about_many(&users, &answers, request.with_routes, request.online_only))
    }

    fn count_batch(&self, answers: &[Result<Answer, Error>]) {
        for source in [Source::Local, Source::Shared, Source::Durable] {
            let users = answers.iter().flatten().filter(|answer| answer.source == source).count();
            if users > 0 {
                by_source(&self.0.metrics.batch_users, source).inc_by(users as u64);
            }
        }
    }
}

fn bound(max_staleness_ms: Option<u32>) -> Option<Duration> {
    max_staleness_ms.map(|ms| Duration::from_millis(ms.into()))
}

fn by_source(counts: &LookedUp, source: Source) -> &HotCounter {
    match source {
        Source::Local => &counts.local,
        Source::Shared => &counts.shared,
        Source::Durable => &counts.durable,
    }
}

/// What memory knows is answered before anything is put aside to wait.
impl UnaryService<pb::QueryRouteReq> for Queries {
    type Response = Vec<u8>;
    type Future = Either<Ready<Result<Response<Vec<u8>>, Status>>, BoxFuture<Response<Vec<u8>>, Status>>;

    fn call(&mut self, request: Request<pb::QueryRouteReq>) -> Self::Future {
        let (asked, request) = (Instant::now(), request.into_inner());
        let bound = bound(request.max_staleness_ms);
        let user = match convert::user_id(request.user_id) {
            Ok(user) => user,
            Err(error) => return Either::Left(ready(Err(status(&error)))),
        };
        match self.one_at_once(user, bound, asked) {
            Some(answer) => Either::Left(ready(answer)),
            None => Either::Right(Box::pin(self.clone().one_later(user, bound, asked))),
        }
    }
}

impl UnaryService<pb::BatchQueryRouteReq> for Queries {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<pb::BatchQueryRouteReq>) -> Self::Future {
        Box::pin(self.clone().many(request))
    }
}
