//! `im-presence ctl`: the calls of `PresenceService` from a shell, and what gateways hear. A plain client: it sees what any
//! other client sees.

mod allocation;
pub mod bench;
mod configuration;
mod credentials;
mod explain;
mod forget;
mod gateway;
mod gateways;
mod length;
mod listen;
mod moment;
mod moves;
mod operators;
mod presence;
mod print;
mod rest;
mod shown;
mod status;
mod top;
mod views;
mod watch;

use std::error::Error;
use std::io;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::Subcommand;
use tonic::metadata::AsciiMetadataValue;
use tonic_types::StatusExt;

use crate::client::security::Link;
use crate::client::security::Security;
use crate::client::security::root_cause;
use crate::ctl::allocation::Allocate;
use crate::ctl::allocation::nodes;
use crate::ctl::bench::Bench;
pub use crate::ctl::credentials::Credentials;
use crate::ctl::explain::Explain;
use crate::ctl::forget::ForgetUser;
use crate::ctl::gateway::Gateway;
use crate::ctl::gateways::Gateways;
use crate::ctl::listen::Listen;
use crate::ctl::moves::Moves;
use crate::ctl::operators::Operators;
use crate::ctl::presence::BatchQuery;
use crate::ctl::presence::Bind;
use crate::ctl::presence::Deliver;
use crate::ctl::presence::Query;
use crate::ctl::presence::Unbind;
use crate::ctl::rest::Rest;
use crate::ctl::status::History;
use crate::ctl::status::OnlineTime;
use crate::ctl::status::Status;
use crate::ctl::views::Views;
use crate::ctl::watch::End;
use crate::ctl::watch::Watch;
use crate::pb;
use crate::pb::Code;
use crate::pb::presence_service_client::PresenceServiceClient;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;
const NO: u8 = 3;

/// Asks the node for the steps of a delivery.
const TRACE: &str = "im-trace";
/// 2,000 users with all their routes may be larger than tonic's 4 MiB.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;

const HELP: &str = "\
Examples:
  im-presence ctl bind 42 gw-1:7000 --device phone --platform ios --conn c1
  im-presence ctl query 42
  im-presence ctl query 42 --max-staleness-ms 0          past every cache
  im-presence ctl unbind 42 --gateway gw-1:7000 --device phone
  im-presence ctl batch-query 1 2 3 --routes
  im-presence ctl --json batch-query --online-only - < ids.txt | jq -r '.users[].user_id'
  im-presence ctl gateway gw-1:7000 42                   a gateway in this terminal, with user 42 on it
  im-presence ctl listen 42 --redis redis://127.0.0.1:6379      as a gateway would
  im-presence ctl deliver 42 'dinner is ready'
  im-presence ctl deliver 42 'are you there?' --ack-timeout-ms 2000 --trace     where it went, and how long that took
  im-presence ctl status 42 busy --text 'in a meeting' --for 3600
  im-presence ctl status 42 --device phone --idle true
  im-presence ctl status 42                              how the user is shown
  im-presence ctl watch 42 43                            a line whenever one is shown differently
  im-presence ctl history 42 --from 2026-11-01 --limit 20
  im-presence ctl online-time 42
  im-presence ctl allocate 42 --region eu                where the user should connect
  im-presence ctl nodes                                  which nodes there are
  im-presence ctl forget-user 42 --dry-run               on the admin port
  im-presence ctl offline 42 --ban 1h                    also kick, online, count, preview-policy, top
  im-presence ctl explain 42                             why the user is online or not; on the admin port
  im-presence ctl gateways                               who lives; see its own --help
  im-presence ctl doctor                                 what is wrong, and what to do; also top, events, audit, config
  im-presence ctl drain gw-1:7000 --dry-run              where its users would go
  im-presence ctl bench --seconds 2                      how fast this system is, on users of its own

Exit codes: 0 done (query, and status that sets nothing: the user is online; deliver: delivered; listen, watch: stopped by
Ctrl-C), 1 the call failed, 2 bad usage or an argument that the node refused, 3 the answer is no (query, status: not online;
unbind: nothing to unbind; allocate: nobody takes the user; bind: refused by the device policy, or fenced; status --idle: no such device; deliver: not online,
or nobody listens).";

