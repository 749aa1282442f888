//! Redis Cluster: a link to each primary, and which slots it has.
//!
//! No client of whole clusters is used: it would hide which server answered over which connection, and what is read counts
//! only over connections whose servers have been identified. So the last look's map and connections are remembered; an answer
//! over any others is one of nobody knows whom.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwapOption;
use futures_util::future::join_all;
use redis::Pipeline;
use redis::RedisError;
use redis::RedisResult;
use redis::Value;
use tokio::time::timeout_at;
use xxhash_rust::xxh3::xxh3_128;

use crate::config;
use crate::store::batch::Batch;
use crate::store::batch::Cursor;
use crate::store::link::Link;
use crate::store::link::Server;
use crate::store::link::field;
use crate::store::link_error::LinkError;
use crate::store::several::ask_all;
use crate::store::slot_map;
use crate::store::slot_map::NOBODY;
use crate::store::slot_map::Ranges;

/// The number of what was answered over connections that were not looked at, or not together.
const UNKNOWN: u64 = u64::MAX;

pub struct Slots {
    redis: config::Redis,
    map: ArcSwapOption<Map>,
    /// One task at a time asks for the map.
    refreshing: tokio::sync::Mutex<()>,
    /// By `host:port`: the configured ones, and all that were met.
    links: Mutex<HashMap<String, Arc<Link>>>,
    view: Mutex<View>,
}

pub struct Map {
    ranges: Ranges,
    /// Whoever has slots.
    servers: Vec<(String, Arc<Link>)>,
    /// Of each slot the place in `servers`.
    owners: Vec<u16>,
}

/// What was looked at together.
#[derive(Default)]
struct View {
    number: u64,
    map: Option<Arc<Map>>,
    /// The connection to each of the map's servers.
    connections: Vec<u64>,
}

/// Where a command was sent on to.
#[derive(PartialEq, Eq, Hash)]
struct Elsewhere {
    /// `host:port`.
    node: String,
    /// The slot is on its way there: it may come in if it asks.
    asking: bool,
}

/// Commands that were sent on, by their places in the batch.
type SentOn = HashMap<Elsewhere, Vec<usize>>;

impl Slots {
    /// Connections will live on the runtime of the caller.
    ///
    /// # Errors
    /// When an address makes no sense.
    pub fn new(redis: &config::Redis) -> Result<Self, LinkError> {
        let slots = Self {
            redis: redis.clone(),
            map: ArcSwapOption::default(),
            refreshing: tokio::sync::Mutex::default(),
            links: Mutex::default(),
            view: Mutex::default(),
        };
        redis.nodes.iter().try_for_each(|node| slots.link(node).map(|_| ()))?;
        Ok(slots)
    }

    /// Runs each command where its slot is, at all servers at the same time. Answers stand in the order of the commands. The
    /// number is that of [`Slots::look`], if only connections that it looked at have answered.
    ///
    /// # Errors
    /// Some of it cannot be done; the rest may have been.
    pub async fn run(&self, batch: &Batch, limit: Duration) -> Result<(u64, Vec<Value>), LinkError> {
        let until = Instant::now() + limit;
        let map = match self.map.load_full() {
            Some(map) => map,
            None => timeout_at(until.into(), self.refresh(None, limit)).await.map_err(|_| LinkError::NoAnswer(limit))??,
        };
        let mut parts = vec![Vec::new(); map.servers.len()];
        for (place, slot) in batch.slots().enumerate() {
            let owner = usize::from(map.owners[usize::from(slot)]);
            parts.get_mut(owner).ok_or(LinkError::NobodysSlots)?.push(place);
        }
        let asked = parts.iter().zip(&map.servers).enumerate().filter(|(_, (places, _))| !places.is_empty());
        let answered = join_all(asked.map(|(at, (places, (name, link)))| async move {
            (at, name, places, link.run_each(&mut batch.part(places, false), limit).await)
        }));
        let (mut values, mut sent_on, mut connections) = (vec![Value::Nil; batch.slots().len()], SentOn::new(), Vec::new());
        for (at, name, places, answers) in answered.await {
            let (connection, answers) = answers?;
            connections.push((at, connection));
            take_in(&mut values, places, answers, name, &mut sent_on)?;
        }
        if sent_on.is_empty() {
            return Ok((self.number_of(&map, &connections), values));
        }
        self.follow(batch, &sent_on, &mut values, until).await?;
        if sent_on.keys().any(|elsewhere| !elsewhere.asking) {
            let _ = timeout_at(until.into(), self.refresh(Some(&map), limit)).await; // the next look will
        }
        Ok((UNKNOWN, values))
    }

