//! `AdminService`, what moves users: drains, rebalancing, single users.

use std::sync::Arc;
use std::time::Duration;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::access;
use crate::api::audited::audited;
use crate::api::convert;
use crate::api::convert::MAX_LABEL_BYTES;
use crate::api::convert::at_most;
use crate::api::convert::result;
use crate::api::status::status;
use crate::domain::drain::Drain;
use crate::domain::id::GatewayAddr;
use crate::domain::time::Timestamp;
use crate::engine::gateways::drains::DrainOrder;
use crate::engine::gateways::drains::Drains;
use crate::engine::gateways::drains::Migrated;
use crate::engine::gateways::drains::Ordered;
use crate::engine::gateways::drains::Plan;
use crate::engine::gateways::rebalance::Levelled;
use crate::engine::gateways::rebalance::RebalanceOrder;
use crate::error::Error;
use crate::pb;
use crate::pb::Code;
use crate::security::audit::Audit;
use crate::security::audit::Entry;

const MAX_REASON_BYTES: usize = 255;
const MAX_TARGETS: usize = 64;
const MAX_LABELS: usize = 64;
/// A time in milliseconds and an id.
const MAX_TOKEN_BYTES: usize = 64;
/// Users per second.
const MAX_RATE: usize = 1_000_000;
/// Seconds that a drain may wait, pause or take.
const MAX_SECONDS: usize = 7 * 86_400;
const PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// Of the mean, if the caller does not say.
const TOLERANCE: f64 = 0.1;

const NO_DEVICE: &str = "the user has no device that could go there";
const NO_GATEWAY: &str = "there is no other gateway that takes users";

/// Orders to move users.
pub struct Moves {
    pub drains: Arc<Drains>,
    pub audit: Audit,
}

impl Moves {
    pub async fn drain(&self, request: Request<pb::DrainGatewayReq>) -> Result<Response<pb::DrainGatewayResp>, Status> {
        let order = drain_order(request.get_ref()).map_err(|error| status(&error))?;
        let from = order.gateway.to_string();
        let ordered = if request.get_ref().dry_run {
            self.drains.order(order, true).await.map_err(|error| status(&error))?
        } else {
            access::check_operator(request.extensions())?;
            let (target, reason, args) = (from.clone(), order.reason.clone(), how_to_drain(&order));
            let entry = Entry { action: "DrainGateway".to_owned(), target, args, reason, ..Entry::default() };
            let drains = self.drains.clone();
            let doing = async move { drains.order(order, false).await };
            audited(&self.audit, request.extensions(), entry, not_ordered, doing).await?
        };
        let answer = match ordered {
            Ordered::Planned { drain, plan, eta, against } => {
                let eta_s = u32::try_from(eta.as_secs()).unwrap_or(u32::MAX);
                let drain = Some(pb::Drained { state: "planned".to_owned(), eta_s, ..drained(&drain, drain.began) });
                let plan = plan_to_pb(&from, plan);
                pb::DrainGatewayResp { result: result(Code::Ok, against.unwrap_or_default()), drain, plan }
            }
            Ordered::Begun(drain) => {
                let drain = Some(drained(&drain, drain.began));
                pb::DrainGatewayResp { result: result(Code::Ok, ""), drain, ..Default::default() }
            }
            Ordered::Refused(why) => pb::DrainGatewayResp { result: result(Code::Refused, why), ..Default::default() },
            Ordered::NotFound => {
                let why = format!("no gateway {from} lives");
                pb::DrainGatewayResp { result: result(Code::NotFound, why), ..Default::default() }
            }
        };
        Ok(Response::new(answer))
    }

