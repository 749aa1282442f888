//! One connection to a Redis, shared by all tasks and made again when it breaks.
//!
//! Commands of many tasks are pipelined by themselves. A command that is not answered in time ends the connection, because it
//! may be dead; unless its caller was in a hurry, which must not cost the others theirs. Each connection has a number, so that what was found out about
//! the server holds for that connection and no later one.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use redis::AsyncConnectionConfig;
use redis::Client;
use redis::ClientTlsConfig;
use redis::ConnectionAddr;
use redis::FromRedisValue;
use redis::IntoConnectionInfo;
use redis::Pipeline;
use redis::RedisError;
use redis::TlsCertificates;
use redis::aio::MultiplexedConnection;
use redis::aio::PubSub;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::config;

/// A command given up sooner than this does not end the connection: the server may only be busy.
const HURRY: Duration = Duration::from_millis(100);
/// What a server says that takes no writes, or has no data yet. A fail-over leaves old connections on such a one: they end at
/// once, and the next meets whoever stands at the address now.
const NOT_PRIMARY: [&str; 4] = ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"];
/// The first and the longest pause after a connection could not be made.
const RECONNECT_PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// Commands that may wait for the connection's driver.
const PIPELINE_BUFFER: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("it did not answer lately")]
    Down,
    #[error("it is a replica, which takes no writes")]
    Replica,
    #[error("{0}")]
    Redis(#[from] RedisError),
    #[error("{0}")]
    File(#[from] std::io::Error),
}

/// What a server says of itself.
#[derive(Clone, Debug)]
pub struct Server {
    /// Which server it is and which of its databases is used: another answer means that its data may be other data.
    pub identity: String,
    /// In bytes.
    pub used_memory: i64,
    /// When its memory is full it removes keys of every kind, also those that have to stay.
    pub evicts_keys: bool,
}

pub struct Link {
    /// Read again for each connection: whatever renews certificates and passwords need not tell anybody.
    address: config::Redis,
    database: i64,
    /// Where the connection lives, whoever needs it first: not on a thread that serves clients, and not only as long as it.
    runtime: Handle,
    timeout: Duration,
    current: Mutex<Option<(u64, MultiplexedConnection)>>,
    /// One task connects at a time, and none before so long after a failure.
    connecting: tokio::sync::Mutex<Attempts>,
    numbers: AtomicU64,
}

struct Attempts {
    backoff: Backoff,
    not_before: Instant,
}

impl Link {
    /// Does not connect yet. Connections will live on the runtime of the caller.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub fn new(redis: &config::Redis) -> Result<Self, LinkError> {
        let database = client(redis)?.get_connection_info().redis_settings().db();
        let attempts = Attempts { backoff: Backoff::new(RECONNECT_PAUSES.0, RECONNECT_PAUSES.1), not_before: Instant::now() };
        let (current, connecting) = (Mutex::default(), tokio::sync::Mutex::new(attempts));
        let (runtime, numbers) = (Handle::current(), AtomicU64::new(1));
        Ok(Self { address: redis.clone(), database, runtime, timeout: redis.timeout, current, connecting, numbers })
    }

    /// Runs commands in one round trip, within `limit`. Also connects, if need be.
    pub async fn run<T: FromRedisValue>(&self, commands: &Pipeline, limit: Duration) -> Result<T, LinkError> {
        self.run_numbered(commands, limit).await.map(|(_, value)| value)
    }

    /// The same, and the number of the connection that answered.
    pub async fn run_numbered<T: FromRedisValue>(&self, commands: &Pipeline, limit: Duration) -> Result<(u64, T), LinkError> {
        let (number, mut connection) = timeout(limit, self.connection()).await.map_err(|_| LinkError::NoAnswer(limit))??;
        let result = match timeout(limit, commands.query_async(&mut connection)).await {
            Ok(Ok(value)) => return Ok((number, value)),
            Ok(Err(error)) => LinkError::Redis(error),
            Err(_) => LinkError::NoAnswer(limit),
        };
        let is_over = match &result {
            LinkError::NoAnswer(limit) => *limit >= HURRY,
            LinkError::Redis(error) => error.is_unrecoverable_error() || error.is_timeout() || is_not_primary(error),
            LinkError::Down | LinkError::Replica | LinkError::File(_) => false,
        };
        if is_over {
            self.give_up(number);
        }
        Err(result)
    }

    /// How the server is, and the number of the connection that told. A replica is left at once.
    ///
    /// # Errors
    /// [`LinkError::Replica`], or why it does not say how it is.
    pub async fn look(&self, limit: Duration) -> Result<(u64, Server), LinkError> {
        let mut info = redis::pipe();
        info.cmd("INFO").arg("server").cmd("INFO").arg("memory").cmd("INFO").arg("replication");
        let (number, (server, memory, replication)): (_, (String, String, String)) = self.run_numbered(&info, limit).await?;
        if field(&replication, "role") == "slave" {
            self.give_up(number);
            return Err(LinkError::Replica);
        }
        let evicts = field(&memory, "maxmemory_policy").starts_with("allkeys-") && field(&memory, "maxmemory") != "0";
        let used_memory = field(&memory, "used_memory").parse().unwrap_or_default();
        let identity = format!("{}:{}:{}", field(&server, "run_id"), field(&replication, "master_replid"), self.database());
        Ok((number, Server { identity, used_memory, evicts_keys: evicts }))
    }

    /// The same for a server that tells this user nothing else than what it is.
    ///
    /// # Errors
    /// [`LinkError::Replica`], or why it does not say it.
    pub async fn must_be_primary(&self, limit: Duration) -> Result<(), LinkError> {
        let mut role = redis::pipe();
        role.cmd("ROLE");
        let (number, (role,)): (_, (Vec<redis::Value>,)) = self.run_numbered(&role, limit).await?;
        let is_replica = matches!(role.first(), Some(redis::Value::BulkString(name)) if name == b"slave");
        if is_replica {
            self.give_up(number);
            return Err(LinkError::Replica);
        }
        Ok(())
    }

    /// The number of the database that keys are in.
    pub fn database(&self) -> i64 {
        self.database
    }

    /// The longest that connecting and writing may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// A connection of its own, for subscriptions.
    pub async fn subscriber(&self) -> Result<PubSub, LinkError> {
        let limit = self.timeout;
        let client = client(&self.address)?;
        Ok(timeout(limit, client.get_async_pubsub()).await.map_err(|_| LinkError::NoAnswer(limit))??)
    }

    async fn connection(&self) -> Result<(u64, MultiplexedConnection), LinkError> {
        if let Some(current) = self.lock().clone() {
            return Ok(current);
        }
        let mut attempts = self.connecting.lock().await;
        if let Some(current) = self.lock().clone() {
            return Ok(current);
        }
        if Instant::now() < attempts.not_before {
            return Err(LinkError::Down);
        }
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout))
            .set_pipeline_buffer_size(PIPELINE_BUFFER);
        let address = self.address.clone();
        let connect = async move {
            let connected = client(&address)?.get_multiplexed_async_connection_with_config(&config).await?;
            Ok::<_, LinkError>(connected)
        };
        let connected = self.runtime.spawn(connect).await.map_err(|_| LinkError::Down)?;
        if connected.is_err() {
            attempts.not_before = Instant::now() + attempts.backoff.pause();
        } else {
            attempts.backoff.reset();
        }
        let connection = connected?;
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        *self.lock() = Some((number, connection.clone()));
        Ok((number, connection))
    }

    fn give_up(&self, number: u64) {
        let mut current = self.lock();
        if current.as_ref().is_some_and(|(current, _)| *current == number) {
            *current = None;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(u64, MultiplexedConnection)>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A field of what INFO says; empty if it does not say it.
fn field<'a>(info: &'a str, name: &str) -> &'a str {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default()
}

