//! Looks at everything that a node relies on, when somebody asks: it takes a second or two.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::future::join_all;
use tokio::time::timeout;

use crate::clock::unix_ms;
use crate::engine::messages::peers::FORWARD_LIMIT;
use crate::engine::messages::peers::OLDER_RELEASE;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::peers::Question;
use crate::engine::overview::check;
use crate::engine::overview::check::Check;
use crate::engine::overview::check::FileLimit;
use crate::engine::read::audit_log::AuditLog;
use crate::engine::read::audit_log::AuditPage;
use crate::engine::read::hints::Hints;
use crate::engine::read::l2::L2;
use crate::engine::read::lives::Lives;
use crate::store::bus::Bus;
use crate::store::cluster::NodeRow;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::database::Database;
use crate::store::examination::Examined;

/// How a process that starts is called in the audit.
pub const START: &str = "start";
/// How long the database, and each Redis, may take.
const SQL_LIMIT: Duration = Duration::from_secs(3);
const REDIS_LIMIT: Duration = Duration::from_secs(1);
/// Since when processes are looked for that did not start because of their name.
const TWINS_WITHIN: Duration = Duration::from_secs(600);
const STARTS: u32 = 100;
/// Nodes that are called.
const MAX_NODES: usize = 64;

pub struct Doctor {
    pub database: Arc<Database>,
    pub lives: Arc<Lives>,
    pub peers: Arc<Peers>,
    /// None: nobody is heard.
    pub hints: Option<Arc<Hints>>,
    pub cache: Option<Arc<L2>>,
    pub queue: Option<Arc<Bus>>,
    pub audit: AuditLog,
    pub files: FileLimit,
}

impl Doctor {
    /// All that this node can find out by itself.
    pub async fn examine(&self) -> Vec<Check> {
        let (database, twins, cache, queue, peers, advertise) =
            tokio::join!(self.database(), self.twins(), self.cache(), self.queue(), self.others(), self.advertise());
        let (mut checks, usurped) = database;
        checks.extend([usurped.unwrap_or(twins), self.echo(), peers, advertise]);
        checks.extend(cache.into_iter().chain([queue]));
        checks.push(check::file_limit(self.files));
        checks
    }

    /// The database, and whether another process has taken this one's name.
    async fn database(&self) -> (Vec<Check>, Option<Check>) {
        let asked = unix_ms();
        let examined = timeout(SQL_LIMIT, self.database.examine(&self.peers.own.node_id)).await;
        let examined = examined.unwrap_or_else(|_| Err(SqlError::Lost(format!("no answer within {SQL_LIMIT:?}"))));
        match examined {
            Ok(examined) => (self.examined(&examined, asked), self.usurped(examined.owner.as_deref())),
            Err(error) => {
                let says = error.to_string();
                let isolation = says.contains("isolation level");
                let hint = "see whether it runs, and whether this node's address, user and password for it are right ([store])";
                let mut checks = vec![Check::ill("database", says.clone(), hint)];
                if isolation {
                    checks.push(Check::ill("isolation_level", says, ISOLATION_HINT));
                }
                (checks, None)
            }
        }
    }

    fn examined(&self, examined: &Examined, asked_ms: i64) -> Vec<Check> {
        let middle = asked_ms + millis(examined.connected_in + examined.read_in / 2);
        let offset = middle - examined.cluster.clock.now().0;
        let isolation = match self.database.engine {
            Engine::MySql => "READ COMMITTED, as every session of this node sets it and has looked after it",
            Engine::Sqlite => "SQLite: one writer at a time",
        };
        let durability = match &examined.durability.weaknesses[..] {
            [] => Check::well("durability", examined.durability.rests_on.clone()),
            weak => Check::ill("durability", weak.join("; "), "set what it names in the server's configuration, and restart it"),
        };
        vec![
            Check::well("database", format!("connected within {} ms", examined.connected_in.as_millis())),
            check::clock(offset, examined.connected_in + examined.read_in, self.lives.clock.has_stepped()),
            Check::well("isolation_level", isolation),
            durability,
            check::schema(&examined.steps),
            check::disk(examined.free),
        ]
    }

    fn usurped(&self, owner: Option<&str>) -> Option<Check> {
        let own = &self.peers.own;
        let is_usurped = owner.is_some_and(|owner| owner != own.incarnation);
        is_usurped.then(|| Check::ill("node_id", format!("another process has taken node_id {}", own.node_id), TWIN_HINT))
    }

    /// Processes that did not start because this one has their name.
    async fn twins(&self) -> Check {
        let from = self.lives.clock.now().minus(TWINS_WITHIN);
        let page = AuditPage { who: None, action: Some(START.to_owned()), with_denied: false, from, before: None, limit: STARTS };
        let Ok(Ok(rows)) = timeout(SQL_LIMIT, self.audit.page(page)).await else {
            return Check::ill("node_id", "the audit cannot be read", "see the check database");
        };
        let own = &self.peers.own.node_id;
        match rows.iter().find(|row| row.outcome == "failed" && row.target == *own) {
            Some(row) => Check::ill("node_id", row.reason.clone(), TWIN_HINT),
            None => Check::well("node_id", format!("nobody else has tried to be {own} within ten minutes")),
        }
    }

