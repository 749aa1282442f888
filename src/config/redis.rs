//! Where the Redis servers are, for both uses.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::Serialize;

use super::forms::millis;
use super::forms::or_empty;
use super::rules::Faults;
use super::rules::both_or_none;
use super::rules::has_scheme;
use super::rules::is_host;
use super::rules::is_name;
use super::rules::is_reachable;
use super::rules::not_a_host;
use super::rules::not_a_name;
use super::secret;
use super::secret::Secret;
use super::secret::Url;

/// Sentinels, or servers of a cluster to begin with.
const MAX_NODES: usize = 64;
/// In a pattern these stand for other characters, and in a cluster braces move a key to another slot.
const NOT_IN_KEYS: &[char] = &['*', '?', '[', ']', '\\', '{', '}'];

/// How many servers there are, and who says which of them to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RedisMode {
    /// One address.
    Single,
    /// Sentinels know the primary.
    Sentinel,
    /// Redis Cluster: each primary has some of the slots.
    Cluster,
}

/// Redis servers: by `url`, by `nodes`, or by all the other fields.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    pub mode: RedisMode,
    /// `host:port` of sentinels, or of some servers of the cluster; then `host` and `port` say nothing.
    pub nodes: Vec<String>,
    /// What sentinels call the primary.
    pub sentinel_master: String,
    #[serde(with = "or_empty")]
    pub sentinel_username: Option<String>,
    #[serde(with = "or_empty")]
    pub sentinel_password: Option<Secret>,
    #[serde(with = "or_empty")]
    pub sentinel_password_file: Option<PathBuf>,
    pub host: String,
    pub port: u16,
    pub database: u32,
    /// For connecting and writing, not for readers. Also goes with `url`.
    #[serde(with = "millis")]
    pub timeout: Duration,
    #[serde(with = "or_empty")]
    pub username: Option<String>,
    #[serde(with = "or_empty")]
    pub password: Option<Secret>,
    #[serde(with = "or_empty")]
    pub password_file: Option<PathBuf>,
    pub tls: bool,
    /// Given: these CAs and no others.
    #[serde(with = "or_empty")]
    pub ca_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub cert_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub key_file: Option<PathBuf>,
    /// Given: `host`, `port`, `database`, `username`, `password` and `tls` have their defaults and say nothing.
    #[serde(with = "or_empty")]
    pub url: Option<Url>,
    #[serde(with = "or_empty")]
    pub url_file: Option<PathBuf>,
}

/// The Redis that records and keys are in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RedisCache {
    #[serde(flatten)]
    pub server: Redis,
    /// Begins every key's name; may be empty.
    pub key_prefix: String,
}

/// The Redis that carries channels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RedisQueue {
    #[serde(flatten)]
    pub server: Redis,
    /// Begins every channel's name; may be empty.
    pub channel_prefix: String,
    /// In a cluster: what is for one user or one gateway goes to the servers of its slot only.
    pub sharded: bool,
}

