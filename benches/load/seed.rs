//! Many users at once, written straight into the database: one device each, on gateways that never registered.

use std::time::Duration;

use im_presence::config::Config;
use im_presence::store::database::Database;

use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;

/// Users of one statement: a transaction that is larger costs more than it saves.
const AT_ONCE: u64 = 1_000_000;
const SHOWN_WITHIN: Duration = Duration::from_secs(900);

/// A database with users 1 to `users`, spread over `gateways`.
pub async fn users(users: u64, gateways: u64) -> TestDb {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    fill(&db, users, gateways).await;
    db
}

/// The same in an empty database of either engine.
pub async fn fill(db: &TestDb, users: u64, gateways: u64) {
    let mut store = Config::load(None).expect("the defaults").store;
    store.url = db.url.clone().into();
    Database::open(&store).await.expect("lay the tables");
    let is_sqlite = db.url.starts_with("sqlite");
    let (now, gateway) = match is_sqlite {
        true => ("CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)", "'gw-' || seq || '.example.net:7000'"),
        false => ("CAST(UNIX_TIMESTAMP(NOW(6)) * 1000 AS SIGNED)", "CONCAT('gw-', seq, '.example.net:7000')"),
    };
    let numbers = |from: u64, to: u64| match is_sqlite {
        true => format!(
            "(WITH RECURSIVE n (seq) AS (SELECT {from} UNION ALL SELECT seq + 1 FROM n WHERE seq < {to}) SELECT seq FROM n) AS numbers"
        ),
        false => format!("seq_{from}_to_{to}"),
    };
    let all = numbers(1, gateways);
    db.run(&format!("INSERT INTO lives (epoch, gateway_addr, kind, alive) SELECT seq, {gateway}, 2, 1 FROM {all}")).await;
    db.run(&format!("UPDATE cluster SET next_epoch = {gateways} + 1")).await;
    let mut from = 1;
    while from <= users {
        let to = users.min(from + AT_ONCE - 1);
        let some = numbers(from, to);
        db.run(&format!(
            "INSERT INTO users (user_id, version, status, last_seen_ms) SELECT seq, {now} * 1000, 1, {now} FROM {some}"
        ))
        .await;
        let conn = if is_sqlite { "'c-' || seq" } else { "CONCAT('c-', seq)" };
        db.run(&format!(
            "INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, \
             bound_version, bound_at_ms, expires_at_ms) SELECT seq, 'phone', 1, 1 + seq % {gateways}, {conn}, {now}, '192.0.2.17', \
             40000, {now} * 1000, {now}, {now} + 3500000 FROM {some}"
        ))
        .await;
        from = to + 1;
    }
}

/// In a Redis that is new, one node of a MariaDB shows all users, and is busy with that.
pub async fn everybody_is_shown(db: &TestDb) {
    const DONE: &str =
        "SELECT COUNT(*) FROM jobs, cluster WHERE name = CONCAT('show generation ', generation) AND node_id = 'done'";
    eventually("everybody is shown", SHOWN_WITHIN, async || db.number(DONE).await > 0).await;
}
