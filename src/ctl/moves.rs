//! `ctl drain`, `drains`, `cancel-drain`, `rebalance` and `migrate`: users leave a gateway, on the node's admin port.

use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;
use clap::Subcommand;
use tokio::time::sleep;

use super::DONE;
use super::Outcome;
use super::code;
use super::exit;
use super::length;
use super::moment;
use super::print;
use super::print::harmless;
use super::print::or_dash;
use super::print::refusal;
use super::print::table;
use crate::client::security::Link;
use crate::pb;
use crate::pb::Code;
use crate::pb::admin_service_client::AdminServiceClient;

const DRAIN_HELP: &str = "\
Examples:
  im-presence ctl drain gw-1:7000 --dry-run                  who would go where, and how long it would take
  im-presence ctl drain gw-1:7000 gw-2:7000 --rate 2000 --watch
  im-presence ctl drain gw-1:7000 --share 0.05 --to gw-9:7000     5 % of its users to a canary
  im-presence ctl drain gw-1:7000 --deadline 10m             then the rest is removed
Again for a gateway that is being drained, it changes --rate, --deadline, --to and --force.

Exit codes: as of ctl; 3 if a gateway does not live, or the others lack capacity.";
const REBALANCE_HELP: &str = "\
Examples:
  im-presence ctl rebalance --dry-run
  im-presence ctl rebalance --region eu --tolerance 0.05 --reason 'two new gateways'";
const MIGRATE_HELP: &str = "\
Examples:
  im-presence ctl migrate 42                                 anywhere else
  im-presence ctl migrate 42 --device phone --to gw-2:7000

Exit codes: as of ctl; 3 if the user has no device that could go there.";
/// Between looks at a drain that is watched.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
const HEADERS: [&str; 11] = ["GATEWAY", "STATE", "USERS", "MOVED", "LEFT", "ASKED", "UNHEARD", "RATE/S", "PASS", "ETA", "BEGAN"];

/// Where the node is found.
#[derive(Args)]
pub struct OnAdminPort {
    /// The node's admin address
    #[arg(long, value_name = "HOST:PORT", env = "IM_PRESENCE_ADMIN", default_value = "127.0.0.1:6001")]
    admin: String,
}

/// Move the users of gateways elsewhere; on the node's admin port
#[derive(Args)]
#[command(after_help = DRAIN_HELP)]
pub struct Drain {
    /// Gateways that are to be left; those named together send nobody to each other
    #[arg(required = true, value_name = "GATEWAY")]
    gateways: Vec<String>,
    /// Users per second and gateway; 0: as configured (drain.rate)
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    rate: u32,
    /// After so long the rest is removed, as in 10m; a bare number is seconds
    #[arg(long, value_name = "LENGTH", default_value = "0", hide_default_value = true, value_parser = length::seconds)]
    deadline: u32,
    /// Only this gateway takes them; may be repeated
    #[arg(long, value_name = "GATEWAY")]
    to: Vec<String>,
    /// Only this share of the users, below 1; then the gateway still takes new ones
    #[arg(long, default_value_t = 0.0, hide_default_value = true)]
    share: f32,
    /// Seconds before the first user is asked, for load balancers
    #[arg(long, value_name = "S", default_value_t = 0, hide_default_value = true)]
    wait: u32,
    /// Seconds between asking and asking again; 0: as configured (drain.settle)
    #[arg(long, value_name = "S", default_value_t = 0, hide_default_value = true)]
    settle: u32,
    /// Also if the others lack capacity; and who was asked twice and stays is removed
    #[arg(long)]
    force: bool,
    /// For whoever looks
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    /// Print how far it is each second, until it is over; Ctrl-C ends the watching, not the drain
    #[arg(long, conflicts_with = "dry_run")]
    watch: bool,
    #[command(flatten)]
    port: OnAdminPort,
}

/// Print drains of the last 30 days, the newest first; on the node's admin port
#[derive(Args)]
#[command(after_help = "Example:\n  im-presence ctl drains --active --watch")]
pub struct Drains {
    /// Only of this gateway
    gateway: Option<String>,
    /// Only those that are waiting or running
    #[arg(long)]
    active: bool,
    /// Print them each second as long as one is active
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    port: OnAdminPort,
}

/// Stop a drain, or let a gateway take users again that was drained; on the node's admin port
#[derive(Args)]
#[command(after_help = "Example:\n  im-presence ctl cancel-drain gw-1:7000\n\nExit codes: as of ctl; 3 if no such drain runs.")]
pub struct CancelDrain {
    /// The gateway
    #[arg(required_unless_present = "id")]
    gateway: Option<String>,
    /// The drain, instead of the gateway
    #[arg(long, conflicts_with = "gateway")]
    id: Option<String>,
    #[command(flatten)]
    port: OnAdminPort,
}

