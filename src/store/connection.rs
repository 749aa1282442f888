//! One connection to the database, with a deadline on every statement.
//!
//! A statement that is not answered in time leaves the connection in an unknown state: it is [`SqlError::Lost`], and whoever
//! owns the connection drops it. Dropping a statement half way and using the connection again would lose writes.

use std::time::Duration;

use sqlx::AnyConnection;
use sqlx::AssertSqlSafe;
use sqlx::ConnectOptions;
use sqlx::Executor;
use sqlx::Row;
use sqlx::any::AnyConnectOptions;
use sqlx::any::AnyRow;
use tokio::time::timeout;

use crate::metrics::sql::Open;
use crate::metrics::sql::SqlMetrics;

use crate::store::server;
use crate::store::server::Server;
pub use crate::store::sql_error::SqlError;

/// Which SQL is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// MySQL or MariaDB: any number of nodes.
    MySql,
    /// A file of this node's own.
    Sqlite,
}

/// What a connection is for: decides how its session is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Single statements that only read, or small changes of their own.
    General,
    /// The transactions of a lane.
    Lane,
    /// The beats, which decide which server all the others have to lead to.
    Beat,
}

/// How to open a connection.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    pub engine: Engine,
    pub purpose: Purpose,
    /// How long all of it may take.
    pub limit: Duration,
    /// How long each statement may take from then on.
    pub deadline: Duration,
}

/// All that the statements rely on. A server's own defaults may be anything: a limit on selected rows would make users who are
/// online look offline, and chained transactions would never end.
const SESSION: &str = "SET NAMES utf8mb4, autocommit = 1, completion_type = 'NO_CHAIN', \
    sql_mode = 'STRICT_TRANS_TABLES,NO_ENGINE_SUBSTITUTION', time_zone = '+00:00', max_join_size = 18446744073709551615, \
    sql_big_selects = 1, sql_select_limit = 18446744073709551615, sql_safe_updates = 0, sql_auto_is_null = 0, \
    unique_checks = 1, default_storage_engine = 'InnoDB', innodb_lock_wait_timeout = 50, lock_wait_timeout = 60, \
    wait_timeout = 60, net_read_timeout = 30, net_write_timeout = 60";
const READ_COMMITTED: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE";
/// The deadline of a statement is ours. Each kind of server has its own name for its limit.
const NO_LIMIT_MARIADB: &str = "SET SESSION max_statement_time = 0, idle_transaction_timeout = 0, \
    idle_write_transaction_timeout = 0, in_predicate_conversion_threshold = 1000";
const NO_LIMIT_MYSQL: &str = "SET SESSION max_execution_time = 0";
/// Ends a lane's transaction on the server if its node stands still: its row locks must not outlive it by much.
const LANE_SESSION_LIMIT: &str = "SET SESSION wait_timeout = 10, innodb_lock_wait_timeout = 1";
/// A member of a Galera cluster takes part in a change as soon as it is ordered, and carries it out later. Whoever reads or begins
/// a transaction there waits until all is carried out that was acknowledged anywhere before: a life that has ended, a bind. Dirty
/// reads would not wait, and a member that has lost the majority would answer them.
const GALERA_SESSION: &str = "SET SESSION wsrep_sync_wait = 7, wsrep_dirty_reads = 0";
/// Binds of users at random change a page or more each: 8 MiB of pages in memory, so that a transaction writes each of its own once,
/// and 8,192 of them (32 MiB) in the log before it is carried over, so that not each commit waits for that.
const SQLITE_SESSION: &str = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000; \
    PRAGMA cache_size = -8192; PRAGMA wal_autocheckpoint = 8192";
/// Prepared statements kept per connection: each kind of statement times its chunk sizes.
const STATEMENTS_KEPT: usize = 256;

/// A connection with one owner.
pub struct Connection {
    inner: AnyConnection,
    engine: Engine,
    purpose: Purpose,
    /// SQLite: none.
    server: Option<Server>,
    deadline: Duration,
    /// Shown in the metrics. None: nobody counts.
    open: Option<Open>,
}

/// A statement with its arguments.
pub type Statement = sqlx::query::Query<'static, sqlx::Any, sqlx::any::AnyArguments>;

/// `sql` has to come from this crate's own text, never from outside.
pub fn statement(sql: impl Into<String>) -> Statement {
    sqlx::query(AssertSqlSafe(sql.into()))
}

impl Connection {
    /// Connects and sets the session up.
    pub async fn open(url: &str, opening: Opening) -> Result<Self, SqlError> {
        let Opening { engine, purpose, limit, deadline } = opening;
        let connecting = async {
            let url = with_statement_cache(url, engine);
            let options = url.parse::<AnyConnectOptions>()?.disable_statement_logging();
            let inner = options.connect().await?;
            let mut connection = Self { inner, engine, purpose, server: None, deadline, open: None };
            connection.set_up().await?;
            Ok::<_, SqlError>(connection)
        };
        timeout(limit, connecting).await.map_err(|_| no_answer(limit))?
    }

