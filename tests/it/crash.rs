//! Nothing acknowledged is lost, whatever is killed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use im_presence::pb::Code;
use im_presence::pb::UnbindRouteReq;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Request;

use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Presence;
use crate::harness::traffic::everything_agrees_with_sql;

const CLIENTS: usize = 8;
const KILLS: u32 = 5;
const DEVICES: [&str; 2] = [PHONE, LAPTOP];
/// Longer than the daemon makes anybody wait.
const CALL_DEADLINE: Duration = Duration::from_secs(8);
/// After a call failed, before the next one: a client that hammers a dead node tests nothing.
const PAUSE: Duration = Duration::from_millis(5);
/// Of each client, however slow the machine: two of three are binds.
const CALLS_AT_LEAST: u64 = 250;

/// What a client knows of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    Bound(String),
    Unbound,
    /// The last call about it was not answered.
    Unsure,
}

/// What was acknowledged of one user. Only one client ever writes it.
#[derive(Debug)]
struct Ledger {
    user: i64,
    version: u64,
    devices: HashMap<&'static str, Known>,
}

#[derive(Default)]
struct Figures {
    binds: u64,
    unbinds: u64,
    unanswered: u64,
}

struct Client {
    nodes: Vec<Presence>,
    ledgers: Vec<Ledger>,
    figures: Figures,
    turn: usize,
    /// How many calls were acknowledged.
    acknowledged: watch::Sender<u64>,
}

impl Client {
    async fn work(mut self, done: Arc<AtomicBool>) -> Self {
        let conn_of = |turn: usize| format!("c-{turn}");
        while !done.load(Ordering::Relaxed) {
            self.turn += 1;
            let user = self.turn % self.ledgers.len();
            let device = DEVICES[(self.turn / self.ledgers.len()) % DEVICES.len()];
            let node = self.turn / 3 % self.nodes.len();
            // Two binds in a row, then an unbind: routes are replaced, and removed.
            let answered = match self.turn / (self.ledgers.len() * DEVICES.len()) % 3 {
                2 => self.unbind(node, user, device).await,
                _ => self.bind(node, user, device, &conn_of(self.turn)).await,
            };
            if answered {
                self.acknowledged.send_modify(|calls| *calls += 1);
            } else {
                self.figures.unanswered += 1;
                self.ledgers[user].devices.insert(device, Known::Unsure);
                tokio::time::sleep(PAUSE).await;
            }
        }
        self
    }

    async fn bind(&mut self, node: usize, user: usize, device: &'static str, conn: &str) -> bool {
        let ledger = &mut self.ledgers[user];
        let mut request = Request::new(a_bind(ledger.user, device, conn));
        request.set_timeout(CALL_DEADLINE);
        let Ok(answer) = self.nodes[node].bind_route(request).await else { return false };
        let answer = answer.into_inner();
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        assert!(answer.version > ledger.version, "versions grow: {answer:?} after {ledger:?}");
        ledger.version = answer.version;
        ledger.devices.insert(device, Known::Bound(answer.route_key));
        self.figures.binds += 1;
        true
    }

    async fn unbind(&mut self, node: usize, user: usize, device: &'static str) -> bool {
        let ledger = &mut self.ledgers[user];
        let before = ledger.devices.get(device).cloned().unwrap_or(Known::Unbound);
        let route_key = if let Known::Bound(key) = &before { key.clone() } else { String::new() };
        let (gateway_addr, device_id) = (GATEWAY.to_owned(), device.to_owned());
        let request = UnbindRouteReq { user_id: ledger.user, route_key, gateway_addr, device_id, ..Default::default() };
        let mut request = Request::new(request);
        request.set_timeout(CALL_DEADLINE);
        let Ok(answer) = self.nodes[node].unbind_route(request).await else { return false };
        let answer = answer.into_inner();
        if before != Known::Unsure {
            assert_eq!(answer.unbound, matches!(before, Known::Bound(_)), "{answer:?} after {ledger:?}");
        }
        assert!(answer.version >= ledger.version, "versions grow: {answer:?} after {ledger:?}");
        ledger.version = answer.version;
        ledger.devices.insert(device, Known::Unbound);
        self.figures.unbinds += 1;
        true
    }
}

/// Clients that bind and unbind until they are stopped.
struct Load {
    clients: JoinSet<Client>,
    acknowledged: Vec<watch::Receiver<u64>>,
    done: Arc<AtomicBool>,
}

impl Load {
    fn start(cluster: &Cluster, users: i64) -> Self {
        let mut load = Self { clients: JoinSet::new(), acknowledged: Vec::new(), done: Arc::default() };
        for client in 0..CLIENTS {
            let calls = watch::Sender::new(0);
            load.acknowledged.push(calls.subscribe());
            let mine = (1..=users).filter(|user| *user as usize % CLIENTS == client);
            let ledgers = mine.map(|user| Ledger { user, version: 0, devices: HashMap::new() }).collect();
            let nodes = cluster.nodes.iter().map(|node| node.new_connection()).collect();
            let client = Client { nodes, ledgers, figures: Figures::default(), turn: client, acknowledged: calls };
            load.clients.spawn(client.work(load.done.clone()));
        }
        load
    }

