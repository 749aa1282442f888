//! Users leave a gateway in order: nobody is offline meanwhile, no message is lost, and whoever carries it out may die.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::Reason;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::node_frame::Body as Down;
use tokio::task::JoinSet;
use tonic::Code as Grpc;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::proxy::Proxy;
use crate::harness::stream::Devices;
use crate::harness::stream::RawStream;
use crate::harness::stream::TestGateway;

const SOON: Duration = Duration::from_secs(10);
/// A drain waits 2 s, and a node that dies keeps the others from going on for 10 s.
const DONE_WITHIN: Duration = Duration::from_secs(40);
/// Between a client's looks whether it was told something.
const LOOK: Duration = Duration::from_millis(20);
const QUICK: &[(&str, &str)] = &[("DRAIN__RATE", "200"), ("DRAIN__SETTLE", "1"), ("GATEWAY__HEARTBEAT_INTERVAL", "500")];

/// What the clients of a gateway do that are asked to go.
#[derive(Clone, Copy, PartialEq)]
enum Clients {
    /// They connect elsewhere, and then leave.
    Follow,
    /// Every third comes back to where it was, the first time.
    SomeComeBack,
    /// They have not heard it.
    Stay,
}

/// Gateways whose clients do as they are told, and all that they were told.
struct World {
    gateways: Vec<Arc<TestGateway>>,
    clients: JoinSet<()>,
    asked: Arc<Mutex<Vec<(Instant, pb::Kick)>>>,
}

impl World {
    /// `gw-0:7000` and so on, each attached to whichever node answers.
    async fn start(cluster: &Cluster, gateways: usize, clients: Clients) -> Self {
        let mut all = Vec::new();
        for n in 0..gateways {
            all.push(Arc::new(TestGateway::start(&cluster.nodes, &addr(n), Devices::Acknowledge).await));
        }
        let mut world = Self { gateways: all, clients: JoinSet::new(), asked: Arc::default() };
        for n in 0..gateways {
            world.clients.spawn(live(world.gateways.clone(), n, clients, world.asked.clone()));
        }
        world
    }

    /// What was asked of clients so far.
    fn asked(&self) -> Vec<(Instant, pb::Kick)> {
        lock(&self.asked).clone()
    }
}

