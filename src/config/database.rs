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

/// The database: by `url`, or by `host` and what follows it. Either may name several servers, with commas between them: the one
/// that takes writes is found.
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
    /// Where to connect, as the driver reads it: one for each server, in their order. Files with secrets are read now, so what
    /// is new in them counts from the next connection on.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn connect_urls(&self) -> io::Result<Vec<String>> {
        let url = match &self.host {
            Some(hosts) => self.server_url(hosts)?,
            None => self.given_url()?,
        };
        if url.starts_with("sqlite:") {
            return Ok(vec![url]);
        }
        let files = [("ssl-ca", &self.ca_file), ("ssl-cert", &self.cert_file), ("ssl-key", &self.key_file)];
        let files = files.into_iter().filter_map(|(key, file)| Some((key, encoded(file.as_deref()?.to_str()?))));
        let settings: Vec<_> = [("ssl-mode", self.tls_mode().to_owned())].into_iter().chain(files).collect();
        let mut urls = each_server(&url);
        for url in &mut urls {
            for (key, value) in &settings {
                url.push(if url.contains('?') { '&' } else { '?' });
                url.push_str(&format!("{key}={value}"));
            }
        }
        Ok(urls)
    }

    /// The URL as it was given, here or in a file.
    pub(super) fn given_url(&self) -> io::Result<String> {
        self.url_file.as_deref().map_or_else(|| Ok(self.url.expose().to_owned()), secret::read)
    }

    fn server_url(&self, hosts: &str) -> io::Result<String> {
        let password = match (&self.password, &self.password_file) {
            (Some(password), _) => Some(password.expose().to_owned()),
            (None, Some(file)) => Some(secret::read(file)?),
            (None, None) => None,
        };
        let password = password.map_or(String::new(), |password| format!(":{}", encoded(&password)));
        let servers: Vec<String> = hosts.split(',').map(|host| with_port(host.trim(), self.port)).collect();
        Ok(format!("mysql://{}{password}@{}/{}", encoded(&self.user), servers.join(","), encoded(&self.database)))
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
            (Some(hosts), _) => {
                let servers: Vec<String> = hosts.split(',').map(|host| with_port(host.trim(), self.port)).collect();
                write!(f, "mysql://{}@{}/{}", self.user, servers.join(","), self.database)
            }
            (None, Some(file)) => write!(f, "the URL in {}", Path::display(file)),
            (None, None) => self.url.fmt(f),
        }
    }
}

/// `HOST` or `HOST:PORT`; an IPv6 address with a port of its own is in brackets.
fn with_port(host: &str, port: u16) -> String {
    match host.bytes().filter(|byte| *byte == b':').count() {
        0 => format!("{host}:{port}"),
        1 => host.to_owned(),
        _ if !host.starts_with('[') => format!("[{host}]:{port}"),
        _ if host.ends_with(']') => format!("{host}:{port}"),
        _ => host.to_owned(),
    }
}

/// `mysql://USER@ONE,TWO/DATABASE`, once for each.
fn each_server(url: &str) -> Vec<String> {
    if url.contains("?socket=") {
        return vec![url.to_owned()];
    }
    let after_user = url.rfind('@').map_or_else(|| url.find("://").map_or(0, |at| at + 3), |at| at + 1);
    let (head, rest) = url.split_at(after_user);
    let (servers, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    servers.split(',').map(|server| format!("{head}{}{tail}", server.trim())).collect()
}

/// The server that a URL leads to, for people: `HOST:PORT`.
pub fn server_of(url: &str) -> String {
    let shown = Url::from(url.to_owned()).to_string(); // without what may be a password
    let rest = shown.rsplit_once('@').or(shown.split_once("://")).map_or(&*shown, |(_, rest)| rest);
    rest.split(['/', '?']).next().unwrap_or_default().to_owned()
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, want: &[&str]) {
        assert_eq!(each_server(url), want, "{url}");
    }

    #[test]
    fn a_url_may_name_several_servers() {
        check("mysql://u:p@db-1:3306/im", &["mysql://u:p@db-1:3306/im"]);
        check("mysql://u:p,w@db-1,db-2:3307/im", &["mysql://u:p,w@db-1/im", "mysql://u:p,w@db-2:3307/im"]);
        check("mysql://u@db-1/im?socket=/run/a@b,c", &["mysql://u@db-1/im?socket=/run/a@b,c"]);
        check("mysql://db-1, [::1]:3306", &["mysql://db-1", "mysql://[::1]:3306"]);
        assert_eq!(server_of("mysql://u:p@db-2:3307/im?ssl-mode=disabled"), "db-2:3307");
        assert_eq!(server_of("mysql://secret:secret/im"), "secret:***");
        assert_eq!(server_of("mysql://[::1]:3306/im"), "[::1]:3306");
    }

    #[test]
    fn a_host_has_the_common_port_unless_it_has_one_of_its_own() {
        for (host, want) in [
            ("db-1", "db-1:3306"),
            ("db-1:3307", "db-1:3307"),
            ("::1", "[::1]:3306"),
            ("[::1]", "[::1]:3306"),
            ("[::1]:3307", "[::1]:3307"),
        ] {
            assert_eq!(with_port(host, 3306), want);
        }
    }
}
