//! Compares what attached gateways hold with the routes in the database, and mends what differs: a route without a connection
//! is unbound, a connection without a route is bound again by its gateway. Only gateways that give a digest are looked at: they
//! say by it that nobody else binds for their epoch.
//!
//! A look compares one number. If that differs, the gateway is asked for those of 256 buckets, then for what is in those that
//! differ, and once more a while later. Mended is what differs in the same way twice, unless it is so much that the gateway has
//! rather lost its memory. Rows whose digest is not that of what they say are corrected on the way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex as AsyncMutex;
use tokio::sync::Semaphore;
use tokio::sync::SemaphorePermit;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio::time::sleep_until;
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing::warn;

use crate::domain::digest::BUCKETS;
use crate::domain::digest::Difference;
use crate::domain::digest::Held;
use crate::domain::digest::Stored;
use crate::domain::digest::Sum;
use crate::domain::digest::Sums;
use crate::domain::digest::asking::Illegal;
use crate::domain::digest::asking::Part;
use crate::domain::digest::asking::Query;
use crate::domain::digest::asking::groups;
use crate::domain::digest::bucket;
use crate::domain::digest::suspects;
use crate::domain::event::Outcome;
use crate::domain::event::Unbind;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::engine::gateways::holdings::Holdings;
use crate::engine::gateways::verdict::Verdict;
use crate::engine::read::lives::Lives;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::metrics::Metrics;
use crate::store::connection::SqlError;
use crate::store::database::ConnectionSlot;
use crate::store::database::Database;

/// Gateways whose next look may wait for its turn; those for which there is no room come with a later heartbeat.
const DUE: usize = 1_024;
/// Looks that ask and read, and have lists in memory, at the same time.
const AT_ONCE: usize = 2;
/// Users whose routes are read by one statement after the other before others have their turn.
const SUSPECTS_AT_ONCE: usize = 4_096;
/// Routes that are unbound, and connections that are told, at a time.
const MENDED_AT_ONCE: usize = 256;

/// How often is looked, and what is done about what is found.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Zero: never.
    pub interval: Duration,
    /// Between two looks at what differs; and anything younger is under way.
    pub settle: Duration,
    /// Rows read per second, over all gateways.
    pub rows_per_s: u32,
    /// Of a gateway's routes, 0 to 1.
    pub max_share: f64,
    /// False: only looks.
    pub repair: bool,
}

pub struct Digests {
    settings: Settings,
    lanes: Arc<Lanes>,
    lives: Arc<Lives>,
    metrics: Arc<Metrics>,
    attached: Mutex<HashMap<Epoch, Arc<Holdings>>>,
    due: mpsc::Sender<Arc<Holdings>>,
    reader: AsyncMutex<Reader>,
    turns: Semaphore,
}

/// The stream's own end. The look ends when this is dropped.
pub struct Holder {
    digests: Arc<Digests>,
    holdings: Arc<Holdings>,
    queries: mpsc::Receiver<(u64, Query)>,
}

/// The one connection that reads, and when what it has read is paid for.
struct Reader {
    slot: ConnectionSlot,
    free_at: Instant,
}

impl Digests {
    /// With what [`Digests::run`] works off.
    pub fn new(
        settings: Settings,
        database: Arc<Database>,
        lanes: Arc<Lanes>,
        lives: Arc<Lives>,
        metrics: Arc<Metrics>,
    ) -> (Arc<Self>, mpsc::Receiver<Arc<Holdings>>) {
        let (due, looks) = mpsc::channel(DUE);
        let reader = AsyncMutex::new(Reader { slot: ConnectionSlot::new(database), free_at: Instant::now() });
        let (attached, turns) = (Mutex::default(), Semaphore::new(AT_ONCE));
        (Arc::new(Self { settings, lanes, lives, metrics, attached, due, reader, turns }), looks)
    }

    /// A gateway has a stream here.
    pub fn attach(self: &Arc<Self>, gateway: GatewayAddr, epoch: Epoch) -> Holder {
        let (holdings, queries) = Holdings::new(gateway, epoch);
        let holdings = Arc::new(holdings);
        self.attached().insert(epoch, holdings.clone());
        Holder { digests: self.clone(), holdings, queries }
    }

    /// What came of the last look at a life, as far as its stream is here. Empty: it is not, or there is no digest.
    pub fn report(&self, epoch: Epoch) -> String {
        self.attached().get(&epoch).map_or_else(String::new, |holdings| holdings.report())
    }

