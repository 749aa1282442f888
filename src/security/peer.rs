//! One connection, and who is at its other end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::OnceLock;
use std::time::Duration;
use std::time::Instant;

use rustls::pki_types::CertificateDer;
use tonic::codegen::http::HeaderValue;

use crate::domain::caller::Caller;
use crate::security::allowance::Allowance;
use crate::security::files::Reloaded;
use crate::security::server::ServerTls;

/// How long a client has to hear why it is turned away.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The other end of a connection.
pub struct Peer {
    pub addr: SocketAddr,
    /// What the client showed in the handshake, and where that was verified.
    pub(super) shown: Option<Shown>,
    /// Who it was found to be last. One connection has one header, as a rule.
    pub(super) decided: Mutex<Option<Decided>>,
    /// Since when its certificate is not good any more.
    pub(super) turned_away: OnceLock<Instant>,
}

pub(super) struct Shown {
    pub chain: Vec<CertificateDer<'static>>,
    pub listener: Arc<Reloaded<ServerTls>>,
}

/// Who is at the other end, as far as is known.
#[derive(Clone)]
pub struct Decided {
    /// Of what was read again until then.
    pub(super) generation: u64,
    pub(super) header: Option<HeaderValue>,
    pub caller: Arc<Caller>,
    pub allowance: Arc<Allowance>,
}

impl Peer {
    /// A connection in plaintext.
    pub fn plain(addr: SocketAddr) -> Arc<Self> {
        Arc::new(Self { addr, shown: None, decided: Mutex::default(), turned_away: OnceLock::new() })
    }

    /// A connection with TLS; `chain` is empty if the client showed no certificate.
    pub fn encrypted(addr: SocketAddr, chain: &[CertificateDer<'_>], listener: Arc<Reloaded<ServerTls>>) -> Arc<Self> {
        let chain: Vec<_> = chain.iter().map(|one| one.clone().into_owned()).collect();
        let shown = (!chain.is_empty()).then_some(Shown { chain, listener });
        Arc::new(Self { addr, shown, decided: Mutex::default(), turned_away: OnceLock::new() })
    }

    /// Whether the connection is over: its client has been told that its certificate is not good any more, and would try that
    /// one for ever if it were not made to connect anew.
    pub fn is_over(&self) -> bool {
        self.turned_away.get().is_some_and(|since| since.elapsed() >= LAST_WORDS)
    }
}
