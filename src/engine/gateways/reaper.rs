//! Once a second every node says that the database takes writes, reads all lives, and looks who has died.
//!
//! A death is declared by one conditional statement on the database's clock; whichever node comes first has declared it. The
//! watch also wakes right after the next lease ends, so users of a dead gateway are offline everywhere within milliseconds
//! of that. When too many gateways are silent at once, a hold in the database keeps every node from declaring anybody dead.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio_util::sync::CancellationToken;
use tracing::error;
use tracing::info;
use tracing::warn;

use crate::domain::doubt::Silence;
use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::domain::time::CLOCK_SLACK;
use crate::domain::time::Timestamp;
use crate::engine::gateways::registry::Registry;
use crate::engine::gateways::registry::Terms;
use crate::engine::messages::outlets::Outlets;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::streams::Streams;
use crate::engine::read::cache::Cache;
use crate::engine::read::hints::Hints;
use crate::engine::read::lives::Lives;
use crate::metrics::Metrics;
use crate::store::cluster::ClusterRow;
use crate::store::cluster::NodeName;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;
use crate::store::database::FILE_MOVED;
use crate::store::ended_lives::Ending;

/// How often the table is read whole.
pub const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long after the end of a lease the watch wakes: clocks are compared in whole milliseconds.
const AFTER_LEASE: Duration = Duration::from_millis(3);
/// How soon the watch looks again at a lease that should have ended by now.
const JUST_ENDED: Duration = Duration::from_millis(20);
/// What is later than it can be by more than this is cut down. Statements that do so begin earlier, at [`CLOCK_SLACK`].
const LOOK_SLACK: Duration = CLOCK_SLACK.saturating_mul(2);
/// Within this time all nodes have seen that the clock was set.
const STEP_SEEN_WITHIN: Duration = Duration::from_secs(10);
/// How often unmanaged lives are all read, and after which time without a look their ends may have been missed.
const ALL_LIVES_INTERVAL: Duration = Duration::from_secs(60);
const MISSED_AFTER: Duration = Duration::from_secs(10);
/// A node that has not said for this long that it is there is not missed on the bus.
pub const NODE_TERM: Duration = Duration::from_secs(3);

pub struct Reaper {
    database: Arc<Database>,
    lives: Arc<Lives>,
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    gateways: Arc<Registry>,
    hints: Option<Arc<Hints>>,
    peers: Arc<Peers>,
    streams: Arc<Streams>,
    /// The longest time to live that anything has.
    longest: Duration,
    stop: CancellationToken,
    seen: Seen,
}

/// What the last look has left.
#[derive(Default)]
struct Seen {
    connection: Option<Connection>,
    generation: Option<u64>,
    reported_down: bool,
    /// Since when, during a hold, no more gateways are silent than may be.
    normal_since: Option<Timestamp>,
    held: bool,
    unmanaged: Unmanaged,
    users_counted_at: Timestamp,
    nodes: Vec<NodeName>,
}

/// Unmanaged lives, which do not change until they end, are not read at each look.
#[derive(Default)]
struct Unmanaged {
    /// The newest that is known.
    newest: Option<Epoch>,
    /// When they were all read, and when the table was read last.
    all_at: Option<Instant>,
    at: Option<Instant>,
}

impl Unmanaged {
    /// All of them have to be read if it is long ago, or if the end of one may have been missed.
    fn known(&self, now: Instant) -> Option<Epoch> {
        let is_recent = |at: Option<Instant>, limit| at.is_some_and(|at| now.duration_since(at) < limit);
        self.newest.filter(|_| is_recent(self.all_at, ALL_LIVES_INTERVAL) && is_recent(self.at, MISSED_AFTER))
    }

    fn note(&mut self, lives: &[Arc<Life>], is_whole: bool, asked: Instant) {
        let newest = lives.iter().filter(|life| !life.is_managed()).map(|life| life.epoch).max();
        (self.newest, self.at) = (self.newest.max(newest), Some(asked));
        if is_whole {
            self.all_at = Some(asked);
        }
    }
}

