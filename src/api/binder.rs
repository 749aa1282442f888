//! Binds and unbinds as gateways ask for them, by a call of their own or on a stream.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use crate::api::convert;
use crate::api::status::item_code;
use crate::domain::event::Bind;
use crate::domain::event::Outcome;
use crate::domain::event::Unbind;
use crate::domain::id::UserId;
use crate::domain::policy::Reason;
use crate::domain::policy::Refusal;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Begun;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::ByReason;
use crate::metrics::ByResult;
use crate::metrics::ByWhat;
use crate::metrics::Metrics;
use crate::pb;
use crate::telemetry::spans::Place;

pub struct Binder {
    pub lanes: Arc<Lanes>,
    pub lives: Arc<Lives>,
    pub metrics: Arc<Metrics>,
}

impl Binder {
    pub async fn bind(&self, user: UserId, bind: Bind, trace: Option<Place>) -> Result<pb::BindRouteResp, Error> {
        let began = Instant::now();
        let outcome = self.lanes.submit_traced(user, Change::Bind(bind), trace).await;
        self.metrics.bind_seconds.observe(began.elapsed());
        self.count_bind(&outcome);
        outcome.map(|outcome| self.bound(user, outcome))
    }

    pub async fn unbind(&self, user: UserId, unbind: Unbind, trace: Option<Place>) -> Result<pb::UnbindRouteResp, Error> {
        self.unbound(self.lanes.submit_traced(user, Change::Unbind(unbind), trace).await)
    }

    /// Many binds, each with its own answer.
    pub async fn bind_many(&self, binds: Vec<(UserId, Bind)>) -> Vec<Result<pb::BindRouteResp, Error>> {
        let users: Vec<UserId> = binds.iter().map(|(user, _)| *user).collect();
        let outcomes = self.lanes.submit_many(binds.into_iter().map(|(user, bind)| (user, Change::Bind(bind))).collect()).await;
        outcomes.iter().for_each(|outcome| self.count_bind(outcome));
        users.into_iter().zip(outcomes).map(|(user, outcome)| outcome.map(|outcome| self.bound(user, outcome))).collect()
    }

    /// Takes a change's place in its lane: on a stream, the order of frames is the order of changes.
    pub fn begin(&self, user: UserId, change: Change) -> Result<Begun, Error> {
        self.lanes.begin(user, change)
    }

    pub async fn finish_bind(&self, user: UserId, begun: Result<Begun, Error>) -> pb::BindRouteResp {
        let outcome = self.finish(begun).await;
        self.count_bind(&outcome);
        match outcome {
            Ok(outcome) => self.bound(user, outcome),
            Err(error) => not_bound_now(&error),
        }
    }

    pub async fn finish_unbind(&self, begun: Result<Begun, Error>) -> pb::UnbindRouteResp {
        match self.unbound(self.finish(begun).await) {
            Ok(answer) => answer,
            Err(error) => {
                let (code, _) = item_code(&error);
                pb::UnbindRouteResp { result: convert::result(code, error.to_string()), ..Default::default() }
            }
        }
    }

    async fn finish(&self, begun: Result<Begun, Error>) -> Result<Outcome, Error> {
        self.lanes.finish(begun?).await
    }

    fn bound(&self, user: UserId, outcome: Outcome) -> pb::BindRouteResp {
        match outcome {
            Outcome::Bound { bound_version, version, epoch, kicked } => {
                let lives = self.lives.table();
                pb::BindRouteResp {
                    result: convert::result(pb::Code::Ok, ""),
                    route_key: convert::route_key(user, bound_version).to_string(),
                    version: version.0,
                    kicked: kicked.iter().map(|(route, _)| convert::kicked_route(user, route, &lives)).collect(),
                    gateway_epoch: epoch.0,
                    retry_after_ms: 0,
                }
            }
            Outcome::Refused(refusal) => {
                let left = if let Refusal::Banned { left, .. } = refusal { left } else { Duration::ZERO };
                pb::BindRouteResp {
                    retry_after_ms: convert::millis(left),
                    ..refused(pb::Code::Refused, &convert::refusal(refusal))
                }
            }
            Outcome::Fenced(fence) => pb::BindRouteResp { result: convert::fenced(fence), ..Default::default() },
            _ => not_bound_now(&Error::internal("a bind had the outcome of another change")),
        }
    }

    fn unbound(&self, outcome: Result<Outcome, Error>) -> Result<pb::UnbindRouteResp, Error> {
        let ok = |why| convert::result(pb::Code::Ok, why);
        let (label, answer) = match outcome {
            Ok(Outcome::Unbound { version }) => {
                ("unbound", Ok(pb::UnbindRouteResp { result: ok(""), unbound: true, version: version.0 }))
            }
            Ok(Outcome::NotBound { version, why }) => {
                ("not_bound", Ok(pb::UnbindRouteResp { result: ok(why), unbound: false, version: version.0 }))
            }
            Ok(Outcome::Fenced(fence)) => {
                self.metrics.fenced.get_or_create(&ByWhat { what: "unbind" }).inc();
                ("fenced", Ok(pb::UnbindRouteResp { result: convert::fenced(fence), ..Default::default() }))
            }
            Ok(_) => ("error", Err(Error::internal("an unbind had the outcome of another change"))),
            Err(error) => ("error", Err(error)),
        };
        self.metrics.unbinds.get_or_create(&ByResult { result: label }).inc();
        answer
    }

    fn count_bind(&self, outcome: &Result<Outcome, Error>) {
        let result = match outcome {
            Ok(Outcome::Bound { .. }) => "ok",
            Ok(Outcome::Refused(_)) => "refused",
            Ok(Outcome::Fenced(_)) => "fenced",
            Ok(_) => "error",
            Err(Error::Overloaded { .. } | Error::Limited { .. }) => "overloaded",
            Err(Error::Unavailable { .. }) => "unavailable",
            Err(Error::Invalid { .. } | Error::Internal { .. }) => "error",
        };
        self.metrics.binds.get_or_create(&ByResult { result }).inc();
        if let Ok(Outcome::Fenced(_)) = outcome {
            self.metrics.fenced.get_or_create(&ByWhat { what: "bind" }).inc();
        }
        if let Ok(Outcome::Bound { kicked, .. }) = outcome {
            for (_, reason) in kicked {
                self.metrics.kicks.get_or_create(&ByReason { reason: reason_label(*reason) }).inc();
            }
        }
    }
}

/// A bind among many that could not be done now.
pub fn not_bound_now(error: &Error) -> pb::BindRouteResp {
    let (code, retry_after) = item_code(error);
    pb::BindRouteResp { retry_after_ms: convert::millis(retry_after), ..refused(code, &error.to_string()) }
}

fn refused(code: pb::Code, why: &str) -> pb::BindRouteResp {
    pb::BindRouteResp { result: convert::result(code, why), ..Default::default() }
}

/// As metrics name it.
pub fn reason_label(reason: Reason) -> &'static str {
    match reason {
        Reason::Replaced => "replaced",
        Reason::DeviceLimit => "device_limit",
        Reason::PlatformLimit => "platform_limit",
        Reason::Operator => "operator",
        Reason::Drain => "drain",
        Reason::Migrate => "migrate",
        Reason::Banned => "banned",
    }
}
