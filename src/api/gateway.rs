//! `GatewayService`: leases. Streams and the inbox answer UNIMPLEMENTED yet.

use std::sync::Arc;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::convert;
use crate::api::status::status;
use crate::domain::gateway::Life;
use crate::engine::gateways::Gateways;
use crate::engine::heartbeats::Heartbeats;
use crate::engine::lives::Lives;
use crate::pb;
use crate::pb::gateway_service_server::GatewayService;

pub struct Leases {
    pub gateways: Arc<Gateways>,
    pub heartbeats: Arc<Heartbeats>,
    pub lives: Arc<Lives>,
}

#[tonic::async_trait]
impl GatewayService for Leases {
    async fn register_gateway(
        &self,
        request: Request<pb::RegisterGatewayReq>,
    ) -> Result<Response<pb::RegisterGatewayResp>, Status> {
        let (profile, epoch) = convert::registration(request.into_inner()).map_err(|error| status(&error))?;
        let epoch = match epoch {
            None => Ok(self.gateways.register(profile).await.map_err(|error| status(&error))?.epoch),
            Some(epoch) => self.gateways.resume(profile, epoch).await.map_err(|error| status(&error))?.map(|()| epoch),
        };
        let terms = &self.gateways.terms;
        Ok(Response::new(match epoch {
            Ok(epoch) => pb::RegisterGatewayResp {
                result: convert::result(pb::Code::Ok, ""),
                gateway_epoch: epoch.0,
                heartbeat_interval_ms: convert::millis(terms.heartbeat_interval),
                lease_ms: convert::millis(terms.lease),
            },
            Err(fence) => pb::RegisterGatewayResp { result: convert::fenced(fence), ..Default::default() },
        }))
    }

    async fn heartbeat(&self, request: Request<pb::HeartbeatReq>) -> Result<Response<pb::HeartbeatResp>, Status> {
        let (gateway, beat) = convert::beat(request.get_ref()).map_err(|error| status(&error))?;
        let beaten = self.heartbeats.beat(gateway, beat).await.map_err(|error| status(&error))?;
        Ok(Response::new(match beaten {
            Ok(life) => self.beaten(&life),
            Err(fence) => pb::HeartbeatResp { result: convert::fenced(fence), ..Default::default() },
        }))
    }

    async fn deregister_gateway(
        &self,
        request: Request<pb::DeregisterGatewayReq>,
    ) -> Result<Response<pb::DeregisterGatewayResp>, Status> {
        let request = request.get_ref();
        let gateway = convert::gateway(&request.gateway_addr).map_err(|error| status(&error))?;
        let epoch = convert::registered_epoch(request.gateway_epoch).map_err(|error| status(&error))?;
        let done = self.gateways.deregister(gateway, epoch).await.map_err(|error| status(&error))?;
        let result = done.map_or_else(convert::fenced, |()| convert::result(pb::Code::Ok, ""));
        Ok(Response::new(pb::DeregisterGatewayResp { result }))
    }
}

impl Leases {
    fn beaten(&self, life: &Life) -> pb::HeartbeatResp {
        let lease_ms = convert::millis(life.lease_until.since(self.lives.clock.now()));
        pb::HeartbeatResp { result: convert::result(pb::Code::Ok, ""), draining: life.draining, lease_ms }
    }
}
