//! What is broken: three nodes, Redis with sentinels, and a Galera cluster, each server on a host of its own.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::timeout;

use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::galera::Galera;
use crate::harness::galera::is_ready;
use crate::harness::mariadb::scratch;
use crate::harness::node::Node;
use crate::harness::node::program_by_clock;
use crate::harness::node::settings;
use crate::harness::place::Place;
use crate::harness::redis::RedisServer;
use crate::harness::sentinel::MASTER;
use crate::harness::sentinel::Sentinel;
use crate::harness::sentinel::settings_of;
use crate::wire::Host;
use crate::wire::Wire;
use crate::wire::address;

pub const NODES: [Host; 3] = [11, 12, 13];
pub const SENTINELS: [Host; 3] = [16, 17, 18];
pub const REDIS: [Host; 2] = [21, 22];
pub const SQL: [Host; 3] = [31, 32, 33];

pub const LEASE: Duration = Duration::from_secs(5);
pub const DOUBT: Duration = Duration::from_secs(2);
/// One that remembers everybody, one that remembers a few, one that remembers nobody.
const REMEMBERED: [&str; 3] = ["1000000", "40", "0"];
const ASKED_WITHIN: Duration = Duration::from_secs(2);
/// A member that has not come back by itself after this time is started again.
const COMES_BACK_WITHIN: Duration = Duration::from_secs(25);
const WELL_WITHIN: Duration = Duration::from_secs(60);
const ATTEMPTS: usize = 5;
/// Enough for an empty server, its log, and what a run writes.
const SQL_DISK_MIB: u32 = 512;

pub struct World {
    pub wire: Wire,
    pub nodes: Vec<Node>,
    pub redis: Vec<RedisServer>,
    pub sentinels: Vec<Sentinel>,
    pub galera: Galera,
    clocks: Vec<PathBuf>,
}

impl World {
    pub async fn start(seed: u64) -> Self {
        let wire = Wire::lay(&[&NODES[..], &SENTINELS, &REDIS, &SQL].concat(), seed);
        let redis: Vec<RedisServer> = REDIS.iter().map(|host| RedisServer::start_at(wire.place(*host), Vec::new())).collect();
        redis[1].replica_of(&redis[0]).await;
        let beside = |host: &Host| Sentinel::start_at(wire.place(*host), &redis[0], 2, "");
        let sentinels: Vec<Sentinel> = SENTINELS.iter().map(beside).collect();
        Sentinel::know_each_other(&sentinels, 1).await;
        let galera =
            Galera::start_at(SQL.iter().map(|host| Place { disk_mib: Some(SQL_DISK_MIB), ..wire.place(*host) }).collect()).await;
        let db = TestDb::mariadb(&galera.members[0]).await;
        let mut world = Self { wire, nodes: Vec::new(), redis, sentinels, galera, clocks: Vec::new() };
        for n in 0..NODES.len() {
            world.start_node(n, db.name()).await;
        }
        world
    }

    async fn start_node(&mut self, n: usize, database: &str) {
        let (host, clock) = (address(NODES[n]), scratch("clock"));
        fs::write(&clock, "+0").expect("write a clock");
        let (lease, doubt) = (LEASE.as_millis().to_string(), DOUBT.as_millis().to_string());
        let mut settings = settings(&[
            ("PRESENCE_SERVICE__HOST", &host),
            ("ADMIN__HOST", &host),
            ("AUTH__INSECURE", "true"),
            ("STORE__URL", &self.galera.url(database, n)),
            ("ROUTE__L1_CAPACITY", REMEMBERED[n]),
            ("ROUTE__MAX_DEVICES", "3"),
            ("GATEWAY__HEARTBEAT_INTERVAL", "1000"),
            ("GATEWAY__LEASE", &lease),
            ("GATEWAY__DOUBT_FOR", &doubt),
        ]);
        settings.extend(settings_of(&self.sentinels.iter().collect::<Vec<_>>()));
        let by_clock = program_by_clock(&clock).expect("libfaketime is installed: run tests/run");
        let entered_by = self.wire.place(NODES[n]).entered_by;
        let program: Vec<String> = entered_by.into_iter().chain(by_clock).collect();
        // Whoever lays the tables through Galera on a machine that does something else meanwhile may need more than one attempt.
        for _ in 0..ATTEMPTS {
            if let Some(node) = Node::try_start_as(program.clone(), settings.clone(), WELL_WITHIN).await {
                self.nodes.push(node);
                self.clocks.push(clock);
                return;
            }
        }
        panic!("node {n} does not start");
    }

