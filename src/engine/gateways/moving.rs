//! Asking users to go to another gateway: nothing is written for them. Their routes stay until they are bound elsewhere, so
//! nobody is offline meanwhile; or until their gateway unbinds them.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use crate::domain::drain::Target;
use crate::domain::gateway::Life;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::policy::Reason;
use crate::domain::route::Route;
use crate::engine::gateways::destinations::Destinations;
use crate::engine::gateways::destinations::Rooms;
use crate::engine::gateways::destinations::Sending;
use crate::engine::messages::kicks::Kicks;
use crate::engine::messages::outlets::Outlets;
use crate::engine::read::lives::Lives;
use crate::engine::write::lanes::Lanes;
use crate::metrics::Metrics;
use crate::store::codec::KickedRoute;
use crate::store::codec::reason_to_i32;
use crate::store::connection::Connection;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::database::Database;

/// A gateway that is to tell many of its clients has so long to read some of it.
const READ_LIMIT: Duration = Duration::from_millis(500);

/// What is configured for all drains.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Users per second.
    pub rate: u32,
    pub settle: Duration,
    /// How long a client has, from being asked, until its gateway closes the connection.
    pub close_after: Duration,
    /// How many seconds of its rate may be on their way.
    pub outstanding: Duration,
    pub heartbeat_interval: Duration,
}

/// What moving users needs.
pub struct Mover {
    pub node_id: String,
    /// This process, as its claims name it.
    pub claimant: String,
    pub database: Arc<Database>,
    pub lives: Arc<Lives>,
    pub lanes: Arc<Lanes>,
    pub outlets: Arc<Outlets>,
    pub kicks: Arc<Kicks>,
    pub metrics: Arc<Metrics>,
    pub rooms: Rooms,
    pub settings: Settings,
}

/// Who is asked, and how.
pub struct Asking<'a> {
    /// Only their routes on this life. None: all.
    pub epoch: Option<Epoch>,
    /// Only this device. None: all.
    pub device: Option<&'a DeviceId>,
    pub reason: Reason,
    /// From when they may log in elsewhere. Zero: then at once.
    pub close_after: Duration,
    pub sending: Sending,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Who had a route.
    pub users: u64,
    /// Routes of which somebody took what was to be told.
    pub routes: u64,
    /// Users of whom nobody did.
    pub unheard: u64,
    /// By then all of them may have logged in elsewhere.
    pub after: Duration,
}

impl Mover {
    /// Where users of this gateway may go now.
    pub fn destinations(&self, from: &Life, to: &[Target]) -> Destinations {
        Destinations::of(&self.lives, &self.rooms, from, to)
    }

    /// A connection for transactions that lock rows of lives: its session ends soon if this node stands still.
    pub async fn connect_to_lock(&self) -> Result<Connection, SqlError> {
        self.database.connect(Purpose::Lane).await
    }

    /// Whether anybody hears what is said to this gateway.
    pub fn hears(&self, life: &Life) -> bool {
        life.attached.is_some() || self.outlets.bus.is_some()
    }

    /// Asks users to go.
    pub async fn ask(
        &self,
        connection: &mut Connection,
        users: &[UserId],
        destinations: &mut Destinations,
        asking: &Asking<'_>,
    ) -> Result<Asked, SqlError> {
        let (records, lives) = connection.load_users_with_lives(users).await?;
        self.lives.learn(&lives);
        let is_meant = |route: &&Route| {
            asking.epoch.is_none_or(|epoch| epoch == route.epoch) && asking.device.is_none_or(|device| *device == route.device)
        };
        let (mut kicks, mut owners, mut asked) = (Vec::new(), Vec::new(), Asked::default());
        for user in users {
            let routes: Vec<&Route> = records.get(user).into_iter().flat_map(|record| &record.routes).filter(is_meant).collect();
            if routes.is_empty() {
                continue; // they have gone
            }
            let place = destinations.choose(*user, asking.sending);
            asked.after = asked.after.max(place.after);
            for route in routes {
                kicks.push(KickedRoute {
                    user_id: user.get(),
                    device_id: route.device.to_string(),
                    epoch: route.epoch.0,
                    bound_version: route.bound_version.0,
                    reason: reason_to_i32(asking.reason),
                    reconnect_to: place.to.clone(),
                    reconnect_after_ms: millis(place.after),
                    close_after_ms: millis(place.after + asking.close_after),
                });
                owners.push(*user);
            }
        }
        let heard = self.kicks.ask(&kicks, Instant::now() + READ_LIMIT).await;
        asked.routes = heard.iter().filter(|heard| **heard).count() as u64;
        let fates: Vec<(UserId, bool)> = owners.into_iter().zip(heard).collect();
        for of_user in fates.chunk_by(|one, next| one.0 == next.0) {
            asked.users += 1;
            asked.unheard += u64::from(of_user.iter().all(|(_, heard)| !heard));
        }
        self.metrics.moves.asked(asked.users, asked.unheard);
        Ok(asked)
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
