//! What the store promises, each promise kept on both engines: SQLite in a file, and a real MariaDB.

mod server;

use std::collections::BTreeSet;
use std::time::Duration;
use std::time::Instant;

use serde_json::json;

use crate::config::Config;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::user::Platform;
use crate::domain::user::Route;
use crate::domain::user::UserRecord;
use crate::store::codec::OutboxBody;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::database::Database;
use crate::store::database::OpenError;
use crate::store::users::UserChange;

const DEADLINE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
const TERM: Duration = Duration::from_millis(200);

async fn each_engine(test: impl AsyncFn(&Database)) {
    let directory = tempfile::tempdir().unwrap();
    test(&open(&sqlite(&directory)).await.unwrap()).await;
    on_mysql(test).await;
}

async fn on_mysql(test: impl AsyncFn(&Database)) {
    test(&open(&server::fresh_database().await).await.unwrap()).await;
}

fn sqlite(directory: &tempfile::TempDir) -> String {
    format!("sqlite://{}", directory.path().join("test.db").display())
}

async fn open(url: &str) -> Result<Database, OpenError> {
    let mut store = Config::load(None).unwrap().store;
    store.url = serde_json::from_value(json!(url)).unwrap();
    Database::open(&store).await
}

async fn lane(database: &Database) -> Connection {
    database.connect(Purpose::Lane).await.unwrap()
}

fn user(id: i64) -> UserId {
    UserId::parse(id).unwrap()
}

fn users(ids: impl IntoIterator<Item = i64>) -> Vec<UserId> {
    ids.into_iter().map(user).collect()
}

fn gateway(name: &str) -> GatewayAddr {
    GatewayAddr::parse(name).unwrap()
}

fn route(device: &str, bound_version: u64) -> Route {
    Route {
        device: DeviceId::parse(device).unwrap(),
        platform: Platform::Unspecified,
        epoch: Epoch(9),
        conn: ConnId::parse("").unwrap(),
        connected_at: Timestamp(1),
        client_ip: None,
        client_port: 0,
        bound_version: Version(bound_version),
        bound_at: Timestamp(2),
        expires_at: None,
    }
}

/// Routes in the order of their devices, as bytes.
fn record(version: u64, routes: Vec<Route>) -> UserRecord {
    UserRecord { version: Version(version), status: Status::Online, last_seen: Timestamp(3), routes }
}

async fn load(connection: &mut Connection, id: i64) -> UserRecord {
    let mut record = connection.load_users(&[user(id)]).await.unwrap().records.remove(&user(id)).unwrap();
    record.routes.sort_by(|a, b| a.device.cmp(&b.device));
    record
}

/// Locks a user and writes `after`, as a lane does. The transaction is left open.
async fn write(connection: &mut Connection, id: i64, after: &UserRecord) {
    connection.begin().await.unwrap();
    connection.lock_users(&[user(id)]).await.unwrap();
    let before = load(connection, id).await;
    connection.write_users(&[UserChange { user: user(id), before: &before, after }]).await.unwrap();
}

async fn store(connection: &mut Connection, id: i64, after: &UserRecord) {
    write(connection, id, after).await;
    connection.commit().await.unwrap();
    assert_eq!(load(connection, id).await, *after);
}

async fn count(connection: &mut Connection, table: &str) -> i64 {
    let rows = connection.fetch(statement(format!("SELECT COUNT(*) FROM {table}"))).await.unwrap();
    sqlx::Row::get(&rows[0], 0)
}

#[tokio::test]
async fn tables_are_laid_once_whoever_comes_and_how_often() {
    let url = server::fresh_database().await;
    let (first, second, third) = tokio::join!(open(&url), open(&url), open(&url));
    let ids = BTreeSet::from([first, second, third].map(|database| database.unwrap().store_id));
    assert_eq!(ids.len(), 1, "one store, one id");
    assert_eq!(open(&url).await.unwrap().store_id, *ids.first().unwrap());

    let directory = tempfile::tempdir().unwrap();
    let first = open(&sqlite(&directory)).await.unwrap().store_id;
    assert_eq!(open(&sqlite(&directory)).await.unwrap().store_id, first);
    assert!(!ids.contains(&first), "another store, another id");
}

