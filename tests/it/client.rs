//! The client library alone, as a gateway and a message service use it: whatever fails, its user writes no line for it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::caller::Caller;
use im_presence::client::fields;
use im_presence::client::gateway::Acker;
use im_presence::client::gateway::Connection;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Gateway;
use im_presence::client::gateway::Options;
use im_presence::pb;
use im_presence::pb::BatchDeliverReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::QueryRouteReq;
use tokio::task::JoinSet;

use crate::deliver::a_message;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::stream::connection;

const SOON: Duration = Duration::from_secs(10);
const USERS: i64 = 20;
/// How long the database is away: longer than nodes keep what they were told.
const OUTAGE: Duration = Duration::from_secs(6);
/// Longer than nodes that try again would wait; far less than a lease, which a gateway waits that was superseded.
const WHILE: Duration = Duration::from_secs(4);

/// A gateway with a phone of each user, and a service that writes to them.
struct Program {
    gateway: Gateway,
    caller: Caller,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    heard: HashSet<(i64, String)>,
    kicked: Vec<Connection>,
    epochs: Vec<u64>,
    detached: usize,
    superseded: usize,
    /// Acknowledgements that were not given.
    kept: Vec<Acker>,
}

impl Program {
    fn start(nodes: &[Node]) -> Self {
        Self::at(GATEWAY, nodes, |ack| {
            ack.taken(PHONE);
            None
        })
    }

    fn at(addr: &str, nodes: &[Node], acknowledge: impl Fn(Acker) -> Option<Acker> + Send + Sync + 'static) -> Self {
        let nodes: Vec<String> = nodes.iter().map(|node| node.data.to_string()).collect();
        let options = Options { nodes: nodes.clone(), gateway_addr: addr.to_owned(), ..Options::default() };
        let told = Arc::<Mutex<Told>>::default();
        let tell = told.clone();
        let gateway = Gateway::start(options, move |event| match event {
            Event::Delivery(delivery, ack) => {
                let kept = acknowledge(ack);
                let mut told = lock(&tell);
                told.kept.extend(kept);
                told.heard.insert((delivery.user_id, delivery.message));
            }
            Event::Kick(connection, _) | Event::Lost(connection, _) => lock(&tell).kicked.push(connection),
            Event::Attached { epoch } => lock(&tell).epochs.push(epoch),
            Event::Detached(_) => lock(&tell).detached += 1,
            Event::Superseded => lock(&tell).superseded += 1,
            Event::Presence { .. } | Event::NotWatched { .. } => {} // nobody watches
            Event::Move(..) | Event::Draining(_) => {}              // nobody is moved
        });
        let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
        let caller = Caller::new(&nodes, allowed(SOON)).expect("addresses");
        Self { gateway: gateway.expect("addresses"), caller, told }
    }

    async fn log_in(&self, user: i64) {
        let bound = self.gateway.bind(connection(user, PHONE, &format!("c-{user}"))).await.expect("it runs");
        assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    }

    async fn log_in_all(&self) {
        for user in 1..=USERS {
            self.log_in(user).await;
        }
    }

    async fn is_online(&self, user: i64) -> bool {
        let answer = self.caller.query(QueryRouteReq { user_id: user, max_staleness_ms: None }).await.expect("an answer");
        answer.is_online && answer.gateway_addr == GATEWAY
    }

    async fn write(&self, user: i64, text: &str) -> pb::DeliverResp {
        let message_id = text.replace(' ', "-");
        self.caller.deliver(DeliverReq { message_id, ack_timeout_ms: 2_000, ..a_message(user, text) }).await.expect("an answer")
    }

