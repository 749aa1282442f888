//! Carries drains out: each by one node at a time, which holds a claim on it. If that node dies, another goes on where it was,
//! and asks some users a second time, which does no harm. What was ordered is read again at each look: a drain that was
//! cancelled stops then.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::task;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing::warn;

use crate::domain::drain::Drain;
use crate::domain::drain::DrainState;
use crate::domain::drain::END_OF_WALK;
use crate::domain::drain::Look;
use crate::domain::drain::Next;
use crate::domain::event::ForceOffline;
use crate::domain::event::Outcome;
use crate::domain::event::Which;
use crate::domain::gateway::Life;
use crate::domain::id::UserId;
use crate::domain::policy::Reason;
use crate::engine::gateways::destinations::Destinations;
use crate::engine::gateways::destinations::Sending;
use crate::engine::gateways::moving::Asking;
use crate::engine::gateways::moving::Mover;
use crate::engine::write::change::Change;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::drains::job;

/// How often a node looks for drains that nobody carries out.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a node that dies keeps the others from going on. They look each second, and are to go on within ten.
const TERM: Duration = Duration::from_secs(8);
/// How often whoever carries a drain out reads its row, and takes down how far it is.
const ROW_INTERVAL: Duration = Duration::from_millis(500);
/// Users are asked so often, and so many as are due then.
const SLICE: Duration = Duration::from_millis(100);
/// What was missed for longer is not made up for.
const MISSED: Duration = Duration::from_millis(300);
/// Counting takes a part of the time at most, also where users are many.
const REST_AFTER_COUNTING: u32 = 4;
/// Users that one statement reads.
const PAGE: i64 = 4_096;
/// Between removing all who are left and removing those who stayed.
const REMOVE_AGAIN: Duration = Duration::from_secs(1);
/// Drains that one node carries out at the same time; the others wait, or another node takes them.
const AT_ONCE: usize = 64;
const KEPT_FOR: Duration = Duration::from_secs(30 * 86_400);
const PRUNE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Finds drains to carry out.
pub struct Executor {
    mover: Arc<Mover>,
    slot: ConnectionSlot,
    running: JoinSet<()>,
    /// The ids of drains, by who carries them out.
    carried_out: HashMap<task::Id, String>,
    pruned_at: Option<Instant>,
    stop: CancellationToken,
}

impl Executor {
    pub fn new(mover: Arc<Mover>, stop: CancellationToken) -> Self {
        let slot = ConnectionSlot::new(mover.database.clone());
        Self { mover, slot, running: JoinSet::new(), carried_out: HashMap::new(), pruned_at: None, stop }
    }

    /// Takes on what is to be done and nobody does.
    pub async fn step(&mut self) -> Result<(), SqlError> {
        while let Some(ended) = self.running.try_join_next_with_id() {
            self.carried_out.remove(&ended.map_or_else(|panicked| panicked.id(), |(id, ())| id));
        }
        let mut connection = self.slot.take().await?;
        let active = connection.active_drains().await?;
        self.mover.metrics.moves.show(active.iter().map(|drain| drain.state));
        for drain in active {
            if !self.carried_out.values().any(|id| *id == drain.id)
                && self.carried_out.len() < AT_ONCE
                && connection.claim_job(&job(&drain.id), &self.mover.claimant, TERM).await?
            {
                let id = drain.id.clone();
                let run = self.running.spawn(carry_out(self.mover.clone(), drain, self.stop.clone()));
                self.carried_out.insert(run.id(), id);
            }
        }
        if self.pruned_at.is_none_or(|at| at.elapsed() > PRUNE_INTERVAL) && self.mover.lives.clock.is_steady() {
            self.pruned_at = Some(Instant::now());
            while connection.prune_drains(KEPT_FOR).await? {}
        }
        self.slot.give_back(connection);
        Ok(())
    }

    /// Waits for those who were told to stop.
    pub async fn finish(mut self) {
        while self.running.join_next().await.is_some() {}
    }
}

