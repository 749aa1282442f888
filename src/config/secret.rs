//! Passwords, and URLs that hold one: they show neither in `Debug` nor in `Display`.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;
use serde::Serialize;
use serde::Serializer;

const MASK: &str = "***";

/// A string that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

/// A URL whose password is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Url(String);

impl Secret {
    /// The string itself: for the server that asks for it, for nobody's eyes.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// What a file with a secret says; one end of line at its end does not belong to it.
///
/// # Errors
/// The file cannot be read, with its name.
pub fn read(path: &Path) -> io::Result<String> {
    let text = fs::read_to_string(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    Ok(text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line)).to_owned())
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

impl Url {
    /// The URL with its password: for connecting, not for logs.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Url {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Keys of a URL's query that hold no secret.
const SHOWN_KEYS: [&str; 8] =
    ["ssl-mode", "sslmode", "charset", "collation", "statement-cache-capacity", "mode", "vfs", "protocol"];
/// Ports that are shown although no login stands before them. Another number may be a password whose server was forgotten; of a
/// Redis, which is seldom given a user, only where no host stands.
const USUAL_PORTS: [&str; 2] = ["3306", "6379"];

/// Shows what cannot be a password: of a login the user, of a server its name and port, of a query known keys.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, rest) = self.0.split_once("://").map_or(("", &*self.0), |(scheme, rest)| (scheme, rest));
        if !scheme.is_empty() {
            write!(f, "{scheme}://")?;
        }
        let (rest, query) = match rest.rfind('?').filter(|at| !rest[*at..].contains('@')) {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        match rest.rsplit_once('@') {
            _ if is_file(scheme, rest) => f.write_str(rest)?,
            Some((login, server)) => {
                let (user, mask) = login.split_once(':').map_or((login, ""), |(user, _)| (user, ":***"));
                let servers = server.split(',').map(|server| without_password(server, |port| port.parse::<u16>().is_ok()));
                write!(f, "{user}{mask}@{}", servers.collect::<Vec<_>>().join(","))?;
            }
            None => {
                let may_be_port =
                    |port: &str| scheme.starts_with("redis") && !rest.starts_with(':') && port.parse::<u16>().is_ok();
                f.write_str(&without_password(rest, |port| USUAL_PORTS.contains(&port) || may_be_port(port)))?;
            }
        }
        match query {
            Some(query) if is_shown(query) => write!(f, "?{query}"),
            Some(_) => write!(f, "?{MASK}"),
            None => Ok(()),
        }
    }
}

fn is_file(scheme: &str, rest: &str) -> bool {
    scheme == "sqlite" || rest.starts_with("sqlite:") || scheme.ends_with("unix")
}

fn is_shown(query: &str) -> bool {
    query.split('&').all(|pair| SHOWN_KEYS.contains(&pair.split('=').next().unwrap_or_default()))
}

/// `HOST:PORT/PATH`; or, if that is no such port, without what follows the host.
fn without_password(server: &str, is_port: impl Fn(&str) -> bool) -> String {
    let (authority, path) = server.split_once('/').map_or((server, String::new()), |(server, path)| (server, format!("/{path}")));
    let host_end = if authority.starts_with('[') { authority.find(']').map_or(0, |end| end + 1) } else { 0 };
    match authority[host_end..].split_once(':') {
        Some((_, port)) if is_port(port) => format!("{authority}{path}"),
        Some((host, _)) => format!("{}{host}:{MASK}", &authority[..host_end]),
        None => format!("{authority}{path}"),
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Serialize for Url {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_hides_its_password() {
        let check = |url: &str, shown: &str| assert_eq!(Url::from(url.to_owned()).to_string(), shown);
        check("sqlite://im-presence.db", "sqlite://im-presence.db");
        check("sqlite::memory:", "sqlite::memory:");
        check("mysql://app@db/im", "mysql://app@db/im");
        check("mysql://app:s3cret@db:3306/im?ssl-mode=required", "mysql://app:***@db:3306/im?ssl-mode=required");
        check("mysql://app:p@ss:/w?rd@db/im", "mysql://app:***@db/im");
        check("redis://:s3cret@cache", "redis://:***@cache");
        check("redis+unix:///run/redis.sock?db=1&pass=s3cret", "redis+unix:///run/redis.sock?***");
        check("redis://cache:6379?token=s3cret", "redis://cache:6379?***");
        check("app:s3cret@db", "app:***@db");
        check("mysql://app:s3cret", "mysql://app:***");
        check("mysql://app:s3cret/im", "mysql://app:***");
        check("redis://:s3cret", "redis://:***");
        check("mysql://app:12345", "mysql://app:***");
        check("redis://:12345", "redis://:***");
        check("redis://cache:6380/1", "redis://cache:6380/1");
        check("mysql://app:12345/im", "mysql://app:***");
        check("mysql://app:s3cret:3306/im", "mysql://app:***");
        check("mysql://app:s3cret?ssl-mode=required", "mysql://app:***?ssl-mode=required");
        check("mysql://app@s3cret:x:3306/im", "mysql://app@s3cret:***");
        check("mysql://db:3306/im", "mysql://db:3306/im");
        check("redis://cache:6379/1", "redis://cache:6379/1");
        check("redis://[::1]:6379", "redis://[::1]:6379");
        check("redis://[::1]", "redis://[::1]");
    }
}
