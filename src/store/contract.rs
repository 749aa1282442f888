//! What the store promises, each promise kept on both engines: SQLite in a file, and a real MariaDB.

mod digests;
mod history;
mod schema;
mod server;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashSet;
use std::time::Duration;
use std::time::Instant;

use serde_json::json;
use sqlx::Row;

use crate::config::Config;
use crate::domain::gateway::Beat;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Profile;
use crate::domain::gateway::Registration;
use crate::domain::history::OnlineSession;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::inbox::Inbox;
use crate::domain::route::Platform;
use crate::domain::route::Route;
use crate::domain::status::MAX_TEXT_BYTES;
use crate::domain::status::Status;
use crate::domain::status::StatusText;
use crate::domain::status::Wish;
use crate::domain::time::Expiry;
use crate::domain::time::Timestamp;
use crate::domain::user::LastShown;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;
use crate::store::codec::OutboxBody;
use crate::store::column::clock_millis;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::database::Database;
use crate::store::ended_lives::Ending;
use crate::store::lives::Begun;
use crate::store::lives::Listed;
use crate::store::open_error::OpenError;
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
        expires_at: Expiry::default(),
        idle: false,
    }
}

/// Routes in the order of their devices, as bytes.
fn record(version: u64, routes: Vec<Route>) -> UserRecord {
    UserRecord {
        version: Version(version),
        last_seen: Timestamp(3),
        routes: routes.into(),
        inbox_seq: 9,
        ..UserRecord::default()
    }
    .with(Presence {
        shown: LastShown { version: Version(version), seen: Timestamp(4), since: Timestamp(5) },
        ..Presence::default()
    })
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
            expires_at: Some(Timestamp(4)).into(),
            ..route(&"d".repeat(128), 1)
        };
        let plain = Route { client_ip: Some("::ffff:10.0.0.1".parse().unwrap()), idle: true, ..route("", 1) };
        let text = StatusText::parse("im Urlaub 🌴 \\ ' %", MAX_TEXT_BYTES).unwrap();
        let wish = Wish { status: Status::Invisible, text, until: Some(Timestamp(i64::from(u32::MAX) * 1_000)) };
        let session = OnlineSession { since: Timestamp(6), is_counted: true };
        let record = record((1 << 53) - 1, vec![plain, full]);
        let shown = record.shown();
        let record = record.with(Presence { wish, shown, session, banned_until: Timestamp(7) });
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

const LEASE: Duration = Duration::from_secs(15);

fn registration(name: &str) -> Registration {
    let labels = BTreeMap::from([("zone".to_owned(), "süd".to_owned())]);
    let public_addr = format!("wss://{name}");
    let profile = Profile { region: "eu".to_owned(), capacity: 10, labels, weight: 0, public_addr, login_rate: 500 };
    Registration { gateway: gateway(name), claimed: None, profile }
}

async fn register(connection: &mut Connection, name: &str) -> Begun {
    connection.begin_managed_life("node", &registration(name), LEASE, 5, || true).await.unwrap().expect("not too often")
}

/// A route beside the write path.
async fn insert_route(connection: &mut Connection, user: i64, epoch: Epoch) {
    const SQL: &str = "INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, \
        bound_version, bound_at_ms) VALUES (?, 'd', 0, ?, '', 0, '', 0, 1, 1)";
    connection.execute(statement(SQL).bind(user).bind(epoch.0 as i64)).await.unwrap();
}

/// As if nobody had said so for a lease, and nothing had been written for a while (or it had, all the time).
async fn lease_over(connection: &mut Connection, epoch: Epoch, continuous: bool) {
    let (since, beat) = if continuous { ("last_beat - 60000", "last_beat") } else { ("last_beat", "last_beat - 4000") };
    connection.beat_cluster().await.unwrap();
    connection.execute(statement(format!("UPDATE cluster SET continuous_since = {since}, last_beat = {beat}"))).await.unwrap();
    connection.execute(statement(format!("UPDATE lives SET lease_until = 1 WHERE epoch = {}", epoch.0))).await.unwrap();
}