/// Until it is over, or another's.
async fn carry_out(mover: Arc<Mover>, drain: Drain, stop: CancellationToken) {
    let (id, gateway) = (drain.id.clone(), drain.gateway.clone());
    if let Some(Err(error)) = stop.run_until_cancelled(Run::new(mover, drain).go()).await {
        warn!(%error, drain.id = %id, gateway.addr = %gateway, "the drain of {gateway} stands still; it goes on within {TERM:?}");
    }
}

/// One drain, as the node sees it that carries it out.
struct Run {
    mover: Arc<Mover>,
    drain: Drain,
    destinations: Option<Destinations>,
    /// Users who may be asked now.
    due: f64,
    due_at: Instant,
    /// Users who may be asked until the next count.
    room: u64,
    counted: Option<(Instant, Duration)>,
    outstanding: u64,
    /// Where those are asked again who were asked before, and whether that was done since the walk went on last.
    again_from: Option<i64>,
    were_asked_again: bool,
    /// Where routes are removed, and whether some of those before have stayed.
    removed_to: i64,
    some_stayed: bool,
    /// By then all who were asked may have gone.
    gone_at: Instant,
    /// When there was a gateway to go to last.
    housed_at: Instant,
}

impl Run {
    fn new(mover: Arc<Mover>, drain: Drain) -> Self {
        let now = Instant::now();
        Self {
            mover,
            drain,
            destinations: None,
            due: 0.0,
            due_at: now,
            room: 0,
            counted: None,
            outstanding: 0,
            again_from: None,
            were_asked_again: false,
            removed_to: 0,
            some_stayed: false,
            gone_at: now,
            housed_at: now,
        }
    }

    async fn go(mut self) -> Result<(), SqlError> {
        let mut slot = ConnectionSlot::new(self.mover.database.clone());
        loop {
            let mut connection = slot.take().await?;
            let Some(next) = self.look(&mut connection).await? else { return Ok(()) };
            let looked = Instant::now();
            match next {
                Next::Finish => return self.end(&mut connection, DrainState::Done).await,
                Next::Remove { up_to } => {
                    if self.has_removed_all(&mut connection, up_to).await? {
                        return self.end(&mut connection, DrainState::Done).await;
                    }
                }
                _ => {
                    while looked.elapsed() < ROW_INTERVAL {
                        self.slice(&mut connection, next).await?;
                        sleep(SLICE).await;
                    }
                }
            }
            slot.give_back(connection);
        }
    }

    /// Reads what is ordered, counts, and takes down how far it is. None: it is over, or another's.
    async fn look(&mut self, connection: &mut Connection) -> Result<Option<Next>, SqlError> {
        if !connection.claim_job(&job(&self.drain.id), &self.mover.claimant, TERM).await? {
            return Ok(None);
        }
        let Some(ordered) = connection.read_drain(&self.drain.id).await?.filter(|row| row.state.is_active()) else {
            info!(drain.id = %self.drain.id, "the drain of {} was cancelled", self.drain.gateway);
            connection.forget_drain_job(&self.drain.id).await?; // claimed just now
            return Ok(None);
        };
        self.drain.terms = ordered.terms;
        let lives = connection.lives_by_epoch(&[self.drain.epoch]).await?;
        self.mover.lives.learn(&lives);
        let Some(life) = lives.into_iter().find(|life| life.is_alive()) else {
            self.end(connection, DrainState::Ended).await?;
            return Ok(None);
        };
        let now = self.mover.lives.clock.now();
        self.drain.node_id = self.mover.node_id.clone();
        let begins = self.drain.state == DrainState::Waiting;
        if begins && now < self.drain.terms.starts_at {
            return Ok(connection.note_drain(&self.drain).await?.then_some(Next::Wait));
        }
        self.count(connection, begins).await?;
        if begins {
            (self.drain.state, self.drain.pass, self.drain.users) = (DrainState::Running, 1, self.drain.left);
            info!(drain.id = %self.drain.id, users = self.drain.users, "the drain of {} begins", self.drain.gateway);
        }
        self.look_where_to(&life);
        let next = self.drain.next(&Look {
            now,
            left: self.drain.left,
            outstanding: self.outstanding,
            bound: self.bound(),
            still_for: self.gone_at.elapsed(), // zero, if that is still to come
            were_asked_again: self.were_asked_again && self.again_from.is_none(),
            homeless_for: self.housed_at.elapsed(),
        });
        self.begin(next);
        Ok(connection.note_drain(&self.drain).await?.then_some(next))
    }

