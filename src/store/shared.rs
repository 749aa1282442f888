//! L2: one record per user in Redis, and the two keys that other services read.
//!
//! Redis may come back with old data (a dump, a replica that lagged). So a record carries the store it belongs to and the
//! generation it was written in; a reader ignores any other, and the generation is raised whenever the server is not the one
//! it was before.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use redis::Cmd;
use redis::Script;

use crate::config;
use crate::domain::gateway::Life;
use crate::domain::id::NumberMap;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::user::UserRecord;
use crate::store::batch::Batch;
use crate::store::batch::Cursor;
use crate::store::codec::StoredRecord;
use crate::store::codec::status_word;
use crate::store::keys::Keys;
use crate::store::link::Server;
use crate::store::link_error::LinkError;
use crate::store::servers::Servers;
use crate::store::users::Records;

/// A reader's copy of what SQL said: short-lived, because it may land after a newer record was evicted.
const FILL_TTL: Duration = Duration::from_secs(10);
/// "No such user" is remembered for a moment only.
const ABSENT_TTL: Duration = Duration::from_secs(2);
/// How long a store that says nothing any more keeps others away.
const CLAIM_TTL: Duration = Duration::from_secs(10);
/// Keys the server looks at for one answer of a scan.
const SCAN_PAGE: u32 = 1_000;
/// Digits of a generation and of a version in the header, so that text compares as numbers do.
const DIGITS: usize = 20;
/// Generation, version, store id.
const HEADER_BYTES: usize = 2 * DIGITS + 36;

/// KEYS: record, then the keys that go with it. ARGV: record, its TTL; `fill`, `project` or `record`; then of each key its
/// value and TTL. A TTL of 0 is none, an empty value no key. Writes the record if it is newer (a projection: not older) and only
/// then the keys, so that all of them always belong together. Returns 1 if it wrote, and -1 if the writer does not know of the
/// generation that is there: a record of that one is no sign that anything newer is known.
///
/// On one server the keys are route and status. In a cluster they are in two slots, and no script reaches both: it runs once
/// for record and route, and once for the status with the record's header beside it. Each key so follows the versions.
const WRITE: &str = r"
local new, old = ARGV[1], redis.call('GETRANGE', KEYS[1], 0, 75)
if #old == 76 and string.sub(old, 41, 76) == string.sub(new, 41, 76) then
    local was, is = string.sub(old, 1, 40), string.sub(new, 1, 40)
    if string.sub(was, 1, 20) > string.sub(is, 1, 20) then return -1 end
    if was > is or (was == is and ARGV[3] == 'fill') then return 0 end
end
redis.call('SET', KEYS[1], new, 'EX', ARGV[2])
if ARGV[3] ~= 'project' then return 1 end
for i = 2, #KEYS do
    local value, ttl = ARGV[2 * i], ARGV[2 * i + 1]
    if value == '' then redis.call('DEL', KEYS[i])
    elseif ttl == '0' then redis.call('SET', KEYS[i], value)
    else redis.call('SET', KEYS[i], value, 'EX', ttl) end
end
return 1";

/// KEYS: a key. ARGV: a value. Deletes the key if it has that value.
const FORGET: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

/// KEYS: the store's name. ARGV: a store's id, its TTL. Says whose this Redis is: the first store's, as long as its nodes
/// renew it; empty: nobody's until now.
const CLAIM: &str = r"
local owner = redis.call('GET', KEYS[1]) or ''
if owner == '' or owner == ARGV[1] then redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
return owner";

/// Whose a Redis was when this store said that it uses it.
#[derive(Clone, Debug, PartialEq)]
pub enum Owner {
    Nobody,
    ThisStore,
    Another(String),
}

/// What Redis has of some users.
pub struct Found {
    /// The connection that answered.
    pub connection: u64,
    pub records: Records,
    /// Records that were left out: of another generation, and of another store.
    pub outdated: u64,
    pub foreign: u64,
}

/// What became of records that were to be shown.
pub struct Written {
    /// The connection that answered.
    pub connection: u64,
    /// Who was written: the others have a newer record there.
    pub winners: Vec<UserId>,
    /// Some are there in a generation that the writer does not know.
    pub outdated: bool,
}

pub type Versions = NumberMap<UserId, Version>;

/// What Redis has of a user, whoever wrote it.
pub struct Seen {
    pub generation: u64,
    pub is_ours: bool,
    /// None: it cannot be read.
    pub record: Option<UserRecord>,
}

/// What a record begins with.
struct Header<'a> {
    generation: u64,
    version: Version,
    store: &'a [u8],
}

