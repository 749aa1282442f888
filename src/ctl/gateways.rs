//! `ctl gateways`: what an operator sees and does when gateways fall silent.

use std::time::Duration;

use clap::Args;
use clap::Subcommand;

use super::DONE;
use super::NO;
use super::Outcome;
use super::code;
use super::length;
use super::print;
use crate::client::security::Link;
use crate::domain::time::span;
use crate::pb;
use crate::pb::admin_service_client::AdminServiceClient;

const HELP: &str = "\
Examples:
  im-presence ctl gateways                         who lives, since when, with how many users
  im-presence ctl gateways list --dead             also the lives that ended
  im-presence ctl gateways hold 10m --reason 'switch maintenance'
  im-presence ctl gateways hold 0                  call the hold off
  im-presence ctl gateways purge --held            they are really dead: end the hold now
  im-presence ctl gateways purge 1795337805655461  declare one life dead, by its epoch

Exit codes: as of ctl; purge exits with 3 if nothing was there to purge.";

/// List the gateways, hold their deaths, or declare them dead; on the node's admin port
#[derive(Args)]
#[command(after_help = HELP)]
pub struct Gateways {
    /// The node's admin address
    #[arg(long, value_name = "HOST:PORT", env = "IM_PRESENCE_ADMIN", default_value = "127.0.0.1:6001", global = true)]
    admin: String,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print every life of a gateway (the default)
    List(List),
    /// Declare lives dead now: their users go offline, and their routes are removed
    Purge(Purge),
    /// Keep silent gateways from being declared dead, for so long from now
    Hold(Hold),
}

#[derive(Args, Default)]
struct List {
    /// Also lives that ended
    #[arg(long)]
    dead: bool,
}

#[derive(Args)]
struct Purge {
    /// Lives, by epoch, whatever their leases say
    #[arg(value_name = "EPOCH", required_unless_present = "held", value_parser = epoch)]
    epochs: Vec<u64>,
    /// Confirm the hold: whoever's lease is over is dead
    #[arg(long)]
    held: bool,
}

#[derive(Args)]
struct Hold {
    /// How long from now, as in 90s, 10m or 1h; a bare number is milliseconds. 0 calls the hold off
    #[arg(value_name = "LENGTH", value_parser = length::millis)]
    for_ms: u32,
    /// Why, for whoever looks next
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
}

impl Gateways {
    pub(super) fn addr(&self) -> &str {
        &self.admin
    }

    /// Makes the call.
    pub(super) async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let mut client = AdminServiceClient::new(link);
        match &self.command {
            None => list(&mut client, &List::default(), json).await,
            Some(Command::List(of)) => list(&mut client, of, json).await,
            Some(Command::Purge(of)) => purge(&mut client, of, json).await,
            Some(Command::Hold(of)) => hold(&mut client, of, json).await,
        }
    }
}

async fn list(client: &mut AdminServiceClient<Link>, list: &List, json: bool) -> Result<Outcome, tonic::Status> {
    let mut request = pb::ListGatewaysReq { include_dead: list.dead, ..Default::default() };
    let mut answer = client.list_gateways(request.clone()).await?.into_inner();
    while !answer.next_page_token.is_empty() {
        request.page_token = std::mem::take(&mut answer.next_page_token);
        let page = client.list_gateways(request.clone()).await?.into_inner();
        answer.lives.extend(page.lives);
        answer.next_page_token = page.next_page_token;
    }
    let text = if json { print::json("ListGatewaysResp", &answer) } else { print::gateways(&answer) };
    Ok(Outcome { text, exit: DONE })
}

async fn purge(client: &mut AdminServiceClient<Link>, purge: &Purge, json: bool) -> Result<Outcome, tonic::Status> {
    let request = pb::PurgeGatewaysReq { epochs: purge.epochs.clone(), held: purge.held, ..Default::default() };
    let answer = client.purge_gateways(request).await?.into_inner();
    let none = answer.lives == 0 && !(purge.held && code(&answer.result) == pb::Code::Ok);
    let text = if json { print::json("PurgeGatewaysResp", &answer) } else { print::purged(&answer) };
    Ok(Outcome { text, exit: if none { NO } else { DONE } })
}

async fn hold(client: &mut AdminServiceClient<Link>, hold: &Hold, json: bool) -> Result<Outcome, tonic::Status> {
    let request = pb::HoldGatewaysReq { for_ms: hold.for_ms, reason: hold.reason.clone() };
    let answer = client.hold_gateways(request).await?.into_inner();
    let human = match hold.for_ms {
        0 => "the hold is called off: gateways whose lease is over are declared dead".to_owned(),
        ms => format!("no gateway is declared dead for {}", span(Duration::from_millis(ms.into()))),
    };
    Ok(Outcome { text: if json { print::json("HoldGatewaysResp", &answer) } else { human }, exit: DONE })
}

fn epoch(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "an epoch is a number; see the column EPOCH of ctl gateways".to_owned())
}
