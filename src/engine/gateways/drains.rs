//! What operators order: that users leave a gateway, all of them or a share; that this is stopped; that one user goes. Orders are
//! rows, which any node carries out (`drain_run`). What would happen is found out in the same way as what happens.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::domain::drain::Drain;
use crate::domain::drain::DrainState;
use crate::domain::drain::DrainTerms;
use crate::domain::drain::Target;
use crate::domain::gateway::Life;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::policy::Reason;
use crate::domain::route::Route;
use crate::domain::time::Timestamp;
use crate::engine::gateways::destinations::Destinations;
use crate::engine::gateways::destinations::Sending;
use crate::engine::gateways::drain_run::count;
use crate::engine::gateways::moving::Asking;
use crate::engine::gateways::moving::Mover;
use crate::error::Error;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::drains::Placed;
use crate::store::lives::Listed;

/// By then every node knows that the gateways which were named together are drained, and sends nobody from one to the other.
const MARKED_WITHIN: Duration = Duration::from_secs(2);
/// Where there are many users, they are planned in so many parts.
const PLANNED_APART: u64 = 1_000;
/// How long the lives of one address are remembered that ended.
const LIVES_OF_ONE: usize = 64;

/// What an operator wants of a gateway.
#[derive(Clone, Debug, PartialEq)]
pub struct DrainOrder {
    pub gateway: GatewayAddr,
    /// Users per second. None: as configured.
    pub rate: Option<u32>,
    /// Then the rest is removed. None: never.
    pub deadline: Option<Duration>,
    pub reason: String,
    /// Empty: by allocation.
    pub to: Vec<GatewayAddr>,
    /// Above 0 and up to 1.
    pub share: f64,
    pub wait: Duration,
    /// None: as configured.
    pub settle: Option<Duration>,
    pub force: bool,
}

/// Users from a gateway to others.
pub type Plan = BTreeMap<GatewayAddr, u64>;

/// What came of an order.
#[derive(Clone, Debug, PartialEq)]
pub enum Ordered {
    /// What would happen, how long it would take, and what speaks against it.
    Planned {
        drain: Drain,
        plan: Plan,
        eta: Duration,
        against: Option<String>,
    },
    Begun(Drain),
    Refused(String),
    /// No such gateway lives, or no such drain runs.
    NotFound,
}

/// What came of moving one user.
#[derive(Clone, Debug, PartialEq)]
pub enum Migrated {
    /// Devices that were told, or would be; and where they go.
    Asked {
        routes: u64,
        from: Vec<GatewayAddr>,
        to: Plan,
    },
    NotOnline,
    /// There is no gateway to go to.
    Nowhere,
}

pub struct Drains {
    pub mover: Arc<Mover>,
}

impl Drains {
    /// Orders a drain, or changes the one that is active; or says what would happen.
    ///
    /// # Errors
    /// [`Error::Invalid`]: the gateway never registered, or one of `to` takes no users.
    pub async fn order(&self, order: DrainOrder, dry_run: bool) -> Result<Ordered, Error> {
        let mut connection = self.connect().await?;
        let Some(life) = self.life(&order.gateway, "gateway_addr")? else { return Ok(Ordered::NotFound) };
        let mut drain = self.drain(&order, &life)?;
        (drain.left, _) = count(&mut connection, &drain).await.map_err(|error| unavailable(&error))?;
        drain.users = drain.left;
        let (destinations, against) = self.plan(&life, &drain).await?;
        if dry_run {
            drain.unheard = if self.mover.hears(&life) { 0 } else { drain.users };
            let eta = self.takes(&drain, rate_of(&drain, &destinations));
            return Ok(Ordered::Planned { plan: destinations.plan(), drain, eta, against });
        }
        if let Some(against) = against.filter(|_| !order.force) {
            return Ok(Ordered::Refused(against));
        }
        let ordered = async { self.mover.connect_to_lock().await?.order_drain(&drain).await };
        Ok(match ordered.await.map_err(|error| unavailable(&error))? {
            Placed::Active(drain) => Ordered::Begun(drain),
            Placed::Busy(other) => Ordered::Refused(busy(&other)),
            Placed::Over => Ordered::NotFound,
        })
    }

    /// Stops the drain with this id, or the last one of a gateway. A gateway that is empty by now takes users again.
    pub async fn cancel(&self, gateway: Option<&GatewayAddr>, id: &str) -> Result<Ordered, Error> {
        let mut connection = self.connect().await?;
        let found = match gateway {
            None => connection.read_drain(id).await,
            Some(gateway) => match self.life(gateway, "gateway_addr")? {
                Some(life) => connection.drain_to_cancel(life.epoch).await,
                None => Ok(None),
            },
        };
        let found = found.map_err(|error| unavailable(&error))?.filter(Drain::can_be_cancelled);
        let Some(drain) = found else { return Ok(Ordered::NotFound) };
        let ended = async { self.mover.connect_to_lock().await?.end_drain(&drain, DrainState::Cancelled).await };
        let is_cancelled = ended.await.map_err(|error| unavailable(&error))?;
        let drain = connection.read_drain(&drain.id).await.map_err(|error| unavailable(&error))?;
        Ok(drain.filter(|_| is_cancelled).map_or(Ordered::NotFound, Ordered::Begun))
    }

