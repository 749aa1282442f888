//! How domain values are written down: small numbers in columns, and the body of an outbox row.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;

use crate::domain::drain::DrainState;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::LifeKind;
use crate::domain::history::Cause;
use crate::domain::history::OnlineSession;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::policy::Reason;
use crate::domain::route::Platform;
use crate::domain::route::Route;
use crate::domain::status::MAX_TEXT_BYTES;
use crate::domain::status::Status;
use crate::domain::status::StatusText;
use crate::domain::status::Wish;
use crate::domain::time::Timestamp;
use crate::domain::user::LastShown;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;
pub use crate::store::kick::KickOrder;
pub use crate::store::kick::KickedRoute;

/// What a committed batch still has to show to the outside.
#[derive(Clone, PartialEq, Message)]
pub struct OutboxBody {
    #[prost(message, repeated, tag = "1")]
    pub changes: Vec<ChangedUser>,
    #[prost(message, repeated, tag = "2")]
    pub kicks: Vec<KickedRoute>,
    /// Epochs of lives that ended.
    #[prost(uint64, repeated, tag = "3")]
    pub ended: Vec<u64>,
    /// Messages that were stored.
    #[prost(message, repeated, tag = "4")]
    pub stored: Vec<StoredNotice>,
    /// Users of whom others were shown something new.
    #[prost(int64, repeated, tag = "5")]
    pub shown: Vec<i64>,
}

/// Tells push services of a stored message.
#[derive(Clone, PartialEq, Message)]
pub struct StoredNotice {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(string, tag = "2")]
    pub message_id: String,
    #[prost(string, tag = "3")]
    pub message_type: String,
    #[prost(int64, tag = "4")]
    pub stored_at_ms: i64,
}

impl StoredNotice {
    /// As it is published: 64-bit numbers are strings, because JavaScript reads them.
    pub fn as_json(&self) -> String {
        let Self { user_id, message_id, message_type, stored_at_ms } = self;
        serde_json::json!({
            "user_id": user_id.to_string(),
            "message_id": message_id,
            "message_type": message_type,
            "stored_at_ms": stored_at_ms.to_string(),
        })
        .to_string()
    }
}

/// The devices a stored message is for.
#[derive(Clone, PartialEq, Message)]
pub struct Devices {
    #[prost(string, repeated, tag = "1")]
    pub ids: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ChangedUser {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(uint64, tag = "2")]
    pub version: u64,
    /// Of what others are shown. A node of the last release does not say it.
    #[prost(uint64, optional, tag = "3")]
    pub shown_version: Option<u64>,
}

impl ChangedUser {
    pub fn of(user: UserId, record: &UserRecord) -> Self {
        Self { user_id: user.get(), version: record.version.0, shown_version: Some(record.shown().version.0) }
    }

    pub fn user(&self) -> Option<UserId> {
        UserId::parse(self.user_id).ok()
    }

    /// The version of what others are shown; if it is not known, that of the record.
    pub fn shown(&self) -> Version {
        Version(self.shown_version.unwrap_or(self.version))
    }
}

/// What a gateway says of itself when it registers, as it stands in a column.
#[derive(Clone, PartialEq, Message)]
pub struct Labels {
    #[prost(btree_map = "string, string", tag = "1")]
    pub labels: BTreeMap<String, String>,
}

/// A user's record in Redis.
#[derive(Clone, PartialEq, Message)]
pub struct StoredRecord {
    #[prost(int32, tag = "1")]
    status: i32,
    #[prost(int64, tag = "2")]
    last_seen_ms: i64,
    #[prost(message, repeated, tag = "3")]
    routes: Vec<StoredRoute>,
    #[prost(uint64, tag = "4")]
    inbox_seq: u64,
    #[prost(uint64, tag = "5")]
    inbox_pending: u64,
    #[prost(string, tag = "6")]
    text: String,
    #[prost(int64, optional, tag = "7")]
    until_ms: Option<i64>,
    #[prost(uint64, tag = "8")]
    shown_version: u64,
    #[prost(int64, tag = "9")]
    shown_seen_ms: i64,
    #[prost(int64, tag = "10")]
    status_since_ms: i64,
    #[prost(int64, tag = "11")]
    online_since_ms: i64,
    #[prost(bool, tag = "12")]
    session_is_counted: bool,
    /// Not if a node of the last release wrote the record.
    #[prost(bool, tag = "13")]
    says_what_is_shown: bool,
    #[prost(int64, tag = "14")]
    banned_until_ms: i64,
}

