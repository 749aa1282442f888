//! `AdminService`: for operators, on the admin port.

use std::sync::Arc;
use std::time::Duration;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::access;
use crate::api::audited::audited;
use crate::api::audited::never;
use crate::api::convert;
use crate::api::fit::ROOM;
use crate::api::fit::fit;
use crate::api::lists::Lists;
use crate::api::moves::Moves;
use crate::api::status::status;
use crate::domain::event::Outcome;
use crate::domain::gateway::Life;
use crate::domain::gateway::Liveness;
use crate::domain::gateway::late_before_end;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::time::Timestamp;
use crate::engine::gateways::digests::Digests;
use crate::engine::gateways::registry::Listed;
use crate::engine::gateways::registry::Registry;
use crate::engine::messages::peers::Peers;
use crate::engine::presence::explaining::Explaining;
use crate::engine::presence::history::History;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::pb;
use crate::pb::admin_service_server::AdminService;
use crate::security::audit::Audit;
use crate::security::audit::Entry;

const MAX_REASON_BYTES: usize = 200;
/// Epochs in one call.
const MAX_EPOCHS: usize = 10_000;
/// Lives in one answer.
const MAX_PAGE: usize = 20_000;

pub struct Admin {
    pub gateways: Arc<Registry>,
    pub digests: Arc<Digests>,
    pub lives: Arc<Lives>,
    pub audit: Audit,
    pub lanes: Arc<Lanes>,
    pub history: Arc<History>,
    pub metrics: Arc<Metrics>,
    pub lists: Arc<Lists>,
    pub moves: Moves,
    pub explaining: Arc<Explaining>,
    pub peers: Arc<Peers>,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_gateways(&self, request: Request<pb::ListGatewaysReq>) -> Result<Response<pb::ListGatewaysResp>, Status> {
        let request = request.get_ref();
        let after = page_after(&request.page_token).map_err(|error| status(&error))?;
        let limit = if request.page_size == 0 { MAX_PAGE } else { MAX_PAGE.min(request.page_size as usize) };
        let listed = match (request.late_only, request.include_dead) {
            (true, _) => Listed::Ending(late_before_end(self.gateways.terms.heartbeat_interval)),
            (false, true) => Listed::All,
            (false, false) => Listed::Living,
        };
        let listing = self.gateways.list(listed, after, limit).await.map_err(|error| status(&error))?;
        let (now, held) = (self.lives.clock.now(), listing.hold.is_some());
        let hold = listing.hold.unwrap_or_default();
        let mut lives: Vec<_> = listing.lives.into_iter().map(|(life, routes)| self.life(&life, routes, held, now)).collect();
        let is_whole = fit(&mut lives, ROOM) == 0 && lives.len() < limit;
        let last = lives.last().filter(|_| !is_whole);
        Ok(Response::new(pb::ListGatewaysResp {
            next_page_token: last.map_or_else(String::new, |last| format!("{}@{}", last.epoch, last.gateway_addr)),
            lives,
            hold: held,
            hold_left_ms: if held { left(hold.until, now) } else { 0 },
            hold_reason: if held { hold.reason } else { String::new() },
        }))
    }