    /// The clock of a node is `shift` beside the right time from here on.
    pub fn clock_steps(&self, node: usize, shift: &str) {
        fs::write(&self.clocks[node], shift).expect("write a clock");
    }

    /// The Redis server that most sentinels take for the primary. None: they do not answer.
    pub async fn redis_primary(&self) -> Option<usize> {
        let mut said = [0; REDIS.len()];
        for sentinel in &self.sentinels {
            let asked =
                timeout(ASKED_WITHIN, sentinel.run::<(String, u16)>(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER])).await;
            let Ok(Ok((host, _))) = asked else { continue };
            if let Some(place) = REDIS.iter().position(|redis| address(*redis) == host) {
                said[place] += 1;
            }
        }
        (0..REDIS.len()).max_by_key(|place| said[*place]).filter(|place| said[*place] > 0)
    }

    pub async fn sql_is_ready(&self) -> bool {
        for n in 0..SQL.len() {
            if !self.member_is_ready(n).await {
                return false;
            }
        }
        true
    }

    pub async fn member_is_ready(&self, n: usize) -> bool {
        timeout(ASKED_WITHIN, is_ready(&self.galera.members[n])).await.unwrap_or(false)
    }

    /// Waits until everything is as it was at the begin; nothing is broken any more.
    pub async fn is_well(&mut self) {
        for n in 0..SQL.len() {
            self.member_comes_back(n).await;
        }
        eventually("all members are ready", WELL_WITHIN, async || self.sql_is_ready().await).await;
        eventually("redis has a primary and a replica that follows", WELL_WITHIN, async || self.redis_is_well().await).await;
        for node in &self.nodes {
            let well = async || {
                let asked = timeout(ASKED_WITHIN, node.http("/readyz")).await;
                asked.is_ok_and(|(status, body)| status == 200 && body.contains("\"degraded\":[]"))
            };
            eventually("the node is well", WELL_WITHIN, well).await;
        }
    }

    async fn member_comes_back(&self, n: usize) {
        let since = std::time::Instant::now();
        while !self.member_is_ready(n).await {
            if since.elapsed() > COMES_BACK_WITHIN {
                println!("member {n} does not come back");
                self.start_member_again(n);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// False: not yet, as the others cannot be reached.
    pub fn start_member_again(&self, n: usize) -> bool {
        self.galera.members[n].kill();
        let came_back = tokio::task::block_in_place(|| self.galera.try_rejoin(n));
        if !came_back {
            self.galera.members[n].kill();
            let replaced = tokio::task::block_in_place(|| self.galera.try_replace(n));
            println!("member {n} has not come back; replaced by a new one: {replaced}");
            if !replaced {
                println!("{}", self.galera.members[n].last_words());
            }
            return replaced;
        }
        true
    }

    async fn redis_is_well(&self) -> bool {
        let Some(primary) = self.redis_primary().await else { return false };
        let info = async |server: &RedisServer| {
            let client = timeout(ASKED_WITHIN, server.client()).await.ok()?;
            timeout(ASKED_WITHIN, client.run::<String>(&["INFO", "replication"])).await.ok()
        };
        let (first, second) = (info(&self.redis[primary]).await, info(&self.redis[1 - primary]).await);
        first.is_some_and(|said| said.contains("role:master"))
            && second.is_some_and(|said| said.contains("master_link_status:up"))
    }
}
