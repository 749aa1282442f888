//! Watches: a call of their own, and what they have in common with those on a gateway's stream.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::Streaming;

use crate::api::access::Admission;
use crate::api::convert;
use crate::api::credential::Credential;
use crate::api::credential::revoked;
use crate::domain::caller::GatewayPatterns;
use crate::domain::gateway::LifeTable;
use crate::domain::id::UserId;
use crate::engine::presence::watches::Done;
use crate::engine::presence::watches::Telling;
use crate::engine::presence::watches::Told;
use crate::engine::presence::watches::Wanted;
use crate::engine::presence::watches::Watch;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::pb;
use crate::pb::watch_resp::Body;

/// Users in each list of one request.
const MAX_USERS: usize = 5_000;
/// Tellings that wait for the transport; more only when the caller reads.
pub const OUTGOING: usize = 64;

/// What both kinds of watches work with.
pub struct WatchContext {
    pub directory: Arc<Directory>,
    pub lives: Arc<Lives>,
    /// This node stops: watches end.
    pub draining: CancellationToken,
}

/// One `Watch` call.
pub struct WatchCall {
    pub tools: Arc<WatchContext>,
    pub watch: Watch,
    pub credential: Option<Credential>,
    pub out: mpsc::Sender<Result<pb::WatchResp, Status>>,
}

impl WatchCall {
    /// Serves the caller until one of both ends it. A caller who asks nothing more is still told.
    pub async fn run(self, mut requests: Streaming<pb::WatchReq>) {
        let Self { tools, watch, credential, out } = self;
        let admission = credential.as_ref().map(|credential| credential.admission().clone());
        let mut revoked = pin!(revoked(admission.clone()));
        let (mut asks, mut resumes_at) = (true, Instant::now());
        let end = loop {
            let takes_more = asks && watch.takes_more();
            tokio::select! {
                biased;
                () = out.closed() => return,
                () = &mut revoked => break Status::unauthenticated("the credential of this stream is not valid any more"),
                () = tools.draining.cancelled() => break Status::unavailable("this node stops: watch on another one with the versions you have"),
                () = sleep_until(resumes_at.into()), if asks && resumes_at > Instant::now() => {}
                request = requests.message(), if takes_more && resumes_at <= Instant::now() => match request {
                    Ok(Some(request)) => match wanted(&request) {
                        Ok(wanted) => {
                            resumes_at = Instant::now() + pause(admission.as_ref(), wanted.add.len());
                            tools.change(&watch, admission.as_ref(), wanted).await;
                        }
                        Err(error) => break Status::invalid_argument(format!("seq {}: {error}", request.seq)),
                    },
                    Ok(None) => asks = false,
                    Err(status) => break status,
                },
                told = next(&out, &watch) => match told {
                    Some((place, told)) => place.send(Ok(tools.told(told))),
                    None => return,
                },
            }
        };
        let _ = out.try_send(Err(end)); // a caller who does not read will see the end without a reason
    }
}

/// How long a caller who has named so many users has to wait before it may name more (`limits.users_per_s`).
fn pause(caller: Option<&Admission>, users: usize) -> Duration {
    match caller.filter(|_| users > 0).map(|admission| admission.take_users(users)) {
        Some(Err(Error::Overloaded { retry_after, .. })) => retry_after,
        _ => Duration::ZERO,
    }
}

/// What is told next, once it may be sent. None: the caller is gone.
async fn next<'a, T>(out: &'a mpsc::Sender<T>, watch: &Watch) -> Option<(mpsc::Permit<'a, T>, Told)> {
    let place = out.reserve().await.ok()?;
    Some((place, watch.next().await))
}

impl WatchContext {
    /// Changes what is watched, as far as the caller may.
    pub async fn change(&self, watch: &Watch, caller: Option<&Admission>, wanted: Wanted) {
        if let Some(admission) = caller
            && let Some(gateways) = admission.watches_only()
            && let Some(stranger) = self.stranger(&wanted, &gateways).await
        {
            let why = format!("user {stranger} is not bound to a gateway that the caller may speak for");
            let _ = admission.denied(&why); // for the audit; the stream stays
            return watch.refuse(&wanted, why);
        }
        watch.change(&wanted);
    }

    /// A user who is to be added and has no device on one of these gateways.
    async fn stranger(&self, wanted: &Wanted, gateways: &GatewayPatterns) -> Option<UserId> {
        let users: Vec<UserId> = wanted.add.iter().map(|(user, _)| *user).collect();
        let answers = self.directory.get_many(&users, None).await;
        let is_theirs = |answer: &Result<_, Error>| match answer {
            Ok(answer) => Answer::live_routes(answer).any(|route| gateways.cover(route.gateway())),
            Err(_) => false,
        };
        users.iter().zip(&answers).find(|(_, answer)| !is_theirs(answer)).map(|(user, _)| *user)
    }

    pub fn told(&self, told: Told) -> pb::WatchResp {
        let body = match told {
            Told::Presence(telling) => Body::Presence(presence(&telling, &self.lives.glance())),
            Told::Done(done) => Body::Done(self.done(done)),
        };
        pb::WatchResp { body: Some(body) }
    }

    fn done(&self, done: Done) -> pb::WatchDone {
        let result = match (&done.refused, done.is_incomplete) {
            (Some(why), _) => convert::result(pb::Code::Refused, why.clone()),
            (None, true) => convert::result(pb::Code::Unavailable, "some users cannot be read now; they are told later"),
            (None, false) => convert::result(pb::Code::Ok, ""),
        };
        pb::WatchDone { seq: done.seq, result, delayed: self.directory.is_behind() }
    }
}

/// The answer to a request of which nothing could be done.
pub fn refused(seq: u64, why: String) -> pb::WatchResp {
    let result = convert::result(pb::Code::Refused, why);
    pb::WatchResp { body: Some(Body::Done(pb::WatchDone { seq, result, delayed: false })) }
}

/// Checks a request.
pub fn wanted(request: &pb::WatchReq) -> Result<Wanted, Error> {
    convert::at_most("add", request.add.len(), MAX_USERS, "users")?;
    convert::at_most("remove", request.remove.len(), MAX_USERS, "users")?;
    let user = |field, raw| UserId::parse(raw).map_err(|error| Error::Invalid { field, reason: error.to_string() });
    Ok(Wanted {
        seq: request.seq,
        add: request.add.iter().map(|known| Ok((user("add", known.user_id)?, known.version))).collect::<Result<_, Error>>()?,
        remove: request.remove.iter().map(|raw| user("remove", *raw)).collect::<Result<_, Error>>()?,
    })
}

fn presence(telling: &Telling, lives: &LifeTable) -> pb::UserPresence {
    let shown = &telling.shown;
    let gateway = shown.gateway().and_then(|epoch| lives.get(epoch)).map(|life| life.gateway.to_string());
    pb::UserPresence {
        user_id: telling.user.get(),
        status: convert::status_to_pb(shown.status).into(),
        is_online: shown.is_online(),
        status_text: shown.text().to_owned(),
        last_seen_ms: shown.last_seen.0,
        version: shown.token,
        devices: shown.devices(),
        platforms: shown.platforms().map(|platform| convert::platform_to_pb(platform).into()).collect(),
        gateway_addr: gateway.unwrap_or_default(),
    }
}
