//! Removes routes on unmanaged lives whose time is over. They are offline the moment it is; this is tidying up, done by one
//! node at a time and paced, through the lanes, which look at each route again under its user's lock.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::debug;

use crate::domain::id::UserId;
use crate::domain::user::Outcome;
use crate::engine::lanes::Change;
use crate::engine::lanes::Lanes;
use crate::engine::lanes::Tools;
use crate::store::connection::SqlError;
use crate::store::database::Kept;

/// How often a node looks whether there is something to remove.
pub const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a node that stops keeps the others from going on.
const TERM: Duration = Duration::from_secs(10);
/// Users at a time.
const PAGE: i64 = 512;
/// Between pages: at most about 5,000 users a second.
const PACE: Duration = Duration::from_millis(100);
/// How often users and outbox rows are counted.
pub const CENSUS_INTERVAL: Duration = Duration::from_secs(60);

pub struct Expiry {
    pub tools: Arc<Tools>,
    pub lanes: Arc<Lanes>,
    kept: Kept,
}

impl Expiry {
    pub fn new(tools: Arc<Tools>, lanes: Arc<Lanes>) -> Self {
        Self { kept: Kept::new(tools.database.clone()), tools, lanes }
    }

    /// Removes what is over, if it is this node's turn. Returns how many routes.
    pub async fn step(&mut self) -> Result<usize, SqlError> {
        let mut connection = self.kept.take().await?;
        let mut removed = 0;
        while connection.claim_job("expiry", &self.tools.node_id, TERM).await? {
            let found = connection.expired_users(self.tools.lives.clock.now(), PAGE).await?;
            let users: BTreeSet<UserId> = found.iter().copied().collect();
            removed += self.sweep(users).await;
            if found.len() < PAGE as usize {
                break;
            }
            sleep(PACE).await;
        }
        if removed > 0 {
            debug!(routes = removed, "expired routes removed");
        }
        self.kept.give_back(connection);
        Ok(removed)
    }

    async fn sweep(&mut self, users: BTreeSet<UserId>) -> usize {
        let mut sweeps = tokio::task::JoinSet::new();
        for user in users {
            let lanes = self.lanes.clone();
            sweeps.spawn(async move { lanes.submit_in_background(user, Change::Sweep).await });
        }
        let mut removed = 0;
        while let Some(done) = sweeps.join_next().await {
            if let Ok(Ok(Outcome::Swept { routes })) = done {
                removed += routes;
            }
        }
        self.tools.metrics.swept_routes.inc_by(removed as u64);
        removed
    }

    /// Counts users online and rows in the outbox.
    pub async fn census(&mut self) -> Result<(), SqlError> {
        let mut connection = self.kept.take().await?;
        self.tools.metrics.users_online.set(connection.count_users_online().await?);
        self.tools.metrics.outbox_rows.set(connection.count_outbox().await?);
        self.kept.give_back(connection);
        Ok(())
    }
}
