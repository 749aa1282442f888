//! The races that the cache has to win, forced one by one; then every schedule of a small world, and many of a larger one.

use std::collections::BTreeSet;

use super::*;

const ALICE: i64 = 7;

fn alice() -> UserId {
    UserId::parse(ALICE).unwrap()
}

#[test]
fn a_record_in_memory_has_no_room_to_spare() {
    let route = crate::domain::route::Route {
        device: crate::domain::id::DeviceId::parse("phone").unwrap(),
        platform: Default::default(),
        epoch: crate::domain::id::Epoch(1),
        conn: crate::domain::id::ConnId::parse("c").unwrap(),
        connected_at: Default::default(),
        client_ip: None,
        client_port: 1,
        bound_version: Version(1),
        bound_at: Default::default(),
        expires_at: Default::default(),
        idle: false,
    };
    let grown = || {
        let mut grown = record(1);
        grown.routes.reserve(4);
        grown.routes.push(route.clone());
        assert!(grown.routes.capacity() > 1, "a list that grows has room to spare");
        grown
    };
    let cache = Cache::new(10);
    let room = || cache.get(alice()).unwrap().record.routes.capacity();
    cache.committed(alice(), grown(), Instant::now(), false);
    assert_eq!(room(), 1, "committed");
    cache.forget(alice());
    let ticket = cache.begin_load(alice());
    assert!(matches!(cache.end_load(ticket, grown(), true), Loaded::Answer(_)));
    assert_eq!(room(), 1, "loaded");
}

#[test]
fn a_user_with_one_device_takes_one_allocation_of_a_size_that_allocators_have() {
    // 16 bytes count references; 192 is a size class of the usual allocators, and the next one is 224.
    assert!(size_of::<Entry>() + 16 <= 192, "{}", size_of::<Entry>());
}

fn record(version: u64) -> UserRecord {
    UserRecord { version: Version(version), ..UserRecord::default() }
}

impl Cache {
    fn commits(&self, version: u64) {
        self.committed(alice(), record(version), Instant::now(), false);
    }

    fn ends(&self, ticket: LoadTicket, version: u64) -> Loaded {
        self.end_load(ticket, record(version), true)
    }

    fn holds(&self) -> Option<u64> {
        self.get(alice()).map(|entry| entry.record.version.0)
    }

    fn loads(self: &Arc<Self>, version: u64) {
        let ticket = self.begin_load(alice());
        assert_eq!(answer(self.ends(ticket, version)), version);
    }
}

#[track_caller]
fn answer(loaded: Loaded) -> u64 {
    match loaded {
        Loaded::Answer(entry) => entry.record.version.0,
        Loaded::Again(_) => panic!("told to read once more"),
    }
}

#[track_caller]
fn again(loaded: Loaded) -> LoadTicket {
    match loaded {
        Loaded::Answer(entry) => panic!("may answer version {}", entry.record.version.0),
        Loaded::Again(ticket) => ticket,
    }
}

#[test]
fn a_load_that_began_before_a_commit_and_ends_after_it_reads_again() {
    for evicted in [false, true] {
        let cache = Cache::new(10);
        let load = cache.begin_load(alice());
        let write = cache.begin_write(alice());
        cache.commits(2);
        drop(write);
        if evicted {
            cache.l1.remove(&alice());
        }
        let load = again(cache.ends(load, 1));
        assert!(!load.accepts(Version(1)), "the shared cache would say the same again");
        assert_eq!(answer(cache.ends(load, 2)), 2);
        assert_eq!((cache.holds(), cache.under_way(), cache.went_back()), (Some(2), 0, 0));
    }
}

#[test]
fn a_user_who_was_forgotten_is_no_sign_of_a_database_that_was_set_back() {
    let cache = Cache::new(10);
    cache.loads(5);
    cache.may_be_forgotten(Version(6));
    cache.loads(0);
    assert_eq!((cache.holds(), cache.went_back()), (Some(0), 0));
    cache.loads(6);
    cache.loads(0);
    assert_eq!(cache.went_back(), 1, "nobody forgets a user who was there so lately");
}