/// Level the loads of gateways with the fewest moves; on the node's admin port
#[derive(Args)]
#[command(after_help = REBALANCE_HELP)]
pub struct Rebalance {
    /// Only of this region; else those of each region among each other
    #[arg(long, default_value = "", hide_default_value = true)]
    region: String,
    /// Only gateways with this label; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = label)]
    label: Vec<(String, String)>,
    /// How far from the mean loads may be; 0: 0.1
    #[arg(long, default_value_t = 0.0, hide_default_value = true)]
    tolerance: f32,
    /// Users per second and gateway; 0: as configured (drain.rate)
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    rate: u32,
    /// For whoever looks
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    port: OnAdminPort,
}

/// Move one user to another gateway; on the node's admin port
#[derive(Args)]
#[command(after_help = MIGRATE_HELP)]
pub struct Migrate {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// To this gateway; else wherever there is room
    #[arg(long, value_name = "GATEWAY", default_value = "", hide_default_value = true)]
    to: String,
    /// Only this device
    #[arg(long, default_value = "", hide_default_value = true)]
    device: String,
    /// For whoever reads the audit
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Only say what would happen
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    port: OnAdminPort,
}

#[derive(Subcommand)]
pub enum Moves {
    Drain(Drain),
    Drains(Drains),
    CancelDrain(CancelDrain),
    Rebalance(Rebalance),
    Migrate(Migrate),
}

type Client = AdminServiceClient<Link>;

impl Moves {
    pub(super) fn addr(&self) -> &str {
        let port = match self {
            Self::Drain(drain) => &drain.port,
            Self::Drains(drains) => &drains.port,
            Self::CancelDrain(cancel) => &cancel.port,
            Self::Rebalance(rebalance) => &rebalance.port,
            Self::Migrate(migrate) => &migrate.port,
        };
        &port.admin
    }

    /// Makes the call.
    pub(super) async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        match self {
            Self::Drain(drain) => drain.call(link, json).await,
            Self::Drains(drains) => drains.call(link, json).await,
            Self::CancelDrain(cancel) => cancel.call(link, json).await,
            Self::Rebalance(rebalance) => rebalance.call(link, json).await,
            Self::Migrate(migrate) => migrate.call(link, json).await,
        }
    }
}

impl Drain {
    /// One call for each gateway: each is closed before anybody of any is asked.
    async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let (mut client, mut texts, mut worst, mut begun) = (Client::new(link), Vec::new(), DONE, Vec::new());
        for gateway in &self.gateways {
            let answer = client.drain_gateway(self.request(gateway)).await?.into_inner();
            worst = worst.max(exit(code(&answer.result), true));
            begun.extend(answer.drain.iter().filter(|_| !self.dry_run).map(|drain| drain.id.clone()));
            texts.push(if json { print::json("DrainGatewayResp", &answer) } else { drained(gateway, &answer) });
        }
        let text = texts.join("\n");
        if !self.watch || begun.is_empty() {
            return Ok(Outcome { text, exit: worst });
        }
        say(&text);
        let of_these = |drain: &pb::Drained| begun.contains(&drain.id);
        Ok(Outcome { text: watch(&mut client, pb::ListDrainsReq::default(), of_these, json).await?, exit: worst })
    }

    fn request(&self, gateway: &str) -> pb::DrainGatewayReq {
        pb::DrainGatewayReq {
            gateway_addr: gateway.to_owned(),
            rate: self.rate,
            deadline_s: self.deadline,
            dry_run: self.dry_run,
            reason: self.reason.clone(),
            to: self.to.clone(),
            share: self.share,
            wait_s: self.wait,
            settle_s: self.settle,
            force: self.force,
        }
    }
}

impl Drains {
    async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let mut client = Client::new(link);
        let gateway_addr = self.gateway.clone().unwrap_or_default();
        let request = pb::ListDrainsReq { gateway_addr, active_only: self.active, ..Default::default() };
        let text = match self.watch {
            true => watch(&mut client, request, |_| true, json).await?,
            false => {
                let answer = list(&mut client, request).await?;
                if json { print::json("ListDrainsResp", &answer) } else { progress(&answer.drains) }
            }
        };
        Ok(Outcome { text, exit: DONE })
    }
}