/// Bind, unbind and look up users on a running node; deliver to them, watch them, and listen as a gateway does
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Ctl {
    /// The node's gRPC address
    #[arg(long, value_name = "HOST:PORT", env = "IM_PRESENCE_ADDR", default_value = "127.0.0.1:6000", global = true)]
    addr: String,
    /// Print answers as proto3 JSON: field names as in the .proto files, 64-bit integers as strings
    #[arg(long, global = true)]
    json: bool,
    /// How long to wait, in milliseconds: for the connection, then for the answer
    #[arg(long, value_name = "MS", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(1..), global = true)]
    timeout: u64,
    /// File with the token to send
    #[arg(long, value_name = "FILE", env = "IM_PRESENCE_TOKEN_FILE", global = true)]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    credentials: Credentials,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Say that a device of a user is connected to a gateway
    Bind(Bind),
    /// Say that a device of a user has gone
    Unbind(Unbind),
    /// Ask where a user is
    Query(Query),
    /// Ask where many users are
    BatchQuery(BatchQuery),
    /// Hand a message to the gateways that hold a user's devices
    Deliver(Deliver),
    /// Print what gateways are told for users, until Ctrl-C
    Listen(Listen),
    /// Be a gateway in this terminal: attach, bind users, print what comes for them and acknowledge it, until Ctrl-C
    Gateway(Gateway),
    /// Say how a user wants to be seen, or print how the user is shown
    Status(Status),
    /// Print how users are shown, now and whenever that changes, until Ctrl-C
    Watch(Watch),
    /// Print what a user was shown as
    History(History),
    /// Print how long a user was online, by day
    OnlineTime(OnlineTime),
    /// Ask where a user should connect; counts as a log-in that is on its way
    Allocate(Allocate),
    /// List the nodes
    #[command(after_help = "Example:\n  im-presence ctl nodes --addr node-1:6000")]
    Nodes,
    /// Kick a user's devices and erase all that is known of the user; on the node's admin port
    ForgetUser(ForgetUser),
    /// Say why a user is online, suspect or offline: what each tier holds, what each route is worth; on the node's admin port
    Explain(Explain),
    Bench(Bench),
    Gateways(Gateways),
    #[command(flatten)]
    Views(Views),
    #[command(flatten)]
    Moves(Moves),
    #[command(flatten)]
    Operators(Operators),
}

/// What goes to stdout (an answer) or stderr (why there is none), and the exit code.
struct Outcome {
    text: String,
    exit: u8,
}

impl Ctl {
    /// Makes the call and prints its answer.
    pub fn run(self) -> ExitCode {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let outcome = match runtime {
            Ok(runtime) => runtime.block_on(self.call()),
            Err(error) => Err(Outcome { text: format!("cannot start: {error}"), exit: FAILED }),
        };
        let (written, exit) = match outcome {
            Ok(Outcome { text, exit }) if text.is_empty() => (Ok(()), exit),
            Ok(Outcome { text, exit }) => (writeln!(io::stdout(), "{text}"), exit),
            Err(Outcome { text, exit }) => (writeln!(io::stderr(), "{text}"), exit),
        };
        match written {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(FAILED),
            _ => ExitCode::from(exit), // a reader that closed its pipe has seen enough
        }
    }

