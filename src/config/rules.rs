//! What a value has to be: a range for each number, and the rules between keys.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::Config;
use super::Credential;
use super::Store;
use crate::domain::status::MAX_TEXT_BYTES;
use crate::security::san::SanRule;

/// One lost heartbeat, and one that is late, are no death.
const LEASE_IN_HEARTBEATS: u32 = 3;
const MAX_NAME_BYTES: usize = 64;

const HOUR_MS: u64 = 60 * 60_000;
const DAY_MS: u64 = 24 * HOUR_MS;
const HOUR_S: u64 = 3600;
const YEAR_S: u64 = 365 * 24 * HOUR_S;
const FORGET_AFTER_AT_LEAST: Duration = Duration::from_secs(7 * 24 * HOUR_S);
const MAX_PORT: u64 = u16::MAX as u64;
const MAX_DATABASE: u64 = i32::MAX as u64;
const MAX_THREADS: u64 = 1024;
const MAX_CONNECTIONS: u64 = 1_000_000;
const MAX_USERS: u64 = 1_000_000_000;
const MAX_RETRIES: u64 = 100;
const MAX_DEVICES: u64 = 1000;
/// A message has to fit, with its envelope, into one request and into one Redis publication.
const MAX_MESSAGE_BYTES: u64 = 1024 * 1024;
const MAX_INBOX_MESSAGES: u64 = 1_000_000;
const MAX_INBOX_BYTES: u64 = 1024 * 1024 * 1024;
const MAX_STATUS_CHANGES: u64 = 1000;
const MAX_DRAIN_RATE: u64 = 1_000_000;
const MAX_DELAY_MS: u64 = 60_000;
const MAX_PAIRS: u64 = 100_000_000;
const MAX_KEPT_ROWS: u64 = 10_000_000;
const MAX_LOGIN_RATE: u64 = 1_000_000;
const MAX_EXPERIMENTS: usize = 32;
const MAX_SQL_CONNECTIONS: u64 = 1000;
/// Less would not hold what one call of the largest batch needs beside the others.
const MEMORY_BYTES: RangeInclusive<u64> = 64 * 1024 * 1024..=1024 * 1024 * 1024 * 1024;
/// They have to fit into the 4 MiB that a collector takes at once.
const MAX_SPANS_TOGETHER: u64 = 4_096;
const MAX_LANES: u64 = 64;
/// Shorter, what is under way would be taken for a difference.
const SETTLE_MS: RangeInclusive<u64> = 100..=HOUR_MS;
/// Slower, a large gateway would never be done.
const ROWS_PER_S: RangeInclusive<u64> = 1_000..=MAX_PER_SECOND;
/// What a URL may say besides where the database is. TLS has keys of its own, which cannot be misspelt silently.
const MYSQL_URL_KEYS: [&str; 1] = ["socket"];
const SQLITE_URL_KEYS: [&str; 2] = ["mode", "vfs"];
const MAX_PER_SECOND: u64 = 1_000_000_000;
const MAX_KEEP_DAYS: u64 = 100 * 365;
/// Longer than any load balancer takes to notice.
const MAX_DRAIN_MS: u64 = 300_000;
/// A shorter queue would refuse what one commit could have taken.
const QUEUE: RangeInclusive<u64> = 1024..=1_000_000;
/// Below the first a healthy server would time out; above the second no caller waits any more.
const TIMEOUT_MS: RangeInclusive<u64> = 10..=60_000;

/// A rule that is broken, and the keys it is about, of which the first is named if all are at their defaults.
pub struct Fault {
    pub keys: Vec<String>,
    pub reason: String,
}

