//! `ctl bench`: a bounded load on this system, on users and a gateway of its own. A plain client on one connection and one
//! thread: what it reaches, the system reaches at least.

mod figures;

use std::cell::Cell;
use std::cell::RefCell;
use std::time::Duration;
use std::time::Instant;

use clap::Args;
use futures_util::future::join_all;
use serde::Serialize;
use tokio::signal::unix::SignalKind;
use tokio::signal::unix::signal;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::figures::Figures;
use super::DONE;
use super::FAILED;
use super::Outcome;
use super::code;
use super::print;
use crate::client::gateway::Connection;
use crate::client::gateway::Event;
use crate::client::gateway::Gateway;
use crate::client::gateway::Options;
use crate::client::security::Link;
use crate::client::security::Security;
use crate::pb;
use crate::pb::Code;
use crate::pb::presence_service_client::PresenceServiceClient;

/// Users of this command, and of nobody else: the last ones there can be.
pub const FIRST_USER: i64 = i64::MAX - MAX_USERS;
const MAX_USERS: i64 = 10_000;
/// Nobody can reach it.
pub const GATEWAY: &str = "im-presence-bench.invalid:1";
const DEVICE: &str = "bench";
const MESSAGE: &str = "a message of im-presence ctl bench, as long as many are";
/// How often it is looked whether the users are offline again, and how long that may take.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Load the system for a few seconds, and say what it did: binds, queries, deliveries that a device acknowledges
///
/// The load is on users of its own, the last 10,000 ids that there are, on the gateway im-presence-bench.invalid:1 of its own,
/// to which nobody else is sent. It begins only if none of them is online, and takes them offline in the end, after Ctrl-C,
/// too. A token has to be that of a gateway with this name. Everybody else's calls become slower meanwhile.
#[derive(Args)]
pub struct Bench {
    /// Users that are bound, up to 10,000
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(i64).range(1..=MAX_USERS))]
    users: i64,
    /// Queries, and deliveries, at most
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    calls: u64,
    /// How long each of the three parts takes at most, in seconds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,
    /// Calls under way at the same time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=256))]
    callers: u64,
}

/// How it went.
#[derive(Default, Serialize)]
struct Report {
    addr: String,
    users: i64,
    callers: u64,
    binds: Figures,
    queries: Figures,
    deliveries: Figures,
    /// By Ctrl-C: it is not whole.
    interrupted: bool,
    /// Nobody of its users is online any more.
    clean: bool,
}

/// A system that is to be loaded.
struct Target {
    client: PresenceServiceClient<Link>,
    patience: Duration,
    interrupted: CancellationToken,
}

impl Bench {
    pub(super) async fn run(
        &self,
        client: PresenceServiceClient<Link>,
        addr: &str,
        json: bool,
        (patience, security): (Duration, Security),
    ) -> Result<Outcome, Outcome> {
        let interrupted = until_interrupted().map_err(|error| failed(format!("cannot hear Ctrl-C: {error}")))?;
        let target = Target { client, patience, interrupted };
        if let Some(user) = target.online(self.users).await?.first() {
            let (user_id, gateway) = (user.user_id, &user.gateway_addr);
            let why = format!("user {user_id}, whom it would bind, is online on {gateway}: another bench runs, or was killed");
            return Err(failed(why));
        }
        let gateway = target.attach(addr, security).await?;
        let mut report = Report { addr: addr.to_owned(), users: self.users, callers: self.callers, ..Report::default() };
        self.load(&target, &gateway, &mut report).await;
        report.interrupted = target.interrupted.is_cancelled();
        let left = match gateway.stop().await {
            Ok(()) => target.are_offline(self.users).await,
            Err(status) => Err(status.message().to_owned()),
        };
        report.clean = left.is_ok();
        let all = [&report.binds, &report.queries, &report.deliveries];
        let is_good = report.clean && !report.interrupted && all.iter().all(|figures| figures.errors == 0);
        let text = if json { serde_json::to_string(&report).unwrap_or_default() } else { report.text(left.err()) };
        Ok(Outcome { text, exit: if is_good { DONE } else { FAILED } })
    }

    async fn load(&self, target: &Target, gateway: &Gateway, report: &mut Report) {
        let users = self.users.unsigned_abs();
        let bound = RefCell::new(Vec::new());
        report.binds = self
            .part(target, users, async |n| {
                let connection = connection(n);
                let user_id = connection.user_id;
                let answer = gateway.bind(connection).await.map_err(|stopped| stopped.to_string())?;
                is_ok(&answer.result)?;
                bound.borrow_mut().push(user_id);
                Ok(())
            })
            .await;
        let bound = bound.into_inner();
        if bound.is_empty() {
            return;
        }
        let user = |n: u64| bound[usize::try_from(n).unwrap_or(0) % bound.len()];
        report.queries = self
            .part(target, self.calls, async |n| {
                let request = pb::QueryRouteReq { user_id: user(n), ..Default::default() };
                is_ok(&said(target.client.clone().query_route(request).await)?.result)
            })
            .await;
        let ack_timeout_ms = u32::try_from(target.patience.as_millis()).unwrap_or(u32::MAX);
        report.deliveries = self
            .part(target, self.calls, async |n| {
                let (user_id, message) = (user(n), MESSAGE.to_owned());
                let request = pb::DeliverReq { user_id, message, ack_timeout_ms, ..Default::default() };
                let answer = said(target.client.clone().deliver(request).await)?;
                is_ok(&answer.result)?;
                if answer.acked_devices.is_empty() { Err("no device acknowledged it".to_owned()) } else { Ok(()) }
            })
            .await;
    }

