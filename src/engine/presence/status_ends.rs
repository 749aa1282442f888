//! Ends statuses whose time is over: a look at the database each second, by one node at a time. A timer in memory would be lost
//! with its node.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::id::UserId;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;

/// How late a status ends at most, beside the time of the change.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a node that stops keeps the others from going on.
const TERM: Duration = Duration::from_secs(10);
/// Users at a time.
const PAGE: i64 = 1_024;

pub struct StatusEnds {
    slot: ConnectionSlot,
    lanes: Arc<Lanes>,
    lives: Arc<Lives>,
    /// This process, as its claims name it.
    claimant: String,
}

impl StatusEnds {
    pub fn new(database: Arc<Database>, lanes: Arc<Lanes>, lives: Arc<Lives>, claimant: &str) -> Self {
        Self { slot: ConnectionSlot::new(database), lanes, lives, claimant: claimant.to_owned() }
    }

    /// Ends what is over.
    pub async fn step(&mut self) -> Result<(), SqlError> {
        let mut connection = self.slot.take().await?;
        loop {
            let users = connection.users_whose_status_ends(self.lives.clock.over_by(), PAGE).await?;
            let is_last = users.len() < PAGE as usize;
            let is_ours = !users.is_empty() && connection.claim_job("status ends", &self.claimant, TERM).await?;
            if !is_ours || end(&self.lanes, users).await == 0 || is_last {
                break; // what could not be ended now is not asked for again at once
            }
        }
        self.slot.give_back(connection);
        Ok(())
    }
}

/// Ends the status of each whose time is over. Returns of how many.
async fn end(lanes: &Arc<Lanes>, users: Vec<UserId>) -> usize {
    let outcomes = lanes.submit_all_in_background(users, || Change::EndStatus).await;
    outcomes.iter().filter(|outcome| outcome.is_ok()).count()
}