/// The clients of one gateway.
async fn live(gateways: Vec<Arc<TestGateway>>, own: usize, clients: Clients, asked: Arc<Mutex<Vec<(Instant, pb::Kick)>>>) {
    let (mut moving, mut moved, mut came_back) = (JoinSet::new(), 0, BTreeSet::new());
    loop {
        for kick in gateways[own].take_moves() {
            lock(&asked).push((Instant::now(), kick.clone()));
            moved += 1;
            let comes_back = clients == Clients::SomeComeBack && kick.user_id % 3 == 0 && came_back.insert(kick.user_id);
            let to = match comes_back {
                true => own,
                false => gateways.iter().position(|to| kick.reconnect_to.first() == Some(&to.addr)).expect("a gateway"),
            };
            if clients != Clients::Stay {
                let (to, conn) = (gateways[to].clone(), format!("m-{own}-{moved}"));
                moving.spawn(async move {
                    tokio::time::sleep(Duration::from_millis(kick.reconnect_after_ms.into())).await;
                    to.bind(kick.user_id, &kick.device_id, &conn).await;
                });
            }
        }
        while let Some(bound) = moving.try_join_next() {
            bound.expect("bound");
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn addr(n: usize) -> String {
    format!("gw-{n}:7000")
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drain_of(gateway: &str) -> pb::DrainGatewayReq {
    pb::DrainGatewayReq { gateway_addr: gateway.to_owned(), reason: "new version".to_owned(), ..Default::default() }
}

impl Node {
    async fn drain(&self, request: pb::DrainGatewayReq) -> pb::DrainGatewayResp {
        self.operator().drain_gateway(request).await.expect("an answer").into_inner()
    }

    /// Orders it, and insists that it begins.
    async fn begin_drain(&self, request: pb::DrainGatewayReq) -> pb::Drained {
        let answer = self.drain(request).await;
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer.drain.expect("a drain")
    }

    async fn drains(&self) -> Vec<pb::Drained> {
        self.operator().list_drains(pb::ListDrainsReq::default()).await.expect("a list").into_inner().drains
    }

    /// The newest.
    async fn newest_drain(&self) -> pb::Drained {
        self.drains().await.into_iter().next().expect("a drain")
    }

    async fn drain_is(&self, state: &str, within: Duration) -> pb::Drained {
        eventually(state, within, async || self.newest_drain().await.state == state).await;
        self.newest_drain().await
    }

    /// How many of these users are where, as SQL has it.
    async fn where_are(&self, users: std::ops::RangeInclusive<i64>) -> BTreeMap<String, usize> {
        let mut places = BTreeMap::new();
        for user in self.query_all(users).await {
            *places.entry(user.gateway_addr).or_default() += 1;
        }
        places
    }
}

/// Messages and questions, all the time.
struct Watchers {
    tasks: JoinSet<()>,
    sent: Arc<AtomicUsize>,
    asked: Arc<AtomicUsize>,
    wrong: Arc<Mutex<Vec<String>>>,
}

impl Watchers {
    /// Sends to the users in turn, waits until a device has it, and asks every node whether anybody is offline.
    fn start(nodes: &[Node], users: i64) -> Self {
        let (sent, asked, wrong) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default(), Arc::default());
        let mut tasks = JoinSet::new();
        for node in nodes {
            for first in 1..=4 {
                tasks.spawn(send(node.new_connection(), users, first, sent.clone(), Arc::clone(&wrong)));
            }
            tasks.spawn(ask(node.new_connection(), users, asked.clone(), Arc::clone(&wrong)));
        }
        Self { tasks, sent, asked, wrong }
    }

    /// Ends them, and insists that nothing went wrong.
    async fn stop(mut self, what: &str, cluster: &Cluster) {
        self.tasks.shutdown().await;
        let stored = async || cluster.db.number("SELECT COUNT(*) FROM inbox").await == 0;
        eventually("what was stored has arrived", DONE_WITHIN, stored).await;
        let (sent, asked) = (self.sent.load(Ordering::Relaxed), self.asked.load(Ordering::Relaxed));
        println!("{what}: {sent} messages acknowledged, {asked} times nobody was offline");
        assert!(sent > 0 && asked > 0);
        assert_eq!(*lock(&self.wrong), Vec::<String>::new());
    }
}

async fn send(
    mut node: crate::harness::node::Presence,
    users: i64,
    first: i64,
    sent: Arc<AtomicUsize>,
    wrong: Arc<Mutex<Vec<String>>>,
) {
    for n in 0_i64.. {
        let user_id = (first * 7_919 + n * 31) % users + 1;
        let request = pb::DeliverReq {
            user_id,
            message: "hello".to_owned(),
            ack_timeout_ms: 2_000,
            store_offline: true,
            ..Default::default()
        };
        match node.deliver(request).await {
            Ok(answer) if answer.get_ref().delivered || answer.get_ref().stored => _ = sent.fetch_add(1, Ordering::Relaxed),
            // The node was killed; whoever has sent it asks another one.
            Err(status) if matches!(status.code(), Grpc::Unavailable | Grpc::Unknown | Grpc::Cancelled) => return,
            other => lock(&wrong).push(format!("user {user_id}: {other:?}")),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ask(mut node: crate::harness::node::Presence, users: i64, asked: Arc<AtomicUsize>, wrong: Arc<Mutex<Vec<String>>>) {
    loop {
        for first in (1..=users).step_by(10_000) {
            let user_ids = (first..=users.min(first + 9_999)).collect();
            let request = pb::BatchQueryRouteReq { user_ids, ..Default::default() };
            let Ok(answer) = node.batch_query_route(request).await else { return }; // it was killed
            let offline = answer.into_inner().users.into_iter().filter(|user| !user.is_online);
            lock(&wrong).extend(offline.map(|user| format!("user {} is offline", user.user_id)).take(5));
        }
        asked.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(LOOK).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_users_of_a_gateway_go_elsewhere_as_planned_and_nobody_is_offline_meanwhile() {
    const USERS: i64 = 300;
    let cluster = Cluster::with_redis(2, QUICK).await;
    let world = World::start(&cluster, 3, Clients::Follow).await;
    world.gateways[0].bind_all(1..=USERS).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let watchers = Watchers::start(&cluster.nodes, USERS);
    let dry = one.drain(pb::DrainGatewayReq { dry_run: true, ..drain_of(&addr(0)) }).await;
    let planned = dry.drain.expect("a plan");
    assert_eq!((code(&dry.result), planned.users, &*planned.state), (Code::Ok, 300, "planned"), "{planned:?}");
    assert_eq!((dry.plan.iter().map(|step| step.users).sum::<u64>(), planned.unheard), (300, 0));
    assert!((3..20).contains(&planned.eta_s), "{planned:?}");
    assert_eq!(one.drains().await, [], "a dry run changes nothing");
    let began = one.begin_drain(drain_of(&addr(0))).await;
    assert_eq!((&*began.state, began.users, &*began.reason), ("waiting", 300, "new version"));
    eventually("it hears that it is drained", SOON, async || world.gateways[0].is_drained()).await;
    let done = two.drain_is("done", DONE_WITHIN).await;
    assert_eq!((done.users, done.moved, done.left, done.unheard, &done.id), (300, 300, 0, 0, &began.id));
    watchers.stop("a drain of 300", &cluster).await;
    let (places, plan) = (two.where_are(1..=USERS).await, &dry.plan);
    println!("planned: {plan:?}; where they are: {places:?}");
    assert_eq!(places.len(), 2, "{places:?}");
    for step in plan {
        let got = *places.get(&step.to).expect("a planned one") as u64;
        assert!(got.abs_diff(step.users) <= 30, "{places:?}, but planned was {plan:?}");
    }
    for (_, kick) in world.asked() {
        assert_eq!((kick.reason(), kick.reconnect_to.len()), (Reason::Drain, 2), "{kick:?}");
        assert_eq!(kick.close_after_ms, kick.reconnect_after_ms + 10_000, "so long after it may come elsewhere: {kick:?}");
        assert!(!kick.reconnect_to.contains(&addr(0)), "{kick:?}");
    }
    eventually("whoever has gone is let go", SOON, async || world.gateways[0].kicks().len() == 300).await;
    assert!(world.gateways[0].kicks().iter().all(|kick| kick.reason() == Reason::Replaced));
    assert!(world.gateways[0].is_drained(), "it stays empty until it registers anew, or the drain is cancelled");
    let again = one.operator().cancel_drain(pb::CancelDrainReq { gateway_addr: addr(0), ..Default::default() }).await;
    assert_eq!(code(&again.expect("an answer").into_inner().result), Code::Ok);
    eventually("it takes users again", SOON, async || !world.gateways[0].is_drained()).await;
    let audit = "SELECT COUNT(*) FROM audit WHERE action IN ('DrainGateway', 'CancelDrain') AND outcome = 'ok'";
    eventually("both orders are taken down", SOON, async || cluster.db.number(audit).await == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_goes_on_with_a_drain_whose_node_is_killed() {
    const USERS: i64 = 400;
    let mut cluster = Cluster::with_redis(0, &[]).await;
    for name in ["one", "two"] {
        cluster.add_node(&[QUICK, &[("PRESENCE_SERVICE__NODE_ID", name), ("DRAIN__RATE", "40")]].concat()).await;
    }
    let world = World::start(&cluster, 3, Clients::Follow).await;
    world.gateways[0].bind_all(1..=USERS).await;
    cluster.node().begin_drain(drain_of(&addr(0))).await;
    let under_way = async || cluster.node().newest_drain().await.asked >= 120;
    eventually("30 % are asked", DONE_WITHIN, under_way).await;
    let by = cluster.node().newest_drain().await.node_id;
    let (victim, witness) = if by == "one" { (0, 1) } else { (1, 0) };
    cluster.nodes[victim].kill();
    let killed = Instant::now();
    let witness = &cluster.nodes[witness];
    eventually("the other one goes on", DONE_WITHIN, async || witness.newest_drain().await.node_id != by).await;
    println!("another node went on after {:?}", killed.elapsed());
    assert!(killed.elapsed() < allowed(Duration::from_secs(10)));
    let done = witness.drain_is("done", DONE_WITHIN).await;
    assert_eq!((done.left, done.moved), (0, 400));
    assert!(done.asked <= 440, "at most a second's users are asked twice: {done:?}");
    assert!(!witness.where_are(1..=USERS).await.contains_key(&addr(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_drain_stops_within_a_second_and_the_gateway_takes_users_again() {
    const USERS: i64 = 400;
    let cluster = Cluster::mariadb(2, &[QUICK, &[("DRAIN__RATE", "40")]].concat()).await;
    let world = World::start(&cluster, 2, Clients::Follow).await;
    world.gateways[0].bind_all(1..=USERS).await;
    let began = cluster.nodes[0].begin_drain(drain_of(&addr(0))).await;
    eventually("some are asked", DONE_WITHIN, async || world.asked().len() >= 80).await;
    let request = pb::CancelDrainReq { id: began.id.clone(), ..Default::default() };
    let cancelled = cluster.nodes[1].operator().cancel_drain(request.clone()).await.expect("an answer").into_inner();
    let at = Instant::now();
    assert_eq!(cancelled.drain.map(|drain| drain.state), Some("cancelled".to_owned()));
    // Whoever carries it out reads its row each half second; then nobody else is asked.
    tokio::time::sleep(allowed(Duration::from_secs(1))).await;
    let (then, asked) = (Instant::now(), world.asked().len());
    tokio::time::sleep(Duration::from_secs(2)).await;
    let late = world.asked().iter().filter(|(when, _)| *when > then).count();
    let last = world.asked().iter().map(|(when, _)| *when).max().map(|when| when.saturating_duration_since(at));
    println!("cancelled: the last user was asked {last:?} later");
    assert_eq!((late, world.asked().len()), (0, asked));
    assert!(asked < 400);
    eventually("it takes users again", SOON, async || !world.gateways[0].is_drained()).await;
    let stay = cluster.nodes[0].where_are(1..=USERS).await[&addr(0)];
    assert_eq!(stay, 400 - asked, "whoever was not asked is where they were");
    let again = cluster.nodes[0].operator().cancel_drain(request).await.expect("an answer").into_inner();
    assert_eq!(code(&again.result), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_who_come_back_to_a_drained_gateway_are_asked_again_and_the_drain_ends() {
    const USERS: i64 = 150;
    let cluster = Cluster::mariadb(1, QUICK).await;
    let world = World::start(&cluster, 2, Clients::SomeComeBack).await;
    world.gateways[0].bind_all(1..=USERS).await;
    cluster.node().begin_drain(drain_of(&addr(0))).await;
    let done = cluster.node().drain_is("done", DONE_WITHIN).await;
    assert_eq!((done.left, done.asked), (0, 200), "each third was asked twice: {done:?}");
    assert_eq!(cluster.node().where_are(1..=USERS).await, BTreeMap::from([(addr(1), 150)]));
}

/// A gateway that reads what it is told and does nothing about it.
struct Deaf {
    users: Arc<Mutex<BTreeMap<i64, Vec<pb::Kick>>>>,
    _reading: JoinSet<()>,
}

impl Deaf {
    async fn start(node: &Node, addr: &str, users: i64) -> Self {
        let (mut stream, epoch) = RawStream::attach(node, addr, 0).await;
        node.bind_all(1..=users, addr, epoch).await;
        let (told, mut reading) = (Arc::<Mutex<BTreeMap<i64, Vec<pb::Kick>>>>::default(), JoinSet::new());
        let heard = told.clone();
        let addr = addr.to_owned();
        reading.spawn(async move {
            let mut beat = tokio::time::interval(Duration::from_millis(500));
            loop {
                tokio::select! {
                    _ = beat.tick() => {
                        let beat = pb::HeartbeatReq { gateway_addr: addr.clone(), gateway_epoch: epoch, ..Default::default() };
                        stream.send(0, Up::Heartbeat(beat)).await;
                    }
                    frame = stream.wait() => match frame {
                        Some(pb::NodeFrame { body: Some(Down::Kick(kick)), .. }) => lock(&heard).entry(kick.user_id).or_default().push(kick),
                        Some(_) => {}
                        None => return,
                    },
                }
            }
        });
        Self { users: told, _reading: reading }
    }

    fn asked(&self) -> usize {
        lock(&self.users).len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_does_not_go_far_ahead_of_clients_who_do_not_come_back() {
    let settings = [QUICK, &[("DRAIN__RATE", "20"), ("DRAIN__OUTSTANDING", "2")]].concat();
    let cluster = Cluster::mariadb(1, &settings).await;
    let node = cluster.node();
    let _elsewhere = World::start(&cluster, 2, Clients::Follow).await;
    let deaf = Deaf::start(node, "deaf:7000", 200).await;
    node.begin_drain(drain_of("deaf:7000")).await;
    eventually("two seconds' users are asked", DONE_WITHIN, async || deaf.asked() == 40).await;
    let again = async || lock(&deaf.users).values().all(|kicks| kicks.len() >= 2);
    eventually("they are asked again, and nobody else", DONE_WITHIN, again).await;
    assert_eq!(deaf.asked(), 40);
    let of_one: Vec<_> = lock(&deaf.users)[&1].iter().map(|kick| kick.close_after_ms - kick.reconnect_after_ms).collect();
    assert_eq!(of_one[..2], [10_000, 0], "the second time they are to go as soon as they are expected elsewhere");
    // An operator who orders the same again changes what runs: now there is an end to it.
    let changed = node.begin_drain(pb::DrainGatewayReq { deadline_s: 1, rate: 30, ..drain_of("deaf:7000") }).await;
    assert_eq!((&*changed.state, changed.rate, node.drains().await.len()), ("running", 30, 1));
    let done = node.drain_is("done", DONE_WITHIN).await;
    assert_eq!(done.left, 0, "{done:?}");
    assert_eq!(node.online(1..=200).await, 0, "at the deadline their routes are removed");
    let told = async || lock(&deaf.users).values().filter(|kicks| kicks.iter().any(is_removal)).count() == 200;
    eventually("and their gateway is told", SOON, told).await;
    let causes = "SELECT COUNT(*) FROM status_log WHERE cause = 5";
    assert_eq!(cluster.db.number(causes).await, 200, "their history says that an operator did it");
}

fn is_removal(kick: &pb::Kick) -> bool {
    kick.reason() == Reason::Operator
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_who_do_not_go_are_closed_by_the_library_in_time() {
    let cluster = Cluster::sqlite(&[QUICK, &[("DRAIN__CLOSE_AFTER", "1")]].concat()).await;
    let world = World::start(&cluster, 2, Clients::Stay).await;
    world.gateways[0].bind_all(1..=20).await;
    cluster.node().begin_drain(drain_of(&addr(0))).await;
    let done = cluster.node().drain_is("done", DONE_WITHIN).await;
    assert_eq!((done.left, cluster.node().online(1..=20).await), (0, 0));
    assert_eq!(world.gateways[0].kicks().len(), 20, "each connection is to be closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_with_the_life_of_its_gateway() {
    let cluster = Cluster::mariadb(2, QUICK).await;
    let world = World::start(&cluster, 1, Clients::Follow).await;
    let deaf = Deaf::start(cluster.node(), "deaf:7000", 10).await;
    cluster.node().begin_drain(drain_of("deaf:7000")).await;
    eventually("they are asked", DONE_WITHIN, async || deaf.asked() == 10).await;
    let epoch = cluster.node().newest_drain().await.epoch;
    assert_eq!(cluster.node().deregister("deaf:7000", epoch).await, Code::Ok);
    cluster.node().drain_is("ended", SOON).await;
    let gone = cluster.node().drain(drain_of("deaf:7000")).await;
    assert_eq!(code(&gone.result), Code::NotFound);
    drop(world);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateways_that_are_drained_together_send_nobody_to_each_other_and_a_share_leaves_the_rest() {
    let cluster = Cluster::mariadb(2, QUICK).await;
    let world = World::start(&cluster, 4, Clients::Follow).await;
    for n in 0..3 {
        world.gateways[n].bind_all((n as i64 * 100 + 1)..=(n as i64 * 100 + 100)).await;
    }
    let share = pb::DrainGatewayReq { share: 0.3, to: vec![addr(3)], ..drain_of(&addr(2)) };
    let dry = cluster.node().drain(pb::DrainGatewayReq { dry_run: true, ..share.clone() }).await;
    for n in [0, 1] {
        cluster.nodes[n].begin_drain(drain_of(&addr(n))).await;
    }
    cluster.nodes[1].begin_drain(share).await;
    let all_done = async || cluster.node().drains().await.iter().filter(|drain| drain.state == "done").count() == 3;
    eventually("all are done", DONE_WITHIN, all_done).await;
    let places = cluster.node().where_are(1..=300).await;
    assert!(!places.contains_key(&addr(0)) && !places.contains_key(&addr(1)), "{places:?}");
    for (_, kick) in world.asked() {
        assert!(!kick.reconnect_to.iter().any(|to| [addr(0), addr(1)].contains(to)), "{kick:?}");
    }
    assert!(!world.gateways[2].is_drained(), "a share leaves it open");
    let of_share: Vec<_> = world.asked().into_iter().filter(|(_, kick)| kick.reason() == Reason::Migrate).collect();
    assert!((15..=45).contains(&of_share.len()), "{}", of_share.len());
    assert!(of_share.iter().all(|(_, kick)| kick.reconnect_to == [addr(3)]), "only where it was said");
    assert!(dry.drain.expect("a plan").users.abs_diff(of_share.len() as u64) < 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_that_the_others_have_no_room_for_is_refused_unless_it_is_forced() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let deaf = Deaf::start(node, "deaf:7000", 10).await;
    let none = node.drain(drain_of("deaf:7000")).await;
    assert_eq!(code(&none.result), Code::Refused, "{none:?}");
    let request = pb::RegisterGatewayReq { gateway_addr: "small:7000".to_owned(), capacity: 5, ..Default::default() };
    let small = node.gateways().register_gateway(request).await.expect("a registration").into_inner();
    assert_eq!(code(&small.result), Code::Ok);
    let known = async || node.drain(pb::DrainGatewayReq { dry_run: true, ..drain_of("deaf:7000") }).await.plan.len() == 1;
    eventually("the small one is known", SOON, known).await;
    let dry = node.drain(pb::DrainGatewayReq { dry_run: true, ..drain_of("deaf:7000") }).await.result.expect("a result");
    assert_eq!((dry.code(), &dry.msg[..]), (Code::Ok, "capacity: the others have room for 4 users, 6 too few"));
    let refused = node.drain(drain_of("deaf:7000")).await.result.expect("a result");
    assert_eq!((refused.code(), refused.msg), (Code::Refused, dry.msg));
    assert_eq!(node.drains().await, []);
    node.begin_drain(pb::DrainGatewayReq { force: true, ..drain_of("deaf:7000") }).await;
    let done = node.drain_is("done", DONE_WITHIN).await;
    assert_eq!((done.left, done.pass, node.online(1..=10).await), (0, 2, 0), "who was asked twice and stays is removed");
    drop(deaf);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_of_the_last_release_is_not_told_to_drain_but_hears_it_with_its_heartbeats() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let _elsewhere = World::start(&cluster, 1, Clients::Follow).await;
    let (mut old, old_epoch) = RawStream::attach(node, "old:7000", 0).await;
    let (mut new, new_epoch) = RawStream::attach(node, "new:7000", 0).await;
    for gateway in ["old:7000", "new:7000"] {
        node.begin_drain(drain_of(gateway)).await;
    }
    let beat = |gateway: &str, gateway_epoch, routes_digest| pb::HeartbeatReq {
        gateway_addr: gateway.to_owned(),
        gateway_epoch,
        routes_digest,
        ..Default::default()
    };
    for (stream, beat, frames) in [
        (&mut old, beat("old:7000", old_epoch, None), ["draining", "draining"]),
        (&mut new, beat("new:7000", new_epoch, Some(0)), ["drain", "draining"]),
    ] {
        for seq in [7, 8] {
            stream.send(seq, Up::Heartbeat(beat.clone())).await;
        }
        for want in frames {
            let got = match stream.next().await.expect("a frame").body {
                Some(Down::Heartbeat(answer)) if answer.draining => "draining",
                Some(Down::Drain(drain)) if drain.reason() == Reason::Drain => "drain",
                other => panic!("{other:?}"),
            };
            assert_eq!(got, want, "{beat:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_for_other_users_waits_for_the_end_of_what_runs_and_a_share_opens_a_gateway_that_was_to_be_empty() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let world = World::start(&cluster, 2, Clients::Stay).await;
    let _deaf = Deaf::start(node, "deaf:7000", 100).await;
    let closed = async || cluster.db.number("SELECT COUNT(*) FROM lives WHERE draining = 1").await;
    let whole = node.begin_drain(drain_of("deaf:7000")).await;
    assert_eq!(closed().await, 1);
    let share = pb::DrainGatewayReq { share: 0.5, to: vec![addr(0)], ..drain_of("deaf:7000") };
    let moved = node.begin_drain(share.clone()).await;
    assert_eq!(closed().await, 0, "a share leaves it open");
    let states: BTreeMap<_, _> = node.drains().await.into_iter().map(|drain| (drain.id, drain.state)).collect();
    assert_eq!(states[&whole.id], "cancelled");
    let jobs = format!("SELECT COUNT(*) FROM jobs WHERE name = 'drain {}'", whole.id);
    eventually("nobody carries it out", SOON, async || cluster.db.number(&jobs).await == 0).await;
    let other = node.drain(pb::DrainGatewayReq { share: 0.6, ..share.clone() }).await.result.expect("a result");
    assert_eq!(other.code(), Code::Refused, "{other:?}");
    assert!(other.msg.starts_with("busy: a part of the users of deaf:7000 is being moved"), "{other:?}");
    let known = async || world.gateways.iter().all(|gateway| !gateway.is_drained());
    eventually("all is known", SOON, known).await;
    let rebalance = pb::RebalanceGatewaysReq::default();
    let levelled = node.operator().rebalance_gateways(rebalance).await.expect("an answer").into_inner();
    assert_eq!((code(&levelled.result), levelled.drains.len()), (Code::Refused, 0), "{levelled:?}");
    let same = node.begin_drain(pb::DrainGatewayReq { rate: 7, to: vec![addr(1)], ..share }).await;
    assert_eq!((same.id, same.rate), (moved.id, 7), "the same users may go elsewhere");
    let audit = "SELECT COUNT(*) FROM audit WHERE action IN ('DrainGateway', 'RebalanceGateways') AND outcome = 'failed'";
    eventually("what was refused is taken down so", SOON, async || cluster.db.number(audit).await == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_share_whose_only_target_dies_ends_where_it_is() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let _world = World::start(&cluster, 1, Clients::Stay).await;
    let target = node.register("target:7000").await;
    let _deaf = Deaf::start(node, "deaf:7000", 100).await;
    node.begin_drain(pb::DrainGatewayReq { share: 0.5, to: vec!["target:7000".to_owned()], ..drain_of("deaf:7000") }).await;
    assert_eq!(node.deregister("target:7000", target).await, Code::Ok);
    let done = node.drain_is("done", DONE_WITHIN).await;
    assert!(done.left > 0 && done.left == done.users - done.moved, "{done:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_force_all_are_removed_also_if_more_stay_than_may_be_on_their_way() {
    let settings = [QUICK, &[("DRAIN__RATE", "20"), ("DRAIN__OUTSTANDING", "1")]].concat();
    let cluster = Cluster::mariadb(1, &settings).await;
    let node = cluster.node();
    let _elsewhere = World::start(&cluster, 1, Clients::Follow).await;
    let deaf = Deaf::start(node, "deaf:7000", 50).await;
    node.begin_drain(pb::DrainGatewayReq { force: true, ..drain_of("deaf:7000") }).await;
    let done = node.drain_is("done", DONE_WITHIN * 2).await;
    assert_eq!((done.left, node.online(1..=50).await, deaf.asked()), (0, 0, 50), "each was asked first: {done:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_drain_that_is_cancelled_does_not_open_a_gateway_that_is_being_emptied() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let _world = World::start(&cluster, 1, Clients::Follow).await;
    let _deaf = Deaf::start(node, "deaf:7000", 0).await;
    let old = node.begin_drain(drain_of("deaf:7000")).await;
    node.drain_is("done", DONE_WITHIN).await;
    let new = node.begin_drain(pb::DrainGatewayReq { wait_s: 3_600, ..drain_of("deaf:7000") }).await;
    let cancel = async |request| node.operator().cancel_drain(request).await.expect("an answer").into_inner();
    assert_eq!(code(&cancel(pb::CancelDrainReq { id: old.id, ..Default::default() }).await.result), Code::Ok);
    let closed = async || cluster.db.number("SELECT COUNT(*) FROM lives WHERE draining = 1").await;
    assert_eq!(closed().await, 1, "another one empties it");
    let last = cancel(pb::CancelDrainReq { gateway_addr: "deaf:7000".to_owned(), ..Default::default() }).await;
    assert_eq!((last.drain.expect("a drain").id, closed().await), (new.id, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_be_told_is_not_said_to_be_moved() {
    let cluster = Cluster::sqlite(QUICK).await;
    let node = cluster.node();
    let _elsewhere = World::start(&cluster, 1, Clients::Follow).await;
    let epoch = node.register("mute:7000").await; // it has no stream, and there is no Redis
    node.bind_all(ALICE..=ALICE, "mute:7000", epoch).await;
    let migrate = async |dry_run| {
        let request = pb::MigrateUserReq { user_id: ALICE, dry_run, ..Default::default() };
        node.operator().migrate_user(request).await
    };
    assert_eq!(migrate(true).await.expect("a plan").into_inner().routes, 1);
    let unheard = migrate(false).await.expect_err("nobody took it");
    assert_eq!(unheard.code(), Grpc::Unavailable, "{unheard:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_are_levelled_however_many_devices_they_have() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let world = World::start(&cluster, 2, Clients::Stay).await;
    world.gateways[0].bind_all(1..=40).await;
    for user in 1..=40 {
        world.gateways[0].bind(user, "laptop", "c-2").await;
    }
    let request = pb::RebalanceGatewaysReq { dry_run: true, ..Default::default() };
    let dry = cluster.node().operator().rebalance_gateways(request).await.expect("an answer").into_inner();
    assert_eq!(dry.plan.iter().map(|step| step.users).sum::<u64>(), 18, "then 22 and 18: {dry:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn loads_are_levelled_with_the_fewest_moves() {
    const USERS: i64 = 800;
    let cluster = Cluster::mariadb(2, QUICK).await;
    let world = World::start(&cluster, 10, Clients::Follow).await;
    let mut next = 1;
    for n in 0..10 {
        let users = if n < 5 { 120 } else { 40 };
        world.gateways[n].bind_all(next..next + users).await;
        next += users;
    }
    let node = cluster.node();
    let order = pb::RebalanceGatewaysReq { reason: "new gateways".to_owned(), ..Default::default() };
    let rebalance = async |dry_run| {
        let request = pb::RebalanceGatewaysReq { dry_run, ..order.clone() };
        node.operator().rebalance_gateways(request).await.expect("an answer").into_inner()
    };
    let dry = rebalance(true).await;
    let moves: u64 = dry.plan.iter().map(|step| step.users).sum();
    assert_eq!((moves, dry.drains.len(), node.drains().await.len()), (160, 0, 0), "five have 32 too many each: {dry:?}");
    let real = rebalance(false).await;
    assert_eq!((real.plan, real.drains.len()), (dry.plan, 5));
    let all_done = async || node.drains().await.iter().filter(|drain| drain.state == "done").count() == 5;
    eventually("all are done", DONE_WITHIN, all_done).await;
    let places = node.where_are(1..=USERS).await;
    println!("{moves} planned, {} asked, then {places:?}", world.asked().len());
    assert!(places.len() == 10 && places.values().all(|users| (72..=88).contains(users)), "{places:?}");
    assert_eq!(world.asked().len() as u64, moves);
    assert_eq!(rebalance(true).await.plan, [], "nothing is left to do");
    assert!(world.gateways.iter().all(|gateway| !gateway.is_drained()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_user_is_moved_and_stays_online() {
    let cluster = Cluster::with_redis(2, QUICK).await;
    let world = World::start(&cluster, 3, Clients::Follow).await;
    world.gateways[0].bind(ALICE, PHONE, "c-1").await;
    world.gateways[0].bind(ALICE, "laptop", "c-2").await;
    let node = &cluster.nodes[1];
    let migrate =
        async |request: pb::MigrateUserReq| node.operator().migrate_user(request).await.expect("an answer").into_inner();
    let of_alice = pb::MigrateUserReq { user_id: ALICE, to: addr(2), ..Default::default() };
    let dry = migrate(pb::MigrateUserReq { dry_run: true, ..of_alice.clone() }).await;
    let to_it = vec![pb::MovePlan { from: addr(0), to: addr(2), users: 1 }];
    assert_eq!((code(&dry.result), dry.routes, &dry.plan), (Code::Ok, 2, &to_it));
    let phone = migrate(pb::MigrateUserReq { device_id: PHONE.to_owned(), ..of_alice.clone() }).await;
    assert_eq!((phone.routes, phone.plan), (1, to_it));
    let there = async || {
        node.query(ALICE).await.routes.iter().any(|route| (&*route.device_id, &*route.gateway_addr) == (PHONE, "gw-2:7000"))
    };
    eventually("the phone is there", SOON, there).await;
    assert_eq!(node.query(ALICE).await.routes.len(), 2);
    assert_eq!(world.asked()[0].1.reason(), Reason::Migrate);
    let rest = migrate(of_alice.clone()).await;
    assert_eq!(rest.routes, 1, "the phone is where it should be");
    let both = async || node.query(ALICE).await.routes.iter().all(|route| route.gateway_addr == addr(2));
    eventually("the laptop too", SOON, both).await;
    assert_eq!(code(&migrate(of_alice).await.result), Code::NotFound, "there is nothing left to move");
    assert_eq!(code(&migrate(pb::MigrateUserReq { user_id: BOB, ..Default::default() }).await.result), Code::NotFound);
    assert_eq!(migrate(pb::MigrateUserReq { user_id: ALICE, ..Default::default() }).await.routes, 2, "anywhere else");
    eventually("away", SOON, async || node.query(ALICE).await.routes.iter().all(|route| route.gateway_addr != addr(2))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_broken_stream_has_lost_is_asked_again_as_it_was() {
    let cluster = Cluster::mariadb(2, &[QUICK, &[("GATEWAY__STREAM_GRACE", "15000")]].concat()).await;
    let _elsewhere = World::start(&cluster, 1, Clients::Stay).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut broken, epoch) = RawStream::attach(one, "raw:7000", 0).await;
    broken.bind(ALICE, PHONE, "c").await;
    let migrated = async || {
        let request = pb::MigrateUserReq { user_id: ALICE, ..Default::default() };
        two.operator().migrate_user(request).await.expect("an answer").into_inner()
    };
    eventually("both gateways are known", SOON, async || migrated().await.routes == 1).await;
    drop(broken); // whatever is in it was not read
    let (mut next, again) = RawStream::attach(two, "raw:7000", epoch).await;
    assert_eq!(again, epoch);
    let kick = loop {
        if let Some(Down::Kick(kick)) = next.next().await.expect("a kick").body {
            break kick;
        }
    };
    assert_eq!(
        (kick.reason(), &kick.reconnect_to[..], kick.close_after_ms),
        (Reason::Migrate, &[addr(0)][..], 10_000),
        "{kick:?}"
    );
    assert!(two.query(ALICE).await.is_online);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_that_make_no_sense_change_nothing() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c")).await; // gw-1:7000 never registers
    node.register("gw-2:7000").await;
    let to = |to: &[&str]| to.iter().map(|to| (*to).to_owned()).collect::<Vec<_>>();
    let of = |gateway: &str| drain_of(gateway);
    let seconds = 8 * 86_400;
    for (request, part) in [
        (of(""), "gateway_addr: must be 1 to 255 bytes"),
        (of("gw-1:7000"), "gateway_addr: gw-1:7000 never registered"),
        (pb::DrainGatewayReq { to: to(&["gw-1:7000"]), ..of("gw-2:7000") }, "to: gw-1:7000 never registered"),
        (pb::DrainGatewayReq { to: to(&["gw-2:7000"]), ..of("gw-2:7000") }, "to: gw-2:7000 cannot take its own users"),
        (pb::DrainGatewayReq { to: to(&["gw-9:7000"]), ..of("gw-2:7000") }, "to: there is no gateway gw-9:7000"),
        (pb::DrainGatewayReq { to: vec![String::new(); 65], ..of("gw-2:7000") }, "to: must be at most 64 gateways"),
        (pb::DrainGatewayReq { share: 1.5, ..of("gw-2:7000") }, "share: must be from 0 to 1"),
        (pb::DrainGatewayReq { share: -0.5, ..of("gw-2:7000") }, "share: must be from 0 to 1"),
        (pb::DrainGatewayReq { share: f32::NAN, ..of("gw-2:7000") }, "share: must be from 0 to 1"),
        (pb::DrainGatewayReq { rate: 1_000_001, ..of("gw-2:7000") }, "rate: must be at most 1000000"),
        (pb::DrainGatewayReq { deadline_s: seconds, ..of("gw-2:7000") }, "deadline_s: must be at most 604800 s"),
        (pb::DrainGatewayReq { wait_s: seconds, ..of("gw-2:7000") }, "wait_s: must be at most 604800 s"),
        (pb::DrainGatewayReq { settle_s: seconds, ..of("gw-2:7000") }, "settle_s: must be at most 604800 s"),
        (pb::DrainGatewayReq { reason: "x".repeat(256), ..of("gw-2:7000") }, "reason: must be at most 255 bytes"),
    ] {
        let refused = node.operator().drain_gateway(request.clone()).await.expect_err("refused");
        assert_eq!(refused.code(), Grpc::InvalidArgument, "{request:?}: {refused:?}");
        assert!(refused.message().contains(part), "{request:.200?}: {}", refused.message());
    }
    let mut operator = node.operator();
    let both = pb::CancelDrainReq { gateway_addr: "gw-2:7000".to_owned(), id: "x".to_owned() };
    for request in [pb::CancelDrainReq::default(), both] {
        assert!(operator.cancel_drain(request).await.expect_err("refused").message().contains("either it or id"));
    }
    let list = pb::ListDrainsReq { page_size: 1_001, ..Default::default() };
    assert!(operator.list_drains(list).await.expect_err("refused").message().contains("page_size: must be at most 1000"));
    let list = pb::ListDrainsReq { page_token: "7".to_owned(), ..Default::default() };
    assert!(operator.list_drains(list).await.expect_err("refused").message().contains("page_token"));
    let rebalance = pb::RebalanceGatewaysReq { tolerance: 2.0, ..Default::default() };
    assert!(operator.rebalance_gateways(rebalance).await.expect_err("refused").message().contains("tolerance"));
    let migrate = pb::MigrateUserReq { user_id: 0, ..Default::default() };
    assert!(operator.migrate_user(migrate).await.expect_err("refused").message().contains("user_id"));
    assert_eq!(code(&node.drain(drain_of("gw-9:7000")).await.result), Code::NotFound);
    assert_eq!(node.drains().await, []);
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives WHERE draining = 1").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_whose_caller_goes_away_is_carried_out_and_taken_down() {
    let server = MariaDb::shared();
    let proxy = Proxy::start(server.port).await;
    let mut cluster = Cluster::mariadb(0, &[]).await;
    cluster.add_node_through(&proxy, QUICK).await;
    let node = cluster.node();
    let _world = World::start(&cluster, 2, Clients::Follow).await;
    proxy.hold_requests("INSERT INTO drains"); // on a connection for transactions: it would not keep the gateway from beating
    let mut operator = node.operator();
    let order = tokio::spawn(async move { operator.drain_gateway(drain_of(&addr(0))).await });
    proxy.struck().await;
    order.abort();
    assert!(order.await.expect_err("it is not waited for").is_cancelled());
    proxy.release();
    let audit = "SELECT COUNT(*) FROM audit WHERE action = 'DrainGateway' AND outcome = 'ok'";
    eventually("it is taken down", SOON, async || cluster.db.number(audit).await == 1).await;
    assert_eq!(node.drains().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn drains_are_listed_a_page_at_a_time_and_forgotten_after_a_month() {
    let cluster = Cluster::mariadb(1, QUICK).await;
    let node = cluster.node();
    let _world = World::start(&cluster, 3, Clients::Follow).await;
    for gateway in [0, 1, 0] {
        node.begin_drain(drain_of(&addr(gateway))).await;
        let request = pb::CancelDrainReq { gateway_addr: addr(gateway), ..Default::default() };
        node.operator().cancel_drain(request).await.expect("an answer");
        eventually("it is open again", SOON, async || {
            cluster.db.number("SELECT COUNT(*) FROM lives WHERE draining = 1").await == 0
        })
        .await;
    }
    let list = async |request: pb::ListDrainsReq| node.operator().list_drains(request).await.expect("a list").into_inner();
    let (mut ids, mut request) = (Vec::new(), pb::ListDrainsReq { page_size: 2, ..Default::default() });
    loop {
        let page = list(request.clone()).await;
        ids.extend(page.drains.iter().map(|drain| drain.id.clone()));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
    }
    assert_eq!((ids.len(), ids.iter().collect::<BTreeSet<_>>().len()), (3, 3));
    let of_one = list(pb::ListDrainsReq { gateway_addr: addr(0), ..Default::default() }).await;
    assert_eq!(of_one.drains.len(), 2);
    assert_eq!(list(pb::ListDrainsReq { active_only: true, ..Default::default() }).await.drains, []);
    let kept = node.begin_drain(drain_of(&addr(2))).await;
    node.drain_is("done", DONE_WITHIN).await;
    cluster.db.clock_was_steady().await;
    cluster.db.run("UPDATE drains SET began_ms = began_ms - 2592000001, ended_ms = ended_ms - 2592000001").await;
    let mut cluster = cluster;
    cluster.nodes[0].restart_with(&[]).await; // it looks when it starts, and each hour
    eventually("they are forgotten", DONE_WITHIN, async || cluster.db.number("SELECT COUNT(*) FROM drains").await == 1).await;
    assert_eq!(cluster.node().newest_drain().await.id, kept.id, "it keeps a gateway closed, and can still be cancelled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operators_move_users_from_a_shell() {
    let cluster = Cluster::sqlite(QUICK).await;
    let node = cluster.node();
    let world = World::start(&cluster, 2, Clients::Follow).await;
    world.gateways[0].bind_all(1..=20).await;
    let says = |words: &[&str], exit: i32, parts: &[&str]| {
        let (got, text) = node.ctl(words);
        assert!(got == exit && parts.iter().all(|part| text.contains(part)), "{words:?}: {got}, {text}");
        text
    };
    says(&["migrate", "1", "--dry-run"], 0, &["1 device of user 1 would be asked to go", "FROM", "gw-0:7000  gw-1:7000  1"]);
    says(&["migrate", "99"], 3, &["user 99 was not asked to go (NOT_FOUND)"]);
    says(&["rebalance", "--dry-run"], 0, &["9 users would move", "gw-0:7000  gw-1:7000  9"]);
    says(&["rebalance", "--label", "zone"], 2, &[]);
    says(&["drain", "gw-0:7000", "--dry-run"], 0, &["20 users of gw-0:7000 would go in", "gw-0:7000  gw-1:7000  20"]);
    says(&["drain", "gw-9:7000"], 3, &["gw-9:7000 is not drained (NOT_FOUND): no gateway gw-9:7000 lives"]);
    says(&["drains"], 0, &["no drains"]);
    let text = says(&["drain", "gw-0:7000", "--watch", "--reason", "new version"], 0, &["20 users of gw-0:7000 are asked to go"]);
    let last = text.lines().last().expect("a line");
    assert!(last.starts_with("gw-0:7000  done   20     20     0"), "{text}");
    let gateways = says(&["gateways"], 0, &["gw-0:7000"]);
    assert!(gateways.lines().any(|line| line.starts_with("gw-0:7000") && line.contains(" draining ")), "{gateways}");
    says(&["drains", "--json"], 0, &["\"state\":\"done\"", "\"reason\":\"new version\""]);
    says(&["cancel-drain", "gw-0:7000"], 0, &["the drain of gw-0:7000 is cancelled: 20 users have gone, 0 are left"]);
    says(&["cancel-drain", "gw-0:7000"], 3, &["nothing was cancelled (NOT_FOUND)"]);
    says(&["cancel-drain"], 2, &[]);
}

/// 20,000 users of `gw-0:7000` leave at 2,000 a second, with messages. Returns what is left to look at: the cluster, the world, the
/// drain, and which node carries it out.
async fn twenty_thousand_leave() -> (Cluster, World, Watchers, usize) {
    let mut cluster = Cluster::with_redis(0, &[]).await;
    for name in ["0", "1"] {
        cluster.add_node(&[("PRESENCE_SERVICE__NODE_ID", name), ("DRAIN__SETTLE", "3")]).await;
    }
    let world = World::start(&cluster, 6, Clients::Follow).await;
    for first in (1..=MANY).step_by(2_000) {
        world.gateways[0].bind_all(first..first + 2_000).await;
    }
    let order = pb::DrainGatewayReq { rate: 2_000, ..drain_of(&addr(0)) };
    let dry = cluster.node().drain(pb::DrainGatewayReq { dry_run: true, ..order.clone() }).await;
    println!("planned: {:?}, {} s", dry.plan, dry.drain.map_or(0, |drain| drain.eta_s));
    cluster.node().begin_drain(order).await;
    let is_taken = async || !cluster.node().newest_drain().await.node_id.is_empty();
    eventually("a node carries it out", SOON, is_taken).await;
    let by = cluster.node().newest_drain().await.node_id.parse().expect("0 or 1");
    let watchers = Watchers::start(&cluster.nodes[1 - by..2 - by], MANY);
    (cluster, world, watchers, by)
}

const MANY: i64 = 20_000;

async fn asked(node: &Node, users: u64) {
    eventually("they are asked", DONE_WITHIN, async || node.newest_drain().await.asked >= users).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_users_leave_while_messages_flow_and_the_node_in_charge_is_killed() {
    if !long() {
        return println!("only in the long form: IM_PRESENCE_LONG=1");
    }
    let _turn = heavy().await;
    let (mut cluster, world, watchers, by) = twenty_thousand_leave().await;
    let began = Instant::now();
    asked(&cluster.nodes[1 - by], 6_000).await;
    cluster.nodes[by].kill();
    let (killed, witness) = (Instant::now(), &cluster.nodes[1 - by]);
    let goes_on = async || witness.newest_drain().await.node_id != by.to_string();
    eventually("another node goes on", DONE_WITHIN, goes_on).await;
    println!("the node in charge was killed at 30 %; another went on after {:?}", killed.elapsed());
    let done = witness.drain_is("done", Duration::from_secs(120)).await;
    println!("done after {:?}: {done:?}", began.elapsed());
    watchers.stop("20,000 users, node killed", &cluster).await;
    println!("asked {} times; where they are: {:?}", world.asked().len(), everywhere(witness).await);
    assert_eq!((done.left, done.moved), (0, 20_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_drain_of_twenty_thousand_users_is_cancelled_at_sixty_percent() {
    if !long() {
        return println!("only in the long form: IM_PRESENCE_LONG=1");
    }
    let _turn = heavy().await;
    let (cluster, world, watchers, _) = twenty_thousand_leave().await;
    asked(cluster.node(), 12_000).await;
    let request = pb::CancelDrainReq { gateway_addr: addr(0), ..Default::default() };
    let cancelled = cluster.nodes[1].operator().cancel_drain(request).await.expect("an answer").into_inner();
    let at = Instant::now();
    assert_eq!(code(&cancelled.result), Code::Ok);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let last = world.asked().iter().map(|(when, _)| *when).max().expect("some").saturating_duration_since(at);
    let places = everywhere(cluster.node()).await;
    println!("cancelled; the last user was asked {last:?} later; {} were asked; where they are: {places:?}", world.asked().len());
    watchers.stop("20,000 users, cancelled", &cluster).await;
    assert!(last < Duration::from_secs(1), "{last:?}");
    assert_eq!(places[&addr(0)], 20_000 - world.asked().len());
}

/// Where all of them are.
async fn everywhere(node: &Node) -> BTreeMap<String, usize> {
    let mut places = BTreeMap::new();
    for first in (1..=MANY).step_by(2_000) {
        for (place, users) in node.where_are(first..=first + 1_999).await {
            *places.entry(place).or_default() += users;
        }
    }
    places
}