    pub async fn cancel(&self, request: Request<pb::CancelDrainReq>) -> Result<Response<pb::CancelDrainResp>, Status> {
        let asked = request.get_ref();
        at_most("id", asked.id.len(), MAX_REASON_BYTES, "bytes").map_err(|error| status(&error))?;
        if asked.gateway_addr.is_empty() == asked.id.is_empty() {
            let reason = "either it or id must be given".to_owned();
            return Err(status(&Error::Invalid { field: "gateway_addr", reason }));
        }
        let gateway = optional_gateway("gateway_addr", &asked.gateway_addr).map_err(|error| status(&error))?;
        let target = format!("{}{}", asked.gateway_addr, asked.id);
        let entry = Entry { action: "CancelDrain".to_owned(), target, ..Entry::default() };
        let (drains, id) = (self.drains.clone(), asked.id.clone());
        let doing = async move { drains.cancel(gateway.as_ref(), &id).await };
        let cancelled = audited(&self.audit, request.extensions(), entry, not_ordered, doing).await?;
        Ok(Response::new(match cancelled {
            Ordered::Begun(drain) => {
                pb::CancelDrainResp { result: result(Code::Ok, ""), drain: Some(drained(&drain, drain.began)) }
            }
            _ => pb::CancelDrainResp { result: result(Code::NotFound, "no such drain runs"), drain: None },
        }))
    }

    pub async fn list(&self, request: Request<pb::ListDrainsReq>) -> Result<Response<pb::ListDrainsResp>, Status> {
        let asked = request.get_ref();
        let listed = async {
            let gateway = optional_gateway("gateway_addr", &asked.gateway_addr)?;
            at_most("page_size", asked.page_size as usize, MAX_PAGE, "drains")?;
            let limit = if asked.page_size == 0 { PAGE } else { asked.page_size as usize };
            let after = page_after(&asked.page_token)?;
            let drains = self.drains.list(gateway, asked.active_only, after, limit as i64).await?;
            let last = drains.last().filter(|_| drains.len() == limit);
            let next_page_token = last.map_or_else(String::new, |last| format!("{}@{}", last.began.0, last.id));
            let now = self.drains.mover.lives.clock.now();
            Ok(pb::ListDrainsResp { drains: drains.iter().map(|drain| drained(drain, now)).collect(), next_page_token })
        };
        listed.await.map(Response::new).map_err(|error: Error| status(&error))
    }

    pub async fn rebalance(
        &self,
        request: Request<pb::RebalanceGatewaysReq>,
    ) -> Result<Response<pb::RebalanceGatewaysResp>, Status> {
        let order = rebalance_order(request.get_ref()).map_err(|error| status(&error))?;
        let dry_run = request.get_ref().dry_run;
        let levelled = if dry_run {
            self.drains.rebalance(&order, true).await.map_err(|error| status(&error))?
        } else {
            access::check_operator(request.extensions())?;
            let (args, reason) = (how_to_level(&order), order.reason.clone());
            let entry = Entry { action: "RebalanceGateways".to_owned(), args, reason, ..Entry::default() };
            let drains = self.drains.clone();
            let doing = async move { drains.rebalance(&order, false).await };
            let refusal = |levelled: &Levelled| levelled.against.clone();
            audited(&self.audit, request.extensions(), entry, refusal, doing).await?
        };
        let Levelled { moves, drains, against } = levelled;
        let code = if against.is_some() && !dry_run { Code::Refused } else { Code::Ok };
        let plan = moves.into_iter().map(|(from, to, users)| move_to_pb(&from.to_string(), &to, users)).collect();
        let drains = drains.iter().map(|drain| drained(drain, drain.began)).collect();
        let result = result(code, against.unwrap_or_default());
        Ok(Response::new(pb::RebalanceGatewaysResp { result, plan, drains }))
    }