    /// `call(n)` for n from 0, until that is `calls`, the time is over or somebody interrupts.
    async fn part(&self, target: &Target, calls: u64, call: impl AsyncFn(u64) -> Result<(), String>) -> Figures {
        let (began, limit) = (Instant::now(), Duration::from_secs(self.seconds));
        let (next, figures) = (Cell::new(0), RefCell::new(Figures::default()));
        let one_caller = async || {
            while next.get() < calls && began.elapsed() < limit {
                let (n, asked) = (next.replace(next.get() + 1), Instant::now());
                let answered = target.interrupted.run_until_cancelled(timeout(target.patience, call(n)));
                let Some(answered) = answered.await else { return };
                let answered = answered.unwrap_or_else(|_| Err("no answer in time".to_owned()));
                figures.borrow_mut().add(asked.elapsed(), answered);
            }
        };
        join_all((0..self.callers).map(|_| one_caller())).await;
        figures.into_inner().over(began.elapsed())
    }
}

impl Target {
    /// Who of its users is online, past every cache.
    async fn online(&self, users: i64) -> Result<Vec<pb::UserRoute>, Outcome> {
        let user_ids = (0..users).map(|n| FIRST_USER + n).collect();
        let request = pb::BatchQueryRouteReq { user_ids, max_staleness_ms: Some(0), ..Default::default() };
        let asked = timeout(self.patience, self.client.clone().batch_query_route(request)).await;
        let answer = asked.map_err(|_| failed("no answer in time".to_owned()))?;
        let answer = said(answer).map_err(|why| failed(format!("cannot look whether its users are free: {why}")))?;
        let unknown = answer.users.iter().find(|user| !matches!(user.code(), Code::Ok | Code::NotFound));
        match unknown {
            Some(user) => Err(failed(format!("cannot look whether user {} is free: {:?}", user.user_id, user.code()))),
            None => Ok(answer.users.into_iter().filter(|user| user.code() == Code::Ok).collect()),
        }
    }

    /// # Errors
    /// Why they may still be online.
    async fn are_offline(&self, users: i64) -> Result<(), String> {
        let began = Instant::now();
        loop {
            match self.online(users).await {
                Ok(online) if online.is_empty() => return Ok(()),
                Ok(online) if began.elapsed() > GONE_WITHIN => return Err(format!("{} still show", online.len())),
                Err(outcome) if began.elapsed() > GONE_WITHIN => return Err(outcome.text),
                _ => sleep(LOOK_EVERY).await,
            }
        }
    }

    /// A gateway whose devices acknowledge whatever comes.
    async fn attach(&self, addr: &str, security: Security) -> Result<Gateway, Outcome> {
        let (tell, mut told) = watch::channel(None);
        let on_event = move |event| match event {
            Event::Delivery(_, acker) => acker.taken(DEVICE),
            Event::Attached { .. } => _ = tell.send(Some(Ok(()))),
            Event::Detached(status) => _ = tell.send(Some(Err(status.message().to_owned()))),
            _ => {}
        };
        let weight = Some(0); // nobody is sent here
        let (nodes, gateway_addr) = (vec![addr.to_owned()], GATEWAY.to_owned());
        let options = Options { nodes, gateway_addr, security, weight, ..Options::default() };
        let gateway = Gateway::start(options, on_event).map_err(|error| failed(error.to_string()))?;
        let attached = timeout(self.patience, told.wait_for(Option::is_some)).await;
        let why = match attached.as_ref().map(|told| told.as_deref()) {
            Ok(Ok(Some(Ok(())))) => return Ok(gateway),
            Ok(Ok(Some(Err(why)))) => why.as_str(),
            _ => "no answer in time",
        };
        Err(failed(format!("cannot attach as {GATEWAY}: {why}")))
    }
}

impl Report {
    fn text(&self, left: Option<String>) -> String {
        let Self { addr, users, callers, binds, queries, deliveries, interrupted, .. } = self;
        let all = [("binds", binds), ("queries", queries), ("deliveries", deliveries)];
        let mut text = format!("{addr}: {users} users on one gateway, {callers} calls at a time\n{}", figures::table(&all));
        if *interrupted {
            text.push_str("\nit was interrupted");
        }
        text.push_str(&match left {
            None => "\nnone of the users is online any more".to_owned(),
            Some(why) => format!("\nits users may still be online, until the lease of {GATEWAY} ends: {why}"),
        });
        text
    }
}

fn connection(n: u64) -> Connection {
    let user_id = FIRST_USER + i64::try_from(n).unwrap_or(0);
    Connection { user_id, device_id: DEVICE.to_owned(), conn_id: "bench".to_owned(), ..Connection::default() }
}

fn said<T>(answer: Result<tonic::Response<T>, tonic::Status>) -> Result<T, String> {
    answer.map(tonic::Response::into_inner).map_err(|status| format!("{:?}: {}", status.code(), status.message()))
}

fn is_ok(result: &Option<pb::Result>) -> Result<(), String> {
    match code(result) {
        Code::Ok => Ok(()),
        _ => Err(print::refusal(result).trim_start().to_owned()),
    }
}

/// Cancelled by Ctrl-C or SIGTERM.
fn until_interrupted() -> std::io::Result<CancellationToken> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let token = CancellationToken::new();
    let interrupted = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        interrupted.cancel();
    });
    Ok(token)
}

fn failed(text: String) -> Outcome {
    Outcome { text, exit: FAILED }
}
