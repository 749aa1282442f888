//! Callers that bind and ask all the time while something else happens, and a record of what they saw.
//!
//! Every answer says how far it can be behind. Each is held against that: whatever was acknowledged longer ago has to be in it.
//! On the node that acknowledged it has to be in any later answer, and no node's answers ever go back.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::Code;
use im_presence::pb::QueryRouteReq;
use im_presence::pb::QueryRouteResp;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::harness::allowed;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::node::Presence;
use crate::harness::percentile;

const WRITERS: i64 = 4;
/// Between a caller's calls, so that they do not take the machine from the nodes.
const PACE: Duration = Duration::from_millis(2);
const PROGRESS_DEADLINE: Duration = Duration::from_secs(20);
/// Ages are told in whole milliseconds.
const ROUNDING: Duration = Duration::from_millis(1);
const MAX_COMPLAINTS: usize = 10;

struct Acknowledged {
    when: Instant,
    node: usize,
    version: u64,
}

/// What was acknowledged of each user, in this order.
struct Ledger {
    users: Vec<Mutex<Vec<Acknowledged>>>,
    binds: watch::Sender<u64>,
}

impl Ledger {
    fn add(&self, user: i64, acknowledged: Acknowledged) {
        self.of(user).push(acknowledged);
        self.binds.send_modify(|binds| *binds += 1);
    }

    /// The newest version that was acknowledged by `when`, by this node if one is named.
    fn version_at(&self, user: i64, when: Instant, node: Option<usize>) -> u64 {
        let all = self.of(user);
        let mut counts = all.iter().rev().filter(|it| it.when <= when && node.is_none_or(|node| node == it.node));
        counts.next().map_or(0, |it| it.version)
    }

    /// Since when a newer version than `version` has been acknowledged.
    fn outdated_since(&self, user: i64, version: u64) -> Option<Instant> {
        self.of(user).iter().find(|it| it.version > version).map(|it| it.when)
    }

    fn of(&self, user: i64) -> MutexGuard<'_, Vec<Acknowledged>> {
        self.users[usize::try_from(user - 1).expect("users begin with 1")].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Traffic {
    ledger: Arc<Ledger>,
    writers: JoinSet<Written>,
    readers: JoinSet<Seen>,
    done: Arc<AtomicBool>,
}

/// What writers met.
#[derive(Debug, Default)]
pub struct Written {
    pub binds: usize,
    pub refused: Vec<String>,
    pub slowest: Duration,
}

/// What the reader of one node met.
#[derive(Debug, Default)]
pub struct Seen {
    pub node: usize,
    pub took: Vec<Duration>,
    pub refused: Vec<String>,
    /// Answers that must not be.
    pub complaints: Vec<String>,
    /// How far the oldest answer was behind.
    pub oldest: Duration,
}

impl Traffic {
    /// Binds of users 1 to `users` through all nodes in turn, and a reader on each node.
    pub fn start(cluster: &Cluster, users: i64) -> Self {
        Self::start_with(cluster, users, WRITERS)
    }

    /// The same with so many callers that bind, each users of its own.
    pub fn start_with(cluster: &Cluster, users: i64, callers: i64) -> Self {
        let ledger = Ledger { users: (0..users).map(|_| Mutex::default()).collect(), binds: watch::Sender::new(0) };
        let (ledger, done) = (Arc::new(ledger), Arc::new(AtomicBool::new(false)));
        let (mut writers, mut readers) = (JoinSet::new(), JoinSet::new());
        for first in 1..=callers {
            let nodes = cluster.nodes.iter().map(|node| node.new_connection()).collect();
            let mine = (1..=users).filter(|user| user % callers == first % callers).collect();
            writers.spawn(write(nodes, mine, ledger.clone(), done.clone()));
        }
        for (node, running) in cluster.nodes.iter().enumerate() {
            readers.spawn(read((node, running.new_connection()), users, ledger.clone(), done.clone()));
        }
        Self { ledger, writers, readers, done }
    }

