//! `PresenceService`: bind, unbind, deliver. What is asked by the hundred thousand is answered in `queries`.

use std::sync::Arc;

use tonic::Request;
use tonic::Response;
use tonic::Status;

use crate::api::binder::Binder;
use crate::api::binder::not_bound_now;
use crate::api::convert;
use crate::api::delivery;
use crate::api::status::status;
use crate::engine::delivery::Deliveries;
use crate::error::Error;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

pub struct Presence {
    pub binder: Arc<Binder>,
    pub deliveries: Arc<Deliveries>,
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
}

/// A batch fails as a whole only if nothing of it could be done.
pub fn unless_all_failed<T>(results: &[Result<T, Error>]) -> Result<(), Status> {
    match results.first() {
        Some(Err(error)) if results.iter().all(Result::is_err) => Err(status(error)),
        _ => Ok(()),
    }
}
