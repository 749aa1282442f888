//! What was shown of a user, how long they were online, and what is stored for them.

use std::sync::Arc;

use axum::Json;
use axum::extract::Path;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::convert;
use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::ask::number;
use crate::api::rest::cursor::Cursor;
use crate::api::rest::problem::done;
use crate::api::rest::words::Status;
use crate::api::status::status;
use crate::engine::messages::inbox::StoredHead;
use crate::pb;
use crate::pb::presence_service_server::PresenceService;

/// One change of what a user was shown as.
#[derive(Serialize, ToSchema)]
pub struct StatusChange {
    /// For a gateway that died: when it was last heard.
    at_ms: i64,
    shown: Status,
    /// login, logout, expired (its gateway died), kicked, operator, set, idle, active, status_ended.
    cause: String,
    version: String,
    /// Devices online after it.
    devices: u32,
    /// Of the device that was bound last.
    gateway_addr: String,
    /// The user was invisible: `shown` is what would have been shown.
    hidden: bool,
}

impl From<pb::StatusChange> for StatusChange {
    fn from(change: pb::StatusChange) -> Self {
        Self {
            at_ms: change.at_ms,
            shown: Status::of(change.shown()),
            cause: change.cause,
            version: change.version.to_string(),
            devices: change.devices,
            gateway_addr: change.gateway_addr,
            hidden: change.hidden,
        }
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WhichChanges {
    /// From this time on.
    from_ms: Option<i64>,
    /// Before this time.
    to_ms: Option<i64>,
    /// Also what nobody could see because the user was invisible.
    include_hidden: Option<bool>,
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// A page of changes.
#[derive(Serialize, ToSchema)]
struct StatusChanges {
    /// The newest first.
    items: Vec<StatusChange>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WhichDays {
    /// A day of UTC. 27 days before to_day, if not given; at most 400 days before it.
    #[param(example = "2026-11-01")]
    from_day: Option<String>,
    /// Today, if not given.
    #[param(example = "2026-11-26")]
    to_day: Option<String>,
    /// Also while the user was invisible.
    include_hidden: Option<bool>,
}

/// How long a user was online. Days on which they were not are left out; the running session counts until now.
#[derive(Serialize, ToSchema)]
struct OnlineTime {
    days: Vec<OnlineDay>,
    online_s: u64,
    sessions: u32,
    /// 0 to 100, of the last 28 days.
    activity_score: u32,
    online_now: bool,
}

/// One day of UTC.
#[derive(Serialize, ToSchema)]
struct OnlineDay {
    /// As in 2026-11-26.
    day: String,
    online_s: u32,
    /// Sessions that began on it.
    sessions: u32,
    /// Seconds online while invisible.
    hidden_s: u32,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WhichMessages {
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// A page of an inbox.
#[derive(Serialize, ToSchema)]
struct Inbox {
    /// The oldest first.
    items: Vec<StoredMessage>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

/// A stored message. Its text is nobody's business but its reader's.
#[derive(Serialize, ToSchema)]
struct StoredMessage {
    seq: String,
    /// Empty: it has none.
    message_id: String,
    message_type: String,
    bytes: u64,
    stored_ms: i64,
    expires_ms: i64,
    /// Empty: for all of the user's devices.
    device_ids: Vec<String>,
}

impl From<StoredHead> for StoredMessage {
    fn from(head: StoredHead) -> Self {
        Self {
            seq: head.seq.to_string(),
            message_id: head.message_id,
            message_type: head.message_type,
            bytes: head.bytes,
            stored_ms: head.stored_at.0,
            expires_ms: head.expires_at.0,
            device_ids: head.devices.into_iter().flatten().map(|device| device.to_string()).collect(),
        }
    }
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_status_changes)).routes(routes!(get_online_time)).routes(routes!(list_inbox))
}

/// What a user was shown as.
#[utoipa::path(
    get, path = "/api/v1/users/{user_id}/history", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), WhichChanges),
    responses((status = 200, body = StatusChanges))
)]
async fn list_status_changes(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(which): Query<WhichChanges>,
) -> Answer<StatusChanges> {
    let cursor = Cursor::of("history", &(&user_id, which.from_ms, which.to_ms, which.include_hidden));
    let request = pb::GetStatusHistoryReq {
        user_id: number("user_id", &user_id)?,
        from_ms: which.from_ms.unwrap_or_default(),
        to_ms: which.to_ms.unwrap_or_default(),
        page_size: limit(which.limit)?,
        page_token: cursor.read(which.cursor.as_deref())?,
        include_hidden: which.include_hidden.unwrap_or_default(),
    };
    let listed = rest.presence.get_status_history(caller.asks(request)).await;
    let page = listed.map_err(|status| super::list_problem(status, "gateway"))?.into_inner();
    done(page.result)?;
    let items = page.changes.into_iter().map(StatusChange::from).collect();
    Ok(Json(StatusChanges { items, next_cursor: cursor.next(&page.next_page_token), as_of_ms: rest.now_ms() }))
}

/// How long a user was online, by day.
#[utoipa::path(
    get, path = "/api/v1/users/{user_id}/online-time", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), WhichDays),
    responses((status = 200, body = OnlineTime))
)]
async fn get_online_time(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    Path(user_id): Path<String>,
    Query(which): Query<WhichDays>,
) -> Answer<OnlineTime> {
    let request = pb::GetOnlineTimeReq {
        user_id: number("user_id", &user_id)?,
        from_day: which.from_day.unwrap_or_default(),
        to_day: which.to_day.unwrap_or_default(),
        include_hidden: which.include_hidden.unwrap_or_default(),
    };
    let time = rest.presence.get_online_time(caller.asks(request)).await?.into_inner();
    done(time.result)?;
    let day = |day: pb::OnlineDay| {
        let pb::OnlineDay { day, online_s, sessions, hidden_s } = day;
        OnlineDay { day, online_s, sessions, hidden_s }
    };
    Ok(Json(OnlineTime {
        days: time.days.into_iter().map(day).collect(),
        online_s: time.online_s,
        sessions: time.sessions,
        activity_score: time.activity_score,
        online_now: time.online_now,
    }))
}

/// What is stored for a user, without the texts.
#[utoipa::path(
    get, path = "/api/v1/users/{user_id}/inbox", tag = "users",
    params(("user_id" = String, Path, pattern = "^[1-9][0-9]{0,17}$", example = "42"), WhichMessages),
    responses((status = 200, body = Inbox))
)]
async fn list_inbox(
    State(rest): State<Arc<Rest>>,
    Path(user_id): Path<String>,
    Query(which): Query<WhichMessages>,
) -> Answer<Inbox> {
    let cursor = Cursor::of("inbox", &user_id);
    let (limit, user) = (limit(which.limit)?, convert::user_id(number("user_id", &user_id)?).map_err(|error| status(&error))?);
    let token = cursor.read(which.cursor.as_deref())?;
    let after = if token.is_empty() { 0 } else { number("cursor", &token)? };
    let heads = rest.inboxes.heads(user, after, limit).await.map_err(|error| status(&error))?;
    let last = heads.last().filter(|_| heads.len() == limit as usize).map(|last| last.seq.to_string()).unwrap_or_default();
    let items = heads.into_iter().map(StoredMessage::from).collect();
    Ok(Json(Inbox { items, next_cursor: cursor.next(&last), as_of_ms: rest.now_ms() }))
}
