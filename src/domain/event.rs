//! What can be asked of a user's record, and what can come of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::caller::Caller;
use crate::domain::caller::GatewayPatterns;
use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::Version;
use crate::domain::inbox::InboxOutcome;
use crate::domain::policy::Reason;
use crate::domain::policy::Refusal;
use crate::domain::route::Platform;
use crate::domain::route::Route;
use crate::domain::status::Status;
use crate::domain::status::StatusText;
use crate::domain::time::Timestamp;

/// A gateway says that a device has connected to it.
#[derive(Clone, Debug)]
pub struct Bind {
    pub gateway: GatewayAddr,
    /// The life the gateway says it lives. None: whatever life it has now.
    pub epoch: Option<Epoch>,
    pub device: DeviceId,
    pub platform: Platform,
    pub conn: ConnId,
    pub client_ip: Option<IpAddr>,
    pub client_port: u16,
    /// How long before the call the client connected. None: just now.
    pub connected_ago: Option<Duration>,
    /// Nobody uses the device.
    pub idle: bool,
}

/// A gateway says that a device has gone. Every given field has to fit, or nothing happens.
#[derive(Clone, Debug, PartialEq)]
pub enum Unbind {
    /// Exactly the bind that answered with this version.
    Exact {
        bound_version: Version,
        conn: Option<ConnId>,
        epoch: Option<Epoch>,
        /// Whoever may speak for the route's gateway. None: anybody may.
        by: Option<Arc<Caller>>,
    },
    /// The device's route, if it is on this gateway.
    Device { device: DeviceId, gateway: GatewayAddr, conn: Option<ConnId>, epoch: Option<Epoch> },
}

impl Unbind {
    /// The life that its gateway claims to live.
    pub fn epoch(&self) -> Option<Epoch> {
        match self {
            Self::Exact { epoch, .. } | Self::Device { epoch, .. } => *epoch,
        }
    }
}

/// How a user wants to be seen from now on, and whether a device is idle. What is None stays as it is.
#[derive(Clone, Debug, Default)]
pub struct SetStatus {
    pub status: Option<Status>,
    pub text: Option<StatusText>,
    /// Status and text return to the default then. None: they stay.
    pub expire_after: Option<Duration>,
    pub idle: Option<(DeviceId, bool)>,
    /// Only if the user has a device on a gateway for which one of these may speak. None: of anybody.
    pub by: Option<Arc<GatewayPatterns>>,
}

/// An operator takes devices of a user off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForceOffline {
    pub which: Which,
    pub ban: Ban,
    /// Only say what it would do.
    pub dry_run: bool,
}

/// Devices of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Which {
    #[default]
    All,
    One(DeviceId),
    /// Those on this life of a gateway.
    On(Epoch),
}

/// What becomes of a user's ban.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ban {
    /// If one is on, it stays.
    #[default]
    Stays,
    /// Nothing may be bound for so long from now on.
    For(Duration),
    /// It is over, and no device is taken off.
    Lifted,
}

/// One change asked of a user.
#[derive(Debug)]
pub enum Event<'a> {
    /// `life` is the one the bind's gateway lives now; `waited` is how long the event waited before it came here.
    Bind {
        bind: &'a Bind,
        life: &'a Life,
        waited: Duration,
    },
    Unbind(&'a Unbind),
    /// Remove the routes that are not live.
    Sweep,
    SetStatus(&'a SetStatus),
    /// The wish returns to the default, if its time is over.
    EndStatus,
    ForceOffline(&'a ForceOffline),
    /// Erase what is known of the user.
    Forget,
}

/// What came of an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Bound {
        bound_version: Version,
        version: Version,
        epoch: Epoch,
        kicked: Vec<(Route, Reason)>,
    },
    Refused(Refusal),
    /// The life the gateway claims is over, or never was.
    Fenced(Fence),
    Unbound {
        version: Version,
    },
    /// There was nothing to unbind: the reason, to be read by a person.
    NotBound {
        version: Version,
        why: &'static str,
    },
    Swept {
        routes: usize,
    },
    Inbox(InboxOutcome),
    StatusSet {
        shown: Status,
        version: Version,
    },
    /// The device that is meant has no live route.
    NoDevice,
    /// The user has no device on a gateway that the caller may speak for.
    NotTheirs,
    /// With all that was live, or the one device, removed; `banned_until`: long ago, if no ban is on.
    ForcedOffline {
        kicked: Vec<(Route, Reason)>,
        version: Version,
        banned_until: Timestamp,
    },
    /// Rows of routes, stored messages and history that were there.
    Forgotten {
        rows: u64,
        kicked: Vec<(Route, Reason)>,
    },
}
