//! `GatewayService`: leases, streams, acknowledgements, the inbox.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::Streaming;
use tonic::codegen::BoxStream;
use tonic::codegen::http::Extensions;

use crate::api::access;
use crate::api::access::Admission;
use crate::api::attach::OUTGOING;
use crate::api::attach::Stream;
use crate::api::attach::StreamContext;
use crate::api::convert;
use crate::api::credential::Credential;
use crate::api::status::status;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::engine::gateways::heartbeats::Heartbeats;
use crate::engine::gateways::registry::Registry;
use crate::engine::messages::acks::Ack;
use crate::engine::messages::inbox::Inboxes;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::pb;
use crate::pb::gateway_service_server::GatewayService;

/// Messages of one answer, if the caller does not say how many; and at most.
const PULLED: usize = 20;
const MAX_PULLED: usize = 50;

pub struct Leases {
    pub gateways: Arc<Registry>,
    pub heartbeats: Arc<Heartbeats>,
    pub lives: Arc<Lives>,
    pub inboxes: Arc<Inboxes>,
    pub directory: Arc<Directory>,
    pub stream_tools: Arc<StreamContext>,
    /// Owns the streams; they end when the node drains.
    pub attached: TaskTracker,
}

#[tonic::async_trait]
impl GatewayService for Leases {
    async fn register_gateway(
        &self,
        request: Request<pb::RegisterGatewayReq>,
    ) -> Result<Response<pb::RegisterGatewayResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        let registration = convert::registration(request).map_err(|error| status(&error))?;
        access::check_gateway(&extensions, &registration.gateway)?;
        Ok(Response::new(match self.gateways.enter(registration).await.map_err(|error| status(&error))? {
            Ok(epoch) => convert::welcome(epoch, &self.gateways.terms),
            Err(fence) => pb::RegisterGatewayResp { result: convert::fenced(fence), ..Default::default() },
        }))
    }

    async fn heartbeat(&self, request: Request<pb::HeartbeatReq>) -> Result<Response<pb::HeartbeatResp>, Status> {
        let (gateway, beat) = convert::beat(request.get_ref()).map_err(|error| status(&error))?;
        access::check_gateway(request.extensions(), &gateway)?;
        let beaten = self.heartbeats.beat(gateway, beat).await.map_err(|error| status(&error))?;
        Ok(Response::new(match beaten {
            Ok(life) => convert::beaten(&life, self.lives.clock.now()),
            Err(fence) => pb::HeartbeatResp { result: convert::fenced(fence), ..Default::default() },
        }))
    }

    async fn deregister_gateway(
        &self,
        request: Request<pb::DeregisterGatewayReq>,
    ) -> Result<Response<pb::DeregisterGatewayResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        let gateway = convert::gateway(&request.gateway_addr).map_err(|error| status(&error))?;
        access::check_gateway(&extensions, &gateway)?;
        let epoch = convert::registered_epoch(request.gateway_epoch).map_err(|error| status(&error))?;
        let done = self.gateways.deregister(gateway, epoch).await.map_err(|error| status(&error))?;
        let result = done.map_or_else(convert::fenced, |()| convert::result(pb::Code::Ok, ""));
        Ok(Response::new(pb::DeregisterGatewayResp { result }))
    }

    async fn attach(&self, request: Request<Streaming<pb::GatewayFrame>>) -> Result<Response<BoxStream<pb::NodeFrame>>, Status> {
        let (out, frames) = mpsc::channel(OUTGOING);
        let credential = Admission::of(request.extensions()).map(Credential::new).transpose().map_err(|error| status(&error))?;
        self.attached.spawn(Stream::new(self.stream_tools.clone(), credential, out).run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(frames).map(|(frame, _room)| frame))))
    }

    async fn ack_delivery(&self, request: Request<pb::AckDeliveryReq>) -> Result<Response<pb::AckDeliveryResp>, Status> {
        let (_, extensions, pb::AckDeliveryReq { acks }) = request.into_parts();
        convert::batch_size("acks", acks.len(), convert::MAX_BATCH).map_err(|error| status(&error))?;
        let admission = Admission::of(&extensions).filter(|admission| admission.is_gateway());
        let by = admission.map(|admission| admission.identity.caller.gateways.clone());
        let acks = acks.iter().map(|ack| Ok(Ack { by: by.clone(), ..convert::ack(ack)? })).collect::<Result<Vec<_>, _>>();
        let acks = acks.map_err(|error: Error| status(&error))?;
        let all = acks.len();
        let not_theirs = self.stream_tools.peers.take_acks(&self.stream_tools.acks, acks);
        if let Some(admission) = admission.filter(|_| not_theirs > 0 && not_theirs == all) {
            return Err(admission.denied("these messages were handed to gateways that it may not speak for"));
        }
        Ok(Response::new(pb::AckDeliveryResp { result: convert::result(pb::Code::Ok, "") }))
    }

    async fn pull_inbox(&self, request: Request<pb::PullInboxReq>) -> Result<Response<pb::PullInboxResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        let (user, device) = inbox_of(request.user_id, &request.device_id)?;
        self.check_user(&extensions, user).await?;
        convert::at_most("limit", request.limit as usize, MAX_PULLED, "messages").map_err(|error| status(&error))?;
        let limit = if request.limit == 0 { PULLED } else { request.limit as usize };
        let limits = (limit, convert::MAX_ANSWER_BYTES);
        let pulled = self.inboxes.pull(user, request.after_seq, limits, &device).await;
        let (messages, more) = pulled.map_err(|error| status(&error))?;
        let deliveries = messages.into_iter().map(|stored| convert::stored_delivery(user, stored)).collect();
        Ok(Response::new(pb::PullInboxResp { result: convert::result(pb::Code::Ok, ""), deliveries, more }))
    }

    async fn ack_inbox(&self, request: Request<pb::AckInboxReq>) -> Result<Response<pb::AckInboxResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        let (user, device) = inbox_of(request.user_id, &request.device_id)?;
        self.check_user(&extensions, user).await?;
        self.inboxes.read_up_to(user, request.up_to_seq, device).await.map_err(|error| status(&error))?;
        Ok(Response::new(pb::AckInboxResp { result: convert::result(pb::Code::Ok, "") }))
    }
}

impl Leases {
    /// A gateway reads the inboxes of those users only who are bound to it.
    async fn check_user(&self, extensions: &Extensions, user: UserId) -> Result<(), Status> {
        let Some(admission) = Admission::of(extensions).filter(|admission| admission.is_gateway()) else { return Ok(()) };
        for bound in [None, Some(Duration::ZERO)] {
            // The second look is at SQL: a bind of this moment may not be known here yet.
            let answer = self.directory.look_up(user, bound).await.map_err(|error| status(&error))?;
            if answer.live_routes().any(|route| admission.identity.caller.may_speak_for(route.gateway())) {
                return Ok(());
            }
        }
        Err(admission.denied(&format!("user {user} is not bound to a gateway that it may speak for")))
    }
}

fn inbox_of(user_id: i64, device_id: &str) -> Result<(UserId, DeviceId), Status> {
    let user = convert::user_id(user_id).map_err(|error| status(&error))?;
    Ok((user, convert::device_id(device_id).map_err(|error| status(&error))?))
}
