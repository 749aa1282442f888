//! The database is another server from one moment to the next: its replica, which may lack what was acknowledged last.

use std::net::TcpListener;
use std::time::Duration;
use std::time::Instant;

use im_presence::config::Config;
use im_presence::pb;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code as ResultCode;
use im_presence::pb::DeliverReq;
use im_presence::pb::Delivery;
use im_presence::store::database::Database;
use tonic::Code;

use crate::deliver::a_message;
use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::heavy;
use crate::harness::node::Node;
use crate::harness::node::settings;
use crate::harness::proxy::Kind;
use crate::harness::proxy::Proxy;
use crate::harness::replicas::Replicas;
use crate::harness::replicas::run;
use crate::harness::stream::gateways;
use crate::harness::switch::Switch;
use crate::harness::traffic::everything_agrees_with_sql;

/// Nobody answers from the server that was, nor from what was cached of it.
const FOLLOWED_WITHIN: Duration = Duration::from_secs(2);
const AGREES_WITHIN: Duration = Duration::from_secs(10);
const LOST: i64 = 200;
const NOBODY: i64 = 1_000;

/// Nodes without special rights on a primary that has a replica.
struct World {
    pair: Replicas,
    switch: Switch,
    cluster: Cluster,
}

impl World {
    async fn start() -> Self {
        let pair = Replicas::start().await;
        let cluster = Cluster::on_all(&pair.primary, Redis::one(), 0, &[]).await;
        run(&pair.primary, &format!("CREATE USER app; GRANT ALL ON {}.* TO app", cluster.db.name())).await;
        pair.catch_up().await;
        let switch = Switch::start(pair.primary.port).await;
        Self { pair, switch, cluster }
    }

    async fn add_node(&mut self, url: &str) {
        // The one connection for reading is there before the fail-over.
        self.cluster
            .add_node_at(&url.replace("root@", "app@"), &[("STORE__CONNECTIONS", "1"), ("GATEWAY__LEASE", "3600000")])
            .await;
    }

    fn one_address(&self) -> String {
        self.switch.url(self.cluster.db.name())
    }

    /// The replica first: it is not the right one, but for the time after a fail-over.
    fn both_hosts(&self) -> String {
        let (replica, primary) = (self.pair.replica.port, self.pair.primary.port);
        format!("mysql://root@127.0.0.1:{replica},127.0.0.1:{primary}/{}", self.cluster.db.name())
    }

    fn new_primary(&self) -> String {
        self.pair.replica.url(self.cluster.db.name())
    }

    async fn promote(&mut self) {
        self.pair.promote().await;
        self.switch.lead_to(self.pair.replica.port);
        self.cluster.db.url = self.new_primary();
    }
}

