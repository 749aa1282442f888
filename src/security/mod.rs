//! Who may come in, and how that is read: TLS of the listeners, credentials, and the files of both, which are read again while
//! the node runs.
//!
//! | file | what |
//! |---|---|
//! | [`files`] | reads files again by content, and keeps what was good |
//! | [`certificate`] | what a certificate says: names, end |
//! | [`server`] | a listener's TLS |
//! | [`tokens`] | the tokens file, and how a token is made |
//! | [`peer`] | one connection, and who is at its other end |
//! | [`san`] | which role a certificate's name stands for |
//! | [`callers`] | from a credential to a caller |
//! | [`allowance`] | what one caller may use |
//! | [`audit`] | who did what, and who was denied what |
//!
//! The place of a third kind of credential (a JWT, say) is [`callers::Callers::decide`].

pub mod allowance;
pub mod audit;
pub mod callers;
pub mod certificate;
pub mod files;
pub mod peer;
pub mod san;
pub mod server;
pub mod tokens;
