//! The features of im-presence, shown on real processes: nodes, MariaDB, and a proxy between them that fails on demand.

mod bad_input;
mod bind;
mod container;
mod contention;
mod crash;
mod harness;
mod running;
mod sql_faults;
mod stale_reads;
mod tidy;
mod two_nodes;
