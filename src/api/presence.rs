//! `PresenceService`: bind, unbind, deliver, status, watch, allocation. What is asked by the hundred thousand is answered in `queries`.

use std::sync::Arc;

use prost::Message;
use tonic::Request;
use tonic::Response;
use tonic::Status;
use tonic::Streaming;
use tonic::codegen::BoxStream;

use crate::api::access;
use crate::api::access::Admission;
use crate::api::allocation::AllocationCalls;
use crate::api::binder::Binder;
use crate::api::binder::not_bound_now;
use crate::api::convert;
use crate::api::credential::Credential;
use crate::api::delivery;
use crate::api::status::status;
use crate::api::statuses;
use crate::api::watch::WatchCall;
use crate::api::watch::WatchContext;
use crate::domain::event::Outcome;
use crate::engine::messages::delivery::Deliveries;
use crate::engine::presence::history::History;
use crate::engine::presence::statuses::Statuses;
use crate::engine::presence::watches::Watches;
use crate::error::Error;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

#[derive(Clone)]
pub struct Presence {
    pub binder: Arc<Binder>,
    pub deliveries: Arc<Deliveries>,
    pub max_message_bytes: usize,
    pub statuses: Arc<Statuses>,
    pub history: Arc<History>,
    pub watches: Arc<Watches>,
    pub watching: Arc<WatchContext>,
    pub allocation: AllocationCalls,
}

#[tonic::async_trait]
impl PresenceService for Presence {
    async fn bind_route(&self, request: Request<pb::BindRouteReq>) -> Result<Response<pb::BindRouteResp>, Status> {
        let (user, bind) = convert::bind(request.get_ref()).map_err(|error| status(&error))?;
        access::check_gateway(request.extensions(), &bind.gateway)?;
        let target = format!("user {user} on {}", bind.gateway);
        let bound = self.binder.bind(user, bind).await.map(Response::new).map_err(|error| status(&error));
        access::note_operator(request.extensions(), "BindRoute", || target, &bound);
        bound
    }

    async fn unbind_route(&self, request: Request<pb::UnbindRouteReq>) -> Result<Response<pb::UnbindRouteResp>, Status> {
        let by = Admission::of(request.extensions()).map(|admission| &admission.identity.caller);
        let (user, unbind) = convert::unbind(request.get_ref(), by).map_err(|error| status(&error))?;
        if let Ok(gateway) = convert::gateway(&request.get_ref().gateway_addr) {
            access::check_gateway(request.extensions(), &gateway)?;
        }
        let unbound = self.binder.unbind(user, unbind).await.map(Response::new).map_err(|error| status(&error));
        access::note_operator(request.extensions(), "UnbindRoute", || format!("user {user}"), &unbound);
        unbound
    }

