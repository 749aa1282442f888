//! What a lane does with a batch that could not be committed.

use std::collections::HashSet;
use std::collections::VecDeque;
use std::time::Duration;
use std::time::Instant;

use tokio::time::sleep;
use tracing::error;
use tracing::info;
use tracing::warn;

use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::engine::write::change::Change;
use crate::engine::write::change::Pending;
use crate::engine::write::lane::Lane;
use crate::engine::write::lane::MAX_BATCH;
use crate::engine::write::lane::MAX_BATCH_BYTES;
use crate::engine::write::transaction::Failure;
use crate::error::Error;
use crate::store::connection::SqlError;

/// How often a part of a batch is tried against deadlocks and locks of others.
const MAX_TRIES: u32 = 5;
/// Events of locked users that may be set aside, and their size. Further ones are refused.
const MAX_PARKED: usize = 8 * MAX_BATCH;
const MAX_PARKED_BYTES: usize = 8 * MAX_BATCH_BYTES;
/// A server without room or memory is left alone for at least this long.
const ILL_PAUSE: Duration = Duration::from_secs(1);

/// Events that are tried together.
pub(super) struct Part {
    pub events: Vec<Pending>,
    pub tries: u32,
}

impl Lane {
    /// Sets aside the events of users who have events set aside already: a user's changes are made in their order.
    pub(super) fn not_behind_parked(&mut self, events: Vec<Pending>) -> Vec<Pending> {
        if self.parked.is_empty() {
            return events;
        }
        let parked: HashSet<UserId> = self.parked.iter().map(|event| event.user).collect();
        let (behind, events) = events.into_iter().partition(|event| parked.contains(&event.user));
        self.set_aside(behind);
        events
    }

    fn set_aside(&mut self, events: Vec<Pending>) {
        let mut bytes: usize = self.parked.iter().map(|event| event.change.bytes()).sum();
        for event in events {
            bytes += event.change.bytes();
            if self.parked.len() < MAX_PARKED && bytes <= MAX_PARKED_BYTES {
                self.parked.push(event);
            } else {
                self.tools.metrics.shed("locked");
                event.answer(Err(Error::overloaded("too many changes wait for users whose rows another session has locked")));
            }
        }
    }

    pub(super) async fn recover(&mut self, mut part: Part, failure: Failure, parts: &mut VecDeque<Part>) {
        let metrics = self.tools.metrics.clone();
        match failure {
            Failure::TooLate => parts.push_front(part),
            Failure::Sql(error @ (SqlError::Lost(_) | SqlError::Denied(_) | SqlError::Ill(_))) => {
                metrics.lane_retry(if error.ends_connection() { "lost" } else { "ill" });
                self.note_failing(&error);
                let pause = self.backoff.pause();
                sleep(if error.ends_connection() { pause } else { pause.max(ILL_PAUSE) }).await;
                parts.push_front(part);
            }
            Failure::Uncertain(error) => {
                metrics.lane_retry("uncertain");
                self.note_failing(&error);
                warn!(%error, users = part.events.len(), "COMMIT was not answered: nobody knows whether it was done");
                part.events.iter().for_each(|event| self.tools.cache.forget(event.user));
                self.tools.feed.push(part.events.iter().map(|event| (event.user, Version::MAX))); // whatever there is
                refuse(part, "the database did not confirm the change");
                sleep(self.backoff.pause()).await;
            }
            Failure::Sql(SqlError::Failed(error)) if part.events.len() == 1 => {
                let user = part.events[0].user;
                error!(user.id = %user, %error, "a change of this user cannot be stored");
                metrics.store_error("statement");
                part.events
                    .into_iter()
                    .for_each(|event| event.answer(Err(Error::Internal { what: "this change cannot be stored" })));
            }
            Failure::Sql(SqlError::Failed(_)) => {
                metrics.lane_retry("failed");
                halve(part, parts);
            }
            Failure::Sql(error) if part.tries == MAX_TRIES => {
                self.note_failing(&error);
                refuse(part, "the database did not carry out the change in several attempts");
            }
            Failure::NoLife(_) if part.tries == MAX_TRIES => refuse(part, "a life of the gateway could not be begun"),
            Failure::NoLife(gateways) => {
                part.tries += 1;
                let now = Instant::now();
                let (begin, too_many): (Vec<_>, Vec<_>) = gateways.into_iter().partition(|_| self.tools.newcomers.allows(now));
                self.turn_away(&mut part, &too_many);
                if let Err(error) = self.begin_lives(&begin).await {
                    self.note_failing(&error);
                    sleep(self.backoff.pause()).await;
                }
                parts.push_front(part);
            }
            Failure::Sql(SqlError::Locked) => {
                metrics.lane_retry("locked");
                part.tries += 1;
                self.park(part, parts).await;
            }
            Failure::Sql(SqlError::Deadlock) => {
                metrics.lane_retry("deadlock");
                part.tries += 1;
                sleep(jitter(part.tries)).await;
                halve(part, parts);
            }
        }
    }

