//! Gateways, nodes and users in virtual time. The nodes are the product's: each has its own copy of the table of lives, which it
//! reads once a second, and its own counters. Gateways beat every five seconds, each at its own time.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use im_presence::domain::allocation::Ask;
use im_presence::domain::allocation::Rules;
use im_presence::domain::allocation::algorithm::Algorithm;
use im_presence::domain::allocation::dice::Dice;
use im_presence::domain::gateway::Life;
use im_presence::domain::gateway::LifeKind;
use im_presence::domain::gateway::Profile;
use im_presence::domain::id::Epoch;
use im_presence::domain::id::GatewayAddr;
use im_presence::domain::id::UserId;
use im_presence::domain::time::Timestamp;
use im_presence::engine::gateways::allocation::Allocated;
use im_presence::engine::gateways::allocation::Allocator;
use im_presence::engine::gateways::allocation::Settings;
use im_presence::engine::messages::peers::Peers;
use im_presence::engine::read::lives::Lives;
use im_presence::metrics::Metrics;
use im_presence::store::cluster::NodeName;

pub const SECOND: u64 = 1_000_000;
const BEAT_S: u64 = 5;
const LEASE: Duration = Duration::from_secs(15);
/// From the time at which a client was told to come until it is connected: up to this, evenly.
const CONNECTING: u64 = 300_000;
/// How long a client tries an address that does not answer.
const GIVES_UP: u64 = SECOND;

pub struct Gateway {
    addr: GatewayAddr,
    profile: Arc<Profile>,
    epoch: Epoch,
    /// Clients can connect.
    pub is_up: bool,
    /// It has a life that nobody has declared over.
    registered: bool,
    pub connections: u32,
    pub said: u32,
    beat: u64,
    /// Log-ins of each second.
    pub log_ins: BTreeMap<u64, u32>,
}

struct Node {
    lives: Arc<Lives>,
    allocator: Arc<Allocator>,
}

#[derive(Clone, Default)]
struct User {
    /// None: asks.
    going_to: Option<usize>,
    failed: Vec<String>,
}

pub struct World {
    start: Instant,
    /// Microseconds.
    pub now: u64,
    pub gateways: Vec<Gateway>,
    nodes: Vec<Node>,
    users: Vec<User>,
    events: BinaryHeap<Reverse<(u64, usize)>>,
    regions: Vec<String>,
    dice: Dice,
    last_epoch: u64,
    pub came: u64,
    pub last_came: u64,
    pub asked: u64,
}

pub fn rules(algorithm: Algorithm) -> Rules {
    Rules { algorithm, max_load: 0.9, bounded_load: 1.25, regions: BTreeMap::new(), experiments: Vec::new() }
}

fn name(n: usize) -> NodeName {
    NodeName { node_id: format!("n-{n}"), incarnation: format!("i-{n}"), addr: format!("n-{n}:6000"), zone: String::new() }
}

impl World {
    /// `login_rate` 0: log-ins are not paced.
    pub fn new(nodes: usize, profiles: impl IntoIterator<Item = Profile>, rules: &Rules, login_rate: u32) -> Self {
        let names: Vec<NodeName> = (0..nodes).map(name).collect();
        let node = |name: &NodeName| {
            let (lives, (peers, _calls)) = (Lives::new(), Peers::new(name.clone()));
            peers.set_nodes(&names);
            let (heartbeat_interval, max_retry_after) = (Duration::from_secs(BEAT_S), Duration::from_secs(60));
            let settings =
                Settings { rules: rules.clone(), default_capacity: 10_000, login_rate, max_retry_after, heartbeat_interval };
            Node { allocator: Allocator::new(settings, lives.clone(), peers, Metrics::new()), lives }
        };
        let gateway = |(n, profile): (usize, Profile)| Gateway {
            addr: GatewayAddr::parse(&format!("gw-{n}:7000")).expect("an address"),
            profile: Arc::new(profile),
            epoch: Epoch(n as u64 + 1),
            is_up: true,
            registered: true,
            connections: 0,
            said: 0,
            beat: 0,
            log_ins: BTreeMap::new(),
        };
        let gateways: Vec<Gateway> = profiles.into_iter().enumerate().map(gateway).collect();
        let regions: std::collections::BTreeSet<String> = gateways.iter().map(|one| one.profile.region.clone()).collect();
        let last_epoch = gateways.len() as u64;
        Self {
            start: Instant::now(),
            now: 0,
            gateways,
            nodes: names.iter().map(node).collect(),
            users: Vec::new(),
            events: BinaryHeap::new(),
            regions: regions.into_iter().collect(),
            dice: Dice::new(1),
            last_epoch,
            came: 0,
            last_came: 0,
            asked: 0,
        }
    }

    /// Each gateway has so many users.
    pub fn settle(&mut self, connections: u32) {
        for gateway in &mut self.gateways {
            (gateway.connections, gateway.said) = (connections, connections);
        }
    }

    /// So many users ask, at times spread over so many microseconds.
    pub fn ask(&mut self, users: usize, within: u64) {
        for _ in 0..users {
            let at = self.now + (self.dice.fraction() * within as f64) as u64;
            self.events.push(Reverse((at, self.users.len())));
            self.users.push(User::default());
        }
    }

