//! `im-presence ctl`: the calls of `PresenceService` from a shell, and what gateways hear. A plain client: it sees what any
//! other client sees.

mod allocation;
mod credentials;
mod explain;
mod forget;
mod gateway;
mod gateways;
mod listen;
mod moment;
mod operators;
mod presence;
mod print;
mod shown;
mod status;
mod watch;

use std::io;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use clap::Subcommand;
use tonic_types::StatusExt;

use crate::client::security::Link;
use crate::client::security::Security;
use crate::client::security::root_cause;
use crate::ctl::allocation::Allocate;
use crate::ctl::allocation::nodes;
pub use crate::ctl::credentials::Credentials;
use crate::ctl::explain::Explain;
use crate::ctl::forget::ForgetUser;
use crate::ctl::gateway::Gateway;
use crate::ctl::gateways::Gateways;
use crate::ctl::listen::Listen;
use crate::ctl::operators::Operators;
use crate::ctl::presence::BatchQuery;
use crate::ctl::presence::Bind;
use crate::ctl::presence::Deliver;
use crate::ctl::presence::Query;
use crate::ctl::presence::Unbind;
use crate::ctl::status::History;
use crate::ctl::status::OnlineTime;
use crate::ctl::status::Status;
use crate::ctl::watch::End;
use crate::ctl::watch::Watch;
use crate::pb;
use crate::pb::Code;
use crate::pb::presence_service_client::PresenceServiceClient;

const DONE: u8 = 0;
const FAILED: u8 = 1;
const BAD_USAGE: u8 = 2;
const NO: u8 = 3;

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
  im-presence ctl status 42 busy --text 'in a meeting' --for 3600
  im-presence ctl status 42 --device phone --idle true
  im-presence ctl status 42                              how the user is shown
  im-presence ctl watch 42 43                            a line whenever one is shown differently
  im-presence ctl history 42 --from 2026-11-01 --limit 20
  im-presence ctl online-time 42
  im-presence ctl allocate 42 --region eu                where the user should connect
  im-presence ctl nodes                                  which nodes there are
  im-presence ctl forget-user 42 --dry-run               on the admin port
  im-presence ctl offline 42 --ban 3600                  also kick, online, count, preview-policy, top
  im-presence ctl explain 42                             why the user is online or not; on the admin port
  im-presence ctl gateways                               who lives; see its own --help

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
    Gateways(Gateways),
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
                self.connect().await?.deliver(request).await.map(|answer| self.delivered(deliver, answer.get_ref()))
            }
            Command::Gateways(gateways) => {
                let link = link(gateways.addr(), self.patience(), "--admin", &self.security()?).await?;
                gateways.call(link, self.json).await
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

    fn security(&self) -> Result<Security, Outcome> {
        self.credentials.security(self.token_file.clone()).map_err(|text| Outcome { text, exit: BAD_USAGE })
    }

    /// Who is asked.
    fn asked(&self) -> &str {
        match &self.command {
            Command::Gateways(gateways) => gateways.addr(),
            Command::ForgetUser(forget) => forget.addr(),
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
        let text = self.text("DeliverResp", answer, || print::delivered(deliver.user, answer));
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
                (format!("no answer from {addr} within {timeout} ms: it may be done or not; see --timeout"), FAILED)
            }
            (tonic::Code::Unauthenticated, _) => {
                (format!("{addr} answers: {message}; see --token-file, --ca and --cert"), FAILED)
            }
            (tonic::Code::Unimplemented, _) => {
                (format!("{addr} does not offer this call; is it the right port? see --addr and --admin"), FAILED)
            }
            (code, Some(delay)) => (format!("{addr} answers {code:?}: {message}; try again in {} ms", delay.as_millis()), FAILED),
            (code, None) => (format!("{addr} answers {code:?}: {message}"), FAILED),
        };
        Outcome { text, exit }
    }
}

