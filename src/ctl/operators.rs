//! What operators do to users and ask of all of them, on the node's admin port.

use std::fmt::Display;

use clap::Args;
use clap::Subcommand;
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;

use super::DONE;
use super::Outcome;
use super::code;
use super::exit;
use super::length;
use super::moment;
use super::presence::PLATFORMS;
use super::presence::platform;
use super::print;
use super::print::harmless;
use super::print::or_dash;
use super::print::table;
use super::rest::Rest;
use super::top;
use crate::client::security::Link;
use crate::pb;
use crate::pb::Code;
use crate::pb::admin_service_client::AdminServiceClient;

/// Users of one answer.
const MAX_PAGE: u32 = 1_000;

#[derive(Subcommand)]
pub enum Operators {
    /// Take all devices of a user off, and keep them away for a while, or end that; on the node's admin port
    #[command(after_help = OFFLINE_HELP)]
    Offline(Offline),
    /// Take one device of a user off; it may come back at once; on the node's admin port
    #[command(after_help = "Example:\n  im-presence ctl kick 42 phone --reason 'stolen'")]
    Kick(Kick),
    /// Print who is online, by number; on the node's admin port
    #[command(after_help = ONLINE_HELP)]
    Online(Online),
    /// Print how many users are online; on the node's admin port
    #[command(after_help = "Example:\n  im-presence ctl count --by region")]
    Count(Count),
    /// Print whom another device policy would cost devices; on the node's admin port
    #[command(after_help = "Example:\n  im-presence ctl preview-policy --max-devices 3 --per-platform 1 --timeout 70000")]
    PreviewPolicy(PreviewPolicy),
    /// Print the system at a glance, each second until Ctrl-C; or who changes, is watched or waits most on this node, and which
    /// gateways bind most; on the node's admin port
    #[command(
        after_help = "Examples:\n  im-presence ctl top\n  im-presence ctl top --once\n  im-presence ctl top changes --count 5"
    )]
    Top(Top),
}

const OFFLINE_HELP: &str = "\
Examples:
  im-presence ctl offline 42 --dry-run                 which devices there are
  im-presence ctl offline 42 --ban 24h --reason spam
  im-presence ctl offline 42 --lift                    end the ban";

const ONLINE_HELP: &str = "\
Examples:
  im-presence ctl online --gateway gw-1:7000 --limit 1000
  im-presence ctl online --region eu --platform ios --status busy
  im-presence ctl online --json | jq -r '.users[].user_id'";

#[derive(Args)]
pub struct Offline {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// Refuse binds for so long, as in 30m, 24h or 7d; a bare number is seconds. At most 10 years
    #[arg(long, value_name = "LENGTH", default_value = "0", hide_default_value = true, value_parser = length::seconds)]
    ban: u32,
    /// End the ban, and take nothing off
    #[arg(long, conflicts_with = "ban")]
    lift: bool,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Args)]
pub struct Kick {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// Its name, as ctl explain shows it; '' is the unnamed one
    device: String,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Args)]
struct How {
    /// Why, for the audit
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    reason: String,
    /// Only say what it would do
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
pub struct Online {
    /// Only users with a device on this gateway
    #[arg(long, value_name = "HOST:PORT", default_value = "", hide_default_value = true)]
    gateway: String,
    /// Only users with a device on a gateway of this region
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    region: String,
    /// Only users with such a device
    #[arg(long, value_parser = PossibleValuesParser::new(PLATFORMS).map(|name| platform(&name)))]
    platform: Option<pb::Platform>,
    /// Only users who are shown so; invisible: who hide
    #[arg(long, value_enum)]
    status: Option<ShownAs>,
    /// How many at most
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Clone, Copy, ValueEnum)]
enum ShownAs {
    Online,
    Away,
    Busy,
    Invisible,
}

#[derive(Args)]
pub struct Count {
    /// What is counted apart
    #[arg(long, value_enum)]
    by: Option<By>,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Clone, Copy, ValueEnum)]
enum By {
    Gateway,
    Region,
    Platform,
    Status,
}

#[derive(Args)]
pub struct PreviewPolicy {
    /// As route.max_devices; 0: no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_devices: u32,
    /// As route.per_platform; 0: no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    per_platform: u32,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Args)]
pub struct Top {
    /// Not given: the system at a glance
    #[arg(value_enum)]
    by: Option<TopBy>,
    /// Only once, for scripts
    #[arg(long, conflicts_with = "by")]
    once: bool,
    /// How many, at most 100
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100))]
    count: u32,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Clone, Copy, ValueEnum)]
enum TopBy {
    /// Users by changes in the last minutes
    Changes,
    /// Users by watches
    Watched,
    /// Gateways by what waits for them
    Streams,
    /// Gateways by binds in the last minutes
    Gateways,
}

