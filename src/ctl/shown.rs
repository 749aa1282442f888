//! How a user is shown, was shown and for how long, for people.

use super::code;
use super::moment;
use super::print::counted;
use super::print::harmless;
use super::print::name;
use super::print::or_dash;
use super::print::platform;
use super::print::refusal;
use super::print::table;
use super::print::with_text;
use super::print::with_text_and_since;
use crate::pb;
use crate::pb::Code;

/// `user 42 is shown as BUSY "in a meeting" since 2026-11-28 09:30:00.000Z`
pub fn status(user: i64, answer: &pb::QueryRouteResp) -> String {
    if !matches!(code(&answer.result), Code::Ok | Code::NotFound) {
        return format!("user {user} was not looked up{}", refusal(&answer.result));
    }
    format!("user {user} is shown as {}", with_text_and_since(answer.status, &answer.status_text, answer.status_since_ms))
}

pub fn set(user: i64, answer: &pb::SetStatusResp) -> String {
    match code(&answer.result) {
        Code::Ok => format!("user {user} is shown as {}, version {}", name(answer.shown), answer.version),
        _ => format!("nothing of user {user} was set{}", refusal(&answer.result)),
    }
}

/// One telling of a watch, on one line.
pub fn told(at_ms: i64, told: &pb::UserPresence) -> String {
    let shown = with_text(&name(told.status).to_lowercase(), &told.status_text);
    let line = format!("{} {} {shown}", moment::shown(at_ms), told.user_id);
    if !told.is_online {
        return match told.last_seen_ms {
            0 => line,
            seen => format!("{line}, last seen {}", moment::shown(seen)),
        };
    }
    let platforms = told.platforms.iter().map(|one| platform(*one)).collect::<Vec<_>>().join(", ");
    let platforms = if platforms.is_empty() { platforms } else { format!(" ({platforms})") };
    format!("{line} {}{platforms} on {}", counted(told.devices, "device"), or_dash(&harmless(&told.gateway_addr)))
}

pub fn history(user: i64, answer: &pb::GetStatusHistoryResp) -> String {
    if code(&answer.result) != Code::Ok {
        return format!("the history of user {user} was not read{}", refusal(&answer.result));
    }
    let count = counted(u32::try_from(answer.changes.len()).unwrap_or(u32::MAX), "change");
    let more = if answer.next_page_token.is_empty() { "" } else { "; there are more, see --limit" };
    lines([format!("{count} of user {user}, the newest first{more}"), changes(&answer.changes)])
}

/// A table; nothing without changes.
pub fn changes(changes: &[pb::StatusChange]) -> String {
    let rows: Vec<Vec<String>> = changes.iter().map(change).collect();
    table(&["AT", "SHOWN", "CAUSE", "DEVICES", "GATEWAY", "VERSION"], &rows)
}

fn change(change: &pb::StatusChange) -> Vec<String> {
    let shown = if change.hidden { format!("({}, hidden)", name(change.shown)) } else { name(change.shown).to_owned() };
    let (devices, gateway) = (change.devices.to_string(), or_dash(&harmless(&change.gateway_addr)));
    vec![moment::shown(change.at_ms), shown, harmless(&change.cause), devices, gateway, change.version.to_string()]
}

pub fn online_time(user: i64, with_hidden: bool, answer: &pb::GetOnlineTimeResp) -> String {
    if code(&answer.result) != Code::Ok {
        return format!("the online time of user {user} was not read{}", refusal(&answer.result));
    }
    let now = if answer.online_now { ", online now" } else { "" };
    let (time, sessions) = (duration(answer.online_s), counted(answer.sessions, "session"));
    let sum = format!("user {user} was online for {time} in {sessions}{now}; activity score {}", answer.activity_score);
    let row = |day: &pb::OnlineDay| {
        let mut row = vec![harmless(&day.day), duration(day.online_s.into()), day.sessions.to_string()];
        row.extend(with_hidden.then(|| duration(day.hidden_s.into())));
        row
    };
    let headers = ["DAY", "ONLINE", "SESSIONS", "INVISIBLE"];
    let rows: Vec<Vec<String>> = answer.days.iter().map(row).collect();
    lines([sum, table(&headers[..if with_hidden { 4 } else { 3 }], &rows)])
}

/// `3h 05m 00s`
fn duration(seconds: u64) -> String {
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{hours}h {minutes:02}m {seconds:02}s")
}

fn lines(parts: [String; 2]) -> String {
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::Platform;
    use crate::pb::Status;

    #[test]
    fn a_telling_is_a_line() {
        let online = pb::UserPresence {
            user_id: 42,
            status: Status::Busy.into(),
            is_online: true,
            status_text: "in a\nmeeting".into(),
            devices: 2,
            platforms: vec![Platform::Ios.into(), Platform::Web.into()],
            gateway_addr: "gw-1:7000".into(),
            ..Default::default()
        };
        let want = "1970-01-01 00:00:00.000Z 42 busy \"in a\\nmeeting\" 2 devices (ios, web) on gw-1:7000";
        assert_eq!(told(0, &online), want);
        let offline = pb::UserPresence { user_id: 42, status: Status::Offline.into(), last_seen_ms: 1, ..Default::default() };
        assert_eq!(told(0, &offline), "1970-01-01 00:00:00.000Z 42 offline, last seen 1970-01-01 00:00:00.001Z");
    }

    #[test]
    fn a_status_has_its_text_and_its_time() {
        let answer = pb::QueryRouteResp { status: Status::Away.into(), status_since_ms: 1_000, ..Default::default() };
        assert_eq!(status(42, &answer), "user 42 is shown as AWAY since 1970-01-01 00:00:01.000Z");
        let result = Some(pb::Result { code: Code::NotFound.into(), msg: "no such device".into() });
        let answer = pb::SetStatusResp { result, ..Default::default() };
        assert_eq!(set(42, &answer), "nothing of user 42 was set (NOT_FOUND): no such device");
    }

    #[test]
    fn online_time_is_a_sum_and_a_table_of_days() {
        let day = pb::OnlineDay { day: "2026-11-26".into(), online_s: 11_100, sessions: 2, hidden_s: 61 };
        let answer =
            pb::GetOnlineTimeResp { days: vec![day], online_s: 11_100, sessions: 2, activity_score: 7, ..Default::default() };
        let want = "user 42 was online for 3h 05m 00s in 2 sessions; activity score 7\n\
            DAY         ONLINE      SESSIONS  INVISIBLE\n\
            2026-11-26  3h 05m 00s  2         0h 01m 01s";
        assert_eq!(online_time(42, true, &answer), want);
        assert!(!online_time(42, false, &answer).contains("INVISIBLE"));
    }

    #[test]
    fn a_history_says_what_was_hidden_and_that_there_is_more() {
        let change = pb::StatusChange { shown: Status::Online.into(), cause: "login".into(), hidden: true, ..Default::default() };
        let answer = pb::GetStatusHistoryResp { changes: vec![change], next_page_token: "x".into(), ..Default::default() };
        let text = history(42, &answer);
        assert!(text.starts_with("1 change of user 42, the newest first; there are more, see --limit\nAT"), "{text}");
        assert!(text.ends_with("1970-01-01 00:00:00.000Z  (ONLINE, hidden)  login  0        -        0"), "{text}");
    }
}
