//! SetStatus, and what is told of the past: between wire types and domain types.

use std::time::Duration;

use crate::api::convert;
use crate::api::status::item_code;
use crate::domain::event::Outcome;
use crate::domain::event::SetStatus;
use crate::domain::history::Cause;
use crate::domain::history::DayShare;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::status::StatusText;
use crate::domain::time::Timestamp;
use crate::domain::time::parse_day;
use crate::domain::time::written_day;
use crate::engine::presence::history::LogPage;
use crate::engine::presence::history::LoggedLine;
use crate::engine::presence::history::OnlineTime;
use crate::error::Error;
use crate::pb;

/// How long a status may last that ends by itself.
const MAX_EXPIRE_S: u32 = 31 * 86_400;
/// Lines of a page, if the caller does not say how many; and at most.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// Days of one answer.
const MAX_DAYS: i32 = 400;
/// Days of one answer, if the caller does not say from when.
const DAYS: i32 = 28;

pub fn set_status(request: &pb::SetStatusReq, max_text_bytes: usize) -> Result<(UserId, SetStatus), Error> {
    let invalid = |field, reason: &str| Error::Invalid { field, reason: reason.to_owned() };
    let status = match pb::Status::try_from(request.status) {
        Ok(pb::Status::Unspecified) => None,
        Ok(pb::Status::Online) => Some(Status::Online),
        Ok(pb::Status::Away) => Some(Status::Away),
        Ok(pb::Status::Busy) => Some(Status::Busy),
        Ok(pb::Status::Invisible) => Some(Status::Invisible),
        Ok(pb::Status::Offline) => return Err(invalid("status", "OFFLINE cannot be wanted: unbind, or want INVISIBLE")),
        Err(_) => return Err(invalid("status", "must be ONLINE, AWAY, BUSY or INVISIBLE")),
    };
    let parse = |raw: &String| {
        StatusText::parse(raw, max_text_bytes).map_err(|error| Error::Invalid { field: "text", reason: error.to_string() })
    };
    let text = request.text.as_ref().map(parse).transpose()?;
    let device = convert::device_id(&request.device_id)?;
    if status.is_none() && text.is_none() && request.idle.is_none() {
        return Err(invalid("status", "must be given, or text, or idle"));
    }
    if request.expire_after_s > MAX_EXPIRE_S {
        return Err(Error::Invalid {
            field: "expire_after_s",
            reason: format!("must be at most {MAX_EXPIRE_S} seconds, is {}", request.expire_after_s),
        });
    }
    if request.expire_after_s > 0 && status.is_none() && text.is_none() {
        return Err(invalid("expire_after_s", "must be given with status or text"));
    }
    let expire_after = (request.expire_after_s > 0).then(|| Duration::from_secs(request.expire_after_s.into()));
    let idle = request.idle.map(|idle| (device, idle));
    Ok((convert::user_id(request.user_id)?, SetStatus { status, text, expire_after, idle, by: None }))
}

pub fn status_set(outcome: Result<Outcome, Error>) -> Result<pb::SetStatusResp, Error> {
    let refused = |why: &str| pb::SetStatusResp { result: convert::result(pb::Code::NotFound, why), ..Default::default() };
    match outcome? {
        Outcome::StatusSet { shown, version } => Ok(pb::SetStatusResp {
            result: convert::result(pb::Code::Ok, ""),
            shown: convert::status_to_pb(shown).into(),
            version: version.0,
        }),
        Outcome::NoDevice => Ok(refused("device_id has no live route")),
        Outcome::NotTheirs => Ok(refused("the user has no device on this gateway")),
        _ => Err(Error::internal("a status had the outcome of another change")),
    }
}

/// The answer on a stream, where an error is one of its codes.
pub fn status_set_or_code(outcome: Result<Outcome, Error>) -> pb::SetStatusResp {
    status_set(outcome).unwrap_or_else(|error| {
        let code = if let Error::Invalid { .. } = error { pb::Code::Invalid } else { item_code(&error).0 };
        pb::SetStatusResp { result: convert::result(code, error.to_string()), ..Default::default() }
    })
}

