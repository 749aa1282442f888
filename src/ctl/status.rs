//! `ctl status`, `history` and `online-time`: how a user is shown, was shown, and for how long.

use clap::Args;
use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;

use super::Outcome;
use super::code;
use super::exit;
use super::moment;
use super::print;
use super::shown;
use crate::client::security::Link;
use crate::pb;
use crate::pb::presence_service_client::PresenceServiceClient;

/// Changes that nodes send in one answer.
const MAX_PAGE: u32 = 1_000;
const STATUSES: [&str; 4] = ["online", "away", "busy", "invisible"];

type Client = PresenceServiceClient<Link>;

#[derive(Args)]
pub struct Status {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// How the user wants to be seen; without this and options: print how the user is shown
    #[arg(value_parser = PossibleValuesParser::new(STATUSES).map(|name| status(&name)))]
    status: Option<pb::Status>,
    /// What others read beside it, up to 256 bytes; '' removes it
    #[arg(long)]
    text: Option<String>,
    /// Back to online and no text after so many seconds, at most 31 days
    #[arg(long = "for", value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    expire_after_s: Option<u32>,
    /// Which device of the user --idle is about; without it, the user's one unnamed device
    #[arg(long, value_name = "ID", requires = "idle")]
    device: Option<String>,
    /// Whether nobody uses the device
    #[arg(long, value_name = "true|false")]
    idle: Option<bool>,
}

#[derive(Args)]
pub struct History {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// From this time on: RFC 3339, a day, or milliseconds since 1970; without it, from the oldest that is kept
    #[arg(long, value_name = "TIME", value_parser = moment::parse)]
    from: Option<i64>,
    /// Before this time; without it, up to now
    #[arg(long, value_name = "TIME", value_parser = moment::parse)]
    to: Option<i64>,
    /// The newest so many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// Also what nobody could see because the user was invisible
    #[arg(long)]
    hidden: bool,
}

#[derive(Args)]
pub struct OnlineTime {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// First day of UTC, as in 2026-11-01; without it, 27 days before the last
    #[arg(long, value_name = "DAY", default_value = "", hide_default_value = true)]
    from: String,
    /// Last day; without it, today
    #[arg(long, value_name = "DAY", default_value = "", hide_default_value = true)]
    to: String,
    /// Also the time in which the user was invisible
    #[arg(long)]
    hidden: bool,
}

impl Status {
    /// Asks, or says.
    pub(super) async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let Some(request) = self.request() else {
            let request = pb::QueryRouteReq { user_id: self.user, max_staleness_ms: None };
            let answer = client.query_route(request).await?.into_inner();
            let text = if json { print::json("QueryRouteResp", &answer) } else { shown::status(self.user, &answer) };
            return Ok(Outcome { text, exit: exit(code(&answer.result), answer.is_online) });
        };
        let answer = client.set_status(request).await?.into_inner();
        let text = if json { print::json("SetStatusResp", &answer) } else { shown::set(self.user, &answer) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }

    /// None: nothing is to be set.
    fn request(&self) -> Option<pb::SetStatusReq> {
        if self.status.is_none() && self.text.is_none() && self.idle.is_none() && self.expire_after_s.is_none() {
            return None;
        }
        Some(pb::SetStatusReq {
            user_id: self.user,
            status: self.status.unwrap_or(pb::Status::Unspecified).into(),
            text: self.text.clone(),
            expire_after_s: self.expire_after_s.unwrap_or(0),
            device_id: self.device.clone().unwrap_or_default(),
            idle: self.idle,
        })
    }
}

impl History {
    /// Reads page after page, until there are enough.
    pub(super) async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let (from_ms, to_ms) = (self.from.unwrap_or(0), self.to.unwrap_or(0));
        let mut request =
            pb::GetStatusHistoryReq { user_id: self.user, from_ms, to_ms, include_hidden: self.hidden, ..Default::default() };
        let mut answer = pb::GetStatusHistoryResp::default();
        loop {
            let left = self.limit.saturating_sub(u32::try_from(answer.changes.len()).unwrap_or(u32::MAX));
            request.page_size = left.min(MAX_PAGE);
            let page = client.get_status_history(request.clone()).await?.into_inner();
            answer.result = page.result;
            answer.changes.extend(page.changes.into_iter().take(usize::try_from(left).unwrap_or(usize::MAX)));
            request.page_token.clone_from(&page.next_page_token);
            answer.next_page_token = page.next_page_token;
            if answer.next_page_token.is_empty() || answer.changes.len() >= usize::try_from(self.limit).unwrap_or(usize::MAX) {
                break;
            }
        }
        let text = if json { print::json("GetStatusHistoryResp", &answer) } else { shown::history(self.user, &answer) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

impl OnlineTime {
    /// Asks for it.
    pub(super) async fn call(&self, client: &mut Client, json: bool) -> Result<Outcome, tonic::Status> {
        let (user_id, from_day, to_day) = (self.user, self.from.clone(), self.to.clone());
        let request = pb::GetOnlineTimeReq { user_id, from_day, to_day, include_hidden: self.hidden };
        let answer = client.get_online_time(request).await?.into_inner();
        let human = || shown::online_time(self.user, self.hidden, &answer);
        let text = if json { print::json("GetOnlineTimeResp", &answer) } else { human() };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }
}

fn status(name: &str) -> pb::Status {
    pb::Status::from_str_name(&format!("STATUS_{}", name.to_uppercase())).unwrap_or_default()
}