    async fn deliver(&self, request: Request<pb::DeliverReq>) -> Result<Response<pb::DeliverResp>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let deadline = delivery::deadline(&metadata);
        let (user, message) = delivery::message(request, self.max_message_bytes, &self.deliveries)?;
        let reports = self.deliveries.deliver(&[user], &message, deadline).await.map_err(|error| status(&error));
        access::note_operator(&extensions, "Deliver", || format!("user {user}"), &reports);
        delivery::delivered(reports?).map(Response::new)
    }

    async fn batch_deliver(&self, request: Request<pb::BatchDeliverReq>) -> Result<Response<pb::BatchDeliverResp>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let deadline = delivery::deadline(&metadata);
        access::take_users(&extensions, request.user_ids.len())?;
        let (users, message) = delivery::batch_message(request, self.max_message_bytes)?;
        let reports = self.deliveries.deliver(&users, &message, deadline).await.map_err(|error| status(&error));
        access::note_operator(&extensions, "BatchDeliver", || format!("{} users", users.len()), &reports);
        let reports = reports?;
        unless_all_failed(&reports)?;
        Ok(Response::new(delivery::batch_delivered(&users, &reports)))
    }

    async fn batch_bind_route(
        &self,
        request: Request<pb::BatchBindRouteReq>,
    ) -> Result<Response<pb::BatchBindRouteResp>, Status> {
        let (_, extensions, request) = request.into_parts();
        let binds = request.binds;
        convert::batch_size("binds", binds.len(), convert::MAX_BATCH).map_err(|error| status(&error))?;
        access::take_users(&extensions, binds.len())?;
        let binds: Vec<_> = binds.iter().map(convert::bind).collect::<Result<_, _>>().map_err(|error| status(&error))?;
        binds.iter().try_for_each(|(_, bind)| access::check_gateway(&extensions, &bind.gateway))?;
        let users = binds.len();
        let answers = self.binder.bind_many(binds).await;
        let done = unless_all_failed(&answers);
        access::note_operator(&extensions, "BatchBindRoute", || format!("{users} users"), &done);
        done?;
        let mut results: Vec<_> =
            answers.into_iter().map(|answer| answer.unwrap_or_else(|error| not_bound_now(&error))).collect();
        leave_kicked_out(&mut results);
        Ok(Response::new(pb::BatchBindRouteResp { results }))
    }

    async fn set_status(&self, request: Request<pb::SetStatusReq>) -> Result<Response<pb::SetStatusResp>, Status> {
        let set = statuses::set_status(request.get_ref(), self.statuses.max_text_bytes);
        let (user, mut set) = set.map_err(|error| status(&error))?;
        let gateway = Admission::of(request.extensions()).filter(|admission| admission.is_gateway());
        set.by = gateway.map(|admission| admission.identity.caller.gateways.clone());
        let outcome = self.statuses.finish(self.statuses.begin(user, set)).await;
        if let (Ok(Outcome::NotTheirs), Some(admission)) = (&outcome, gateway) {
            return Err(admission.denied(&format!("user {user} is not bound to a gateway that it may speak for")));
        }
        let answer = statuses::status_set(outcome).map(Response::new).map_err(|error| status(&error));
        access::note_operator(request.extensions(), "SetStatus", || format!("user {user}"), &answer);
        answer
    }

    async fn get_status_history(
        &self,
        request: Request<pb::GetStatusHistoryReq>,
    ) -> Result<Response<pb::GetStatusHistoryResp>, Status> {
        let page = statuses::log_page(request.get_ref()).map_err(|error| status(&error))?;
        let log = self.history.log(page).await.map_err(|error| status(&error))?;
        Ok(Response::new(statuses::log(log)))
    }

    async fn get_online_time(&self, request: Request<pb::GetOnlineTimeReq>) -> Result<Response<pb::GetOnlineTimeResp>, Status> {
        let request = request.get_ref();
        let user = convert::user_id(request.user_id).map_err(|error| status(&error))?;
        let days = statuses::days(request, self.history.today()).map_err(|error| status(&error))?;
        let time = self.history.online_time(user, days, request.include_hidden).await.map_err(|error| status(&error))?;
        Ok(Response::new(statuses::online_time(time, request.include_hidden)))
    }

    async fn allocate_gateway(
        &self,
        request: Request<pb::AllocateGatewayReq>,
    ) -> Result<Response<pb::AllocateGatewayResp>, Status> {
        self.allocation.allocate(request.into_inner()).map(Response::new).map_err(|error| status(&error))
    }

    async fn list_nodes(&self, _: Request<pb::ListNodesReq>) -> Result<Response<pb::ListNodesResp>, Status> {
        Ok(Response::new(self.allocation.nodes()))
    }

    async fn watch(&self, request: Request<Streaming<pb::WatchReq>>) -> Result<Response<BoxStream<pb::WatchResp>>, Status> {
        let credential = Admission::of(request.extensions()).map(Credential::new).transpose().map_err(|error| status(&error))?;
        let watch = self.watches.open().map_err(|error| status(&error))?;
        let call = WatchCall::new(self.watching.clone(), watch, credential, request.into_inner());
        Ok(Response::new(Box::pin(call.tellings())))
    }
}

/// Where the answer would be too large the routes that were removed are left out: what was bound has to be told.
fn leave_kicked_out(results: &mut [pb::BindRouteResp]) {
    const WHY: &str = "kicked is left out, the answer would be too large: bind fewer at once";
    const HEAD_BYTES: usize = 1 + 5;
    let kicked = |result: &pb::BindRouteResp| result.kicked.iter().map(|route| HEAD_BYTES + route.encoded_len()).sum::<usize>();
    let beside = |result: &pb::BindRouteResp| HEAD_BYTES + WHY.len() + result.encoded_len().saturating_sub(kicked(result));
    let mut left = convert::MAX_ANSWER_BYTES.saturating_sub(results.iter().map(beside).sum());
    for result in results.iter_mut().filter(|result| !result.kicked.is_empty()) {
        match left.checked_sub(kicked(result)) {
            Some(less) => left = less,
            None => {
                left = 0;
                result.kicked = Vec::new();
                result.result = convert::result(pb::Code::Ok, WHY);
            }
        }
    }
}

/// A batch fails as a whole only if nothing of it could be done.
pub fn unless_all_failed<T>(results: &[Result<T, Error>]) -> Result<(), Status> {
    match results.first() {
        Some(Err(error)) if results.iter().all(Result::is_err) => Err(status(error)),
        _ => Ok(()),
    }
}
