//! What breaks: drawn by chance from a seed, each for some seconds, at most two at once, never two of one kind.

use std::collections::BTreeMap;
use std::time::Duration;
use std::time::Instant;

use crate::harness::sentinel::MASTER;
use crate::history::Recorder;
use crate::wire::HERE;
use crate::wire::Host;
use crate::wire::Way;
use crate::world::NODES;
use crate::world::REDIS;
use crate::world::SENTINELS;
use crate::world::SQL;
use crate::world::World;

const AT_ONCE: usize = 2;
const LOOK: Duration = Duration::from_millis(100);
const LASTS_MS: std::ops::Range<u64> = 1_000..12_000;
const PAUSE_MS: std::ops::Range<u64> = 500..4_000;
/// Of a node; it is killed and started again, as a supervisor does, while what it needs is away.
const STARTS_WITHIN: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(1);
/// Beside the right time.
const SHIFTS: [&str; 6] = ["+1h", "-1h", "+3d", "-20", "+90", "-3d"];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Node,
    Clock,
    Redis,
    Sql,
    Net,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    NodeKilled(usize),
    NodeStopped(usize),
    ClockSteps(usize, &'static str),
    RedisKilled(usize),
    RedisStopped(usize),
    /// The primary hears neither its replica nor the sentinels; the nodes reach all.
    RedisSplit(usize),
    RedisFailOver,
    MemberKilled(usize),
    MemberStopped(usize),
    MemberDiskFull(usize),
    /// From the other members; nodes reach it.
    MemberParted(usize),
    Cut {
        node: usize,
        from: bool,
        to: bool,
        peers: Peers,
    },
    Slow {
        node: usize,
        delay_ms: u64,
        loss_percent: u8,
    },
}

#[derive(Clone, Copy, Debug)]
enum Peers {
    Sql,
    Redis,
    Nodes,
    Callers,
    All,
}

struct Active {
    fault: Fault,
    until: Instant,
}

/// What breaks, and when; it owns the world meanwhile.
pub struct Nemesis<'a> {
    world: &'a mut World,
    recorder: &'a Recorder,
    random: fastrand::Rng,
    active: Vec<Active>,
    pub injected: BTreeMap<String, usize>,
}

impl<'a> Nemesis<'a> {
    pub fn new(world: &'a mut World, recorder: &'a Recorder, seed: u64) -> Self {
        Self { world, recorder, random: fastrand::Rng::with_seed(seed), active: Vec::new(), injected: BTreeMap::new() }
    }

    /// Breaks things for `time`, and mends all of them.
    pub async fn rages(&mut self, time: Duration) {
        let (began, mut next) = (Instant::now(), Instant::now() + Duration::from_millis(self.random.u64(PAUSE_MS)));
        while began.elapsed() < time {
            self.end_what_is_due(Instant::now()).await;
            if Instant::now() >= next && self.active.len() < AT_ONCE {
                self.draw().await;
                next = Instant::now() + Duration::from_millis(self.random.u64(PAUSE_MS));
            }
            tokio::time::sleep(LOOK).await;
        }
        self.world.wire.heal();
        while !self.active.is_empty() {
            self.end_what_is_due(Instant::now() + Duration::from_millis(LASTS_MS.end)).await;
        }
    }

    async fn end_what_is_due(&mut self, now: Instant) {
        let (due, active) = std::mem::take(&mut self.active).into_iter().partition(|active: &Active| active.until <= now);
        self.active = active;
        for Active { fault, .. } in due {
            println!("{:>9.3} ends:   {fault:?}", self.recorder.now() as f64 / 1e6);
            if !self.end(fault).await {
                println!("{:>9.3} not yet: {fault:?}", self.recorder.now() as f64 / 1e6); // what it needs is away
                self.active.push(Active { fault, until: Instant::now() + AGAIN });
            }
        }
    }

    async fn draw(&mut self) {
        let mut fault = self.any();
        if let Fault::RedisSplit(n) = &mut fault {
            *n = self.world.redis_primary().await.unwrap_or(*n);
        }
        if self.active.iter().any(|active| active.fault.kind() == fault.kind()) {
            return;
        }
        // Two members that are away at once are no cluster.
        let others_away = self.active.iter().any(|active| active.fault.takes_a_member());
        if fault.takes_a_member() && (others_away || !self.world.sql_is_ready().await) {
            return;
        }
        let lasts = Duration::from_millis(self.random.u64(LASTS_MS));
        println!("{:>9.3} begins: {fault:?}, for {lasts:?}", self.recorder.now() as f64 / 1e6);
        self.begin(fault).await;
        *self.injected.entry(fault.name()).or_default() += 1;
        self.active.push(Active { fault, until: Instant::now() + lasts });
    }

    fn any(&mut self) -> Fault {
        let random = &mut self.random;
        let (node, redis, member) = (random.usize(..NODES.len()), random.usize(..REDIS.len()), random.usize(..SQL.len()));
        match random.u8(..15) {
            0 | 1 => Fault::NodeKilled(node),
            2 => Fault::NodeStopped(node),
            3 => Fault::ClockSteps(node, SHIFTS[random.usize(..SHIFTS.len())]),
            4 => Fault::RedisKilled(redis),
            5 => Fault::RedisStopped(redis),
            6 => Fault::RedisSplit(redis),
            7 => Fault::RedisFailOver,
            8 => Fault::MemberKilled(member),
            9 => Fault::MemberStopped(member),
            10 => Fault::MemberParted(member),
            11 => Fault::MemberDiskFull(member),
            12 | 13 => {
                let peers = [Peers::Sql, Peers::Redis, Peers::Nodes, Peers::Callers, Peers::All][random.usize(..5)];
                let (from, to) = [(true, true), (true, false), (false, true)][random.usize(..3)];
                Fault::Cut { node, from, to, peers }
            }
            _ => Fault::Slow { node, delay_ms: random.u64(20..300), loss_percent: random.u8(0..15) },
        }
    }

