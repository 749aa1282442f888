//! One run: everything starts, callers call, things break and are mended, and what was told is checked.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

use crate::callers::Callers;
use crate::check::Bounds;
use crate::check::Violation;
use crate::check::check;
use crate::edges::AtLast;
use crate::edges::Edge;
use crate::faults::Nemesis;
use crate::history::At;
use crate::history::History;
use crate::history::Outcome;
use crate::history::Recorder;
use crate::history::Sent;
use crate::watchers::watch;
use crate::world::DOUBT;
use crate::world::LEASE;
use crate::world::NODES;
use crate::world::World;

const USERS: i64 = 300;
const CALLERS: u64 = 24;
const EDGES: usize = 6;
/// A channel whose other end has not answered for so long is made anew.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
const SECOND: At = 1_000_000;
/// Asked again, if there is no answer although nothing is broken.
const LAST_ATTEMPTS: usize = 10;
const SHOWN: usize = 20;

/// How far a node's knowledge of lives may be behind (3 s), and what a busy machine adds.
const BOUNDS: Bounds = Bounds { late: 45 * SECOND, over: 5 * SECOND, silent: (LEASE.as_secs() + DOUBT.as_secs() + 6) * SECOND };

pub struct Plan {
    pub seed: u64,
    pub time: Duration,
}

pub async fn run(plan: Plan) -> Vec<Violation> {
    let mut world = World::start(plan.seed).await;
    let recorder = Arc::new(Recorder::default());
    let channels: Vec<Channel> = world.nodes.iter().map(|node| channel(&node.data.to_string())).collect();
    let mut random = fastrand::Rng::with_seed(plan.seed);
    let (calm, quiet, stop) = (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
    let mut rest = JoinSet::new();
    let edges: Vec<Arc<Edge>> = (0..EDGES).map(|n| Edge::new(format!("gw-{n}:7000"), recorder.clone())).collect();
    for (n, edge) in edges.iter().enumerate() {
        let at_last = if n == 0 { AtLast::Dies } else { AtLast::Stays };
        rest.spawn(edge.clone().live(channels.clone(), random.fork(), (calm.clone(), at_last), stop.clone()));
    }
    for watcher in 0..NODES.len() {
        let users: Vec<i64> = (1..=USERS).collect();
        recorder.write().watchers.push(users.clone());
        rest.spawn(watch(watcher, users, channels.clone(), recorder.clone(), stop.clone()));
    }
    let callers = Callers::new(USERS, channels, edges, recorder.clone());
    let mut calling = JoinSet::new();
    for _ in 0..CALLERS {
        calling.spawn(callers.clone().call(random.fork(), quiet.clone()));
    }
    let mut nemesis = Nemesis::new(&mut world, &recorder, plan.seed);
    nemesis.rages(plan.time).await;
    let injected = std::mem::take(&mut nemesis.injected);
    calm.cancel();
    quiet.cancel();
    calling.join_all().await;
    world.is_well().await;
    look_at_the_end(&callers, &recorder).await;
    stop.cancel();
    rest.join_all().await;
    let history = recorder.take();
    let violations = check(&history, &BOUNDS);
    report(&plan, &history, &injected, &violations);
    violations
}

/// When everything has had the time that it may take: what each node says of each user, and what waits in the inboxes.
async fn look_at_the_end(callers: &Callers, recorder: &Recorder) {
    let healed = recorder.now();
    recorder.write().healed = healed;
    println!("{:>9.3} healed", healed as f64 / SECOND as f64);
    tokio::time::sleep(Duration::from_micros(BOUNDS.silent + SECOND)).await;
    for user in 1..=callers.users {
        for node in 0..NODES.len() {
            for limit in [Some(0), None] {
                let query = at_last(async || callers.query(user, node, limit).await).await;
                recorder.write().last_queries.push(query);
            }
        }
        let left = at_last(async || callers.inbox(user, 0).await).await;
        recorder.write().left.extend(left.into_iter().map(|(seq, text)| (user, seq, text)));
    }
}

async fn at_last<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    for _ in 0..LAST_ATTEMPTS {
        if let Some(answer) = ask().await {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    panic!("no answer, and nothing is broken");
}

fn channel(addr: &str) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("an address");
    let endpoint = endpoint.connect_timeout(Duration::from_secs(1)).http2_keep_alive_interval(KEEP_ALIVE);
    endpoint.keep_alive_timeout(KEEP_ALIVE).keep_alive_while_idle(true).connect_lazy()
}

fn report(plan: &Plan, history: &History, injected: &BTreeMap<String, usize>, violations: &[Violation]) {
    let mut kinds: BTreeMap<&str, (usize, &Violation)> = BTreeMap::new();
    for violation in violations {
        kinds.entry(violation.rule).or_insert((0, violation)).0 += 1;
    }
    for violation in violations.iter().take(SHOWN) {
        println!("VIOLATION {violation}");
    }
    for (rule, (times, first)) in &kinds {
        println!("VIOLATED {times} times: {rule}; first: {}", first.what);
    }
    let done = |outcomes: &mut dyn Iterator<Item = bool>| outcomes.filter(|done| *done).count();
    let binds = done(&mut history.binds.iter().map(|bind| matches!(bind.outcome, Outcome::Done(_))));
    let unbinds = done(&mut history.unbinds.iter().map(|unbind| matches!(unbind.outcome, Outcome::Done(_))));
    let sent = |what: Sent| history.messages.iter().filter(|message| message.sent == what).count();
    println!(
        "SUMMARY seed {} for {:?}: {} operations (binds {} of {} done, unbinds {} of {}, queries {}, messages {}: {} acknowledged, \
         {} taken, {} stored, {} for nobody, {} undelivered, {} without an answer), {} lives, {} tellings; faults {}: {}; violations {}",
        plan.seed,
        plan.time,
        history.operations(),
        binds,
        history.binds.len(),
        unbinds,
        history.unbinds.len(),
        history.queries.len(),
        history.messages.len(),
        sent(Sent::Acknowledged),
        sent(Sent::Taken),
        sent(Sent::Stored),
        sent(Sent::NotFound),
        sent(Sent::Undelivered),
        sent(Sent::Unknown),
        history.lives.len(),
        history.told.len(),
        injected.values().sum::<usize>(),
        injected.iter().map(|(name, times)| format!("{name} {times}")).collect::<Vec<_>>().join(", "),
        violations.len()
    );
}