#[tokio::test]
async fn a_registration_ends_the_former_life_and_five_are_enough() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let unmanaged = begin_life(connection, "gw-1:7000").await;
        let first = register(connection, "gw-1:7000").await;
        let ended = first.ended.expect("it had one");
        assert_eq!(
            ended.lives.iter().map(|life| (life.epoch, life.end.unwrap().reason)).collect::<Vec<_>>(),
            [(unmanaged.epoch, EndReason::Superseded)]
        );
        assert_eq!(connection.count_outbox().await.unwrap(), 1, "the end is told until somebody has heard it");
        assert!(first.life.is_managed() && first.life.is_alive());
        assert_eq!(first.life.lease_until.since(first.life.last_beat), LEASE);
        for _ in 0..4 {
            register(connection, "gw-1:7000").await;
        }
        assert!(connection.begin_managed_life("node", &registration("gw-1:7000"), LEASE, 5, || true).await.unwrap().is_none());
        assert!(register(connection, "gw-2:7000").await.ended.is_none(), "another address is free to register");
        assert_eq!(connection.current_lives(&[gateway("gw-1:7000")]).await.unwrap().len(), 1);

        let listed = connection.list_lives(Listed::Living, None, 100).await.unwrap();
        assert_eq!(listed.iter().map(|life| life.gateway.as_str()).collect::<Vec<_>>(), ["gw-1:7000", "gw-2:7000"]);
        assert_eq!(*listed[0].profile, registration("gw-1:7000").profile);
        assert_eq!(connection.list_lives(Listed::All, None, 100).await.unwrap().len(), 7);
        for (within, lives) in [(LEASE * 2, 2), (Duration::ZERO, 0)] {
            assert_eq!(connection.list_lives(Listed::Ending(within), None, 100).await.unwrap().len(), lives);
        }
    })
    .await;
}

#[tokio::test]
async fn a_beat_extends_what_lives_and_revives_nothing() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let (one, two) = (register(connection, "gw-1:7000").await.life, register(connection, "gw-2:7000").await.life);
        lease_over(connection, one.epoch, true).await;
        lease_over(connection, two.epoch, true).await;
        connection.end_lives("node", &[two.epoch], Ending::Unconditional(EndReason::Operator)).await.unwrap().expect("it lived");
        let beats = [one.epoch, two.epoch, Epoch(7)].map(|epoch| Beat { epoch, connections: 3, load: 0.5 });
        connection.beat_lives(&beats, LEASE).await.unwrap();
        let mut lives = connection.lives_by_epoch(&[one.epoch, two.epoch, Epoch(7)]).await.unwrap();
        lives.sort_by_key(|life| life.epoch);
        let seen: Vec<_> =
            lives.iter().map(|life| (life.is_alive(), life.lease_until > one.lease_until, life.connections)).collect();
        assert_eq!(seen.len(), 2);
        assert_eq!((seen[0].0, seen[0].2, seen[1]), (true, 3, (false, false, 0)));
        assert!(lives[0].lease_until >= one.lease_until);

        assert!(connection.resume_life(one.epoch, &registration("gw-1:7000"), LEASE).await.unwrap());
        assert!(!connection.resume_life(two.epoch, &registration("gw-2:7000"), LEASE).await.unwrap(), "it is over");
        assert!(!connection.resume_life(one.epoch, &registration("gw-3:7000"), LEASE).await.unwrap(), "it is another gateway's");
    })
    .await;
}

#[tokio::test]
async fn a_lease_that_is_over_is_a_death_only_if_beats_could_be_written_all_the_time_and_no_hold_is_on() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let life = register(connection, "gw-1:7000").await.life;
        let ending = Ending::Expired { lease: LEASE };
        let dies = async |connection: &mut Connection| {
            let ended = connection.end_lives("node", &[life.epoch], ending).await.unwrap();
            ended.map(|ended| ended.lives[0].end.unwrap().reason)
        };
        connection.beat_cluster().await.unwrap();
        assert_eq!(dies(connection).await, None, "its lease is not over");
        lease_over(connection, life.epoch, false).await;
        assert_eq!(dies(connection).await, None, "nobody could write lately");
        connection.beat_cluster().await.unwrap();
        assert_eq!(dies(connection).await, None, "not for a whole lease");

        lease_over(connection, life.epoch, true).await;
        assert!(connection.begin_hold(LEASE, LEASE, "test").await.unwrap());
        assert!(!connection.begin_hold(LEASE, LEASE, "again").await.unwrap(), "one is on");
        assert_eq!(dies(connection).await, None, "a hold is on");
        let hold = connection.read_cluster().await.unwrap().hold;
        assert_eq!((hold.is_by_doubt(), hold.reason.as_str()), (true, "doubt: test"));
        assert!(connection.end_hold(&hold).await.unwrap());
        assert!(!connection.end_hold(&hold).await.unwrap(), "it is over");
        assert_eq!(connection.count_outbox().await.unwrap(), 0);
        assert_eq!(dies(connection).await, Some(EndReason::Expired));
        assert_eq!(dies(connection).await, None, "it died once");
        assert_eq!(connection.count_outbox().await.unwrap(), 1, "told until somebody has heard it");
    })
    .await;
}

