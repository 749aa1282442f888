//! Words of the API, for the numbers of the gRPC API.

use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;

use crate::pb;

/// How somebody wants to be seen, or is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Online,
    Away,
    Busy,
    /// Only wanted; in a filter: who hides.
    Invisible,
    /// Only shown.
    Offline,
}

impl Status {
    pub fn of(status: pb::Status) -> Self {
        match status {
            pb::Status::Online => Self::Online,
            pb::Status::Away => Self::Away,
            pb::Status::Busy => Self::Busy,
            pb::Status::Invisible => Self::Invisible,
            pb::Status::Offline | pb::Status::Unspecified => Self::Offline,
        }
    }

    pub fn to_pb(self) -> pb::Status {
        match self {
            Self::Online => pb::Status::Online,
            Self::Away => pb::Status::Away,
            Self::Busy => pb::Status::Busy,
            Self::Invisible => pb::Status::Invisible,
            Self::Offline => pb::Status::Offline,
        }
    }
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Platform {
    /// It does not say.
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
    pub fn of(platform: pb::Platform) -> Self {
        match platform {
            pb::Platform::Unspecified => Self::Unspecified,
            pb::Platform::Ios => Self::Ios,
            pb::Platform::Android => Self::Android,
            pb::Platform::Windows => Self::Windows,
            pb::Platform::Macos => Self::Macos,
            pb::Platform::Linux => Self::Linux,
            pb::Platform::Web => Self::Web,
            pb::Platform::Tablet => Self::Tablet,
            pb::Platform::Other => Self::Other,
        }
    }

    pub fn to_pb(self) -> pb::Platform {
        match self {
            Self::Unspecified => pb::Platform::Unspecified,
            Self::Ios => pb::Platform::Ios,
            Self::Android => pb::Platform::Android,
            Self::Windows => pb::Platform::Windows,
            Self::Macos => pb::Platform::Macos,
            Self::Linux => pb::Platform::Linux,
            Self::Web => pb::Platform::Web,
            Self::Tablet => pb::Platform::Tablet,
            Self::Other => pb::Platform::Other,
        }
    }
}
