//! What users are shown as: how they want to be seen ([`statuses`]), who is told of it ([`watches`], by a [`teller`]), and what is
//! written down of the past ([`history`]), and why ([`explaining`]). And for operators: who is [`online`], how many ([`census`]), and whom
//! another device policy would cost one ([`preview`]).

pub mod census;
pub mod explaining;
pub mod history;
mod interest;
pub mod online;
pub mod preview;
pub mod pruning;
mod set;
pub mod shown;
pub mod status_ends;
pub mod statuses;
pub mod teller;
mod watcher;
pub mod watches;