#[tokio::test]
async fn after_a_hold_that_ended_by_time_the_dead_count_for_nothing_and_none_begins_for_a_lease() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let life = register(connection, "gw-1:7000").await.life;
        lease_over(connection, life.epoch, true).await;
        assert!(connection.begin_hold(Duration::ZERO, LEASE, "test").await.unwrap());
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!connection.begin_hold(LEASE, LEASE, "again").await.unwrap(), "for one lease");
        let ended = connection.end_lives("node", &[life.epoch], Ending::Expired { lease: LEASE }).await.unwrap().expect("dies");
        assert_eq!(ended.lives[0].end.unwrap().reason, EndReason::Held);

        connection.set_hold(LEASE, LEASE, "maintenance").await.unwrap();
        let hold = connection.read_cluster().await.unwrap();
        assert!(hold.hold.is_on(hold.clock.now()) && !hold.hold.is_by_doubt());
        connection.set_hold(Duration::ZERO, LEASE, "").await.unwrap();
        let hold = connection.read_cluster().await.unwrap();
        assert!(!hold.hold.is_on(hold.clock.now()));
    })
    .await;
}

#[tokio::test]
async fn any_number_of_lives_ends_at_once() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let mut epochs = Vec::new();
        for n in 0..100 {
            epochs.push(register(connection, &format!("gw-{n}:7000")).await.life.epoch);
        }
        let ended =
            connection.end_lives("node", &epochs, Ending::Unconditional(EndReason::Operator)).await.unwrap().expect("they lived");
        assert_eq!(ended.lives.len(), 100);
        assert_eq!(connection.list_lives(Listed::Living, None, 100).await.unwrap().len(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_life_that_never_registered_ends_when_it_has_had_no_route_for_long() {
    const TERM: Duration = Duration::from_secs(60);
    const STRAGGLERS: Duration = Duration::from_secs(20);
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let (used, unused) = (begin_life(connection, "gw-1:7000").await, begin_life(connection, "gw-2:7000").await);
        let managed = register(connection, "gw-3:7000").await.life;
        insert_route(connection, 1, used.epoch).await;
        let later = async |connection: &mut Connection, by: Duration| {
            let sql = format!("UPDATE lives SET last_beat = last_beat - {} WHERE kind = 2 AND last_beat > 0", by.as_millis());
            connection.execute(statement(sql)).await.unwrap();
            connection.end_unused_lives(TERM, STRAGGLERS).await.unwrap()
        };
        assert_eq!(connection.end_unused_lives(TERM, STRAGGLERS).await.unwrap(), 0, "noticed");
        assert_eq!(later(connection, 2 * TERM).await, 0, "closed: a bind may still be on its way");
        let next = begin_life(connection, "gw-2:7000").await;
        assert!(next.epoch > unused.epoch, "nobody binds to it any more");
        assert_eq!(later(connection, 2 * STRAGGLERS).await, 1);
        let mut living: Vec<u64> =
            connection.list_lives(Listed::Living, None, 100).await.unwrap().iter().map(|life| life.epoch.0).collect();
        living.sort_unstable();
        assert_eq!(living, [used.epoch.0, managed.epoch.0, next.epoch.0]);
        assert_eq!(connection.unswept_lives().await.unwrap().len(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_life_that_is_used_again_stays_and_so_does_any_beside_a_node_that_knows_no_closed_ones() {
    const TERM: Duration = Duration::from_secs(60);
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let life = begin_life(connection, "gw-1:7000").await;
        let now = clock_millis(connection.engine());
        connection.end_unused_lives(TERM, TERM).await.unwrap();
        let old_node = format!("INSERT INTO nodes (node_id, addr, seen_at) VALUES ('old', 'x:1', {now})");
        connection.execute(statement(old_node)).await.unwrap();
        let long_ago = "UPDATE lives SET last_beat = last_beat - 100000 WHERE last_beat > 0";
        connection.execute(statement(long_ago)).await.unwrap();
        connection.end_unused_lives(TERM, TERM).await.unwrap();
        assert_eq!(begin_life(connection, "gw-1:7000").await.epoch, life.epoch, "it is not closed");
        connection.execute(statement("DELETE FROM nodes")).await.unwrap();
        insert_route(connection, 1, life.epoch).await;
        connection.end_unused_lives(TERM, TERM).await.unwrap();
        connection.execute(statement("DELETE FROM routes")).await.unwrap();
        connection.end_unused_lives(TERM, TERM).await.unwrap();
        connection.end_unused_lives(TERM, TERM).await.unwrap();
        assert_eq!(begin_life(connection, "gw-1:7000").await.epoch, life.epoch, "its time begins anew");
    })
    .await;
}

#[tokio::test]
async fn the_clock_was_not_watched_while_nobody_beat() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let watched_for = async |connection: &mut Connection| {
            let row = connection.read_cluster().await.unwrap();
            row.clock.now().since(row.continuous_since)
        };
        assert!(watched_for(connection).await < Duration::from_secs(1), "nobody has beaten yet");
        connection.beat_cluster().await.unwrap();
        connection.execute(statement("UPDATE cluster SET continuous_since = continuous_since - 100000")).await.unwrap();
        assert!(watched_for(connection).await >= Duration::from_secs(100));
        connection.execute(statement("UPDATE cluster SET last_beat = last_beat - 4000")).await.unwrap();
        assert!(watched_for(connection).await < Duration::from_secs(1), "a gap, which no beat has noted yet");
    })
    .await;
}

