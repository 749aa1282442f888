//! Redis Cluster: three primaries, each with a replica.

use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;
use std::time::Instant;

use im_presence::store::slot_map;
use im_presence::store::slot_map::Ranges;
use redis::Value;

use crate::harness::eventually;
use crate::harness::mariadb::free_port;
use crate::harness::node::Settings;
use crate::harness::pki::Ca;
use crate::harness::pki::Pair;
use crate::harness::redis::RedisServer;

const PRIMARIES: usize = 3;
const SERVERS: usize = 6;
/// How long a server has to be silent to be believed dead.
pub const NODE_TIMEOUT: Duration = Duration::from_millis(3_000);
const START_DEADLINE: Duration = Duration::from_secs(30);

pub struct RedisCluster {
    /// The first three were primaries at the begin, and each of the others replica of the one three places before it.
    pub servers: Vec<RedisServer>,
    /// Where they are found: with TLS on another port than that of the test's own clients.
    ports: Vec<u16>,
    killed: Mutex<Vec<usize>>,
}

impl RedisCluster {
    pub async fn start() -> Self {
        Self::start_with(None, |_| Vec::new()).await
    }

    /// Servers that tell each other's names instead of addresses. Every other one was given none.
    pub async fn start_with_names() -> Self {
        let options = |place: usize| {
            let names: &[&str] = if place.is_multiple_of(2) { &["--cluster-announce-hostname", "localhost"] } else { &[] };
            [&["--cluster-preferred-endpoint-type", "hostname"][..], names].concat()
        };
        Self::start_with(None, options).await
    }

    /// Servers that show this certificate, and ask for one of this CA.
    pub async fn start_with_tls(ca: &Ca, pair: &Pair) -> Self {
        Self::start_with(Some((ca, pair)), |_| Vec::new()).await
    }

    /// `more` are the options of the server at a place.
    async fn start_with(tls: Option<(&Ca, &Pair)>, more: impl Fn(usize) -> Vec<&'static str>) -> Self {
        let (mut servers, mut ports, mut buses) = (Vec::new(), Vec::new(), Vec::new());
        for place in 0..SERVERS {
            let (bus, port) = (free_port(), free_port());
            let mut options = options(bus);
            options.extend(more(place).into_iter().map(str::to_owned));
            if let Some((ca, pair)) = tls {
                options.extend(tls_options(port, ca, pair));
            }
            let server = RedisServer::start_with(options);
            ports.push(if tls.is_some() { port } else { server.port });
            servers.push(server);
            buses.push(bus);
        }
        let cluster = Self { servers, ports, killed: Mutex::default() };
        cluster.join(&buses).await;
        cluster
    }

