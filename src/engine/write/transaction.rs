//! The transaction of a batch: lock all users in order, read them, apply each event in its order, write what changed and one
//! outbox row, COMMIT.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tracing::error;

use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::inbox::Inbox;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::InboxOutcome;
use crate::domain::inbox::Limits;
use crate::domain::inbox::NewMessage;
use crate::domain::time::Timestamp;
use crate::domain::user::Applied;
use crate::domain::user::Bind;
use crate::domain::user::Context;
use crate::domain::user::Event;
use crate::domain::user::Outcome;
use crate::domain::user::Unbind;
use crate::domain::user::UserRecord;
use crate::engine::write::change::Change;
use crate::engine::write::change::LaneContext;
use crate::engine::write::change::Pending;
use crate::engine::write::projection::ShownRow;
use crate::error::Error;
use crate::store::codec::KickedRoute;
use crate::store::codec::OutboxBody;
use crate::store::codec::StoredNotice;
use crate::store::codec::reason_to_i32;
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
    /// Rows of this lane were taken over by another node while it stood still: these users have to be shown again.
    pub overtaken: Vec<UserId>,
}

impl Committed {
    fn nothing() -> Self {
        let (outcomes, records, kicks, stored, overtaken) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { outcomes, records, complete_at: Instant::now(), outbox: None, kicks, stored, overtaken }
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
        let before = &loaded.records;
        let (now, clock) = (loaded.clock.now(), &self.tools.lives.clock);
        let (clock_is_steady, slack) = (clock.is_steady_at(now), clock.slack(now));
        let inboxes = self.load_inboxes(events, now.minus(slack)).await?;
        let (after, kicks, messages) = (Records::default(), Vec::new(), Vec::new());
        let mut work = Work { current, before, after, kicks, inboxes, messages, clock_is_steady, slack };
        let outcomes: Vec<_> = events.iter().map(|event| self.apply(event, loaded.clock, &mut work)).collect();
        if work.after.is_empty() {
            self.connection.rollback().await?;
            return Ok(Committed { outcomes, ..Committed::nothing() });
        }
        let stored = self.write_inboxes(&mut work, loaded.clock).await?;
        let after: BTreeMap<UserId, UserRecord> = work.after.into_iter().collect();
        let body = OutboxBody { kicks: work.kicks.clone(), stored: stored.clone(), ..OutboxBody::default() };
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
                let (records, kicks) = (after.into_iter().collect(), work.kicks);
                Ok(Committed { outcomes, records, complete_at, outbox: Some(outbox), kicks, stored, overtaken })
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
                Change::Bind(_) | Change::Unbind(_) | Change::Sweep => {}
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
        let settings = &self.tools.settings;
        let context = Context {
            policy: &settings.policy,
            lives: &table,
            now: clock.now(),
            clock: clock.version(),
            route_ttl: settings.route_ttl,
            heartbeat_interval: settings.heartbeat_interval,
            slack: work.slack,
            clock_is_steady: work.clock_is_steady,
        };
        let record = work.record(event.user);
        let applied = match &event.change {
            Change::Bind(bind) => match work.life_of(bind, &table) {
                Some(life) => {
                    let waited = event.received.elapsed();
                    catch_unwind(AssertUnwindSafe(|| record.apply(&Event::Bind { bind, life: &life, waited }, &context)))
                }
                None => Ok(Applied { outcome: work.fenced(&bind.gateway), next: None }),
            },
            Change::Unbind(unbind) => {
                let applied = catch_unwind(AssertUnwindSafe(|| record.apply(&Event::Unbind(unbind), &context)));
                applied.map(|applied| work.fenced_unbind(unbind, applied, &table))
            }
            Change::Sweep => catch_unwind(AssertUnwindSafe(|| record.apply(&Event::Sweep, &context))),
            Change::Inbox(change) => {
                let inbox = work.inboxes.entry(event.user).or_default();
                let limits = &Limits { slack: context.slack, keeps_what_is_over: !context.clock_is_steady, ..settings.inbox };
                let applied = catch_unwind(AssertUnwindSafe(|| record.change_inbox(change, inbox, limits, &context)));
                if let (InboxChange::Store(message), Ok(applied)) = (change, &applied) {
                    work.note_stored(event.user, message, &applied.outcome);
                }
                applied
            }
        };
        Some(match applied {
            Ok(applied) => Ok(work.keep(event.user, applied)),
            Err(_) => {
                error!(user.id = %event.user, "the rules panicked on a change of this user; the change was dropped");
                Err(Error::Internal { what: "this change cannot be made" })
            }
        })
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
            body.changed(change.user, change.after.version);
        }
        Ok((self.connection.add_outbox(&self.tools.node_id, &body).await?, overtaken))
    }
}

/// What a batch has done so far, in memory.
struct Work<'a> {
    current: HashMap<GatewayAddr, Arc<Life>>,
    before: &'a Records,
    after: Records,
    kicks: Vec<KickedRoute>,
    inboxes: HashMap<UserId, Inbox>,
    /// Messages that were stored, with their numbers.
    messages: Vec<(UserId, u64, &'a NewMessage)>,
    clock_is_steady: bool,
    slack: Duration,
}

impl<'a> Work<'a> {
    fn note_stored(&mut self, user: UserId, message: &'a NewMessage, outcome: &Outcome) {
        if let Outcome::Inbox(InboxOutcome::Stored { seq, again: false }) = outcome {
            self.messages.push((user, *seq, message));
        }
    }

    fn record(&self, user: UserId) -> UserRecord {
        self.after.get(&user).or_else(|| self.before.get(&user)).cloned().unwrap_or_default()
    }

    /// The life a bind belongs to. None: the one it claims is over, or another gateway's.
    fn life_of(&self, bind: &Bind, table: &LifeTable) -> Option<Arc<Life>> {
        match bind.epoch {
            None => self.current.get(&bind.gateway).cloned(),
            Some(epoch) => table.get(epoch).filter(|life| life.is_alive() && life.gateway == bind.gateway).cloned(),
        }
    }

    /// An unbind that found nothing is fenced if the life it claims is over: its gateway has to know.
    fn fenced_unbind(&self, unbind: &Unbind, applied: Applied, table: &LifeTable) -> Applied {
        let over = unbind.epoch().map(|epoch| table.get(epoch)).filter(|life| life.is_none_or(|life| !life.is_alive()));
        match (over, &applied.outcome) {
            (Some(life), Outcome::NotBound { .. }) => {
                let current = life.and_then(|life| self.current.get(&life.gateway));
                Applied { outcome: Outcome::Fenced(Fence::of(current.into_iter().map(|life| &**life))), next: None }
            }
            _ => applied,
        }
    }

    fn fenced(&self, gateway: &GatewayAddr) -> Outcome {
        Outcome::Fenced(Fence::of(self.current.get(gateway).into_iter().map(|life| &**life)))
    }

    fn keep(&mut self, user: UserId, applied: Applied) -> Outcome {
        if let Outcome::Bound { kicked, .. } = &applied.outcome {
            self.kicks.extend(kicked.iter().map(|(route, reason)| KickedRoute {
                user_id: user.get(),
                device_id: route.device.to_string(),
                epoch: route.epoch.0,
                bound_version: route.bound_version.0,
                reason: reason_to_i32(*reason),
            }));
        }
        if let Some(next) = applied.next {
            self.after.insert(user, next);
        }
        applied.outcome
    }
}