/// What a whole number may be, in the unit of `config/default.toml`.
pub fn range(section: &str, key: &str) -> Option<RangeInclusive<u64>> {
    Some(match (section, key) {
        ("presence_service" | "admin", "port") => 0..=MAX_PORT,
        ("presence_service", "thread_count") => 0..=MAX_THREADS,
        ("presence_service", "max_connections") => 1..=MAX_CONNECTIONS,
        ("presence_service", "max_capacity") => 0..=MAX_USERS,
        ("presence_service", "drain_ms") => 0..=MAX_DRAIN_MS,
        ("limits", "memory_bytes") => MEMORY_BYTES,
        ("limits", "calls_per_s" | "users_per_s") => 0..=MAX_PER_SECOND,
        ("limits", "streams") => 0..=MAX_CONNECTIONS,
        ("tls" | "admin_tls", "handshake_timeout") => TIMEOUT_MS,
        ("trace", "queue") => QUEUE,
        ("trace", "batch") => 1..=MAX_SPANS_TOGETHER,
        ("trace", "timeout") => TIMEOUT_MS,
        ("audit", "keep_days") => 0..=MAX_KEEP_DAYS,
        ("store", "port") => 1..=MAX_PORT,
        ("route", "route_ttl" | "status_ttl") => 1..=YEAR_S,
        ("route", "max_retries") => 0..=MAX_RETRIES,
        ("route", "retry_interval") => 1..=HOUR_MS,
        ("route", "l1_capacity") => 0..=MAX_USERS,
        ("route", "l1_ttl") => 1..=HOUR_S,
        ("route", "max_devices") => 1..=MAX_DEVICES,
        ("route", "per_platform") => 0..=MAX_DEVICES,
        ("gateway", "heartbeat_interval") => 10..=HOUR_MS,
        ("gateway", "lease") => 30..=DAY_MS,
        ("gateway", "stream_grace") => 0..=DAY_MS,
        ("gateway", "doubt_for") => 0..=DAY_MS,
        ("delivery", "max_message_bytes") => 1..=MAX_MESSAGE_BYTES,
        ("delivery", "inbox_max_messages") => 1..=MAX_INBOX_MESSAGES,
        ("delivery", "inbox_max_bytes") => 1..=MAX_INBOX_BYTES,
        ("delivery", "inbox_ttl") => 1..=YEAR_S,
        ("drain", "rate") => 1..=MAX_DRAIN_RATE,
        ("drain", "settle" | "close_after") => 0..=HOUR_S,
        ("drain", "outstanding") => 1..=HOUR_S,
        ("status", "rate") => 0..=MAX_STATUS_CHANGES,
        ("status", "burst") => 1..=MAX_STATUS_CHANGES,
        ("status", "text_bytes") => 0..=MAX_TEXT_BYTES as u64,
        ("watch", "offline_delay" | "min_interval") => 0..=MAX_DELAY_MS,
        ("watch", "max_users_per_stream" | "max_users") => 1..=MAX_PAIRS,
        ("watch", "max_streams") => 1..=MAX_CONNECTIONS,
        ("watch", "resync_rate") => 100..=MAX_USERS,
        ("history", "keep_days") => 1..=MAX_KEEP_DAYS,
        ("history", "keep_rows") => 100..=MAX_KEPT_ROWS,
        ("history", "session_gap") => 0..=HOUR_S,
        ("allocation", "default_capacity") => 1..=MAX_USERS,
        ("allocation", "login_rate") => 0..=MAX_LOGIN_RATE,
        ("allocation", "max_retry_after") => 1..=HOUR_S,
        ("digest", "interval") => 0..=DAY_MS,
        ("digest", "settle") => SETTLE_MS,
        ("digest", "rows_per_s") => ROWS_PER_S,
        ("store", "connections") => 1..=MAX_SQL_CONNECTIONS,
        ("store", "lanes") => 1..=MAX_LANES,
        ("store", "queue") => QUEUE,
        ("store", "forget_users_after") => 0..=100 * YEAR_S,
        ("store" | "redis_cache" | "redis_queue", "timeout") | ("store", "max_event_age") => TIMEOUT_MS,
        ("redis_cache" | "redis_queue", "port") => 1..=MAX_PORT,
        ("redis_cache" | "redis_queue", "database") => 0..=MAX_DATABASE,
        _ => return None,
    })
}

impl Config {
    /// The rules that a single number's range cannot say.
    pub fn validate(&self) -> Vec<Fault> {
        let mut faults = Faults(Vec::new());
        self.check_addresses(&mut faults);
        self.check_gateways(&mut faults);
        self.check_allocation(&mut faults);
        faults.unless(is_filter(&self.log.level), &["log.level"], || "must be a level such as info, or directives".into());
        let fits = self.delivery.inbox_max_bytes >= self.delivery.max_message_bytes as u64;
        faults.unless(fits, &["delivery.inbox_max_bytes", "delivery.max_message_bytes"], || {
            "the inbox must hold at least one message: inbox_max_bytes >= max_message_bytes".into()
        });
        let is_url = |url: &String| ["http://", "https://"].iter().any(|head| url.len() > head.len() && url.starts_with(head));
        faults.unless(self.console.grafana_url.as_ref().is_none_or(is_url), &["console.grafana_url"], || {
            "must begin with http:// or https://".into()
        });
        self.check_store(&mut faults);
        self.check_security(&mut faults);
        self.check_forgetting(&mut faults);
        if let Some(cache) = &self.redis_cache {
            cache.check(&mut faults);
        }
        if let Some(queue) = &self.redis_queue {
            queue.check(&mut faults);
        }
        faults.0
    }