    /// Everybody is online, and gets what is written to them.
    async fn works(&self, when: &str) {
        for user in 1..=USERS {
            assert!(self.is_online(user).await, "{when}: user {user}");
            let answer = self.write(user, when).await;
            assert!(answer.delivered, "{when}: user {user}: {answer:?}");
            assert!(lock(&self.told).heard.contains(&(user, when.to_owned())), "{when}: user {user}");
        }
        let user_ids: Vec<i64> = (1..=USERS).collect();
        let many = BatchQueryRouteReq { user_ids: user_ids.clone(), ..Default::default() };
        let many = self.caller.query_many(many).await.expect("an answer");
        assert!(many.users.len() == user_ids.len() && many.users.iter().all(|user| user.is_online), "{when}: {many:?}");
        let to_many = BatchDeliverReq { user_ids, message: format!("{when}, all"), ..Default::default() };
        let to_many = self.caller.deliver_many(to_many).await.expect("an answer");
        assert!(to_many.users.iter().all(|user| user.delivered), "{when}: {to_many:?}");
        println!("{when}: everybody is reached");
    }

    fn epochs(&self) -> Vec<u64> {
        lock(&self.told).epochs.clone()
    }

    fn has_one_life(&self) -> bool {
        let epochs = self.epochs();
        epochs.iter().all(|epoch| *epoch == epochs[0])
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_everything_goes_on() {
    let cluster = Cluster::with_two_redis(2, &[]).await;
    let program = Program::start(&cluster.nodes);
    program.log_in_all().await;
    program.works("with Redis").await;
    cluster.cache().kill();
    program.works("without the cache").await;
    program.log_in(USERS + 1).await;
    assert!(program.is_online(USERS + 1).await);
    cluster.cache().restart();
    cluster.queue().kill();
    program.works("without the queue").await;
    cluster.cache().stop();
    program.works("without the queue, and with a cache that stands still").await;
    program.log_in(USERS + 2).await;
    assert!(program.is_online(USERS + 2).await);
    cluster.cache().cont();
    cluster.queue().restart();
    program.works("with Redis again").await;
    assert!(program.has_one_life(), "{:?}", program.epochs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_database_is_away_messages_arrive_and_changes_are_made_when_it_is_back() {
    const LEAVER: i64 = USERS + 1;
    let _turn = heavy().await;
    let server = MariaDb::start();
    let cluster = Cluster::on_all(&server, Redis::one(), 2, &[]).await;
    let program = Arc::new(Program::start(&cluster.nodes));
    program.log_in_all().await;
    program.works("at first").await;
    type Outage = (&'static str, fn(&MariaDb), fn(&MariaDb));
    let outages: [Outage; 2] = [("frozen", MariaDb::stop, MariaDb::cont), ("killed", MariaDb::kill, MariaDb::restart)];
    for (newcomer, (what, begin, end)) in (USERS + 2..).zip(outages) {
        program.log_in(LEAVER).await;
        begin(&server);
        let mut changes = JoinSet::new();
        let (this, other) = (program.clone(), program.clone());
        changes.spawn(async move { this.log_in(newcomer).await });
        changes.spawn(async move {
            let unbound = other.gateway.unbind(LEAVER, PHONE, &format!("c-{LEAVER}")).await.expect("it runs");
            assert_eq!(code(&unbound.result), Code::Ok, "{unbound:?}");
        });
        let (this, other) = (program.clone(), program.clone());
        let strangers = move |n| (1_000 * newcomer..).take(n).collect::<Vec<_>>();
        changes.spawn(async move {
            let request = BatchQueryRouteReq { user_ids: strangers(50), ..Default::default() };
            let answer = this.caller.query_many(request).await.expect("an answer");
            assert!(answer.users.len() == 50 && answer.users.iter().all(|user| user.code() == Code::NotFound), "{answer:?}");
        });
        changes.spawn(async move {
            let user_ids = strangers(50);
            let request = BatchDeliverReq { user_ids, store_offline: true, message: "hello".to_owned(), ..Default::default() };
            let answer = other.caller.deliver_many(request).await.expect("an answer");
            assert!(answer.users.iter().all(|user| user.stored), "{answer:?}");
        });
        program.works(what).await;
        tokio::time::sleep(OUTAGE).await;
        assert!(changes.try_join_next().is_none(), "nothing can be done yet");
        end(&server);
        while let Some(change) = changes.join_next().await {
            change.expect("it was made");
        }
        program.works(&format!("{what} no more")).await;
        eventually("who came is online", SOON, async || program.is_online(newcomer).await).await;
        eventually("who left is offline", SOON, async || !program.is_online(LEAVER).await).await;
    }
    assert!(program.has_one_life(), "{:?}", program.epochs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_are_killed_in_the_middle_of_calls_cost_no_answer_and_no_life() {
    let _turn = heavy().await;
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let program = Arc::new(Program::start(&cluster.nodes));
    program.log_in_all().await;
    let done = Arc::new(AtomicBool::new(false));
    let mut services = JoinSet::new();
    for service in 0..4 {
        let (program, done) = (program.clone(), done.clone());
        services.spawn(async move {
            for n in 0.. {
                if done.load(Ordering::Relaxed) {
                    return n;
                }
                let (user, text) = (1 + n % USERS, format!("{service}/{n}"));
                assert!(program.is_online(user).await, "user {user}");
                let answer = program.write(user, &text).await;
                assert!(answer.delivered, "{text}: {answer:?}");
                assert!(lock(&program.told).heard.contains(&(user, text)));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            0
        });
    }
    for round in 0..if long() { 10 } else { 2 } {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.nodes[round % 2].kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.nodes[round % 2].restart().await;
    }
    done.store(true, Ordering::Relaxed);
    println!(
        "{} messages, each delivered; {} streams ended",
        services.join_all().await.iter().sum::<i64>(),
        lock(&program.told).detached
    );
    program.works("after all").await;
    assert!(program.has_one_life(), "{:?}", program.epochs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stands_still_is_left_for_another_and_is_waited_for_once() {
    const LIMIT: Duration = Duration::from_secs(4);
    let _turn = heavy().await;
    let cluster = Cluster::with_redis(2, &[]).await;
    let program = Program::start(&cluster.nodes);
    program.log_in_all().await;
    let nodes: Vec<String> = cluster.nodes.iter().map(|node| node.data.to_string()).collect();
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let caller = Caller::new(&nodes, allowed(LIMIT)).expect("addresses");
    for still in &cluster.nodes {
        program.works("before").await;
        still.stop();
        let (began, mut waited) = (Instant::now(), 0);
        while began.elapsed() < LIMIT + WHILE {
            for user in 1..=USERS {
                let asked = Instant::now();
                let request = QueryRouteReq { user_id: user, max_staleness_ms: None };
                assert!(caller.query(request).await.expect("an answer").is_online, "user {user}");
                waited += usize::from(asked.elapsed() >= allowed(LIMIT) / 2);
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        eventually("messages arrive", SOON, async || program.write(ALICE, "meanwhile").await.delivered).await;
        still.cont();
        assert!(waited <= 1, "{waited} calls have waited for it");
    }
    assert!(program.has_one_life(), "{:?}", program.epochs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_whose_life_was_ended_begins_a_new_one_with_all_its_users() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let program = Program::start(&cluster.nodes);
    program.log_in_all().await;
    let first = program.epochs()[0];
    let purge = pb::PurgeGatewaysReq { epochs: vec![first], held: false, ..Default::default() };
    cluster.node().operator().purge_gateways(purge).await.expect("purged");
    eventually("there is a new life", SOON, async || program.epochs().len() == 2).await;
    for user in 1..=USERS {
        eventually("the user is bound again", SOON, async || program.is_online(user).await).await;
    }
    program.works("in the new life").await;
    let routes = cluster.node().query_sql(ALICE).await.routes;
    assert_eq!(routes.iter().map(|route| route.gateway_epoch).collect::<Vec<_>>(), [program.epochs()[1]]);
    assert!(program.epochs()[1] > first && lock(&program.told).kicked.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_for_overload_is_asked_again() {
    /// A node has 1,024 in its hands for each gateway; the queue takes as many, and the lane less.
    const GATEWAYS: i64 = 3;
    const MANY: i64 = 1_100;
    const CALLS: usize = 16;
    let _turn = heavy().await;
    let server = MariaDb::start();
    let cluster = Cluster::on(&server, 1, &[("STORE__QUEUE", "1024"), ("STORE__LANES", "1")]).await;
    let node = cluster.node();
    let program = Arc::new(Program::start(&cluster.nodes));
    let others = (1..GATEWAYS).map(|other| Arc::new(Program::at(&format!("gw-{}:7000", 1 + other), &cluster.nodes, Some)));
    let programs: Vec<Arc<Program>> = std::iter::once(program.clone()).chain(others).collect();
    for program in &programs {
        eventually("it is attached", SOON, async || !program.epochs().is_empty()).await;
    }
    server.stop(); // so that the queue becomes full
    let mut log_ins = JoinSet::new();
    for (users, program) in (0..).step_by(10_000).zip(&programs) {
        for user in users + 1..=users + MANY {
            let program = program.clone();
            log_ins.spawn(async move { program.log_in(user).await });
        }
    }
    let shed = async |what: &str| {
        let shed = node.series("im_presence_shed_total").await;
        shed.iter().filter(|(labels, _)| labels.contains(what)).map(|(_, count)| count).sum::<f64>()
    };
    eventually("the queue is full", SOON, async || shed("changes").await > 0.0).await;
    server.cont();
    while let Some(log_in) = log_ins.join_next().await {
        log_in.expect("everybody is bound");
    }
    let refused = shed("changes").await;
    let mut calls = JoinSet::new();
    for call in 0..CALLS as i64 {
        let program = program.clone();
        calls.spawn(async move {
            let user_ids = (0..10_000).map(|n| 1_000_000 * (call + 1) + n).chain([ALICE]).skip(1).collect();
            let request = BatchDeliverReq { user_ids, message: format!("call {call}"), ..Default::default() };
            program.caller.deliver_many(request).await.expect("an answer")
        });
    }
    for answer in calls.join_all().await {
        let (alice, strangers) = answer.users.split_last().expect("answers");
        assert!(alice.delivered && strangers.iter().all(|user| code(&user.result) == Code::NotFound));
    }
    let shed = shed("deliveries").await;
    println!("{} binds, {refused} refused and made again; {CALLS} large calls, {shed} refused and made again", GATEWAYS * MANY);
    assert!(refused > 0.0 && shed > 0.0, "there was too much");
    program.works("in the end").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_stops_while_an_acknowledgement_has_still_to_be_given() {
    let cluster = Cluster::sqlite(&[]).await;
    let program = Program::at(GATEWAY, &cluster.nodes, Some);
    program.log_in(ALICE).await;
    let answer = program.caller.deliver(DeliverReq { ack_timeout_ms: 1, ..a_message(ALICE, "hello") }).await.expect("an answer");
    assert!(!answer.delivered && !lock(&program.told).kept.is_empty(), "{answer:?}");
    let Program { gateway, told, .. } = program;
    tokio::time::timeout(allowed(SOON), gateway.stop()).await.expect("it stops").expect("it deregisters");
    assert!(!cluster.node().query_sql(ALICE).await.is_online);
    lock(&told).kept[0].taken(PHONE); // nobody hears it any more
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_no_node_would_take_is_refused_at_once_and_disturbs_nobody() {
    let cluster = Cluster::sqlite(&[]).await;
    let program = Program::start(&cluster.nodes);
    program.log_in(ALICE).await;
    for wrong in [connection(0, PHONE, "c"), connection(BOB, "a b", "c"), connection(BOB, PHONE, &"c".repeat(129))] {
        let bound = program.gateway.bind(wrong.clone()).await.expect("it runs");
        assert_eq!(code(&bound.result), Code::Invalid, "{bound:?}");
        let unbound = program.gateway.unbind(wrong.user_id, &wrong.device_id, &wrong.conn_id).await.expect("it runs");
        assert_eq!(code(&unbound.result), Code::Invalid, "{unbound:?}");
    }
    assert!(program.write(ALICE, "hello").await.delivered);
    assert_eq!((program.epochs().len(), lock(&program.told).detached), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_refuses_what_nodes_refuse_and_nothing_else() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    let good =
        pb::BindRouteReq { client_ip: "192.0.2.1".to_owned(), client_port: 65_535, platform: 3, ..a_bind(ALICE, PHONE, "c") };
    let text = |change: fn(&mut pb::BindRouteReq, String), text: &str| {
        let mut request = good.clone();
        change(&mut request, text.to_owned());
        request
    };
    let mut binds = vec![good.clone(), pb::BindRouteReq { user_id: 0, ..good.clone() }];
    binds.extend([-1, 8, 9, i32::MAX].map(|platform| pb::BindRouteReq { platform, ..good.clone() }));
    binds.extend([-1, 0, 65_536].map(|client_port| pb::BindRouteReq { client_port, ..good.clone() }));
    binds.extend(["", "::1", "here", "192.0.2.1:80"].map(|ip| text(|request, ip| request.client_ip = ip, ip)));
    for name in ["", "a b", "\u{e9}", "\t", &"x".repeat(128), &"x".repeat(129)] {
        binds.push(text(|request, name| request.device_id = name, name));
        binds.push(text(|request, name| request.conn_id = name, name));
    }
    for bind in binds {
        let node_takes =
            !matches!(node.try_bind(bind.clone()).await, Err(status) if status.code() == tonic::Code::InvalidArgument);
        assert_eq!(fields::check_bind(&bind).is_ok(), node_takes, "{bind:?}");
    }
    for addr in ["", GATEWAY, "a b", &"x".repeat(255), &"x".repeat(256)] {
        let unbind = pb::UnbindRouteReq { user_id: ALICE, gateway_addr: addr.to_owned(), ..Default::default() };
        let answer = node.presence().unbind_route(unbind.clone()).await;
        let node_takes = !matches!(answer, Err(status) if status.code() == tonic::Code::InvalidArgument);
        assert_eq!(fields::check_unbind(&unbind).is_ok(), node_takes, "{unbind:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_connects_again_has_its_former_connection_closed_and_no_other() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let program = Program::start(&cluster.nodes);
    for conn in ["c-1", "c-2", "c-3"] {
        let bound = program.gateway.bind(connection(ALICE, PHONE, conn)).await.expect("it runs");
        assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    }
    eventually("both are told", SOON, async || lock(&program.told).kicked.len() == 2).await;
    let kicked: Vec<String> = lock(&program.told).kicked.iter().map(|kicked| kicked.conn_id.clone()).collect();
    assert_eq!(kicked, ["c-1", "c-2"]);
    assert!(program.write(ALICE, "hello").await.delivered);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_gateways_with_one_address_the_older_leaves_the_newer_alone() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let older = Program::start(&cluster.nodes);
    older.log_in(ALICE).await;
    let newer = Program::start(&cluster.nodes);
    newer.log_in(BOB).await;
    eventually("the older is told", SOON, async || lock(&older.told).superseded == 1).await;
    tokio::time::sleep(WHILE).await;
    assert_eq!((newer.epochs().len(), older.epochs().len()), (1, 1), "it waits for at least a lease");
    assert!(newer.is_online(BOB).await && newer.write(BOB, "hello").await.delivered);
    assert!(lock(&newer.told).detached == 0 && !newer.is_online(ALICE).await);
}