impl Reaper {
    pub fn new(
        gateways: Arc<Registry>,
        cache: Arc<Cache>,
        hints: Option<Arc<Hints>>,
        outlets: &Outlets,
        longest: Duration,
        stop: CancellationToken,
    ) -> Self {
        let (database, lives, metrics) = (gateways.database.clone(), gateways.lives.clone(), gateways.metrics.clone());
        let (peers, streams) = (outlets.peers.clone(), outlets.streams.clone());
        Self { database, lives, cache, metrics, gateways, hints, peers, streams, longest, stop, seen: Seen::default() }
    }

    /// Looks once.
    pub async fn step(&mut self) {
        let result = self.look().await;
        self.metrics.store_up.set(i64::from(result.is_ok()));
        match result {
            Ok(()) if self.seen.reported_down => {
                self.seen.reported_down = false;
                info!("the database answers again");
            }
            Ok(()) => {}
            Err(error) => {
                self.metrics.store_error("poll");
                if !std::mem::replace(&mut self.seen.reported_down, true) {
                    warn!(%error, "the database does not answer: cached users are answered with their age, binds are refused");
                }
            }
        }
    }

    /// How long until the next look: a second, or until a lease ends.
    pub fn pause(&self) -> Duration {
        let (table, now) = (self.lives.table(), self.lives.clock.now());
        if self.seen.held || self.seen.reported_down {
            return WATCH_INTERVAL; // nobody can be declared dead now
        }
        let living = table.iter().filter(|life| life.is_managed() && life.is_alive());
        living.map(|life| until_look(life.lease_until, now)).min().unwrap_or(WATCH_INTERVAL)
    }

    async fn look(&mut self) -> Result<(), SqlError> {
        let mut connection = match self.seen.connection.take() {
            Some(connection) => connection,
            None => self.database.connect(Purpose::Beat).await?,
        };
        let asked = Instant::now();
        let mut cluster = connection.read_cluster().await?;
        let step = self.lives.clock.learn(cluster.clock.now(), asked, Instant::now());
        self.lives.clock.learn_continuous(cluster.continuous_since);
        self.lives.clock.learn_step(cluster.step.ms, cluster.step.at, self.longest);
        if cluster.store_id != self.database.store_id {
            return Err(self.end("the database is another one than at the start"));
        }
        if !self.database.is_in_place() {
            return Err(self.end(FILE_MOVED));
        }
        if let Some(step_ms) = step {
            warn!(step_ms, "the database's clock has stepped: nothing is deleted for its age for ten minutes");
            if step_ms > 0 {
                connection.note_step(step_ms, STEP_SEEN_WITHIN).await?;
            }
        }
        self.follow(&mut connection, &mut cluster).await?;
        let anew = self.note_generation(cluster.generation);
        self.note_counts(&cluster);
        self.lives.set_cluster(cluster.clone());
        let asked = Instant::now();
        let has_stalled = self.seen.unmanaged.at.is_some_and(|at| asked.duration_since(at) > NODE_TERM / 2);
        let known = self.seen.unmanaged.known(asked).filter(|_| !anew);
        let lives = connection.read_lives(self.gateways.terms.lease.max(MISSED_AFTER), known).await?;
        self.lives.replace(lives.clone(), known.is_none(), asked);
        self.seen.unmanaged.note(&lives, known.is_none(), asked);
        must_take_writes(&connection)?;
        clamp(&mut connection, &self.gateways.terms, &lives, &cluster).await?;
        let listed = connection.beat_node(&self.peers.own, NODE_TERM).await?;
        let nodes: Vec<NodeName> = listed.iter().map(|node| node.name.clone()).collect();
        if let Some(twin) = nodes.iter().find(|node| self.is_twin(node)) {
            let (id, ours, theirs) = (&twin.node_id, &self.peers.own.addr, &twin.addr);
            let why = format!("another process has taken node_id {id}: it is at {theirs}, this one at {ours}");
            return Err(self.end(&why));
        }
        self.note_nodes(&nodes, has_stalled);
        self.peers.list(listed);
        if let Some(hints) = &self.hints {
            hints.set_generation(cluster.generation);
            hints.nodes_alive(nodes.into_iter().map(|node| node.node_id));
        }
        let table = self.lives.table();
        self.streams.end_unless(|epoch, no| table.get(epoch).map_or(!anew, |life| life.is_alive() && life.attach_no <= no));
        // After reading: somebody may hold that row. Before judging: it tells whether silence means anything.
        connection.beat_cluster().await?;
        // Judged is what the database says. Of what was heard meanwhile only the end is known, not the reason.
        if !self.doubt(&mut connection, &lives, &cluster).await? {
            self.bury(&mut connection, &lives, cluster.clock.now()).await?;
        }
        self.gateways.show(&self.lives.table(), self.seen.held);
        self.seen.connection = Some(connection);
        Ok(())
    }