    /// Shorter would forget those who are away for the weekend, and race with nodes that know them.
    fn check_forgetting(&self, faults: &mut Faults) {
        let after = self.store.forget_users_after;
        faults.unless(after.is_zero() || after >= FORGET_AFTER_AT_LEAST, &["store.forget_users_after"], || {
            format!("must be 0 (never), or at least {} s", FORGET_AFTER_AT_LEAST.as_secs())
        });
    }

    fn check_addresses(&self, faults: &mut Faults) {
        let (data, admin) = (&self.presence_service, &self.admin);
        faults.unless(is_host(&data.host), &["presence_service.host"], not_a_host);
        faults.unless(is_host(&admin.host), &["admin.host"], not_a_host);
        let hosts_are_names = admin.allowed_hosts.iter().all(|host| is_name(host) && !host.contains(':'));
        faults.unless(hosts_are_names, &["admin.allowed_hosts"], || "must be names of hosts, without ports".into());
        let apart = data.port == 0 || (&data.host, data.port) != (&admin.host, admin.port);
        faults.unless(apart, &["admin.port", "presence_service.port"], || {
            "admin and presence_service cannot listen on the same address".into()
        });
        faults.unless(data.node_id.as_deref().is_none_or(is_name), &["presence_service.node_id"], not_a_name);
        faults.unless(data.advertise.as_deref().is_none_or(is_reachable), &["presence_service.advertise"], || {
            "must be HOST:PORT, the address at which other nodes reach this one: not 0.0.0.0, and not port 0".into()
        });
        let names_itself = self.store.is_of_one_node() || data.advertise.is_some() || !is_unspecified(&data.host);
        faults.unless(names_itself, &["presence_service.advertise", "presence_service.host"], || UNNAMED.into());
    }

    fn check_trace(&self, faults: &mut Faults) {
        let trace = &self.trace;
        let is_collector = |url: &str| url.strip_prefix("http://").is_some_and(is_reachable);
        faults.unless(trace.endpoint.as_deref().is_none_or(is_collector), &["trace.endpoint"], || {
            "must be http://HOST:PORT: a collector on this machine or next to it, which speaks TLS from there on".into()
        });
        // A node that does not do what it is told to would be found out when the traces are needed.
        faults.unless(trace.endpoint.is_none() || cfg!(feature = "otlp"), &["trace.endpoint"], || {
            "this program cannot send traces: it was built without the feature otlp (cargo build --features otlp)".into()
        });
        faults.unless((0.0..=1.0).contains(&trace.sample), &["trace.sample"], || "must be from 0 to 1".into());
    }

    fn check_store(&self, faults: &mut Faults) {
        let store = &self.store;
        match store.connect_urls() {
            Ok(urls) => {
                faults.unless(has_scheme(&urls[0], &["sqlite:", "mysql:", "mariadb:"]), &["store.url", "store.url_file"], || {
                    "must begin with sqlite:, mysql: or mariadb:".into()
                })
            }
            Err(error) => faults.unless(false, &["store.url_file", "store.password_file"], || error.to_string()),
        }
        let host_is_given = store.host.is_some();
        let are_hosts = |hosts: &str| hosts.split(',').all(|host| is_host(host.trim()));
        faults.unless(store.host.as_deref().is_none_or(are_hosts), &["store.host"], not_a_host);
        let named = !store.user.is_empty() && !store.database.is_empty();
        faults.unless(!host_is_given || named, &["store.host"], || "store.user and store.database are needed, too".into());
        let parts =
            [("user", store.user.is_empty()), ("database", store.database.is_empty()), ("password", store.password.is_none())];
        for (key, is_empty) in parts {
            faults
                .unless(host_is_given || is_empty, &[&format!("store.{key}")], || "goes with store.host, which is empty".into());
        }
        both_or_none(faults, "store", &store.cert_file, &store.key_file);
        if !host_is_given && let Ok(url) = store.given_url() {
            check_store_url(&url, faults);
        }
    }

