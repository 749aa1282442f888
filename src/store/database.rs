//! The database as a whole: reaching it, laying its tables, and what its durability rests on.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use sqlx::Row;

use crate::config;
use crate::metrics::sql::SqlMetrics;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::Opening;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::database_file::DatabaseFile;
use crate::store::open_error::OpenError;
use crate::store::schema;
use crate::store::statement::unless_there;
use crate::store::way::Way;

/// The server may have ended a connection that was not used for longer.
const IDLE_LIMIT: Duration = Duration::from_secs(5);

/// What is wrong when [`Database::is_in_place`] says no.
pub const FILE_MOVED: &str = "the SQLite file was deleted, moved or replaced";

/// Where to connect, and the facts about the database that hold for the life of this process.
pub struct Database {
    pub engine: Engine,
    /// Made with the tables: tells one store from another that uses the same Redis.
    pub store_id: String,
    address: config::Store,
    /// SQLite's, held for this process alone.
    file: Option<DatabaseFile>,
    /// Who counts connections.
    metrics: Option<Arc<SqlMetrics>>,
    way: Way,
}

/// A connection that one task keeps between its steps. After an error it is not given back, and the next step connects anew.
pub struct ConnectionSlot {
    database: Arc<Database>,
    idle: Option<(Instant, Connection)>,
}

impl ConnectionSlot {
    /// Does not connect yet.
    pub fn new(database: Arc<Database>) -> Self {
        Self { database, idle: None }
    }

    pub async fn take(&mut self) -> Result<Connection, SqlError> {
        match self.idle.take() {
            Some((since, connection)) if since.elapsed() < IDLE_LIMIT && self.database.is_current(&connection) => Ok(connection),
            _ => self.database.connect(Purpose::General).await,
        }
    }

    pub fn give_back(&mut self, connection: Connection) {
        self.idle = Some((Instant::now(), connection));
    }
}

impl Database {
    /// Connects once, creates the tables that are missing, and reads the store's id. Any number of nodes may do so at once.
    pub async fn open(store: &config::Store) -> Result<Self, OpenError> {
        sqlx::any::install_default_drivers();
        let urls = store.connect_urls().map_err(|error| SqlError::Lost(error.to_string()))?;
        let (engine, file) = match urls.first().filter(|url| url.starts_with("sqlite:")) {
            Some(url) => (Engine::Sqlite, Some(DatabaseFile::hold(url)?)),
            None => (Engine::MySql, None),
        };
        let mut database =
            Self { engine, store_id: String::new(), address: store.clone(), file, metrics: None, way: Way::default() };
        let mut connection = database.connect(Purpose::General).await?;
        schema::lay(connection.raw()).await?;
        database.store_id = store_id(&mut connection).await?;
        Ok(database)
    }

    /// The same, whose connections are counted.
    pub fn counted_by(self, metrics: Arc<SqlMetrics>) -> Self {
        Self { metrics: Some(metrics), ..self }
    }

    /// Connects to the one server that this node writes to and reads from. If the configuration names several, they are asked
    /// in turn, beginning with the one that was right last; each may take its share of the time that a statement may.
    ///
    /// # Errors
    /// What each server said.
    pub async fn connect(&self, purpose: Purpose) -> Result<Connection, SqlError> {
        let urls = match &self.file {
            Some(file) => vec![file.url()],
            None => self.address.connect_urls().map_err(|error| SqlError::Lost(error.to_string()))?,
        };
        let deadline = self.address.timeout;
        let limit = deadline / u32::try_from(urls.len()).unwrap_or(1);
        let connection = self.way.find(&urls, Opening { engine: self.engine, purpose, limit, deadline }).await?;
        Ok(match &self.metrics {
            Some(metrics) => connection.counted(metrics),
            None => connection,
        })
    }

    /// Whether a connection that was kept still leads to the server that this node writes to.
    pub fn is_current(&self, connection: &Connection) -> bool {
        self.way.is_current(connection)
    }

    /// A beat was written over `connection`, or could not be, because its server takes no writes: all others have to lead to
    /// that server from now on.
    pub fn follow(&self, connection: &Connection) {
        self.way.follow(connection);
    }