    /// Waits for so many more binds.
    pub async fn goes_on(&self, binds: u64) {
        let mut count = self.ledger.binds.subscribe();
        let before = *count.borrow();
        let more = tokio::time::timeout(allowed(PROGRESS_DEADLINE), count.wait_for(|count| *count >= before + binds)).await;
        assert!(more.is_ok_and(|more| more.is_ok()), "not {binds} binds within {PROGRESS_DEADLINE:?}");
    }

    /// What was acknowledged of each user last.
    pub fn acknowledged(&self) -> Vec<(i64, u64)> {
        let now = Instant::now();
        let users = 1..=i64::try_from(self.ledger.users.len()).expect("a number of users");
        users.map(|user| (user, self.ledger.version_at(user, now, None))).collect()
    }

    /// Ends it, and insists that nothing was seen that must not be.
    pub async fn stop(self) -> (Written, Vec<Seen>) {
        self.done.store(true, Ordering::Relaxed);
        let mut written = Written::default();
        for one in self.writers.join_all().await {
            written.binds += one.binds;
            written.refused.extend(one.refused);
            written.slowest = written.slowest.max(one.slowest);
        }
        println!("{} binds, {} refused, the slowest took {:?}", written.binds, written.refused.len(), written.slowest);
        let mut seen = self.readers.join_all().await;
        for reader in &mut seen {
            let (p50, p99) = (percentile(&mut reader.took, 0.5), percentile(&mut reader.took, 0.99));
            let max = percentile(&mut reader.took, 1.0);
            println!(
                "node {}: {} reads (p50 {p50:?}, p99 {p99:?}, max {max:?}), {} refused, at most {:?} behind",
                reader.node,
                reader.took.len(),
                reader.refused.len(),
                reader.oldest
            );
        }
        let complaints: Vec<&String> = seen.iter().flat_map(|reader| &reader.complaints).collect();
        assert!(complaints.is_empty(), "{complaints:#?}");
        (written, seen)
    }
}

async fn write(mut nodes: Vec<Presence>, users: Vec<i64>, ledger: Arc<Ledger>, done: Arc<AtomicBool>) -> Written {
    let mut written = Written::default();
    for turn in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let user = users[turn % users.len()];
        let node = (turn / users.len() + turn) % nodes.len();
        let began = Instant::now();
        let answer = nodes[node].bind_route(a_bind(user, PHONE, &format!("c-{turn}"))).await;
        written.slowest = written.slowest.max(began.elapsed());
        match answer.map(tonic::Response::into_inner) {
            Ok(bind) if code(&bind.result) == Code::Ok => {
                written.binds += 1;
                ledger.add(user, Acknowledged { when: Instant::now(), node, version: bind.version });
            }
            other => written.refused.push(format!("{other:?}")),
        }
        tokio::time::sleep(PACE).await;
    }
    written
}

async fn read((node, mut client): (usize, Presence), users: i64, ledger: Arc<Ledger>, done: Arc<AtomicBool>) -> Seen {
    let mut seen = Seen { node, ..Seen::default() };
    let mut newest = vec![0; usize::try_from(users).expect("a number of users") + 1];
    for turn in 0.. {
        if done.load(Ordering::Relaxed) {
            break;
        }
        let user = turn % users + 1;
        let asked = Instant::now();
        match client.query_route(QueryRouteReq { user_id: user, max_staleness_ms: None }).await {
            Ok(answer) => {
                seen.took.push(asked.elapsed());
                let newest = &mut newest[usize::try_from(user).expect("a user")];
                seen.compare(&answer.into_inner(), asked, (user, newest), &ledger);
            }
            Err(refused) => seen.refused.push(format!("{refused:?}")),
        }
        tokio::time::sleep(PACE).await;
    }
    seen
}

