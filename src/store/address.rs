//! Where a Redis is.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::Client;
use redis::aio::MultiplexedConnection;
use redis::aio::PubSub;
use tokio::time::timeout;

use crate::config;
use crate::config::RedisMode;
use crate::store::client::Login;
use crate::store::client::client_at;
use crate::store::client::configured;
use crate::store::client::connect;
use crate::store::link_error::LinkError;
use crate::store::sentinels;
use crate::store::sentinels::Told;

pub struct Address {
    redis: config::Redis,
    place: Place,
}

enum Place {
    /// One server, or whatever stands behind its address.
    Configured,
    /// This server of a cluster: `host:port`.
    Member(String),
    /// The one that sentinels know, and what they said when it was connected to.
    Primary(Mutex<Option<Told>>),
    /// Whichever of a cluster's servers answers; the next time the next one.
    AnyMember(AtomicUsize),
}

impl Address {
    pub fn of(redis: &config::Redis) -> Self {
        let place = match redis.mode {
            RedisMode::Single => Place::Configured,
            RedisMode::Sentinel => Place::Primary(Mutex::default()),
            RedisMode::Cluster => Place::AnyMember(AtomicUsize::new(0)),
        };
        Self { redis: redis.clone(), place }
    }

    pub fn of_member(redis: &config::Redis, node: &str) -> Self {
        Self { redis: redis.clone(), place: Place::Member(node.to_owned()) }
    }

    /// The number of the database that keys are in.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub fn database(&self) -> Result<i64, LinkError> {
        match &self.place {
            Place::Configured => Ok(configured(&self.redis)?.get_connection_info().redis_settings().db()),
            _ => Ok(self.redis.database.into()),
        }
    }

    /// Whether any server of a cluster will do, also one that takes no writes: channels reach all of them.
    pub fn is_any_member(&self) -> bool {
        matches!(self.place, Place::AnyMember(_))
    }

    /// Whether sentinels know by now that another server is the primary, and not the one that was connected to last.
    pub async fn is_left(&self, limit: Duration) -> bool {
        let Place::Primary(known) = &self.place else { return false };
        let known = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(known) = known else { return false };
        timeout(limit, sentinels::know_of_another(&self.redis, &known)).await.unwrap_or(false)
    }

    pub async fn connect(&self) -> Result<MultiplexedConnection, LinkError> {
        match &self.place {
            Place::Primary(known) => {
                let (told, connection) = sentinels::connect_to_primary(&self.redis).await?;
                *known.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
                Ok(connection)
            }
            _ => connect(&self.client().await?, self.redis.timeout).await,
        }
    }

    /// A connection for subscriptions. At a replica as good as at its primary, whose messages it passes on.
    pub async fn subscribe(&self) -> Result<PubSub, LinkError> {
        let limit = self.redis.timeout;
        let subscribe = async { Ok(self.client().await?.get_async_pubsub().await?) };
        timeout(limit, subscribe).await.map_err(|_| LinkError::NoAnswer(limit))?
    }

    async fn client(&self) -> Result<Client, LinkError> {
        let at = |node: &str| client_at(&self.redis, node, Login::Server);
        match &self.place {
            Place::Configured => configured(&self.redis),
            Place::Member(node) => at(node),
            Place::Primary(_) => at(&sentinels::primaries(&self.redis).await?.first().ok_or(LinkError::Down)?.primary),
            Place::AnyMember(turn) => {
                let turn = turn.fetch_add(1, Ordering::Relaxed) % self.redis.nodes.len().max(1);
                at(self.redis.nodes.get(turn).ok_or(LinkError::Down)?)
            }
        }
    }
}