    /// Refuses binds of gateways of which too many have begun without being registered.
    fn turn_away(&self, part: &mut Part, gateways: &[GatewayAddr]) {
        let names_one = |event: &mut Pending| matches!(&event.change, Change::Bind(bind) if bind.epoch.is_none() && gateways.contains(&bind.gateway));
        for event in part.events.extract_if(.., names_one) {
            self.tools.metrics.shed("new_gateways");
            event.answer(Err(Error::overloaded(
                "too many gateways that have not registered: register this one, or repeat it later",
            )));
        }
    }

    /// Gateways that nobody has registered begin a life with their first bind.
    async fn begin_lives(&mut self, gateways: &[GatewayAddr]) -> Result<(), SqlError> {
        for gateway in gateways {
            let mut connection = self.connected().await?;
            if let Err(error) = connection.begin_unmanaged_life(gateway).await {
                let usable = !error.ends_connection() && connection.rollback().await.is_ok();
                self.connection = usable.then_some(connection);
                return Err(error);
            }
            info!(gateway.addr = %gateway, "gateway {gateway} binds without being registered: its routes end by themselves");
            self.connection = Some(connection);
        }
        Ok(())
    }

    /// Sets the events of locked users aside and runs the others again.
    async fn park(&mut self, part: Part, parts: &mut VecDeque<Part>) {
        let locked = self.locked(&part.events).await;
        let (parked, events): (Vec<_>, Vec<_>) = part.events.into_iter().partition(|event| locked.contains(&event.user));
        self.set_aside(parked);
        parts.push_front(Part { events, tries: part.tries });
    }

    /// Puts parked events back to work once nobody holds their users.
    pub(super) async fn release_parked(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let parked = std::mem::take(&mut self.parked);
        let parked = self.wanted(parked);
        let locked = self.locked(&parked).await;
        let (still, mut free): (Vec<_>, Vec<_>) = parked.into_iter().partition(|event| locked.contains(&event.user));
        self.parked = still;
        while !free.is_empty() {
            let rest = free.split_off(as_many_as_fit(&free));
            self.settle(free).await;
            free = rest;
        }
    }

    async fn locked(&mut self, events: &[Pending]) -> HashSet<UserId> {
        let mut users: Vec<UserId> = events.iter().map(|event| event.user).collect();
        users.sort_unstable();
        users.dedup();
        let Ok(mut connection) = self.connected().await else { return HashSet::new() };
        match connection.locked_users(&users).await {
            Ok(locked) => {
                self.connection = Some(connection);
                locked.into_iter().collect()
            }
            Err(error) => {
                warn!(%error, "cannot tell which users are locked");
                HashSet::new()
            }
        }
    }
}

/// How many of `events`, from the first on, make a batch.
fn as_many_as_fit(events: &[Pending]) -> usize {
    let mut bytes = 0;
    let fits = |event: &&Pending| {
        bytes += event.change.bytes();
        bytes <= MAX_BATCH_BYTES
    };
    events.iter().take(MAX_BATCH).take_while(fits).count().max(1)
}

fn halve(part: Part, parts: &mut VecDeque<Part>) {
    let Part { mut events, tries } = part;
    let second = events.split_off(events.len().div_ceil(2));
    parts.push_front(Part { events: second, tries });
    parts.push_front(Part { events, tries });
}

fn refuse(part: Part, what: &'static str) {
    part.events.into_iter().for_each(|event| event.answer(Err(Error::unavailable(what))));
}

/// A few milliseconds, more with each try, different for each lane.
fn jitter(tries: u32) -> Duration {
    let random = uuid::Uuid::new_v4().as_u128() % 8;
    Duration::from_millis(u64::from(tries) * (1 + random as u64))
}
