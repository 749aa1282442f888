//! How domain values are written down: small numbers in columns, and the body of an outbox row.

use std::collections::BTreeSet;

use prost::Message;

use crate::domain::gateway::LifeKind;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::policy::Reason;
use crate::domain::status::Status;
use crate::domain::user::Platform;

/// What a committed batch still has to show to the outside.
#[derive(Clone, PartialEq, Message)]
pub struct OutboxBody {
    #[prost(message, repeated, tag = "1")]
    pub changes: Vec<ChangedUser>,
    #[prost(message, repeated, tag = "2")]
    pub kicks: Vec<KickedRoute>,
}

#[derive(Clone, PartialEq, Message)]
pub struct ChangedUser {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(uint64, tag = "2")]
    pub version: u64,
}

/// A route that was removed by another device's bind; its gateway has to close the connection.
#[derive(Clone, PartialEq, Message)]
pub struct KickedRoute {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(string, tag = "2")]
    pub device_id: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    #[prost(uint64, tag = "4")]
    pub bound_version: u64,
    #[prost(int32, tag = "5")]
    pub reason: i32,
}

impl OutboxBody {
    pub fn changed(&mut self, user: UserId, version: Version) {
        self.changes.push(ChangedUser { user_id: user.get(), version: version.0 });
    }

    pub fn users(&self) -> BTreeSet<i64> {
        self.changes.iter().map(|change| change.user_id).collect()
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
numbered!(kind_to_i32, kind_from_i32, LifeKind, Managed = 1, Unmanaged = 2);
numbered!(reason_to_i32, reason_from_i32, Reason, Replaced = 1, DeviceLimit = 2, PlatformLimit = 3);