    /// Up to `limit` drains, the newest first, of a gateway's lives or of all.
    pub async fn list(
        &self,
        gateway: Option<GatewayAddr>,
        active_only: bool,
        after: Option<(Timestamp, String)>,
        limit: i64,
    ) -> Result<Vec<Drain>, Error> {
        let mut connection = self.connect().await?;
        let listed = async {
            let epochs = match gateway {
                None => None,
                Some(gateway) => {
                    let newest = Some((gateway.clone(), Epoch(i64::MAX.unsigned_abs())));
                    let lives = connection.list_lives(Listed::All, newest.as_ref(), LIVES_OF_ONE).await?;
                    let own = lives.iter().filter(|life| life.gateway == gateway);
                    Some(own.map(|life| life.epoch).collect::<Vec<_>>())
                }
            };
            connection.list_drains(epochs.as_deref(), active_only, after, limit).await
        };
        listed.await.map_err(|error| unavailable(&error))
    }

    /// Asks one user's devices to go, or one of them; or says where they would go.
    ///
    /// # Errors
    /// [`Error::Invalid`]: `to` takes no users.
    pub async fn migrate(
        &self,
        user: UserId,
        to: Option<&GatewayAddr>,
        device: Option<&DeviceId>,
        dry_run: bool,
    ) -> Result<Migrated, Error> {
        let mut connection = self.connect().await?;
        let to = to.map(|gateway| self.targets(std::slice::from_ref(gateway))).transpose()?.unwrap_or_default();
        let read = connection.load_users_with_lives(&[user]).await;
        let (records, lives) = read.map_err(|error| unavailable(&error))?;
        self.mover.lives.learn(&lives);
        let table = self.mover.lives.table();
        let is_meant = |route: &&Route| device.is_none_or(|device| *device == route.device);
        let epochs: Vec<Epoch> =
            records.get(&user).into_iter().flat_map(|record| &record.routes).filter(is_meant).map(|route| route.epoch).collect();
        let is_elsewhere = |life: &Life| !to.iter().any(|target| target.gateway == life.gateway);
        let mut from: Vec<&Arc<Life>> = epochs.iter().filter_map(|epoch| table.get(*epoch)).collect();
        from.retain(|life| life.is_alive() && is_elsewhere(life));
        from.sort_unstable_by_key(|life| life.epoch);
        from.dedup_by_key(|life| life.epoch);
        let mut places: Vec<Destinations> = from.iter().map(|life| self.mover.destinations(life, &to)).collect();
        if places.iter().any(Destinations::is_empty) {
            return Ok(Migrated::Nowhere);
        }
        let (mut routes, mut asked, mut plan) = (0, 0, Plan::new());
        for (life, destinations) in from.iter().zip(&mut places) {
            let sending = Sending::First(1);
            if dry_run {
                destinations.choose(user, sending);
                asked += 1;
                routes += epochs.iter().filter(|epoch| **epoch == life.epoch).count() as u64;
            } else {
                let close_after = self.mover.settings.close_after;
                let asking = Asking { epoch: Some(life.epoch), device, reason: Reason::Migrate, close_after, sending };
                let told = self.mover.ask(&mut connection, &[user], destinations, &asking).await;
                let told = told.map_err(|error| unavailable(&error))?;
                (routes, asked) = (routes + told.routes, asked + told.users);
            }
            destinations.plan().into_iter().for_each(|(gateway, users)| *plan.entry(gateway).or_default() += users);
        }
        match (asked, routes) {
            (0, _) => return Ok(Migrated::NotOnline), // they have gone
            (_, 0) => return Err(Error::unavailable("no gateway of the user took what its client was to be told")),
            _ => {}
        }
        Ok(Migrated::Asked { routes, from: from.iter().map(|life| life.gateway.clone()).collect(), to: plan })
    }

    /// The life that a gateway lives now. None: it lives none.
    ///
    /// # Errors
    /// It never registered.
    fn life(&self, gateway: &GatewayAddr, field: &'static str) -> Result<Option<Arc<Life>>, Error> {
        let table = self.mover.lives.table();
        let living = || table.iter().filter(|life| life.is_alive() && life.gateway == *gateway);
        match living().find(|life| life.is_managed()) {
            Some(life) => Ok(Some(life.clone())),
            None if living().next().is_some() => {
                Err(Error::Invalid { field, reason: format!("{gateway} never registered: nobody can tell its clients to go") })
            }
            None => Ok(None),
        }
    }

