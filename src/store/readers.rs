//! A few connections that many callers read on in turn.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;

/// Boxed, because of an async closure the compiler cannot tell yet whether it may change threads.
pub type Reading<'a, T> = BoxFuture<'a, Result<T, SqlError>>;

/// A few connections that many callers read on in turn.
pub struct Readers {
    database: Arc<Database>,
    turns: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

impl Readers {
    /// Does not connect yet.
    pub fn new(database: Arc<Database>, connections: usize) -> Self {
        Self { database, turns: Semaphore::new(connections), idle: Mutex::default() }
    }

    /// Reads on a connection kept from before if it still works, else on a new one.
    pub async fn read<T>(&self, read: impl Fn(&mut Connection) -> Reading<'_, T>) -> Result<T, SqlError> {
        let _turn = self.turns.acquire().await.map_err(|_| SqlError::Lost("this node stops".to_owned()))?;
        let kept = self.idle().pop();
        if let Some(mut kept) = kept.filter(|kept| self.database.is_current(kept))
            && let Ok(found) = read(&mut kept).await
        {
            self.idle().push(kept);
            return Ok(found);
        }
        let mut fresh = self.database.connect(Purpose::General).await?;
        let found = read(&mut fresh).await?;
        self.idle().push(fresh);
        Ok(found)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
