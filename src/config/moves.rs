//! Moving users from one gateway to others.

use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::seconds;

/// How users leave a gateway, if an order does not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// Users per second.
    pub rate: u32,
    #[serde(with = "seconds")]
    pub settle: Duration,
    #[serde(with = "seconds")]
    pub close_after: Duration,
    /// In seconds of the rate.
    #[serde(with = "seconds")]
    pub outstanding: Duration,
}
