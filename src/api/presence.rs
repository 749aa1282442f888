//! `PresenceService`: bind, unbind, query.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::binder::Binder;
use crate::api::binder::not_bound_now;
use crate::api::convert;
use crate::api::delivery;
use crate::api::status::item_code;
use crate::api::status::status;
use crate::domain::id::UserId;
use crate::domain::status::Status as Shown;
use crate::engine::delivery::Deliveries;
use crate::engine::directory::Answer;
use crate::engine::directory::Directory;
use crate::engine::directory::LiveRoute;
use crate::engine::directory::Source;
use crate::error::Error;
use crate::metrics::HotCounter;
use crate::metrics::LookedUp;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

pub struct Presence {
    pub binder: Arc<Binder>,
    pub directory: Arc<Directory>,
    pub deliveries: Arc<Deliveries>,
    pub metrics: Arc<Metrics>,
    pub max_message_bytes: usize,
}

#[tonic::async_trait]
impl PresenceService for Presence {
    async fn bind_route(&self, request: Request<pb::BindRouteReq>) -> Result<Response<pb::BindRouteResp>, Status> {
        let (user, bind) = convert::bind(request.get_ref()).map_err(|error| status(&error))?;
        self.binder.bind(user, bind).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn unbind_route(&self, request: Request<pb::UnbindRouteReq>) -> Result<Response<pb::UnbindRouteResp>, Status> {
        let (user, unbind) = convert::unbind(request.get_ref()).map_err(|error| status(&error))?;
        self.binder.unbind(user, unbind).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn query_route(&self, request: Request<pb::QueryRouteReq>) -> Result<Response<pb::QueryRouteResp>, Status> {
        let began = Instant::now();
        let request = request.get_ref();
        let user = convert::user_id(request.user_id).map_err(|error| status(&error))?;
        let answer = self.directory.get(user, bound(request.max_staleness_ms)).await.map_err(|error| status(&error))?;
        by_source(&self.metrics.queries, answer.source).inc();
        self.metrics.query_seconds.observe(began.elapsed());
        Ok(Response::new(queried(user, &answer)))
    }

    async fn deliver(&self, request: Request<pb::DeliverReq>) -> Result<Response<pb::DeliverResp>, Status> {
        let deadline = delivery::deadline(request.metadata());
        let (user, message) = delivery::message(request.into_inner(), self.max_message_bytes, &self.deliveries)?;
        let reports = self.deliveries.deliver(&[user], &message, deadline).await.map_err(|error| status(&error))?;
        delivery::delivered(reports).map(Response::new)
    }

    async fn batch_deliver(&self, request: Request<pb::BatchDeliverReq>) -> Result<Response<pb::BatchDeliverResp>, Status> {
        let deadline = delivery::deadline(request.metadata());
        let (users, message) = delivery::batch_message(request.into_inner(), self.max_message_bytes)?;
        let reports = self.deliveries.deliver(&users, &message, deadline).await.map_err(|error| status(&error))?;
        unless_all_failed(&reports)?;
        Ok(Response::new(delivery::batch_delivered(&users, &reports)))
    }

    async fn batch_bind_route(
        &self,
        request: Request<pb::BatchBindRouteReq>,
    ) -> Result<Response<pb::BatchBindRouteResp>, Status> {
        let binds = request.into_inner().binds;
        convert::batch_size("binds", binds.len(), convert::MAX_BATCH).map_err(|error| status(&error))?;
        let binds: Vec<_> = binds.iter().map(convert::bind).collect::<Result<_, _>>().map_err(|error| status(&error))?;
        let answers = self.binder.bind_many(binds).await;
        unless_all_failed(&answers)?;
        let results = answers.into_iter().map(|answer| answer.unwrap_or_else(|error| not_bound_now(&error))).collect();
        Ok(Response::new(pb::BatchBindRouteResp { results }))
    }

    async fn batch_query_route(
        &self,
        request: Request<pb::BatchQueryRouteReq>,
    ) -> Result<Response<pb::BatchQueryRouteResp>, Status> {
        let request = request.get_ref();
        let limit = if request.with_routes { convert::MAX_BATCH_WITH_ROUTES } else { convert::MAX_BATCH };
        let users = convert::user_ids(&request.user_ids, limit).map_err(|error| status(&error))?;
        let answers = self.directory.get_many(&users, bound(request.max_staleness_ms)).await;
        unless_all_failed(&answers)?;
        self.count_batch(&answers);
        let found = users.iter().zip(&answers).map(|(user, answer)| match answer {
            Ok(answer) => user_route(*user, answer, request.with_routes),
            Err(error) => pb::UserRoute { user_id: user.get(), code: item_code(error).0.into(), ..Default::default() },
        });
        let unknown = i32::from(pb::Code::Unavailable);
        let users = found.filter(|user| !request.online_only || user.is_online || user.code == unknown).collect();
        Ok(Response::new(pb::BatchQueryRouteResp { result: convert::result(pb::Code::Ok, ""), users }))
    }
}

impl Presence {
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

/// A batch fails as a whole only if nothing of it could be done.
fn unless_all_failed<T>(results: &[Result<T, Error>]) -> Result<(), Status> {
    match results.first() {
        Some(Err(error)) if results.iter().all(Result::is_err) => Err(status(error)),
        _ => Ok(()),
    }
}

fn queried(user: UserId, answer: &Answer) -> pb::QueryRouteResp {
    let live: Vec<LiveRoute<'_>> = answer.live_routes().collect();
    let newest = live.iter().max_by_key(|live| live.route.bound_version);
    let result = match newest {
        None => convert::result(pb::Code::NotFound, "the user has no live route"),
        Some(_) => convert::result(pb::Code::Ok, ""),
    };
    let shown = answer.status(newest.is_some());
    pb::QueryRouteResp {
        result,
        gateway_addr: newest.map(|newest| newest.life.gateway.to_string()).unwrap_or_default(),
        is_online: shown != Shown::Offline,
        status: convert::status_to_pb(shown).into(),
        routes: live.iter().map(|live| convert::live_route(user, live)).collect(),
        version: answer.version().0,
        last_seen_ms: answer.last_seen().0,
        source: convert::source_to_pb(answer.source).into(),
        age_ms: convert::millis(answer.age),
    }
}

fn user_route(user: UserId, answer: &Answer, with_routes: bool) -> pb::UserRoute {
    let newest = answer.newest();
    let shown = answer.status(newest.is_some());
    let code = if newest.is_some() { pb::Code::Ok } else { pb::Code::NotFound };
    let routes =
        if with_routes { answer.live_routes().map(|live| convert::live_route(user, &live)).collect() } else { Vec::new() };
    pb::UserRoute {
        user_id: user.get(),
        gateway_addr: newest.map(|newest| newest.life.gateway.to_string()).unwrap_or_default(),
        is_online: shown != Shown::Offline,
        status: convert::status_to_pb(shown).into(),
        routes,
        code: code.into(),
    }
}

fn by_source(counts: &LookedUp, source: Source) -> &HotCounter {
    match source {
        Source::Local => &counts.local,
        Source::Shared => &counts.shared,
        Source::Durable => &counts.durable,
    }
}
