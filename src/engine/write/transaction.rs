//! The transaction of a batch: lock all users in order, read them, apply each event in its order, write what changed and one
//! outbox row, COMMIT.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Instant;

use tracing::error;

use crate::domain::event::Event;
use crate::domain::event::Outcome;
use crate::domain::gateway::Life;
use crate::domain::history::Rules;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::inbox::Inbox;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::Limits;
use crate::domain::time::Timestamp;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::UserRecord;
use crate::engine::write::change::Change;
use crate::engine::write::change::LaneContext;
use crate::engine::write::change::Pending;
use crate::engine::write::projection::ShownRow;
use crate::engine::write::work::Work;
use crate::error::Error;
use crate::store::codec::KickedRoute;
use crate::store::codec::OutboxBody;
use crate::store::codec::StoredNotice;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::inbox::Addition;
use crate::store::outbox::OutboxId;
use crate::store::users::DatabaseClock;
use crate::store::users::Records;
use crate::store::users::UserChange;

/// Why a part of a batch was not committed.
pub(super) enum Failure {
    /// Nothing was committed.
    Sql(SqlError),
    /// COMMIT was sent and not answered.
    Uncertain(SqlError),
    /// These gateways have no life yet.
    NoLife(Vec<GatewayAddr>),
    /// An event grew too old while the transaction was open.
    TooLate,
}

impl From<SqlError> for Failure {
    fn from(error: SqlError) -> Self {
        Self::Sql(error)
    }
}

/// What a committed transaction has done.
pub(super) struct Committed {
    /// One for each event; None: it was dropped.
    pub outcomes: Vec<Option<Result<Outcome, Error>>>,
    pub records: Vec<(UserId, UserRecord)>,
    /// An instant before COMMIT was sent.
    pub complete_at: Instant,
    pub outbox: Option<OutboxId>,
    pub kicks: Vec<KickedRoute>,
    pub stored: Vec<StoredNotice>,
    /// Of whom others are shown something new.
    pub seen: BTreeSet<UserId>,
    /// Rows of this lane were taken over by another node while it stood still: these users have to be shown again.
    pub overtaken: Vec<UserId>,
}

impl Committed {
    fn nothing() -> Self {
        let (outcomes, records, kicks, stored, overtaken) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { outcomes, records, complete_at: Instant::now(), outbox: None, kicks, stored, seen: BTreeSet::new(), overtaken }
    }
}

/// One attempt to commit a batch.
pub(super) struct Transaction<'a> {
    pub tools: &'a LaneContext,
    pub connection: &'a mut Connection,
    /// Outbox rows with nothing left to show, deleted on the way.
    pub shown: &'a [ShownRow],
}

