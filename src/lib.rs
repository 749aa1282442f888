//! im-presence knows which user's device sits on which gateway. This is the map of its source.
//!
//! Floors, each importing only those below it (a test checks it):
//!
//! | module | what |
//! |---|---|
//! | [`app`] | puts the daemon together; the only place that connects, listens and spawns |
//! | [`api`] | protocols: gRPC for gateways and services, HTTP for operators; translates and decides nothing |
//! | [`engine`] | the product, in rooms that import downwards too: `overview`, `gateways`, `messages`, `presence`, `write`, `read` |
//! | [`store`] | the outside: SQL, Redis as a cache (`shared`) and as a bus (`bus`); every name in Redis stands in `keys` |
//! | [`domain`] | the rules, pure: a user's record and the one function that changes it, what is shown of it, device policy, lives of gateways and doubt about them, where users should go, the frames of a stream, the inbox |
//! | [`answers`], [`backoff`], [`clock`], [`config`], [`error`], [`memory`], [`metrics`], [`security`], [`telemetry`] | leaves that any floor but `domain` may use |
//!
//! [`client`] is a library for gateways and message services, a crate of its own as [`pb`] is, [`ctl`] a plain client of the gRPC API, [`health`] one of the admin port, [`new_token`] makes a credential, [`pages`] what packages ship, [`command_line`] chooses among them; [`pb`] the wire types, which `api` turns into domain types at the door.
//!
//! # The two ideas everything rests on
//!
//! **A route names a life of a gateway**, by its epoch: a number issued by SQL and never reused. A route is live if its life
//! is. Every node keeps the small table of lives in memory, so one row decides about all users of a gateway. "This life is
//! over" never changes back; it may be believed from anywhere, late or twice.
//!
//! **One write path, group-committed.** Every change of a user is an event in one lane (by hash of the user). A lane takes all
//! that is queued as one batch, commits it in one transaction on its own connection, and answers. So the order of a user's
//! changes is the order of their versions, policies cannot be raced, and a commit is shared by hundreds of users.
//!
//! # What is true where
//!
//! | tier | holds | is it the truth |
//! |---|---|---|
//! | SQL | users, routes, lives, inbox, outbox | the only one |
//! | L2 (Redis, optional) | records with store, generation and version, and the two keys that other services read | no; `engine::read::l2` says when it may be believed |
//! | L1 (memory, per node) | records of hot users | no; see `engine::read::cache` for the rule that no reader is ever taken back in time |
//! | lives (memory, per node) | copy of the table, with the time since it is known | no |
//!
//! # Words
//!
//! **gateway** holds client sockets · **node** is one process of this daemon · **device** one login of a user · **route** binds
//! a device to a life of a gateway · **life**, **epoch**, **lease**, **heartbeat**: a gateway's right to be believed alive ·
//! **version** numbers the changes of a user · **floor** the version below which nothing may be answered · **lane** one queue of
//! the write path · **outbox** what a committed batch still has to show to the outside · **generation** raised when caches may
//! hold what SQL does not · **stream** carries everything between an attached gateway and a node · **inbox** messages stored for
//! a user until a device has acknowledged them · **hold** a time in which no gateway is declared dead ·
//! **wish** is how a user wants to be seen · **watch** a stream that is told what a set of users is shown as.

pub mod answers;
pub mod api;
pub mod app;
pub mod backoff;
pub mod clock;
pub mod command_line;
pub mod config;
pub mod ctl;
pub mod domain;
pub mod engine;
pub mod error;
pub mod health;
pub mod memory;
pub mod metrics;
pub mod new_token;
pub mod pages;
pub mod security;
pub mod store;
pub mod telemetry;

pub use im_presence_client as client;
pub use im_presence_proto as pb;
