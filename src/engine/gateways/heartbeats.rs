//! Heartbeats, merged: all that arrive within a quarter of a second are one statement. Each is answered when that statement has
//! committed, so a gateway that was told so has its lease, on whichever node it is looked at. One that could not be recorded
//! is told in time to beat through another node. Heartbeats are never shed for load.

use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::mpsc;
use tokio::time::sleep_until;
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::answers;
use crate::answers::Answer;
use crate::domain::gateway::Beat;
use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::engine::gateways::registry::Registry;
use crate::error::Error;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;

/// How long a heartbeat waits for others.
const MERGE: Duration = Duration::from_millis(250);
/// How long a gateway waits for its answer. With the default interval and lease it has time for another node.
const PATIENCE: Duration = Duration::from_secs(2);
/// Heartbeats that may wait: more than there are gateways.
const QUEUE: usize = 65_536;
/// Heartbeats of one statement.
const AT_ONCE: usize = 512;

struct Waiting {
    gateway: GatewayAddr,
    beat: Beat,
    received: Instant,
    answer: Answer<Result<Arc<Life>, Fence>>,
}

/// Where heartbeats are handed in.
pub struct Heartbeats {
    queue: mpsc::Sender<Waiting>,
}

/// Records them.
pub struct Recorder {
    queue: mpsc::Receiver<Waiting>,
    gateways: Arc<Registry>,
    connection: Option<Connection>,
}

impl Heartbeats {
    pub fn new(gateways: Arc<Registry>) -> (Arc<Self>, Recorder) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Arc::new(Self { queue: sender }), Recorder { queue, gateways, connection: None })
    }

    /// Extends the lease of `gateway`. Returns the life as it stands then.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: not recorded, as far as this node knows; beat through another one.
    pub async fn beat(&self, gateway: GatewayAddr, beat: Beat) -> Result<Result<Arc<Life>, Fence>, Error> {
        let not_recorded = || Error::unavailable("the heartbeat was not recorded");
        let received = Instant::now();
        let (answer, answered) = answers::channel();
        self.queue.try_send(Waiting { gateway, beat, received, answer }).map_err(|_| not_recorded())?;
        match timeout_at((received + PATIENCE).into(), answered).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) | Err(_) => Err(not_recorded()),
        }
    }
}

impl Recorder {
    /// Records heartbeats until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        while let Some(Some(first)) = stop.run_until_cancelled(self.queue.recv()).await {
            sleep_until((first.received + MERGE).into()).await;
            let mut waiting = vec![first];
            while waiting.len() < AT_ONCE
                && let Ok(next) = self.queue.try_recv()
            {
                waiting.push(next);
            }
            // The others were told to go elsewhere. What they said is no sign of life any more, if this node stood still.
            waiting.retain(|waiting| !waiting.answer.is_closed() && waiting.received.elapsed() < PATIENCE);
            if let Err(error) = self.record(waiting).await {
                self.connection = None;
                self.gateways.metrics.store_error("heartbeats");
                warn!(%error, "heartbeats were not recorded; their gateways are told to beat through another node");
            }
        }
    }

    /// Whoever is not answered when this returns was not recorded.
    async fn record(&mut self, waiting: Vec<Waiting>) -> Result<(), SqlError> {
        let mut connection = self.gateways.usable(self.connection.take()).await?;
        let living = self.extend(&mut connection, waiting).await?;
        self.connection = Some(connection);
        self.gateways.publisher.beaten(&living, self.gateways.terms.lease).await;
        Ok(())
    }

    async fn extend(&mut self, connection: &mut Connection, waiting: Vec<Waiting>) -> Result<Vec<Arc<Life>>, SqlError> {
        let addresses = addresses(connection, &self.gateways.lives.table(), &waiting).await?;
        let (known, strangers): (Vec<_>, Vec<_>) =
            waiting.into_iter().partition(|waiting| addresses.get(&waiting.beat.epoch) == Some(&waiting.gateway));
        // The newest of one gateway counts.
        let beats: HashMap<Epoch, Beat> = known.iter().map(|waiting| (waiting.beat.epoch, waiting.beat.clone())).collect();
        let mut beats: Vec<Beat> = beats.into_values().collect();
        beats.sort_unstable_by_key(|beat| beat.epoch);
        self.write(connection, &mut beats).await?;
        // Over is for good: whoever lives after the statement was alive when it was carried out.
        let after = by_epoch(connection.lives_by_epoch(&beats.iter().map(|beat| beat.epoch).collect::<Vec<_>>()).await?);
        let (mut living, mut over) = (Vec::new(), strangers);
        let written: HashSet<Epoch> = beats.iter().map(|beat| beat.epoch).collect();
        for waiting in known.into_iter().filter(|waiting| written.contains(&waiting.beat.epoch)) {
            match after.get(&waiting.beat.epoch).filter(|life| life.is_alive()) {
                Some(life) => living.push((waiting.answer, life.clone())),
                None => over.push(waiting),
            }
        }
        let extended = living.iter().map(|(_, life)| life.clone()).collect();
        answers::send_all(living.into_iter().map(|(answer, life)| (answer, Ok(life))));
        for waiting in over {
            let fence = self.gateways.fence(connection, &waiting.gateway, "heartbeat").await?;
            waiting.answer.send(Err(fence));
        }
        Ok(extended)
    }

    /// Leaves the beats that were written. A row that somebody holds, perhaps a node that stands still, is not waited for: it
    /// costs its own gateway's beat and no other's.
    async fn write(&mut self, connection: &mut Connection, beats: &mut Vec<Beat>) -> Result<(), SqlError> {
        let epochs: Vec<Epoch> = beats.iter().map(|beat| beat.epoch).collect();
        connection.begin().await?;
        let free = connection.lock_lives(&epochs).await?;
        beats.retain(|beat| free.contains(&beat.epoch));
        connection.beat_lives(beats, self.gateways.terms.lease).await?;
        connection.commit().await
    }
}

/// Whose the lives are. An epoch's address never changes: what is known of it is true, however old.
async fn addresses(
    connection: &mut Connection,
    table: &LifeTable,
    waiting: &[Waiting],
) -> Result<HashMap<Epoch, GatewayAddr>, SqlError> {
    let epochs: HashSet<Epoch> = waiting.iter().map(|waiting| waiting.beat.epoch).collect();
    let (known, unknown): (Vec<_>, Vec<_>) = epochs.into_iter().partition(|epoch| table.get(*epoch).is_some());
    let read = connection.lives_by_epoch(&unknown).await?;
    let known = known.iter().filter_map(|epoch| table.get(*epoch));
    Ok(known.chain(&read).map(|life| (life.epoch, life.gateway.clone())).collect())
}

fn by_epoch(lives: Vec<Arc<Life>>) -> HashMap<Epoch, Arc<Life>> {
    lives.into_iter().map(|life| (life.epoch, life)).collect()
}
