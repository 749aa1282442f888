//! `AdminService`: for operators, on the admin port.

use std::sync::Arc;
use std::time::Duration;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::convert;
use crate::api::status::status;
use crate::domain::gateway::LifeDetails;
use crate::domain::gateway::Liveness;
use crate::domain::id::Epoch;
use crate::domain::time::Timestamp;
use crate::engine::gateways::Gateways;
use crate::engine::lives::Lives;
use crate::error::Error;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

const MAX_REASON_BYTES: usize = 200;
/// Epochs in one call.
const MAX_EPOCHS: usize = 10_000;

pub struct Admin {
    pub gateways: Arc<Gateways>,
    pub lives: Arc<Lives>,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn list_gateways(&self, request: Request<pb::ListGatewaysReq>) -> Result<Response<pb::ListGatewaysResp>, Status> {
        let listing = self.gateways.list(request.get_ref().include_dead).await.map_err(|error| status(&error))?;
        let (now, held) = (self.lives.clock.now(), listing.hold.is_some());
        let hold = listing.hold.unwrap_or_default();
        Ok(Response::new(pb::ListGatewaysResp {
            lives: listing.lives.into_iter().map(|(listed, routes)| self.life(listed, routes, held, now)).collect(),
            hold: held,
            hold_left_ms: if held { left(hold.until, now) } else { 0 },
            hold_reason: if held { hold.reason } else { String::new() },
        }))
    }

    async fn purge_gateways(&self, request: Request<pb::PurgeGatewaysReq>) -> Result<Response<pb::PurgeGatewaysResp>, Status> {
        let request = request.into_inner();
        convert::at_most("epochs", request.epochs.len(), MAX_EPOCHS, "epochs").map_err(|error| status(&error))?;
        if request.epochs.is_empty() && !request.held {
            let reason = "must be given, unless held is set".to_owned();
            return Err(status(&Error::Invalid { field: "epochs", reason }));
        }
        let epochs = request.epochs.into_iter().map(Epoch).collect();
        let mut lives = self.gateways.purge(epochs).await.map_err(|error| status(&error))?;
        let mut result = convert::result(pb::Code::Ok, "");
        if request.held {
            match self.gateways.confirm_hold().await.map_err(|error| status(&error))? {
                Some(ended) => lives += ended,
                None => result = convert::result(pb::Code::NotFound, "no hold is on"),
            }
        }
        Ok(Response::new(pb::PurgeGatewaysResp { result, lives: u32::try_from(lives).unwrap_or(u32::MAX) }))
    }

    async fn hold_gateways(&self, request: Request<pb::HoldGatewaysReq>) -> Result<Response<pb::HoldGatewaysResp>, Status> {
        let request = request.into_inner();
        convert::at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes").map_err(|error| status(&error))?;
        let reason = format!("operator: {}", request.reason);
        let length = Duration::from_millis(request.for_ms.into());
        self.gateways.hold(length, reason).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::HoldGatewaysResp { result: convert::result(pb::Code::Ok, "") }))
    }
}

impl Admin {
    fn life(&self, listed: LifeDetails, routes: u64, held: bool, now: Timestamp) -> pb::Life {
        let LifeDetails { life, profile, load } = listed;
        let late = life.is_managed() && life.liveness(now, self.gateways.terms.heartbeat_interval) == Liveness::Late;
        pb::Life {
            gateway_addr: life.gateway.to_string(),
            epoch: life.epoch.0,
            managed: life.is_managed(),
            alive: life.is_alive(),
            lease_left_ms: if life.is_managed() && life.is_alive() { left(life.lease_until, now) } else { 0 },
            region: profile.region,
            capacity: profile.capacity,
            connections: life.connections,
            load: load as f32,
            routes,
            attached_node: life.attached.as_deref().unwrap_or_default().to_owned(),
            labels: profile.labels.into_iter().collect(),
            held: held && late,
        }
    }
}

/// Negative: so long ago.
fn left(until: Timestamp, now: Timestamp) -> i64 {
    until.0 - now.0
}