#[test]
fn an_erased_user_who_is_gone_for_good_is_no_sign_of_a_database_that_was_set_back() {
    let cache = Cache::new(10);
    let erased = UserRecord { version: Version(6), ..UserRecord::default() };
    let session = crate::domain::history::OnlineSession { since: Default::default(), is_counted: true };
    let erased = erased.clone().with(crate::domain::user::Presence { session, ..erased.presence() });
    cache.committed(alice(), erased, Instant::now(), false);
    cache.loads(0);
    assert_eq!((cache.holds(), cache.went_back()), (Some(0), 0));
}

#[test]
fn each_user_of_a_batch_is_judged_alone() {
    let cache = Cache::new(10);
    let users: Vec<UserId> = (1..=3).map(|id| UserId::parse(id).unwrap()).collect();
    let loads: Vec<LoadTicket> = users.iter().map(|user| cache.begin_load(*user)).collect();
    cache.committed(users[1], record(5), Instant::now(), false);
    let (again, answers): (Vec<_>, Vec<_>) =
        loads.into_iter().map(|load| cache.end_load(load, record(1), true)).partition(|it| matches!(it, Loaded::Again(_)));
    assert_eq!((again.len(), answers.len(), cache.under_way()), (1, 2, 1));
    let Some(Loaded::Again(load)) = again.into_iter().next() else { unreachable!() };
    assert_eq!(load.user(), users[1]);
    assert_eq!(answer(cache.end_load(load, record(5), true)), 5);
    assert_eq!(cache.under_way(), 0);
}

#[test]
fn a_commit_that_a_newer_hint_has_overtaken_does_not_stay() {
    let cache = Cache::new(10);
    let write = cache.begin_write(alice());
    cache.hint(alice(), Version(3));
    cache.commits(2);
    assert_eq!(cache.holds(), None);
    let load = cache.begin_load(alice());
    assert!(!load.accepts(Version(2)));
    drop(write);
    assert_eq!(answer(cache.ends(load, 3)), 3);
    assert_eq!((cache.holds(), cache.under_way()), (Some(3), 0));
}

#[test]
fn a_load_answers_what_is_known_when_that_is_newer() {
    let cache = Cache::new(10);
    let load = cache.begin_load(alice());
    cache.commits(2);
    let other = cache.begin_load(alice());
    assert_eq!(answer(cache.ends(other, 3)), 3);
    assert_eq!(answer(cache.ends(load, 3)), 3);
    assert_eq!((cache.holds(), cache.under_way()), (Some(3), 0));
}

#[test]
fn what_is_under_way_is_forgotten_when_it_ends_however_it_ends() {
    let cache = Cache::new(10);
    let (load, other, write) = (cache.begin_load(alice()), cache.begin_load(alice()), cache.begin_write(alice()));
    cache.hint(alice(), Version(9));
    assert_eq!(cache.under_way(), 1);
    drop(write); // rolled back
    drop(load);
    assert_eq!(cache.under_way(), 1);
    assert_eq!(answer(cache.ends(other, 9)), 9);
    assert_eq!(cache.under_way(), 0);
    cache.commits(10); // nobody told it that a write began
    assert_eq!((cache.holds(), cache.under_way()), (Some(10), 0));
}

#[test]
fn a_hint_drops_what_is_older_and_leaves_no_trace_otherwise() {
    let cache = Cache::new(10);
    cache.hint(alice(), Version(1));
    assert_eq!((cache.holds(), cache.under_way()), (None, 0));
    cache.loads(2);
    cache.hint(alice(), Version(2));
    assert_eq!((cache.holds(), cache.under_way(), cache.offers_rejected()), (Some(2), 0, 0));
    cache.hint(alice(), Version(3));
    assert_eq!((cache.holds(), cache.under_way(), cache.offers_rejected()), (None, 0, 1));
}

