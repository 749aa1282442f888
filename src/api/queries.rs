//! `PresenceService`: QueryRoute and BatchQueryRoute. They answer in bytes that are written straight from memory.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use prost::Message;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http;
use tonic::server::Grpc;
use tonic::server::UnaryService;

use crate::api::answer;
use crate::api::convert;
use crate::api::presence::unless_all_failed;
use crate::api::status::status;
use crate::engine::directory::Answer;
use crate::engine::directory::Directory;
use crate::engine::directory::Source;
use crate::error::Error;
use crate::metrics::HotCounter;
use crate::metrics::LookedUp;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::codec::Written;

#[derive(Clone)]
pub struct Queries {
    pub directory: Arc<Directory>,
    pub metrics: Arc<Metrics>,
}

impl Queries {
    /// Serves the call that is asked by `Q`. Requests may be as long as `max_bytes`.
    pub async fn serve<Q>(self, request: http::Request<Body>, max_bytes: usize) -> Result<http::Response<Body>, Infallible>
    where
        Self: UnaryService<Q, Response = Vec<u8>>,
        Q: Message + Default + Send + 'static,
    {
        let mut call = Grpc::new(Written::default()).max_decoding_message_size(max_bytes);
        Ok(call.unary(self, request).await)
    }

    /// Where a user is.
    async fn one(self, request: pb::QueryRouteReq) -> Result<Response<Vec<u8>>, Status> {
        let began = Instant::now();
        let user = convert::user_id(request.user_id).map_err(|error| status(&error))?;
        let answer = self.directory.get(user, bound(request.max_staleness_ms)).await.map_err(|error| status(&error))?;
        by_source(&self.metrics.queries, answer.source).inc();
        self.metrics.query_seconds.observe(began.elapsed());
        Ok(Response::new(answer::about_one(user, &answer)))
    }

    /// Where many users are.
    async fn many(self, request: pb::BatchQueryRouteReq) -> Result<Response<Vec<u8>>, Status> {
        let limit = if request.with_routes { convert::MAX_BATCH_WITH_ROUTES } else { convert::MAX_BATCH };
        let users = convert::user_ids(&request.user_ids, limit).map_err(|error| status(&error))?;
        let answers = self.directory.get_many(&users, bound(request.max_staleness_ms)).await;
        unless_all_failed(&answers)?;
        self.count_batch(&answers);
        Ok(Response::new(answer::about_many(&users, &answers, request.with_routes, request.online_only)))
    }

    fn count_batch(&self, answers: &[Result<Answer, Error>]) {
        for source in [Source::Local, Source::Shared, Source::Durable] {
            let users = answers.iter().flatten().filter(|answer| answer.source == source).count();
            if users > 0 {
                by_source(&self.metrics.batch_users, source).inc_by(users as u64);
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

impl UnaryService<pb::QueryRouteReq> for Queries {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<pb::QueryRouteReq>) -> Self::Future {
        Box::pin(self.clone().one(request.into_inner()))
    }
}

impl UnaryService<pb::BatchQueryRouteReq> for Queries {
    type Response = Vec<u8>;
    type Future = BoxFuture<Response<Vec<u8>>, Status>;

    fn call(&mut self, request: Request<pb::BatchQueryRouteReq>) -> Self::Future {
        Box::pin(self.clone().many(request.into_inner()))
    }
}