    /// Runs commands once more, where they were sent on to.
    async fn follow(&self, batch: &Batch, sent_on: &SentOn, values: &mut [Value], until: Instant) -> Result<(), LinkError> {
        for (Elsewhere { node, asking }, places) in sent_on {
            let (link, mut again) = (self.link(node)?, SentOn::new());
            let limit = until.saturating_duration_since(Instant::now());
            let (_, answers) = link.run_each(&mut batch.part(places, *asking), limit).await?;
            take_in(values, places, answers, node, &mut again)?;
            if !again.is_empty() {
                return Err(LinkError::ClusterDown);
            }
        }
        Ok(())
    }

    /// Which servers there are, each of them a primary, and how they are. The number is another one if any of them, any of
    /// their slots, or any connection is.
    ///
    /// # Errors
    /// One of them does not answer, or the cluster is down.
    pub async fn look(&self, limit: Duration) -> Result<(u64, Server), LinkError> {
        let map = self.refresh(None, limit).await?;
        if map.owners.contains(&NOBODY) {
            return Err(LinkError::NobodysSlots);
        }
        let looked = join_all(map.servers.iter().map(|(_, link)| link.look(limit))).await;
        let looked = looked.into_iter().collect::<Result<Vec<_>, _>>()?;
        let mut whose = String::new();
        for (first, last, _) in &map.ranges {
            let (_, server) = &looked[usize::from(map.owners[usize::from(*first)])];
            whose.push_str(&format!("{first}-{last}={}\n", server.identity));
        }
        let identity = format!("cluster:{:032x}", xxh3_128(whose.as_bytes()));
        let used_memory = looked.iter().map(|(_, server)| server.used_memory).sum();
        let evicts_keys = looked.iter().any(|(_, server)| server.evicts_keys);
        let connections: Vec<u64> = looked.iter().map(|(number, _)| *number).collect();
        let mut view = lock(&self.view);
        let is_same = view.map.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, &map)) && view.connections == connections;
        if !is_same {
            *view = View { number: view.number + 1, map: Some(map), connections };
        }
        Ok((view.number, Server { identity, used_memory, evicts_keys }))
    }

    /// Names that `scan` finds, and where to go on; None: that was the last page. Servers are looked through one after the
    /// other: if the map changes meanwhile, some may be left out.
    pub async fn scan(
        &self,
        cursor: Cursor,
        scan: impl FnOnce(u64) -> Pipeline,
    ) -> Result<(Option<Cursor>, Vec<String>), LinkError> {
        let map = self.map.load_full().ok_or(LinkError::Down)?;
        let Some((_, link)) = map.servers.get(cursor.server) else { return Ok((None, Vec::new())) };
        let ((at, names),): ((u64, Vec<String>),) = link.run(&scan(cursor.at), link.timeout()).await?;
        let server = if at == 0 { cursor.server + 1 } else { cursor.server };
        Ok(((server < map.servers.len()).then_some(Cursor { server, at }), names))
    }

    /// Learns which slots are whose, unless that is no longer `known`. All servers are asked, because one that has lost the
    /// others believes in an old map; whoever has seen the latest change is believed.
    ///
    /// # Errors
    /// No server answers that thinks the cluster up.
    pub async fn refresh(&self, known: Option<&Arc<Map>>, limit: Duration) -> Result<Arc<Map>, LinkError> {
        let _turn = self.refreshing.lock().await;
        let current = self.map.load_full();
        if let (Some(current), Some(known)) = (&current, known)
            && !Arc::ptr_eq(current, known)
        {
            return Ok(current.clone());
        }
        let links: Vec<_> = lock(&self.links).iter().map(|(node, link)| (node.clone(), link.clone())).collect();
        let answers = ask_all(links.iter().map(|(node, link)| ask(node, link, limit)), Result::is_ok).await;
        let ranges = latest(answers)?;
        if let Some(current) = current.filter(|current| current.ranges == ranges) {
            return Ok(current);
        }
        let map = Arc::new(self.map_of(ranges)?);
        self.map.store(Some(map.clone()));
        Ok(map)
    }

    /// Links to servers that have no slots any more, and are not configured, end.
    fn map_of(&self, ranges: Ranges) -> Result<Map, LinkError> {
        let mut names: Vec<String> = ranges.iter().map(|(.., node)| node.clone()).collect();
        names.sort();
        names.dedup();
        let owners = slot_map::owners(&ranges, &names);
        lock(&self.links).retain(|name, _| names.contains(name) || self.redis.nodes.contains(name));
        let linked = names.into_iter().map(|name| self.link(&name).map(|link| (name, link)));
        Ok(Map { owners, servers: linked.collect::<Result<_, _>>()?, ranges })
    }

    fn link(&self, node: &str) -> Result<Arc<Link>, LinkError> {
        let mut links = lock(&self.links);
        if let Some(link) = links.get(node) {
            return Ok(link.clone());
        }
        let link = Arc::new(Link::to_member(&self.redis, node)?);
        links.insert(node.to_owned(), link.clone());
        Ok(link)
    }

    fn number_of(&self, map: &Arc<Map>, connections: &[(usize, u64)]) -> u64 {
        let view = lock(&self.view);
        let is_seen = view.map.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, map))
            && connections.iter().all(|(server, connection)| view.connections.get(*server) == Some(connection));
        if is_seen { view.number } else { UNKNOWN }
    }
}

