//! What a database's error means for the connection, the transaction and whoever asked.
//!
//! Few errors are about one row: its data, a constraint, a packet that is too large. Only those are the caller's. Every other
//! number, also one that nobody here has heard of, is the server's trouble: nothing is wrong with what was asked, so it is
//! asked again, on a connection made anew.

use sqlx::mysql::MySqlDatabaseError;
use sqlx::sqlite::SqliteError;

/// What went wrong, by what it means for the connection and the transaction on it.
#[derive(Debug, thiserror::Error)]
pub enum SqlError {
    /// The connection is of no use any more, or the server behind it is not. Whether the last statement was carried out is
    /// unknown.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The server does not let this user do what the daemon needs. As [`SqlError::Lost`], until somebody grants it.
    #[error("the database refuses this user something: {0}")]
    Denied(String),
    /// The server has no room or no memory, or its disk fails. The transaction has to be rolled back.
    #[error("the database cannot do it now: {0}")]
    Ill(String),
    /// The database chose this transaction as a victim. It is rolled back; run it again.
    #[error("deadlock")]
    Deadlock,
    /// Somebody else holds a row. The transaction stays open; roll it back.
    #[error("a row is locked")]
    Locked,
    /// This statement with these rows failed. Trying again will not help.
    #[error("statement failed: {0}")]
    Failed(#[source] sqlx::Error),
}

/// Numbers of MySQL and MariaDB.
mod mysql {
    pub const LOCK_WAIT_TIMEOUT: u16 = 1205;
    /// A deadlock; a row that changed since the snapshot (MariaDB); a Galera or group replication transaction that was not
    /// certified at COMMIT, because another member changed the same rows: rolled back, and as good as never run.
    /// TiDB's write conflicts.
    pub const DEADLOCK: [u16; 6] = [1213, 1020, 3101, 8002, 8022, 9007];
    /// An error during COMMIT, which the text has by number: a deadlock too, or anything.
    pub const DURING_COMMIT: u16 = 1180;
    pub const DEADLOCK_DURING_COMMIT: &str = "149";
    /// Disk or table full, error of a file or of the engine, out of memory, threads or room for locks.
    pub const ILL: [u16; 11] = [1021, 1024, 1026, 1030, 1037, 1038, 1041, 1114, 1135, 1206, 3013];
    /// Access denied to the account, the database, a table or a column; a password that expired; an account that is locked.
    pub const DENIED: [u16; 14] = [1044, 1045, 1130, 1142, 1143, 1227, 1251, 1370, 1698, 1820, 1862, 3118, 3159, 4151];
    /// About the rows of this statement: values, constraints (a trigger may be one), and sizes that fewer rows may fit into.
    pub const ROWS: [u16; 27] = [
        1048, 1062, 1118, 1153, 1162, 1169, 1197, 1216, 1217, 1264, 1265, 1292, 1301, 1366, 1367, 1406, 1411, 1451, 1452, 1526,
        1557, 1586, 1644, 1690, 1713, 3819, 4025,
    ];
}

/// Primary result codes of SQLite.
mod sqlite {
    pub const DENIED: [i32; 2] = [3, 23];
    pub const BUSY: [i32; 2] = [5, 6];
    /// Out of memory, I/O error, disk full.
    pub const ILL: [i32; 3] = [7, 10, 13];
    /// Too big, constraint, mismatch.
    pub const ROWS: [i32; 3] = [18, 19, 20];
}

impl SqlError {
    /// Whether whoever owns the connection has to drop it.
    pub fn ends_connection(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Denied(_))
    }

    /// What the server said, without what that means.
    pub fn cause(&self) -> String {
        match self {
            Self::Lost(cause) | Self::Denied(cause) | Self::Ill(cause) => cause.clone(),
            other => other.to_string(),
        }
    }

