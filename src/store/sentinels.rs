//! Redis Sentinel: it is asked for the primary's address, and for nothing else.

use std::cmp::Reverse;
use std::collections::HashMap;

use redis::RedisError;
use redis::aio::MultiplexedConnection;

use crate::config;
use crate::store::client;
use crate::store::client::Login;
use crate::store::link_error::LinkError;
use crate::store::several::ask_all;

/// What one sentinel says.
#[derive(Clone)]
pub struct Told {
    /// `host:port`.
    pub primary: String,
    /// It believes that the primary is gone, and that a replica has not taken its place yet.
    is_down: bool,
    /// Of its knowledge: a fail-over raises it.
    epoch: u64,
}

/// A connection to the primary. Sentinels may disagree, and each may be wrong for a while: whoever has seen the latest
/// fail-over is believed first, and what the server itself says decides.
///
/// # Errors
/// No sentinel knows the primary, or no server that they name is one.
pub async fn connect_to_primary(redis: &config::Redis) -> Result<(Told, MultiplexedConnection), LinkError> {
    let mut why = LinkError::Replica;
    for primary in primaries(redis).await? {
        match connect(redis, &primary.primary).await {
            Ok(connection) => return Ok((primary, connection)),
            Err(error) => why = error,
        }
    }
    Err(why)
}

/// Whether there has been a fail-over since this was said. A former primary does not know of it for some ten seconds, and what it
/// is told until then is lost.
pub async fn know_of_another(redis: &config::Redis, than: &Told) -> bool {
    let told = primaries(redis).await.unwrap_or_default();
    told.iter().any(|now| now.epoch > than.epoch && now.primary != than.primary && !now.is_down)
}

/// Where the primary is said to be, the likeliest place first.
///
/// # Errors
/// No sentinel knows one, and why.
pub async fn primaries(redis: &config::Redis) -> Result<Vec<Told>, LinkError> {
    let asks = redis.nodes.iter().map(|sentinel| async move { (sentinel, ask(redis, sentinel).await) });
    let answers = ask_all(asks, |(_, answer)| answer.is_ok()).await;
    let (mut told, mut refusals) = (Vec::new(), Vec::new());
    for (sentinel, answer) in answers {
        match answer {
            Ok(one) => told.push(one),
            Err(error) => refusals.push(format!("{sentinel}: {error}")),
        }
    }
    if told.is_empty() {
        return Err(LinkError::Sentinels { master: redis.sentinel_master.clone(), why: refusals.join("; ") });
    }
    Ok(likeliest_first(told))
}

fn likeliest_first(mut told: Vec<Told>) -> Vec<Told> {
    told.sort_by_key(|one| (one.is_down, Reverse(one.epoch)));
    told.dedup_by(|one, other| one.primary == other.primary);
    told
}

async fn ask(redis: &config::Redis, sentinel: &str) -> Result<Told, LinkError> {
    let mut connection = client::connect(&client::client_at(redis, sentinel, Login::Sentinel)?, redis.timeout).await?;
    let mut command = redis::cmd("SENTINEL");
    command.arg("MASTER").arg(&redis.sentinel_master);
    let said: Result<HashMap<String, String>, RedisError> = command.query_async(&mut connection).await;
    let said = said.map_err(|error| match error.to_string().contains("No such master") {
        true => LinkError::UnknownMaster,
        false => LinkError::Redis(error),
    })?;
    let field = |name: &str| said.get(name).map(String::as_str).unwrap_or_default();
    let is_down = field("flags").split(',').any(|flag| ["s_down", "o_down", "disconnected"].contains(&flag));
    let epoch = field("config-epoch").parse().unwrap_or_default();
    Ok(Told { primary: format!("{}:{}", field("ip"), field("port")), is_down, epoch })
}

async fn connect(redis: &config::Redis, primary: &str) -> Result<MultiplexedConnection, LinkError> {
    let mut connection = client::connect(&client::client_at(redis, primary, Login::Server)?, redis.timeout).await?;
    let role: Vec<redis::Value> = redis::cmd("ROLE").query_async(&mut connection).await?;
    let is_primary = matches!(role.first(), Some(redis::Value::BulkString(name)) if name == b"master");
    if is_primary { Ok(connection) } else { Err(LinkError::Replica) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_has_seen_the_latest_fail_over_is_believed_first_and_who_is_believed_dead_tried_last() {
        let told = [("a:1", true, 9), ("b:1", false, 3), ("c:1", false, 4), ("c:1", false, 4), ("d:1", false, 2)];
        let told = told.map(|(primary, is_down, epoch)| Told { primary: primary.to_owned(), is_down, epoch });
        let order: Vec<String> = likeliest_first(told.to_vec()).into_iter().map(|one| one.primary).collect();
        assert_eq!(order, ["c:1", "b:1", "d:1", "a:1"]);
    }
}