impl CancelDrain {
    async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let (gateway_addr, id) = (self.gateway.clone().unwrap_or_default(), self.id.clone().unwrap_or_default());
        let answer = Client::new(link).cancel_drain(pb::CancelDrainReq { gateway_addr, id }).await?.into_inner();
        let human = || match &answer.drain {
            Some(drain) => {
                let (gateway, moved, left) = (harmless(&drain.gateway_addr), drain.moved, drain.left);
                // Whoever was told to go cannot be called back.
                let under_way = drain.asked.saturating_sub(moved).min(left);
                let may_go = if under_way > 0 {
                    format!("; {under_way} of them were asked before and may still go")
                } else {
                    String::new()
                };
                format!("the drain of {gateway} is cancelled: {moved} users have gone, {left} are left{may_go}")
            }
            None => format!("nothing was cancelled{}", refusal(&answer.result)),
        };
        let text = if json { print::json("CancelDrainResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl Rebalance {
    async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::RebalanceGatewaysReq {
            region: self.region.clone(),
            labels: self.label.iter().cloned().collect(),
            tolerance: self.tolerance,
            rate: self.rate,
            dry_run: self.dry_run,
            reason: self.reason.clone(),
        };
        let answer = Client::new(link).rebalance_gateways(request).await?.into_inner();
        let users: u64 = answer.plan.iter().map(|step| step.users).sum();
        let why = refusal(&answer.result);
        let sentence = match (users, self.dry_run, code(&answer.result)) {
            (0, ..) => format!("loads are level: nobody moves{why}"),
            (users, true, _) => format!("{users} users would move{why}"),
            (users, false, Code::Ok) => format!("{users} users move; see ctl drains"),
            (_, false, _) => format!("not all that is planned was ordered{why}"),
        };
        let text = if json { print::json("RebalanceGatewaysResp", &answer) } else { with_plan(sentence, &answer.plan) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl Migrate {
    async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::MigrateUserReq {
            user_id: self.user,
            to: self.to.clone(),
            device_id: self.device.clone(),
            reason: self.reason.clone(),
            dry_run: self.dry_run,
        };
        let answer = Client::new(link).migrate_user(request).await?.into_inner();
        let (user, devices) = (self.user, print::counted(answer.routes, "device"));
        let human = || match (code(&answer.result), self.dry_run) {
            (Code::Ok, true) => with_plan(format!("{devices} of user {user} would be asked to go"), &answer.plan),
            (Code::Ok, false) => with_plan(format!("{devices} of user {user} asked to go"), &answer.plan),
            _ => format!("user {user} was not asked to go{}", refusal(&answer.result)),
        };
        let text = if json { print::json("MigrateUserResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

/// All pages.
async fn list(client: &mut Client, mut request: pb::ListDrainsReq) -> Result<pb::ListDrainsResp, tonic::Status> {
    let mut answer = client.list_drains(request.clone()).await?.into_inner();
    while !answer.next_page_token.is_empty() {
        request.page_token = std::mem::take(&mut answer.next_page_token);
        let page = client.list_drains(request.clone()).await?.into_inner();
        answer.drains.extend(page.drains);
        answer.next_page_token = page.next_page_token;
    }
    Ok(answer)
}

/// Prints those that are meant each second. Returns how they are when none of them is active any more.
async fn watch(
    client: &mut Client,
    request: pb::ListDrainsReq,
    is_meant: impl Fn(&pb::Drained) -> bool,
    json: bool,
) -> Result<String, tonic::Status> {
    loop {
        let mut answer = client.list_drains(request.clone()).await?.into_inner();
        answer.drains.retain(&is_meant);
        let text = if json { print::json("ListDrainsResp", &answer) } else { progress(&answer.drains) };
        if !answer.drains.iter().any(|drain| matches!(&*drain.state, "waiting" | "running")) {
            return Ok(text);
        }
        say(&text);
        sleep(WATCH_INTERVAL).await;
    }
}

fn say(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush()); // nobody has to read it
}

fn drained(gateway: &str, answer: &pb::DrainGatewayResp) -> String {
    let Some(drain) = answer.drain.as_ref().filter(|_| code(&answer.result) == Code::Ok) else {
        return format!("{gateway} is not drained{}", refusal(&answer.result));
    };
    let are = if drain.users == 1 { "is" } else { "are" };
    let users = print::counted(drain.users.try_into().unwrap_or(u32::MAX), "user");
    if drain.state != "planned" {
        return format!("{users} of {gateway} {are} asked to go, {} per second: drain {}", drain.rate, harmless(&drain.id));
    }
    let against = answer.result.iter().filter(|result| !result.msg.is_empty());
    let against: String = against.map(|result| format!("; {}", harmless(&result.msg))).collect();
    let unheard = if drain.unheard == 0 { String::new() } else { format!(", {} of them hear nothing", drain.unheard) };
    with_plan(format!("{users} of {gateway} would go in {} s{unheard}{against}", drain.eta_s), &answer.plan)
}

fn with_plan(sentence: String, plan: &[pb::MovePlan]) -> String {
    if plan.is_empty() {
        return sentence;
    }
    let row = |step: &pb::MovePlan| vec![harmless(&step.from), harmless(&step.to), step.users.to_string()];
    format!("{sentence}\n{}", table(&["FROM", "TO", "USERS"], &plan.iter().map(row).collect::<Vec<_>>()))
}

fn progress(drains: &[pb::Drained]) -> String {
    if drains.is_empty() {
        return "no drains".to_owned();
    }
    table(&HEADERS, &drains.iter().map(row).collect::<Vec<_>>())
}

fn row(drain: &pb::Drained) -> Vec<String> {
    let counts = [drain.users, drain.moved, drain.left, drain.asked, drain.unheard].map(|count| count.to_string());
    let eta = if drain.eta_s == 0 { String::new() } else { format!("{} s", drain.eta_s) };
    let mut row = vec![harmless(&drain.gateway_addr), harmless(&drain.state)];
    row.extend(counts);
    row.extend([drain.rate.to_string(), drain.pass.to_string(), or_dash(&eta), moment::shown(drain.began_ms)]);
    row
}

fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a label is NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}
