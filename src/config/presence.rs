//! Status, watches, history.

use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::millis;
use super::forms::seconds;

/// How users want to be seen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Changes of one user per second; 0: no limit.
    pub rate: u32,
    pub burst: u32,
    pub text_bytes: usize,
}

/// Who is told what users are shown as.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    #[serde(with = "millis")]
    pub offline_delay: Duration,
    #[serde(with = "millis")]
    pub min_interval: Duration,
    pub max_users_per_stream: usize,
    pub max_users: usize,
    pub max_streams: usize,
    /// Users per second.
    pub resync_rate: u32,
}

/// What is written down of the past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct History {
    pub enabled: bool,
    pub keep_days: u32,
    /// Lines per user.
    pub keep_rows: u32,
    #[serde(with = "seconds")]
    pub session_gap: Duration,
}
