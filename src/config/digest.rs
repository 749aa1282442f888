//! How gateways are compared with the database.

use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::millis;

/// What attached gateways hold, and what the database says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digest {
    /// 0: never.
    #[serde(with = "millis")]
    pub interval: Duration,
    /// How long a difference has to last.
    #[serde(with = "millis")]
    pub settle: Duration,
    pub rows_per_s: u32,
    /// 0 to 1.
    pub max_share: f64,
    pub repair: bool,
}