#[test]
fn distrust_reaches_entries_and_loads_that_were_there_before() {
    let cache = Cache::new(10);
    cache.loads(2);
    let load = cache.begin_load(alice());
    cache.distrust();
    assert_eq!(cache.holds(), None);
    assert_eq!(answer(cache.ends(load, 2)), 2, "its reader asked before");
    assert_eq!(cache.holds(), None, "later readers did not");
    cache.loads(2);
    assert_eq!((cache.holds(), cache.under_way()), (Some(2), 0));
}

#[test]
fn an_entry_that_is_not_trusted_sets_no_floor() {
    let cache = Cache::new(10);
    cache.loads(5);
    cache.distrust(); // the database was set back, say
    let load = cache.begin_load(alice());
    assert!(load.accepts(Version(4)));
    assert_eq!(answer(cache.ends(load, 4)), 4);
    assert_eq!((cache.holds(), cache.went_back()), (Some(4), 0));
}

#[test]
fn sql_below_what_was_known_before_went_back_and_is_believed() {
    let bob = UserId::parse(8).unwrap();
    let cache = Cache::new(10);
    cache.committed(bob, record(7), Instant::now(), false);
    cache.loads(5);
    let load = cache.begin_load(alice()); // a reader who asks for no older than now
    assert_eq!(answer(cache.ends(load, 4)), 4);
    assert_eq!((cache.went_back(), cache.holds()), (1, Some(4)));
    assert!(cache.get(bob).is_none(), "L1 is empty but for what was read since");
    assert_eq!(cache.under_way(), 0);
}

#[test]
fn a_shared_cache_that_is_behind_proves_nothing_about_the_database() {
    let cache = Cache::new(10);
    cache.loads(5);
    let load = cache.begin_load(alice());
    let load = again(cache.end_load(load, record(4), false));
    assert_eq!(answer(cache.ends(load, 5)), 5);
    assert_eq!(cache.went_back(), 0);
}

#[test]
fn a_batch_that_finds_the_database_set_back_is_read_once() {
    let cache = Cache::new(10);
    let users: Vec<UserId> = (1..=3).map(|id| UserId::parse(id).unwrap()).collect();
    users.iter().for_each(|user| cache.committed(*user, record(5), Instant::now(), false));
    let loads: Vec<LoadTicket> = users.iter().map(|user| cache.begin_load(*user)).collect();
    for load in loads {
        assert_eq!(answer(cache.end_load(load, record(4), true)), 4);
    }
    assert_eq!((cache.went_back(), cache.under_way()), (1, 0));
}

#[test]
fn what_was_committed_since_the_database_went_back_is_kept() {
    let cache = Cache::new(10);
    cache.loads(5);
    let load = cache.begin_load(alice()); // SQL is read and has version 4
    let write = cache.begin_write(alice());
    cache.commits(6);
    drop(write);
    let load = again(cache.ends(load, 4));
    assert_eq!(answer(cache.ends(load, 6)), 6);
    assert_eq!(cache.under_way(), 0);
}

#[test]
fn a_commit_from_before_the_distrust_is_not_trusted_either() {
    let cache = Cache::new(10);
    let write = cache.begin_write(alice());
    let complete_at = Instant::now();
    cache.distrust(); // version 3 was committed elsewhere, and its hint was lost
    cache.committed(alice(), record(2), complete_at, false);
    drop(write);
    assert_eq!((cache.holds(), cache.under_way()), (None, 0));
}

#[test]
fn a_shared_cache_that_lags_is_watched_until_it_has_caught_up() {
    let cache = Cache::new(10);
    let write = cache.begin_write(alice());
    cache.committed(alice(), record(2), Instant::now(), true);
    cache.committed(alice(), record(3), Instant::now(), true);
    drop(write);
    cache.l1.remove(&alice());
    cache.confirmed(alice(), Version(2));
    assert_eq!(cache.under_way(), 1, "version 3 is not there yet");
    let load = cache.begin_load(alice());
    assert!(!load.accepts(Version(2)) && load.accepts(Version(3)));
    drop(load);
    cache.confirmed(alice(), Version(3));
    assert_eq!(cache.under_way(), 0);
}

