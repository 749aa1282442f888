//! Many users at once, written straight into the database: one device each, on gateways that never registered.

use im_presence::config::Config;
use im_presence::store::database::Database;

use crate::harness::cluster::TestDb;
use crate::harness::mariadb::MariaDb;

/// A database with users 1 to `users`, spread over `gateways`.
pub async fn users(users: u64, gateways: u64) -> TestDb {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut store = Config::load(None).expect("the defaults").store;
    store.url = db.url.clone().into();
    Database::open(&store).await.expect("lay the tables");
    let now = "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000 AS SIGNED)";
    db.run(&format!(
        "INSERT INTO lives (epoch, gateway_addr, kind, alive) \
         SELECT seq, CONCAT('gw-', seq, '.example.net:7000'), 2, 1 FROM seq_1_to_{gateways}"
    ))
    .await;
    db.run(&format!("UPDATE cluster SET next_epoch = {gateways} + 1")).await;
    db.run(&format!(
        "INSERT INTO users (user_id, version, status, last_seen_ms) SELECT seq, {now} * 1000, 1, {now} FROM seq_1_to_{users}"
    ))
    .await;
    db.run(&format!(
        "INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, bound_version, \
         bound_at_ms, expires_at_ms) SELECT seq, 'phone', 1, 1 + seq % {gateways}, CONCAT('c-', seq), {now}, '192.0.2.17', 40000, \
         {now} * 1000, {now}, {now} + 3500000 FROM seq_1_to_{users}"
    ))
    .await;
    db
}