impl Transaction<'_> {
    /// On any error but an uncertain COMMIT nothing has happened; the caller rolls back.
    pub async fn run(mut self, events: &[Pending]) -> Result<Committed, Failure> {
        let mut users: Vec<UserId> = events.iter().map(|event| event.user).collect();
        users.sort_unstable();
        users.dedup();
        self.connection.begin().await?;
        self.connection.lock_users(&users).await?;
        let loaded = self.connection.load_users(&users).await?;
        if loaded.rows != users.len() {
            let what = format!("it returned {} of {} rows that are locked", loaded.rows, users.len());
            return Err(SqlError::Lost(what).into());
        }
        let current = self.read_lives(events, &loaded.records).await?;
        let now = loaded.clock.now();
        let inboxes = self.load_inboxes(events, now.minus(self.tools.lives.clock.slack(now))).await?;
        let mut work = Work::new(&loaded.records, current, inboxes);
        let mut outcomes: Vec<_> = events.iter().map(|event| self.apply(event, loaded.clock, &mut work)).collect();
        if work.changes_nothing() {
            self.connection.rollback().await?;
            return Ok(Committed { outcomes, ..Committed::nothing() });
        }
        self.erase(&work, events, &mut outcomes).await?;
        let stored = self.write_inboxes(&mut work, loaded.clock).await?;
        self.write_history(&work).await?;
        let after: BTreeMap<UserId, UserRecord> = work.after.into_iter().collect();
        let shown = work.seen.iter().map(|user| user.get()).collect();
        let body = OutboxBody { kicks: work.kicks.clone(), stored: stored.clone(), shown, ..OutboxBody::default() };
        let (outbox, overtaken) = self.write(&loaded.records, &after, body).await?;
        let is_stranger = |user: &UserId| loaded.records.get(user).is_none_or(|record| record.version == Version::NONE);
        users.retain(|user| is_stranger(user) && !after.contains_key(user));
        self.connection.remove_strangers(&users).await?;
        let max_age = self.tools.settings.max_event_age;
        let late = |(event, outcome): (&Pending, &Option<_>)| outcome.is_some() && event.received.elapsed() >= max_age;
        if events.iter().zip(&outcomes).any(late) {
            return Err(Failure::TooLate);
        }
        let complete_at = Instant::now();
        match self.connection.commit().await {
            Ok(()) => {
                let (records, kicks, seen) = (after.into_iter().collect(), work.kicks, work.seen);
                Ok(Committed { outcomes, records, complete_at, outbox: Some(outbox), kicks, stored, seen, overtaken })
            }
            Err(SqlError::Deadlock) => Err(Failure::Sql(SqlError::Deadlock)),
            Err(error) => Err(Failure::Uncertain(error)),
        }
    }

    /// Most messages are only added: then the others need not be read one by one.
    async fn load_inboxes(&mut self, events: &[Pending], over_by: Timestamp) -> Result<HashMap<UserId, Inbox>, SqlError> {
        let (mut to_add, mut whole) = (Vec::new(), BTreeSet::new());
        for event in events {
            match &event.change {
                Change::Inbox(InboxChange::Store(message)) => to_add.push((event.user, &*message.message_id)),
                Change::Inbox(_) => drop(whole.insert(event.user)),
                _ => {}
            }
        }
        to_add.retain(|(user, _)| !whole.contains(user));
        let mut inboxes = self.connection.load_inboxes_to_add(&to_add, over_by).await?;
        inboxes.extend(self.connection.load_inboxes(&whole.into_iter().collect::<Vec<_>>()).await?);
        Ok(inboxes)
    }

    /// Reads, without locking, the lives that the events and the routes name, and returns the gateways' current ones. A bind's
    /// epoch is decided by this, inside the transaction; memory may be behind.
    async fn read_lives(&mut self, events: &[Pending], records: &Records) -> Result<HashMap<GatewayAddr, Arc<Life>>, Failure> {
        let binds = || events.iter().filter_map(|event| if let Change::Bind(bind) = &event.change { Some(bind) } else { None });
        let table = self.tools.lives.table();
        let unknown =
            records.values().flat_map(|record| &record.routes).map(|route| route.epoch).filter(|e| table.get(*e).is_none());
        let claimed = events.iter().filter_map(|event| event.change.epoch());
        let mut epochs: Vec<Epoch> = claimed.chain(unknown).collect();
        epochs.sort_unstable();
        epochs.dedup();
        self.tools.lives.learn(&self.connection.lives_by_epoch(&epochs).await?);

        // Also of events that claim a life which is over: whether another process has the address by now.
        let table = self.tools.lives.table();
        let is_over = |epoch: Epoch| table.get(epoch).is_none_or(|life| !life.is_alive());
        let mut gateways: Vec<GatewayAddr> =
            binds().filter(|bind| bind.epoch.is_none_or(is_over)).map(|bind| bind.gateway.clone()).collect();
        let claimed = events.iter().filter_map(|event| event.change.epoch()).filter(|epoch| is_over(*epoch));
        gateways.extend(claimed.filter_map(|epoch| table.get(epoch)).map(|life| life.gateway.clone()));
        gateways.sort_unstable();
        gateways.dedup();
        let lives = self.connection.current_lives(&gateways).await?;
        self.tools.lives.learn(&lives);
        let current: HashMap<_, _> = lives.into_iter().map(|life| (life.gateway.clone(), life)).collect();
        let mut missing: Vec<_> = binds().filter(|bind| bind.epoch.is_none()).map(|bind| bind.gateway.clone()).collect();
        missing.sort_unstable();
        missing.dedup();
        missing.retain(|gateway| !current.contains_key(gateway));
        if missing.is_empty() { Ok(current) } else { Err(Failure::NoLife(missing)) }
    }

    /// Applies one event to what the events before it have left. A panic in the rules costs its own event and no other.
    fn apply<'e>(&self, event: &'e Pending, clock: DatabaseClock, work: &mut Work<'e>) -> Option<Result<Outcome, Error>> {
        if !event.is_wanted(self.tools.settings.max_event_age) {
            return None;
        }
        let table = self.tools.lives.table();
        let (settings, now, known) = (&self.tools.settings, clock.now(), &self.tools.lives.clock);
        let context = Context {
            policy: &settings.policy,
            lives: &table,
            now,
            clock: clock.version(),
            route_ttl: settings.route_ttl,
            heartbeat_interval: settings.heartbeat_interval,
            slack: known.slack(now),
            clock_is_steady: known.is_steady_at(now),
            history: Rules { session_gap: settings.session_gap, clock_set_at: known.set_at() },
        };
        let record = work.record(event.user);
        let applied = catch_unwind(AssertUnwindSafe(|| match &event.change {
            Change::Bind(bind) => match work.life_of(bind, &table) {
                Some(life) => record.apply(&Event::Bind { bind, life: &life, waited: event.received.elapsed() }, &context),
                None => Applied::unchanged(work.fenced(&bind.gateway)),
            },
            Change::Unbind(unbind) => work.fenced_unbind(unbind, record.apply(&Event::Unbind(unbind), &context), &table),
            Change::Sweep => record.apply(&Event::Sweep, &context),
            Change::SetStatus(set) => record.apply(&Event::SetStatus(set), &context),
            Change::EndStatus => record.apply(&Event::EndStatus, &context),
            Change::ForceOffline(force) => record.apply(&Event::ForceOffline(force), &context),
            Change::Forget => {
                work.forget(event.user, &record);
                record.apply(&Event::Forget, &context)
            }
            Change::Inbox(change) => {
                let inbox = work.inboxes.entry(event.user).or_default();
                let limits = &Limits { slack: context.slack, keeps_what_is_over: !context.clock_is_steady, ..settings.inbox };
                let applied = record.change_inbox(change, inbox, limits, &context);
                if let InboxChange::Store(message) = change {
                    work.note_stored(event.user, message, &applied.outcome);
                }
                applied
            }
        }));
        Some(match applied {
            Ok(applied) => Ok(work.keep(event.user, applied, &table)),
            Err(_) => {
                error!(user.id = %event.user, "the rules panicked on a change of this user; the change was dropped");
                Err(Error::Internal { what: "this change cannot be made" })
            }
        })
    }

    /// Erases those who are to be forgotten, before anything is written that came after that.
    async fn erase(
        &mut self,
        work: &Work<'_>,
        events: &[Pending],
        outcomes: &mut [Option<Result<Outcome, Error>>],
    ) -> Result<(), SqlError> {
        for user in &work.forgotten {
            let erased = self.connection.erase(*user).await?;
            let asked = events
                .iter()
                .zip(outcomes.iter_mut())
                .find(|(event, _)| event.user == *user && matches!(event.change, Change::Forget));
            if let Some((_, Some(Ok(Outcome::Forgotten { rows, .. })))) = asked {
                *rows += erased;
            }
        }
        Ok(())
    }

    async fn write_history(&mut self, work: &Work<'_>) -> Result<(), SqlError> {
        if self.tools.settings.keeps_history {
            self.connection.add_log(&work.log).await?;
            self.connection.add_days(&work.days).await?;
            self.tools.metrics.presence.history_rows.inc_by((work.log.len() + work.days.len()) as u64);
            self.tools.metrics.presence.history_skipped.inc_by(work.skipped);
        }
        Ok(())
    }

    /// Writes down which messages came and went. Returns what push services are to be told.
    async fn write_inboxes(&mut self, work: &mut Work<'_>, clock: DatabaseClock) -> Result<Vec<StoredNotice>, SqlError> {
        let (mut additions, mut stored) = (Vec::new(), Vec::new());
        for (user, seq, message) in &work.messages {
            let inbox = work.inboxes.get(user).filter(|inbox| inbox.added.contains(seq));
            let Some(kept) = inbox.and_then(|inbox| inbox.get(*seq)) else { continue };
            additions.push(Addition { user: *user, seq: *seq, message, expires_at: kept.expires_at });
            stored.push(StoredNotice {
                user_id: user.get(),
                message_id: message.message_id.clone(),
                message_type: message.message_type.clone(),
                stored_at_ms: clock.now().0,
            });
        }
        for (user, inbox) in &work.inboxes {
            self.connection.remove_messages(*user, &inbox.removed).await?;
        }
        self.connection.add_messages(&additions, clock.now()).await?;
        Ok(stored)
    }

    async fn write(
        &mut self,
        before: &Records,
        after: &BTreeMap<UserId, UserRecord>,
        mut body: OutboxBody,
    ) -> Result<(OutboxId, Vec<UserId>), SqlError> {
        let absent = UserRecord::default();
        let mut changes = Vec::with_capacity(after.len());
        for (user, after) in after {
            changes.push(UserChange { user: *user, before: before.get(user).unwrap_or(&absent), after });
        }
        self.connection.write_users(&changes).await?;
        let rows: Vec<OutboxId> = self.shown.iter().map(|row| row.id.clone()).collect();
        let all_deleted = self.connection.delete_outbox(&rows).await? == rows.len();
        let overtaken = if all_deleted { Vec::new() } else { self.shown.iter().flat_map(|row| row.users.clone()).collect() };
        for change in &changes {
            body.changed(change.user, change.after);
        }
        Ok((self.connection.add_outbox(&self.tools.node_id, &body).await?, overtaken))
    }
}
