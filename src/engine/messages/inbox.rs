//! Bringing stored messages to devices: in their order, a window at a time, again until a device has acknowledged them.
//!
//! A user is drained when a bind commits while messages wait, or when a message is stored while a live route is there; both
//! are seen under the user's row lock, so neither can miss the other. Besides, one node looks regularly for users who are
//! online and have messages: after a crash, and for devices that did not acknowledge.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use tracing::warn;

use crate::domain::event::Outcome;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::InboxOutcome;
use crate::domain::inbox::is_for;
use crate::engine::messages::delivery::Deliveries;
use crate::engine::messages::streams::ORDER_BYTES;
use crate::engine::read::directory::Directory;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::inbox_queue::InboxQueue;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::memory::Memory;
use crate::memory::Share;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;
pub use crate::store::inbox::StoredHead;
pub use crate::store::inbox::StoredMessage;
use crate::store::readers::Readers;

/// Users drained at the same time. Most of them wait for devices, and must not hold up the others.
pub const DRAINERS: usize = 1_024;
/// Connections that read inboxes.
pub const READERS: usize = 8;
/// Messages on their way to one user.
const WINDOW: i64 = 64;
/// How often one node looks for users to drain and messages that are over.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long a node that stops keeps the others from looking.
const TERM: Duration = Duration::from_secs(10);
/// Users at a time.
const PAGE: i64 = 512;
/// Devices that did not acknowledge and are remembered; who is forgotten is tried again at once.
const SILENT_DEVICES: u64 = 100_000;
/// A device that did not acknowledge is left alone: from, to, doubling.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// A device that did not acknowledge: its route then, when to try again, and how long that was put off.
type Silent = (Version, Instant, Duration);

pub struct Inboxes {
    queue: Arc<InboxQueue>,
    deliveries: Arc<Deliveries>,
    directory: Arc<Directory>,
    lanes: Arc<Lanes>,
    lives: Arc<Lives>,
    database: Arc<Database>,
    silent: moka::sync::Cache<(UserId, DeviceId), Silent>,
    readers: Readers,
    claimant: String,
    memory: Arc<Memory>,
}

impl Inboxes {
    #[allow(clippy::too_many_arguments)] // parts of the engine, named once, in its assembly
    pub fn new(
        claimant: &str,
        queue: Arc<InboxQueue>,
        deliveries: Arc<Deliveries>,
        directory: Arc<Directory>,
        lanes: Arc<Lanes>,
        lives: Arc<Lives>,
        database: Arc<Database>,
        memory: Arc<Memory>,
    ) -> Arc<Self> {
        let silent = moka::sync::Cache::builder().max_capacity(SILENT_DEVICES).time_to_live(PAUSES.1 * 2).build();
        let (readers, claimant) = (Readers::new(database.clone(), READERS), claimant.to_owned());
        Arc::new(Self { queue, deliveries, directory, lanes, lives, database, silent, readers, claimant, memory })
    }