#[tokio::test]
async fn a_sqlite_file_serves_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let first = open(&sqlite(&directory)).await.unwrap();
    assert!(matches!(open(&sqlite(&directory)).await, Err(OpenError::InUse(_))));
    drop(first);
    assert!(open(&sqlite(&directory)).await.is_ok());
}

#[tokio::test]
async fn what_is_written_is_read_back() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let full = Route {
            platform: Platform::Other,
            epoch: Epoch((1 << 53) - 1),
            conn: ConnId::parse(&"c".repeat(128)).unwrap(),
            connected_at: Timestamp(-1),
            client_ip: Some("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap()),
            client_port: u16::MAX,
            bound_version: Version((1 << 53) - 1),
            bound_at: Timestamp(i64::from(u32::MAX) * 1_000),
            expires_at: Some(Timestamp(4)),
            ..route(&"d".repeat(128), 1)
        };
        let plain = Route { client_ip: Some("::ffff:10.0.0.1".parse().unwrap()), ..route("", 1) };
        let record = UserRecord { status: Status::Invisible, ..record((1 << 53) - 1, vec![plain, full]) };
        store(connection, i64::MAX, &record).await;
    })
    .await;
}

#[tokio::test]
async fn device_ids_are_bytes() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let devices = ["", "007", "7", "Bob", "bob", "bob_", "bob~", "bo%"];
        let mut routes: Vec<Route> = devices.iter().zip(1..).map(|(device, version)| route(device, version)).collect();
        routes.sort_by(|a, b| a.device.cmp(&b.device));
        store(connection, 1, &record(9, routes)).await;
    })
    .await;
}

#[tokio::test]
async fn one_write_may_add_change_and_remove_devices() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        store(connection, 1, &record(2, vec![route("a", 1), route("b", 2)])).await;
        store(connection, 1, &record(3, vec![route("b", 2), route("c", 3)])).await;
        store(connection, 1, &record(4, vec![route("b", 4), route("c", 3), route("d", 4)])).await;
        store(connection, 1, &record(5, vec![])).await;
        assert_eq!(count(connection, "routes").await, 0);
    })
    .await;
}

#[tokio::test]
async fn many_users_are_written_at_once() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let users = users((1..=1_500).map(|id| id * 3));
        let before = UserRecord::default();
        let after: Vec<UserRecord> = (1..=1_500).map(|version| record(version, vec![route("phone", version)])).collect();
        for gone in [false, true] {
            let changes: Vec<UserChange<'_>> = match gone {
                false => {
                    users.iter().zip(&after).map(|(user, after)| UserChange { user: *user, before: &before, after }).collect()
                }
                true => users.iter().zip(&after).map(|(user, b)| UserChange { user: *user, before: b, after: &before }).collect(),
            };
            connection.begin().await.unwrap();
            connection.lock_users(&users).await.unwrap();
            connection.write_users(&changes).await.unwrap();
            connection.commit().await.unwrap();
            let loaded = connection.load_users(&users).await.unwrap().records;
            assert_eq!(loaded.len(), users.len());
            for change in &changes {
                assert_eq!(loaded[&change.user], *change.after);
            }
            assert_eq!(count(connection, "routes").await, if gone { 0 } else { 1_500 });
        }
    })
    .await;
}