    fn echo(&self) -> Check {
        let Some(hints) = &self.hints else {
            return Check::well("hint_echo", "no [redis_queue]: with other nodes, memory is trusted for a second only");
        };
        match hints.complete_since(Instant::now()) {
            Some(age) => Check::well("hint_echo", format!("all that nodes told up to {} ms ago is known", age.as_millis())),
            None => Check::ill(
                "hint_echo",
                "this node does not hear itself, or one of the others, on [redis_queue]",
                "see whether all nodes have the same Redis and channel_prefix in [redis_queue], and none of them stands still",
            ),
        }
    }

    /// Whether each of the others is reached, and reaches this one.
    async fn others(&self) -> Check {
        let listed = self.peers.listed();
        let others: Vec<&NodeRow> = listed.iter().filter(|node| node.name.node_id != self.peers.own.node_id).collect();
        let troubles = join_all(others.iter().take(MAX_NODES).map(async |node| self.trouble_with(node).await)).await;
        let troubles: Vec<String> = troubles.into_iter().flatten().collect();
        match (self.database.engine, others.len(), &troubles[..]) {
            (Engine::Sqlite, ..) => Check::well("peers", "none, as with SQLite"),
            (Engine::MySql, 0, _) => Check::ill(
                "peers",
                "no other node is there: if this one stops, nobody answers",
                "start another with the same [store]; if one runs, see whether that is the same database",
            ),
            (Engine::MySql, count, []) => Check::well("peers", format!("{count} reached, and they reach this one")),
            (Engine::MySql, _, troubles) => Check::ill(
                "peers",
                troubles.join("; "),
                "see whether presence_service.advertise of the node that is not reached is right, a firewall is between, or [peer] \
                 has the wrong certificates or token",
            ),
        }
    }

    async fn trouble_with(&self, node: &NodeRow) -> Option<String> {
        let (name, own) = (&node.name.node_id, &self.peers.own.node_id);
        let reach = Question { what: "reach", about: own.clone() };
        match self.peers.ask(&node.name.addr, reach, FORWARD_LIMIT).await {
            Err(why) if why == OLDER_RELEASE => None, // it has answered
            Err(why) => Some(format!("{name} at {} is not reached: {why}", node.name.addr)),
            Ok(json) => {
                let told: Option<String> = serde_json::from_slice(&json).unwrap_or_default();
                told.map(|why| format!("{name} does not reach this one at {}: {why}", self.peers.own.addr))
            }
        }
    }

    /// Whether the address that others are told leads here.
    async fn advertise(&self) -> Check {
        const HINT: &str = "set presence_service.advertise to an address of this node that the others reach";
        let own = &self.peers.own;
        if self.database.engine == Engine::Sqlite {
            return Check::well("advertise", "nobody is told, as with SQLite");
        }
        let hello = Question { what: "hello", about: String::new() };
        match self.peers.ask(&own.addr, hello, FORWARD_LIMIT).await {
            Ok(json) if serde_json::from_slice::<String>(&json).is_ok_and(|who| who == own.incarnation) => {
                Check::well("advertise", format!("{} leads here", own.addr))
            }
            Ok(_) => Check::ill("advertise", format!("at {} another process answers", own.addr), HINT),
            Err(why) => Check::ill("advertise", format!("at {} nobody answers: {why}", own.addr), HINT),
        }
    }

    async fn cache(&self) -> Vec<Check> {
        let Some(cache) = &self.cache else { return vec![Check::well("redis_cache", "not configured")] };
        let (_, server) = match cache.shared().look_at_servers(REDIS_LIMIT).await {
            Ok(looked) => looked,
            Err(error) => return vec![Check::ill("redis_cache", error.to_string(), REDIS_HINT)],
        };
        let known = self.lives.cluster().map(|cluster| cluster.cache_identity.clone()).unwrap_or_default();
        let identity = match server.identity == known {
            true => Check::well("redis_cache", "it answers, and is the server whose records the caches trust"),
            false => Check::ill(
                "redis_cache",
                "it is another server than the one whose records the caches trust",
                "wait a few seconds, if it was restarted or replaced; if it stays so, two nodes have different servers in [redis_cache]",
            ),
        };
        let policy = match server.evicts_keys {
            false => Check::well("redis_policy", "it removes no keys of its own accord"),
            true => Check::ill(
                "redis_policy",
                "maxmemory-policy is allkeys-*: it removes keys that other services read as 'offline'",
                "CONFIG SET maxmemory-policy volatile-lru (or noeviction), and give it enough memory",
            ),
        };
        vec![identity, policy]
    }

    async fn queue(&self) -> Check {
        let Some(queue) = &self.queue else { return Check::well("redis_queue", "not configured") };
        match queue.look(REDIS_LIMIT).await {
            Ok(_) => Check::well("redis_queue", "it answers"),
            Err(error) => Check::ill("redis_queue", error.to_string(), REDIS_HINT),
        }
    }
}

const ISOLATION_HINT: &str = "whatever stands between this node and the database (a proxy, an init_connect) changes \
    transaction_isolation: it has to leave READ COMMITTED alone, for else changes are lost";
const TWIN_HINT: &str = "give each node a presence_service.node_id of its own, or none";
const REDIS_HINT: &str = "see whether it runs, is a primary, and takes this node's user and password";

fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
