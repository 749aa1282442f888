//! One lane: takes all that is queued as one batch, commits it as one transaction, answers, and takes what has queued up
//! meanwhile. There is no timer: under load batches grow by themselves.
//!
//! A lane is a task that nobody cancels, and it owns its connection: a transaction dropped half way by a cancelled caller
//! would lose writes of others. Rules that each prevent a known outage:
//!
//! * An event that is too old, or whose caller has gone, is dropped: when it is taken, again after the row locks were
//!   obtained, and once more before COMMIT. A database that stood still must not apply old log-ins when it comes back.
//! * Lost before COMMIT was sent: run again. Lost after: nobody knows, so it is never run again; its callers are told to
//!   repeat (a repeat is harmless) and its users leave L1.
//! * Somebody else holds a user's row, perhaps a node that stands still: that user's events are parked, all others go on.
//! * A deadlock: halved and run again, at most five times. An error about rows: halved until the one bad event fails alone.
//! * Any other error is the server's trouble: run again, ever later, until something has committed. Reaching the server is no
//!   recovery: one that is read-only lets everybody in.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing::info;
use tracing::warn;

use crate::backoff::Backoff;
use crate::domain::event::Outcome;
use crate::engine::write::busiest::Busiest;
use crate::engine::write::busiest::Counter;
use crate::engine::write::change::LaneContext;
use crate::engine::write::change::Pending;
use crate::engine::write::lane::recovery::Part;
use crate::engine::write::projection::Batch;
use crate::engine::write::projection::ShownRow;
use crate::engine::write::projection::ToProjector;
use crate::engine::write::transaction::Committed;
use crate::engine::write::transaction::Failure;
use crate::engine::write::transaction::Transaction;
use crate::error::Error;
use crate::store::codec::ChangedUser;
use crate::store::codec::status_word;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::FILE_MOVED;
use crate::store::outbox::OutboxId;
use crate::telemetry::spans::Span;

mod recovery;

/// Events of one transaction, and their size: it has to fit into the server's packets and logs.
const MAX_BATCH: usize = 1024;
const MAX_BATCH_BYTES: usize = 1024 * 1024;
/// What callers leave of a batch to the background, if it has something to do.
const BACKGROUND_SHARE: usize = MAX_BATCH / 8;
/// How often the lane looks whether parked users are free.
const PARKED_INTERVAL: Duration = Duration::from_millis(100);
/// Between attempts to commit anything, from the second failure on.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LIMIT: Duration = Duration::from_secs(2);
/// An idle lane asks for a sign of life, well within the session's wait_timeout of 10 s.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// How long a committed batch's callers wait for L2 to have it.
const L2_PATIENCE: Duration = Duration::from_millis(50);
/// How long callers wait for the hint to be published when L2 was not updated in time.
const HINT_PATIENCE: Duration = Duration::from_millis(50);
/// After this much idleness the lane deletes its last outbox row itself.
const OUTBOX_IDLE: Duration = Duration::from_millis(500);

pub(super) struct Lane {
    tools: Arc<LaneContext>,
    callers: mpsc::Receiver<Pending>,
    background: mpsc::Receiver<Pending>,
    /// Events of users whose rows another session has locked, in their order.
    parked: Vec<Pending>,
    busiest: Counter,
    connection: Option<Connection>,
    projector: ToProjector,
    /// Outbox rows with nothing left to show, deleted with the next batch.
    shown: Vec<ShownRow>,
    /// Batches whose callers are answered once L2 has them.
    answering: JoinSet<()>,
    /// Since when nothing has committed, although it should have.
    failing_since: Option<Instant>,
    has_told_denied: bool,
    backoff: Backoff,
    /// Ends the node.
    stop: CancellationToken,
}

