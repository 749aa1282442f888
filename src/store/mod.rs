//! The outside: SQL, the only truth. Statements stand here and nowhere else; rows become domain values before they leave.

pub mod audit;
pub mod bus;
pub mod census;
pub mod cluster;
pub mod codec;
mod column;
pub mod connection;
pub mod database;
mod database_file;
pub mod digests;
pub mod drains;
pub mod ended_lives;
pub mod history;
pub mod inbox;
pub mod jobs;
pub mod keys;
pub mod kick;
mod life_row;
pub mod link;
pub mod lives;
pub mod online;
pub mod open_error;
pub mod outbox;
pub mod readers;
mod schema;
pub mod server;
pub mod shared;
mod sql_error;
mod statement;
mod user_row;
pub mod users;
mod way;

#[cfg(test)]
mod contract;
