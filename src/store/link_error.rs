//! Why a Redis does not do what it is asked.

use std::time::Duration;

use redis::RedisError;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("no answer within {0:?}")]
    NoAnswer(Duration),
    #[error("it did not answer lately")]
    Down,
    #[error("a moment ago: {0}")]
    Lately(String),
    #[error("it is a replica, or about to become one")]
    Replica,
    #[error("the cluster is down")]
    ClusterDown,
    #[error("some of the cluster's slots are nobody's")]
    NobodysSlots,
    #[error("it says neither run_id nor master_replid: what it holds from long ago could not be told from the rest")]
    Nameless,
    #[error("no sentinel knows where the primary of {master} is: {why}")]
    Sentinels { master: String, why: String },
    #[error("it watches over no master of this name: see sentinel_master")]
    UnknownMaster,
    #[error("{0}")]
    Redis(#[from] RedisError),
    #[error("{0}")]
    File(#[from] std::io::Error),
}