    /// Messages for a device after number `after`, up to so many and so many bytes, but one at least; and whether there are
    /// more.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn pull(
        &self,
        user: UserId,
        after: u64,
        (limit, max_bytes): (usize, usize),
        device: &DeviceId,
    ) -> Result<(Vec<StoredMessage>, bool), Error> {
        let (mut found, mut bytes, mut after) = (Vec::new(), 0, after);
        loop {
            let page = self.read(user, after).await?;
            let Some(last) = page.last() else { return Ok((found, false)) };
            after = last.seq;
            for stored in page.into_iter().filter(|stored| is_for(&stored.message.devices, device)) {
                bytes += size(&stored);
                if found.len() == limit || (bytes > max_bytes && !found.is_empty()) {
                    return Ok((found, true));
                }
                found.push(stored);
            }
        }
    }

    /// Up to `limit` messages after number `after`, without their texts.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn heads(&self, user: UserId, after: u64, limit: u32) -> Result<Vec<StoredHead>, Error> {
        let now = self.lives.clock.over_by();
        let heads = self.readers.read(move |connection| connection.read_inbox_heads(user, after, now, limit.into()).boxed());
        heads.await.map_err(|_| Error::unavailable("the inbox cannot be read now"))
    }

    /// A device has read everything up to number `seq`. Returns how many messages that were.
    ///
    /// # Errors
    /// As for any change of a user.
    pub async fn read_up_to(&self, user: UserId, seq: u64, device: DeviceId) -> Result<usize, Error> {
        self.change(user, InboxChange::ReadUpTo { seq, device }).await
    }

    async fn change(&self, user: UserId, change: InboxChange) -> Result<usize, Error> {
        match self.lanes.submit(user, Change::Inbox(change)).await? {
            Outcome::Inbox(InboxOutcome::Removed { messages }) => Ok(messages),
            _ => Err(Error::internal("a change of an inbox had the outcome of another one")),
        }
    }

    /// InboxQueue users until `stop`.
    pub async fn keep_draining(self: Arc<Self>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        while let Some(user) = stop.run_until_cancelled(self.queue.next()).await {
            let drained = stop.run_until_cancelled(self.drain(user)).await;
            self.queue.done(user);
            if let Some(Err(error)) = drained {
                debug!(%error, user.id = %user, "stored messages of a user could not be delivered now");
            }
        }
    }

    /// Brings one window of messages to a user. What is acknowledged is removed, which has the user drained again.
    async fn drain(&self, user: UserId) -> Result<(), Error> {
        let answer = self.directory.get(user, None).await?;
        let routes = answer.live_routes().map(|live| (live.route.device.clone(), live.route.bound_version));
        let mut awake: BTreeMap<DeviceId, Version> = routes.filter(|(device, bound)| !self.rests(user, device, *bound)).collect();
        if awake.is_empty() {
            return Ok(());
        }
        let mut after = 0;
        let window = loop {
            let mut window = self.read(user, after).await?;
            match window.last() {
                Some(last) => after = last.seq,
                // No message is addressed to the devices online, or the inbox is empty: count it again.
                None => return self.change(user, InboxChange::Expire).await.map(|_| ()),
            }
            window.retain(|stored| awake.keys().any(|device| is_for(&stored.message.devices, device)));
            if !window.is_empty() {
                break window;
            }
        };
        let bytes = window.iter().map(size).sum();
        let _held = self
            .memory
            .take(Share::Streams, bytes)
            .ok_or_else(|| Error::overloaded("what waits for gateways takes all the memory it may"))?; // looked for again soon
        let pushed = self.deliveries.push_stored(user, &answer, &window).await;
        let missed = |device: &DeviceId| {
            let mut not_done = window.iter().filter(|stored| !pushed.done.contains(&stored.seq));
            !pushed.acked.contains(device) && not_done.any(|stored| is_for(&stored.message.devices, device))
        };
        awake.retain(|device, bound| {
            let is_silent = missed(device);
            self.note(user, device, *bound, is_silent);
            !is_silent
        });
        if !pushed.done.is_empty() {
            return self.change(user, InboxChange::Acknowledged(pushed.done)).await.map(|_| ());
        }
        if !awake.is_empty() {
            self.queue.wake(user); // what is for them stands behind
        }
        Ok(())
    }

    /// Whether a device is left alone for now, because it did not acknowledge.
    fn rests(&self, user: UserId, device: &DeviceId, bound: Version) -> bool {
        let silent = self.silent.get(&(user, device.clone())).filter(|(route, ..)| *route == bound);
        silent.is_some_and(|(_, until, _)| until > Instant::now())
    }

    fn note(&self, user: UserId, device: &DeviceId, bound: Version, is_silent: bool) {
        let key = (user, device.clone());
        if !is_silent {
            return self.silent.invalidate(&key);
        }
        let before = self.silent.get(&key).filter(|(route, ..)| *route == bound);
        let pause = before.map_or(PAUSES.0, |(.., pause)| (pause * 2).min(PAUSES.1));
        self.silent.insert(key, (bound, Instant::now() + pause, pause));
    }

    /// Reads a window.
    async fn read(&self, user: UserId, after: u64) -> Result<Vec<StoredMessage>, Error> {
        let now = self.lives.clock.over_by();
        let window = self.readers.read(move |connection| connection.read_inbox(user, after, now, WINDOW).boxed()).await;
        window.map_err(|_| Error::unavailable("the inbox cannot be read now"))
    }

    /// Looks for users who are online and have messages, and for messages that are over, if it is this node's turn.
    pub async fn look(&self) -> Result<(), SqlError> {
        let mut connection = self.database.connect(Purpose::General).await?;
        let mut after = 0;
        while connection.claim_job("inbox", &self.claimant, TERM).await? {
            let users = connection.reachable_users_with_messages(after, PAGE).await?;
            let Some(last) = users.last() else { break };
            after = last.get();
            users.iter().for_each(|user| self.queue.wake(*user));
        }
        while self.lives.clock.is_steady() && connection.claim_job("inbox", &self.claimant, TERM).await? {
            let users = connection.users_with_old_messages(self.lives.clock.over_by(), PAGE).await?;
            let last = users.len() < PAGE as usize;
            let outcomes = self.lanes.submit_all_in_background(users, || Change::Inbox(InboxChange::Expire)).await;
            if let Some(Err(error)) = outcomes.into_iter().find(Result::is_err) {
                warn!(%error, "expired messages could not be removed now");
                return Ok(());
            }
            if last {
                break;
            }
        }
        if connection.claim_job("inbox", &self.claimant, TERM).await? {
            let (messages, oldest) = connection.count_messages().await?;
            connection.note_messages(messages, oldest).await?;
        }
        Ok(())
    }
}

/// What a message takes, roughly.
fn size(stored: &StoredMessage) -> usize {
    ORDER_BYTES + stored.message.body.len()
}
