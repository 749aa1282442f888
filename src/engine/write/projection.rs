//! Each lane has a projector that shows its batches to the outside, in order; the lane never waits for it. What it cannot do
//! in time is left to the outbox row that was written with the batch: any node claims rows that are two seconds old, reads the
//! users *now* from SQL, and shows them unconditionally.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::domain::id::UserId;
use crate::domain::user::UserRecord;
use crate::engine::write::publisher::Publisher;
use crate::engine::write::publisher::ShownRecord;
use crate::store::codec::ChangedUser;
use crate::store::codec::KickedRoute;
use crate::store::codec::StoredNotice;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::outbox::OutboxId;

/// Batches that may wait for a projector; one more is left to the outbox.
const QUEUE: usize = 64;
/// A batch that is shown later than this after its COMMIT might undo a newer one: it is left to the outbox.
const LATE: Duration = Duration::from_secs(1);

/// A committed batch.
pub struct Batch {
    pub records: Vec<(UserId, UserRecord)>,
    pub kicks: Vec<KickedRoute>,
    pub stored: Vec<StoredNotice>,
    /// Of whom others are shown something new.
    pub seen: BTreeSet<UserId>,
    pub outbox: OutboxId,
    /// Of L2, before the transaction began.
    pub generation: u64,
    pub committed: Instant,
    /// Told when L2 has it.
    pub in_l2: oneshot::Sender<()>,
}

/// An outbox row with nothing left to show.
pub struct ShownRow {
    pub id: OutboxId,
    pub users: Vec<UserId>,
}

/// Rows that the projector is done with, for the lane to delete.
#[derive(Default)]
struct ShownRows {
    rows: Mutex<Vec<ShownRow>>,
    added: Notify,
}

impl ShownRows {
    fn push(&self, row: ShownRow) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
        self.added.notify_one();
    }

    fn take(&self) -> Vec<ShownRow> {
        std::mem::take(&mut *self.rows.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A lane's end of its projector.
pub struct ToProjector {
    batches: mpsc::Sender<Batch>,
    shown: Arc<ShownRows>,
}

impl ToProjector {
    /// Starts a projector. It ends when its lane does, after the last batch.
    pub fn start(publisher: &Arc<Publisher>, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Self {
        let (batches, mut queue) = mpsc::channel::<Batch>(QUEUE);
        let shown = Arc::<ShownRows>::default();
        let (rows, stop) = (Arc::clone(&shown), stop.clone());
        let mut projector =
            Projector { publisher: publisher.clone(), connection: ConnectionSlot::new(publisher.database.clone()) };
        tasks.spawn(async move {
            let _stop_node_on_panic = stop.drop_guard();
            while let Some(batch) = queue.recv().await {
                if let Some(row) = projector.project(batch).await {
                    rows.push(row);
                }
            }
        });
        Self { batches, shown }
    }

    /// Hands a batch over. If there is no room it is left to the outbox.
    pub fn hand_over(&self, batch: Batch) {
        let _ = self.batches.try_send(batch); // the row stays, and is repaired
    }

    pub fn take_shown(&self) -> Vec<ShownRow> {
        self.shown.take()
    }

    /// Waits until there may be something to take.
    pub async fn has_shown(&self) {
        self.shown.added.notified().await;
    }
}

struct Projector {
    publisher: Arc<Publisher>,
    connection: ConnectionSlot,
}

impl Projector {
    /// Shows a batch. Returns its row if there is nothing left to do.
    async fn project(&mut self, batch: Batch) -> Option<ShownRow> {
        if batch.committed.elapsed() > LATE {
            return None;
        }
        let publisher = &self.publisher;
        let changed: Vec<ChangedUser> = batch.records.iter().map(|(user, record)| ChangedUser::of(*user, record)).collect();
        let users = batch.records.iter().map(|(user, _)| *user).collect();
        let records: Vec<_> = batch.records.into_iter().map(|(user, record)| publisher.shown(user, record)).collect();
        let winners = publisher.write_l2(&records, batch.generation).await;
        if winners.is_some() {
            let _ = batch.in_l2.send(()); // the callers may have been answered already
        }
        if let Some(hints) = &publisher.hints {
            hints.tell(changed).await;
        }
        let kicked = publisher.kick(&batch.kicks).await; // gateways that attach hear it whatever is missing
        let winners = winners?;
        publisher.announce(&records, &winners).await;
        publisher.announce_statuses(&records, &winners, &batch.seen).await;
        kicked?;
        publisher.notify_stored(&batch.stored).await?;
        self.show_overtaken(&records, &winners, &batch.seen).await.ok()?;
        Some(ShownRow { id: batch.outbox, users })
    }

    /// Shows those winners anew who have a newer record by now: what was said of them may have crossed what others said.
    async fn show_overtaken(
        &mut self,
        records: &[ShownRecord],
        winners: &BTreeSet<UserId>,
        seen: &BTreeSet<UserId>,
    ) -> Result<(), SqlError> {
        let users: Vec<UserId> = winners.iter().copied().collect();
        if users.is_empty() || self.publisher.is_empty() {
            return Ok(());
        }
        let now = match &self.publisher.l2 {
            Some(l2) => l2.versions(&users).await,
            None => {
                let mut connection = self.connection.take().await?;
                let records = connection.load_users(&users).await?.records;
                self.connection.give_back(connection);
                records.into_iter().map(|(user, record)| (user, record.version)).collect()
            }
        };
        let newer = |(user, record, _): &ShownRecord| {
            (winners.contains(user) && now.get(user).is_none_or(|now| *now > record.version)).then_some(*user)
        };
        let overtaken: Vec<UserId> = records.iter().filter_map(newer).collect();
        if overtaken.is_empty() { Ok(()) } else { self.publisher.show_with(&mut self.connection, &overtaken, seen).await }
    }
}