    fn targets(&self, to: &[GatewayAddr]) -> Result<Vec<Target>, Error> {
        to.iter()
            .map(|gateway| match self.life(gateway, "to")? {
                Some(life) if !life.draining => Ok(Target { gateway: gateway.clone(), quota: 0, sent: 0 }),
                Some(_) => Err(Error::Invalid { field: "to", reason: format!("{gateway} is drained itself") }),
                None => Err(Error::Invalid { field: "to", reason: format!("there is no gateway {gateway}") }),
            })
            .collect()
    }

    fn drain(&self, order: &DrainOrder, life: &Life) -> Result<Drain, Error> {
        if order.to.contains(&order.gateway) {
            let reason = format!("{} cannot take its own users", order.gateway);
            return Err(Error::Invalid { field: "to", reason });
        }
        let (now, settings) = (self.mover.lives.clock.now(), &self.mover.settings);
        let terms = DrainTerms {
            rate: order.rate.unwrap_or(settings.rate),
            starts_at: now.plus(order.wait.max(MARKED_WITHIN)),
            deadline: order.deadline.map(|deadline| now.plus(deadline)),
            settle: order.settle.unwrap_or(settings.settle),
            share: order.share,
            to: self.targets(&order.to)?,
            force: order.force,
            reason: order.reason.clone(),
        };
        Ok(new_drain(life, terms, now))
    }

    /// Where all of them would go, and what speaks against that.
    async fn plan(&self, life: &Life, drain: &Drain) -> Result<(Destinations, Option<String>), Error> {
        let mut destinations = self.mover.destinations(life, &drain.terms.to);
        let (room, users, rate) = (destinations.room(), drain.users, rate_of(drain, &destinations));
        let drawing = move || {
            let (mut planned, together) = (0, users.div_ceil(PLANNED_APART).max(1));
            for user in (1..).map_while(|n| UserId::parse(n).ok()) {
                if planned == users || destinations.is_empty() {
                    break;
                }
                let (next, at) = (together.min(users - planned), planned as f64 / f64::from(rate));
                destinations.choose_at(user, Sending::First(next), Duration::from_secs_f64(at));
                planned += next;
            }
            destinations
        };
        // Other calls are served meanwhile, though there are many gateways.
        let drawn = tokio::task::spawn_blocking(drawing).await;
        let destinations = drawn.map_err(|_| Error::internal("a plan of where users go was not finished"))?;
        let against = match (drain.users.saturating_sub(room), destinations.is_empty()) {
            (_, true) => Some("capacity: there is no other gateway that takes users".to_owned()),
            (0, false) => None,
            (over, false) => Some(format!("capacity: the others have room for {room} users, {over} too few")),
        };
        Ok((destinations, against))
    }

    fn takes(&self, drain: &Drain, rate: u32) -> Duration {
        let wait = drain.terms.starts_at.since(drain.began);
        wait + Duration::from_secs_f64(drain.users as f64 / f64::from(rate)) + self.mover.settings.close_after
    }

    /// With a connection, this node knows of every gateway that has registered: the others' may be known here a second later.
    pub(super) async fn connect(&self) -> Result<Connection, Error> {
        let connecting = async {
            let mut connection = self.mover.database.connect(Purpose::General).await?;
            let all_unmanaged = Some(Epoch(i64::MAX.unsigned_abs()));
            self.mover.lives.learn(&connection.read_lives(Duration::ZERO, all_unmanaged).await?);
            Ok(connection)
        };
        connecting.await.map_err(|error| unavailable(&error))
    }
}

/// Users per second: no more than come back elsewhere.
fn rate_of(drain: &Drain, destinations: &Destinations) -> u32 {
    drain.terms.rate.min(destinations.log_in_rate().unwrap_or(u32::MAX)).max(1)
}

/// Why another order for the same gateway has to wait.
pub(super) fn busy(other: &Drain) -> String {
    let Drain { id, gateway, .. } = other;
    format!("busy: a part of the users of {gateway} is being moved (drain {id}): wait for its end, or cancel it")
}

/// One that has not begun.
pub(super) fn new_drain(life: &Life, terms: DrainTerms, now: Timestamp) -> Drain {
    Drain {
        id: uuid::Uuid::new_v4().to_string(),
        gateway: life.gateway.clone(),
        epoch: life.epoch,
        state: DrainState::Waiting,
        pass: 0,
        cursor: 0,
        users: 0,
        left: 0,
        asked: 0,
        unheard: 0,
        began: now,
        ended: Timestamp::default(),
        node_id: String::new(),
        terms,
    }
}

pub(super) fn unavailable(error: &SqlError) -> Error {
    warn!(%error, "an order to move users was not carried out");
    Error::unavailable("the database did not confirm it")
}