#[derive(Clone, PartialEq, Message)]
struct StoredRoute {
    #[prost(string, tag = "1")]
    device_id: String,
    #[prost(int32, tag = "2")]
    platform: i32,
    #[prost(uint64, tag = "3")]
    epoch: u64,
    #[prost(string, tag = "4")]
    conn_id: String,
    #[prost(int64, tag = "5")]
    connected_at_ms: i64,
    #[prost(string, tag = "6")]
    client_ip: String,
    #[prost(uint32, tag = "7")]
    client_port: u32,
    #[prost(uint64, tag = "8")]
    bound_version: u64,
    #[prost(int64, tag = "9")]
    bound_at_ms: i64,
    #[prost(int64, optional, tag = "10")]
    expires_at_ms: Option<i64>,
    #[prost(bool, tag = "11")]
    idle: bool,
}

impl From<&UserRecord> for StoredRecord {
    fn from(record: &UserRecord) -> Self {
        let routes = record.routes.iter().map(StoredRoute::from).collect();
        let UserRecord { inbox_seq, inbox_pending, .. } = *record;
        let (shown, session) = (record.shown(), record.session());
        Self {
            status: status_to_i32(record.wanted()),
            last_seen_ms: record.last_seen.0,
            routes,
            inbox_seq,
            inbox_pending: inbox_pending.into(),
            text: record.text().to_owned(),
            until_ms: record.wish_until().map(|until| until.0),
            shown_version: shown.version.0,
            shown_seen_ms: shown.seen.0,
            status_since_ms: shown.since.0,
            online_since_ms: session.since.0,
            session_is_counted: session.is_counted,
            says_what_is_shown: true,
            banned_until_ms: record.banned_until().0,
        }
    }
}

impl From<&Route> for StoredRoute {
    fn from(route: &Route) -> Self {
        Self {
            device_id: route.device.to_string(),
            platform: platform_to_i32(route.platform),
            epoch: route.epoch.0,
            conn_id: route.conn.to_string(),
            connected_at_ms: route.connected_at.0,
            client_ip: route.client_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            client_port: route.client_port.into(),
            bound_version: route.bound_version.0,
            bound_at_ms: route.bound_at.0,
            expires_at_ms: route.expires_at.at().map(|end| end.0),
            idle: route.idle,
        }
    }
}

impl StoredRecord {
    /// None: this is no record of ours, or it does not say what is shown.
    pub fn into_record(self, version: Version) -> Option<UserRecord> {
        if !self.says_what_is_shown {
            return None;
        }
        let (text, until) = (StatusText::parse(&self.text, MAX_TEXT_BYTES).ok()?, self.until_ms.map(Timestamp));
        let wish = Wish { status: status_from_i32(self.status)?, text, until };
        let (seen, since) = (Timestamp(self.shown_seen_ms), Timestamp(self.status_since_ms));
        let session = OnlineSession { since: Timestamp(self.online_since_ms), is_counted: self.session_is_counted };
        let record = UserRecord {
            version,
            presence: None,
            last_seen: Timestamp(self.last_seen_ms),
            routes: self.routes.into_iter().map(StoredRoute::into_route).collect::<Option<_>>()?,
            inbox_seq: self.inbox_seq,
            inbox_pending: u32::try_from(self.inbox_pending).unwrap_or(u32::MAX),
        };
        let shown = LastShown { version: Version(self.shown_version), seen, since };
        Some(record.with(Presence { wish, shown, session, banned_until: Timestamp(self.banned_until_ms) }))
    }
}

impl StoredRoute {
    fn into_route(self) -> Option<Route> {
        Some(Route {
            device: DeviceId::parse(&self.device_id).ok()?,
            platform: platform_from_i32(self.platform)?,
            epoch: Epoch(self.epoch),
            conn: ConnId::parse(&self.conn_id).ok()?,
            connected_at: Timestamp(self.connected_at_ms),
            client_ip: if self.client_ip.is_empty() { None } else { Some(self.client_ip.parse().ok()?) },
            client_port: u16::try_from(self.client_port).ok()?,
            bound_version: Version(self.bound_version),
            bound_at: Timestamp(self.bound_at_ms),
            expires_at: self.expires_at_ms.map(Timestamp).into(),
            idle: self.idle,
        })
    }
}