    fn check_security(&self, faults: &mut Faults) {
        for (section, tls) in [("tls", &self.tls), ("admin_tls", &self.admin_tls)] {
            both_or_none(faults, section, &tls.cert_file, &tls.key_file);
            let speaks = tls.cert_file.is_some();
            let needs = |key: &str| format!("{section}.{key}");
            let reason = || format!("needs {section}.cert_file");
            faults.unless(speaks || tls.client_ca_file.is_none(), &[&needs("client_ca_file")], reason);
            faults.unless(speaks || !tls.accept_plain, &[&needs("accept_plain")], reason);
        }
        both_or_none(faults, "peer", &self.peer.cert_file, &self.peer.key_file);
        self.check_credentials(faults);
        self.check_openness(faults);
    }

    fn check_credentials(&self, faults: &mut Faults) {
        let (auth, modes) = (&self.auth, &self.auth.mode.0);
        let (tokens, mtls) = (modes.contains(&Credential::Token), modes.contains(&Credential::Mtls));
        faults.unless(!tokens || auth.tokens_file.is_some(), &["auth.tokens_file", "auth.mode"], || {
            "auth.mode = token needs it: `im-presence token new` makes an entry".into()
        });
        let asks = self.tls.client_ca_file.is_some() || self.admin_tls.client_ca_file.is_some();
        faults.unless(!mtls || asks, &["tls.client_ca_file", "auth.mode"], || "auth.mode = mtls needs it".into());
        faults.unless(!mtls || !auth.mtls.is_empty(), &["auth.mtls", "auth.mode"], || {
            "auth.mode = mtls needs a role for each kind of certificate".into()
        });
        for rule in &auth.mtls {
            if let Err(why) = SanRule::new(&rule.san, &rule.role, &rule.gateways) {
                faults.unless(false, &["auth.mtls"], || format!("{}: {why}", rule.san));
            }
        }
        let shows_certificate = self.tls.cert_file.is_some() && self.tls.client_ca_file.is_some() && !self.peer.plain;
        let nodes_prove_it = (tokens && self.peer.token_file.is_some()) || (mtls && shows_certificate);
        faults.unless(modes.is_empty() || self.store.is_of_one_node() || nodes_prove_it, &["peer.token_file", "auth.mode"], || {
            "with auth.mode, nodes that share a store need a credential of the role node: peer.token_file, or mtls and tls.cert_file"
                .into()
        });
    }

    /// Whoever reaches a port may bind, query, kick and purge, unless somebody asks who it is.
    fn check_openness(&self, faults: &mut Faults) {
        let (data, admin) = (&self.presence_service, &self.admin);
        for (section, host) in [("presence_service", &data.host), ("admin", &admin.host)] {
            let is_closed = is_loopback(host) || !self.auth.mode.0.is_empty() || self.auth.insecure;
            faults.unless(is_closed, &[&format!("{section}.host")], || {
                "is reachable without authentication: set auth.mode, or auth.insecure = true".into()
            });
        }
    }

    fn check_gateways(&self, faults: &mut Faults) {
        let (lease, heartbeat) = (self.gateway.lease, self.gateway.heartbeat_interval);
        faults.unless(lease >= heartbeat * LEASE_IN_HEARTBEATS, &["gateway.lease", "gateway.heartbeat_interval"], || {
            format!("lease must be at least {LEASE_IN_HEARTBEATS} x heartbeat_interval")
        });
        let grace = self.gateway.stream_grace;
        faults
            .unless(grace <= lease, &["gateway.stream_grace", "gateway.lease"], || "stream_grace must not be above lease".into());
        self.check_trace(faults);
        let share = self.gateway.doubt_share;
        faults.unless((0.0..=1.0).contains(&share), &["gateway.doubt_share"], || "must be from 0 to 1".into());
        let share = self.digest.max_share;
        faults.unless((0.0..=1.0).contains(&share), &["digest.max_share"], || "must be from 0 to 1".into());
    }
}

impl Config {
    fn check_allocation(&self, faults: &mut Faults) {
        let allocation = &self.allocation;
        let is_share = |share: f64| share > 0.0 && share <= 1.0;
        faults.unless(is_share(allocation.max_load), &["allocation.max_load"], || "must be above 0, and 1 at most".into());
        faults.unless((1.0..=10.0).contains(&allocation.bounded_load), &["allocation.bounded_load"], || {
            "must be from 1 to 10".into()
        });
        faults.unless(self.node.zone.is_empty() || is_name(&self.node.zone), &["node.zone"], not_a_name);
        let experiments = &allocation.experiments;
        faults.unless(experiments.len() <= MAX_EXPERIMENTS, &["allocation.experiments"], || format!("at most {MAX_EXPERIMENTS}"));
        for (at, one) in experiments.iter().enumerate() {
            let is_first = experiments[..at].iter().all(|other| other.name != one.name);
            faults.unless(is_name(&one.name) && is_first, &["allocation.experiments"], || {
                format!("each needs a name of its own: {}", not_a_name())
            });
            faults.unless((0.0..=1.0).contains(&one.share), &["allocation.experiments"], || {
                format!("{}: share must be from 0 to 1", one.name)
            });
        }
    }
}