impl Lane {
    pub fn new(
        tools: Arc<LaneContext>,
        callers: mpsc::Receiver<Pending>,
        background: mpsc::Receiver<Pending>,
        projector: ToProjector,
        busiest: Arc<ArcSwap<Busiest>>,
        stop: CancellationToken,
    ) -> Self {
        let (parked, shown, answering) = (Vec::new(), Vec::new(), JoinSet::new());
        let (connection, failing_since, backoff) = (None, None, Backoff::new(RETRY_FIRST, RETRY_LIMIT));
        Self {
            tools,
            callers,
            background,
            parked,
            busiest: Counter::new(busiest),
            connection,
            projector,
            shown,
            answering,
            failing_since,
            has_told_denied: false,
            backoff,
            stop,
        }
    }

    pub async fn run(mut self, shutdown: CancellationToken) {
        let _stop_node_on_panic = shutdown.clone().drop_guard();
        let mut idle_since = Instant::now();
        while let Some(first) = self.wait(idle_since, &shutdown).await {
            if let Wake::Event(first) = first {
                let batch = self.fill(first);
                self.busiest.note(&batch);
                self.settle(batch).await;
                idle_since = Instant::now();
            }
            self.release_parked().await;
            self.busiest.show();
        }
        while self.answering.join_next().await.is_some() {}
        self.delete_shown().await;
    }

    /// Waits for the next event, and does what an idle lane has to do. None: the lane is closed and empty.
    async fn wait(&mut self, idle_since: Instant, shutdown: &CancellationToken) -> Option<Wake> {
        self.shown.extend(self.projector.take_shown());
        while self.answering.try_join_next().is_some() {}
        if !self.shown.is_empty() && idle_since.elapsed() >= OUTBOX_IDLE {
            self.delete_shown().await;
        }
        let pause = match (self.parked.is_empty(), self.shown.is_empty()) {
            (false, _) => PARKED_INTERVAL,
            (_, false) => OUTBOX_IDLE,
            _ => PING_INTERVAL,
        };
        let closed = self.callers.is_closed();
        tokio::select! {
            biased;
            () = shutdown.cancelled(), if !closed => {
                self.callers.close();
                self.background.close();
                Some(Wake::Nothing)
            }
            Some(event) = self.callers.recv() => Some(Wake::Event(event)),
            Some(event) = self.background.recv() => Some(Wake::Event(event)),
            () = self.projector.has_shown(), if !closed => Some(Wake::Nothing),
            () = sleep_until((Instant::now() + pause).into()), if !closed || !self.parked.is_empty() => {
                self.keep_connection().await;
                Some(Wake::Nothing)
            }
            else => None,
        }
    }

    /// All that is queued, up to the limit: callers first, but not all of it while the background has something to do.
    fn fill(&mut self, first: Pending) -> Vec<Pending> {
        let mut bytes = first.change.bytes();
        let mut batch = vec![first];
        let mut take = |queue: &mut mpsc::Receiver<Pending>, batch: &mut Vec<Pending>, limit: usize| {
            while batch.len() < limit && bytes < MAX_BATCH_BYTES {
                let Ok(event) = queue.try_recv() else { break };
                bytes += event.change.bytes();
                batch.push(event);
            }
        };
        take(&mut self.callers, &mut batch, MAX_BATCH - BACKGROUND_SHARE);
        take(&mut self.background, &mut batch, MAX_BATCH);
        take(&mut self.callers, &mut batch, MAX_BATCH);
        batch
    }

    /// Brings a batch to an end, one way or another, event by event if need be.
    async fn settle(&mut self, batch: Vec<Pending>) {
        self.tools.metrics.lane_batch_events.observe(batch.len() as f64);
        let mut parts = VecDeque::from([Part { events: batch, tries: 0 }]);
        while let Some(mut part) = parts.pop_front() {
            part.events = self.wanted(part.events);
            part.events = self.not_behind_parked(part.events);
            for event in part.events.iter_mut().filter(|event| event.under_way.is_none()) {
                event.under_way = Some(self.tools.cache.begin_write(event.user));
                event.note_taken();
            }
            if part.events.is_empty() {
                continue;
            }
            let generation = self.tools.publisher.generation();
            match self.attempt(&part.events).await {
                Ok(committed) => self.acknowledge(part.events, committed, generation),
                Err(failure) => self.recover(part, failure, &mut parts).await,
            }
        }
    }

