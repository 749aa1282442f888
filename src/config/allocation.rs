//! Where users are sent.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::seconds;

/// Where users are sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allocation {
    pub algorithm: Algorithm,
    /// Of its capacity, above 0 and at most 1.
    pub max_load: f64,
    /// Of a gateway that does not say what it can hold.
    pub default_capacity: u32,
    /// Per second, of a gateway that does not say; 0: as many as come.
    pub login_rate: u32,
    /// Times the mean.
    pub bounded_load: f64,
    #[serde(with = "seconds")]
    pub max_retry_after: Duration,
    /// Where users of a region go when it takes none.
    pub regions: BTreeMap<String, Vec<String>>,
    pub experiments: Vec<Experiment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    TwoChoices,
    LeastLoad,
    Rendezvous,
}

/// How a share of the users is treated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    pub name: String,
    /// Of the users, 0 to 1.
    pub share: f64,
    /// None: that of everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub algorithm: Option<Algorithm>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}