impl Redis {
    /// The URL, if one was given, here or in a file; the file is read now.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_url(&self) -> io::Result<Option<Url>> {
        self.url_file
            .as_deref()
            .map(|file| secret::read(file).map(Url::from))
            .transpose()
            .map(|read| read.or_else(|| self.url.clone()))
    }

    /// Whether the connection is encrypted. The server then has to prove who it is.
    pub fn speaks_tls(&self) -> bool {
        self.tls || self.read_url().is_ok_and(|url| url.is_some_and(|url| url.expose().starts_with("rediss:")))
    }

    /// The password; the same.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_password(&self) -> io::Result<Option<Secret>> {
        either(&self.password, &self.password_file)
    }

    /// That of the sentinels.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_sentinel_password(&self) -> io::Result<Option<Secret>> {
        either(&self.sentinel_password, &self.sentinel_password_file)
    }

    fn check(&self, section: &str, faults: &mut Faults) {
        let key = |key: &str| format!("{section}.{key}");
        faults.unless(is_host(&self.host), &[&key("host")], not_a_host);
        let known = |url: &str| has_scheme(url, &["redis:", "rediss:", "redis+unix:", "unix:"]);
        both_or_none(faults, section, &self.cert_file, &self.key_file);
        self.check_mode(section, faults);
        let files = self.read_url().and_then(|url| self.read_password().and(self.read_sentinel_password()).map(|_| url));
        let url = match files {
            Ok(url) => url,
            Err(error) => {
                let keys = [key("url_file"), key("password_file"), key("sentinel_password_file")];
                return faults.unless(false, &[&keys[0], &keys[1], &keys[2]], || error.to_string());
            }
        };
        let fits = url.as_ref().is_none_or(|url| known(url.expose()));
        faults.unless(fits, &[&key("url")], || "must begin with redis:, rediss: or unix:".into());
        let has_files = self.ca_file.is_some() || self.cert_file.is_some();
        faults.unless(self.speaks_tls() || !has_files, &[&key("ca_file"), &key("cert_file")], || {
            format!("needs {section}.tls = true, or a URL that begins with rediss:")
        });
    }

    fn check_mode(&self, section: &str, faults: &mut Faults) {
        let key = |key: &str| format!("{section}.{key}");
        let is_single = self.mode == RedisMode::Single;
        faults.unless(is_single || !self.nodes.is_empty(), &[&key("mode"), &key("nodes")], || {
            format!("needs {section}.nodes: HOST:PORT of sentinels, or of some servers of the cluster")
        });
        faults.unless(!is_single || self.nodes.is_empty(), &[&key("nodes")], || {
            format!("goes with {section}.mode = sentinel or cluster")
        });
        let fit = self.nodes.len() <= MAX_NODES && self.nodes.iter().all(|node| is_reachable(node));
        faults.unless(fit, &[&key("nodes")], || format!("must be a list of HOST:PORT, {MAX_NODES} at most"));
        faults.unless(is_name(&self.sentinel_master), &[&key("sentinel_master")], not_a_name);
        let login = [
            ("sentinel_username", self.sentinel_username.is_some()),
            ("sentinel_password", self.sentinel_password.is_some()),
            ("sentinel_password_file", self.sentinel_password_file.is_some()),
        ];
        for (name, is_given) in login {
            faults.unless(!is_given || self.mode == RedisMode::Sentinel, &[&key(name)], || {
                format!("goes with {section}.mode = sentinel")
            });
        }
        let twice = self.sentinel_password.is_some() && self.sentinel_password_file.is_some();
        faults.unless(!twice, &[&key("sentinel_password"), &key("sentinel_password_file")], || {
            "sentinel_password and sentinel_password_file say the same: give only one of them".into()
        });
        faults.unless(self.mode != RedisMode::Cluster || self.database == 0, &[&key("database")], || {
            "must be 0: a Redis Cluster has no other".into()
        });
    }
}

impl RedisCache {
    pub(super) fn check(&self, faults: &mut Faults) {
        self.server.check("redis_cache", faults);
        let prefix = &self.key_prefix;
        let fits = prefix.is_empty() || (is_name(prefix) && !prefix.contains(NOT_IN_KEYS));
        faults.unless(fits, &["redis_cache.key_prefix"], || format!("{}, without * ? [ ] \\ {{ }}", not_a_name()));
    }
}

impl RedisQueue {
    pub(super) fn check(&self, faults: &mut Faults) {
        self.server.check("redis_queue", faults);
        let prefix = &self.channel_prefix;
        faults.unless(prefix.is_empty() || is_name(prefix), &["redis_queue.channel_prefix"], not_a_name);
        let fits = !self.sharded || self.server.mode == RedisMode::Cluster;
        faults.unless(fits, &["redis_queue.sharded"], || "goes with redis_queue.mode = cluster".into());
    }
}

fn either(given: &Option<Secret>, file: &Option<PathBuf>) -> io::Result<Option<Secret>> {
    let read = file.as_deref().map(|file| secret::read(file).map(Secret::from)).transpose()?;
    Ok(read.or_else(|| given.clone()))
}