    async fn call(self) -> Result<Outcome, Outcome> {
        let unusable = |text| Outcome { text, exit: BAD_USAGE };
        let answer = match &self.command {
            Command::Bind(bind) => {
                self.connect().await?.bind_route(bind.request()).await.map(|answer| self.bound(bind, answer.get_ref()))
            }
            Command::Unbind(unbind) => {
                self.connect().await?.unbind_route(unbind.request()).await.map(|answer| self.unbound(unbind, answer.get_ref()))
            }
            Command::Query(query) => {
                self.connect().await?.query_route(query.request()).await.map(|answer| self.found(query, answer.get_ref()))
            }
            Command::BatchQuery(query) => {
                let request = query.request(query.ids().map_err(unusable)?);
                self.connect().await?.batch_query_route(request).await.map(|answer| self.listed(query, answer.get_ref()))
            }
            Command::Deliver(deliver) => {
                let mut request = tonic::Request::new(deliver.request().map_err(unusable)?);
                request.set_timeout(self.patience()); // tells the node until when a retry makes sense
                if deliver.trace {
                    request.metadata_mut().insert(TRACE, AsciiMetadataValue::from_static("1"));
                }
                self.connect().await?.deliver(request).await.map(|answer| self.delivered(deliver, answer.get_ref()))
            }
            Command::Gateways(gateways) => {
                let link = link(gateways.addr(), self.patience(), "--admin", &self.security()?).await?;
                gateways.call(link, self.json).await
            }
            Command::Moves(moves) => {
                moves.call(link(moves.addr(), self.patience(), "--admin", &self.security()?).await?, self.json).await
            }
            Command::Views(views) => return views.call(&self.rest(views.addr())?, self.json).await,
            Command::Operators(Operators::Top(top)) if top.is_live() => {
                return top.live(&self.rest(top.addr())?, self.json).await;
            }
            Command::Operators(command) => {
                command.call(link(command.addr(), self.patience(), "--admin", &self.security()?).await?, self.json).await
            }
            Command::Status(status) => status.call(&mut self.connect().await?, self.json).await,
            Command::History(history) => history.call(&mut self.connect().await?, self.json).await,
            Command::OnlineTime(time) => time.call(&mut self.connect().await?, self.json).await,
            Command::Allocate(allocate) => allocate.call(&mut self.connect().await?, self.json).await,
            Command::Nodes => nodes(&mut self.connect().await?, self.json).await,
            Command::ForgetUser(forget) => {
                forget.is_meant()?;
                forget.call(link(forget.addr(), self.patience(), "--admin", &self.security()?).await?, self.json).await
            }
            Command::Explain(explain) => {
                explain.call(link(explain.addr(), self.patience(), "--admin", &self.security()?).await?, self.json).await
            }
            Command::Watch(watch) => {
                match watch.until_interrupted(&self.addr, self.json, self.patience(), self.security()?).await {
                    Err(End::Said(outcome)) => return Err(outcome),
                    Err(End::Refused(status)) => Err(status),
                    Ok(outcome) => Ok(outcome),
                }
            }
            Command::Gateway(gateway) => return gateway.live(&self.addr, self.json, self.patience(), self.security()?).await,
            Command::Bench(bench) => {
                let (client, by) = (self.connect().await?, (self.patience(), self.security()?));
                return bench.run(client, &self.addr, self.json, by).await;
            }
            Command::Listen(listen) => return listen.until_interrupted(self.json, self.patience()).await,
        };
        answer.map_err(|status| self.failed(&status))
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.timeout)
    }

    async fn connect(&self) -> Result<PresenceServiceClient<Link>, Outcome> {
        let link = link(&self.addr, self.patience(), "--addr", &self.security()?).await?;
        Ok(PresenceServiceClient::new(link).max_decoding_message_size(MAX_ANSWER_BYTES))
    }

    fn rest<'a>(&self, addr: &'a str) -> Result<Rest<'a>, Outcome> {
        is_address(addr, "--admin")?;
        Ok(Rest { addr, security: self.security()?, patience: self.patience() })
    }

    fn security(&self) -> Result<Security, Outcome> {
        self.credentials.security(self.token_file.clone()).map_err(|text| Outcome { text, exit: BAD_USAGE })
    }

    /// Who is asked.
    fn asked(&self) -> &str {
        match &self.command {
            Command::Gateways(gateways) => gateways.addr(),
            Command::ForgetUser(forget) => forget.addr(),
            Command::Moves(moves) => moves.addr(),
            Command::Views(views) => views.addr(),
            Command::Operators(command) => command.addr(),
            Command::Explain(explain) => explain.addr(),
            _ => &self.addr,
        }
    }

    fn bound(&self, bind: &Bind, answer: &pb::BindRouteResp) -> Outcome {
        let text = self.text("BindRouteResp", answer, || print::bound(bind.user, &bind.gateway, answer));
        Outcome { text, exit: exit(code(&answer.result), true) }
    }

    fn unbound(&self, unbind: &Unbind, answer: &pb::UnbindRouteResp) -> Outcome {
        let text = self.text("UnbindRouteResp", answer, || print::unbound(unbind.user, answer));
        Outcome { text, exit: exit(code(&answer.result), answer.unbound) }
    }

    fn found(&self, query: &Query, answer: &pb::QueryRouteResp) -> Outcome {
        let text = self.text("QueryRouteResp", answer, || print::found(query.user, answer));
        Outcome { text, exit: exit(code(&answer.result), answer.is_online) }
    }

    fn listed(&self, query: &BatchQuery, answer: &pb::BatchQueryRouteResp) -> Outcome {
        let text = self.text("BatchQueryRouteResp", answer, || print::listed(query.routes, answer));
        Outcome { text, exit: exit(code(&answer.result), true) }
    }

    fn delivered(&self, deliver: &Deliver, answer: &pb::DeliverResp) -> Outcome {
        let text = self.text("DeliverResp", answer, || match deliver.trace {
            true => format!("{}\n{}", print::delivered(deliver.user, answer), print::steps(answer)),
            false => print::delivered(deliver.user, answer),
        });
        Outcome { text, exit: exit(code(&answer.result), answer.delivered || answer.stored) }
    }

    fn text(&self, message: &str, answer: &impl prost::Message, human: impl FnOnce() -> String) -> String {
        if self.json { print::json(message, answer) } else { human() }
    }

    fn failed(&self, status: &tonic::Status) -> Outcome {
        let (addr, timeout, message) = (self.asked(), self.timeout, status.message());
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let (text, exit) = match (status.code(), retry) {
            (tonic::Code::InvalidArgument, _) => (message.to_owned(), BAD_USAGE),
            (tonic::Code::Cancelled | tonic::Code::DeadlineExceeded, _) => {
                let unnamed = self.credentials.shows_nothing();
                let see = if unnamed { "--timeout, and --cert, without which some nodes let nobody in" } else { "--timeout" };
                (format!("no answer from {addr} within {timeout} ms: it may be done or not; see {see}"), FAILED)
            }
            (tonic::Code::Unauthenticated, _) => {
                (format!("{addr} answers: {message}; see --token-file, --ca and --cert"), FAILED)
            }
            (tonic::Code::Unimplemented, _) => {
                (format!("{addr} does not offer this call; is it the right port? see --addr and --admin"), FAILED)
            }
            (tonic::Code::Unknown, _) if status.source().is_some() => {
                (format!("{addr} broke off: {}; does this port speak TLS? see --ca", root_cause(status)), FAILED)
            }
            (code, Some(delay)) => (format!("{addr} answers {code:?}: {message}; try again in {} ms", delay.as_millis()), FAILED),
            (code, None) => (format!("{addr} answers {code:?}: {message}"), FAILED),
        };
        Outcome { text, exit }
    }
}