    /// Drops the events nobody waits for any more.
    fn wanted(&self, events: Vec<Pending>) -> Vec<Pending> {
        let max_age = self.tools.settings.max_event_age;
        let (wanted, dropped): (Vec<_>, Vec<_>) = events.into_iter().partition(|event| event.is_wanted(max_age));
        for event in dropped {
            if !event.is_given_up() {
                self.tools.write_health.note_refused();
            }
            event.answer(Err(Error::unavailable("the change waited for too long and was not made")));
        }
        wanted
    }

    async fn attempt(&mut self, events: &[Pending]) -> Result<Committed, Failure> {
        let mut connection = self.connected().await?;
        let began = Instant::now();
        let spans: Vec<Span> = events.iter().filter_map(|event| event.begin("commit")).collect();
        let shown = &self.shown;
        let result = Transaction { tools: &self.tools, connection: &mut connection, shown }.run(events).await;
        let result = result.and_then(|committed| self.must_be_in_place(committed));
        let usable = match &result {
            Ok(_) => {
                self.tools.metrics.lane_commit_seconds.observe(began.elapsed().as_secs_f64());
                self.note_committed();
                true
            }
            Err(Failure::Uncertain(_)) => false,
            Err(Failure::Sql(error)) if error.ends_connection() => false,
            Err(_) => connection.rollback().await.is_ok(),
        };
        self.connection = usable.then_some(connection);
        for mut span in spans {
            span.note("im_presence.batch", events.len() as u64);
            if result.is_err() {
                span.fail("it did not commit");
            }
        }
        result
    }

    /// What was committed to a file that nobody will find again is not durable.
    fn must_be_in_place(&self, committed: Committed) -> Result<Committed, Failure> {
        if self.tools.database.is_in_place() {
            return Ok(committed);
        }
        error!("{FILE_MOVED}: this node ends");
        self.stop.cancel();
        Err(Failure::Uncertain(SqlError::Lost(FILE_MOVED.to_owned())))
    }

    /// Shows the change to this node's readers, hands it to the projector, and sees to it that the callers are told: when L2
    /// has it, or after a moment. The lane does not wait for that.
    fn acknowledge(&mut self, events: Vec<Pending>, committed: Committed, generation: u64) {
        let publisher = self.tools.publisher.clone();
        for (user, record) in &committed.records {
            self.tools.cache.committed(*user, record.clone(), committed.complete_at, publisher.l2.is_some());
        }
        for (_, record) in committed.records.iter().filter(|(user, _)| committed.seen.contains(user)) {
            self.tools.metrics.presence.status_change(status_word(record.standing().shown()));
        }
        self.tools.feed.push(committed.records.iter().map(|(user, record)| (*user, record.shown().version)));
        for (user, _) in committed.records.iter().filter(|(_, record)| record.inbox_pending > 0 && !record.routes.is_empty()) {
            self.tools.inboxes.wake(*user);
        }
        let answers = events.into_iter().zip(committed.outcomes);
        let Some(outbox) = committed.outbox else { return answer(answers) };
        self.shown.clear();
        if !committed.overtaken.is_empty() {
            let (publisher, users) = (publisher.clone(), committed.overtaken);
            self.answering.spawn(async move {
                if let Err(error) = publisher.show_now(&users).await {
                    warn!(%error, "records that another node published at the same time could not be checked again");
                }
            });
        }
        if publisher.is_empty() && committed.kicks.is_empty() {
            self.shown.push(ShownRow { id: outbox, users: Vec::new() });
            return answer(answers);
        }
        let (in_l2, confirmed) = oneshot::channel();
        let committed_at = Instant::now();
        let changed: Vec<_> = committed.records.iter().map(|(user, record)| ChangedUser::of(*user, record)).collect();
        let Committed { records, kicks, stored, seen, .. } = committed;
        self.projector.hand_over(Batch { records, kicks, stored, seen, outbox, generation, committed: committed_at, in_l2 });
        let Some(l2) = publisher.l2.clone() else { return answer(answers) };
        let answers: Vec<_> = answers.collect();
        let spans: Vec<Span> = answers.iter().filter_map(|(event, _)| event.begin("show in Redis")).collect();
        self.answering.spawn(async move {
            let is_in_l2 = l2.is_usable() && timeout(L2_PATIENCE, confirmed).await.is_ok_and(|told| told.is_ok());
            // The change is durable either way. Other nodes hear of it now: who could say when L2 answers?
            if let Some(hints) = publisher.hints.as_ref().filter(|_| !is_in_l2) {
                let _ = timeout(HINT_PATIENCE, hints.tell(changed)).await; // lost, it leaves a gap, and others see that
            }
            drop(spans);
            answer(answers.into_iter());
        });
    }

