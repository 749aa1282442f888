//! `ctl watch`: prints how users are shown, now and whenever that changes.

use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;

use super::BAD_USAGE;
use super::DONE;
use super::FAILED;
use super::Outcome;
use super::link;
use super::print;
use super::shown;
use crate::client::caller::Caller;
use crate::client::security::Security;
use crate::client::watch::Trouble;
use crate::clock::unix_ms;

#[derive(Args)]
pub struct Watch {
    /// The users' ids, above 0
    #[arg(value_name = "USER", required = true, value_parser = clap::value_parser!(i64).range(1..))]
    users: Vec<i64>,
}

/// Why it ended.
pub(super) enum End {
    Said(Outcome),
    /// By the node.
    Refused(tonic::Status),
}

impl Watch {
    /// Prints each telling until Ctrl-C; goes on when the node was away.
    pub(super) async fn until_interrupted(
        &self,
        addr: &str,
        json: bool,
        patience: Duration,
        security: Security,
    ) -> Result<Outcome, End> {
        link(addr, patience, "--addr", &security).await.map_err(End::Said)?; // if nobody is there, that is said at once
        let interrupted = async { tokio::signal::ctrl_c().await.map_err(|error| failed(format!("cannot hear Ctrl-C: {error}"))) };
        let nodes = Caller::with_security(&[addr], patience, &security);
        let nodes = nodes.map_err(|error| End::Said(Outcome { text: format!("--addr: {error}"), exit: BAD_USAGE }))?;
        self.tell(&nodes, json, &mut io::stdout().lock(), interrupted).await
    }

    async fn tell(
        &self,
        nodes: &Caller,
        json: bool,
        out: &mut impl Write,
        stop: impl Future<Output = Result<(), End>>,
    ) -> Result<Outcome, End> {
        let too_many = |error| End::Said(Outcome { text: format!("{error}"), exit: BAD_USAGE });
        let mut watch = nodes.watch(self.users.iter().copied()).map_err(too_many)?;
        tokio::pin!(stop);
        loop {
            let told = tokio::select! {
                stopped = &mut stop => return stopped.map(|()| done()),
                told = watch.next() => told,
            };
            let text = match told {
                Ok(told) if json => print::json("UserPresence", &told),
                Ok(told) => shown::told(unix_ms(), &told),
                Err(Trouble::Refused(status)) => return Err(End::Refused(status)),
                Err(trouble @ Trouble::NotWatched { .. }) => return Err(failed(trouble.to_string())),
            };
            match writeln!(out, "{text}").and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(done()),
                Err(error) => return Err(failed(format!("cannot print: {error}"))),
                Ok(()) => {}
            }
        }
    }
}

fn done() -> Outcome {
    Outcome { text: String::new(), exit: DONE }
}

fn failed(text: String) -> End {
    End::Said(Outcome { text, exit: FAILED })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;
    use crate::pb::presence_service_server::PresenceService;
    use crate::pb::presence_service_server::PresenceServiceServer;
    use clap::Parser;
    use std::future::pending;
    use std::pin::Pin;
    use tokio::time::sleep;
    use tokio_stream::Stream;
    use tokio_stream::StreamExt;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        watch: Watch,
    }

    /// Everybody is BUSY, with a version that says which version was known. Each stream ends with its second telling.
    struct Node;

    type Answers = Pin<Box<dyn Stream<Item = Result<pb::WatchResp, tonic::Status>> + Send>>;

    #[tonic::async_trait]
    impl PresenceService for Node {
        async fn watch(
            &self,
            request: tonic::Request<tonic::Streaming<pb::WatchReq>>,
        ) -> Result<tonic::Response<Answers>, tonic::Status> {
            let added = request.into_inner().next().await.expect("a message")?.add;
            if added[0].user_id == 3 {
                return Err(tonic::Status::permission_denied("not for you"));
            }
            let told = added.into_iter().take(2).map(|known| {
                let (user_id, version, status) = (known.user_id, known.version + 1, pb::Status::Busy.into());
                let presence = pb::UserPresence { user_id, version, status, is_online: true, ..Default::default() };
                Ok(pb::WatchResp { body: Some(pb::watch_resp::Body::Presence(presence)) })
            });
            let told: Vec<_> = told.collect();
            Ok(tonic::Response::new(Box::pin(tokio_stream::iter(told))))
        }
    }

    /// What was printed within a moment, and how it ended.
    async fn watch(words: &str, json: bool, stop: impl Future<Output = Result<(), End>>) -> (String, Result<Outcome, End>) {
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = incoming.local_addr().unwrap().to_string();
        let node = tokio::spawn(Server::builder().add_service(PresenceServiceServer::new(Node)).serve_with_incoming(incoming));
        let watch = Cli::try_parse_from(["watch"].into_iter().chain(words.split(' '))).unwrap_or_else(|e| panic!("{e}")).watch;
        let mut out = Vec::new();
        let ended = watch.tell(&Caller::new(&[&addr], Duration::from_secs(5)).unwrap(), json, &mut out, stop).await;
        node.abort();
        (String::from_utf8(out).unwrap(), ended)
    }

    #[tokio::test]
    async fn each_telling_is_a_line_and_a_stream_that_ends_is_made_again_with_the_versions() {
        let after_a_moment = async || {
            sleep(Duration::from_secs(1)).await;
            Ok(())
        };
        let (out, ended) = watch("1 2", true, after_a_moment()).await;
        assert!(ended.is_ok_and(|outcome| outcome.exit == DONE));
        let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let told: Vec<_> = lines.iter().map(|line| (line["user_id"].as_str(), line["version"].as_str())).take(4).collect();
        assert_eq!(told, [(Some("1"), Some("1")), (Some("2"), Some("1")), (Some("1"), Some("2")), (Some("2"), Some("2"))]);
        let (out, _) = watch("1", false, after_a_moment()).await;
        assert!(out.lines().next().is_some_and(|line| line.ends_with("Z 1 busy 0 devices on -")), "{out}");
    }

    #[tokio::test]
    async fn what_a_node_refuses_ends_it() {
        let (_, ended) = watch("3", false, pending()).await;
        assert!(matches!(ended, Err(End::Refused(status)) if status.message() == "not for you"));
    }
}
