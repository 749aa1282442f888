//! Whether a history keeps what the product promises. Pure: the same history, the same complaints.
//!
//! What binds and unbinds did is known by the versions they were answered with, so nothing here depends on when an answer came,
//! but for calls without one: these may have been carried out at any time from their begin until [`Bounds::late`] after their end,
//! and while that is so nothing is asserted of what they could have changed.

mod lives;
mod messages;
mod reads;
#[cfg(test)]
mod tests;
mod users;
mod watches;

use crate::history::At;
use crate::history::History;

/// How long things may take, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// After the end of a call without an answer: it waits in a node that stands still, or behind a cut way.
    pub late: At,
    /// Until no node takes the routes of a life for live of which somebody was told that it is over.
    pub over: At,
    /// Until a gateway that has died without a word is known to be dead, if nothing is broken.
    pub silent: At,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub rule: &'static str,
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)
    }
}

pub fn check(history: &History, bounds: &Bounds) -> Vec<Violation> {
    let mut violations: Vec<Violation> =
        history.errors.iter().map(|error| Violation { rule: "an error nobody may get", what: error.clone() }).collect();
    let users = users::Users::of(history, bounds);
    violations.extend(users.complaints());
    violations.extend(reads::complaints(history));
    violations.extend(lives::complaints(history, bounds));
    violations.extend(messages::complaints(history, &users));
    violations.extend(watches::complaints(history));
    violations
}