/// What a script met stands within the text.
fn is_not_primary(error: &RedisError) -> bool {
    let text = error.to_string();
    NOT_PRIMARY.iter().any(|code| error.code() == Some(code) || text.contains(code))
}

fn client(redis: &config::Redis) -> Result<Client, LinkError> {
    let info = match redis.read_url()? {
        Some(url) => url.expose().into_connection_info()?,
        None => address(redis)?,
    };
    let tcp = info.tcp_settings().clone().set_nodelay(true).set_user_timeout(redis.timeout);
    let info = info.set_tcp_settings(tcp);
    if !matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        return Ok(Client::open(info)?);
    }
    let read = |file: &Option<PathBuf>| file.as_ref().map(std::fs::read).transpose();
    let client_tls = match (read(&redis.cert_file)?, read(&redis.key_file)?) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        _ => None,
    };
    let root_cert = read(&redis.ca_file)?;
    Ok(Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })?)
}

fn address(redis: &config::Redis) -> Result<redis::ConnectionInfo, LinkError> {
    let (host, port) = (redis.host.clone(), redis.port);
    let addr = match redis.tls {
        true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        false => ConnectionAddr::Tcp(host, port),
    };
    let info = addr.into_connection_info()?;
    let mut settings = info.redis_settings().clone().set_db(redis.database.into());
    if let Some(username) = &redis.username {
        settings = settings.set_username(username);
    }
    if let Some(password) = redis.read_password()? {
        settings = settings.set_password(password.expose());
    }
    Ok(info.set_redis_settings(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_takes_no_writes_is_left_and_one_that_refuses_a_command_is_not() {
        for (said, leave) in [
            ("READONLY You can't write against a read only replica.", true),
            ("LOADING Redis is loading the dataset in memory", true),
            ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", true),
            ("CLUSTERDOWN The cluster is down", true),
            ("ERR Error running script: @user_script:1: -READONLY You can't write against a read only replica.", true),
            ("OOM command not allowed when used memory > 'maxmemory'.", false),
            ("NOPERM User x has no permissions to run the 'eval' command", false),
            ("MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.", false),
            ("NOREPLICAS Not enough good replicas to write.", false),
            ("BUSY Redis is busy running a script.", false),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", false),
            ("NOAUTH Authentication required.", false),
        ] {
            let parsed = redis::parse_redis_value(format!("-{said}\r\n").as_bytes());
            let Ok(redis::Value::ServerError(error)) = parsed else { panic!("{said} is no error: {parsed:?}") };
            assert_eq!(is_not_primary(&error.into()), leave, "{said}");
        }
    }
}