/// What the server says that has seen the latest change.
///
/// # Errors
/// What the last one said, if none knows.
fn latest(answers: Vec<Result<(u64, Ranges), LinkError>>) -> Result<Ranges, LinkError> {
    let (mut latest, mut why) = (None, LinkError::Down);
    for answer in answers {
        match answer {
            Ok(told) => latest = latest.max(Some(told)),
            Err(error) => why = error,
        }
    }
    latest.map(|(_, ranges)| ranges).ok_or(why)
}

/// The latest change of the cluster that a server has seen, and which slots are whose.
async fn ask(node: &str, link: &Link, limit: Duration) -> Result<(u64, Ranges), LinkError> {
    let mut question = redis::pipe();
    question.cmd("CLUSTER").arg("INFO").cmd("CLUSTER").arg("SLOTS");
    let (info, said): (String, Value) = link.run(&question, limit).await?;
    if field(&info, "cluster_state") != "ok" {
        return Err(LinkError::ClusterDown);
    }
    let epoch = field(&info, "cluster_current_epoch").parse().unwrap_or_default();
    slot_map::ranges(&said, node).map(|ranges| (epoch, ranges)).ok_or(LinkError::ClusterDown)
}

/// Puts answers to their places, and notes which commands `node` has sent on.
fn take_in(
    values: &mut [Value],
    places: &[usize],
    answers: Vec<RedisResult<Value>>,
    node: &str,
    sent_on: &mut SentOn,
) -> Result<(), LinkError> {
    for (place, answer) in places.iter().zip(answers) {
        match answer {
            Ok(value) => values[*place] = value,
            Err(error) => sent_on.entry(elsewhere(&error, node)?).or_default().push(*place),
        }
    }
    Ok(())
}

fn elsewhere(error: &RedisError, node: &str) -> Result<Elsewhere, LinkError> {
    let to = error.redirect_node().and_then(|(to, _)| to.rsplit_once(':'));
    let node = to.and_then(|(host, port)| slot_map::address(host, port.parse().ok()?, node));
    let node = node.ok_or_else(|| LinkError::Redis(error.clone()))?;
    Ok(Elsewhere { node, asking: error.code() == Some("ASK") })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_that_has_seen_the_latest_change_is_believed_whoever_answers_first() {
        let told = |epoch, owner: &str| Ok((epoch, vec![(0, 16_383, owner.to_owned())]));
        let owner = |answers| latest(answers).map(|ranges| ranges[0].2.clone()).ok();
        assert_eq!(owner(vec![told(4, "z:1"), told(9, "b:1"), Err(LinkError::ClusterDown)]).as_deref(), Some("b:1"));
        assert_eq!(owner(vec![told(9, "b:1"), Err(LinkError::Down), told(4, "z:1")]).as_deref(), Some("b:1"));
        assert!(matches!(latest(vec![Err(LinkError::ClusterDown)]), Err(LinkError::ClusterDown)));
    }
}