impl Seen {
    fn compare(&mut self, answer: &QueryRouteResp, asked: Instant, (user, newest): (i64, &mut u64), ledger: &Ledger) {
        if let Some(since) = ledger.outdated_since(user, answer.version) {
            self.oldest = self.oldest.max(asked.saturating_duration_since(since));
        }
        let age = Duration::from_millis(answer.age_ms.into()) + ROUNDING;
        let claimed = asked.checked_sub(age).map_or(0, |when| ledger.version_at(user, when, None));
        let own = ledger.version_at(user, asked, Some(self.node));
        for (expected, why) in [
            (claimed, "is further behind than it says"),
            (own, "is older than what this node acknowledged"),
            (*newest, "is older than a former answer of this node"),
        ] {
            if answer.version < expected && self.complaints.len() < MAX_COMPLAINTS {
                let behind = ledger.outdated_since(user, answer.version).map(|since| asked.saturating_duration_since(since));
                let (version, source, age_ms) = (answer.version, answer.source(), answer.age_ms);
                self.complaints.push(format!(
                    "node {}, user {user}: version {version} {why}; expected {expected}; {source:?}, age_ms {age_ms}, behind {behind:?}",
                    self.node
                ));
            }
        }
        *newest = (*newest).max(answer.version);
    }
}

/// What Redis and the nodes have to say of a user.
struct Truth {
    user: i64,
    version: u64,
    gateway: Option<String>,
}

/// Nobody changes anything any more: waits until the records and the two keys of all users are as SQL has them, and every node
/// answers so.
pub async fn everything_agrees_with_sql(cluster: &Cluster, users: RangeInclusive<i64>, deadline: Duration) {
    let get = async |names: Vec<String>| cluster.cache().client().await.get_many(&names).await;
    everything_agrees(cluster, users, deadline, "user:record:{}", get).await;
}

/// The same with keys that `get` reads, and records of this name.
pub async fn everything_agrees(
    cluster: &Cluster,
    users: RangeInclusive<i64>,
    deadline: Duration,
    record: &str,
    get: impl AsyncFn(Vec<String>) -> Vec<Option<Vec<u8>>>,
) {
    let mut truth = Vec::new();
    for user in users {
        let answer = cluster.node().query_sql(user).await;
        truth.push(Truth { user, version: answer.version, gateway: answer.is_online.then_some(answer.gateway_addr) });
    }
    let began = Instant::now();
    loop {
        let mut differences = differences_in_redis(cluster, &truth, record, &get).await;
        for node in &cluster.nodes {
            for Truth { user, version, .. } in &truth {
                let answer = node.query(*user).await;
                if answer.version != *version {
                    differences.push(format!("user {user}: {version} in SQL, but {answer:?}"));
                }
            }
        }
        if differences.is_empty() {
            println!("everything agrees with SQL after {:?}", began.elapsed());
            return;
        }
        let some = &differences[..differences.len().min(MAX_COMPLAINTS)];
        assert!(began.elapsed() < allowed(deadline), "after {deadline:?} {} things differ: {some:#?}", differences.len());
        tokio::time::sleep(PACE).await;
    }
}

async fn differences_in_redis(
    cluster: &Cluster,
    truth: &[Truth],
    record: &str,
    get: &impl AsyncFn(Vec<String>) -> Vec<Option<Vec<u8>>>,
) -> Vec<String> {
    let generation = cluster.db.number("SELECT generation FROM cluster").await;
    let mut differences = Vec::new();
    for page in truth.chunks(500) {
        let names = page.iter().flat_map(|it| {
            let user = it.user.to_string();
            [format!("user:route:{user}"), format!("user:status:{user}"), record.replace("{}", &user)]
        });
        let values = get(names.collect()).await;
        for (it, values) in page.iter().zip(values.chunks(3)) {
            let text = |value: &Option<Vec<u8>>| value.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            let (route, status, record) = (text(&values[0]), text(&values[1]), text(&values[2]));
            // Generation and version stand in front, as text.
            let number = |at: usize| record.as_ref().and_then(|record| record.get(at..at + 20)?.parse::<u64>().ok());
            let current = number(0).is_some_and(|of| i64::try_from(of) == Ok(generation));
            let record_differs = if current { number(20) != Some(it.version) } else { it.gateway.is_some() };
            let status_differs = match &it.gateway {
                Some(_) => status.as_deref() != Some("online"),
                None => status.as_deref().is_some_and(|status| status != "offline"),
            };
            if route != it.gateway || status_differs || record_differs {
                let found = (number(0), number(20));
                differences.push(format!(
                    "user {}: {} and {:?} in SQL, generation {generation}; {route:?}, {status:?}, record {found:?} in Redis",
                    it.user, it.version, it.gateway
                ));
            }
        }
    }
    differences
}
