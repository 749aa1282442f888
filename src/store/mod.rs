//! The outside: SQL, the only truth. Statements stand here and nowhere else; rows become domain values before they leave.

pub mod bus;
pub mod cluster;
pub mod codec;
pub mod connection;
pub mod database;
mod database_file;
pub mod ended_lives;
pub mod inbox;
pub mod jobs;
pub mod keys;
pub mod link;
pub mod lives;
pub mod outbox;
mod schema;
pub mod shared;
mod sql_error;
mod statement;
pub mod users;

#[cfg(test)]
mod contract;
