//! The features of im-presence, shown on real processes: nodes, MariaDB, Redis, and proxies that fail on demand.

mod acks;
mod bad_input;
mod bind;
mod client;
mod container;
mod contention;
mod crash;
mod deaths;
mod deliver;
mod doubt;
mod gateways;
mod harness;
mod hints;
mod inbox;
mod kicks;
mod neighbours;
mod order;
mod redis_faults;
mod running;
mod shared;
mod sql_faults;
mod stale_reads;
mod streams;
mod tidy;
mod two_nodes;
mod ws_gateways;
