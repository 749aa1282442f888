//! The product, in six rooms. Each imports only those above it in this list (a test checks it):
//!
//! | room | what |
//! |---|---|
//! | [`read`] | where is a user: memory, then Redis, then SQL; and this node's copy of the table of lives |
//! | [`write`] | change a user: one lane for each user, one transaction for many changes, and what the outside is shown of it |
//! | [`presence`] | what users are shown as: status, watches, history |
//! | [`messages`] | reach a user: streams, other nodes and channels; deliveries, acknowledgements, the inbox |
//! | [`gateways`] | who lives: registration, heartbeats, deaths, and the routes that deaths leave behind |
//! | [`overview`] | see the whole: what SQL says of all nodes, what has happened, what is wrong |
//!
//! What a lower room has to tell an upper one goes through what it is given when the node is assembled:
//! [`write::publisher::TellGateways`] for kicks, [`write::inbox_queue::InboxQueue`] for stored messages, [`read::feed::Feed`] for changes that watchers may want to hear of.

pub mod gateways;
pub mod messages;
pub mod overview;
pub mod presence;
pub mod read;
pub mod write;
