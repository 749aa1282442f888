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
        let result = Some(pb::Result { code: code.into(), msg: format!("{:?} for {}", request.text, request.expire_after_s) });
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

#[tokio::test]
async fn an_argument_that_was_mistyped_is_named_with_what_it_should_be() {
    let check = async |addr: &str, words: &str, part: &str| {
        let (got, text) = exit_and_text(addr, words).await;
        assert!(got == BAD_USAGE && text.contains(part), "{addr} {words}: {got}, {text}");
    };
    for addr in ["127.0.0.1", "http://127.0.0.1:6000", "node-1:http", "node-1:70000"] {
        check(addr, "query 1", &format!("--addr: must be HOST:PORT, is {addr:?}")).await;
        check("127.0.0.1:1", &format!("doctor --admin {addr}"), &format!("--admin: must be HOST:PORT, is {addr:?}")).await;
        check("127.0.0.1:1", &format!("gateways --admin {addr}"), "--admin: must be HOST:PORT").await;
    }
    check("127.0.0.1:1", "query 1 --token-file /nowhere", "--token-file: /nowhere: No such file").await;
    check("127.0.0.1:1", "top --once --token-file /nowhere", "--token-file: /nowhere: No such file").await;

    let wrong = |words: &str, part: &str| {
        let refused = Cli::try_parse_from(["ctl"].into_iter().chain(words.split(' '))).err().map(|error| error.to_string());
        assert!(refused.as_ref().is_some_and(|text| text.contains(part)), "{words}: {refused:?}");
    };
    wrong("gateways hold ten", "as in 90s, 10m, 2h, 7d, is \"ten\"");
    wrong("gateways purge gw-1:7000", "see the column EPOCH of ctl gateways");
    wrong("offline 42 --ban forever", "must be seconds, or with a unit");
    wrong("drain gw-1:7000 --deadline 1.5h", "must be seconds, or with a unit");
    wrong("top changes --count 500", "1..=100");
    wrong("events --last 5000", "..=1000");
    wrong("config --diff --node node-1", "cannot be used with");
}