    pub async fn migrate(&self, request: Request<pb::MigrateUserReq>) -> Result<Response<pb::MigrateUserResp>, Status> {
        let asked = request.get_ref();
        let user = convert::user_id(asked.user_id).map_err(|error| status(&error))?;
        let to = optional_gateway("to", &asked.to).map_err(|error| status(&error))?;
        at_most("reason", asked.reason.len(), MAX_REASON_BYTES, "bytes").map_err(|error| status(&error))?;
        let device = (!asked.device_id.is_empty()).then(|| convert::device_id(&asked.device_id)).transpose();
        let device = device.map_err(|error| status(&error))?;
        let migrated = if asked.dry_run {
            self.drains.migrate(user, to.as_ref(), device.as_ref(), true).await.map_err(|error| status(&error))?
        } else {
            access::check_operator(request.extensions())?;
            let (target, args) = (format!("user {}", asked.user_id), how_to_migrate(asked));
            let reason = asked.reason.clone();
            let entry = Entry { action: "MigrateUser".to_owned(), target, args, reason, ..Entry::default() };
            let drains = self.drains.clone();
            let doing = async move { drains.migrate(user, to.as_ref(), device.as_ref(), false).await };
            audited(&self.audit, request.extensions(), entry, not_migrated, doing).await?
        };
        Ok(Response::new(match migrated {
            Migrated::Asked { routes, from, to } => {
                let from = from.iter().map(GatewayAddr::to_string).collect::<Vec<_>>().join(" ");
                let routes = u32::try_from(routes).unwrap_or(u32::MAX);
                pb::MigrateUserResp { result: result(Code::Ok, ""), routes, plan: plan_to_pb(&from, to) }
            }
            Migrated::NotOnline => pb::MigrateUserResp { result: result(Code::NotFound, NO_DEVICE), ..Default::default() },
            Migrated::Nowhere => pb::MigrateUserResp { result: result(Code::Refused, NO_GATEWAY), ..Default::default() },
        }))
    }
}

fn not_ordered(ordered: &Ordered) -> Option<String> {
    match ordered {
        Ordered::Planned { .. } | Ordered::Begun(_) => None,
        Ordered::Refused(why) => Some(why.clone()),
        Ordered::NotFound => Some("not found".to_owned()),
    }
}

fn not_migrated(migrated: &Migrated) -> Option<String> {
    match migrated {
        Migrated::Asked { .. } => None,
        Migrated::NotOnline => Some(NO_DEVICE.to_owned()),
        Migrated::Nowhere => Some(NO_GATEWAY.to_owned()),
    }
}

fn drain_order(request: &pb::DrainGatewayReq) -> Result<DrainOrder, Error> {
    let gateway = convert::gateway(&request.gateway_addr)?;
    at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes")?;
    at_most("to", request.to.len(), MAX_TARGETS, "gateways")?;
    let to = request.to.iter().map(|addr| named_gateway("to", addr)).collect::<Result<_, _>>()?;
    let seconds = |field, seconds: u32| {
        at_most(field, seconds as usize, MAX_SECONDS, "s")?;
        Ok::<_, Error>(Duration::from_secs(seconds.into()))
    };
    let given = |duration: Duration| (!duration.is_zero()).then_some(duration);
    Ok(DrainOrder {
        gateway,
        rate: rate(request.rate)?,
        deadline: given(seconds("deadline_s", request.deadline_s)?),
        reason: request.reason.clone(),
        to,
        share: if request.share == 0.0 { 1.0 } else { part("share", request.share)? },
        wait: seconds("wait_s", request.wait_s)?,
        settle: given(seconds("settle_s", request.settle_s)?),
        force: request.force,
    })
}

fn rebalance_order(request: &pb::RebalanceGatewaysReq) -> Result<RebalanceOrder, Error> {
    at_most("region", request.region.len(), MAX_REASON_BYTES, "bytes")?;
    at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes")?;
    at_most("labels", request.labels.len(), MAX_LABELS, "labels")?;
    for text in request.labels.iter().flat_map(|(name, value)| [name, value]) {
        at_most("labels", text.len(), MAX_LABEL_BYTES, "bytes each")?;
    }
    Ok(RebalanceOrder {
        region: request.region.clone(),
        labels: request.labels.clone().into_iter().collect(),
        tolerance: if request.tolerance == 0.0 { TOLERANCE } else { part("tolerance", request.tolerance)? },
        rate: rate(request.rate)?,
        reason: request.reason.clone(),
    })
}

fn rate(raw: u32) -> Result<Option<u32>, Error> {
    at_most("rate", raw as usize, MAX_RATE, "users per second")?;
    Ok((raw != 0).then_some(raw))
}