/// Connects to the node at `addr`, which `option` names.
async fn link(addr: &str, timeout: Duration, option: &str, security: &Security) -> Result<Link, Outcome> {
    if let Err(error) = security.link(addr, timeout) {
        return Err(Outcome { text: format!("{option}: {error}"), exit: BAD_USAGE });
    }
    security.connect(addr, timeout).await.map_err(|error| {
        let why = root_cause(&*error);
        Outcome { text: format!("cannot reach {addr}: {why}; is the daemon running? see {option}"), exit: FAILED }
    })
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
mod tests {
    use super::*;
    use crate::pb::BindRouteReq;
    use crate::pb::DeliverReq;
    use crate::pb::QueryRouteReq;
    use crate::pb::presence_service_server::PresenceService;
    use crate::pb::presence_service_server::PresenceServiceServer;
    use clap::Parser;
    use std::fs;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ctl: Ctl,
    }

    /// User 1 is online, user 2 is not, user 3 is no user; nothing is ever bound; unbinding is not offered. Messages reach
    /// user 1 by two gateways, and nobody listens for user 4. Only user 1 has a device that can be idle, and 1,500 changes.
    struct Node;

    #[tonic::async_trait]
    impl PresenceService for Node {
        async fn query_route(
            &self,
            request: tonic::Request<QueryRouteReq>,
        ) -> Result<tonic::Response<pb::QueryRouteResp>, tonic::Status> {
            let code = match request.get_ref().user_id {
                1 => Code::Ok,
                2 => Code::NotFound,
                _ => return Err(tonic::Status::invalid_argument("user_id: too many")),
            };
            let result = Some(pb::Result { code: code.into(), msg: String::new() });
            Ok(tonic::Response::new(pb::QueryRouteResp { result, is_online: code == Code::Ok, ..Default::default() }))
        }

        async fn bind_route(&self, _: tonic::Request<BindRouteReq>) -> Result<tonic::Response<pb::BindRouteResp>, tonic::Status> {
            let result = Some(pb::Result { code: Code::Refused.into(), msg: "too many devices".into() });
            Ok(tonic::Response::new(pb::BindRouteResp { result, ..Default::default() }))
        }

        async fn set_status(
            &self,
            request: tonic::Request<pb::SetStatusReq>,
        ) -> Result<tonic::Response<pb::SetStatusResp>, tonic::Status> {
            let request = request.into_inner();
            let code = if request.user_id == 1 || request.idle.is_none() { Code::Ok } else { Code::NotFound };
            let result =
                Some(pb::Result { code: code.into(), msg: format!("{:?} for {}", request.text, request.expire_after_s) });
            Ok(tonic::Response::new(pb::SetStatusResp { result, shown: request.status, version: 7 }))
        }

        async fn get_status_history(
            &self,
            request: tonic::Request<pb::GetStatusHistoryReq>,
        ) -> Result<tonic::Response<pb::GetStatusHistoryResp>, tonic::Status> {
            let request = request.into_inner();
            let first: u32 = request.page_token.parse().unwrap_or(0);
            let next = (first + request.page_size).min(1_500);
            let change = pb::StatusChange { at_ms: request.from_ms, cause: "login".into(), ..Default::default() };
            let changes = (first..next).map(|_| change.clone()).collect();
            let next_page_token = if next < 1_500 { next.to_string() } else { String::new() };
            Ok(tonic::Response::new(pb::GetStatusHistoryResp { result: None, changes, next_page_token }))
        }

        async fn deliver(&self, request: tonic::Request<DeliverReq>) -> Result<tonic::Response<pb::DeliverResp>, tonic::Status> {
            assert!(request.metadata().contains_key("grpc-timeout"), "the node is told how long the caller waits");
            let request = request.into_inner();
            let code = match request.user_id {
                1 => Code::Ok,
                2 => Code::NotFound,
                4 => Code::Undelivered,
                _ => return Err(tonic::Status::unavailable("no [redis_queue] is configured to deliver through")),
            };
            let msg = format!("{}+{} {}", request.message, request.payload.len(), request.message_type);
            let (result, delivered) = (Some(pb::Result { code: code.into(), msg }), code == Code::Ok);
            let (receivers, attempts, delivery_id) = (u32::from(delivered) * 2, 3, "n-1".into());
            let answer = pb::DeliverResp { result, delivered, receivers, attempts, delivery_id, ..Default::default() };
            Ok(tonic::Response::new(answer))
        }
    }

    async fn exit_and_text(addr: &str, words: &str) -> (u8, String) {
        let words = ["ctl", "--addr", addr].into_iter().chain(words.split(' '));
        let ctl = Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).ctl;
        let outcome = ctl.call().await.unwrap_or_else(|outcome| outcome);
        (outcome.exit, outcome.text)
    }

    #[tokio::test]
    async fn the_exit_code_tells_yes_from_no_and_from_failure() {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = incoming.local_addr().unwrap().to_string();
        let node = tokio::spawn(Server::builder().add_service(PresenceServiceServer::new(Node)).serve_with_incoming(incoming));
        let check = async |words: &str, exit: u8, part: &str| {
            let (got, text) = exit_and_text(&addr, words).await;
            assert!(got == exit && text.contains(part), "{words}: {got}, {text}");
        };
        check("query 1", DONE, "user 1 is online").await;
        check("query 1 --json", DONE, "\"is_online\":true").await;
        check("query 2", NO, "user 2 is offline").await;
        check("query 3", BAD_USAGE, "user_id: too many").await;
        check("bind 1 gw-1", NO, "CODE_REFUSED").await;
        check("unbind 1 --gateway gw-1", FAILED, "does not offer this call").await;
        check("batch-query 1 two", BAD_USAGE, "a user is a number").await;
        check("deliver 1 hello", DONE, "delivered to 2 receivers").await;
        check("deliver 1 hello --json", DONE, "\"receivers\":2").await;
        check("deliver 2 hello", NO, "(NOT_FOUND): hello").await;
        check("deliver 4 hello --type text", NO, "(CODE_UNDELIVERED): hello+0 text").await;
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/rustfmt.toml");
        let bytes = fs::read(file).unwrap().len();
        check(&format!("deliver 4 --binary-file {file}"), NO, &format!("): +{bytes} ")).await;
        check("deliver 1 --binary-file /nowhere", BAD_USAGE, "cannot read /nowhere").await;
        check("deliver 3 hello", FAILED, "no [redis_queue] is configured").await;
        check("status 1", DONE, "user 1 is shown as UNSPECIFIED").await;
        check("status 2", NO, "user 2 is shown as").await;
        check("status 1 busy --text x --for 60", DONE, "user 1 is shown as BUSY, version 7").await;
        check("status 1 away --json", DONE, "\"shown\":\"STATUS_AWAY\"").await;
        check("status 2 --device phone --idle true", NO, "(NOT_FOUND): None for 0").await;
        check("history 1 --from 2026-11-28", DONE, "100 changes of user 1, the newest first; there are more").await;
        check("history 1 --limit 1200", DONE, "1200 changes of user 1, the newest first; there are more").await;
        check("history 1 --limit 2000", DONE, "1500 changes of user 1, the newest first\nAT").await;
        check("history 1 --from 86400000 --limit 1", DONE, "1970-01-02 00:00:00.000Z").await;
        check("online-time 1", FAILED, "does not offer this call").await;
        check("forget-user 1", BAD_USAGE, "cannot be undone: say --yes").await;
        node.abort();
        assert!(node.await.is_err(), "the node is gone");
        check("query 1", FAILED, "connection refused; is the daemon running? see --addr").await;
    }
}