    async fn connected(&mut self) -> Result<Connection, SqlError> {
        match self.connection.take().filter(|kept| self.tools.database.is_current(kept)) {
            Some(connection) => Ok(connection),
            None => self.tools.database.connect(Purpose::Lane).await,
        }
    }

    /// One line when it begins, however often it fails then; and one for a right that is missing.
    fn note_failing(&mut self, error: &SqlError) {
        self.tools.metrics.store_error("lane");
        if matches!(error, SqlError::Denied(_)) && !std::mem::replace(&mut self.has_told_denied, true) {
            error!(%error, "changes cannot be stored until the database's user is granted this");
        }
        if self.failing_since.is_none() {
            self.failing_since = Some(Instant::now());
            self.tools.write_health.begin_failing();
            warn!(%error, "a lane cannot commit: changes wait or are refused");
        }
    }

    fn note_committed(&mut self) {
        self.backoff.reset();
        self.has_told_denied = false;
        if let Some(since) = self.failing_since.take() {
            self.tools.write_health.end_failing();
            info!(duration_ms = since.elapsed().as_millis() as u64, "a lane commits again");
        }
    }

    /// Keeps the server from ending an idle session, and has one ready for the next event.
    async fn keep_connection(&mut self) {
        if self.failing_since.is_some() {
            return self.probe().await;
        }
        if !self.parked.is_empty() || self.tools.database.engine == Engine::Sqlite && self.connection.is_some() {
            return;
        }
        if let Ok(mut connection) = self.connected().await
            && connection.ping().await.is_ok()
        {
            self.connection = Some(connection);
        }
    }

    /// Without changes to store, a lane that failed finds out by a commit of its own whether it could.
    async fn probe(&mut self) {
        if let Ok(mut connection) = self.connected().await
            && connection.probe_write(&self.tools.node_id).await.is_ok()
        {
            self.connection = Some(connection);
            self.note_committed();
        }
    }

    async fn delete_shown(&mut self) {
        self.shown.extend(self.projector.take_shown());
        let rows: Vec<OutboxId> = self.shown.drain(..).map(|row| row.id).collect();
        let Ok(mut connection) = self.connected().await else { return };
        if connection.delete_outbox(&rows).await.is_ok() {
            self.connection = Some(connection);
        }
    }
}

fn answer(answers: impl Iterator<Item = (Pending, Option<Result<Outcome, Error>>)>) {
    for (event, outcome) in answers {
        if let Some(outcome) = outcome {
            event.answer(outcome);
        }
    }
}

#[allow(clippy::large_enum_variant)] // there is one at a time, and it is moved on at once
enum Wake {
    Event(Pending),
    Nothing,
}