#[test]
fn whoever_is_asked_for_once_gets_nobody_out_of_a_full_memory() {
    let cache = Cache::new(10);
    let user = |id| UserId::parse(id).unwrap();
    let is_there = |id| cache.peek(user(id)).is_some();
    (1..=10).for_each(|id| cache.committed(user(id), record(1), Instant::now(), false));
    assert_eq!(cache.len(), 10);
    let ask = |id, version| match cache.get(user(id)) {
        Some(entry) => entry.record.version.0,
        None => answer(cache.end_load(cache.begin_load(user(id)), record(version), true)),
    };
    assert!((11..=1_000).all(|id| ask(id, 1) == 1));
    assert_eq!(cache.len(), 10);
    assert!((1..=10).all(is_there), "nobody has asked for them, and they stay");

    assert_eq!((ask(11, 2), ask(11, 3), ask(11, 4)), (2, 3, 3), "asked for again, a user gets in");
    assert_eq!(cache.len(), 10);
    assert!(is_there(11));
    cache.distrust();
    assert!((1..=11).filter(|id| is_there(*id)).all(|id| ask(id, 5) == 5 && ask(id, 6) == 5), "who is there is kept up to date");
}

/// How much may happen in one world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bounds {
    versions: u64,
    evictions: u8,
    failed_projections: u8,
    lost_hints: u8,
}

