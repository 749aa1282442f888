//! What certificates say: whose they are, and until when. Whether that is true is for rustls to verify.

use std::fmt;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ring::digest;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use crate::metrics::Metrics;
use crate::security::files::Reloaded;
use crate::security::files::Unusable;

/// Bytes of a fingerprint that are shown: enough to compare by eye.
const SHOWN_BYTES: usize = 8;

/// The certificates of a PEM file, at least one.
pub fn chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Unusable> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    // What the parser says shows the line that it stumbled over, which may be of a key.
    let found = found.map_err(|_| Unusable("is no PEM".to_owned()))?;
    if found.is_empty() { Err(Unusable("there is no certificate in it".to_owned())) } else { Ok(found) }
}

/// The earliest end of certificates that somebody else uses, and reads by himself.
pub struct Ends(u64);

/// Shows when the certificates of a file end.
///
/// # Errors
/// There are none in it.
pub fn watch(
    r#use: &'static str,
    which: &'static str,
    file: PathBuf,
    metrics: Arc<Metrics>,
) -> Result<Arc<Reloaded<Ends>>, Unusable> {
    Reloaded::new(r#use, vec![file], move |contents| {
        let ends = chain(&contents.concat())?.iter().map(not_after).collect::<Result<Vec<_>, _>>()?;
        let earliest = ends.into_iter().min().unwrap_or_default();
        metrics.security.certificate_ends(r#use, which, earliest);
        Ok(Ends(earliest))
    })
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "certificates until {} (Unix seconds)", self.0)
    }
}

/// The end of a certificate's validity, in Unix seconds.
pub fn not_after(der: &CertificateDer<'_>) -> Result<u64, Unusable> {
    Ok(parse(der)?.tbs_certificate.validity.not_after.to_unix_duration().as_secs())
}

/// Names in the extension SubjectAltName: a URI as it is, a DNS name as `dns:NAME`. The common name does not count (RFC 9525).
pub fn names(der: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = parse(der) else { return Vec::new() };
    let Ok(Some((_, names))) = certificate.tbs_certificate.get::<SubjectAltName>() else { return Vec::new() };
    let text = |name: GeneralName| match name {
        GeneralName::UniformResourceIdentifier(uri) => Some(uri.to_string()),
        GeneralName::DnsName(name) => Some(format!("dns:{}", name.as_str().to_ascii_lowercase())),
        _ => None,
    };
    names.0.into_iter().filter_map(text).collect()
}

/// The beginning of the certificate's SHA-256, for log lines.
pub fn fingerprint(der: &CertificateDer<'_>) -> String {
    let digest = digest::digest(&digest::SHA256, der);
    digest.as_ref()[..SHOWN_BYTES].iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}

fn parse(der: &CertificateDer<'_>) -> Result<Certificate, Unusable> {
    Certificate::from_der(der).map_err(|error| Unusable(format!("no certificate: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As secret stores like to make them: the line ends are lost, and the parser takes all of it for a label.
    #[test]
    fn nothing_of_a_file_shows_in_what_is_wrong_with_it() {
        for text in ["-----BEGIN PRIVATE KEY-----s3cret-----END PRIVATE KEY-----", "-----BEGIN s3cret\n", "s3cret"] {
            let why = chain(text.as_bytes()).expect_err("no certificate").to_string();
            let bytes = b"s3cret".map(|byte| byte.to_string()).join(", ");
            assert!(!why.contains("s3cret") && !why.contains(&bytes), "{why}");
        }
    }
}
