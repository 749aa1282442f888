//! The log and the days of users.

use super::*;
use crate::domain::history::Cause;
use crate::domain::history::DayShare;
use crate::domain::history::LogLine;
use crate::store::history::LogPage;

fn line(version: u64, shown: Status, hidden: bool) -> LogLine {
    let at = Timestamp(version as i64);
    LogLine { version: Version(version), at, shown, hidden, cause: Cause::Login, devices: 1, epoch: None }
}

fn page(id: i64) -> LogPage {
    let (from, to) = (Timestamp(0), Timestamp(i64::MAX));
    LogPage { user: user(id), before: Version::MAX, from, to, with_hidden: false, limit: 100 }
}

fn wishing(version: u64, wish: Wish) -> UserRecord {
    let record = record(version, Vec::new());
    let presence = Presence { wish, ..record.presence() };
    record.with(presence)
}

async fn versions(connection: &mut Connection, page: &LogPage) -> Vec<u64> {
    connection.read_log(page).await.unwrap().into_iter().map(|line| line.version.0).collect()
}

#[tokio::test]
async fn a_log_is_read_in_pages_from_its_end_and_what_nobody_saw_only_if_it_is_asked_for() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let lines: Vec<_> = (1..=7).map(|n| (user(1), line(n, Status::Online, n % 3 == 0), format!("gw-{n}"))).collect();
        connection.add_log(&lines).await.unwrap();
        connection.add_log(&[(user(2), line(1, Status::Away, false), String::new())]).await.unwrap();
        assert_eq!(versions(connection, &page(1)).await, [7, 5, 4, 2, 1]);
        assert_eq!(versions(connection, &LogPage { limit: 2, ..page(1) }).await, [7, 5]);
        assert_eq!(versions(connection, &LogPage { before: Version(5), with_hidden: true, ..page(1) }).await, [4, 3, 2, 1]);
        let (from, to) = (Timestamp(2), Timestamp(5));
        assert_eq!(versions(connection, &LogPage { from, to, ..page(1) }).await, [4, 2]);
        let read = connection.read_log(&LogPage { limit: 1, ..page(1) }).await.unwrap().remove(0);
        assert_eq!((read.shown, read.cause, read.devices, &*read.gateway), (Status::Online, Cause::Login, 1, "gw-7"));
    })
    .await;
}

#[tokio::test]
async fn time_is_added_to_days_and_rows_that_fill_a_statement_up_add_nothing() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let share = |day| DayShare { day, online_ms: 10, hidden_ms: 1, sessions: 2, hidden_sessions: 3 };
        for users in [3, 5] {
            let shares: Vec<_> = (1..=users).map(|id| (user(id), share(7))).collect();
            connection.add_days(&shares).await.unwrap();
        }
        connection.add_days(&[(user(5), share(8)), (user(5), share(8)), (user(5), share(9))]).await.unwrap();
        let days = connection.read_days(user(5), 7, 8).await.unwrap();
        let day = |day| DayShare { day, online_ms: 20, hidden_ms: 2, sessions: 4, hidden_sessions: 6 };
        assert_eq!(days, BTreeMap::from([(7, share(7)), (8, day(8))]));
        assert_eq!(connection.read_days(user(3), 0, 100).await.unwrap(), BTreeMap::from([(7, day(7))]));
    })
    .await;
}

#[tokio::test]
async fn what_is_too_old_goes_and_so_do_the_oldest_lines_of_who_has_too_many() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let rows = connection.fetch(statement(format!("SELECT {}", clock_millis(connection.engine())))).await.unwrap();
        let now: i64 = rows[0].try_get(0).unwrap();
        let at = |version, ago: i64| LogLine { at: Timestamp(now - ago), ..line(version, Status::Online, false) };
        let many = (1..=150).map(|version| (user(2), at(version, 0), String::new()));
        let lines: Vec<_> = [(user(1), at(1, 90_000_000), String::new()), (user(1), at(2, 80_000_000), String::new())]
            .into_iter()
            .chain(many)
            .chain([(user(3), at(1, 0), String::new())])
            .collect();
        connection.add_log(&lines).await.unwrap();
        let today = (now / 86_400_000) as i32;
        let share = |day| (user(1), DayShare { day, online_ms: 1, ..DayShare::default() });
        connection.add_days(&[share(today), share(today - 1), share(today - 3)]).await.unwrap();
        assert!(!connection.prune_history(Duration::from_secs(86_400)).await.unwrap());
        assert_eq!(versions(connection, &page(1)).await, [2]);
        assert_eq!(connection.read_days(user(1), 0, today).await.unwrap().len(), 2);
        assert_eq!(connection.prune_long_logs(0, 100).await.unwrap(), None);
        let left = versions(connection, &LogPage { limit: 1_000, ..page(2) }).await;
        assert_eq!((left.len(), left[99]), (100, 51));
        assert_eq!(versions(connection, &page(3)).await, [1]);
    })
    .await;
}

#[tokio::test]
async fn an_erased_user_has_no_rows() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        for id in [1, 2] {
            connection.add_log(&[(user(id), line(1, Status::Online, false), String::new())]).await.unwrap();
            connection.add_days(&[(user(id), DayShare { day: 1, online_ms: 1, ..DayShare::default() })]).await.unwrap();
            insert_route(connection, id, Epoch(1)).await;
        }
        assert_eq!(connection.count_rows_of(user(1)).await.unwrap(), 3);
        assert_eq!(connection.erase(user(1)).await.unwrap(), 2, "routes go with the record");
        assert_eq!((connection.count_rows_of(user(1)).await.unwrap(), connection.count_rows_of(user(2)).await.unwrap()), (1, 3));
    })
    .await;
}

#[tokio::test]
async fn whose_status_ends_is_found_in_the_order_of_the_ends() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        for (id, until) in [(1, Some(50)), (2, Some(20)), (3, None), (4, Some(51))] {
            let wish = Wish { status: Status::Busy, until: until.map(Timestamp), ..Wish::default() };
            store(connection, id, &wishing(1, wish)).await;
        }
        assert_eq!(connection.users_whose_status_ends(Timestamp(50), 10).await.unwrap(), users([2, 1]));
        assert_eq!(connection.users_whose_status_ends(Timestamp(50), 1).await.unwrap(), users([2]));
    })
    .await;
}

#[tokio::test]
async fn what_a_node_of_the_last_release_wrote_counts_as_shown_unless_the_user_hides() {
    each_engine(async |database| {
        let connection = &mut lane(database).await;
        let hidden = Wish { status: Status::Invisible, ..Wish::default() };
        for (id, wish) in [(1, Wish::default()), (2, hidden)] {
            store(connection, id, &wishing(10, wish)).await;
            let as_before = "UPDATE users SET version = 20, last_seen_ms = 30 WHERE user_id = ?";
            connection.execute(statement(as_before).bind(id)).await.unwrap();
        }
        let (seen, since) = (Timestamp(30), Timestamp(30));
        assert_eq!(load(connection, 1).await.shown(), LastShown { version: Version(20), seen, since });
        assert_eq!(load(connection, 2).await.shown(), record(10, Vec::new()).shown());
    })
    .await;
}
