//! Both uses of Redis.

use std::sync::Arc;

use crate::app::StartError;
use crate::app::neighbours;
use crate::config;
use crate::config::Config;
use crate::store::bus::Bus;
use crate::store::connection::Engine;
use crate::store::database::Database;
use crate::store::shared::SharedCache;

/// As far as they are configured.
pub async fn open(config: &Config, database: &Database) -> Result<(Option<Arc<Bus>>, Option<SharedCache>), StartError> {
    let bus = config.redis_queue.as_ref().map(bus).transpose()?.map(Arc::new);
    let cache = config.redis_cache.as_ref().map(|redis| shared(redis, config, &database.store_id)).transpose()?;
    if database.engine == Engine::Sqlite {
        neighbours::must_not_be(&database.store_id, cache.as_ref(), bus.as_deref()).await?;
    }
    Ok((bus, cache))
}

fn bus(queue: &config::RedisQueue) -> Result<Bus, StartError> {
    let section = "redis_queue";
    Bus::new(queue).map_err(|cause| StartError::Redis { section, cause })
}

fn shared(redis: &config::RedisCache, config: &Config, store_id: &str) -> Result<SharedCache, StartError> {
    let section = "redis_cache";
    SharedCache::new(redis, &config.route, store_id).map_err(|cause| StartError::Redis { section, cause })
}
