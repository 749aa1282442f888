//! A user's row and the row of a route, as they are bound and read.

use std::net::IpAddr;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::digest::element;
use crate::domain::history::OnlineSession;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::route::Routes;
use crate::domain::status::MAX_TEXT_BYTES;
use crate::domain::status::Status;
use crate::domain::status::StatusText;
use crate::domain::status::Wish;
use crate::domain::time::Timestamp;
use crate::domain::user::LastShown;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;
use crate::store::codec;
use crate::store::column::corrupt;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;

/// Columns of a user besides its number, in the order in which they are bound.
pub(super) const USER_COLUMNS: [&str; 14] = [
    "version",
    "status",
    "last_seen_ms",
    "inbox_seq",
    "inbox_pending",
    "shown_version",
    "shown_for",
    "shown_seen_ms",
    "status_since_ms",
    "status_until_ms",
    "status_text",
    "online_since_ms",
    "session_counted",
    "banned_until_ms",
];

/// Columns of a route besides its user and device, in the same way.
pub(super) const ROUTE_COLUMNS: [&str; 11] = [
    "platform",
    "epoch",
    "conn_id",
    "connected_at_ms",
    "client_ip",
    "client_port",
    "bound_version",
    "bound_at_ms",
    "expires_at_ms",
    "idle",
    "digest",
];

pub(super) fn bind_user(insert: Statement, user: UserId, record: &UserRecord) -> Statement {
    let (shown, session) = (record.shown(), record.session());
    insert
        .bind(user.get())
        .bind(signed(record.version.0))
        .bind(codec::status_to_i32(record.wanted()))
        .bind(record.last_seen.0)
        .bind(signed(record.inbox_seq))
        .bind(i64::from(record.inbox_pending))
        .bind(signed(shown.version.0))
        .bind(signed(record.version.0))
        .bind(shown.seen.0)
        .bind(shown.since.0)
        .bind(record.wish_until().map(|until| until.0))
        .bind(record.text().to_owned())
        .bind(session.since.0)
        .bind(i32::from(session.is_counted))
        .bind(record.banned_until().0)
}

pub(super) fn bind_route(insert: Statement, user: UserId, route: &Route) -> Statement {
    insert
        .bind(user.get())
        .bind(route.device.to_string())
        .bind(codec::platform_to_i32(route.platform))
        .bind(signed(route.epoch.0))
        .bind(route.conn.to_string())
        .bind(route.connected_at.0)
        .bind(route.client_ip.map(|ip| ip.to_string()).unwrap_or_default())
        .bind(i32::from(route.client_port))
        .bind(signed(route.bound_version.0))
        .bind(route.bound_at.0)
        .bind(route.expires_at.at().map(|end| end.0))
        .bind(i32::from(route.idle))
        .bind(element(user, &route.device, &route.conn).cast_signed())
}

/// The user's part of a row. What a node of the last release wrote says nothing of what is shown: then every change counts, but
/// for users who hide.
pub(super) fn read_record(row: &AnyRow) -> Result<UserRecord, SqlError> {
    let (version, last_seen) = (Version(unsigned(row.try_get(1)?)), Timestamp(row.try_get(3)?));
    let status = codec::status_from_i32(row.try_get(2)?).unwrap_or_default();
    let text: &str = row.try_get(23)?;
    let wish = Wish {
        status,
        text: StatusText::parse(text, MAX_TEXT_BYTES).map_err(|error| corrupt("status_text", error))?,
        until: row.try_get::<Option<i64>, _>(22)?.map(Timestamp),
    };
    let mut shown = LastShown {
        version: Version(unsigned(row.try_get(18)?)),
        seen: Timestamp(row.try_get(20)?),
        since: Timestamp(row.try_get(21)?),
    };
    if unsigned(row.try_get(19)?) != version.0 && status != Status::Invisible {
        shown = LastShown { version, seen: last_seen, since: last_seen };
    }
    let session = OnlineSession { since: Timestamp(row.try_get(24)?), is_counted: row.try_get::<i32, _>(25)? != 0 };
    Ok(UserRecord {
        version,
        presence: Some(Box::new(Presence { wish, shown, session, banned_until: Timestamp(row.try_get(26)?) })),
        last_seen,
        routes: Routes::new(),
        inbox_seq: unsigned(row.try_get(16)?),
        inbox_pending: u32::try_from(row.try_get::<i64, _>(17)?).unwrap_or(u32::MAX),
    })
}

pub(super) fn read_route(row: &AnyRow, device: &str) -> Result<Route, SqlError> {
    let ip: &str = row.try_get(10)?;
    Ok(Route {
        device: DeviceId::parse(device).map_err(|error| corrupt("device_id", error))?,
        platform: codec::platform_from_i32(row.try_get(6)?).unwrap_or_default(),
        epoch: Epoch(unsigned(row.try_get(7)?)),
        conn: ConnId::parse(row.try_get(8)?).map_err(|error| corrupt("conn_id", error))?,
        connected_at: Timestamp(row.try_get(9)?),
        client_ip: if ip.is_empty() { None } else { ip.parse::<IpAddr>().ok() },
        client_port: u16::try_from(row.try_get::<i32, _>(11)?).unwrap_or_default(),
        bound_version: Version(unsigned(row.try_get(12)?)),
        bound_at: Timestamp(row.try_get(13)?),
        expires_at: row.try_get::<Option<i64>, _>(14)?.map(Timestamp).into(),
        idle: row.try_get::<i32, _>(15)? != 0,
    })
}