#[derive(Args)]
pub(super) struct Admin {
    /// The node's admin address
    #[arg(long = "admin", value_name = "HOST:PORT", env = "IM_PRESENCE_ADMIN", default_value = "127.0.0.1:6001")]
    pub(super) addr: String,
}

type Client = AdminServiceClient<Link>;

impl Operators {
    pub(super) fn addr(&self) -> &str {
        let admin = match self {
            Self::Offline(of) => &of.admin,
            Self::Kick(of) => &of.admin,
            Self::Online(of) => &of.admin,
            Self::Count(of) => &of.admin,
            Self::PreviewPolicy(of) => &of.admin,
            Self::Top(of) => &of.admin,
        };
        &admin.addr
    }

    /// Makes the call.
    pub(super) async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let mut client = AdminServiceClient::new(link);
        match self {
            Self::Offline(of) => of.call(&mut client, json).await,
            Self::Kick(of) => of.call(&mut client, json).await,
            Self::Online(of) => of.call(&mut client, json).await,
            Self::Count(of) => of.call(&mut client, json).await,
            Self::PreviewPolicy(of) => of.call(&mut client, json).await,
            Self::Top(of) => of.call(&mut client, json).await,
        }
    }
}

impl Offline {
    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::ForceOfflineReq {
            user_id: self.user,
            reason: self.how.reason.clone(),
            ban_for_s: self.ban,
            dry_run: self.how.dry_run,
            lift_ban: self.lift,
        };
        let answer = client.force_offline(request).await?.into_inner();
        let ban = match (answer.banned_until_ms, self.how.dry_run) {
            (0, false) => "no ban is on".to_owned(),
            (0, true) => "no ban would be on".to_owned(),
            (until, false) => format!("banned until {}", moment::shown(until)),
            (until, true) => format!("would be banned until {}", moment::shown(until)),
        };
        let human = || match code(&answer.result) {
            Code::Ok if self.lift => format!("user {}: {ban}", self.user),
            Code::Ok => format!("{}\n{ban}", taken_off(self.user, &answer.kicked, self.how.dry_run)),
            _ => format!("user {} was not taken off{}", self.user, print::refusal(&answer.result)),
        };
        let text = if json { print::json("ForceOfflineResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl Kick {
    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let (reason, dry_run) = (self.how.reason.clone(), self.how.dry_run);
        let request = pb::KickDeviceReq { user_id: self.user, device_id: self.device.clone(), reason, dry_run };
        let answer = client.kick_device(request).await?.into_inner();
        let human = || match code(&answer.result) {
            Code::Ok => taken_off(self.user, &answer.kicked, dry_run),
            _ => format!("no device of user {} was taken off{}", self.user, print::refusal(&answer.result)),
        };
        let text = if json { print::json("KickDeviceResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

fn taken_off(user: i64, kicked: &[pb::Route], dry_run: bool) -> String {
    let verb = match (dry_run, kicked.len()) {
        (true, _) => "would be",
        (false, 1) => "was",
        _ => "were",
    };
    let sentence = format!("{} of user {user} {verb} taken off", counted(kicked.len(), "device"));
    if kicked.is_empty() { sentence } else { format!("{sentence}\n{}", print::routes(kicked)) }
}

impl Online {
    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let status = self.status.map_or(pb::Status::Unspecified, |status| match status {
            ShownAs::Online => pb::Status::Online,
            ShownAs::Away => pb::Status::Away,
            ShownAs::Busy => pb::Status::Busy,
            ShownAs::Invisible => pb::Status::Invisible,
        });
        let mut request = pb::ListOnlineReq {
            gateway_addr: self.gateway.clone(),
            region: self.region.clone(),
            platform: self.platform.unwrap_or(pb::Platform::Unspecified).into(),
            status: status.into(),
            ..Default::default()
        };
        let mut all = pb::ListOnlineResp::default();
        loop {
            let missing = self.limit.saturating_sub(u32::try_from(all.users.len()).unwrap_or(u32::MAX));
            request.page_size = missing.min(MAX_PAGE);
            let page = client.list_online(request.clone()).await?.into_inner();
            (all.result, all.next_page_token) = (page.result, page.next_page_token);
            all.users.extend(page.users);
            if all.next_page_token.is_empty() || all.users.len() >= self.limit as usize {
                break;
            }
            request.page_token.clone_from(&all.next_page_token);
        }
        let text = if json { print::json("ListOnlineResp", &all) } else { listed(&all) };
        Ok(Outcome { text, exit: DONE })
    }
}

fn listed(all: &pb::ListOnlineResp) -> String {
    let row = |user: &pb::OnlineUser| {
        let each = |of: fn(&pb::Route) -> String| {
            let cells: Vec<String> = user.routes.iter().map(of).collect();
            or_dash(&cells.join(","))
        };
        vec![
            user.user_id.to_string(),
            print::name(user.shown).to_owned(),
            print::name(user.wanted).to_owned(),
            moment::shown(user.status_since_ms),
            each(|route| or_dash(&route.device_id)),
            each(|route| print::platform(route.platform)),
            each(|route| route.gateway_addr.clone()),
        ]
    };
    let rows: Vec<Vec<String>> = all.users.iter().map(row).collect();
    let more = if all.next_page_token.is_empty() { "" } else { "; there are more" };
    match rows.len() {
        0 => format!("nobody is online who fits{more}"),
        users => {
            let headers = ["USER", "SHOWN", "WANTED", "SINCE", "DEVICES", "PLATFORMS", "GATEWAYS"];
            format!("{}{more}\n{}", counted(users, "user"), table(&headers, &rows))
        }
    }
}

impl Count {
    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let by = self.by.map_or(pb::CountBy::Unspecified, |by| match by {
            By::Gateway => pb::CountBy::Gateway,
            By::Region => pb::CountBy::Region,
            By::Platform => pb::CountBy::Platform,
            By::Status => pb::CountBy::Status,
        });
        let answer = client.count_online(pb::CountOnlineReq { by: by.into() }).await?.into_inner();
        let human = || match code(&answer.result) {
            Code::Ok => {
                let row = |count: &pb::Count| vec![or_dash(&harmless(&count.name)), count.users.to_string()];
                let rows = table(&["NAME", "USERS"], &answer.counts.iter().map(row).collect::<Vec<_>>());
                let note = print::refusal(&answer.result);
                format!("{} online, {} s ago{note}\n{rows}", counted(answer.users, "user"), answer.age_ms / 1_000)
            }
            _ => format!("nobody was counted{}", print::refusal(&answer.result)),
        };
        let text = if json { print::json("CountOnlineResp", &answer) } else { human().trim_end().to_owned() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl PreviewPolicy {
    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::PreviewPolicyReq { max_devices: self.max_devices, per_platform: self.per_platform };
        let answer = client.preview_policy(request).await?.into_inner();
        let human = || {
            let seen = match answer.share_seen {
                1.0 => format!("all {} were looked at", counted(answer.users_seen, "user")),
                share => format!("{:.1} % of all users were looked at, then time was up", share * 100.0),
            };
            let examples: Vec<String> = answer.examples.iter().map(i64::to_string).collect();
            let examples = if examples.is_empty() { String::new() } else { format!("\namong them {}", examples.join(", ")) };
            let (users, routes) = (counted(answer.users, "user"), counted(answer.routes, "device"));
            format!("{users} would lose {routes}; {seen}{examples}")
        };
        let text = if json { print::json("PreviewPolicyResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl Top {
    pub(super) fn is_live(&self) -> bool {
        self.by.is_none()
    }

    pub(super) fn addr(&self) -> &str {
        &self.admin.addr
    }

    pub(super) async fn live(&self, rest: &Rest<'_>, json: bool) -> Result<Outcome, Outcome> {
        top::watch(rest, self.count, self.once, json).await
    }

    async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let (by, name, value) = match self.by.unwrap_or(TopBy::Changes) {
            TopBy::Changes => (pb::TopBy::Changes, "USER", "CHANGES"),
            TopBy::Watched => (pb::TopBy::Watched, "USER", "WATCHES"),
            TopBy::Streams => (pb::TopBy::Streams, "GATEWAY", "WAITING"),
            TopBy::Gateways => (pb::TopBy::Gateways, "GATEWAY", "BINDS"),
        };
        let answer = client.list_top(pb::ListTopReq { by: by.into(), count: self.count }).await?.into_inner();
        let human = || {
            let window = if answer.window_s > 0 { format!(", in the last {} s or so", answer.window_s) } else { String::new() };
            if answer.items.is_empty() {
                return format!("nothing on node {}", answer.node_id);
            }
            let row = |item: &pb::TopItem| {
                let value =
                    if item.error > 0 { format!("{}..{}", item.value - item.error, item.value) } else { item.value.to_string() };
                vec![or_dash(&harmless(&item.name)), value, or_dash(&harmless(&item.detail))]
            };
            let rows: Vec<Vec<String>> = answer.items.iter().map(row).collect();
            format!("on node {}{window}\n{}", answer.node_id, table(&[name, value, "DETAIL"], &rows))
        };
        let text = if json { print::json("ListTopResp", &answer) } else { human() };
        Ok(Outcome { text, exit: DONE })
    }
}

/// `1 user`, `2 users`
fn counted(number: impl Display, what: &str) -> String {
    let number = number.to_string();
    let plural = if number == "1" { "" } else { "s" };
    format!("{number} {what}{plural}")
}