/// A misspelt key would be ignored silently, and a store in memory is another one for each connection.
fn check_store_url(url: &str, faults: &mut Faults) {
    let query = url.rsplit_once('@').map_or(url, |(_, server)| server).split_once('?').map_or("", |(_, query)| query);
    let pairs: Vec<(&str, &str)> =
        query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect();
    let known: &[&str] = if url.starts_with("sqlite:") { &SQLITE_URL_KEYS } else { &MYSQL_URL_KEYS };
    faults.unless(pairs.iter().all(|(key, _)| known.contains(key)), &["store.url", "store.url_file"], || {
        format!("may have these keys after the question mark, and no others: {}", known.join(", "))
    });
    faults.unless(url.starts_with("sqlite:") || !url.contains('#'), &["store.url", "store.url_file"], || {
        "must have no #: in a password it is %23".into()
    });
    if let Some(path) = url.strip_prefix("sqlite:") {
        let path = path.trim_start_matches("//").split('?').next().unwrap_or_default();
        let is_file = !path.is_empty() && !path.starts_with(':') && !path.starts_with("file:");
        let writable = pairs.iter().all(|(key, mode)| *key != "mode" || ["rw", "rwc"].contains(mode));
        faults.unless(is_file && writable, &["store.url", "store.url_file"], || {
            "must name a file that can be written, as in sqlite://im-presence.db: what is only in memory cannot be kept".into()
        });
    }
}

impl Store {
    /// A file is of one node alone.
    fn is_of_one_node(&self) -> bool {
        self.connect_urls().is_ok_and(|urls| urls[0].starts_with("sqlite:"))
    }
}

pub(super) fn both_or_none<T>(faults: &mut Faults, section: &str, cert: &Option<T>, key: &Option<T>) {
    let keys = [format!("{section}.cert_file"), format!("{section}.key_file")];
    faults.unless(cert.is_some() == key.is_some(), &[&keys[0], &keys[1]], || {
        "a certificate needs its key, and a key its certificate: give both, or none".into()
    });
}

/// Why a node needs `advertise`.
pub const UNNAMED: &str = "with a store that several nodes share, other nodes have to reach this one, and an address such as \
    0.0.0.0 leads each of them to itself: set presence_service.advertise = HOST:PORT";

pub(super) struct Faults(Vec<Fault>);

impl Faults {
    pub fn unless(&mut self, kept: bool, keys: &[&str], reason: impl FnOnce() -> String) {
        if !kept {
            self.0.push(Fault { keys: keys.iter().map(|&key| key.to_owned()).collect(), reason: reason() });
        }
    }
}

fn is_filter(directives: &str) -> bool {
    // A word alone would pass as the name of a module: `inof` must not switch logging off.
    let mut words = directives.split(',').filter(|directive| !directive.contains('='));
    words.all(|word| !word.is_empty() && LevelFilter::from_str(word.trim()).is_ok())
        && EnvFilter::builder().parse(directives).is_ok()
}

pub(super) fn has_scheme(url: &str, schemes: &[&str]) -> bool {
    schemes.iter().any(|scheme| url.starts_with(scheme))
}

pub(super) fn is_host(host: &str) -> bool {
    !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic())
}

pub(super) fn is_name(name: &str) -> bool {
    is_host(name) && name.len() <= MAX_NAME_BYTES
}

fn is_address(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| is_host(host) && port.parse::<u16>().is_ok_and(|port| port > 0))
}

pub(super) fn is_reachable(address: &str) -> bool {
    is_address(address) && address.rsplit_once(':').is_some_and(|(host, _)| !is_unspecified(host))
}

/// `0.0.0.0`, `::`, and shorter spellings: every address of the machine that asks.
fn is_unspecified(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_unspecified()) || host.bytes().all(|byte| b"0.".contains(&byte))
}

/// Only this machine reaches it.
fn is_loopback(host: &str) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.to_canonical().is_loopback())
}

pub(super) fn not_a_host() -> String {
    "must be a host name or an IP address".into()
}

pub(super) fn not_a_name() -> String {
    format!("must be printable ASCII without spaces, up to {MAX_NAME_BYTES} characters")
}
