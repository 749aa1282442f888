//! The outside: SQL, the only truth. Statements stand here and nowhere else; rows become domain values before they leave.

pub mod codec;
pub mod connection;
pub mod database;
pub mod jobs;
pub mod lives;
pub mod outbox;
mod statement;
pub mod users;

#[cfg(test)]
mod contract;
