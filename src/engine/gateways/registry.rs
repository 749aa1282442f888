//! Lives of gateways as gateways and operators change them: registering, going on, deregistering, holding, purging.
//!
//! Each change is a task of its own that a caller who gives up does not cancel halfway, on a connection that they share one
//! after the other: registrations wait for each other in the database anyway.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::Mutex;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;
use tracing::warn;

use crate::domain::gateway::EndReason;
use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Liveness;
use crate::domain::gateway::Registration;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::engine::read::lives::Lives;
use crate::engine::write::publisher::Publisher;
use crate::error::Error;
use crate::metrics::ByCause;
use crate::metrics::ByState;
use crate::metrics::ByWhat;
use crate::metrics::Metrics;
use crate::store::cluster::Hold;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;
use crate::store::ended_lives::Ended;
use crate::store::ended_lives::Ending;
pub use crate::store::lives::Listed;
use crate::store::readers::Readers;

/// Registrations of one address within one lease. Room for a process that crashes and starts again, none for two processes
/// that take the address from each other.
const MAX_REGISTRATIONS: i64 = 5;
/// Changes that may wait for their turn.
const MAX_WAITING: usize = 1024;
/// Whoever has waited for longer has gone to another node.
const MAX_AGE: Duration = Duration::from_secs(5);
/// Connections that lists are read on.
const READERS: usize = 1;
/// Lives that one statement ends.
const ENDED_AT_ONCE: usize = 256;

/// What gateways promise, and what is done about those that do not keep it.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub heartbeat_interval: Duration,
    pub lease: Duration,
    /// Of all gateways, 0 to 1: if more are silent, they are not believed dead at once.
    pub doubt_share: f64,
    pub doubt_for: Duration,
}

/// Who waits for a change. What nobody waits for is not done: its gateway has turned to another node by now, and a
/// registration made late would end the life that it began there.
#[derive(Clone)]
struct Caller {
    since: Instant,
    gone: CancellationToken,
}

impl Caller {
    fn waits(&self) -> bool {
        !self.gone.is_cancelled() && self.since.elapsed() < MAX_AGE
    }
}

type Change<'a, T> = Pin<Box<dyn Future<Output = Result<T, SqlError>> + Send + 'a>>;

pub struct Registry {
    pub terms: Terms,
    node_id: String,
    pub(super) database: Arc<Database>,
    pub(super) lives: Arc<Lives>,
    pub(super) publisher: Arc<Publisher>,
    pub(super) metrics: Arc<Metrics>,
    connection: Mutex<Option<Connection>>,
    readers: Readers,
    waiting: Arc<Semaphore>,
    changes: TaskTracker,
    /// Where changes run: not on the threads that serve callers.
    runtime: Handle,
}

/// What an operator sees.
pub struct Listing {
    pub lives: Vec<(Arc<Life>, u64)>,
    pub hold: Option<Hold>,
}

impl Registry {
    pub fn new(
        terms: Terms,
        node_id: &str,
        database: Arc<Database>,
        lives: Arc<Lives>,
        publisher: Arc<Publisher>,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        let (node_id, connection, waiting) = (node_id.to_owned(), Mutex::default(), Arc::new(Semaphore::new(MAX_WAITING)));
        let (changes, runtime) = (TaskTracker::new(), Handle::current());
        let readers = Readers::new(database.clone(), READERS);
        Arc::new(Self { terms, node_id, database, lives, publisher, metrics, connection, readers, waiting, changes, runtime })
    }

    /// Begins a life of a gateway, or goes on with the one it claims.
    pub async fn enter(self: &Arc<Self>, registration: Registration) -> Result<Result<Epoch, Fence>, Error> {
        match registration.claimed {
            None => Ok(Ok(self.register(registration).await?.epoch)),
            Some(epoch) => Ok(self.resume(registration, epoch).await?.map(|()| epoch)),
        }
    }

    /// Begins a life of a gateway; whatever life its address had is over.
    ///
    /// # Errors
    /// [`Error::Limited`] if the address has begun too many lives lately, [`Error::Overloaded`] if too many gateways wait.
    async fn register(self: &Arc<Self>, registration: Registration) -> Result<Arc<Life>, Error> {
        let this = self.clone();
        self.change(move |connection, caller| {
            Box::pin(async move {
                let (lease, wanted) = (this.terms.lease, || caller.waits());
                let begun = connection.begin_managed_life(&this.node_id, &registration, lease, MAX_REGISTRATIONS, wanted).await?;
                let Some(begun) = begun else { return Ok(None) };
                let (epoch, gateway) = (begun.life.epoch.0, &begun.life.gateway);
                info!(gateway.addr = %gateway, gateway.epoch = epoch, "gateway {gateway} registered");
                this.lives.learn(std::slice::from_ref(&begun.life));
                this.publisher.beaten(std::slice::from_ref(&begun.life), this.terms.lease).await;
                if let Some(ended) = begun.ended {
                    this.tell(connection, ended).await?;
                }
                Ok(Some(begun.life))
            })
        })
        .await?
        .ok_or_else(|| Error::Limited {
            what: "this address has registered too often within a lease; is another process using it?",
            retry_after: self.terms.lease,
        })
    }