    /// While the database did not answer the others could not say that they are there either: they are given one look more.
    fn note_nodes(&mut self, nodes: &[NodeName], has_stalled: bool) {
        let before = std::mem::replace(&mut self.seen.nodes, nodes.to_vec());
        let is_missing = |node: &NodeName| nodes.iter().all(|known| known.node_id != node.node_id);
        let silent = before.into_iter().filter(|node| has_stalled && is_missing(node));
        self.peers.set_nodes(&nodes.iter().cloned().chain(silent).collect::<Vec<_>>());
    }

    fn is_twin(&self, node: &NodeName) -> bool {
        node.node_id == self.peers.own.node_id && node.incarnation != self.peers.own.incarnation
    }

    /// Whatever this node would say from here on could be wrong, and whatever it wrote could be another's.
    fn end(&self, why: &str) -> SqlError {
        error!("{why}: this node ends");
        self.stop.cancel();
        SqlError::Lost(why.to_owned())
    }

    /// What one node has counted; the users only once, since gateways tell how they change meanwhile.
    fn note_counts(&mut self, cluster: &ClusterRow) {
        let counts = &cluster.counts;
        if std::mem::replace(&mut self.seen.users_counted_at, counts.users_counted_at) != counts.users_counted_at {
            self.lives.count_users(counts.users_online);
        }
        self.metrics.inbox_messages.set(counts.messages);
        let age = counts.oldest.map(|oldest| cluster.clock.now().since(oldest)).unwrap_or_default();
        self.metrics.inbox_oldest_seconds.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
    }

    /// Sees which server the beats go to, and has all others go there. One that was not written to before may lack what another
    /// has acknowledged.
    async fn follow(&mut self, connection: &mut Connection, cluster: &mut ClusterRow) -> Result<(), SqlError> {
        connection.look_at_server().await?;
        let Some(server) = connection.server().cloned() else { return Ok(()) };
        if !server.is_read_only && cluster.branch != server.branch() {
            connection.move_to(server.branch(), cluster).await?;
            if !cluster.branch.is_empty() {
                let (from, to) = (&cluster.branch, server.branch());
                warn!(
                    from,
                    to, "the database is another server now, {to}: what it has not received is lost, and every cache starts anew"
                );
            }
            *cluster = connection.read_cluster().await?;
        }
        self.database.follow(connection); // before anything is cached anew
        Ok(())
    }

    /// True: it was raised, and what was known before may have never been.
    fn note_generation(&mut self, generation: u64) -> bool {
        self.metrics.cache_generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        let is_raised = self.seen.generation.replace(generation).is_some_and(|known| known != generation);
        if is_raised {
            warn!(generation, "the caches' generation was raised: memory is not trusted any more");
            self.cache.distrust();
        }
        is_raised
    }