    fn look_where_to(&mut self, life: &Life) {
        let (mover, to) = (&self.mover, &mut self.drain.terms.to);
        let destinations = self.destinations.get_or_insert_with(|| mover.destinations(life, to));
        destinations.look_again(&mover.lives, to);
        destinations.note(to);
        if !destinations.is_empty() {
            self.housed_at = Instant::now();
        }
    }

    /// How many users may be on their way.
    fn bound(&self) -> u64 {
        ((f64::from(self.rate()) * self.mover.settings.outstanding.as_secs_f64()) as u64).max(1)
    }

    fn begin(&mut self, next: Next) {
        match next {
            Next::AskThoseAgain if self.again_from.is_none() => (self.again_from, self.were_asked_again) = (Some(0), true),
            Next::AskAllAgain => (self.drain.pass, self.drain.cursor) = (self.drain.pass + 1, 0),
            _ => {}
        }
    }

    /// Users per second: no more than come back elsewhere.
    fn rate(&self) -> u32 {
        let elsewhere = self.destinations.as_ref().and_then(Destinations::log_in_rate);
        self.drain.terms.rate.min(elsewhere.unwrap_or(u32::MAX)).max(1)
    }

    /// Who is left, and who of those was asked. Costly where users are many, so not at each look.
    async fn count(&mut self, connection: &mut Connection, at_once: bool) -> Result<(), SqlError> {
        let rested = |(at, took): (Instant, Duration)| at.elapsed() >= LOOK_INTERVAL.max(took * REST_AFTER_COUNTING);
        if !at_once && !self.counted.is_none_or(rested) {
            return Ok(());
        }
        let (began, before) = (Instant::now(), self.drain.moved());
        (self.drain.left, self.outstanding) = count(connection, &self.drain).await?;
        self.counted = Some((Instant::now(), began.elapsed()));
        self.room = self.bound().saturating_sub(self.outstanding);
        if !at_once {
            self.mover.metrics.moves.moved(self.drain.moved().saturating_sub(before));
        }
        Ok(())
    }

    /// Asks those who are due.
    async fn slice(&mut self, connection: &mut Connection, next: Next) -> Result<(), SqlError> {
        let (now, rate) = (Instant::now(), f64::from(self.rate()));
        let passed = now.duration_since(std::mem::replace(&mut self.due_at, now));
        self.due = (self.due + rate * passed.as_secs_f64()).min((rate * MISSED.as_secs_f64()).max(1.0));
        let may_go = self.drain.terms.force || self.destinations.as_ref().is_some_and(|known| !known.is_empty());
        if self.due < 1.0 || !may_go {
            return Ok(());
        }
        if let Some(from) = self.again_from {
            let asked = self.walk(connection, from, self.drain.cursor, self.due as u64, Duration::ZERO).await?;
            self.again_from = Some(asked).filter(|last| *last < self.drain.cursor);
            return Ok(());
        }
        let at_most = match next {
            Next::Ask { at_most } => at_most.min(if self.drain.pass > 1 { u64::MAX } else { self.room }),
            _ => return Ok(()),
        };
        if at_most > 0 && self.drain.cursor != END_OF_WALK {
            let close_after = if self.drain.pass > 1 { Duration::ZERO } else { self.mover.settings.close_after };
            let from = self.drain.cursor;
            (self.were_asked_again, self.removed_to) = (false, 0);
            self.drain.cursor = self.walk(connection, from, END_OF_WALK, at_most.min(self.due as u64), close_after).await?;
        }
        Ok(())
    }