    /// A gateway is gone without a word, and its users notice and ask within a second.
    pub fn dies(&mut self, at: usize) -> usize {
        let users = std::mem::take(&mut self.gateways[at].connections) as usize;
        self.gateways[at].is_up = false;
        self.ask(users, SECOND);
        users
    }

    /// It says that it ends, and its users ask.
    pub fn stops(&mut self, at: usize) -> usize {
        self.gateways[at].registered = false;
        self.tell();
        self.dies(at)
    }

    /// A new process, without users.
    pub fn starts(&mut self, at: usize) {
        self.last_epoch += 1;
        let gateway = &mut self.gateways[at];
        (gateway.epoch, gateway.is_up, gateway.registered) = (Epoch(self.last_epoch), true, true);
        (gateway.said, gateway.beat) = (0, self.now / SECOND);
        self.tell();
    }

    /// Lets so many seconds pass.
    pub fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            let second = self.now / SECOND;
            for (n, gateway) in (0..).zip(&mut self.gateways) {
                if gateway.is_up && (second + n).is_multiple_of(BEAT_S) {
                    (gateway.said, gateway.beat) = (gateway.connections, second);
                }
                let silent = second.saturating_sub(gateway.beat);
                gateway.registered &= silent <= LEASE.as_secs();
            }
            self.tell();
            let until = self.now + SECOND;
            while let Some(Reverse((at, user))) = self.events.peek().copied().filter(|Reverse((at, _))| *at < until) {
                self.events.pop();
                self.now = at;
                self.step(user);
            }
            self.now = until;
        }
    }

    /// Until nobody is on the way any more. Returns how many seconds that took.
    pub fn run_until_quiet(&mut self, most: u64) -> u64 {
        let began = self.now / SECOND;
        while !self.events.is_empty() && self.now / SECOND < began + most {
            self.run(1);
        }
        self.now / SECOND - began
    }

    /// The nodes read the table.
    fn tell(&mut self) {
        let life = |gateway: &Gateway| {
            let beat = Timestamp((gateway.beat * 1_000) as i64);
            let life = Life::begun(gateway.epoch, gateway.addr.clone(), LifeKind::Managed, beat.plus(LEASE));
            Arc::new(Life { profile: gateway.profile.clone(), connections: gateway.said, last_beat: beat, ..life })
        };
        let lives: Vec<_> = self.gateways.iter().filter(|gateway| gateway.registered).map(life).collect();
        let at = self.instant();
        self.nodes.iter().for_each(|node| node.lives.replace(lives.clone(), true, at));
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_micros(self.now)
    }

    /// What a node says to a user.
    pub fn allocate(&mut self, node: usize, ask: &Ask) -> Allocated {
        self.asked += 1;
        self.nodes[node].allocator.allocate_at(ask, self.instant())
    }

    fn step(&mut self, user: usize) {
        match self.users[user].going_to.take() {
            Some(at) if self.gateways[at].is_up => {
                let second = self.now / SECOND;
                let gateway = &mut self.gateways[at];
                gateway.connections += 1;
                *gateway.log_ins.entry(second).or_default() += 1;
                (self.came, self.last_came) = (self.came + 1, self.now);
                self.users[user].failed = Vec::new();
            }
            Some(at) => {
                let addr = self.gateways[at].addr.to_string();
                self.users[user].failed.push(addr);
                self.events.push(Reverse((self.now + GIVES_UP, user)));
            }
            None => self.ask_for(user),
        }
    }

    /// In the user's region first, and after a failure anywhere but there.
    fn ask_for(&mut self, user: usize) {
        let exclude = self.users[user].failed.clone();
        let region = if exclude.is_empty() { self.regions[user % self.regions.len()].clone() } else { String::new() };
        let ask = Ask { region, exclude, ..Ask::of(UserId::parse(user as i64 + 1).expect("a user")) };
        let node = self.dice.next_number() as usize % self.nodes.len();
        let allocated = self.allocate(node, &ask);
        let mut then = self.now + u64::try_from(allocated.retry_after.as_micros()).expect("not long");
        if let Some(offer) = allocated.offers.first() {
            self.users[user].going_to = number(&offer.life.gateway);
            then += (self.dice.fraction() * CONNECTING as f64) as u64;
        }
        self.events.push(Reverse((then, user)));
    }

    /// The most log-ins of any gateway in any second.
    pub fn worst_second(&self) -> u32 {
        self.gateways.iter().flat_map(|gateway| gateway.log_ins.values()).copied().max().unwrap_or(0)
    }

    /// The fullest of those that are up, by the mean, both by capacity and weight.
    pub fn imbalance(&self) -> f64 {
        let share = |gateway: &Gateway| f64::from(gateway.profile.weight) * f64::from(gateway.profile.capacity);
        let up = || self.gateways.iter().filter(|gateway| gateway.is_up);
        let mean = up().map(|gateway| f64::from(gateway.connections)).sum::<f64>() / up().map(share).sum::<f64>();
        up().map(|gateway| f64::from(gateway.connections) / share(gateway)).fold(0.0, f64::max) / mean
    }
}

/// Which gateway has this address.
pub fn number(addr: &GatewayAddr) -> Option<usize> {
    addr.as_str().strip_prefix("gw-")?.split(':').next()?.parse().ok()
}