    fn of_mysql(number: u16, error: sqlx::Error) -> Self {
        match number {
            mysql::LOCK_WAIT_TIMEOUT => Self::Locked,
            number if mysql::DEADLOCK.contains(&number) => Self::Deadlock,
            mysql::DURING_COMMIT if error.to_string().contains(mysql::DEADLOCK_DURING_COMMIT) => Self::Deadlock,
            number if mysql::ILL.contains(&number) => Self::Ill(error.to_string()),
            number if mysql::DENIED.contains(&number) => Self::Denied(error.to_string()),
            number if mysql::ROWS.contains(&number) => Self::Failed(error),
            _ => Self::Lost(error.to_string()),
        }
    }

    fn of_sqlite(code: i32, error: sqlx::Error) -> Self {
        match code & 0xff {
            code if sqlite::BUSY.contains(&code) || sqlite::ILL.contains(&code) => Self::Ill(error.to_string()),
            code if sqlite::DENIED.contains(&code) => Self::Denied(error.to_string()),
            code if sqlite::ROWS.contains(&code) => Self::Failed(error),
            _ => Self::Lost(error.to_string()),
        }
    }
}

impl From<sqlx::Error> for SqlError {
    fn from(error: sqlx::Error) -> Self {
        let sqlx::Error::Database(database) = &error else {
            return match error {
                sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => Self::Failed(error),
                other => Self::Lost(other.to_string()),
            };
        };
        if let Some(number) = database.try_downcast_ref::<MySqlDatabaseError>().map(MySqlDatabaseError::number) {
            return Self::of_mysql(number, error);
        }
        let code = database.try_downcast_ref::<SqliteError>().and(database.code()).and_then(|code| code.parse().ok());
        match code {
            Some(code) => Self::of_sqlite(code, error),
            None => Self::Lost(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(error: &SqlError) -> &'static str {
        match error {
            SqlError::Lost(_) => "lost",
            SqlError::Denied(_) => "denied",
            SqlError::Ill(_) => "ill",
            SqlError::Deadlock => "deadlock",
            SqlError::Locked => "locked",
            SqlError::Failed(_) => "failed",
        }
    }

    #[track_caller]
    fn check(want: &str, mysql: &[u16], sqlite: &[i32]) {
        for number in mysql {
            assert_eq!(kind(&SqlError::of_mysql(*number, sqlx::Error::RowNotFound)), want, "MySQL {number}");
        }
        for code in sqlite {
            assert_eq!(kind(&SqlError::of_sqlite(*code, sqlx::Error::RowNotFound)), want, "SQLite {code}");
        }
    }

    #[test]
    fn only_errors_about_the_rows_are_the_callers() {
        check("failed", &[1048, 1062, 1153, 1197, 1264, 1366, 1406, 1452, 4025], &[18, 19, 20, 1555, 2067]);
        check("deadlock", &[1213, 1020, 3101, 8002, 8022, 9007], &[]);
        let certified = |text: &str| SqlError::of_mysql(1180, sqlx::Error::Protocol(text.to_owned()));
        assert_eq!(kind(&certified("Got error 149 \"Lock deadlock; Retry transaction\" during COMMIT")), "deadlock");
        assert_eq!(
            kind(&certified("Got error 5 \"Input/output error\" during COMMIT")),
            "lost",
            "whether it was done is unknown"
        );
        check("locked", &[1205], &[]);
        check("ill", &[1021, 1030, 1038, 1041, 1114, 3013], &[7, 10, 13, 5, 266, 778]);
        check("denied", &[1044, 1045, 1142, 1143, 1227], &[3, 23]);
        // The session or the server: too many connections, read-only, shutting down, not part of a Galera cluster, a
        // missing table, and whatever nobody has heard of.
        let lost = [
            1040, 1047, 1049, 1053, 1129, 1146, 1158, 1161, 1176, 1203, 1226, 1290, 1317, 1792, 1836, 1927, 2006, 2055, 3100,
            3168, 3169, 4031, 8027, 8028, 9001, 9005, 9010, 9_999,
        ];
        check("lost", &lost, &[1, 8, 11, 14, 26, 1032, 99]);
    }
}
