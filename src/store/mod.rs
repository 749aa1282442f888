//! The outside: SQL, the only truth. Statements stand here and nowhere else; rows become domain values before they leave.

pub mod address;
pub mod audit;
pub mod batch;
pub mod bus;
pub mod census;
mod client;
pub mod cluster;
pub mod codec;
mod column;
pub mod connection;
pub mod database;
mod database_file;
pub mod digests;
pub mod drains;
pub mod ended_lives;
pub mod examination;
pub mod history;
pub mod inbox;
pub mod jobs;
pub mod keys;
pub mod kick;
mod life_row;
pub mod link;
pub mod link_error;
pub mod lives;
pub mod online;
pub mod open_error;
pub mod outbox;
pub mod posts;
pub mod readers;
mod schema;
mod sentinels;
pub mod server;
pub mod servers;
mod several;
pub mod shared;
pub mod slot_map;
mod slots;
mod sql_error;
mod statement;
mod user_row;
pub mod users;
mod way;

#[cfg(test)]
mod contract;