/// What nodes tell each other: who has changed, or (without users) that they are there.
#[derive(Clone, PartialEq, Message)]
pub struct Hint {
    #[prost(string, tag = "1")]
    pub store_id: String,
    #[prost(uint64, tag = "2")]
    pub generation: u64,
    #[prost(string, tag = "3")]
    pub node_id: String,
    /// Counts the messages with users; a beat repeats the last one's.
    #[prost(uint64, tag = "4")]
    pub seq: u64,
    /// When it was sent, on the sender's own clock.
    #[prost(uint64, tag = "5")]
    pub sent_ms: u64,
    #[prost(message, repeated, tag = "6")]
    pub users: Vec<ChangedUser>,
    /// When it was sent, on the database's clock.
    #[prost(int64, tag = "7")]
    pub sent_at_ms: i64,
    /// Its sender has read the database lately.
    #[prost(bool, tag = "8")]
    pub reads_database: bool,
    /// Which process of the node sent it.
    #[prost(string, tag = "9")]
    pub incarnation: String,
}

/// What nodes tell each other of gateways: epochs of lives that are over. Faster than reading the table; lost, it is read.
#[derive(Clone, PartialEq, Message)]
pub struct LivesHint {
    #[prost(string, tag = "1")]
    pub store_id: String,
    #[prost(uint64, repeated, tag = "2")]
    pub ended: Vec<u64>,
}

/// Field for field a `mpim.Delivery`.
#[derive(Clone, PartialEq, Message)]
pub struct Envelope {
    #[prost(string, tag = "1")]
    pub delivery_id: String,
    #[prost(int64, tag = "2")]
    pub user_id: i64,
    /// UTF-8. On the wire text is bytes; here they are shared by all who get the message.
    #[prost(bytes = "bytes", tag = "3")]
    pub message: Bytes,
    #[prost(string, tag = "4")]
    pub message_type: String,
    #[prost(bytes = "bytes", tag = "5")]
    pub payload: Bytes,
    #[prost(int64, tag = "6")]
    pub timestamp: i64,
    #[prost(string, repeated, tag = "7")]
    pub device_ids: Vec<String>,
    #[prost(bool, tag = "8")]
    pub wants_ack: bool,
    #[prost(string, tag = "9")]
    pub message_id: String,
    /// The message's number in the user's inbox; 0: it is not stored.
    #[prost(uint64, tag = "10")]
    pub inbox_seq: u64,
    /// Empty: it is not traced.
    #[prost(string, tag = "11")]
    pub traceparent: String,
}

impl OutboxBody {
    pub fn changed(&mut self, user: UserId, record: &UserRecord) {
        self.changes.push(ChangedUser::of(user, record));
    }

    pub fn users(&self) -> impl Iterator<Item = UserId> {
        self.changes.iter().filter_map(ChangedUser::user)
    }
}

macro_rules! numbered {
    ($to:ident, $from:ident, $type:ident, $($variant:ident = $number:literal),+) => {
        pub fn $to(value: $type) -> i32 {
            match value { $($type::$variant => $number),+ }
        }
        pub fn $from(number: i32) -> Option<$type> {
            match number { $($number => Some($type::$variant),)+ _ => None }
        }
    };
}

numbered!(status_to_i32, status_from_i32, Status, Online = 1, Away = 2, Busy = 3, Invisible = 4, Offline = 5);
numbered!(
    platform_to_i32,
    platform_from_i32,
    Platform,
    Unspecified = 0,
    Ios = 1,
    Android = 2,
    Windows = 3,
    Macos = 4,
    Linux = 5,
    Web = 6,
    Tablet = 7,
    Other = 8
);
numbered!(end_to_i32, end_from_i32, EndReason, Untold = 0, Expired = 1, Superseded = 2, Deregistered = 3, Operator = 4, Held = 5);
numbered!(kind_to_i32, kind_from_i32, LifeKind, Managed = 1, Unmanaged = 2);
numbered!(
    reason_to_i32,
    reason_from_i32,
    Reason,
    Replaced = 1,
    DeviceLimit = 2,
    PlatformLimit = 3,
    Operator = 4,
    Drain = 6,
    Migrate = 7,
    Banned = 8
);
numbered!(drain_to_i32, drain_from_i32, DrainState, Waiting = 1, Running = 2, Done = 3, Cancelled = 4, Ended = 5);
numbered!(
    cause_to_i32,
    cause_from_i32,
    Cause,
    Login = 1,
    Logout = 2,
    Expired = 3,
    Kicked = 4,
    Operator = 5,
    Set = 6,
    Idle = 7,
    Active = 8,
    StatusEnded = 9
);

/// As other services read it.
pub fn status_word(status: Status) -> &'static str {
    match status {
        Status::Online => "online",
        Status::Away => "away",
        Status::Busy => "busy",
        Status::Invisible | Status::Offline => "offline",
    }
}
