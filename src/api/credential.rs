//! On what a stream rests for as long as it lasts, if callers are asked who they are.

use std::time::Duration;

use tokio::time::sleep;

use crate::api::access::Admission;
use crate::error::Error;
use crate::security::allowance::StreamSlot;

/// The wall clock, by which credentials end, is looked at again after this.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

/// A stream's caller, and its place among the caller's streams.
pub struct Credential {
    admission: Admission,
    _slot: StreamSlot,
}

impl Credential {
    /// # Errors
    /// The caller has as many streams as it may.
    pub fn new(admission: &Admission) -> Result<Self, Error> {
        let slot = admission.identity.allowance.open_stream();
        let slot = slot.ok_or_else(|| Error::limited("this caller has as many streams as it may (limits.streams)"))?;
        Ok(Self { admission: admission.clone(), _slot: slot })
    }

    pub fn admission(&self) -> &Admission {
        &self.admission
    }
}

/// Waits until the credential is not valid any more: what it rests on was read again, or its time is over.
pub async fn revoked(admission: Option<Admission>) {
    let Some(Admission { access, identity, .. }) = admission else { return std::future::pending().await };
    let mut changes = access.callers.changes();
    while access.callers.still_knows(&identity) {
        let ended = async {
            while let Some(left) = identity.expires_in().filter(|left| !left.is_zero()) {
                sleep(left.min(LONGEST_SLEEP)).await;
            }
        };
        tokio::select! {
            _ = changes.changed() => {}
            () = ended, if identity.expires_in().is_some() => return,
        }
    }
}
