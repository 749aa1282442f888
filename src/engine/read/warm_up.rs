//! Fills a starting node's memory with the users who have a route, paced, while queries are answered already.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing::warn;

use crate::engine::read::directory::Directory;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;

/// Users at a time.
const PAGE: i64 = 2_000;
/// Between pages, so that callers come first.
const PACE: Duration = Duration::from_millis(5);

pub struct WarmUp {
    database: Arc<Database>,
    directory: Arc<Directory>,
    /// How many users memory holds.
    capacity: u64,
}

impl WarmUp {
    pub fn new(database: Arc<Database>, directory: Arc<Directory>, capacity: u64) -> Self {
        Self { database, directory, capacity }
    }

    pub async fn run(self, stop: CancellationToken) {
        let began = Instant::now();
        match stop.run_until_cancelled(self.load_everybody()).await {
            Some(Ok(users)) => info!(users, duration_ms = began.elapsed().as_millis() as u64, "memory is warm: {users} users"),
            Some(Err(error)) => warn!(%error, "memory was not warmed up: users are loaded when they are asked for"),
            None => {}
        }
    }

    async fn load_everybody(&self) -> Result<u64, SqlError> {
        let mut connection = self.database.connect(Purpose::General).await?;
        let mut users = connection.users_with_routes(0, PAGE).await?;
        let mut loaded = 0;
        while let Some(last) = users.last().filter(|_| loaded < self.capacity) {
            // Who comes next is found out meanwhile.
            let next = connection.users_with_routes(last.get(), PAGE);
            let (answers, next) = tokio::join!(self.directory.get_many(&users, None), next);
            loaded += answers.iter().filter(|answer| answer.is_ok()).count() as u64;
            users = next?;
            sleep(PACE).await;
        }
        Ok(loaded)
    }
}