    /// Goes on with a life, on this node.
    async fn resume(self: &Arc<Self>, registration: Registration, epoch: Epoch) -> Result<Result<(), Fence>, Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move {
                if connection.resume_life(epoch, &registration, this.terms.lease).await? {
                    return Ok(Ok(()));
                }
                this.fence(connection, &registration.gateway, "register").await.map(Err)
            })
        })
        .await
    }

    /// Notes that a gateway has its stream here from now on.
    pub async fn attach(self: &Arc<Self>, gateway: GatewayAddr, epoch: Epoch) -> Result<Result<Arc<Life>, Fence>, Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move {
                let Some(life) = connection.attach_life(epoch, &this.node_id, this.terms.lease).await? else {
                    return this.fence(connection, &gateway, "attach").await.map(Err);
                };
                this.lives.learn(std::slice::from_ref(&life));
                Ok(Ok(life))
            })
        })
        .await
    }

    /// Notes that stream number `no` has ended. `grace`: what is left of the lease, if it broke.
    pub async fn detach(self: &Arc<Self>, epoch: Epoch, no: u64, grace: Option<Duration>) -> Result<(), Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move {
                connection.detach_life(epoch, &this.node_id, no, grace).await?;
                this.lives.learn(&connection.lives_by_epoch(&[epoch]).await?);
                Ok(())
            })
        })
        .await
    }

    /// Ends a life because its gateway says so.
    pub async fn deregister(self: &Arc<Self>, gateway: GatewayAddr, epoch: Epoch) -> Result<Result<(), Fence>, Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move {
                let own = connection.lives_by_epoch(&[epoch]).await?.into_iter().any(|life| life.gateway == gateway);
                if own && this.end(connection, &[epoch], Ending::Unconditional(EndReason::Deregistered)).await? > 0 {
                    return Ok(Ok(()));
                }
                this.fence(connection, &gateway, "deregister").await.map(Err)
            })
        })
        .await
    }

    /// Up to `limit` lives after `after`, by gateway and the newest first, with the number of their routes.
    pub async fn list(&self, listed: Listed, after: Option<(GatewayAddr, Epoch)>, limit: usize) -> Result<Listing, Error> {
        // Registrations do not wait for those who only look.
        let listing = self.readers.read(|connection| {
            let after = after.clone();
            Box::pin(async move {
                let listed = connection.list_lives(listed, after.as_ref(), limit).await?;
                let epochs: Vec<Epoch> = listed.iter().map(|life| life.epoch).collect();
                let routes = connection.count_routes(&epochs).await?;
                let counts = epochs.iter().map(|epoch| routes.get(epoch).copied().unwrap_or(0));
                let lives = listed.into_iter().zip(counts).collect();
                let cluster = connection.read_cluster().await?;
                let hold = Some(cluster.hold).filter(|hold| hold.is_on(cluster.clock.now()));
                Ok(Listing { lives, hold })
            })
        });
        listing.await.map_err(|_| Error::unavailable("the database cannot be read now"))
    }

    /// Declares the named lives dead now, whatever their leases say. Returns how many.
    pub async fn purge(self: &Arc<Self>, epochs: Vec<Epoch>) -> Result<usize, Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move { this.end(connection, &epochs, Ending::Unconditional(EndReason::Operator)).await })
        })
        .await
    }

    /// Ends the hold and declares dead whose lease is over. None: no hold is on.
    pub async fn confirm_hold(self: &Arc<Self>) -> Result<Option<usize>, Error> {
        let this = self.clone();
        self.change(move |connection, _| {
            Box::pin(async move {
                let cluster = connection.read_cluster().await?;
                let now = cluster.clock.now();
                if !cluster.hold.is_on(now) {
                    return Ok(None);
                }
                connection.set_hold(Duration::ZERO, this.terms.lease, "").await?;
                let lives = connection.read_lives(Duration::ZERO, None).await?.into_iter();
                let over: Vec<Epoch> = lives.filter(|life| life.is_lapsed(now)).map(|life| life.epoch).collect();
                this.end(connection, &over, Ending::Confirmed).await.map(Some)
            })
        })
        .await
    }

    /// Begins, prolongs or (zero) calls off a hold.
    pub async fn hold(self: &Arc<Self>, length: Duration, reason: String) -> Result<(), Error> {
        let lease = self.terms.lease;
        self.change(move |connection, _| Box::pin(async move { connection.set_hold(length, lease, &reason).await })).await
    }

    /// Ends those of `epochs` for which `ending` holds, and tells everybody. Returns how many.
    pub(super) async fn end(&self, connection: &mut Connection, epochs: &[Epoch], ending: Ending) -> Result<usize, SqlError> {
        let mut count = 0;
        for epochs in epochs.chunks(ENDED_AT_ONCE) {
            if let Some(ended) = connection.end_lives(&self.node_id, epochs, ending).await? {
                count += ended.lives.len();
                self.tell(connection, ended).await?;
            }
        }
        Ok(count)
    }

    async fn tell(&self, connection: &mut Connection, ended: Ended) -> Result<(), SqlError> {
        for life in &ended.lives {
            let (gateway, epoch, cause) = (&life.gateway, life.epoch.0, life.end.map_or("unknown", |end| end.reason.name()));
            let is_expected = life.end.is_some_and(|end| matches!(end.reason, EndReason::Deregistered | EndReason::Superseded));
            match is_expected {
                true => info!(gateway.addr = %gateway, gateway.epoch = epoch, cause, "gateway {gateway} has ended a life"),
                false => {
                    warn!(gateway.addr = %gateway, gateway.epoch = epoch, cause, "gateway {gateway} is dead: its users are offline")
                }
            }
            self.metrics.gateway_deaths.get_or_create(&ByCause { cause }).inc();
        }
        self.lives.learn(&ended.lives);
        let epochs: Vec<Epoch> = ended.lives.iter().map(|life| life.epoch).collect();
        if self.publisher.tell_ended(&epochs).await.is_some() {
            connection.delete_outbox(&[ended.outbox]).await?;
        }
        Ok(())
    }

    /// Why a gateway may not go on with an epoch.
    pub(super) async fn fence(
        &self,
        connection: &mut Connection,
        gateway: &GatewayAddr,
        what: &'static str,
    ) -> Result<Fence, SqlError> {
        self.metrics.fenced.get_or_create(&ByWhat { what }).inc();
        let lives = connection.current_lives(std::slice::from_ref(gateway)).await?;
        Ok(Fence::of(lives.iter().map(|life| &**life)))
    }

    /// Runs a change that its caller waits for when its turn comes. Once begun it goes on to its end; what must not be done for
    /// nobody asks once more.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl for<'a> FnOnce(&'a mut Connection, Caller) -> Change<'a, T> + Send + 'static,
    ) -> Result<T, Error> {
        let Ok(place) = self.waiting.clone().try_acquire_owned() else {
            self.metrics.shed("registrations");
            return Err(Error::overloaded("too many gateways register at once"));
        };
        let caller = Caller { since: Instant::now(), gone: CancellationToken::new() };
        let _tells_when_gone = caller.gone.clone().drop_guard();
        let this = self.clone();
        let change = async move {
            let _place = place;
            let mut kept = this.connection.lock().await;
            if !caller.waits() {
                return Err(SqlError::Lost("its caller timed out while it was queued".to_owned()));
            }
            let mut connection = this.usable(kept.take()).await?;
            let done = change(&mut connection, caller).await?; // after an error nobody knows what state it is in
            *kept = Some(connection);
            Ok::<T, SqlError>(done)
        };
        match self.changes.spawn_on(change, &self.runtime).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(error)) => {
                warn!(%error, "a gateway's registration was not stored");
                self.metrics.store_error("gateways");
                Err(Error::unavailable("the database did not confirm it"))
            }
            Err(_) => Err(Error::internal("a change of a gateway panicked, and was not made")),
        }
    }

    /// The connection that was `kept`, if it still answers: the server ends idle sessions. Else a new one.
    pub(super) async fn usable(&self, kept: Option<Connection>) -> Result<Connection, SqlError> {
        if let Some(mut connection) = kept.filter(|kept| self.database.is_current(kept))
            && connection.ping().await.is_ok()
        {
            return Ok(connection);
        }
        self.database.connect(Purpose::Lane).await
    }

    /// Waits for the changes that are under way.
    pub async fn finish(&self) {
        self.changes.close();
        self.changes.wait().await;
    }

    /// Shows the lives in the metrics.
    pub(super) fn show(&self, table: &LifeTable, held: bool) {
        let now = self.lives.clock.now();
        let state = |life: &Life| match life.liveness(now, self.terms.heartbeat_interval) {
            Liveness::OnTime if life.is_managed() => "alive",
            Liveness::OnTime => "unmanaged",
            Liveness::Late => "late",
            Liveness::Over => "over",
        };
        for name in ["alive", "late", "unmanaged", "over"] {
            let count = table.iter().filter(|life| state(life) == name).count();
            self.metrics.gateways.get_or_create(&ByState { state: name }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let living = || table.iter().filter(|life| life.is_managed() && life.is_alive());
        let oldest = living().map(|life| now.since(life.last_beat)).max().unwrap_or_default();
        self.metrics.oldest_beat_seconds.set(oldest.as_secs_f64());
        self.metrics.hold.set(i64::from(held));
    }
}