#[tokio::test]
async fn to_store_one_message_more_only_repeats_are_read_unless_something_is_over() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let (alice, bob, nobody) = (user(1), user(2), user(3));
        for (owner, seq, id, expires_at) in
            [(1, 1, "a", 100), (1, 2, "b", 200), (1, 3, " 3", 300), (2, 1, "a", 50), (2, 2, "c", 200)]
        {
            let insert = "INSERT INTO inbox (user_id, seq, message_id, message_type, stored_at, expires_at, is_binary, body) \
                VALUES (?, ?, ?, '', 1, ?, 0, 'four')";
            connection.execute(statement(insert).bind(owner).bind(seq).bind(id.to_owned()).bind(expires_at)).await.unwrap();
        }
        let wanted = [(alice, "b"), (alice, ""), (alice, "z"), (bob, "z"), (nobody, "a")];
        let inboxes = connection.load_inboxes_to_add(&wanted, Timestamp(60)).await.unwrap();
        let known = |owner: UserId| (1..=3).filter(|seq| inboxes[&owner].get(*seq).is_some()).collect::<Vec<_>>();
        assert_eq!((known(alice), known(bob), known(nobody)), (vec![2], vec![1, 2], vec![]), "one of Bob's is over");
        assert_eq!((inboxes[&alice].len(), inboxes[&bob].len(), inboxes[&nobody].len()), (3, 2, 0));
        let repeat = BTreeMap::from([(2, inboxes[&alice].get(2).unwrap().clone())]);
        assert_eq!(inboxes[&alice], Inbox::with_others(repeat, 2, 8));
    })
    .await;
}

#[tokio::test]
async fn users_with_nothing_and_of_long_ago_are_forgotten_in_pages() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        // Of 6 to 9, the first was erased long ago, the second lately; the third is away and wants to be INVISIBLE, the last BUSY.
        let rows = [(1, 10, 0, 1, 0), (2, 90, 0, 1, 0), (3, 10, 1, 1, 0), (4, 10, 0, 1, 0), (5, 10, 0, 1, 0)];
        let more = [(6, 70, 0, 1, 1), (7, 90, 0, 1, 1), (8, 10, 0, 4, 0), (9, 70, 0, 3, 0)];
        for (user, version, pending, status, counted) in rows.into_iter().chain(more) {
            let insert = "INSERT INTO users (user_id, version, inbox_pending, status, session_counted) VALUES (?, ?, ?, ?, ?)";
            let insert = statement(insert).bind(user).bind(version).bind(pending).bind(status).bind(counted);
            connection.execute(insert).await.unwrap();
        }
        insert_route(connection, 4, Epoch(1)).await;
        let (old, erased) = (Version(50), Version(80));
        assert_eq!(connection.forget_users(0, old, erased, 3).await.unwrap(), (1, Some(3)));
        assert_eq!(connection.forget_users(3, old, erased, 3).await.unwrap(), (2, Some(6)));
        assert_eq!(connection.forget_users(6, old, erased, 3).await.unwrap(), (0, Some(9)));
        assert_eq!(connection.forget_users(9, old, erased, 3).await.unwrap(), (0, None));
        let left = connection.fetch(statement("SELECT user_id FROM users ORDER BY user_id")).await.unwrap();
        let left: Vec<i64> = left.iter().map(|row| row.try_get(0).unwrap()).collect();
        assert_eq!(left, [2, 3, 4, 7, 8, 9]);
    })
    .await;
}