    /// Asks the next `at_most` users after `from` and up to `to`. Returns the last; `to`, if there are no more.
    async fn walk(
        &mut self,
        connection: &mut Connection,
        from: i64,
        to: i64,
        at_most: u64,
        close_after: Duration,
    ) -> Result<i64, SqlError> {
        let page = ((at_most as f64 / self.drain.terms.share) as i64 + 1).min(PAGE);
        let users = connection.users_of_life(self.drain.epoch, from, page).await?;
        let mut is_last = (users.len() as i64) < page;
        let (mut chosen, mut last): (Vec<UserId>, i64) = (Vec::new(), from);
        for user in users {
            if user.get() > to || chosen.len() as u64 == at_most {
                is_last = user.get() > to;
                break;
            }
            last = user.get();
            chosen.extend(Some(user).filter(|user| self.drain.takes(*user)));
        }
        let reason = if self.drain.terms.is_whole() { Reason::Drain } else { Reason::Migrate };
        let Some(destinations) = &mut self.destinations else { return Ok(from) };
        let sending = if self.drain.pass > 1 || to != END_OF_WALK { Sending::Again } else { Sending::First(1) };
        let asking = Asking { epoch: Some(self.drain.epoch), device: None, reason, close_after, sending };
        let asked = self.mover.ask(connection, &chosen, destinations, &asking).await?;
        self.due -= asked.users as f64;
        self.room = self.room.saturating_sub(asked.users);
        self.drain.asked += asked.users;
        self.drain.unheard += asked.unheard;
        self.gone_at = self.gone_at.max(Instant::now() + asked.after);
        Ok(if is_last { to } else { last })
    }

    /// A page of those who are left up to this user lose their routes. True: there is nobody left at all.
    async fn has_removed_all(&mut self, connection: &mut Connection, up_to: i64) -> Result<bool, SqlError> {
        let epoch = self.drain.epoch;
        let mut users = connection.users_of_life(epoch, self.removed_to, PAGE).await?;
        users.retain(|user| user.get() <= up_to);
        let Some(last) = users.last() else {
            let some_stayed = std::mem::take(&mut self.some_stayed);
            (self.removed_to, self.were_asked_again, self.counted) = (0, false, None);
            if up_to != END_OF_WALK {
                return Ok(false); // there is room for those who come next
            }
            // A gateway that was to be empty is: whoever came meanwhile goes, too.
            if some_stayed || self.drain.terms.is_whole() && count(connection, &self.drain).await?.0 > 0 {
                sleep(REMOVE_AGAIN).await;
                return Ok(false);
            }
            return Ok(true);
        };
        self.removed_to = last.get();
        let users = users.into_iter().filter(|user| self.drain.takes(*user));
        let all_on_it = || Change::ForceOffline(ForceOffline { which: Which::On(epoch), ..ForceOffline::default() });
        let outcomes = self.mover.lanes.submit_all_in_background(users, all_on_it).await;
        let is_removed = |outcome: &&Outcome| matches!(outcome, Outcome::ForcedOffline { .. });
        let removed = outcomes.iter().flatten().filter(is_removed).count();
        self.some_stayed |= outcomes.iter().any(Result::is_err);
        self.mover.metrics.moves.removed(removed as u64);
        Ok(false)
    }

    async fn end(&mut self, connection: &mut Connection, state: DrainState) -> Result<(), SqlError> {
        (self.drain.left, _) = count(connection, &self.drain).await?;
        connection.note_drain(&self.drain).await?;
        self.mover.connect_to_lock().await?.end_drain(&self.drain, state).await?;
        let Drain { id, gateway, users, left, asked, unheard, .. } = &self.drain;
        let name = state.name();
        info!(drain.id = %id, users, left, asked, unheard, "the drain of {gateway} is over: {name}");
        Ok(())
    }
}

/// Who has to go and has not, and who of them was asked in this pass.
pub async fn count(connection: &mut Connection, drain: &Drain) -> Result<(u64, u64), SqlError> {
    if drain.terms.is_whole() {
        return connection.count_users_up_to(drain.epoch, drain.cursor).await;
    }
    let (mut after, mut left, mut asked) = (0, 0, 0);
    loop {
        let users = connection.users_of_life(drain.epoch, after, PAGE).await?;
        let Some(last) = users.last() else { return Ok((left, asked)) };
        after = last.get();
        for user in users.into_iter().filter(|user| drain.takes(*user)) {
            left += 1;
            asked += u64::from(user.get() <= drain.cursor);
        }
    }
}
