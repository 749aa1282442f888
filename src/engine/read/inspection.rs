//! What each tier holds of a user, looked at without changing anything: nobody is loaded into memory or copied to Redis by it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::timeout;

use crate::domain::explanation::Tier;
use crate::domain::explanation::TierView;
use crate::domain::gateway::Life;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::time::Timestamp;
use crate::domain::user::UserRecord;
use crate::engine::read::cache::L2_AGE;
use crate::engine::read::directory::Directory;
use crate::engine::read::l2::L2;
use crate::engine::read::lives::Lives;
use crate::store::database::Database;
use crate::store::history::LogPage;
use crate::store::history::LoggedLine;
use crate::store::readers::Readers;

/// Connections that such looks share.
const READERS: usize = 1;
/// How long SQL and Redis may take each. Somebody waits at a terminal, most likely because one of them is away.
const SQL_LIMIT: Duration = Duration::from_secs(2);
const REDIS_LIMIT: Duration = Duration::from_millis(500);
/// Lines of the log that are told.
const RECENT: usize = 5;

pub struct Inspection {
    directory: Arc<Directory>,
    lives: Arc<Lives>,
    l2: Option<Arc<L2>>,
    readers: Readers,
}

/// What a tier that is not SQL has: the record, and what is to be said of it.
pub type Held = (TierView, Option<UserRecord>);

/// What SQL has, read past every cache.
pub struct Durable {
    pub record: UserRecord,
    pub lives: Vec<Arc<Life>>,
    /// The last changes, the newest first, with those that nobody could see.
    pub recent: Vec<LoggedLine>,
    /// No gateway is declared dead now.
    pub hold: bool,
}

impl Inspection {
    pub fn new(directory: Arc<Directory>, lives: Arc<Lives>, l2: Option<Arc<L2>>, database: Arc<Database>) -> Self {
        Self { directory, lives, l2, readers: Readers::new(database, READERS) }
    }

    /// Redis as a cache, if it is configured.
    pub fn l2(&self) -> Option<Arc<L2>> {
        self.l2.clone()
    }

    /// What this node's memory has.
    pub fn memory(&self, user: UserId) -> Held {
        let generation = self.l2.as_ref().map_or(0, |l2| l2.generation());
        let Some((entry, fit)) = self.directory.remembered(user) else {
            return (TierView::of(Tier::Memory, None, generation).doubted(Duration::ZERO, "it has no record"), None);
        };
        let view = TierView::of(Tier::Memory, Some(&entry.record), generation);
        let view = match fit {
            Ok(age) => view.trusted(age),
            Err(why) => view.doubted(entry.as_of().elapsed(), why),
        };
        (view, Some(entry.record.clone()).filter(|record| record.version > Version::NONE))
    }

    /// What Redis has.
    pub async fn shared(&self, user: UserId) -> Held {
        let absent = |why: &str| (TierView::of(Tier::Shared, None, 0).doubted(Duration::ZERO, why), None);
        let Some(l2) = &self.l2 else { return absent("no [redis_cache] is configured") };
        let seen = match l2.shared().look(user, REDIS_LIMIT).await {
            Err(_) => return absent("it does not answer"),
            Ok(None) => return absent("it has no record"),
            Ok(Some(seen)) => seen,
        };
        let Some(record) = seen.record.filter(|_| seen.is_ours) else {
            return absent(if seen.is_ours { "its record cannot be read" } else { "its record is of another store" });
        };
        let (view, generation) = (TierView::of(Tier::Shared, Some(&record), seen.generation), l2.generation());
        let table = self.lives.glance();
        let view = if seen.generation != generation {
            view.doubted(L2_AGE, format!("it is of generation {}, and the caches are in {generation}", seen.generation))
        } else if let Some(why) = l2.doubt() {
            view.doubted(L2_AGE, why)
        } else if record.routes.iter().any(|route| table.get(route.epoch).is_none()) {
            view.doubted(L2_AGE, "it names a life that this node has not heard of")
        } else {
            view.trusted(L2_AGE)
        };
        (view, Some(record))
    }

    /// What SQL has. None: it does not answer.
    pub async fn durable(&self, user: UserId) -> (TierView, Option<Durable>) {
        let newest =
            LogPage { user, before: Version::MAX, from: Timestamp(0), to: Timestamp(i64::MAX), with_hidden: true, limit: RECENT };
        let read = self.readers.read(move |connection| {
            async move {
                let (mut records, lives) = connection.load_users_with_lives(&[user]).await?;
                let (recent, cluster) = (connection.read_log(&newest).await?, connection.read_cluster().await?);
                let record = records.remove(&user).unwrap_or_default();
                let hold = cluster.hold.is_on(cluster.clock.now());
                Ok((Durable { record, lives, recent, hold }, cluster.generation))
            }
            .boxed()
        });
        match timeout(SQL_LIMIT, read).await {
            Ok(Ok((found, generation))) => {
                let view = TierView::of(Tier::Durable, Some(&found.record), generation);
                (view.trusted(Duration::ZERO), Some(found))
            }
            Ok(Err(_)) => (doubted("it cannot be read"), None),
            Err(_) => (doubted(format!("it did not answer within {} ms", SQL_LIMIT.as_millis())), None),
        }
    }
}

fn doubted(why: impl Into<String>) -> TierView {
    TierView::of(Tier::Durable, None, 0).doubted(Duration::ZERO, why)
}