/// Why a record is none.
enum Unfit {
    Outdated,
    Foreign,
    Unreadable,
}

/// What a user's keys say to other services.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// The gateway that was bound last. None: offline.
    pub gateway: Option<String>,
    /// None: nothing is known of the user, and no key is kept.
    pub status: Option<Status>,
    /// Whether the route ends by itself.
    pub unmanaged: bool,
}

pub struct SharedCache {
    servers: Servers,
    keys: Keys,
    script: Script,
    forget: Script,
    store_id: String,
    route_ttl: Duration,
    status_ttl: Duration,
    mpim_keys: bool,
}

impl SharedCache {
    pub fn new(cache: &config::RedisCache, route: &config::Route, store_id: &str) -> Result<Self, LinkError> {
        let (route_ttl, status_ttl, mpim_keys) = (route.route_ttl, route.status_ttl, route.mpim_keys);
        let (script, forget) = (Script::new(WRITE), Script::new(FORGET));
        let servers = Servers::new(&cache.server)?;
        let keys = Keys::new(&cache.key_prefix, servers.are_cluster());
        Ok(Self { servers, keys, script, forget, store_id: store_id.to_owned(), route_ttl, status_ttl, mpim_keys })
    }

    /// Which servers they are, and how, and the number that answers of these have.
    ///
    /// # Errors
    /// One of them does not answer, or takes no writes.
    pub async fn look_at_servers(&self, limit: Duration) -> Result<(u64, Server), LinkError> {
        let (number, server) = self.servers.look(limit).await?;
        Ok((number, Server { identity: self.keys.identity(&server.identity), ..server }))
    }

    /// Says that this store uses this Redis, for a while, unless another one does.
    pub async fn claim(&self, limit: Duration) -> Result<Owner, LinkError> {
        let (mut claim, key) = (redis::cmd("EVAL"), self.keys.store());
        claim.arg(CLAIM).arg(1).arg(&key).arg(&self.store_id).arg(CLAIM_TTL.as_secs());
        let mut batch = self.batch();
        batch.add(&key, claim);
        let (_, owner) = self.servers.run::<String>(batch, limit).await?;
        let owner = owner.into_iter().next().unwrap_or_default();
        Ok(match owner {
            nobody if nobody.is_empty() => Owner::Nobody,
            this if this == self.store_id => Owner::ThisStore,
            another => Owner::Another(another),
        })
    }

    /// The records of `users` as far as Redis has them in `generation`.
    pub async fn read(&self, users: &[UserId], generation: u64, limit: Duration) -> Result<Found, LinkError> {
        let (connection, answers) = self.get(users, limit).await?;
        let mut found = Found { connection, records: Records::default(), outdated: 0, foreign: 0 };
        for (user, bytes) in users.iter().zip(answers) {
            let Some(bytes) = bytes else { continue };
            match self.decode(&bytes, generation) {
                Ok(record) => {
                    found.records.insert(*user, record);
                }
                Err(Unfit::Outdated) => found.outdated += 1,
                Err(Unfit::Foreign) => found.foreign += 1,
                Err(Unfit::Unreadable) => {}
            }
        }
        Ok(found)
    }

    /// The versions of those records only, and the connection that answered.
    pub async fn versions(&self, users: &[UserId], generation: u64, limit: Duration) -> Result<(u64, Versions), LinkError> {
        let (connection, answers) = self.get(users, limit).await?;
        let version = |bytes: Option<Vec<u8>>| Some(self.header(&bytes?, generation).ok()?.0);
        let versions = users.iter().zip(answers).filter_map(|(user, bytes)| Some((*user, version(bytes)?)));
        Ok((connection, versions.collect()))
    }

    /// What there is of a user, of whatever store and generation. None: nothing.
    pub async fn look(&self, user: UserId, limit: Duration) -> Result<Option<Seen>, LinkError> {
        let (_, answers) = self.get(&[user], limit).await?;
        let Some(bytes) = answers.into_iter().flatten().next() else { return Ok(None) };
        let Some((header, body)) = Header::read(&bytes) else {
            return Ok(Some(Seen { generation: 0, is_ours: true, record: None }));
        };
        let record = StoredRecord::decode(body).ok().and_then(|record| record.into_record(header.version));
        Ok(Some(Seen { generation: header.generation, is_ours: header.store == self.store_id.as_bytes(), record }))
    }

