//! `PresenceService`: bind, unbind, query.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::convert;
use crate::api::delivery;
use crate::api::status::item_code;
use crate::api::status::status;
use crate::domain::id::UserId;
use crate::domain::policy::Reason;
use crate::domain::status::Status as Shown;
use crate::domain::user::Outcome;
use crate::engine::delivery::Deliveries;
use crate::engine::directory::Answer;
use crate::engine::directory::Directory;
use crate::engine::directory::LiveRoute;
use crate::engine::directory::Source;
use crate::engine::lanes::Change;
use crate::engine::lanes::Lanes;
use crate::engine::lives::Lives;
use crate::error::Error;
use crate::metrics::ByReason;
use crate::metrics::ByResult;
use crate::metrics::ByWhat;
use crate::metrics::HotCounter;
use crate::metrics::LookedUp;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

pub struct Presence {
    pub lanes: Arc<Lanes>,
    pub directory: Arc<Directory>,
    pub deliveries: Arc<Deliveries>,
    pub lives: Arc<Lives>,
    pub metrics: Arc<Metrics>,
    pub max_message_bytes: usize,
}

#[tonic::async_trait]
impl PresenceService for Presence {
    async fn bind_route(&self, request: Request<pb::BindRouteReq>) -> Result<Response<pb::BindRouteResp>, Status> {
        let began = Instant::now();
        let (user, bind) = convert::bind(request.get_ref()).map_err(|error| status(&error))?;
        let outcome = self.lanes.submit(user, Change::Bind(bind)).await;
        self.metrics.bind_seconds.observe(began.elapsed());
        self.count_bind(&outcome);
        outcome.map(|outcome| Response::new(self.bound(user, outcome))).map_err(|error| status(&error))
    }

    async fn unbind_route(&self, request: Request<pb::UnbindRouteReq>) -> Result<Response<pb::UnbindRouteResp>, Status> {
        let (user, unbind) = convert::unbind(request.get_ref()).map_err(|error| status(&error))?;
        let outcome = self.lanes.submit(user, Change::Unbind(unbind)).await;
        let (result, response) = match outcome {
            Ok(Outcome::Unbound { version }) => (
                "unbound",
                Ok(pb::UnbindRouteResp { result: convert::result(pb::Code::Ok, ""), unbound: true, version: version.0 }),
            ),
            Ok(Outcome::NotBound { version, why }) => {
                let result = convert::result(pb::Code::Ok, why);
                ("not_bound", Ok(pb::UnbindRouteResp { result, unbound: false, version: version.0 }))
            }
            Ok(_) => ("error", Err(status(&Error::Internal { what: "an unbind had the outcome of another change" }))),
            Err(error) => ("error", Err(status(&error))),
        };
        self.metrics.unbinds.get_or_create(&ByResult { result }).inc();
        response.map(Response::new)
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
        let users: Vec<UserId> = binds.iter().map(|(user, _)| *user).collect();
        let outcomes = self.lanes.submit_many(binds.into_iter().map(|(user, bind)| (user, Change::Bind(bind))).collect()).await;
        outcomes.iter().for_each(|outcome| self.count_bind(outcome));
        unless_all_failed(&outcomes)?;
        let results = users.into_iter().zip(outcomes).map(|(user, outcome)| match outcome {
            Ok(outcome) => self.bound(user, outcome),
            Err(error) => not_bound_now(&error),
        });
        Ok(Response::new(pb::BatchBindRouteResp { results: results.collect() }))
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
    fn bound(&self, user: UserId, outcome: Outcome) -> pb::BindRouteResp {
        match outcome {
            Outcome::Bound { bound_version, version, epoch, kicked } => {
                let lives = self.lives.table();
                pb::BindRouteResp {
                    result: convert::result(pb::Code::Ok, ""),
                    route_key: convert::route_key(user, bound_version),
                    version: version.0,
                    kicked: kicked.iter().map(|(route, _)| convert::kicked_route(user, route, &lives)).collect(),
                    gateway_epoch: epoch.0,
                    retry_after_ms: 0,
                }
            }
            Outcome::Refused(refusal) => refused(pb::Code::Refused, convert::refusal(refusal)),
            Outcome::Fenced => refused(pb::Code::Fenced, "expired: the gateway's epoch is over; register, then bind again"),
            Outcome::Unbound { .. } | Outcome::NotBound { .. } | Outcome::Swept { .. } => {
                refused(pb::Code::Internal, "a bind had the outcome of another change")
            }
        }
    }

    fn count_bind(&self, outcome: &Result<Outcome, Error>) {
        let result = match outcome {
            Ok(Outcome::Bound { .. }) => "ok",
            Ok(Outcome::Refused(_)) => "refused",
            Ok(Outcome::Fenced) => "fenced",
            Ok(_) => "error",
            Err(Error::Overloaded { .. }) => "overloaded",
            Err(Error::Unavailable { .. }) => "unavailable",
            Err(Error::Invalid { .. } | Error::Internal { .. }) => "error",
        };
        self.metrics.binds.get_or_create(&ByResult { result }).inc();
        if let Ok(Outcome::Fenced) = outcome {
            self.metrics.fenced.get_or_create(&ByWhat { what: "bind" }).inc();
        }
        if let Ok(Outcome::Bound { kicked, .. }) = outcome {
            for (_, reason) in kicked {
                self.metrics.kicks.get_or_create(&ByReason { reason: reason_label(*reason) }).inc();
            }
        }
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

/// A batch fails as a whole only if nothing of it could be done.
fn unless_all_failed<T>(results: &[Result<T, Error>]) -> Result<(), Status> {
    match results.first() {
        Some(Err(error)) if results.iter().all(Result::is_err) => Err(status(error)),
        _ => Ok(()),
    }
}

fn refused(code: pb::Code, why: &str) -> pb::BindRouteResp {
    pb::BindRouteResp { result: convert::result(code, why), ..Default::default() }
}

fn not_bound_now(error: &Error) -> pb::BindRouteResp {
    let (code, retry_after) = item_code(error);
    pb::BindRouteResp { retry_after_ms: convert::millis(retry_after), ..refused(code, &error.to_string()) }
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

fn reason_label(reason: Reason) -> &'static str {
    match reason {
        Reason::Replaced => "replaced",
        Reason::DeviceLimit => "device_limit",
        Reason::PlatformLimit => "platform_limit",
    }
}