/// One user, as SQL, the shared cache and two nodes know them. A node's part of it is laid into a real cache before each
/// step and read back afterwards, so every rule that is explored is the real one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    left: Bounds,
    sql: u64,
    shared: Option<u64>,
    nodes: [Node; 2],
    /// To which node, and what is newer than it may think.
    hints: BTreeSet<(usize, u64)>,
    /// Whose projection failed.
    outbox: BTreeSet<usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    l1: Option<u64>,
    /// Loads, writes, floor, lag.
    under_way: Option<(u32, u32, u64, u64)>,
    writes: Vec<Write>,
    load: Option<Load>,
    /// The newest version this node has acknowledged or answered.
    told: u64,
    lost_a_hint: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Write {
    Begun,
    /// COMMIT has returned this version.
    Committed(u64),
    /// This node's cache knows it.
    Shown {
        version: u64,
        acknowledged: bool,
        projected: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Load {
    phase: Phase,
    floor_before: u64,
    /// What its readers must not fall behind.
    needed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    AsksShared,
    AsksSql,
    FillsShared(u64),
    Ends { version: u64, from_sql: bool },
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Begin(usize),
    Commit(usize, usize),
    /// L1 may refuse what it is given.
    Show {
        node: usize,
        write: usize,
        refused: bool,
    },
    Project(usize, usize),
    ProjectionFails(usize, usize),
    Acknowledge(usize, usize),
    Repair(usize),
    Hint(usize, u64),
    HintIsLost(usize, u64),
    Evict(usize),
    Read(usize),
    /// A reader who accepts nothing older than now.
    ReadSql(usize),
    Load {
        node: usize,
        refused: bool,
    },
}

impl World {
    fn new(left: Bounds) -> Self {
        Self { left, sql: 0, shared: None, nodes: Default::default(), hints: BTreeSet::new(), outbox: BTreeSet::new() }
    }

    /// All that can happen next.
    fn steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let begun: usize = self.nodes.iter().map(|node| node.writes.len()).sum();
        let uncommitted = self.nodes.iter().flat_map(|node| &node.writes).filter(|write| **write == Write::Begun).count() as u64;
        for (n, node) in self.nodes.iter().enumerate() {
            let busy = node.writes.iter().any(|write| matches!(write, Write::Begun | Write::Committed(_)));
            if !busy && begun < 2 && self.sql + uncommitted < self.left.versions {
                steps.push(Step::Begin(n));
            }
            for (i, write) in node.writes.iter().enumerate() {
                match *write {
                    Write::Begun => steps.push(Step::Commit(n, i)),
                    Write::Committed(_) => {
                        steps.extend([false, true].map(|refused| Step::Show { node: n, write: i, refused }));
                    }
                    Write::Shown { acknowledged, projected, .. } => {
                        steps.extend((!acknowledged).then_some(Step::Acknowledge(n, i)));
                        steps.extend((!projected).then_some(Step::Project(n, i)));
                        steps.extend((!projected && self.left.failed_projections > 0).then_some(Step::ProjectionFails(n, i)));
                    }
                }
            }
            if self.left.evictions > 0 && node.l1.is_some() {
                steps.push(Step::Evict(n));
            }
            steps.push(Step::Read(n));
            match &node.load {
                None => steps.push(Step::ReadSql(n)),
                Some(load) => {
                    let ends = matches!(load.phase, Phase::Ends { .. });
                    steps.push(Step::Load { node: n, refused: false });
                    steps.extend(ends.then_some(Step::Load { node: n, refused: true }));
                }
            }
        }
        for (node, version) in &self.hints {
            steps.push(Step::Hint(*node, *version));
            steps.extend((self.left.lost_hints > 0).then_some(Step::HintIsLost(*node, *version)));
        }
        steps.extend(self.outbox.iter().map(|node| Step::Repair(*node)));
        steps
    }

    /// Takes `step`, and says what a reader would complain about.
    fn take(&mut self, step: Step, cache: &Arc<Cache>) -> Result<(), String> {
        match step {
            Step::Begin(n) => {
                self.nodes[n].with(cache, |cache| std::mem::forget(cache.begin_write(alice())));
                self.nodes[n].writes.push(Write::Begun);
            }
            Step::Commit(n, i) => {
                self.sql += 1;
                self.nodes[n].writes[i] = Write::Committed(self.sql);
            }
            Step::Show { node, write, refused } => {
                let node = &mut self.nodes[node];
                let Write::Committed(version) = node.writes[write] else { unreachable!() };
                let before = Instant::now();
                node.with(cache, |cache| cache.committed(alice(), record(version), before, true));
                node.writes[write] = Write::Shown { version, acknowledged: false, projected: false };
                node.refuse(refused);
            }
            Step::Project(n, i) => {
                let version = self.nodes[n].settle(i, None, Some(()));
                self.shared = self.shared.max(Some(version));
                self.nodes[n].with(cache, |cache| cache.confirmed(alice(), Version(version)));
                self.hints.insert((1 - n, version));
            }
            Step::ProjectionFails(n, i) => {
                self.left.failed_projections -= 1;
                let version = self.nodes[n].settle(i, None, Some(()));
                self.outbox.insert(n);
                self.hints.insert((1 - n, version));
            }
            Step::Acknowledge(n, i) => {
                let node = &mut self.nodes[n];
                let version = node.settle(i, Some(()), None);
                node.with(cache, |cache| drop(WriteGuard { cache: cache.clone(), user: alice() }));
                node.told = node.told.max(version);
            }
            Step::Repair(n) => {
                self.outbox.remove(&n);
                self.shared = self.shared.max(Some(self.sql));
                let version = Version(self.sql);
                self.nodes[n].with(cache, |cache| cache.confirmed(alice(), version));
                self.hints.extend([(0, self.sql), (1, self.sql)]);
            }
            Step::Hint(n, version) => {
                self.hints.remove(&(n, version));
                self.nodes[n].with(cache, |cache| cache.hint(alice(), Version(version)));
            }
            Step::HintIsLost(n, version) => {
                self.left.lost_hints -= 1;
                self.hints.remove(&(n, version));
                self.nodes[n].lost_a_hint = true;
            }
            Step::Evict(n) => {
                self.left.evictions -= 1;
                self.nodes[n].l1 = None;
            }
            Step::Read(n) => self.nodes[n].read(cache)?,
            Step::ReadSql(n) => {
                let needed = self.sql;
                self.nodes[n].begin_load(cache, Phase::AsksSql, needed);
            }
            Step::Load { node, refused } => self.load(node, refused, cache)?,
        }
        self.judge(cache)
    }

    /// The next step of a node's load.
    fn load(&mut self, n: usize, refused: bool, cache: &Arc<Cache>) -> Result<(), String> {
        let (sql, shared, node) = (self.sql, self.shared, &mut self.nodes[n]);
        let Some(load) = &mut node.load else { unreachable!() };
        let ticket = LoadTicket {
            cache: cache.clone(),
            is_open: false, // it is put together anew for each step
            user: alice(),
            floor_before: Version(load.floor_before),
            trust: cache.trust.load(Ordering::Relaxed),
            began: Instant::now(),
        };
        load.phase = match load.phase {
            Phase::AsksShared => match shared.filter(|version| ticket.accepts(Version(*version))) {
                Some(version) => Phase::Ends { version, from_sql: false },
                None => Phase::AsksSql,
            },
            Phase::AsksSql => Phase::FillsShared(sql),
            Phase::FillsShared(version) => {
                self.shared = shared.max(Some(version));
                Phase::Ends { version, from_sql: true }
            }
            Phase::Ends { version, from_sql } => {
                let needed = load.needed;
                match node.with(cache, |cache| cache.end_load(ticket, record(version), from_sql)) {
                    Loaded::Again(ticket) => {
                        node.load = Some(Load { phase: Phase::AsksSql, floor_before: ticket.floor_before.0, needed });
                    }
                    Loaded::Answer(entry) => {
                        node.load = None;
                        node.refuse(refused);
                        node.answers(entry.record.version.0, needed)?;
                    }
                }
                return Ok(());
            }
        };
        Ok(())
    }

    fn judge(&self, cache: &Cache) -> Result<(), String> {
        if cache.went_back() > 0 {
            return Err("the database is said to have gone back".to_owned());
        }
        let busy = self.nodes.iter().any(|node| !node.writes.is_empty() || node.load.is_some());
        if busy || !self.hints.is_empty() || !self.outbox.is_empty() {
            return Ok(());
        }
        for node in &self.nodes {
            if node.l1.is_some_and(|version| version < self.sql) && !node.lost_a_hint {
                return Err("all is quiet, but L1 is outdated".to_owned());
            }
            if node.under_way.is_some() {
                return Err("all is quiet, but something is said to be under way".to_owned());
            }
        }
        Ok(())
    }
}

impl Node {
    /// Does something to a cache that knows what this node knows.
    fn with<T>(&mut self, cache: &Arc<Cache>, action: impl FnOnce(&Arc<Cache>) -> T) -> T {
        cache.shard(alice()).clear();
        match self.l1 {
            Some(version) => cache.commits(version),
            None => drop(cache.l1.remove(&alice())),
        }
        let under_way = self.under_way.map(|(loads, writes, floor, lag)| {
            let (floor, lag) = (Version(floor), Version(lag));
            (alice(), UnderWay { loads, writes, floor, lag, ..UnderWay::default() })
        });
        *cache.shard(alice()) = under_way.into_iter().collect();
        let done = action(cache);
        self.l1 = cache.holds();
        self.under_way = cache.shard(alice()).get(&alice()).map(|it| (it.loads, it.writes, it.floor.0, it.lag.0));
        done
    }

    fn refuse(&mut self, refused: bool) {
        self.l1 = self.l1.filter(|_| !refused);
    }

    /// Marks a write that is shown, lets it go if nothing is left to do, and returns its version.
    fn settle(&mut self, i: usize, acknowledges: Option<()>, projects: Option<()>) -> u64 {
        let Write::Shown { version, acknowledged, projected } = self.writes.remove(i) else { unreachable!() };
        let (acknowledged, projected) = (acknowledged || acknowledges.is_some(), projected || projects.is_some());
        if !(acknowledged && projected) {
            self.writes.push(Write::Shown { version, acknowledged, projected });
            self.writes.sort_unstable();
        }
        version
    }

    /// Answers from L1, joins the load in progress, or begins one.
    fn read(&mut self, cache: &Arc<Cache>) -> Result<(), String> {
        let needed = self.told;
        match (self.with(cache, |cache| cache.holds()), &mut self.load) {
            (Some(version), _) => return self.answers(version, needed),
            (None, Some(load)) => load.needed = load.needed.max(needed),
            (None, None) => self.begin_load(cache, Phase::AsksShared, needed),
        }
        Ok(())
    }

    fn begin_load(&mut self, cache: &Arc<Cache>, phase: Phase, needed: u64) {
        let ticket = self.with(cache, |cache| cache.begin_load(alice()));
        let needed = needed.max(self.told);
        self.load = Some(Load { phase, floor_before: ticket.floor_before.0, needed });
    }

    fn answers(&mut self, version: u64, needed: u64) -> Result<(), String> {
        self.told = self.told.max(version);
        if version < needed { Err(format!("version {version} is answered to a reader who needs {needed}")) } else { Ok(()) }
    }
}

/// Goes through every world that `bounds` allow, the nearest first, and returns how many there are.
fn explore(bounds: Bounds) -> Result<usize, String> {
    let cache = Cache::new(10);
    let mut worlds = vec![World::new(bounds)];
    let mut came_by: Vec<Option<(usize, Step)>> = vec![None];
    let mut known: std::collections::HashSet<World, std::hash::BuildHasherDefault<xxhash_rust::xxh3::Xxh3Default>> =
        worlds.iter().cloned().collect();
    let mut next = 0;
    while next < worlds.len() {
        for step in worlds[next].steps() {
            let mut world = worlds[next].clone();
            if let Err(complaint) = world.take(step, &cache) {
                let way = std::iter::successors(Some((next, step)), |(from, _)| came_by[*from]).map(|(_, step)| step);
                let mut way: Vec<String> = way.map(|step| format!("{step:?}")).collect();
                way.reverse();
                return Err(format!("{complaint}, after {}; {world:?}", way.join(", ")));
            }
            if !known.contains(&world) {
                known.insert(world.clone());
                worlds.push(world);
                came_by.push(Some((next, step)));
            }
        }
        next += 1;
    }
    Ok(worlds.len())
}

/// Takes random steps, then only those that bring things to an end.
fn walk(bounds: Bounds, seed: u64) -> Result<(), String> {
    let cache = Cache::new(10);
    let (mut world, mut way, mut random) = (World::new(bounds), Vec::new(), seed);
    for i in 0..200 {
        let mut steps = world.steps();
        if i > 100 {
            steps.retain(|step| !matches!(step, Step::Begin(_) | Step::Read(_) | Step::ReadSql(_)));
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let Some(step) = steps.get((random >> 33) as usize % steps.len().max(1)) else { break };
        way.push(*step);
        world.take(*step, &cache).map_err(|complaint| format!("{complaint}, after {way:?}; {world:?}"))?;
    }
    Ok(())
}

#[test]
fn no_schedule_of_a_small_world_lets_a_reader_go_back() {
    let quiet = Bounds { versions: 1, evictions: 0, failed_projections: 0, lost_hints: 0 };
    for bounds in [Bounds { evictions: 1, ..quiet }, Bounds { failed_projections: 1, ..quiet }, Bounds { lost_hints: 1, ..quiet }]
    {
        let worlds = explore(bounds).unwrap();
        assert!(worlds > 10_000, "{worlds} worlds are not many: {bounds:?}");
    }
}

#[test]
fn no_random_schedule_lets_a_reader_go_back() {
    for (versions, evictions) in [(2, 2), (6, 6)] {
        let bounds = Bounds { versions, evictions, failed_projections: 2, lost_hints: 2 };
        for seed in 0..3_000 {
            walk(bounds, seed).unwrap_or_else(|complaint| panic!("seed {seed}: {complaint}"));
        }
    }
}