#[tokio::test]
async fn nobody_is_a_record_of_version_0() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        store(connection, 1, &record(5, vec![])).await;
        let loaded = connection.load_users(&users([1, 2])).await.unwrap();
        assert_eq!(loaded.records[&user(2)], UserRecord::default());
        assert!(loaded.clock.version() > Version(1_600_000_000_000_000), "microseconds since 1970");
        assert!(connection.load_users(&[]).await.unwrap().records.is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_rolled_back_transaction_leaves_nothing() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        write(connection, 1, &record(5, vec![route("phone", 5)])).await;
        connection.add_outbox("node", &OutboxBody::default()).await.unwrap();
        connection.rollback().await.unwrap();
        for table in ["users", "routes", "outbox"] {
            assert_eq!(count(connection, table).await, 0, "{table}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_locked_user_stays_locked_until_the_transaction_ends() {
    on_mysql(async |database| {
        let (one, other) = (&mut lane(database).await, &mut lane(database).await);
        one.begin().await.unwrap();
        one.lock_users(&users([1, 2])).await.unwrap(); // nobody has heard of them
        other.begin().await.unwrap();
        other.lock_users(&users([3])).await.unwrap();
        let began = Instant::now();
        assert!(matches!(other.lock_users(&users([2])).await, Err(SqlError::Locked)));
        assert!(began.elapsed() >= Duration::from_millis(900), "it waited for {:?}", began.elapsed());
        other.rollback().await.unwrap();
        one.rollback().await.unwrap();
        other.begin().await.unwrap();
        other.lock_users(&users([1, 2, 3])).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn locked_users_are_named_exactly() {
    on_mysql(async |database| {
        let (one, other) = (&mut lane(database).await, &mut lane(database).await);
        store(one, 1, &record(1, vec![])).await;
        store(one, 2, &record(1, vec![])).await;
        one.begin().await.unwrap();
        one.lock_users(&users([2, 4])).await.unwrap(); // 4 is new
        assert_eq!(other.locked_users(&users([1, 2, 3, 4, 5])).await.unwrap(), users([2, 4]));
        other.begin().await.unwrap();
        other.lock_users(&users([1, 3])).await.unwrap(); // looking has left no locks, and READ COMMITTED is back
        assert_eq!(load(other, 4).await, UserRecord::default());
        other.rollback().await.unwrap();
        one.rollback().await.unwrap();
        assert_eq!(other.locked_users(&users([1, 2, 3, 4, 5])).await.unwrap(), []);
    })
    .await;
}

#[tokio::test]
async fn a_statement_without_an_answer_costs_the_connection() {
    on_mysql(async |database| {
        let connection = &mut lane(database).await;
        let began = Instant::now();
        let error = connection.execute(statement("DO SLEEP(60)")).await.unwrap_err();
        assert!(matches!(error, SqlError::Lost(_)), "{error}");
        assert!(began.elapsed() < DEADLINE);
    })
    .await;
}

/// The life of a gateway that has never registered.
async fn begin_life(connection: &mut Connection, name: &str) -> Life {
    connection.begin_unmanaged_life(&gateway(name)).await.unwrap();
    let lives = connection.current_lives(&[gateway(name)]).await.unwrap();
    assert_eq!(lives.len(), 1, "a gateway lives one life at a time: {lives:?}");
    Life::clone(&lives[0])
}

#[tokio::test]
async fn a_gateway_lives_one_life_and_no_two_have_the_same_epoch() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        assert_eq!(connection.current_lives(&[gateway("gw-1:7000")]).await.unwrap(), []);
        let first = begin_life(connection, "gw-1:7000").await;
        let want =
            Life { epoch: first.epoch, gateway: gateway("gw-1:7000"), kind: LifeKind::Unmanaged, alive: true, ..first.clone() };
        assert_eq!(first, want);
        assert_eq!(begin_life(connection, "gw-1:7000").await, first, "it has a life");
        let second = begin_life(connection, "GW-1:7000").await;
        assert!(second.epoch > first.epoch);
        connection.execute(statement(format!("UPDATE lives SET alive = 0 WHERE epoch = {}", first.epoch.0))).await.unwrap();
        let third = begin_life(connection, "gw-1:7000").await;
        assert!(third.epoch > second.epoch);

        let epochs = [first.epoch, second.epoch, third.epoch, Epoch(1)];
        let mut lives = connection.lives_by_epoch(&epochs).await.unwrap();
        lives.sort_by_key(|life| life.epoch);
        let alive: Vec<(Epoch, bool)> = lives.iter().map(|life| (life.epoch, life.alive)).collect();
        assert_eq!(alive, [(first.epoch, false), (second.epoch, true), (third.epoch, true)]);
        assert_eq!(connection.read_lives().await.unwrap().len(), 3, "routes may still name the dead one");
    })
    .await;
}

#[tokio::test]
async fn two_nodes_that_begin_a_life_at_once_begin_one() {
    on_mysql(async |database| {
        let (one, other) = (&mut lane(database).await, &mut lane(database).await);
        for i in 0..20 {
            let address = gateway(&format!("gw-{i}:7000"));
            let (first, second) = tokio::join!(one.begin_unmanaged_life(&address), other.begin_unmanaged_life(&address));
            first.and(second).unwrap();
            assert_eq!(one.current_lives(&[address]).await.unwrap().len(), 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_job_is_one_nodes_at_a_time() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        assert!(connection.claim_job("sweep", "a", Duration::from_secs(60)).await.unwrap());
        assert!(!connection.claim_job("sweep", "b", TERM).await.unwrap());
        assert!(connection.claim_job("census", "b", TERM).await.unwrap(), "another job is free");
        assert!(connection.claim_job("sweep", "a", TERM).await.unwrap(), "its holder goes on, for this long");
        let began = Instant::now();
        while !connection.claim_job("sweep", "b", DEADLINE).await.unwrap() {
            assert!(began.elapsed() < DEADLINE, "the claim of a node that has stopped does not end");
            tokio::time::sleep(POLL).await;
        }
        assert!(!connection.claim_job("sweep", "a", TERM).await.unwrap());
    })
    .await;
}

#[tokio::test]
async fn two_nodes_that_claim_a_job_at_once_do_not_both_get_it() {
    on_mysql(async |database| {
        let (one, other) = (&mut lane(database).await, &mut lane(database).await);
        let (first, second) = tokio::join!(one.claim_job("sweep", "a", DEADLINE), other.claim_job("sweep", "b", DEADLINE));
        assert!(first.unwrap() ^ second.unwrap());
    })
    .await;
}

#[tokio::test]
async fn an_outbox_row_that_is_done_goes_unless_another_node_has_claimed_it() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let mut body = OutboxBody::default();
        body.changed(user(1), Version(5));
        let mut rows = Vec::new();
        for _ in 0..3 {
            rows.push(connection.add_outbox("node", &body).await.unwrap());
        }
        connection.delete_outbox(&rows[..1]).await.unwrap();
        connection.delete_outbox(&rows[..1]).await.unwrap();
        assert_eq!(connection.count_outbox().await.unwrap(), 2);
        connection
            .execute(statement(
                "UPDATE outbox SET claimed_by = 'other' WHERE id = (SELECT * FROM (SELECT MAX(id) FROM outbox) newest)",
            ))
            .await
            .unwrap();
        connection.delete_outbox(&rows).await.unwrap();
        assert_eq!(connection.count_outbox().await.unwrap(), 1);
        connection.delete_outbox(&[]).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn users_with_expired_routes_are_found_the_longest_expired_first() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        for (id, expires_at) in [(1, Some(30)), (2, Some(10)), (3, None), (4, Some(31)), (5, Some(20))] {
            let route = Route { expires_at: expires_at.map(Timestamp), ..route("phone", 1) };
            store(connection, id, &record(1, vec![route])).await;
        }
        assert_eq!(connection.expired_users(Timestamp(30), 10).await.unwrap(), users([2, 5, 1]));
        assert_eq!(connection.expired_users(Timestamp(30), 2).await.unwrap(), users([2, 5]));
        assert_eq!(connection.expired_users(Timestamp(9), 10).await.unwrap(), []);
        assert_eq!(connection.count_users_online().await.unwrap(), 5);
    })
    .await;
}

#[tokio::test]
async fn the_generation_is_raised_once_for_what_was_seen() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let seen = connection.read_cluster().await.unwrap();
        assert!(seen.clock.now() > Timestamp(1_600_000_000_000), "milliseconds since 1970");
        connection.raise_generation(seen.generation).await.unwrap();
        connection.raise_generation(seen.generation).await.unwrap();
        assert_eq!(connection.read_cluster().await.unwrap().generation, seen.generation + 1);
    })
    .await;
}

#[tokio::test]
async fn what_durable_rests_on_is_told() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let durability = database.durability(connection).await.unwrap();
        let want = match database.engine {
            Engine::Sqlite => "synchronous = FULL",
            Engine::MySql => "innodb_flush_log_at_trx_commit = 1",
        };
        assert!(durability.rests_on.contains(want), "{durability:?}");
        assert!(durability.weaknesses.is_empty(), "{durability:?}");
    })
    .await;
}

#[tokio::test]
async fn sqlite_is_as_durable_as_it_says() {
    let directory = tempfile::tempdir().unwrap();
    let database = open(&sqlite(&directory)).await.unwrap();
    let connection = &mut lane(&database).await;
    let synchronous = connection.fetch(statement("PRAGMA synchronous")).await.unwrap();
    let journal = connection.fetch(statement("PRAGMA journal_mode")).await.unwrap();
    assert_eq!((sqlx::Row::get::<i64, _>(&synchronous[0], 0), sqlx::Row::get::<&str, _>(&journal[0], 0)), (2, "wal"));
}