    async fn every_client_is_served_again(&mut self) {
        for calls in &mut self.acknowledged {
            let seen = *calls.borrow();
            let more = tokio::time::timeout(2 * CALL_DEADLINE, calls.wait_for(|calls| *calls > seen + 10)).await;
            assert!(more.is_ok_and(|more| more.is_ok()), "a client is served again");
        }
    }

    /// Once every client has done enough.
    async fn stop(mut self) -> Vec<Client> {
        for calls in &mut self.acknowledged {
            let enough = tokio::time::timeout(4 * CALL_DEADLINE, calls.wait_for(|calls| *calls >= CALLS_AT_LEAST)).await;
            assert!(enough.is_ok_and(|enough| enough.is_ok()), "a client goes on");
        }
        self.done.store(true, Ordering::Relaxed);
        self.clients.join_all().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_nodes_and_the_database_are_killed() {
    let _turn = heavy().await;
    let (duration, users) = if long() { (Duration::from_secs(20), 1_000) } else { (Duration::from_secs(8), 200) };
    let server = MariaDb::start();
    let mut cluster = Cluster::on(&server, 2, &[]).await;
    let mut load = Load::start(&cluster, users);
    // The pace of the faults, not a wait for something to happen.
    let mut pace = tokio::time::interval(duration / (KILLS + 1));
    pace.tick().await;
    for kill in 0..KILLS {
        pace.tick().await;
        let node = &mut cluster.nodes[kill as usize % 2];
        node.kill();
        node.restart().await;
    }
    pace.tick().await;
    server.kill();
    server.restart();
    load.every_client_is_served_again().await;
    check(&cluster, &load.stop().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_redis_is_killed_as_well_and_everything_agrees_soon_after() {
    const AGREES_WITHIN: Duration = Duration::from_secs(5);
    let _turn = heavy().await;
    let (duration, users) = if long() { (Duration::from_secs(30), 1_000) } else { (Duration::from_secs(8), 200) };
    let server = MariaDb::start();
    let mut cluster = Cluster::on_all(&server, Redis::one(), 2, &[]).await;
    let mut load = Load::start(&cluster, users);
    // The pace of the faults, not a wait for something to happen.
    let mut pace = tokio::time::interval(duration / (KILLS + 1) / 2);
    pace.tick().await;
    for kill in 0..KILLS {
        pace.tick().await;
        cluster.cache().kill();
        pace.tick().await;
        let node = &mut cluster.nodes[kill as usize % 2];
        node.kill();
        node.restart().await;
        cluster.cache().restart();
    }
    pace.tick().await;
    server.kill();
    cluster.cache().kill();
    server.restart();
    cluster.cache().restart();
    load.every_client_is_served_again().await;
    let clients = load.stop().await;
    everything_agrees_with_sql(&cluster, 1..=users, AGREES_WITHIN).await;
    check(&cluster, &clients).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_a_node_with_a_file_of_its_own_is_killed() {
    let _turn = heavy().await;
    let (duration, users) = if long() { (Duration::from_secs(20), 1_000) } else { (Duration::from_secs(4), 200) };
    let mut cluster = Cluster::sqlite(&[]).await;
    let mut load = Load::start(&cluster, users);
    let mut pace = tokio::time::interval(duration / (KILLS + 1));
    pace.tick().await;
    for _ in 0..KILLS {
        pace.tick().await;
        cluster.nodes[0].kill();
        cluster.nodes[0].restart().await;
    }
    load.every_client_is_served_again().await;
    check(&cluster, &load.stop().await).await;
}

/// Compares each user's answer with what was acknowledged.
async fn check(cluster: &Cluster, clients: &[Client]) {
    let mut unsure = 0;
    let mut exact = 0;
    for ledger in clients.iter().flat_map(|client| &client.ledgers) {
        for node in &cluster.nodes {
            let answer = node.query_sql(ledger.user).await;
            assert!(answer.version >= ledger.version, "lost: {ledger:?}, but {answer:?}");
            for device in DEVICES {
                let held = answer.routes.iter().find(|route| route.device_id == device).map(|route| &route.route_key);
                match ledger.devices.get(device) {
                    Some(Known::Bound(key)) => assert_eq!(held, Some(key), "{device}: {ledger:?}, but {answer:?}"),
                    Some(Known::Unbound) | None => assert_eq!(held, None, "{device}: {ledger:?}, but {answer:?}"),
                    Some(Known::Unsure) => {
                        unsure += 1;
                        continue;
                    }
                }
                exact += 1;
            }
        }
    }
    let sum = |of: fn(&Figures) -> u64| clients.iter().map(|client| of(&client.figures)).sum::<u64>();
    let (binds, unbinds, unanswered) = (sum(|f| f.binds), sum(|f| f.unbinds), sum(|f| f.unanswered));
    println!("acknowledged: {binds} binds, {unbinds} unbinds; not answered: {unanswered}");
    println!("devices compared with what was acknowledged: {exact} exactly, {unsure} only by version");
    println!("rows left in the outbox: {}", cluster.db.number("SELECT COUNT(*) FROM outbox").await);
    assert!(binds > 1_000 && exact > unsure, "the test was a test");
}