/// Connects to the node at `addr`, which `option` names.
async fn link(addr: &str, timeout: Duration, option: &str, security: &Security) -> Result<Link, Outcome> {
    is_address(addr, option)?;
    if let Err(error) = security.link(addr, timeout) {
        return Err(Outcome { text: format!("{option}: {error}"), exit: BAD_USAGE });
    }
    security.connect(addr, timeout).await.map_err(|error| {
        let why = root_cause(&*error);
        Outcome { text: format!("cannot reach {addr}: {why}; {}", hint(security, option)), exit: FAILED }
    })
}

/// What to look at when nothing that is expected answers.
fn hint(security: &Security, option: &str) -> String {
    match security.ca_file {
        Some(_) => format!("is the daemon running, and does this port speak TLS? see {option} and --ca"),
        None => format!("is the daemon running? see {option}, and --ca if it speaks TLS"),
    }
}

/// A host alone, or a URL, would be looked for where nothing listens.
fn is_address(addr: &str, option: &str) -> Result<(), Outcome> {
    let port = addr.rsplit_once(':').and_then(|(host, port)| (!host.contains('/')).then_some(port));
    match port.is_some_and(|port| port.parse::<u16>().is_ok()) {
        true => Ok(()),
        false => Err(Outcome { text: format!("{option}: must be HOST:PORT, is {addr:?}"), exit: BAD_USAGE }),
    }
}

/// The code of an answer; one that this program does not know is no success.
fn code(result: &Option<pb::Result>) -> Code {
    result.as_ref().map_or(Ok(Code::Ok), |result| Code::try_from(result.code)).unwrap_or(Code::Internal)
}

fn exit(code: Code, yes: bool) -> u8 {
    match code {
        Code::Ok if yes => DONE,
        Code::Ok | Code::NotFound | Code::Fenced | Code::Refused | Code::Undelivered | Code::Superseded => NO,
        Code::Invalid => BAD_USAGE,
        Code::Internal | Code::Unavailable | Code::TooLarge => FAILED,
    }
}

#[cfg(test)]
#[path = "ctl_tests.rs"]
mod tests;
