//! Where is a user? [`directory`] answers from memory ([`cache`]), then Redis ([`l2`]), then SQL ([`loader`]).
//! [`inspection`] looks at each of them for operators.

pub mod audit_log;
pub mod cache;
pub mod directory;
mod doorkeeper;
pub mod feed;
pub mod hints;
pub mod inspection;
pub mod l2;
pub mod lives;
pub mod loader;
pub mod loads;
mod outgoing;
pub mod warm_up;
