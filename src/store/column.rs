//! Values of columns and of parameters.

use std::time::Duration;

use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::statement::filled;

pub(super) fn clock_micros(engine: Engine) -> &'static str {
    match engine {
        Engine::MySql => "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED)",
        Engine::Sqlite => "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
    }
}

/// The same clock in milliseconds: what is stored.
pub(super) fn clock_millis(engine: Engine) -> &'static str {
    match engine {
        Engine::MySql => "CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)",
        Engine::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
    }
}

pub(super) fn duration_millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

pub(super) fn corrupt(column: &'static str, error: impl std::fmt::Display) -> SqlError {
    SqlError::Failed(sqlx::Error::Decode(format!("{column} {error}").into()))
}

/// Versions and epochs are below 2^53; columns are signed.
pub(super) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

pub(super) fn bind_users(mut statement: Statement, chunk: &[UserId], fill: usize) -> Statement {
    for user in filled(chunk, fill) {
        statement = statement.bind(user.get());
    }
    statement
}

pub(super) fn bind_epochs(mut statement: Statement, chunk: &[Epoch], fill: usize) -> Statement {
    for epoch in filled(chunk, fill) {
        statement = statement.bind(signed(epoch.0));
    }
    statement
}

pub(super) fn user_id(raw: i64) -> Result<UserId, SqlError> {
    UserId::parse(raw).map_err(|error| corrupt("user_id", error))
}
