//! Why a database cannot be opened.

use crate::store::connection::SqlError;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("another process uses {0}: one SQLite file serves one node; several nodes need store.url = mysql://...")]
    InUse(String),
    #[error("cannot lock {path}: {cause}")]
    Lock { path: String, cause: std::io::Error },
    #[error("cannot create the tables: {0}")]
    Migrate(#[from] sqlx::migrate::MigrateError),
    #[error(transparent)]
    Sql(#[from] SqlError),
    #[error("no answer")]
    NoAnswer,
}