#[tokio::test]
async fn routes_that_name_a_life_nobody_knows_are_found() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let life = register(connection, "gw-1:7000").await.life;
        assert_eq!(connection.reopen_orphaned_lives().await.unwrap(), 0);
        for (user, epoch) in [(1, life.epoch), (2, Epoch(77))] {
            insert_route(connection, user, epoch).await;
        }
        connection
            .end_lives("node", &[life.epoch], Ending::Unconditional(EndReason::Deregistered))
            .await
            .unwrap()
            .expect("it lived");
        connection.mark_swept(life.epoch).await.unwrap();
        assert_eq!(connection.unswept_lives().await.unwrap().len(), 0);
        assert_eq!(connection.reopen_orphaned_lives().await.unwrap(), 2, "one was swept, one never was");
        let unswept: Vec<u64> = connection.unswept_lives().await.unwrap().iter().map(|life| life.epoch.0).collect();
        assert_eq!(HashSet::from([77, life.epoch.0]), unswept.into_iter().collect());
        assert_eq!(connection.users_of_life(life.epoch, 0, 10).await.unwrap().len(), 1);
        assert_eq!(connection.count_routes(&[life.epoch]).await.unwrap()[&life.epoch], 1);
    })
    .await;
}

#[tokio::test]
async fn a_gateway_lives_one_life_and_no_two_have_the_same_epoch() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        assert_eq!(connection.current_lives(&[gateway("gw-1:7000")]).await.unwrap(), []);
        let first = begin_life(connection, "gw-1:7000").await;
        assert_eq!(first, Life::begun(first.epoch, gateway("gw-1:7000"), LifeKind::Unmanaged, Timestamp(0)));
        assert_eq!(begin_life(connection, "gw-1:7000").await, first, "it has a life");
        let second = begin_life(connection, "GW-1:7000").await;
        assert!(second.epoch > first.epoch);
        connection.execute(statement(format!("UPDATE lives SET alive = 0 WHERE epoch = {}", first.epoch.0))).await.unwrap();
        let third = begin_life(connection, "gw-1:7000").await;
        assert!(third.epoch > second.epoch);

        let epochs = [first.epoch, second.epoch, third.epoch, Epoch(1)];
        let mut lives = connection.lives_by_epoch(&epochs).await.unwrap();
        lives.sort_by_key(|life| life.epoch);
        let alive: Vec<(Epoch, bool)> = lives.iter().map(|life| (life.epoch, life.is_alive())).collect();
        assert_eq!(alive, [(first.epoch, false), (second.epoch, true), (third.epoch, true)]);
        assert_eq!(connection.read_lives(Duration::ZERO, None).await.unwrap().len(), 3, "routes may still name the dead one");
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
        body.changed(user(1), &record(5, Vec::new()));
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
            let route = Route { expires_at: expires_at.map(Timestamp).into(), ..route("phone", 1) };
            store(connection, id, &record(1, vec![route])).await;
        }
        assert_eq!(connection.expired_users(Timestamp(30), 10).await.unwrap(), users([2, 5, 1]));
        assert_eq!(connection.expired_users(Timestamp(30), 2).await.unwrap(), users([2, 5]));
        assert_eq!(connection.expired_users(Timestamp(9), 10).await.unwrap(), []);
        assert_eq!(connection.count_users_online(&[]).await.unwrap(), 5);
        assert_eq!(connection.count_users_online(&[Epoch(8), Epoch(9), Epoch(10)]).await.unwrap(), 0);
        assert_eq!(connection.named_in_vain().await.unwrap(), [Epoch(9)], "nobody has heard of it");
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
async fn another_server_raises_the_generation_once_and_above_all_that_was_raised_before() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let first = connection.read_cluster().await.unwrap();
        connection.move_to("one", &first).await.unwrap();
        let known = connection.read_cluster().await.unwrap();
        assert_eq!((&*known.branch, known.generation), ("one", first.generation), "nobody was there before");
        connection.move_to("two", &known).await.unwrap();
        let moved = connection.read_cluster().await.unwrap();
        assert!(moved.branch == "two" && i64::try_from(moved.generation).unwrap() >= first.clock.now().0, "{moved:?}");
        connection.move_to("two", &known).await.unwrap(); // another node sees it, too
        assert_eq!(connection.read_cluster().await.unwrap().generation, moved.generation);
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

#[tokio::test]
async fn sqlite_has_room_for_the_pages_of_a_large_transaction() {
    let directory = tempfile::tempdir().unwrap();
    let database = open(&sqlite(&directory)).await.unwrap();
    let connection = &mut lane(&database).await;
    for (pragma, value) in [("cache_size", -8192), ("wal_autocheckpoint", 8192)] {
        let said = connection.fetch(statement(format!("PRAGMA {pragma}"))).await.unwrap();
        assert_eq!(sqlx::Row::get::<i64, _>(&said[0], 0), value, "{pragma}");
    }
}
