//! Some of the users are treated differently, always the same ones: on every node, and after restarts.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::domain::allocation::algorithm::Algorithm;
use crate::domain::allocation::dice::fraction;
use crate::domain::id::UserId;

/// How a share of the users is allocated.
#[derive(Clone, Debug, PartialEq)]
pub struct Experiment {
    pub name: String,
    /// Of the users, 0 to 1.
    pub share: f64,
    /// None: that of everybody.
    pub algorithm: Option<Algorithm>,
    /// Only to gateways with all of these.
    pub labels: BTreeMap<String, String>,
}

impl Experiment {
    /// By a hash of its name and the user, which is the same in every build.
    pub fn includes(&self, user: UserId) -> bool {
        fraction(xxh3_64_with_seed(self.name.as_bytes(), user.hash())) < self.share
    }
}
