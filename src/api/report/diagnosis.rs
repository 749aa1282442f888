//! What the doctor finds, with what the other nodes say.

use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::report::Reporter;
use crate::clock::unix_ms;
use crate::engine::overview::check;
use crate::engine::overview::check::Check;
use crate::error::Error;

/// How old an examination may be that is told again.
const MAX_AGE: Duration = Duration::from_secs(2);

/// One thing that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CheckReport {
    /// Its name, for programs.
    pub check: String,
    pub ok: bool,
    /// What was found.
    pub says: String,
    /// What to do; empty: nothing.
    pub hint: String,
}

impl From<&Check> for CheckReport {
    fn from(check: &Check) -> Self {
        let Check { check, ok, says, hint } = check;
        Self { check: (*check).to_owned(), ok: *ok, says: says.clone(), hint: (*hint).to_owned() }
    }
}

impl Reporter {
    /// Everything that this node relies on, looked at now; what is wrong comes first.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: this node stops.
    pub async fn examine(&self) -> Result<Vec<CheckReport>, Error> {
        let (found, differences) = tokio::join!(self.doctor.newest(MAX_AGE), self.differences());
        let (found, differences) = (found?, differences?);
        let ends = self.own_certificates().into_iter().map(|one| (one.r#use, one.not_after_ms / 1_000));
        let certificates = check::certificates(&ends.collect::<Vec<_>>(), unix_ms() / 1_000);
        let must_be_alike: Vec<String> =
            differences.items.iter().filter(|one| one.matters()).map(|one| one.key.clone()).collect();
        let configuration = check::configuration(&must_be_alike, differences.silent.len());
        let mut checks: Vec<CheckReport> = found.iter().chain([&certificates, &configuration]).map(CheckReport::from).collect();
        checks.sort_by_key(|check| check.ok);
        Ok(checks)
    }
}