/// What was said of how, for the audit.
fn how_to_drain(order: &DrainOrder) -> String {
    let to: Vec<String> = order.to.iter().map(|to| format!("to {to}")).collect();
    let parts = [
        order.rate.map(|rate| format!("rate {rate}")),
        order.deadline.map(|deadline| format!("deadline {} s", deadline.as_secs())),
        (order.share < 1.0).then(|| format!("share {}", order.share)),
        (!order.wait.is_zero()).then(|| format!("wait {} s", order.wait.as_secs())),
        order.settle.map(|settle| format!("settle {} s", settle.as_secs())),
        order.force.then(|| "force".to_owned()),
    ];
    parts.into_iter().flatten().chain(to).collect::<Vec<_>>().join(", ")
}

fn how_to_level(order: &RebalanceOrder) -> String {
    let labels = order.labels.iter().map(|(name, value)| format!("label {name}={value}"));
    let parts = [
        Some(format!("tolerance {}", order.tolerance)),
        (!order.region.is_empty()).then(|| format!("region {}", order.region)),
        order.rate.map(|rate| format!("rate {rate}")),
    ];
    parts.into_iter().flatten().chain(labels).collect::<Vec<_>>().join(", ")
}

fn how_to_migrate(asked: &pb::MigrateUserReq) -> String {
    let parts = [("to", &asked.to), ("device", &asked.device_id)];
    let said = parts.into_iter().filter(|(_, value)| !value.is_empty());
    said.map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>().join(", ")
}

/// As it was written: 0.3 is not what a float makes of it.
fn part(field: &'static str, raw: f32) -> Result<f64, Error> {
    let part = raw.to_string().parse().unwrap_or(f64::NAN);
    match part > 0.0 && part <= 1.0 {
        true => Ok(part),
        false => Err(Error::Invalid { field, reason: format!("must be from 0 to 1, is {raw}") }),
    }
}

fn optional_gateway(field: &'static str, raw: &str) -> Result<Option<GatewayAddr>, Error> {
    (!raw.is_empty()).then(|| named_gateway(field, raw)).transpose()
}

fn named_gateway(field: &'static str, raw: &str) -> Result<GatewayAddr, Error> {
    GatewayAddr::parse(raw).map_err(|error| Error::Invalid { field, reason: error.to_string() })
}

/// Where the page before ended.
fn page_after(token: &str) -> Result<Option<(Timestamp, String)>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let place = token
        .split_once('@')
        .filter(|_| token.len() <= MAX_TOKEN_BYTES)
        .and_then(|(began, id)| Some((Timestamp(began.parse().ok()?), id.to_owned())));
    let reason = || "must be the next_page_token of an answer".to_owned();
    place.map(Some).ok_or_else(|| Error::Invalid { field: "page_token", reason: reason() })
}

fn plan_to_pb(from: &str, plan: Plan) -> Vec<pb::MovePlan> {
    plan.into_iter().map(|(to, users)| move_to_pb(from, &to, users)).collect()
}

fn move_to_pb(from: &str, to: &GatewayAddr, users: u64) -> pb::MovePlan {
    pb::MovePlan { from: from.to_owned(), to: to.to_string(), users }
}

fn drained(drain: &Drain, now: Timestamp) -> pb::Drained {
    let Drain { terms, .. } = drain;
    pb::Drained {
        gateway_addr: drain.gateway.to_string(),
        epoch: drain.epoch.0,
        users: drain.users,
        moved: drain.moved(),
        left: drain.left,
        began_ms: drain.began.0,
        deadline_ms: terms.deadline.map_or(0, |deadline| deadline.0),
        reason: terms.reason.clone(),
        state: drain.state.name().to_owned(),
        id: drain.id.clone(),
        asked: drain.asked,
        unheard: drain.unheard,
        rate: terms.rate,
        pass: drain.pass,
        eta_s: drain.eta(now).map_or(0, |eta| u32::try_from(eta.as_secs()).unwrap_or(u32::MAX).max(1)),
        share: terms.share as f32,
        node_id: drain.node_id.clone(),
    }
}
