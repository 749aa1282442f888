//! TLS of a listener, from PEM files.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::UnixTime;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio_rustls::TlsAcceptor;

use crate::clock;
use crate::metrics::Metrics;
use crate::security::certificate;
use crate::security::files::Reloaded;
use crate::security::files::Unusable;

/// Where a listener's certificates are.
#[derive(Clone, Debug)]
pub struct Files {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// CAs of clients' certificates: with it, clients are asked for one.
    pub client_ca: Option<PathBuf>,
    /// Clients without a certificate are turned away.
    pub require_client_cert: bool,
    /// What may be spoken, best first.
    pub protocols: &'static [&'static [u8]],
}

/// What a listener shows and demands now.
pub struct ServerTls {
    acceptor: TlsAcceptor,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    shown: String,
    /// Of the listener's own certificate, and the earliest one of its clients' CAs, in Unix seconds.
    not_after: u64,
    ca_not_after: Option<u64>,
}

/// # Errors
/// A file cannot be read, or they do not fit together.
pub fn load(what: &'static str, files: Files, metrics: Arc<Metrics>) -> Result<Arc<Reloaded<ServerTls>>, Unusable> {
    let paths = [Some(files.cert.clone()), Some(files.key.clone()), files.client_ca.clone()].into_iter().flatten().collect();
    Reloaded::new(what, paths, move |contents| make(&files, contents).inspect(|made| made.show_ends(what, &metrics)))
}

fn make(files: &Files, contents: &[Vec<u8>]) -> Result<ServerTls, Unusable> {
    let failed = |error: &dyn fmt::Display| Unusable(error.to_string());
    let [cert, key, client_ca @ ..] = contents else { return Err(Unusable("certificate and key are needed".to_owned())) };
    let chain = certificate::chain(cert).map_err(|error| Unusable(format!("{}: {error}", files.cert.display())))?;
    let not_after = certificate::not_after(&chain[0])?;
    if not_after <= clock::unix_s() {
        return Err(Unusable(format!("{}: the certificate has expired", files.cert.display())));
    }
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|_| Unusable(format!("{}: there is no private key in it, as PEM", files.key.display())))?;
    let cas = client_ca.first().map(|pem| certificate::chain(pem)).transpose()?;
    let verifier = cas.as_ref().map(|cas| verifier(cas, files.require_client_cert)).transpose()?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| failed(&error))?;
    let builder = match &verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier.clone()),
        None => builder.with_no_client_auth(),
    };
    let shown =
        format!("certificate {}, {} CAs of clients", certificate::fingerprint(&chain[0]), cas.as_ref().map_or(0, Vec::len));
    let mut config = builder.with_single_cert(chain, key).map_err(|error| failed(&error))?;
    config.alpn_protocols = files.protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let ca_not_after = cas.iter().flatten().filter_map(|ca| certificate::not_after(ca).ok()).min();
    Ok(ServerTls { acceptor: TlsAcceptor::from(Arc::new(config)), verifier, shown, not_after, ca_not_after })
}

fn verifier(cas: &[CertificateDer<'static>], is_required: bool) -> Result<Arc<dyn ClientCertVerifier>, Unusable> {
    let mut roots = RootCertStore::empty();
    for ca in cas {
        roots.add(ca.clone()).map_err(|error| Unusable(format!("a CA of clients: {error}")))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let builder = if is_required { builder } else { builder.allow_unauthenticated() };
    builder.build().map_err(|error| Unusable(error.to_string()))
}

impl ServerTls {
    fn show_ends(&self, what: &'static str, metrics: &Metrics) {
        metrics.security.certificate_ends(what, "leaf", self.not_after);
        if let Some(ca) = self.ca_not_after {
            metrics.security.certificate_ends(what, "ca", ca);
        }
    }

    pub fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.clone()
    }

    /// Whether a client that showed this certificate would be let in now.
    pub fn trusts(&self, chain: &[CertificateDer<'static>]) -> bool {
        let (Some(verifier), Some((leaf, intermediates))) = (&self.verifier, chain.split_first()) else { return false };
        verifier.verify_client_cert(leaf, intermediates, UnixTime::now()).is_ok()
    }
}

/// For the log: nothing that has to be kept secret.
impl fmt::Display for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}
