//! The servers that keys are in: one, or the primaries of a cluster.

use std::time::Duration;

use redis::FromRedisValue;
use redis::Pipeline;

use crate::config;
use crate::config::RedisMode;
use crate::store::batch::Batch;
use crate::store::batch::Cursor;
use crate::store::link::Link;
use crate::store::link::Server;
use crate::store::link_error::LinkError;
use crate::store::slots::Slots;

pub struct Servers {
    timeout: Duration,
    which: Which,
}

enum Which {
    One(Box<Link>),
    Cluster(Box<Slots>),
}

impl Servers {
    /// Does not connect yet. Connections will live on the runtime of the caller.
    ///
    /// # Errors
    /// When an address makes no sense.
    pub fn new(redis: &config::Redis) -> Result<Self, LinkError> {
        let which = match redis.mode {
            RedisMode::Single | RedisMode::Sentinel => Which::One(Box::new(Link::new(redis)?)),
            RedisMode::Cluster => Which::Cluster(Box::new(Slots::new(redis)?)),
        };
        Ok(Self { timeout: redis.timeout, which })
    }

    /// Keys of one command have to be in the same slot.
    pub fn are_cluster(&self) -> bool {
        matches!(self.which, Which::Cluster(_))
    }

    /// The longest that connecting and writing may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Runs commands within `limit`, with one round trip to each server. Returns the number of what answered, which is that of
    /// [`Servers::look`] if it is what was looked at then, and the answers in the order of the commands.
    ///
    /// # Errors
    /// One of them failed; the others may have been done.
    pub async fn run<T: FromRedisValue>(&self, batch: Batch, limit: Duration) -> Result<(u64, Vec<T>), LinkError> {
        match &self.which {
            Which::One(link) => link.run_numbered(&batch.into_pipeline(), limit).await,
            Which::Cluster(slots) => {
                let (number, values) = slots.run(&batch, limit).await?;
                let values = values.into_iter().map(redis::from_redis_value).collect::<Result<_, _>>();
                Ok((number, values.map_err(redis::RedisError::from)?))
            }
        }
    }

    /// Which servers they are, and how.
    ///
    /// # Errors
    /// One of them does not answer, or takes no writes.
    pub async fn look(&self, limit: Duration) -> Result<(u64, Server), LinkError> {
        match &self.which {
            Which::One(link) => link.look(limit).await,
            Which::Cluster(slots) => slots.look(limit).await,
        }
    }

    /// Names that `scan` finds, and where to go on; None: that was the last page.
    ///
    /// # Errors
    /// The server does not answer.
    pub async fn scan(
        &self,
        cursor: Cursor,
        scan: impl FnOnce(u64) -> Pipeline,
    ) -> Result<(Option<Cursor>, Vec<String>), LinkError> {
        match &self.which {
            Which::Cluster(slots) => slots.scan(cursor, scan).await,
            Which::One(link) => {
                let ((at, names),): ((u64, Vec<String>),) = link.run(&scan(cursor.at), link.timeout()).await?;
                Ok(((at != 0).then_some(Cursor { server: 0, at }), names))
            }
        }
    }
}