pub fn log_page(request: &pb::GetStatusHistoryReq) -> Result<LogPage, Error> {
    convert::at_most("page_size", request.page_size as usize, MAX_PAGE, "changes")?;
    let before = match request.page_token.as_str() {
        "" => Version::MAX,
        token => {
            let reason = || "must be the next_page_token of an answer".to_owned();
            let version = token.parse().map_err(|_| Error::Invalid { field: "page_token", reason: reason() })?;
            Version(version)
        }
    };
    Ok(LogPage {
        user: convert::user_id(request.user_id)?,
        before,
        from: Timestamp(request.from_ms.max(0)),
        to: if request.to_ms == 0 { Timestamp(i64::MAX) } else { Timestamp(request.to_ms) },
        with_hidden: request.include_hidden,
        limit: if request.page_size == 0 { PAGE } else { request.page_size as usize },
    })
}

pub fn log((lines, has_more): (Vec<LoggedLine>, bool)) -> pb::GetStatusHistoryResp {
    let last = lines.last().filter(|_| has_more).map(|line| line.version.0.to_string());
    pb::GetStatusHistoryResp {
        result: convert::result(pb::Code::Ok, ""),
        changes: lines.into_iter().map(change).collect(),
        next_page_token: last.unwrap_or_default(),
    }
}

pub fn change(line: LoggedLine) -> pb::StatusChange {
    pb::StatusChange {
        at_ms: line.at.0,
        shown: convert::status_to_pb(line.shown).into(),
        cause: cause(line.cause).to_owned(),
        version: line.version.0,
        devices: line.devices,
        gateway_addr: line.gateway,
        hidden: line.hidden,
    }
}

fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Login => "login",
        Cause::Logout => "logout",
        Cause::Expired => "expired",
        Cause::Kicked => "kicked",
        Cause::Operator => "operator",
        Cause::Set => "set",
        Cause::Idle => "idle",
        Cause::Active => "active",
        Cause::StatusEnded => "status_ended",
    }
}

/// The first and the last day that are asked for.
pub fn days(request: &pb::GetOnlineTimeReq, today: i32) -> Result<(i32, i32), Error> {
    let day = |field, raw: &str, default: i32| {
        let parsed = if raw.is_empty() { Some(default) } else { parse_day(raw) };
        parsed.ok_or_else(|| Error::Invalid { field, reason: "must be a day as in 2026-11-26".to_owned() })
    };
    let to = day("to_day", &request.to_day, today)?;
    let from = day("from_day", &request.from_day, to - DAYS + 1)?;
    if from > to {
        return Err(Error::Invalid { field: "from_day", reason: "must not be after to_day".to_owned() });
    }
    if to - from >= MAX_DAYS {
        return Err(Error::Invalid { field: "from_day", reason: format!("must be at most {MAX_DAYS} days to to_day") });
    }
    Ok((from, to))
}

pub fn online_time(time: OnlineTime, with_hidden: bool) -> pb::GetOnlineTimeResp {
    let sessions = |day: &DayShare| day.sessions + day.hidden_sessions;
    let seconds = |ms: i64| u64::try_from(ms / 1_000).unwrap_or(0);
    let online_ms: i64 = time.days.iter().map(|day| day.online_ms + if with_hidden { day.hidden_ms } else { 0 }).sum();
    let day = |day: &DayShare| pb::OnlineDay {
        day: written_day(day.day),
        online_s: u32::try_from(seconds(day.online_ms)).unwrap_or(u32::MAX),
        sessions: sessions(day),
        hidden_s: u32::try_from(seconds(day.hidden_ms)).unwrap_or(u32::MAX),
    };
    pb::GetOnlineTimeResp {
        result: convert::result(pb::Code::Ok, ""),
        days: time.days.iter().map(day).collect(),
        online_s: seconds(online_ms),
        sessions: time.days.iter().map(sessions).sum(),
        activity_score: time.score,
        online_now: time.online_now,
    }
}