    async fn begin(&mut self, fault: Fault) {
        let world = &mut *self.world;
        match fault {
            Fault::NodeKilled(n) => {
                world.nodes[n].kill();
                let now = self.recorder.now();
                self.recorder.write().kills.push((n, now));
            }
            Fault::NodeStopped(n) => world.nodes[n].stop(),
            Fault::ClockSteps(n, shift) => world.clock_steps(n, shift),
            Fault::RedisKilled(n) => world.redis[n].kill(),
            Fault::RedisStopped(n) => world.redis[n].stop(),
            Fault::RedisSplit(_) | Fault::MemberParted(_) => {
                let (one, others) = fault.ways();
                world.wire.set(&one, &others, Some(Way::Cut));
                world.wire.set(&others, &one, Some(Way::Cut));
            }
            Fault::RedisFailOver => {
                let _ = world.sentinels[0].run::<()>(&["SENTINEL", "FAILOVER", MASTER]).await; // refused while one is going on
            }
            Fault::MemberKilled(n) => world.galera.members[n].kill(),
            Fault::MemberStopped(n) => world.galera.members[n].stop(),
            Fault::MemberDiskFull(n) => world.galera.members[n].disk_is_full(true),
            Fault::Cut { node, from, to, peers } => {
                let (node, peers) = ([NODES[node]], peers.hosts());
                if from {
                    world.wire.set(&node, &peers, Some(Way::Cut));
                }
                if to {
                    world.wire.set(&peers, &node, Some(Way::Cut));
                }
            }
            Fault::Slow { node, delay_ms, loss_percent } => {
                let way = Way::Slow { delay: Duration::from_millis(delay_ms), loss: f64::from(loss_percent) / 100.0 };
                let (node, peers) = ([NODES[node]], Peers::All.hosts());
                world.wire.set(&node, &peers, Some(way));
                world.wire.set(&peers, &node, Some(way));
            }
        }
    }

    /// False: not yet.
    async fn end(&mut self, fault: Fault) -> bool {
        let world = &mut *self.world;
        match fault {
            Fault::NodeKilled(n) => return world.nodes[n].try_restart(STARTS_WITHIN).await,
            Fault::NodeStopped(n) => world.nodes[n].cont(),
            Fault::ClockSteps(n, _) => world.clock_steps(n, "+0"),
            Fault::RedisKilled(n) => tokio::task::block_in_place(|| world.redis[n].restart()),
            Fault::RedisStopped(n) => world.redis[n].cont(),
            Fault::RedisFailOver => {}
            Fault::MemberKilled(n) => return world.start_member_again(n),
            Fault::MemberStopped(n) => world.galera.members[n].cont(),
            Fault::MemberDiskFull(n) => {
                world.galera.members[n].disk_is_full(false);
                // It may have left the others, as what they wrote was not written here.
                return world.member_is_ready(n).await || world.start_member_again(n);
            }
            Fault::RedisSplit(_) | Fault::MemberParted(_) | Fault::Cut { .. } | Fault::Slow { .. } => {
                let (one, other) = fault.ways();
                world.wire.set(&one, &other, None);
                world.wire.set(&other, &one, None);
            }
        }
        true
    }
}

impl Fault {
    fn kind(self) -> Kind {
        match self {
            Self::NodeKilled(_) | Self::NodeStopped(_) => Kind::Node,
            Self::ClockSteps(..) => Kind::Clock,
            Self::RedisKilled(_) | Self::RedisStopped(_) | Self::RedisFailOver => Kind::Redis,
            Self::MemberKilled(_) | Self::MemberStopped(_) | Self::MemberDiskFull(_) => Kind::Sql,
            // What lies in the ways is taken out again as a whole.
            Self::RedisSplit(_) | Self::MemberParted(_) | Self::Cut { .. } | Self::Slow { .. } => Kind::Net,
        }
    }

    fn takes_a_member(self) -> bool {
        self.kind() == Kind::Sql || matches!(self, Self::MemberParted(_))
    }

    fn name(self) -> String {
        let text = format!("{self:?}");
        text.split(['(', ' ']).next().unwrap_or_default().to_owned()
    }

    /// Whose packets to whom it keeps back.
    fn ways(self) -> (Vec<Host>, Vec<Host>) {
        match self {
            Self::RedisSplit(n) => (vec![REDIS[n]], [&REDIS[..], &SENTINELS].concat()),
            Self::MemberParted(n) => (vec![SQL[n]], SQL.to_vec()),
            Self::Cut { node, .. } | Self::Slow { node, .. } => (vec![NODES[node]], Peers::All.hosts()),
            _ => (Vec::new(), Vec::new()),
        }
    }
}

impl Peers {
    fn hosts(self) -> Vec<Host> {
        match self {
            Self::Sql => SQL.to_vec(),
            Self::Redis => [&REDIS[..], &SENTINELS].concat(),
            Self::Nodes => NODES.to_vec(),
            Self::Callers => vec![HERE],
            Self::All => [&[HERE][..], &NODES, &SENTINELS, &REDIS, &SQL].concat(),
        }
    }
}
