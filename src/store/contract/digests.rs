use std::time::Duration;

use sqlx::Row;
use tokio::time::sleep;

use super::each_engine;
use super::lane;
use super::on_mysql;
use super::record;
use super::route;
use super::store;
use super::users;
use crate::domain::digest::Stored;
use crate::domain::id::Epoch;
use crate::store::connection::Connection;
use crate::store::connection::statement;

/// The server tells the same as before to whoever asks within a tenth of a second.
const POLL: Duration = Duration::from_millis(250);

/// Users 1 and 2, each with a phone whose row has not the digest that it ought to have.
async fn wrong(connection: &mut Connection) -> Vec<Stored> {
    for id in [1, 2] {
        store(connection, id, &record(1, vec![route("phone", 1)])).await;
    }
    connection.execute(statement("UPDATE routes SET digest = 0")).await.unwrap();
    let epoch: i64 = connection.fetch(statement("SELECT MAX(epoch) FROM routes")).await.unwrap()[0].try_get(0).unwrap();
    let wrong = connection.routes_on(Epoch(epoch.cast_unsigned()), &users([1, 2])).await.unwrap();
    assert!(wrong.len() == 2 && wrong.iter().all(|route| route.digest != route.element));
    wrong
}

#[tokio::test]
async fn rows_say_the_digests_that_they_ought_to_if_they_are_still_of_the_same_binds() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let wrong = wrong(connection).await;
        connection.execute(statement("UPDATE routes SET bound_version = 2 WHERE user_id = 2")).await.unwrap();
        let backwards = wrong.iter().rev().collect();
        assert_eq!(connection.correct_digests(backwards).await.unwrap(), 1);
        let rows = connection.fetch(statement("SELECT digest FROM routes ORDER BY user_id")).await.unwrap();
        let digests = rows.iter().map(|row| row.try_get::<i64, _>(0).unwrap().cast_unsigned());
        assert_eq!(digests.collect::<Vec<_>>(), [wrong[0].element, 0]);
    })
    .await;
}

#[tokio::test]
async fn to_correct_digests_waits_for_a_batch_and_a_batch_never_for_that() {
    on_mysql(async |database| {
        let (batch, other, looker) = (&mut lane(database).await, &mut lane(database).await, &mut lane(database).await);
        let wrong = wrong(batch).await;
        other.run("SET innodb_lock_wait_timeout = 60").await.unwrap();
        let id: i64 = other.fetch(statement("SELECT CAST(CONNECTION_ID() AS SIGNED)")).await.unwrap()[0].try_get(0).unwrap();
        batch.begin().await.unwrap();
        batch.lock_users(&users([1, 2])).await.unwrap();
        batch.execute(statement("UPDATE routes SET idle = 1 WHERE user_id = 2")).await.unwrap();
        let batch = async {
            let waits =
                "SELECT trx_id FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT' AND trx_mysql_thread_id = ?";
            while looker.fetch(statement(waits).bind(id)).await.unwrap().is_empty() {
                sleep(POLL).await;
            }
            batch.execute(statement("UPDATE routes SET idle = 1 WHERE user_id = 1")).await.unwrap();
            batch.commit().await.unwrap();
        };
        let (corrected, ()) = tokio::join!(other.correct_digests(wrong.iter().collect()), batch);
        assert_eq!(corrected.unwrap(), 2);
    })
    .await;
}
