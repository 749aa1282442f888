//! A MariaDB primary, and a replica that follows it.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use sqlx::Row;

use crate::harness::cluster::connect;
use crate::harness::mariadb::MariaDb;

const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(10);

pub struct Replicas {
    pub primary: MariaDb,
    pub replica: MariaDb,
}

impl Replicas {
    pub async fn start() -> Self {
        let options = |id: u32| {
            let id = format!("--server-id={id}");
            ["--log-bin=log", "--log-slave-updates", "--binlog-format=ROW", "--sync-binlog=1", &id].map(str::to_owned).to_vec()
        };
        let mut read_only = options(2);
        read_only.push("--read-only=1".to_owned());
        let pair = Self { primary: MariaDb::start_with(options(1)), replica: MariaDb::start_with(read_only) };
        let follow = format!(
            "CHANGE MASTER TO master_host = '127.0.0.1', master_port = {}, master_user = 'root', master_use_gtid = slave_pos; \
             START SLAVE",
            pair.primary.port
        );
        run(&pair.replica, &follow).await;
        pair
    }

    /// Waits until the replica has all that the primary has.
    pub async fn catch_up(&self) {
        let there = text(&self.primary, "SELECT @@gtid_binlog_pos").await;
        // Or more: beats are written each second.
        let wait = format!("SELECT CAST(MASTER_GTID_WAIT('{there}', {}) AS CHAR)", CAUGHT_UP_WITHIN.as_secs());
        assert_eq!(text(&self.replica, &wait).await, "0", "the replica has caught up");
    }

    /// From now on the replica hears nothing.
    pub async fn part(&self) {
        self.catch_up().await;
        run(&self.replica, "STOP SLAVE").await;
    }

    /// The replica takes writes. The former primary is as it was.
    pub async fn promote(&self) {
        run(&self.replica, "STOP SLAVE; RESET SLAVE ALL; SET GLOBAL read_only = 0").await;
    }
}

pub async fn run(server: &MariaDb, sql: &str) {
    let mut connection = connect(&server.url("")).await;
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// What `sql` selects.
pub async fn text(server: &MariaDb, sql: &str) -> String {
    let mut connection = connect(&server.url("")).await;
    let row = sqlx::query(AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await;
    row.and_then(|row| row.try_get(0)).unwrap_or_else(|error| panic!("{sql}: {error}"))
}