    async fn join(&self, buses: &[u16]) {
        let mut clients = Vec::new();
        for (place, server) in self.servers.iter().enumerate() {
            let client = server.client().await;
            client.run::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(place + 1).to_string()]).await;
            clients.push(client);
        }
        for (place, client) in clients.iter().enumerate().take(PRIMARIES) {
            let (first, last) = (place * slot_map::SLOTS / PRIMARIES, (place + 1) * slot_map::SLOTS / PRIMARIES - 1);
            client.run::<()>(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]).await;
        }
        for (port, bus) in self.ports.iter().zip(buses).skip(1) {
            clients[0].run::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port.to_string(), &bus.to_string()]).await;
        }
        let all_say = async |what: &str| {
            for client in &clients {
                if !client.run::<String>(&["CLUSTER", "INFO"]).await.contains(what) {
                    return false;
                }
            }
            true
        };
        eventually("they know each other", START_DEADLINE, async || all_say("cluster_known_nodes:6\r").await).await;
        for place in PRIMARIES..SERVERS {
            let primary: String = clients[place - PRIMARIES].run(&["CLUSTER", "MYID"]).await;
            clients[place].run::<()>(&["CLUSTER", "REPLICATE", &primary]).await;
        }
        eventually("the cluster is up", START_DEADLINE, async || all_say("cluster_state:ok").await).await;
        for client in &clients[PRIMARIES..] {
            eventually("the replica follows", START_DEADLINE, async || {
                client.run::<String>(&["INFO", "replication"]).await.contains("master_link_status:up")
            })
            .await;
        }
    }

    /// Settings that name two of the servers.
    pub fn settings(&self, section: &str) -> Settings {
        let nodes = format!("[\"127.0.0.1:{}\", \"127.0.0.1:{}\"]", self.ports[1], self.ports[5]);
        vec![(format!("{section}__MODE"), "cluster".to_owned()), (format!("{section}__NODES"), nodes)]
    }

    /// Has the replica at `place` change places with its primary. Redis gives that up after five seconds in which the two have not
    /// agreed, and says nothing; then it is asked again.
    pub async fn promote(&self, place: usize) {
        const GIVEN_UP_AFTER: Duration = Duration::from_secs(6);
        const ATTEMPTS: usize = 5;
        let replica = self.servers[place].client().await;
        for _ in 0..ATTEMPTS {
            replica.run::<()>(&["CLUSTER", "FAILOVER"]).await;
            let asked = Instant::now();
            while asked.elapsed() < GIVEN_UP_AFTER {
                if replica.run::<String>(&["INFO", "replication"]).await.contains("role:master") {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        panic!("the replica does not become the primary");
    }

    pub fn kill(&self, place: usize) {
        self.servers[place].kill();
        self.killed.lock().expect("nobody panics with it").push(place);
    }

    pub fn live(&self) -> Vec<&RedisServer> {
        let killed = self.killed.lock().expect("nobody panics with it");
        self.servers.iter().enumerate().filter(|(place, _)| !killed.contains(place)).map(|(_, server)| server).collect()
    }

    /// Who has which slots, as the first server says that lives; by the ports of the test's own clients.
    pub async fn ranges(&self) -> Ranges {
        let said: Value = self.live()[0].client().await.run(&["CLUSTER", "SLOTS"]).await;
        slot_map::ranges(&said, "127.0.0.1:0").expect("slots")
    }

    /// The servers that have slots.
    pub async fn primaries(&self) -> Vec<&RedisServer> {
        let ranges = self.ranges().await;
        let has_slots = |server: &RedisServer| ranges.iter().any(|(.., node)| node.ends_with(&format!(":{}", server.port)));
        self.live().into_iter().filter(|server| has_slots(server)).collect()
    }

    /// The values of these keys. Of a slot that is on its way, or of nobody's: None.
    pub async fn get_many(&self, keys: &[String]) -> Vec<Option<Vec<u8>>> {
        let (ranges, mut values) = (self.ranges().await, vec![None; keys.len()]);
        for server in self.live() {
            let is_its = |key: &String| {
                let slot = slot_map::slot_of(key);
                let owner = ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&slot));
                owner.is_some_and(|(.., node)| node.ends_with(&format!(":{}", server.port)))
            };
            let places: Vec<usize> = (0..keys.len()).filter(|place| is_its(&keys[*place])).collect();
            let names: Vec<&str> = places.iter().map(|place| keys[*place].as_str()).collect();
            for (place, value) in places.iter().zip(server.client().await.get_each(&names).await) {
                values[*place] = value;
            }
        }
        values
    }

    /// Every key that matches, wherever it is. Nobody has been promoted yet.
    pub async fn keys(&self, pattern: &str) -> Vec<String> {
        let mut keys = Vec::new();
        for primary in &self.servers[..PRIMARIES] {
            keys.extend(primary.client().await.keys(pattern).await);
        }
        keys
    }

    /// Who has the slot of this name.
    pub async fn owner(&self, name: &str) -> &RedisServer {
        let (slot, ranges) = (slot_map::slot_of(name), self.ranges().await);
        let (.., node) = ranges.iter().find(|(first, last, _)| (*first..=*last).contains(&slot)).expect("an owner");
        self.live().into_iter().find(|server| node.ends_with(&format!(":{}", server.port))).expect("a server that lives")
    }

    /// A slot is about to move, for as long as somebody needs for it.
    pub async fn open_slot(&self, slot: u16, from: &RedisServer, to: &RedisServer) {
        let slot = slot.to_string();
        let (from_id, to_id): (String, String) =
            (from.client().await.run(&["CLUSTER", "MYID"]).await, to.client().await.run(&["CLUSTER", "MYID"]).await);
        to.client().await.run::<()>(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]).await;
        from.client().await.run::<()>(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]).await;
    }

    /// A slot that was about to move has moved.
    pub async fn close_slot(&self, slot: u16, from: &RedisServer, to: &RedisServer) {
        let (slot, to_id): (String, String) = (slot.to_string(), to.client().await.run(&["CLUSTER", "MYID"]).await);
        for server in [to, from] {
            server.client().await.run::<()>(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]).await;
        }
    }

    /// Moves slots from one primary to another, with what is in them.
    pub async fn reshard(&self, from: &RedisServer, to: &RedisServer, slots: u32) {
        let (from, to): (String, String) =
            (from.client().await.run(&["CLUSTER", "MYID"]).await, to.client().await.run(&["CLUSTER", "MYID"]).await);
        let mut command = Command::new("redis-cli");
        command.args(["--cluster", "reshard", &format!("127.0.0.1:{}", self.servers[0].port), "--cluster-yes"]);
        command.args(["--cluster-from", &from, "--cluster-to", &to, "--cluster-slots", &slots.to_string()]);
        let done = tokio::task::spawn_blocking(move || command.output()).await.expect("the task").expect("redis-cli");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
    }
}

fn options(bus: u16) -> Vec<String> {
    let timeout = NODE_TIMEOUT.as_millis().to_string();
    let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", &timeout, "--cluster-port", &bus.to_string()];
    options.map(str::to_owned).to_vec()
}

fn tls_options(port: u16, ca: &Ca, pair: &Pair) -> Vec<String> {
    let file = |path: &std::path::Path| path.display().to_string();
    let mut options = vec!["--tls-port".to_owned(), port.to_string(), "--tls-cert-file".to_owned(), file(&pair.cert)];
    options.extend(["--tls-key-file".to_owned(), file(&pair.key), "--tls-ca-cert-file".to_owned(), file(&ca.file)]);
    options.extend(["--tls-cluster", "yes", "--tls-replication", "yes", "--tls-auth-clients", "yes"].map(str::to_owned));
    options
}
