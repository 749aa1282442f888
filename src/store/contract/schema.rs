//! The tables can be laid by anybody, in any company, however often somebody was killed while doing it.

use sqlx::AssertSqlSafe;
use sqlx::SqlSafeStr;
use sqlx::migrate::Migration;
use sqlx::migrate::MigrationType;
use sqlx::migrate::Migrator;

use super::*;
use crate::store::connection::Opening;

const INIT: &str = include_str!("../../../migrations/0001_init.sql");

/// How the last release lays its tables.
fn last_release() -> Migrator {
    let sql = AssertSqlSafe(INIT).into_sql_str();
    let mut migrator = Migrator::with_migrations(vec![Migration::new(1, "init".into(), MigrationType::Simple, sql, false)]);
    migrator.set_locking(false);
    migrator
}

async fn bare(url: &str) -> Connection {
    let engine = if url.starts_with("sqlite:") { Engine::Sqlite } else { Engine::MySql };
    let opening = Opening { engine, purpose: Purpose::General, limit: DEADLINE, deadline: DEADLINE };
    Connection::open(url, opening).await.unwrap()
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_lays_the_tables_can_be_started_again() {
    let statements: Vec<&str> = INIT.split(";\n").filter(|statement| !statement.trim().is_empty()).collect();
    for cut in 0..=statements.len() {
        let url = server::fresh_database().await;
        let mut killed = bare(&url).await;
        // What the last release leaves behind: its migration is begun and not done.
        let begun = "CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY, description TEXT NOT NULL, \
            installed_on TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP, success BOOLEAN NOT NULL, checksum BLOB NOT NULL, \
            execution_time BIGINT NOT NULL)";
        killed.run(begun).await.unwrap();
        killed.run("INSERT INTO _sqlx_migrations VALUES (1, 'init', NOW(), FALSE, 'x', -1)").await.unwrap();
        for statement in &statements[..cut] {
            killed.run(statement).await.unwrap();
        }
        let store_id = open(&url).await.unwrap_or_else(|error| panic!("killed after {cut} statements: {error}")).store_id;
        assert_eq!(open(&url).await.unwrap().store_id, store_id);
        last_release().run(killed.raw()).await.unwrap();
    }
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_adds_to_the_tables_can_be_started_again() {
    const ADDED: [&str; 2] =
        [include_str!("../../../migrations/0005_presence.sql"), include_str!("../../../migrations/0006_moves.sql")];
    let directory = tempfile::tempdir().unwrap();
    let statements: Vec<&str> = ADDED.iter().flat_map(|step| step.split(";\n")).filter(|part| !part.trim().is_empty()).collect();
    for cut in 0..=statements.len() {
        let file = format!("sqlite://{}?mode=rwc", directory.path().join(format!("{cut}.db")).display());
        for url in [server::fresh_database().await, file] {
            sqlx::any::install_default_drivers();
            let mut killed = bare(&url).await;
            last_release().run(killed.raw()).await.unwrap();
            for statement in &statements[..cut] {
                killed.run(statement).await.unwrap();
            }
            let store_id = open(&url).await.unwrap_or_else(|error| panic!("killed after {cut} statements: {error}")).store_id;
            assert_eq!(open(&url).await.unwrap().store_id, store_id);
        }
    }
}

#[tokio::test]
async fn nodes_of_the_last_release_start_on_tables_of_this_one_and_the_other_way_round() {
    let directory = tempfile::tempdir().unwrap();
    for (ours, theirs) in [
        (server::fresh_database().await, server::fresh_database().await),
        (sqlite(&directory), format!("sqlite://{}?mode=rwc", directory.path().join("theirs.db").display())),
    ] {
        drop(open(&ours).await.unwrap());
        last_release().run(bare(&ours).await.raw()).await.unwrap();
        sqlx::any::install_default_drivers();
        last_release().run(bare(&theirs).await.raw()).await.unwrap();
        drop(open(&theirs).await.unwrap());
        last_release().run(bare(&theirs).await.raw()).await.unwrap();
    }
}

#[tokio::test]
async fn a_store_whose_tables_are_there_is_opened_without_a_write() {
    let url = server::fresh_database().await;
    let store_id = open(&url).await.unwrap().store_id;
    let (server, name) = url.rsplit_once('/').unwrap();
    let mut root = bare(&url).await;
    root.execute(statement(format!("CREATE USER {name}_reader"))).await.unwrap();
    root.execute(statement(format!("GRANT SELECT ON {name}.* TO {name}_reader"))).await.unwrap();
    let reader = format!("{}/{name}", server.replace("root@", &format!("{name}_reader@")));
    assert_eq!(open(&reader).await.unwrap().store_id, store_id);
}

/// The index that a step makes wider, as the server numbers it: anew each time it is built.
async fn index_id(connection: &mut Connection, database: &str) -> u64 {
    let select = format!(
        "SELECT CAST(i.index_id AS SIGNED) FROM information_schema.innodb_sys_indexes i JOIN information_schema.innodb_sys_tables t \
         ON t.table_id = i.table_id WHERE i.name = 'routes_by_life' AND t.name = '{database}/routes'"
    );
    let rows = connection.fetch(statement(select)).await.unwrap();
    rows[0].try_get::<i64, _>(0).unwrap().unsigned_abs()
}

#[tokio::test]
async fn an_index_that_is_there_is_not_built_again() {
    let url = server::fresh_database().await;
    drop(open(&url).await.unwrap());
    let mut root = bare(&url).await;
    let database = url.rsplit_once('/').unwrap().1;
    let before = index_id(&mut root, database).await;
    root.execute(statement("DELETE FROM schema_steps WHERE version = 6")).await.unwrap();
    drop(open(&url).await.unwrap());
    assert_eq!(index_id(&mut root, database).await, before);
}

#[tokio::test]
async fn nodes_that_start_at_once_lay_the_tables_one_after_the_other() {
    let url = server::fresh_database().await;
    let mut first = bare(&url).await;
    first.execute(statement("DO GET_LOCK(CONCAT('im-presence ', MD5(DATABASE())), 0)")).await.unwrap();
    let second = tokio::spawn({
        let url = url.clone();
        async move { open(&url).await.map(drop) }
    });
    let waits = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND state = 'User lock'";
    while first.fetch(statement(waits)).await.unwrap().is_empty() {
        assert!(!second.is_finished(), "it waits");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(first.fetch(statement("SHOW TABLES")).await.unwrap().is_empty(), "and has laid nothing");
    drop(first); // killed
    second.await.unwrap().unwrap();
}
