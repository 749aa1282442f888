//! Watches: a call of their own, and what they have in common with those on a gateway's stream.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::Stream;
use futures_util::future::BoxFuture;
use futures_util::stream::unfold;
use tokio::task::yield_now;
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
/// Tellings that go to the transport together: a stream keeps a buffer of that size.
const TOGETHER: u32 = 32;

/// What both kinds of watches work with.
pub struct WatchContext {
    pub directory: Arc<Directory>,
    pub lives: Arc<Lives>,
    /// This node stops: watches end.
    pub draining: CancellationToken,
}

/// One `Watch` call, polled by its transport: there are many of them, and most wait.
pub struct WatchCall {
    tools: Arc<WatchContext>,
    watch: Watch,
    requests: Streaming<pb::WatchReq>,
    credential: Option<Credential>,
    revoked: Option<BoxFuture<'static, ()>>,
    /// The caller may ask for more: it has not ended its half, nor named more users than it may lately.
    asks: bool,
    asks_from: Instant,
    told_in_a_row: u32,
    has_ended: bool,
}

impl WatchCall {
    pub fn new(
        tools: Arc<WatchContext>,
        watch: Watch,
        credential: Option<Credential>,
        requests: Streaming<pb::WatchReq>,
    ) -> Self {
        let revoked = credential.as_ref().map(|credential| revoked(Some(credential.admission().clone())).boxed());
        let (asks, asks_from, told_in_a_row, has_ended) = (true, Instant::now(), 0, false);
        Self { tools, watch, requests, credential, revoked, asks, asks_from, told_in_a_row, has_ended }
    }

    /// What the caller is told, until one of both ends it. A caller who asks nothing more is still told.
    pub fn tellings(self) -> impl Stream<Item = Result<pb::WatchResp, Status>> + Send {
        unfold(self, async |mut call| {
            if call.has_ended {
                return None;
            }
            let told = call.next().await;
            call.has_ended = told.is_err();
            Some((told, call))
        })
    }

    async fn next(&mut self) -> Result<pb::WatchResp, Status> {
        if self.told_in_a_row >= TOGETHER {
            self.told_in_a_row = 0;
            yield_now().await;
        }
        loop {
            let now = Instant::now();
            let takes_more = self.asks && self.watch.takes_more();
            let Self { tools, watch, requests, revoked, .. } = self;
            tokio::select! {
                biased;
                () = when(revoked.as_mut()) => return Err(Status::unauthenticated("the credential of this stream is not valid any more")),
                () = tools.draining.cancelled() => return Err(Status::unavailable("this node stops: watch on another one with the versions you have")),
                () = sleep_until(self.asks_from.into()), if takes_more && self.asks_from > now => {}
                request = requests.message(), if takes_more && self.asks_from <= now => match request? {
                    Some(request) => self.take(&request).await?,
                    None => self.asks = false,
                },
                told = watch.next() => {
                    self.told_in_a_row += 1;
                    return Ok(tools.told(told));
                }
            }
        }
    }

    async fn take(&mut self, request: &pb::WatchReq) -> Result<(), Status> {
        let wanted = wanted(request).map_err(|error| Status::invalid_argument(format!("seq {}: {error}", request.seq)))?;
        let caller = self.credential.as_ref().map(Credential::admission);
        self.asks_from = Instant::now() + pause(caller, wanted.add.len());
        self.told_in_a_row = 0;
        self.tools.change(&self.watch, caller, wanted).await;
        Ok(())
    }
}

async fn when(ended: Option<&mut BoxFuture<'static, ()>>) {
    match ended {
        Some(ended) => ended.await,
        None => std::future::pending().await,
    }
}

/// How long a caller who has named so many users has to wait before it may name more (`limits.users_per_s`).
fn pause(caller: Option<&Admission>, users: usize) -> Duration {
    match caller.filter(|_| users > 0).map(|admission| admission.take_users(users)) {
        Some(Err(Error::Limited { retry_after, .. })) => retry_after,
        _ => Duration::ZERO,
    }
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