    /// How the connection to the server is protected: what it is encrypted with (empty: it is not), and whether the server had
    /// to prove who it is. None: there is no server.
    pub async fn protection(&self, connection: &mut Connection) -> Result<Option<(String, bool)>, SqlError> {
        if self.engine == Engine::Sqlite {
            return Ok(None);
        }
        let rows = connection.fetch(statement("SHOW SESSION STATUS LIKE 'Ssl_cipher'")).await?;
        let cipher: String = rows.first().map_or(Ok(String::new()), |row| row.try_get(1))?;
        Ok(Some((cipher, self.address.verifies_server())))
    }

    /// Whether the file that was opened is still the one that its name leads to. Always so for a server.
    pub fn is_in_place(&self) -> bool {
        self.file.as_ref().is_none_or(DatabaseFile::is_in_place)
    }

    /// The file of an embedded database.
    pub(super) fn file_path(&self) -> Option<&Path> {
        self.file.as_ref().map(DatabaseFile::path)
    }

    /// What "durable" rests on, and whether it is weaker than a commit that survives a power cut.
    pub async fn durability(&self, connection: &mut Connection) -> Result<Durability, SqlError> {
        if self.engine == Engine::Sqlite {
            return Ok(Durability { rests_on: "SQLite, WAL, synchronous = FULL".to_owned(), weaknesses: Vec::new() });
        }
        const SQL: &str = "SHOW GLOBAL VARIABLES WHERE Variable_name IN \
            ('version', 'innodb_flush_log_at_trx_commit', 'sync_binlog', 'log_bin', 'binlog_format', 'wsrep_on', \
            'rpl_semi_sync_master_enabled', 'rpl_semi_sync_source_enabled', 'group_replication_consistency')";
        let mut settings = Vec::new();
        for row in connection.fetch(statement(SQL)).await? {
            settings.push((row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?));
        }
        Ok(Durability::of_mysql(&settings))
    }
}

/// What an acknowledged bind rests on.
#[derive(Debug, PartialEq)]
pub struct Durability {
    pub rests_on: String,
    /// Each a sentence about what an acknowledged bind does not survive.
    pub weaknesses: Vec<&'static str>,
}

impl Durability {
    fn of_mysql(settings: &[(String, String)]) -> Self {
        let value = |name: &str| settings.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value);
        let mut weaknesses = Vec::new();
        if value("innodb_flush_log_at_trx_commit") != "1" {
            weaknesses.push("innodb_flush_log_at_trx_commit is not 1: a power cut loses the last second of acknowledged binds");
        }
        if value("log_bin") == "ON" && value("sync_binlog") != "1" {
            weaknesses.push("sync_binlog is not 1: a replica may miss acknowledged binds after a power cut");
        }
        if value("log_bin") == "ON" && value("binlog_format") == "STATEMENT" {
            weaknesses.push("binlog_format is STATEMENT: READ COMMITTED needs ROW, writes will fail");
        }
        let rests_on: Vec<String> = settings.iter().map(|(key, value)| format!("{key} = {value}")).collect();
        Self { rests_on: rests_on.join(", "), weaknesses }
    }
}

/// The store's id: whoever comes first makes it.
async fn store_id(connection: &mut Connection) -> Result<String, SqlError> {
    const READ: &str = "SELECT store_id FROM cluster WHERE id = 1";
    let insert = "INSERT INTO cluster (id, store_id) VALUES (1, ?)".to_owned() + &unless_there(connection.engine(), "id");
    let mut rows = connection.fetch(statement(READ)).await?;
    if rows.is_empty() {
        connection.execute(statement(insert).bind(uuid::Uuid::new_v4().to_string())).await?;
        rows = connection.fetch(statement(READ)).await?;
    }
    let row = rows.first().ok_or_else(|| SqlError::Lost("the table `cluster` is empty".to_owned()))?;
    Ok(row.try_get(0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_weaker_than_a_commit_are_named() {
        let settings = |flush: &str, binlog: &str| {
            [("innodb_flush_log_at_trx_commit", flush), ("log_bin", binlog), ("sync_binlog", "0"), ("binlog_format", "ROW")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
        };
        assert_eq!(Durability::of_mysql(&settings("1", "OFF")).weaknesses.len(), 0);
        assert_eq!(Durability::of_mysql(&settings("2", "OFF")).weaknesses.len(), 1);
        assert_eq!(Durability::of_mysql(&settings("2", "ON")).weaknesses.len(), 2);
    }
}
