//! Certificates of a test's own CA, tokens, and clients that show them.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use im_presence::client::security::Link;
use im_presence::client::security::Security;
use im_presence::clock::unix_s;
use im_presence::security::tokens;
use rcgen::BasicConstraints;
use rcgen::CertificateParams;
use rcgen::IsCa;
use rcgen::Issuer;
use rcgen::KeyPair;
use rcgen::SanType;
use time::OffsetDateTime;

use crate::harness::mariadb::scratch;

/// Roles of the certificates that tests issue, for `auth.mtls`.
pub const ROLES: &str = "[{ san = \"spiffe://im/gateway/{gateway}\", role = \"gateway\" }, \
    { san = \"spiffe://im/service\", role = \"service\" }, { san = \"spiffe://im/node\", role = \"node\" }, \
    { san = \"spiffe://im/operator\", role = \"operator\" }]";
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A directory with what a test's certificates need.
pub struct Pki {
    directory: PathBuf,
}

/// Signs certificates.
pub struct Ca {
    directory: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub pem: String,
    pub file: PathBuf,
}

/// A certificate and its key.
#[derive(Clone, Debug)]
pub struct Pair {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Pki {
    pub fn new() -> Self {
        let directory = scratch("pki");
        fs::create_dir_all(&directory).expect("make a directory");
        Self { directory }
    }

    pub fn ca(&self, name: &str) -> Ca {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a CA").pem();
        let file = self.write(&format!("{name}.pem"), &pem);
        Ca { directory: self.directory.clone(), issuer: Issuer::new(params, key), pem, file }
    }

    /// Writes a file, as those do who renew certificates and tokens: another one takes its place.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        write(&self.directory, name, content)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Pki {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}

fn write(directory: &Path, name: &str, content: &str) -> PathBuf {
    let (path, new) = (directory.join(name), directory.join(format!("{name}.new")));
    fs::write(&new, content).and_then(|()| fs::rename(&new, &path)).expect("write a file");
    path
}

impl Ca {
    /// A certificate for these names: hosts, addresses, or URIs.
    pub fn issue(&self, name: &str, names: &[&str]) -> Pair {
        self.issue_until(name, names, None)
    }

    /// The same, for so many days from now.
    pub fn issue_for_days(&self, name: &str, names: &[&str], days: u32) -> Pair {
        let mut params = CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()).expect("names");
        let end = unix_s() + 86_400 * u64::from(days);
        params.not_after = OffsetDateTime::from_unix_timestamp(end.cast_signed()).expect("a time");
        self.sign(name, params)
    }

    /// The same, whose end is at the beginning of this year.
    pub fn issue_until(&self, name: &str, names: &[&str], year: Option<i32>) -> Pair {
        let (uris, hosts): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.contains("://"));
        let mut params = CertificateParams::new(hosts.into_iter().map(str::to_owned).collect::<Vec<_>>()).expect("names");
        let uris = uris.into_iter().map(|uri| SanType::URI(uri.try_into().expect("ASCII")));
        params.subject_alt_names.extend(uris);
        if let Some(year) = year {
            params.not_before = rcgen::date_time_ymd(2000, 1, 1);
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
        }
        self.sign(name, params)
    }

    fn sign(&self, name: &str, params: CertificateParams) -> Pair {
        let key = KeyPair::generate().expect("a key");
        let pem = params.signed_by(&key, &self.issuer).expect("a certificate").pem();
        let (cert, key) = (write(&self.directory, &format!("{name}.crt"), &pem), key.serialize_pem());
        Pair { cert, key: write(&self.directory, &format!("{name}.key"), &key) }
    }
}

/// A token and its entry for the tokens file.
pub fn token(name: &str, role: &str, more: &str) -> (String, String) {
    let token = tokens::generate().expect("random numbers");
    let entry = format!("[[token]]\nname = \"{name}\"\nrole = \"{role}\"\nsha256 = \"{}\"\n{more}\n", tokens::to_hex(&token));
    (token, entry)
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// What a client shows.
pub fn shows(ca: &Ca, pair: Option<&Pair>, token_file: Option<&Path>) -> Security {
    Security {
        ca_file: Some(ca.file.clone()),
        cert_file: pair.map(|pair| pair.cert.clone()),
        key_file: pair.map(|pair| pair.key.clone()),
        server_name: None,
        token_file: token_file.map(Path::to_owned),
    }
}

/// Shows a token only.
pub fn bears(token_file: &Path) -> Security {
    Security { token_file: Some(token_file.to_owned()), ..Security::default() }
}

pub fn link(security: &Security, addr: impl ToString) -> Link {
    security.link(&addr.to_string(), CONNECT_LIMIT).expect("an address")
}
