//! A route binds a device to a life of a gateway.

use std::net::IpAddr;
use std::time::Duration;

use smallvec::SmallVec;

use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Liveness;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::Version;
use crate::domain::status::Activity;
use crate::domain::time::Expiry;
use crate::domain::time::Timestamp;

/// What kind of device it is, as its gateway says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Platform {
    #[default]
    Unspecified,
    Ios,
    Android,
    Windows,
    Macos,
    Linux,
    Web,
    Tablet,
    Other,
}

impl Platform {
    /// Whether the limit per platform counts it.
    pub fn is_counted(self) -> bool {
        self != Platform::Unspecified
    }
}

/// Binds a device to a life of a gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    pub device: DeviceId,
    pub platform: Platform,
    pub epoch: Epoch,
    pub conn: ConnId,
    /// When the client connected, as far as its gateway told: orders connections of one device.
    pub connected_at: Timestamp,
    pub client_ip: Option<IpAddr>,
    pub client_port: u16,
    /// The version of the bind that made this route: names it among all routes the user ever had.
    pub bound_version: Version,
    pub bound_at: Timestamp,
    /// Only on unmanaged lives: when the route ends unless it is bound again.
    pub expires_at: Expiry,
    /// Nobody has used the device for a while.
    pub idle: bool,
}

/// A list with room for one within the record: most users have one device, and finding it costs no look elsewhere.
pub type Routes = SmallVec<[Route; 1]>;

impl Route {
    /// Whether the route leads to a device now. A life nobody has heard of is believed.
    pub fn liveness(&self, lives: &LifeTable, now: Timestamp, slack: Duration, heartbeat_interval: Duration) -> Liveness {
        if self.expires_at.at().is_some_and(|end| end.plus(slack) <= now) {
            return Liveness::Over;
        }
        lives.get(self.epoch).map_or(Liveness::OnTime, |life| life.liveness(now, heartbeat_interval))
    }

    /// Until when the route was good, if it is over: its own time to live, or the last beat of its gateway.
    pub fn end(&self, lives: &LifeTable) -> Option<Timestamp> {
        self.expires_at.at().or_else(|| lives.get(self.epoch).map(|life| life.last_beat))
    }
}

/// What a user does who has these routes, all of them live.
pub fn activity<'a>(routes: impl IntoIterator<Item = &'a Route>) -> Activity {
    Activity::of(routes.into_iter().map(|route| route.idle))
}