    /// Begins or ends the hold, as the gateways' silence tells. True: nobody may be declared dead now.
    async fn doubt(&mut self, connection: &mut Connection, lives: &[Arc<Life>], cluster: &ClusterRow) -> Result<bool, SqlError> {
        let (terms, now, hold) = (&self.gateways.terms, cluster.clock.now(), &cluster.hold);
        let silence = Silence::of(lives.iter().map(|life| &**life), now, terms.lease, terms.heartbeat_interval);
        let doubtful = silence.is_doubtful(terms.doubt_share);
        let normal = !doubtful && hold.is_on(now);
        self.seen.normal_since = normal.then(|| self.seen.normal_since.unwrap_or(now));
        if self.seen.held != hold.is_on(now) {
            self.seen.held = hold.is_on(now);
            match self.seen.held {
                true => warn!(until_ms = hold.until.0, "no gateway is declared dead: {}", hold.reason),
                false => info!("the hold is over: gateways whose lease is over are declared dead"),
            }
        }
        let normal_again = self.seen.normal_since.is_some_and(|since| now.since(since) >= terms.heartbeat_interval);
        if hold.is_on(now) && hold.is_by_doubt() && normal_again {
            if connection.end_hold(hold).await? {
                info!("the gateways are heard again: the hold ends early");
            }
            return Ok(false);
        }
        if hold.is_on(now) || !doubtful || hold.rearm >= now {
            return Ok(hold.is_on(now));
        }
        let (silent, all) = (silence.silent(), silence.all());
        let why = format!("{silent} of {all} gateways fell silent within a lease");
        if connection.begin_hold(terms.doubt_for, terms.lease, &why).await? {
            warn!(silent, gateways = all, "{why}: none is declared dead for {:?}; see ctl gateways", terms.doubt_for);
        }
        Ok(true)
    }

    /// Declares dead whose lease is over.
    async fn bury(&mut self, connection: &mut Connection, lives: &[Arc<Life>], now: Timestamp) -> Result<(), SqlError> {
        let mut epochs: Vec<Epoch> = lives.iter().filter(|life| life.is_lapsed(now)).map(|life| life.epoch).collect();
        epochs.sort_unstable();
        let ending = Ending::Expired { lease: self.gateways.terms.lease };
        self.gateways.end(connection, &epochs, ending).await.map(|_| ())
    }
}

/// Its user may be allowed to write nevertheless.
fn must_take_writes(connection: &Connection) -> Result<(), SqlError> {
    match connection.server().filter(|server| server.is_read_only) {
        Some(server) => Err(SqlError::Lost(format!("{server} is read-only"))),
        None => Ok(()),
    }
}

/// Whatever ends later than it can was written when the clock was ahead, and would last until it is there again.
async fn clamp(connection: &mut Connection, terms: &Terms, lives: &[Arc<Life>], cluster: &ClusterRow) -> Result<(), SqlError> {
    let (now, hold) = (cluster.clock.now(), &cluster.hold);
    let latest = now.plus(terms.lease + LOOK_SLACK);
    let is_ahead = |life: &Arc<Life>| match life.end {
        Some(end) => end.at > now.plus(LOOK_SLACK),
        None => life.lease_until > latest,
    };
    if lives.iter().any(is_ahead) {
        connection.clamp_lives(terms.lease).await?;
    }
    let longest = now.plus(terms.doubt_for + terms.lease + LOOK_SLACK);
    let is_too_long = hold.until.max(hold.rearm) > longest && (hold.is_by_doubt() || !hold.is_on(now));
    if is_too_long || hold.began > now.plus(LOOK_SLACK) {
        connection.clamp_hold(terms.doubt_for, terms.lease).await?;
    }
    Ok(())
}

/// When to look whether a lease is over. This node's idea of the database's clock may be a round trip ahead: one that ended
/// just now, and whose gateway still lives, is looked at again soon; one that ended before is held by a hold, or by somebody
/// who has locked it.
fn until_look(lease_until: Timestamp, now: Timestamp) -> Duration {
    let pause = match lease_until >= now {
        true => lease_until.since(now) + AFTER_LEASE,
        false if lease_until.plus(WATCH_INTERVAL) > now => JUST_ENDED,
        false => WATCH_INTERVAL,
    };
    pause.min(WATCH_INTERVAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watch_looks_when_a_lease_ends_and_soon_again_if_it_was_too_early() {
        let now = Timestamp(1_000_000);
        for (lease_left_ms, want_ms) in
            [(5_000, 1_000), (998, 1_000), (500, 503), (0, 3), (-1, 20), (-999, 20), (-1_000, 1_000), (-60_000, 1_000)]
        {
            let pause = until_look(Timestamp(now.0 + lease_left_ms), now);
            assert_eq!(pause, Duration::from_millis(want_ms), "{lease_left_ms} ms before its end");
        }
    }
}
