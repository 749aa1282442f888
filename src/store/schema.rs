//! The tables, laid in numbered steps by whichever node comes first. Every statement of a step may be repeated: what is there
//! already is left as it is. So a node that is killed half way, or two that start at once, do no harm, also on MySQL, where
//! no statement that makes or changes a table can be rolled back.
//!
//! Nodes of the last release work beside those of this one: a step only adds what they need not know. They refuse to start
//! on tables with a migration that they do not have, so only the first step is written where they look.

use std::borrow::Cow;
use std::collections::HashSet;

use sqlx::AnyConnection;
use sqlx::AssertSqlSafe;
use sqlx::Executor;
use sqlx::SqlSafeStr;
use sqlx::migrate::Migrate;
use sqlx::migrate::MigrateError;
use sqlx::migrate::Migration;
use sqlx::migrate::MigrationType;
use sqlx::mysql::MySqlDatabaseError;

/// Steps of the schema.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    pub newest: i64,
    pub missing: Vec<i64>,
    /// Laid by a newer release.
    pub unknown: Vec<i64>,
}

/// Number, name and text of each step. Statements end with `;` at the end of a line. A step has to be quick on a table with
/// many million rows, for the nodes that start wait for it; what is not is left out if somebody did it beforehand.
const STEPS: [(i64, &str, &str); 7] = [
    (1, "init", include_str!("../../migrations/0001_init.sql")),
    (2, "incarnation", include_str!("../../migrations/0002_incarnation.sql")),
    (3, "clock, lives, counts", include_str!("../../migrations/0003_clock_lives_counts.sql")),
    (4, "audit", include_str!("../../migrations/0004_audit.sql")),
    (5, "presence", include_str!("../../migrations/0005_presence.sql")),
    (6, "moves", include_str!("../../migrations/0006_moves.sql")),
    (7, "server", include_str!("../../migrations/0007_server.sql")),
];
/// Which steps are done.
const LAID: &str = "schema_steps";
/// Where nodes of the last release look.
const LAID_BEFORE: &str = "_sqlx_migrations";

/// MySQL and MariaDB: a table, column, index or row that is there already.
const ALREADY_THERE: [u16; 4] = [1050, 1060, 1061, 1062];
/// SQLite has no number for it.
const ALREADY_THERE_TEXTS: [&str; 3] = ["already exists", "duplicate column name", "UNIQUE constraint failed"];

/// One node after the other: who comes while an index is built would wait for the table, and give up. The lock
/// ends with its connection.
const LOCK: &str = "SELECT GET_LOCK(CONCAT('im-presence ', MD5(DATABASE())), 3600)";
const UNLOCK: &str = "SELECT RELEASE_LOCK(CONCAT('im-presence ', MD5(DATABASE())))";

/// Lays what is missing. Writes nothing if nothing is missing, so a server that is read-only for now can be served from.
pub(super) async fn lay(connection: &mut AnyConnection) -> Result<(), MigrateError> {
    if missing(connection).await.is_empty() {
        return Ok(());
    }
    if connection.backend_name() != "MySQL" {
        return lay_missing(connection).await;
    }
    connection.execute(LOCK).await?;
    lay_missing(connection).await?;
    connection.execute(UNLOCK).await?;
    Ok(())
}

/// Which steps are done, and which are not known here.
pub(super) async fn steps(connection: &mut AnyConnection) -> Steps {
    let laid = connection.list_applied_migrations(LAID).await.unwrap_or_default();
    let laid: HashSet<i64> = laid.into_iter().map(|step| step.version).collect();
    let known: Vec<i64> = STEPS.iter().map(|(number, ..)| *number).collect();
    let mut unknown: Vec<i64> = laid.iter().copied().filter(|step| !known.contains(step)).collect();
    unknown.sort_unstable();
    let newest = laid.iter().copied().max().unwrap_or_default();
    Steps { newest, missing: known.into_iter().filter(|step| !laid.contains(step)).collect(), unknown }
}

async fn missing(connection: &mut AnyConnection) -> Vec<(i64, &'static str, &'static str)> {
    // An error here says that there is no such table; if it is another, the next statement meets it too.
    let laid = connection.list_applied_migrations(LAID).await.unwrap_or_default();
    let laid: HashSet<i64> = laid.into_iter().map(|step| step.version).collect();
    STEPS.into_iter().filter(|(number, ..)| !laid.contains(number)).collect()
}

async fn lay_missing(connection: &mut AnyConnection) -> Result<(), MigrateError> {
    connection.ensure_migrations_table(LAID).await?;
    for (number, name, text) in missing(connection).await {
        for statement in text.split(";\n").filter(|statement| !statement.trim().is_empty()) {
            unless_there(connection.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await.map(|_| ()))?;
        }
        let step = Migration::new(number, Cow::Borrowed(name), MigrationType::Simple, AssertSqlSafe(text).into_sql_str(), false);
        if number == 1 {
            connection.ensure_migrations_table(LAID_BEFORE).await?;
            let killed_half_way = format!("DELETE FROM {LAID_BEFORE} WHERE version = 1 AND success = FALSE");
            connection.execute(sqlx::raw_sql(AssertSqlSafe(killed_half_way))).await?;
            note(connection, LAID_BEFORE, &step).await?;
        }
        note(connection, LAID, &step).await?;
    }
    Ok(())
}

/// Writes down that a step is done, unless another node did meanwhile.
async fn note(connection: &mut AnyConnection, table: &str, step: &Migration) -> Result<(), MigrateError> {
    match connection.skip(table, step).await {
        Err(MigrateError::Execute(error)) => Ok(unless_there(Err(error))?),
        done => done,
    }
}

fn unless_there(done: Result<(), sqlx::Error>) -> Result<(), sqlx::Error> {
    let Err(sqlx::Error::Database(error)) = &done else { return done };
    let there = match error.try_downcast_ref::<MySqlDatabaseError>() {
        Some(error) => ALREADY_THERE.contains(&error.number()),
        None => ALREADY_THERE_TEXTS.iter().any(|text| error.message().contains(text)),
    };
    if there { Ok(()) } else { done }
}