/// The primary is made read-only and stays up, as in a planned switch: connections to it go on to answer.
async fn is_followed(mut world: World, url: &str) {
    world.add_node(url).await;
    let node = world.cluster.nodes.pop().expect("a node");
    node.bind(a_bind(ALICE, PHONE, "before")).await;
    assert_eq!(node.query_sql(ALICE).await.routes[0].conn_id, "before");
    run(&world.pair.primary, "SET GLOBAL read_only = 1").await;
    world.pair.catch_up().await;
    world.promote().await;
    // Without Redis it tells nobody: its neighbour has to find out by itself.
    let mut other = Node::start(settings(&[("STORE__URL", &world.new_primary())])).await;
    other.bind(a_bind(ALICE, PHONE, "after")).await;
    let since = Instant::now();
    eventually("what the new primary has is answered", FOLLOWED_WITHIN, async || {
        node.try_query(ALICE, Some(0)).await.is_ok_and(|answer| answer.routes[0].conn_id == "after")
    })
    .await;
    println!("the new primary answers after {:?}", since.elapsed());
    eventually("binds work", FOLLOWED_WITHIN, async || node.try_bind(a_bind(ALICE, PHONE, "again")).await.is_ok()).await;
    assert_eq!(other.query_sql(ALICE).await.routes[0].conn_id, "again");
    eventually("it is missed on the bus, and nothing else", AGREES_WITHIN, async || node.degraded().await == ["hints"]).await;
    other.kill();
    eventually("nothing is wrong any more", AGREES_WITHIN, async || node.degraded().await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_promoted_behind_one_address_is_followed_although_the_old_primary_goes_on_answering() {
    let world = World::start().await;
    let url = world.one_address();
    is_followed(world, &url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_hosts_the_one_that_takes_writes_is_found_and_followed() {
    let world = World::start().await;
    let url = world.both_hosts();
    is_followed(world, &url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_former_primary_that_comes_back_and_takes_writes_is_not_gone_back_to() {
    let mut world = World::start().await;
    let url = format!(
        "mysql://root@127.0.0.1:{},127.0.0.1:{}/{}",
        world.pair.primary.port,
        world.pair.replica.port,
        world.cluster.db.name()
    );
    world.add_node(&url).await;
    world.cluster.node().bind(a_bind(ALICE, PHONE, "before")).await;
    run(&world.pair.primary, "SET GLOBAL read_only = 1").await;
    world.pair.catch_up().await;
    world.promote().await;
    let node = world.cluster.node();
    eventually("binds work", AGREES_WITHIN, async || node.try_bind(a_bind(ALICE, PHONE, "after")).await.is_ok()).await;
    run(&world.pair.primary, "SET GLOBAL read_only = 0").await;
    let last_beat = async || world.cluster.db.number("SELECT last_beat FROM cluster").await;
    run(&world.pair.replica, "KILL USER app").await; // every connection is made anew
    let killed = last_beat().await;
    eventually("beats go on there", AGREES_WITHIN, async || last_beat().await > killed).await;
    eventually("binds work", AGREES_WITHIN, async || node.try_bind(a_bind(ALICE, PHONE, "again")).await.is_ok()).await;
    let other = Node::start(settings(&[("STORE__URL", &world.new_primary())])).await;
    assert_eq!(other.query_sql(ALICE).await.routes[0].conn_id, "again");
}

/// Whatever its user may do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_read_only_is_not_written_to_by_a_user_who_may() {
    let mut world = World::start().await;
    world.cluster.add_node_at(&world.one_address(), &[]).await; // root
    let node = world.cluster.node();
    node.bind(a_bind(ALICE, PHONE, "before")).await;
    run(&world.pair.primary, "SET GLOBAL read_only = 1").await;
    eventually("it is noticed", FOLLOWED_WITHIN, async || node.degraded().await.contains(&"store".to_owned())).await;
    let refused = node.try_bind(a_bind(ALICE, PHONE, "refused")).await.expect_err("nothing is stored");
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    assert_eq!(node.query_sql(ALICE).await.routes[0].conn_id, "before", "nobody knows of a better one");
    run(&world.pair.primary, "SET GLOBAL read_only = 0").await;
    eventually("binds work", AGREES_WITHIN, async || node.try_bind(a_bind(ALICE, PHONE, "after")).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_of_which_none_takes_writes_each_say_why() {
    let world = World::start().await;
    let nobody = crate::harness::mariadb::free_port();
    let url = format!("mysql://root@127.0.0.1:{},127.0.0.1:{nobody}/{}", world.pair.replica.port, world.cluster.db.name());
    let mut node = crate::harness::node::Process::start(&settings(&[("STORE__URL", &url)]));
    let ended = node.ended(Duration::from_secs(30)).await;
    let log = node.log().join("\n");
    assert!(!ended.success(), "{log}");
    let replica = format!("127.0.0.1:{}: ", world.pair.replica.port);
    for word in [&*replica, "is read-only; ", &format!("127.0.0.1:{nobody}: "), "refused"] {
        assert!(log.contains(word), "{word} is not in\n{log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_that_are_silent_share_the_time_that_a_statement_may_take() {
    const TIMEOUT: Duration = Duration::from_secs(4);
    let silent = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").expect("listen")); // and never take up a connection
    let [one, other] = [0, 1].map(|n: usize| silent[n].local_addr().expect("an address"));
    let text = format!("[store]\nurl = \"mysql://root@{one},{other}/none\"\ntimeout = {}", TIMEOUT.as_millis());
    let store = Config::from_text("im.toml", &text).expect("settings").store;
    let began = Instant::now();
    let error = Database::open(&store).await.err().expect("there is no server").to_string();
    assert!(began.elapsed() < TIMEOUT + TIMEOUT / 2, "{:?}", began.elapsed());
    assert!([one, other].iter().all(|host| error.contains(&host.to_string())), "{error}");
}

/// Generation and version of a user's record in Redis.
async fn in_redis(cluster: &Cluster, user: i64) -> Option<(u64, u64)> {
    let record = cluster.cache().client().await.get_many(&[format!("user:record:{user}")]).await.pop().flatten()?;
    let number = |at: usize| std::str::from_utf8(record.get(at..at + 20)?).ok()?.parse().ok();
    Some((number(0)?, number(20)?))
}

/// Somebody who reads users to show them stands still, at this statement, on the server that was. It has what the new one lacks.
async fn is_not_shown_if_read_at(statement: &'static str) {
    let mut world = World::start().await;
    let proxy = Proxy::start(world.pair.primary.port).await;
    let (old, new) = (proxy.port, world.pair.replica.port);
    let url = format!("mysql://app@127.0.0.1:{old},127.0.0.1:{new}/{}", world.cluster.db.name());
    world.cluster.add_node_at(&url, &[("STORE__TIMEOUT", "30000")]).await;
    let kept = world.cluster.node().bind(a_bind(ALICE, PHONE, "kept")).await.version;
    world.pair.part().await;
    let lost = world.cluster.node().bind(a_bind(ALICE, PHONE, "lost")).await.version;
    let shown = async |version| in_redis(&world.cluster, ALICE).await.is_some_and(|(_, shown)| shown == version);
    eventually("it is shown", AGREES_WITHIN, async || shown(lost).await).await;

    proxy.hold_answers(Kind::Reader, statement);
    world.cluster.cache().client().await.run::<()>(&["FLUSHALL"]).await; // everybody is shown anew
    proxy.struck().await;
    run(&world.pair.primary, "SET GLOBAL read_only = 1").await;
    world.promote().await;
    let (node, generation) = (world.cluster.node(), async || world.cluster.db.number("SELECT generation FROM cluster").await);
    eventually("what the new primary has is in Redis", AGREES_WITHIN, async || {
        let _ = node.try_query(ALICE, None).await; // leaves a copy there
        in_redis(&world.cluster, ALICE).await == Some((generation().await as u64, kept))
    })
    .await;
    proxy.release();
    let done = format!("SELECT COUNT(*) FROM jobs WHERE name = 'show generation {}' AND node_id = 'done'", generation().await);
    eventually("everybody is shown", AGREES_WITHIN, async || world.cluster.db.number(&done).await == 1).await;
    everything_agrees_with_sql(&world.cluster, ALICE..=ALICE, AGREES_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_before_a_fail_over_is_not_shown_after_it() {
    is_not_shown_if_read_at("LEFT JOIN routes r").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_shows_many_users_does_not_go_on_with_the_server_that_was() {
    is_not_shown_if_read_at("SELECT DISTINCT user_id FROM routes WHERE user_id").await;
}

/// What was acknowledged before the fail-over, and is lost by it.
struct Before {
    generation: i64,
    /// Of users 1 to `LOST`, the versions of binds that are lost.
    versions: Vec<u64>,
    epochs: Vec<u64>,
    seq: u64,
}

fn elsewhere(user: i64, conn: &str) -> BindRouteReq {
    BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(user, PHONE, conn) }
}

/// Stores a message for somebody who is not there, and returns all that wait.
async fn store(node: &Node, text: &str) -> Vec<Delivery> {
    let message = DeliverReq { store_offline: true, message_id: text.to_owned(), ..a_message(NOBODY, text) };
    let answer = node.deliver(message).await;
    assert!(answer.stored, "{answer:?}");
    let request = pb::PullInboxReq { user_id: NOBODY, device_id: PHONE.to_owned(), limit: 10, ..Default::default() };
    gateways(node).pull_inbox(request).await.expect("an inbox").into_inner().deliveries
}

/// 200 binds, a registration and a message that the replica does not hear of; all nodes and Redis have them.
async fn acknowledge_what_will_be_lost(world: &Cluster, epoch: u64) -> Before {
    let [node, other] = &world.nodes[..] else { panic!("two nodes") };
    let mut versions = Vec::new();
    for user in 1..=LOST {
        versions.push(node.bind(elsewhere(user, "lost")).await.version);
    }
    for user in 1..=LOST {
        assert_eq!(other.query_sql(user).await.routes[0].conn_id, "lost");
        assert_eq!(node.query(user).await.routes[0].conn_id, "lost");
    }
    let epochs = vec![epoch, node.register("gw-lost:1").await];
    node.bind(on("gw-lost:1", epochs[1], a_bind(LOST + 1, PHONE, "lost"))).await;
    let seq = store(node, "lost").await.last().expect("a message").inbox_seq;
    let generation = async || world.db.number("SELECT generation FROM cluster").await;
    // One more of which the replica does not hear; Redis is full of it.
    let (first, redis) = (generation().await, world.cache().client().await);
    eventually("it says whose it is", AGREES_WITHIN, async || redis.has("presence:store").await).await;
    redis.run::<()>(&["FLUSHALL"]).await;
    eventually("another generation has begun", AGREES_WITHIN, async || generation().await > first).await;
    everything_agrees_with_sql(world, 1..=LOST, AGREES_WITHIN).await;
    let generation = generation().await;
    Before { generation, versions, epochs, seq }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_what_a_fail_over_has_lost_nothing_is_answered_and_no_number_is_used_twice() {
    let _turn = heavy().await;
    let mut world = World::start().await;
    for url in [world.one_address(), world.both_hosts()] {
        world.add_node(&url).await;
    }
    let kept = world.cluster.node().register("gw-kept:1").await;
    for user in 1..=LOST {
        world.cluster.node().bind(a_bind(user, PHONE, "kept")).await;
    }
    store(world.cluster.node(), "kept").await;
    world.pair.part().await;
    let before = acknowledge_what_will_be_lost(&world.cluster, kept).await;

    world.pair.primary.kill();
    world.promote().await;
    let promoted = Instant::now();
    nothing_that_was_lost_is_answered(&world.cluster, promoted).await;
    let [node, other] = &world.cluster.nodes[..] else { panic!("two nodes") };
    let generation = world.cluster.db.number("SELECT generation FROM cluster").await;
    assert!(generation > before.generation, "{generation}, but {} before", before.generation);
    println!("generation {} before, {generation} after", before.generation);
    everything_agrees_with_sql(&world.cluster, 1..=LOST, AGREES_WITHIN).await;

    let last = before.versions[before.versions.len() - 1];
    for (user, lost) in (1..=LOST).zip(before.versions) {
        let bound = other.bind(a_bind(user, PHONE, "again")).await.version;
        assert!(bound > lost, "user {user}: {bound} after {lost}");
        assert_eq!(node.query_sql(user).await.version, bound);
        if user == 1 {
            println!("{LOST} binds lost, up to version {last}; the first after is {bound}");
        }
    }
    assert_eq!(node.beat("gw-kept:1", kept).await, ResultCode::Ok);
    assert_eq!(node.beat("gw-lost:1", before.epochs[1]).await, ResultCode::Fenced);
    let epochs = [node.register("gw-lost:1").await, other.register("gw-new:1").await];
    println!("epochs {:?} before, {epochs:?} after", before.epochs);
    assert!(epochs.iter().all(|new| before.epochs.iter().all(|old| new > old)), "{epochs:?} after {:?}", before.epochs);
    let messages = store(node, "after").await;
    assert_eq!(messages.iter().map(|message| message.message.as_str()).collect::<Vec<_>>(), ["kept", "after"]);
    println!("inbox number {} was lost, the next is {}", before.seq, messages[1].inbox_seq);
    assert!(messages[1].inbox_seq > before.seq, "{messages:?}: {} was used", before.seq);
    eventually("nothing is wrong any more", AGREES_WITHIN, async || {
        node.degraded().await.is_empty() && other.degraded().await.is_empty()
    })
    .await;
}

/// From two seconds after `promoted` on; says when it was so.
async fn nothing_that_was_lost_is_answered(cluster: &Cluster, promoted: Instant) {
    let mut last_seen = Duration::ZERO;
    while promoted.elapsed() < allowed(FOLLOWED_WITHIN) + Duration::from_secs(2) {
        for node in &cluster.nodes {
            for user in [1, 77, LOST] {
                let asked = promoted.elapsed();
                let Ok(answer) = node.try_query(user, None).await else { continue };
                if answer.routes.first().is_none_or(|route| route.conn_id != "kept") {
                    last_seen = asked;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("the last answer from what was lost: {last_seen:?} after the promotion");
    assert!(last_seen < allowed(FOLLOWED_WITHIN), "{last_seen:?}");
    for node in &cluster.nodes {
        for user in 1..=LOST {
            let answer = node.query(user).await;
            assert_eq!((answer.routes[0].conn_id.as_str(), answer.gateway_addr.as_str()), ("kept", GATEWAY), "{answer:?}");
        }
        let nobody = node.query(LOST + 1).await;
        assert!(!nobody.is_online, "{nobody:?}");
    }
}
