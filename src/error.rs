//! What a caller is told when a call was not carried out: by what the caller should do next.

use std::time::Duration;

use tracing::error;

/// The call changed nothing that its caller could rely on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request is invalid.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// Wait, then repeat: more work than this node takes at once.
    #[error("overloaded: {what}; repeat after {} ms", retry_after.as_millis())]
    Overloaded { what: &'static str, retry_after: Duration },
    /// The same, and what is too much is what this caller asks, not what all do: another one is served.
    #[error("{what}; repeat after {} ms", retry_after.as_millis())]
    Limited { what: &'static str, retry_after: Duration },
    /// Repeat, here or on another node. A bind may or may not have taken effect; repeating it is harmless.
    #[error("{what}; repeat it, here or on another node")]
    Unavailable { what: &'static str, retry_after: Duration },
    /// This one thing cannot be done. Repeating will not help; the log says more.
    #[error("{what}; the daemon's log has the cause")]
    Internal { what: &'static str },
}

/// After which time a caller that was turned away should come again.
pub const RETRY_AFTER: Duration = Duration::from_millis(200);

impl Error {
    /// Something that cannot be, unless the daemon has a bug.
    pub fn internal(what: &'static str) -> Self {
        error!("{what}");
        Self::Internal { what }
    }

    pub fn unavailable(what: &'static str) -> Self {
        Self::Unavailable { what, retry_after: RETRY_AFTER }
    }

    pub fn limited(what: &'static str) -> Self {
        Self::Limited { what, retry_after: RETRY_AFTER }
    }

    pub fn overloaded(what: &'static str) -> Self {
        Self::Overloaded { what, retry_after: RETRY_AFTER }
    }
}