    /// Looks at whoever is due, until `stop`.
    pub async fn run(self: Arc<Self>, mut due: mpsc::Receiver<Arc<Holdings>>, stop: CancellationToken) {
        let _stop_node_on_panic = stop.clone().drop_guard();
        let mut looks = FuturesUnordered::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(holdings) = due.recv() => looks.push(self.look_at(holdings)),
                Some(()) = looks.next() => {}
            }
        }
    }

    async fn look_at(&self, holdings: Arc<Holdings>) {
        let looked = tokio::select! {
            looked = self.look(&holdings) => looked,
            () = holdings.ended() => return,
        };
        let (gateway, epoch) = (&holdings.gateway, holdings.epoch.0);
        match looked {
            Ok(verdict) => {
                match &verdict {
                    Verdict::Mended { ghosts, missing } => info!(
                        gateway.addr = %gateway, gateway.epoch = epoch, ghosts, missing,
                        "gateway {gateway} and the database disagreed: routes without a connection are unbound, connections \
                         without a route bound again"
                    ),
                    Verdict::Refused { .. } => {
                        self.metrics.digests.refused.inc();
                        warn!(
                            gateway.addr = %gateway, gateway.epoch = epoch,
                            "gateway {gateway} and the database disagree too much for digest.max_share: nothing is mended; {verdict}"
                        );
                    }
                    Verdict::Failed { .. } | Verdict::TooLong => {
                        warn!(gateway.addr = %gateway, gateway.epoch = epoch, "gateway {gateway} and the database: {verdict}");
                    }
                    Verdict::Equal | Verdict::UnderWay | Verdict::Differs(_) | Verdict::Silent => {}
                }
                self.metrics.digests.look(verdict.label());
                holdings.looked_at(Some(verdict.to_string()));
            }
            Err(error) => {
                self.metrics.digests.look("failed");
                self.metrics.store_error("digests");
                warn!(%error, gateway.addr = %gateway, "the routes of a gateway were not compared; they are later");
                holdings.looked_at(None);
            }
        }
    }

    async fn look(&self, holdings: &Holdings) -> Result<Verdict, SqlError> {
        let turn = self.turn().await;
        if Some(self.sums(holdings.epoch).await?.total()) == holdings.said() {
            return Ok(Verdict::Equal);
        }
        drop(turn);
        let turn = self.turn().await;
        let Some(answer) = holdings.ask(Query::Sums).await else { return Ok(Verdict::Silent) };
        let stored = self.sums(holdings.epoch).await?;
        drop(turn);
        let buckets = stored.differing(&answer.sums);
        if buckets.is_empty() {
            return Ok(Verdict::Equal);
        }
        let routes = stored.total().routes.max(answer.sums.total().routes);
        let credible = Difference::credible(self.settings.max_share, routes);
        let first = match self.difference(holdings, &buckets, &answer.sums, credible).await? {
            Ok(first) => first,
            Err(verdict) => return Ok(verdict),
        };
        match first.len() {
            0 if first.young == 0 => return Ok(Verdict::Equal),
            0 => return Ok(Verdict::UnderWay),
            differ if differ > credible => return Ok(Verdict::Refused { differ, routes }),
            // A gateway that lost its memory a moment ago, perhaps: the next look will tell.
            differ if differ + first.young > credible => return Ok(Verdict::UnderWay),
            _ => sleep(self.settings.settle).await,
        }
        let again = match self.difference(holdings, &first.buckets(), &answer.sums, credible).await? {
            Ok(again) => again,
            Err(verdict) => return Ok(verdict),
        };
        if again.len() + again.young > credible {
            return Ok(Verdict::UnderWay); // the same
        }
        let found = first.still_in(again);
        Ok(match self.settings.repair {
            _ if found.is_empty() => Verdict::UnderWay,
            _ if holdings.said().is_none() => Verdict::Silent,
            true => self.mend(holdings, found).await,
            false => Verdict::Differs(found),
        })
    }

    /// What the gateway's lists of these buckets, each as long as `sums` says, and the database do not have in common; not all of
    /// it, if that is more than `credible`. An error is why there is no list.
    ///
    /// What the database has is read once, and is old when a later list comes. It only tells whom to look at; what their routes
    /// are is read after the list.
    async fn difference(
        &self,
        holdings: &Holdings,
        buckets: &[u8],
        sums: &Sums,
        credible: u64,
    ) -> Result<Result<Difference, Verdict>, SqlError> {
        let _turn = self.turn().await;
        let elements = self.elements(holdings.epoch, buckets).await?;
        let mut found = Difference::default();
        for group in groups(buckets, sums) {
            self.paid().await;
            let Some(answer) = holdings.ask(Query::List(group.clone())).await else { return Ok(Err(Verdict::Silent)) };
            if answer.is_too_long {
                return Ok(Err(Verdict::TooLong));
            }
            let stored: Vec<_> = elements.iter().filter(|(user, _)| group.contains(&bucket(*user))).copied().collect();
            let users = suspects(&answer.held, &stored);
            let held: Vec<Held> = answer.held.into_iter().filter(|held| users.contains(&held.user)).collect();
            let routes = self.routes(holdings.epoch, &users.into_iter().collect::<Vec<_>>()).await?;
            found.add(Difference::of(&held, routes, self.lives.clock.now(), self.settings.settle));
            if found.len() > credible {
                break;
            }
        }
        Ok(Ok(found))
    }

    /// Waits until what was read before is paid for in time. So what is read afterwards is as close as can be to what the
    /// gateway answers.
    async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        let turn = self.turns.acquire().await.ok()?; // it is never closed
        self.paid().await;
        Some(turn)
    }

    async fn paid(&self) {
        let free_at = self.reader.lock().await.free_at;
        sleep_until(free_at.into()).await;
    }

    async fn sums(&self, epoch: Epoch) -> Result<Sums, SqlError> {
        let mut reader = self.reader.lock().await;
        let mut connection = reader.slot.take().await?;
        let sums = connection.route_sums(epoch).await?;
        reader.slot.give_back(connection);
        reader.has_read(sums.total().routes, self.settings.rows_per_s);
        Ok(sums)
    }

    async fn elements(&self, epoch: Epoch, buckets: &[u8]) -> Result<Vec<(UserId, u64)>, SqlError> {
        let (mut elements, mut after) = (Vec::new(), Some(0));
        while let Some(from) = after {
            let mut reader = self.reader.lock().await;
            let mut connection = reader.slot.take().await?;
            let page = connection.route_elements(epoch, buckets, from).await?;
            reader.slot.give_back(connection);
            // Users are spread evenly: of the others' rows as many were passed over as there are other buckets.
            let passed = page.of_users.len() * BUCKETS / buckets.len().max(1);
            reader.has_read(passed as u64, self.settings.rows_per_s);
            elements.extend(page.of_users);
            after = page.next_after;
        }
        Ok(elements)
    }

    /// The routes of `users`. What their rows say of their digests is right afterwards.
    async fn routes(&self, epoch: Epoch, users: &[UserId]) -> Result<Vec<Stored>, SqlError> {
        let mut routes = Vec::new();
        for (n, users) in users.chunks(SUSPECTS_AT_ONCE).enumerate() {
            if n > 0 {
                self.paid().await;
            }
            let mut reader = self.reader.lock().await;
            let mut connection = reader.slot.take().await?;
            let read = connection.routes_on(epoch, users).await?;
            let wrong: Vec<&Stored> = read.iter().filter(|route| route.digest != route.element && self.settings.repair).collect();
            let corrected = connection.correct_digests(wrong).await?;
            reader.slot.give_back(connection);
            reader.has_read(read.len() as u64 + corrected, self.settings.rows_per_s);
            self.metrics.digests.mended("digest", corrected);
            routes.extend(read);
        }
        Ok(routes)
    }

    async fn mend(&self, holdings: &Holdings, found: Difference) -> Verdict {
        let (mut ghosts, mut is_done, missing) = (0, true, found.missing.len() as u64);
        for routes in found.ghosts.chunks(MENDED_AT_ONCE) {
            let unbind = |route: &Stored| Unbind::Exact {
                bound_version: route.bound_version,
                conn: Some(route.conn.clone()),
                epoch: Some(holdings.epoch),
                by: None,
            };
            let changes = routes.iter().map(|route| (route.user, Change::Unbind(unbind(route))));
            let outcomes = self.lanes.submit_each_in_background(changes).await;
            let unbound = outcomes.iter().filter(|outcome| matches!(outcome, Ok(Outcome::Unbound { .. }))).count() as u64;
            is_done &= outcomes.iter().all(Result::is_ok);
            ghosts += unbound;
            self.metrics.digests.mended("ghost", unbound);
        }
        for missing in found.missing.chunks(MENDED_AT_ONCE) {
            holdings.tell(Query::BindAgain(missing.to_vec())).await;
            self.metrics.digests.mended("missing", missing.len() as u64);
        }
        match ghosts + missing {
            _ if !is_done => Verdict::Failed { ghosts, missing },
            0 => Verdict::UnderWay, // whoever was to be unbound has gone meanwhile
            _ => Verdict::Mended { ghosts, missing },
        }
    }

    fn attached(&self) -> MutexGuard<'_, HashMap<Epoch, Arc<Holdings>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reader {
    fn has_read(&mut self, rows: u64, rows_per_s: u32) {
        let paid_in = Duration::from_secs_f64(rows as f64 / f64::from(rows_per_s));
        self.free_at = self.free_at.max(Instant::now()) + paid_in;
    }
}

impl Holder {
    /// What a heartbeat says. None: no digest.
    pub fn beat(&self, said: Option<Sum>) {
        let interval = self.digests.settings.interval;
        let begins = !interval.is_zero() && self.holdings.say(said, interval);
        if begins && self.digests.due.try_send(self.holdings.clone()).is_err() {
            self.holdings.looked_at(None); // too many are due: later
        }
    }

    /// Takes a part of an answer.
    pub fn answer(&self, seq: u64, part: Part) -> Result<(), Illegal> {
        self.holdings.take(seq, part)
    }

    /// The next thing to ask, with its number.
    pub async fn next(&mut self) -> Option<(u64, Query)> {
        self.queries.recv().await
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut attached = self.digests.attached();
        if attached.get(&self.holdings.epoch).is_some_and(|newest| Arc::ptr_eq(newest, &self.holdings)) {
            attached.remove(&self.holdings.epoch);
        }
    }
}