    /// Of a cluster's server many keys are asked one by one: together they would have to be in one slot.
    async fn get(&self, users: &[UserId], limit: Duration) -> Result<(u64, Vec<Option<Vec<u8>>>), LinkError> {
        let (mut batch, names) = (self.batch(), users.iter().map(|user| self.keys.user_record(*user)));
        if self.servers.are_cluster() {
            for name in names {
                let mut get = redis::cmd("GET");
                get.arg(&name);
                batch.add(&name, get);
            }
            return self.servers.run(batch, limit).await;
        }
        let mut get = redis::cmd("MGET");
        get.arg(names.collect::<Vec<_>>());
        batch.add("", get);
        let (connection, answers) = self.servers.run::<Vec<Option<Vec<u8>>>>(batch, limit).await?;
        Ok((connection, answers.into_iter().flatten().collect()))
    }

    /// Copies what a reader loaded, for the next reader.
    pub async fn fill(&self, records: &[(UserId, UserRecord)], generation: u64, limit: Duration) -> Result<(), LinkError> {
        let mut batch = Batch::with_script(self.servers.are_cluster(), WRITE);
        for (user, record) in records {
            let ttl = if record.version == Version::NONE { ABSENT_TTL } else { FILL_TTL };
            let bytes = self.encode(record, generation);
            self.write(&mut batch, *user, &bytes, ttl.min(self.route_ttl), "fill", None);
        }
        self.servers.run::<i64>(batch, limit).await.map(|_| ())
    }

    /// Shows committed records, each with its keys.
    pub async fn project(&self, records: &[(UserId, UserRecord, Shown)], generation: u64) -> Result<Written, LinkError> {
        let mut batch = Batch::with_script(self.servers.are_cluster(), WRITE);
        for (user, record, shown) in records {
            let bytes = self.encode(record, generation);
            let mode = if self.mpim_keys { "project" } else { "record" };
            self.write(&mut batch, *user, &bytes, self.route_ttl, mode, Some(shown));
        }
        if self.servers.are_cluster() && self.mpim_keys {
            for (user, record, shown) in records {
                let header = self.header_of(record, generation);
                self.write_status(&mut batch, *user, &header, shown);
            }
        }
        let (connection, written) = self.servers.run::<i64>(batch, self.servers.timeout()).await?;
        let outdated = written.contains(&-1);
        let won = records.iter().zip(written).filter(|(_, written)| *written == 1);
        Ok(Written { connection, winners: won.map(|((user, ..), _)| *user).collect(), outdated })
    }

    /// Says that gateways live, for as long as their leases do.
    pub async fn gateways_live(&self, lives: &[Arc<Life>], lease: Duration, limit: Duration) -> Result<(), LinkError> {
        let mut batch = self.batch();
        for life in lives {
            let (mut set, key) = (redis::cmd("SET"), self.keys.gateway_heartbeat(life.gateway.as_str()));
            set.arg(&key).arg(life.epoch.0).arg("PX").arg(u64::try_from(lease.as_millis()).unwrap_or(u64::MAX));
            batch.add(&key, set);
        }
        self.servers.run::<String>(batch, limit).await.map(|_| ())
    }

    /// Says that lives are over, unless their gateways live another one by now.
    pub async fn gateways_over(&self, lives: &[Arc<Life>], limit: Duration) -> Result<(), LinkError> {
        let mut batch = Batch::with_script(self.servers.are_cluster(), FORGET);
        for life in lives {
            let key = self.keys.gateway_heartbeat(life.gateway.as_str());
            let mut call = Batch::call(&self.forget, &[&key]);
            call.arg(life.epoch.0);
            batch.add(&key, call);
        }
        self.servers.run::<i64>(batch, limit).await.map(|_| ())
    }

    /// Some of the users that have a `user:route` key, and where to go on; None: those were the last.
    pub async fn scan_routes(&self, cursor: Cursor) -> Result<(Option<Cursor>, Vec<UserId>), LinkError> {
        let scan = |at: u64| {
            let mut scan = redis::pipe();
            scan.cmd("SCAN").arg(at).arg("MATCH").arg(self.keys.all_user_routes()).arg("COUNT").arg(SCAN_PAGE);
            scan
        };
        let (next, names) = self.servers.scan(cursor, scan).await?;
        Ok((next, names.iter().filter_map(|name| self.keys.user_of_route(name)).collect()))
    }

