//! Turns an error into what gRPC says of it. A new kind of error does not compile until someone has chosen its code.

use std::time::Duration;

use tonic::Code;
use tonic_types::ErrorDetails;
use tonic_types::StatusExt;

use crate::error::Error;
use crate::pb;

/// The status of a call that failed as a whole.
pub fn status(error: &Error) -> tonic::Status {
    let mut details = ErrorDetails::new();
    let code = match error {
        Error::Invalid { field, reason } => {
            details.add_bad_request_violation(*field, reason);
            Code::InvalidArgument
        }
        Error::Overloaded { retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
            Code::ResourceExhausted
        }
        Error::Limited { what, retry_after } => {
            details.set_retry_info(Some(*retry_after)).add_quota_failure_violation("caller", *what);
            Code::ResourceExhausted
        }
        Error::Unavailable { retry_after, .. } => {
            details.set_retry_info(Some(*retry_after));
            Code::Unavailable
        }
        Error::Internal { .. } => Code::Internal,
    };
    tonic::Status::with_error_details(code, error.to_string(), details)
}

/// The code of one item of a batch that failed, and after which time to repeat it.
pub fn item_code(error: &Error) -> (pb::Code, Duration) {
    match error {
        Error::Overloaded { retry_after, .. } | Error::Limited { retry_after, .. } | Error::Unavailable { retry_after, .. } => {
            (pb::Code::Unavailable, *retry_after)
        }
        Error::Invalid { .. } | Error::Internal { .. } => (pb::Code::Internal, Duration::ZERO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_turned_away_is_told_when_to_come_again() {
        for error in [Error::overloaded("x"), Error::limited("x"), Error::unavailable("x")] {
            let retry = status(&error).get_error_details().retry_info().and_then(|info| info.retry_delay);
            assert!(retry.is_some_and(|delay| delay > Duration::ZERO), "{error}");
        }
    }
}
