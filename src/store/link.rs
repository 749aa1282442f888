//! One connection to a Redis, shared by all tasks and made again when it breaks.
//!
//! Commands of many tasks are pipelined by themselves. A command that is not answered in time ends the connection, because it
//! may be dead; unless its caller was in a hurry, which must not cost the others theirs. Each connection has a number, so that what was found out about
//! the server holds for that connection and no later one.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use redis::FromRedisValue;
use redis::Pipeline;
use redis::RedisError;
use redis::RedisResult;
use redis::Value;
use redis::aio::MultiplexedConnection;
use redis::aio::PubSub;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::backoff::Backoff;
use crate::config;
use crate::store::address::Address;
use crate::store::link_error::LinkError;

/// A command given up sooner than this does not end the connection: the server may only be busy.
const HURRY: Duration = Duration::from_millis(100);
/// What a server says that takes no writes, or has no data yet. A fail-over leaves old connections on such a one: they end at
/// once, and the next meets whoever stands at the address now.
const NOT_PRIMARY: [&str; 4] = ["READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN"];
/// The first and the longest pause after a connection could not be made.
const RECONNECT_PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// In a cluster: somebody else has the slot now, or is about to have it.
const ELSEWHERE: [&str; 2] = ["MOVED", "ASK"];

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
    address: Arc<Address>,
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
    /// Of the last failure.
    why: String,
}

impl Link {
    /// Does not connect yet. Connections will live on the runtime of the caller.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub fn new(redis: &config::Redis) -> Result<Self, LinkError> {
        Self::to(Address::of(redis), redis.timeout)
    }

    /// The same to one server of a cluster, `host:port`.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub fn to_member(redis: &config::Redis, node: &str) -> Result<Self, LinkError> {
        Self::to(Address::of_member(redis, node), redis.timeout)
    }

    fn to(address: Address, timeout: Duration) -> Result<Self, LinkError> {
        let database = address.database()?;
        let attempts = Attempts {
            backoff: Backoff::new(RECONNECT_PAUSES.0, RECONNECT_PAUSES.1),
            not_before: Instant::now(),
            why: String::new(),
        };
        let (current, connecting) = (Mutex::default(), tokio::sync::Mutex::new(attempts));
        let (runtime, numbers) = (Handle::current(), AtomicU64::new(1));
        Ok(Self { address: Arc::new(address), database, runtime, timeout, current, connecting, numbers })
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
            _ => false,
        };
        if is_over {
            self.give_up(number);
        }
        Err(result)
    }

    /// The same for commands of which each may fail alone, because somebody else has its slot.
    ///
    /// # Errors
    /// Any other failure of one of them, too.
    pub async fn run_each(&self, commands: &mut Pipeline, limit: Duration) -> Result<(u64, Vec<RedisResult<Value>>), LinkError> {
        let (number, values): (_, Vec<RedisResult<Value>>) = self.run_numbered(commands.ignore_errors(), limit).await?;
        let is_other = |error: &&RedisError| !error.code().is_some_and(|code| ELSEWHERE.contains(&code));
        if let Some(error) = values.iter().filter_map(|value| value.as_ref().err()).find(is_other) {
            return Err(LinkError::Redis(error.clone()));
        }
        Ok((number, values))
    }

    /// How the server is, and the number of the connection that told. A replica is left at once.
    ///
    /// # Errors
    /// [`LinkError::Replica`], or why it does not say how it is.
    pub async fn look(&self, limit: Duration) -> Result<(u64, Server), LinkError> {
        let mut info = redis::pipe();
        info.cmd("INFO").arg("server").cmd("INFO").arg("memory").cmd("INFO").arg("replication");
        let (number, (server, memory, replication)): (_, (String, String, String)) = self.run_numbered(&info, limit).await?;
        self.leave_unfit(number, field(&replication, "role") == "slave", limit).await?;
        if field(&server, "run_id").is_empty() && field(&replication, "master_replid").is_empty() {
            return Err(LinkError::Nameless);
        }
        let evicts = field(&memory, "maxmemory_policy").starts_with("allkeys-") && field(&memory, "maxmemory") != "0";
        let used_memory = field(&memory, "used_memory").parse().unwrap_or_default();
        let identity = format!("{}:{}:{}", field(&server, "run_id"), field(&replication, "master_replid"), self.database());
        Ok((number, Server { identity, used_memory, evicts_keys: evicts }))
    }

    /// The same for a server that tells this user nothing else than what it is.
    ///
    /// # Errors
    /// [`LinkError::Replica`] or [`LinkError::ClusterDown`], or why it does not say it.
    pub async fn must_fit(&self, limit: Duration) -> Result<(), LinkError> {
        let mut role = redis::pipe();
        role.cmd("ROLE");
        let (number, (role,)): (_, (Vec<Value>,)) = self.run_numbered(&role, limit).await?;
        let is_replica = matches!(role.first(), Some(Value::BulkString(name)) if name == b"slave");
        self.leave_unfit(number, is_replica, limit).await
    }

    /// Leaves a replica, or whom sentinels have replaced; or, where any server of a cluster will do, one that has lost the others.
    async fn leave_unfit(&self, number: u64, is_replica: bool, limit: Duration) -> Result<(), LinkError> {
        let error = match self.address.is_any_member() {
            false => (is_replica || self.address.is_left(limit).await).then_some(LinkError::Replica),
            true => {
                let mut info = redis::pipe();
                info.cmd("CLUSTER").arg("INFO");
                let (state,): (String,) = self.run(&info, limit).await?;
                (field(&state, "cluster_state") != "ok").then_some(LinkError::ClusterDown)
            }
        };
        match error {
            None => Ok(()),
            Some(error) => {
                self.give_up(number);
                Err(error)
            }
        }
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
        self.address.subscribe().await
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
            return Err(LinkError::Lately(attempts.why.clone()));
        }
        let address = self.address.clone();
        let connected = self.runtime.spawn(async move { address.connect().await }).await.map_err(|_| LinkError::Down)?;
        match &connected {
            Ok(_) => attempts.backoff.reset(),
            Err(error) => {
                attempts.not_before = Instant::now() + attempts.backoff.pause();
                attempts.why = error.to_string();
            }
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
pub fn field<'a>(info: &'a str, name: &str) -> &'a str {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default()
}

/// What a script met stands within the text.
fn is_not_primary(error: &RedisError) -> bool {
    let text = error.to_string();
    NOT_PRIMARY.iter().any(|code| error.code() == Some(code) || text.contains(code))
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