    /// Those of `users` of whom one of the two keys is not there. Nobody, if such keys are not kept.
    pub async fn without_keys(&self, users: &[UserId]) -> Result<Vec<UserId>, LinkError> {
        if users.is_empty() || !self.mpim_keys {
            return Ok(Vec::new());
        }
        let mut batch = self.batch();
        for user in users {
            for key in [self.keys.user_route(*user), self.keys.user_status(*user)] {
                let mut exists = redis::cmd("EXISTS");
                exists.arg(&key);
                batch.add(&key, exists);
            }
        }
        let (_, there) = self.servers.run::<bool>(batch, self.servers.timeout()).await?;
        let keys = there.chunks_exact(2);
        Ok(users.iter().zip(keys).filter(|(_, keys)| keys.contains(&false)).map(|(user, _)| *user).collect())
    }

    fn batch(&self) -> Batch {
        Batch::new(self.servers.are_cluster())
    }

    /// The record, and the keys that are in its reach.
    fn write(&self, batch: &mut Batch, user: UserId, bytes: &[u8], ttl: Duration, mode: &str, shown: Option<&Shown>) {
        let (record, route, status) = (self.keys.user_record(user), self.keys.user_route(user), self.keys.user_status(user));
        let in_reach = if self.servers.are_cluster() { 2 } else { 3 };
        let mut call = Batch::call(&self.script, &[&*record, &*route, &*status][..in_reach]);
        call.arg(bytes).arg(seconds(ttl)).arg(mode);
        call.arg(shown.and_then(|shown| shown.gateway.as_deref()).unwrap_or_default()).arg(self.route_ttl_of(shown));
        if in_reach > 2 {
            self.status_args(&mut call, shown);
        }
        batch.add(&record, call);
    }

    /// The status, where it is out of the record's reach.
    fn write_status(&self, batch: &mut Batch, user: UserId, header: &[u8], shown: &Shown) {
        let (version, status) = (self.keys.status_version(user), self.keys.user_status(user));
        let mut call = Batch::call(&self.script, &[&version, &status]);
        call.arg(header).arg(seconds(self.route_ttl)).arg("project");
        self.status_args(&mut call, Some(shown));
        batch.add(&version, call);
    }

    fn status_args(&self, call: &mut Cmd, shown: Option<&Shown>) {
        // Also of a user who hides: the key ends as that of somebody who is not there.
        let is_offline = shown.and_then(|shown| shown.status).is_none_or(|status| status_word(status) == "offline");
        let ttl = if is_offline { seconds(self.status_ttl) } else { self.route_ttl_of(shown) };
        call.arg(shown.and_then(|shown| shown.status).map_or("", status_word)).arg(ttl);
    }

    /// In seconds; 0: none.
    fn route_ttl_of(&self, shown: Option<&Shown>) -> u64 {
        if shown.is_some_and(|shown| shown.unmanaged) { seconds(self.route_ttl) } else { 0 }
    }

    /// Generation, version and store.
    fn header_of(&self, record: &UserRecord, generation: u64) -> Vec<u8> {
        format!("{generation:0DIGITS$}{:0DIGITS$}{}", record.version.0, self.store_id).into_bytes()
    }

    fn encode(&self, record: &UserRecord, generation: u64) -> Vec<u8> {
        let mut bytes = self.header_of(record, generation);
        bytes.extend(StoredRecord::from(record).encode_to_vec());
        bytes
    }

    fn decode(&self, bytes: &[u8], generation: u64) -> Result<UserRecord, Unfit> {
        let (version, body) = self.header(bytes, generation)?;
        let record = StoredRecord::decode(body).ok();
        record.and_then(|record| record.into_record(version)).ok_or(Unfit::Unreadable)
    }

    /// The version of a record of this store and `generation`, and its body.
    fn header<'a>(&self, bytes: &'a [u8], generation: u64) -> Result<(Version, &'a [u8]), Unfit> {
        let (header, body) = Header::read(bytes).ok_or(Unfit::Unreadable)?;
        if header.store != self.store_id.as_bytes() {
            return Err(Unfit::Foreign);
        }
        if header.generation != generation {
            return Err(Unfit::Outdated);
        }
        Ok((header.version, body))
    }
}

impl<'a> Header<'a> {
    /// With the body that follows.
    fn read(bytes: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (header, body) = bytes.split_at_checked(HEADER_BYTES)?;
        let (numbers, store) = header.split_at(2 * DIGITS);
        let number = |digits: &[u8]| std::str::from_utf8(digits).ok()?.parse::<u64>().ok();
        let (generation, version) = numbers.split_at(DIGITS);
        Some((Self { generation: number(generation)?, version: Version(number(version)?), store }, body))
    }
}

fn seconds(duration: Duration) -> u64 {
    duration.as_secs().max(1)
}