    async fn purge_gateways(&self, request: Request<pb::PurgeGatewaysReq>) -> Result<Response<pb::PurgeGatewaysResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        convert::at_most("epochs", request.epochs.len(), MAX_EPOCHS, "epochs").map_err(|error| status(&error))?;
        if request.epochs.is_empty() && !request.held {
            let reason = "must be given, unless held is set".to_owned();
            return Err(status(&Error::Invalid { field: "epochs", reason }));
        }
        convert::at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes").map_err(|error| status(&error))?;
        let epochs = request.epochs.iter().map(|epoch| format!("epoch {epoch}"));
        let args = epochs.chain(request.held.then(|| "held".to_owned())).collect::<Vec<_>>().join(", ");
        let reason = request.reason.clone();
        let entry = Entry { action: "PurgeGateways".to_owned(), args, reason, ..Entry::default() };
        audited(&self.audit, &extensions, entry, never, purge(self.gateways.clone(), request)).await.map(Response::new)
    }

    async fn hold_gateways(&self, request: Request<pb::HoldGatewaysReq>) -> Result<Response<pb::HoldGatewaysResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        convert::at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes").map_err(|error| status(&error))?;
        let reason = if request.reason.is_empty() { "operator".to_owned() } else { format!("operator: {}", request.reason) };
        let length = Duration::from_millis(request.for_ms.into());
        let args = if length.is_zero() { "called off".to_owned() } else { format!("for {length:?}") };
        let entry = Entry { action: "HoldGateways".to_owned(), args, reason: request.reason, ..Entry::default() };
        let gateways = self.gateways.clone();
        audited(&self.audit, &extensions, entry, never, async move { gateways.hold(length, reason).await }).await?;
        Ok(Response::new(pb::HoldGatewaysResp { result: convert::result(pb::Code::Ok, "") }))
    }

    async fn forget_user(&self, request: Request<pb::ForgetUserReq>) -> Result<Response<pb::ForgetUserResp>, Status> {
        let user = convert::user_id(request.get_ref().user_id).map_err(|error| status(&error))?;
        if request.get_ref().dry_run {
            let rows = self.history.count_rows(user).await.map_err(|error| status(&error))?;
            return Ok(Response::new(pb::ForgetUserResp { result: convert::result(pb::Code::Ok, ""), rows }));
        }
        access::check_operator(request.extensions())?;
        let entry = Entry { action: "ForgetUser".to_owned(), target: format!("user {user}"), ..Entry::default() };
        let lanes = self.lanes.clone();
        let forgetting = async move {
            match lanes.submit(user, Change::Forget).await? {
                Outcome::Forgotten { rows, .. } => Ok(rows),
                _ => Err(Error::internal("a user was to be erased, and had the outcome of another change")),
            }
        };
        let rows = audited(&self.audit, request.extensions(), entry, never, forgetting).await?;
        Ok(Response::new(pb::ForgetUserResp { result: convert::result(pb::Code::Ok, ""), rows }))
    }

    async fn drain_gateway(&self, request: Request<pb::DrainGatewayReq>) -> Result<Response<pb::DrainGatewayResp>, Status> {
        self.moves.drain(request).await
    }

    async fn cancel_drain(&self, request: Request<pb::CancelDrainReq>) -> Result<Response<pb::CancelDrainResp>, Status> {
        self.moves.cancel(request).await
    }

    async fn list_drains(&self, request: Request<pb::ListDrainsReq>) -> Result<Response<pb::ListDrainsResp>, Status> {
        self.moves.list(request).await
    }

    async fn rebalance_gateways(
        &self,
        request: Request<pb::RebalanceGatewaysReq>,
    ) -> Result<Response<pb::RebalanceGatewaysResp>, Status> {
        self.moves.rebalance(request).await
    }

    async fn migrate_user(&self, request: Request<pb::MigrateUserReq>) -> Result<Response<pb::MigrateUserResp>, Status> {
        self.moves.migrate(request).await
    }

    async fn kick_device(&self, request: Request<pb::KickDeviceReq>) -> Result<Response<pb::KickDeviceResp>, Status> {
        self.kick(request).await.map(Response::new)
    }

    async fn force_offline(&self, request: Request<pb::ForceOfflineReq>) -> Result<Response<pb::ForceOfflineResp>, Status> {
        self.force(request).await.map(Response::new)
    }

    async fn list_online(&self, request: Request<pb::ListOnlineReq>) -> Result<Response<pb::ListOnlineResp>, Status> {
        self.lists.online(request.get_ref()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn count_online(&self, request: Request<pb::CountOnlineReq>) -> Result<Response<pb::CountOnlineResp>, Status> {
        self.lists.count(request.get_ref()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn preview_policy(&self, request: Request<pb::PreviewPolicyReq>) -> Result<Response<pb::PreviewPolicyResp>, Status> {
        self.lists.preview(request.get_ref()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn list_top(&self, request: Request<pb::ListTopReq>) -> Result<Response<pb::ListTopResp>, Status> {
        self.lists.top(request.get_ref()).await.map(Response::new).map_err(|error| status(&error))
    }

    async fn explain_route(&self, request: Request<pb::ExplainRouteReq>) -> Result<Response<pb::ExplainRouteResp>, Status> {
        self.explain(request.get_ref()).await.map(Response::new).map_err(|error| status(&error))
    }
}

impl Admin {
    pub(super) fn life(&self, life: &Life, routes: u64, held: bool, now: Timestamp) -> pb::Life {
        let late = life.is_managed() && life.liveness(now, self.gateways.terms.heartbeat_interval) == Liveness::Late;
        pb::Life {
            gateway_addr: life.gateway.to_string(),
            epoch: life.epoch.0,
            managed: life.is_managed(),
            alive: life.is_alive(),
            lease_left_ms: if life.is_managed() && life.is_alive() { left(life.lease_until, now) } else { 0 },
            region: life.profile.region.clone(),
            capacity: life.profile.capacity,
            connections: life.connections,
            load: life.load,
            routes,
            attached_node: life.attached.as_deref().unwrap_or_default().to_owned(),
            labels: life.profile.labels.clone().into_iter().collect(),
            held: held && late,
            late,
            last_beat_ms_ago: if life.is_managed() && life.is_alive() { ago(life.last_beat, now) } else { 0 },
            began_ms: life.began().0,
            ended_ms: life.end.map_or(0, |end| end.at.0),
            end_reason: life.end.map_or("", |end| end.reason.name()).to_owned(),
            weight: life.profile.weight,
            public_addr: life.profile.public_addr.clone(),
            login_rate: life.profile.login_rate,
            draining: life.draining,
            digest: self.digests.report(life.epoch),
        }
    }
}

async fn purge(gateways: Arc<Registry>, request: pb::PurgeGatewaysReq) -> Result<pb::PurgeGatewaysResp, Error> {
    let epochs = request.epochs.into_iter().map(Epoch).collect();
    let mut lives = gateways.purge(epochs).await?;
    let mut result = convert::result(pb::Code::Ok, "");
    if request.held {
        match gateways.confirm_hold().await? {
            Some(ended) => lives += ended,
            None => result = convert::result(pb::Code::NotFound, "no hold is on"),
        }
    }
    Ok(pb::PurgeGatewaysResp { result, lives: u32::try_from(lives).unwrap_or(u32::MAX) })
}

/// Where the page before ended.
fn page_after(token: &str) -> Result<Option<(GatewayAddr, Epoch)>, Error> {
    if token.is_empty() {
        return Ok(None);
    }
    let place = token.split_once('@').and_then(|(epoch, gateway)| Some((GatewayAddr::parse(gateway).ok()?, epoch.parse().ok()?)));
    let (gateway, epoch) = place
        .ok_or_else(|| Error::Invalid { field: "page_token", reason: "must be the next_page_token of an answer".to_owned() })?;
    Ok(Some((gateway, Epoch(epoch))))
}

fn ago(then: Timestamp, now: Timestamp) -> u64 {
    u64::try_from(now.0 - then.0).unwrap_or(0)
}

/// Negative: so long ago.
fn left(until: Timestamp, now: Timestamp) -> i64 {
    until.0 - now.0
}
