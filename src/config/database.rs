//! Where the database is, and how it is reached.

use std::fmt;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use percent_encoding::NON_ALPHANUMERIC;
use percent_encoding::utf8_percent_encode;
use serde::Deserialize;
use serde::Serialize;

use super::forms::millis;
use super::forms::or_empty;
use super::forms::seconds;
use super::secret;
use super::secret::Secret;
use super::secret::Url;

/// The database: by `url`, or by `host` and what follows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Begins with `sqlite:`, `mysql:` or `mariadb:`; empty if `host` is given.
    pub url: Url,
    #[serde(with = "or_empty")]
    pub url_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub host: Option<String>,
    pub port: u16,
    pub user: String,
    #[serde(with = "or_empty")]
    pub password: Option<Secret>,
    #[serde(with = "or_empty")]
    pub password_file: Option<PathBuf>,
    pub database: String,
    pub tls: StoreTls,
    #[serde(with = "or_empty")]
    pub ca_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub cert_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub key_file: Option<PathBuf>,
    /// For reading.
    pub connections: u32,
    /// SQLite uses 1, whatever is said here.
    pub lanes: usize,
    /// Events per lane.
    pub queue: usize,
    #[serde(with = "millis")]
    pub timeout: Duration,
    #[serde(with = "millis")]
    pub max_event_age: Duration,
    /// Zero: never.
    #[serde(with = "seconds")]
    pub forget_users_after: Duration,
}

/// Whether the connection to the database is encrypted, and whether the server has to prove who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreTls {
    Disabled,
    /// If the server can, without proof; with a CA as `VerifyFull`.
    Prefer,
    /// Without proof.
    Require,
    /// A certificate of the CA.
    VerifyCa,
    /// A certificate of the CA for the server's name.
    VerifyFull,
}

impl Store {
    /// Where to connect, as the driver reads it. Files with secrets are read now, so what is new in them counts from the next
    /// connection on.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn connect_url(&self) -> io::Result<String> {
        let mut url = match &self.host {
            Some(host) => self.server_url(host)?,
            None => self.given_url()?,
        };
        if !url.starts_with("sqlite:") {
            let files = [("ssl-ca", &self.ca_file), ("ssl-cert", &self.cert_file), ("ssl-key", &self.key_file)];
            let files = files.into_iter().filter_map(|(key, file)| Some((key, encoded(file.as_deref()?.to_str()?))));
            for (key, value) in [("ssl-mode", self.tls_mode().to_owned())].into_iter().chain(files) {
                url.push(if url.contains('?') { '&' } else { '?' });
                url.push_str(&format!("{key}={value}"));
            }
        }
        Ok(url)
    }

    /// The URL as it was given, here or in a file.
    pub(super) fn given_url(&self) -> io::Result<String> {
        self.url_file.as_deref().map_or_else(|| Ok(self.url.expose().to_owned()), secret::read)
    }

    fn server_url(&self, host: &str) -> io::Result<String> {
        let password = match (&self.password, &self.password_file) {
            (Some(password), _) => Some(password.expose().to_owned()),
            (None, Some(file)) => Some(secret::read(file)?),
            (None, None) => None,
        };
        let password = password.map_or(String::new(), |password| format!(":{}", encoded(&password)));
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
        Ok(format!("mysql://{}{password}@{host}:{}/{}", encoded(&self.user), self.port, encoded(&self.database)))
    }

    /// As the driver calls it.
    fn tls_mode(&self) -> &'static str {
        match self.tls {
            StoreTls::Disabled => "disabled",
            StoreTls::Prefer if self.ca_file.is_none() => "preferred",
            StoreTls::Require => "required",
            StoreTls::VerifyCa => "verify_ca",
            StoreTls::Prefer | StoreTls::VerifyFull => "verify_identity",
        }
    }

    /// Whether a server that cannot prove who it is would be refused.
    pub fn verifies_server(&self) -> bool {
        self.tls_mode().starts_with("verify")
    }
}

/// Where it is, without secrets.
impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, &self.url_file) {
            (Some(host), _) => write!(f, "mysql://{}@{host}:{}/{}", self.user, self.port, self.database),
            (None, Some(file)) => write!(f, "the URL in {}", Path::display(file)),
            (None, None) => self.url.fmt(f),
        }
    }
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}