    async fn set_up(&mut self) -> Result<(), SqlError> {
        if self.engine == Engine::Sqlite {
            return self.run(SQLITE_SESSION).await;
        }
        self.run(SESSION).await?;
        self.run(READ_COMMITTED).await?;
        let variables = self.look_at_server().await?;
        let value = |name: &str| variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        self.run(if value("version").is_some_and(|version| version.contains("MariaDB")) {
            NO_LIMIT_MARIADB
        } else {
            NO_LIMIT_MYSQL
        })
        .await?;
        if self.purpose != Purpose::General {
            self.run(LANE_SESSION_LIMIT).await?;
        }
        if self.server.as_ref().is_some_and(Server::is_in_galera) {
            self.run(GALERA_SESSION).await?;
            self.ping().await?; // a member that is not ready lets everybody in, and refuses this
        }
        match value("transaction_isolation").or(value("tx_isolation")) {
            Some("READ-COMMITTED") => Ok(()),
            other => Err(SqlError::Lost(format!("the server set the isolation level to {other:?}, not READ-COMMITTED"))),
        }
    }

    /// From now on the metrics show it.
    pub fn counted(mut self, metrics: &SqlMetrics) -> Self {
        self.open = Some(metrics.opened(match self.purpose {
            Purpose::General => "general",
            Purpose::Lane => "lane",
            Purpose::Beat => "beat",
        }));
        self
    }

    /// Asks which server this is, and whether it takes writes now. Returns the session's variables that matter.
    pub async fn look_at_server(&mut self) -> Result<Vec<(String, String)>, SqlError> {
        if self.engine == Engine::Sqlite {
            return Ok(Vec::new());
        }
        let select = format!(
            "SHOW SESSION VARIABLES WHERE Variable_name IN ('version', 'transaction_isolation', 'tx_isolation', {})",
            server::VARIABLES
        );
        let rows = self.fetch(statement(select)).await?;
        let variables: Vec<(String, String)> =
            rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, sqlx::Error>>()?;
        self.server = Some(Server::of(&variables));
        Ok(variables)
    }

    /// The server behind it, as it was when somebody looked last. SQLite: none.
    pub fn server(&self) -> Option<&Server> {
        self.server.as_ref()
    }

    pub fn purpose(&self) -> Purpose {
        self.purpose
    }

    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Runs text without arguments or rows.
    pub async fn run(&mut self, sql: &'static str) -> Result<(), SqlError> {
        let _working = self.open.as_ref().map(Open::work);
        timeout(self.deadline, self.inner.execute(sqlx::raw_sql(sql))).await.map_err(|_| no_answer(self.deadline))??;
        Ok(())
    }

    /// Runs a statement and says how many rows it found (MySQL: also those it left as they were).
    pub async fn execute(&mut self, statement: Statement) -> Result<u64, SqlError> {
        let _working = self.open.as_ref().map(Open::work);
        let done = timeout(self.deadline, statement.execute(&mut self.inner)).await.map_err(|_| no_answer(self.deadline))??;
        Ok(done.rows_affected())
    }

    pub async fn fetch(&mut self, statement: Statement) -> Result<Vec<AnyRow>, SqlError> {
        let _working = self.open.as_ref().map(Open::work);
        Ok(timeout(self.deadline, statement.fetch_all(&mut self.inner)).await.map_err(|_| no_answer(self.deadline))??)
    }

    /// Begins a transaction that writes. SQLite: takes the write lock now, not half way.
    pub async fn begin(&mut self) -> Result<(), SqlError> {
        self.run(if self.engine == Engine::Sqlite { "BEGIN IMMEDIATE" } else { "BEGIN" }).await
    }

    /// After [`SqlError::Lost`] it is unknown whether the transaction was committed.
    pub async fn commit(&mut self) -> Result<(), SqlError> {
        self.run("COMMIT").await
    }

    pub async fn rollback(&mut self) -> Result<(), SqlError> {
        self.run("ROLLBACK").await
    }

    /// Asks for a sign of life, so that the server does not end an idle session.
    pub async fn ping(&mut self) -> Result<(), SqlError> {
        self.run("SELECT 1").await
    }

    pub(super) fn raw(&mut self) -> &mut AnyConnection {
        &mut self.inner
    }
}

fn no_answer(deadline: Duration) -> SqlError {
    SqlError::Lost(format!("no answer within {deadline:?}"))
}

fn with_statement_cache(url: &str, engine: Engine) -> String {
    match engine {
        Engine::Sqlite => url.to_owned(),
        Engine::MySql => {
            let separator = if url.contains('?') { '&' } else { '?' };
            format!("{url}{separator}statement-cache-capacity={STATEMENTS_KEPT}")
        }
    }
}
