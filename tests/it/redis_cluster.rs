//! Redis Cluster: three primaries with a replica each, which die, change places, and hand slots over.

use std::ops::RangeInclusive;
use std::time::Duration;
use std::time::Instant;

use im_presence::config::Config;
use im_presence::domain::id::UserId;
use im_presence::domain::id::Version;
use im_presence::domain::status::Status;
use im_presence::domain::user::UserRecord;
use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::Source;
use im_presence::pb::UnbindRouteReq;
use im_presence::store::batch::Batch;
use im_presence::store::link_error::LinkError;
use im_presence::store::servers::Servers;
use im_presence::store::shared::SharedCache;
use im_presence::store::shared::Shown;
use im_presence::store::slot_map::slot_of;
use tokio::task::JoinSet;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::pki::Pki;
use crate::harness::redis::RedisServer;
use crate::harness::redis_cluster::NODE_TIMEOUT;
use crate::harness::redis_cluster::RedisCluster;
use crate::harness::traffic::Traffic;
use crate::harness::traffic::everything_agrees;

/// Users of [`Traffic`].
const BUSY: i64 = 100;
const NOTICED_WITHIN: Duration = Duration::from_secs(5);
const KEYS_AGREE_WITHIN: Duration = Duration::from_secs(10);
/// Changes that wait for 5 s to be shown are a sign that something is wrong.
const BEHIND_WITHIN: Duration = Duration::from_secs(8);
/// After a planned exchange of a primary and its replica.
const SWITCHED_WITHIN: Duration = Duration::from_secs(3);
/// A server is believed dead, the others vote, and all hear of it.
const REPLACED_WITHIN: Duration = Duration::from_secs(3 * NODE_TIMEOUT.as_secs());
const RECORD: &str = "{user:route:{}}:record";
/// A node that remembers nobody.
const COLD: (&str, &str) = ("ROUTE__L1_CAPACITY", "0");

async fn nodes_on(redis: &RedisCluster, nodes: usize, more: &[(&str, &str)]) -> Cluster {
    let mut settings = redis.settings("REDIS_CACHE");
    settings.extend(redis.settings("REDIS_QUEUE"));
    let mut all: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (&**key, &**value)).collect();
    all.extend(more);
    Cluster::mariadb(nodes, &all).await
}

async fn keys_agree(cluster: &Cluster, redis: &RedisCluster, users: RangeInclusive<i64>, within: Duration) {
    everything_agrees(cluster, users, within, RECORD, async |names| redis.get_many(&names).await).await;
}

async fn bind_all(node: &Node, users: RangeInclusive<i64>) {
    for page in users.collect::<Vec<_>>().chunks(1_000) {
        let binds = page.iter().map(|user| a_bind(*user, PHONE, "c")).collect();
        let answer = node.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
        assert!(answer.results.iter().all(|bind| code(&bind.result) == Code::Ok));
    }
}

async fn all_is_well(cluster: &Cluster, within: Duration) {
    for node in &cluster.nodes {
        eventually("nothing is degraded", within, async || node.degraded().await.is_empty()).await;
    }
}

async fn generation(cluster: &Cluster) -> i64 {
    cluster.db.number("SELECT generation FROM cluster").await
}

/// Calls of a command at all primaries.
async fn calls(redis: &RedisCluster, command: &str) -> Vec<u64> {
    let mut calls = Vec::new();
    for primary in redis.primaries().await {
        let stats: String = primary.client().await.run(&["INFO", "commandstats"]).await;
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        calls.push(line.and_then(|rest| rest.split(',').next()?.parse().ok()).unwrap_or(0));
    }
    calls
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_are_shown_in_the_slots_of_their_keys_and_found_there_with_one_question_to_each_primary() {
    let _turn = heavy().await;
    let users = if long() { 20_000 } else { 2_000 };
    let asked = users / 4;
    let redis = RedisCluster::start().await;
    let cluster = nodes_on(&redis, 2, &[COLD]).await;
    let began = Instant::now();
    bind_all(cluster.node(), 1..=users).await;
    println!("{users} users bound in {:?}", began.elapsed());
    let gone = UnbindRouteReq { user_id: 7, gateway_addr: GATEWAY.to_owned(), device_id: PHONE.to_owned(), ..Default::default() };
    cluster.node().unbind(gone).await;
    keys_agree(&cluster, &redis, 1..=users, KEYS_AGREE_WITHIN).await;
    assert_eq!(redis.keys("user:record:*").await, [""; 0], "names of one server");
    let node = &cluster.nodes[1];
    let question = || BatchQueryRouteReq { user_ids: (1..=asked).collect(), ..Default::default() };
    eventually("Redis answers", NOTICED_WITHIN, async || {
        node.query(1).await;
        node.query(2).await.source() == Source::Shared
    })
    .await;
    let (before, hits) = (calls(&redis, "get").await, node.metric("im_presence_l2_hits_total").await);
    let began = Instant::now();
    let answer = node.presence().batch_query_route(question()).await.expect("an answer").into_inner();
    let took = began.elapsed();
    assert_eq!(answer.users.iter().filter(|user| user.is_online).count() as i64, asked - 1);
    let from_redis = node.metric("im_presence_l2_hits_total").await - hits;
    let after: Vec<u64> = calls(&redis, "get").await.into_iter().zip(before).map(|(after, before)| after - before).collect();
    println!("{asked} users: {from_redis} from Redis in {took:?}; GETs at each primary: {after:?}");
    assert!(from_redis >= asked as f64 * 0.9, "{from_redis}");
    assert!(after.iter().all(|gets| *gets > 0) && after.len() == 3, "{after:?}");
}

/// Of a node that has it for its cache.
fn config_of(redis: &RedisCluster) -> Config {
    let nodes = redis.settings("REDIS_CACHE").remove(1).1;
    Config::from_text("im.toml", &format!("[redis_cache]\nmode = \"cluster\"\nnodes = {nodes}")).expect("settings")
}

fn servers_of(redis: &RedisCluster) -> Servers {
    Servers::new(&config_of(redis).redis_cache.expect("a cache").server).expect("addresses")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_any_size_is_one_question_to_each_primary() {
    const KEYS: u64 = 5_000;
    let redis = RedisCluster::start().await;
    let servers = servers_of(&redis);
    let mut batch = Batch::with_script(true, "return 1"); // which each question begins with
    for key in (0..KEYS).map(|number| format!("key:{number}")) {
        batch.add(&key, redis::cmd("GET").arg(&key).to_owned());
    }
    let (_, values) = servers.run::<Option<String>>(batch, KEYS_AGREE_WITHIN).await.expect("answers");
    assert!(values.iter().all(Option::is_none) && values.len() as u64 == KEYS, "{values:?}");
    let (questions, gets) = (calls(&redis, "script|load").await, calls(&redis, "get").await);
    println!("{KEYS} keys: {questions:?} questions, {gets:?} GETs");
    assert_eq!((questions, gets.iter().sum::<u64>()), (vec![1; 3], KEYS));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_that_send_a_command_on_to_each_other_give_no_answer() {
    let redis = RedisCluster::start().await;
    let servers = servers_of(&redis);
    servers.look(NOTICED_WITHIN).await.expect("servers");
    let owner = redis.owner("key").await;
    let other = redis.primaries().await.into_iter().find(|server| server.port != owner.port).expect("another primary");
    let id: String = other.client().await.run(&["CLUSTER", "MYID"]).await;
    owner.client().await.run::<()>(&["CLUSTER", "SETSLOT", &slot_of("key").to_string(), "NODE", &id]).await;
    let mut batch = Batch::new(true);
    batch.add("key", redis::cmd("GET").arg("key").to_owned());
    let answer = servers.run::<Option<String>>(batch, NOTICED_WITHIN).await;
    assert!(matches!(answer, Err(LinkError::ClusterDown)), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_that_comes_late_undoes_neither_of_the_two_keys() {
    const GENERATION: u64 = 7;
    let redis = RedisCluster::start().await;
    let config = config_of(&redis);
    let store = uuid::Uuid::new_v4().to_string();
    let cache = SharedCache::new(&config.redis_cache.expect("a cache"), &config.route, &store).expect("addresses");
    let user = UserId::parse(ALICE).expect("a user");
    let keys = [format!("user:route:{ALICE}"), format!("user:status:{ALICE}")];
    let online = || vec![Some(b"gw-2:1".to_vec()), Some(b"online".to_vec())];
    for (generation, version, gateway, status, shown) in [
        (GENERATION, 5, Some("gw-2:1"), Status::Online, online()),
        (GENERATION, 4, None, Status::Offline, online()),
        (GENERATION - 1, 6, None, Status::Offline, online()),
        (GENERATION, 6, None, Status::Offline, vec![None, Some(b"offline".to_vec())]),
    ] {
        let record = UserRecord { version: Version(version), ..Default::default() };
        let keys_of = Shown { gateway: gateway.map(str::to_owned), status: Some(status), unmanaged: false };
        let written = cache.project(&[(user, record, keys_of)], generation).await.expect("an answer");
        assert_eq!(redis.get_many(&keys).await, shown, "after version {version} of generation {generation}");
        assert_eq!(
            (written.winners.len(), written.outdated),
            (usize::from(version != 4 && generation == GENERATION), generation != GENERATION)
        );
    }
}

/// How long it takes until users who are bound now have their keys at all primaries.
async fn shown_anew(cluster: &Cluster, redis: &RedisCluster, within: Duration) -> Duration {
    const NEW: RangeInclusive<i64> = 10_001..=10_100;
    let began = Instant::now();
    bind_all(cluster.node(), NEW).await;
    let names: Vec<String> = NEW.map(|user| format!("user:route:{user}")).collect();
    eventually("new users are shown", within, async || redis.get_many(&names).await.iter().all(Option::is_some)).await;
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_follow_a_slot_that_moves_and_count_again_once_the_servers_were_looked_at() {
    const LIMIT: Duration = Duration::from_secs(5);
    let redis = RedisCluster::start().await;
    let servers = servers_of(&redis);
    let keys: Vec<String> = (0..30).map(|number| format!("key:{number}")).collect();
    let batch = |words: &dyn Fn(&str) -> redis::Cmd| {
        let mut batch = Batch::new(true);
        keys.iter().for_each(|key| batch.add(key, words(key)));
        batch
    };
    let set = |key: &str| redis::cmd("SET").arg(key).arg(key).to_owned();
    let get = || servers.run::<String>(batch(&|key| redis::cmd("GET").arg(key).to_owned()), LIMIT);
    let right = async |what: &str| {
        let (number, values) = get().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(values, keys, "{what}");
        number
    };
    let (looked, _) = servers.look(LIMIT).await.expect("servers");
    assert_eq!(servers.run::<String>(batch(&set), LIMIT).await.expect("all are set").0, looked);
    let (slot, from) = (slot_of(&keys[0]), redis.owner(&keys[0]).await);
    let to = redis.primaries().await.into_iter().find(|server| server.port != from.port).expect("another primary");
    redis.open_slot(slot, from, to).await;
    assert_eq!(right("it is about to move").await, looked);
    from.client().await.run::<()>(&["MIGRATE", "127.0.0.1", &to.port.to_string(), &keys[0], "0", "5000"]).await;
    assert_ne!(right("the key has moved, the slot has not").await, looked);
    redis.close_slot(slot, from, to).await;
    assert_ne!(right("the slot has moved").await, looked);
    let sent_on = async || {
        let said: String = from.client().await.run(&["INFO", "errorstats"]).await;
        said.lines().find(|line| line.starts_with("errorstat_MOVED:")).map(str::to_owned).expect("somebody was sent on")
    };
    let before = sent_on().await;
    assert_ne!(right("and that is known").await, looked, "nobody has looked who they are");
    assert_eq!(sent_on().await, before, "nobody is sent on twice");
    let (again, _) = servers.look(LIMIT).await.expect("servers");
    assert_ne!(again, looked);
    assert_eq!(right("they were looked at").await, again);
    // Over a new connection somebody else may answer.
    to.client().await.run::<i64>(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    let mut answer = get().await;
    while answer.is_err() {
        answer = get().await; // over the one that has ended
    }
    assert_ne!(answer.expect("an answer").0, again);
    let (known, _) = servers.look(LIMIT).await.expect("servers");
    assert_ne!(known, again);
    assert_eq!(right("it was looked at").await, known);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routes_of_users_whom_nobody_knows_are_removed_from_every_primary() {
    let redis = RedisCluster::start().await;
    let mut strays = Vec::new();
    for primary in redis.primaries().await {
        let ranges = redis.ranges().await;
        let is_its = |name: &String| {
            let slot = slot_of(name);
            ranges.iter().any(|(first, last, at)| (*first..=*last).contains(&slot) && at.ends_with(&format!(":{}", primary.port)))
        };
        let mut names = (1_000_000..).map(|user| format!("user:route:{user}"));
        let stray = names.find(is_its).expect("there are users in every slot");
        primary.client().await.run::<()>(&["SET", &stray, "gw-old:1"]).await;
        strays.push(stray);
    }
    let cluster = nodes_on(&redis, 1, &[]).await;
    cluster.node().bind(a_bind(ALICE, PHONE, "c")).await;
    eventually("they are gone", KEYS_AGREE_WITHIN, async || redis.get_many(&strays).await.iter().all(Option::is_none)).await;
    keys_agree(&cluster, &redis, ALICE..=ALICE, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_has_lost_the_others_is_left_for_one_that_passes_messages_on() {
    let redis = RedisCluster::start().await;
    let replicas = [&redis.servers[4], &redis.servers[5]];
    let places = format!("[\"127.0.0.1:{}\", \"127.0.0.1:{}\"]", replicas[0].port, replicas[1].port);
    let cluster = nodes_on(&redis, 1, &[("REDIS_QUEUE__NODES", &places)]).await;
    let node = cluster.node();
    node.bind(a_bind(BOB, PHONE, "c")).await;
    let gateway = tokio::sync::Mutex::new(redis.servers[0].subscribe(&[&format!("user:{BOB}")]).await);
    delivered_to(node, BOB, async || gateway.lock().await.next(Duration::from_secs(1)).await.is_some()).await;
    let publishes = async |server: &RedisServer| {
        server.client().await.run::<String>(&["INFO", "commandstats"]).await.contains("cmdstat_publish:")
    };
    let chosen = if publishes(replicas[0]).await { replicas[0] } else { replicas[1] };
    assert!(publishes(chosen).await);
    chosen.client().await.run::<()>(&["CLUSTER", "RESET", "SOFT"]).await; // it goes on to answer, alone
    delivered_to(node, BOB, async || gateway.lock().await.next(Duration::from_millis(100)).await.is_some()).await;
    all_is_well(&cluster, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_in_a_slot_that_stays_half_way_wait_to_be_shown_until_the_move_is_over() {
    let redis = RedisCluster::start().await;
    let cluster = nodes_on(&redis, 2, &[COLD]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let name = format!("user:route:{BOB}");
    let from = redis.owner(&name).await;
    let to = redis.primaries().await.into_iter().find(|server| server.port != from.port).expect("another primary");
    all_is_well(&cluster, NOTICED_WITHIN).await;
    redis.open_slot(slot_of(&name), from, to).await;
    for conn in ["c-1", "c-2"] {
        node.bind(a_bind(BOB, PHONE, conn)).await;
        assert_eq!(other.query(BOB).await.routes[0].conn_id, conn);
    }
    eventually("somebody says so", BEHIND_WITHIN, async || node.degraded().await.contains(&"redis_cache".to_owned())).await;
    assert_eq!(other.query(BOB).await.routes[0].conn_id, "c-2");
    redis.close_slot(slot_of(&name), from, to).await;
    all_is_well(&cluster, KEYS_AGREE_WITHIN).await;
    keys_agree(&cluster, &redis, BOB..=BOB, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_nobody_has_is_told_and_costs_no_call() {
    let redis = RedisCluster::start().await;
    for server in &redis.servers {
        server.client().await.run::<()>(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]).await;
    }
    let cluster = nodes_on(&redis, 1, &[COLD]).await;
    let (node, name) = (cluster.node(), format!("user:route:{BOB}"));
    let (slot, owner) = (slot_of(&name).to_string(), redis.owner(&name).await);
    for server in std::iter::once(owner).chain(redis.servers.iter().filter(|server| server.port != owner.port)) {
        let mut client = redis::Client::open(("127.0.0.1", server.port)).expect("an address").get_connection().expect("a server");
        let _ = redis::cmd("CLUSTER").arg("DELSLOTS").arg(&slot).exec(&mut client); // it may have heard of it
    }
    let told = "slots are nobody's";
    eventually("the log says so", NOTICED_WITHIN, async || node.log().iter().any(|line| line.contains(told))).await;
    for user in [ALICE, BOB] {
        node.bind(a_bind(user, PHONE, "c")).await;
        assert_eq!(node.query(user).await.routes[0].conn_id, "c");
    }
    assert!(node.degraded().await.contains(&"redis_cache".to_owned()));
    owner.client().await.run::<()>(&["CLUSTER", "ADDSLOTS", &slot]).await;
    all_is_well(&cluster, KEYS_AGREE_WITHIN).await;
    keys_agree(&cluster, &redis, ALICE..=BOB, KEYS_AGREE_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_found_by_the_names_they_tell_and_those_without_one_by_their_addresses() {
    let redis = RedisCluster::start_with_names().await;
    let said: redis::Value = redis.servers[1].client().await.run(&["CLUSTER", "SLOTS"]).await;
    let said = format!("{said:?}");
    assert!(said.contains("localhost") && said.contains('?'), "{said}");
    let cluster = nodes_on(&redis, 2, &[]).await;
    bind_all(cluster.node(), 1..=200).await;
    all_is_well(&cluster, NOTICED_WITHIN).await;
    keys_agree(&cluster, &redis, 1..=200, KEYS_AGREE_WITHIN).await;
    redis.reshard(&redis.servers[0], &redis.servers[1], 20).await;
    bind_all(cluster.node(), 1..=200).await;
    keys_agree(&cluster, &redis, 1..=200, KEYS_AGREE_WITHIN).await;
}

/// Waits until Redis shows of each user what was acknowledged by now, or what came later: callers go on.
async fn busy_users_are_shown(cluster: &Cluster, redis: &RedisCluster, traffic: &Traffic, within: Duration) {
    let acknowledged: Vec<(i64, u64)> = traffic.acknowledged().into_iter().filter(|(_, version)| *version > 0).collect();
    assert!(!acknowledged.is_empty());
    let names: Vec<String> = acknowledged.iter().map(|(user, _)| RECORD.replace("{}", &user.to_string())).collect();
    let all_there = async || {
        let generation = generation(cluster).await as u64;
        let records = redis.get_many(&names).await;
        let number = |record: &[u8], at: usize| std::str::from_utf8(record.get(at..at + 20)?).ok()?.parse::<u64>().ok();
        let is_shown = |((_, version), record): (&(i64, u64), &Option<Vec<u8>>)| {
            let header = record.as_ref().and_then(|record| Some((number(record, 0)?, number(record, 20)?)));
            header.is_some_and(|(of, shown)| of == generation && shown >= *version)
        };
        acknowledged.iter().zip(&records).all(is_shown)
    };
    eventually("busy users are shown", within, all_there).await;
}

/// Something happens to a primary while callers bind and ask. Returns once everything is as SQL has it.
async fn under_load(redis: &RedisCluster, switch: impl AsyncFnOnce(&RedisCluster) -> Duration, within: Duration) -> i64 {
    const RESTING: RangeInclusive<i64> = BUSY + 1..=BUSY + 400;
    const LEFT: RangeInclusive<i64> = BUSY + 1..=BUSY + 50;
    let cluster = nodes_on(redis, 2, &[]).await;
    bind_all(cluster.node(), RESTING).await;
    keys_agree(&cluster, redis, RESTING, KEYS_AGREE_WITHIN).await;
    let before = generation(&cluster).await;
    let traffic = Traffic::start(&cluster, BUSY);
    traffic.goes_on(300).await;
    let took = switch(redis).await;
    let switched = Instant::now();
    let new = shown_anew(&cluster, redis, within).await;
    println!("switched in {took:?}; new users are shown at every primary {new:?} later");
    for user in LEFT {
        let (gateway_addr, device_id) = (GATEWAY.to_owned(), PHONE.to_owned());
        cluster.node().unbind(UnbindRouteReq { user_id: user, gateway_addr, device_id, ..Default::default() }).await;
    }
    all_is_well(&cluster, KEYS_AGREE_WITHIN).await;
    println!("all is well after {:?}", switched.elapsed());
    keys_agree(&cluster, redis, RESTING, KEYS_AGREE_WITHIN).await;
    busy_users_are_shown(&cluster, redis, &traffic, KEYS_AGREE_WITHIN).await;
    println!("keys agree with SQL {:?} after the switch, while callers go on", switched.elapsed());
    traffic.goes_on(300).await;
    let (written, seen) = traffic.stop().await;
    assert!(written.refused.is_empty(), "{:?}", written.refused);
    assert!(seen.iter().all(|reader| reader.refused.is_empty()), "{seen:?}");
    let stopped = Instant::now();
    keys_agree(&cluster, redis, 1..=*RESTING.end(), KEYS_AGREE_WITHIN).await;
    println!("all keys agree {:?} after the last bind", stopped.elapsed());
    for user in LEFT {
        assert_eq!(redis.get_many(&[format!("user:route:{user}")]).await, [None], "user {user} has left");
    }
    generation(&cluster).await - before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_is_killed_costs_no_query_and_leaves_no_key_of_who_has_left() {
    let _turn = heavy().await;
    let redis = RedisCluster::start().await;
    let kill = async |redis: &RedisCluster| {
        let killed = Instant::now();
        redis.kill(0);
        let replica = redis.servers[3].client().await;
        let promoted = async || replica.run::<String>(&["INFO", "replication"]).await.contains("role:master");
        eventually("its replica is promoted", REPLACED_WITHIN, promoted).await;
        killed.elapsed()
    };
    let generations = under_load(&redis, kill, KEYS_AGREE_WITHIN).await;
    assert_eq!(generations, 1, "another server, once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_and_its_replica_change_places_and_nobody_notices() {
    let _turn = heavy().await;
    let redis = RedisCluster::start().await;
    let exchange = async |redis: &RedisCluster| {
        let began = Instant::now();
        redis.promote(4).await;
        began.elapsed()
    };
    let generations = under_load(&redis, exchange, SWITCHED_WITHIN).await;
    assert!(generations >= 1, "another server");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slots_that_move_to_another_primary_cost_callers_nothing() {
    let _turn = heavy().await;
    let slots = if long() { 2_000 } else { 200 };
    let redis = RedisCluster::start().await;
    let reshard = async |redis: &RedisCluster| {
        let began = Instant::now();
        redis.reshard(&redis.servers[0], &redis.servers[1], slots).await;
        began.elapsed()
    };
    let generations = under_load(&redis, reshard, KEYS_AGREE_WITHIN).await;
    println!("{slots} slots moved, {generations} generations");
    assert!(generations >= 1, "other slots");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_show_one_user_all_the_time_end_with_what_sql_has() {
    let _turn = heavy().await;
    let turns = if long() { 5_000 } else { 500 };
    let redis = RedisCluster::start().await;
    let cluster = nodes_on(&redis, 2, &[]).await;
    let mut callers = JoinSet::new();
    for (node, gateway) in cluster.nodes.iter().zip([GATEWAY, OTHER_GATEWAY]) {
        let mut client = node.new_connection();
        callers.spawn(async move {
            for turn in 0..turns {
                let (gateway_addr, device_id) = (gateway.to_owned(), PHONE.to_owned());
                let bind = im_presence::pb::BindRouteReq {
                    gateway_addr: gateway_addr.clone(),
                    ..a_bind(ALICE, PHONE, &format!("c-{turn}"))
                };
                client.bind_route(bind).await.expect("a bind");
                if turn % 3 == 0 {
                    let gone = UnbindRouteReq { user_id: ALICE, gateway_addr, device_id, ..Default::default() };
                    client.unbind_route(gone).await.expect("an unbind");
                }
            }
        });
    }
    let began = Instant::now();
    callers.join_all().await;
    println!("2 x {turns} binds, and a third as many unbinds, of one user in {:?}", began.elapsed());
    keys_agree(&cluster, &redis, ALICE..=ALICE, NOTICED_WITHIN).await;
}

/// Waits for a message to be heard, and says what its sender was told.
async fn delivered_to(node: &Node, user: i64, hears: impl AsyncFn() -> bool) -> im_presence::pb::DeliverResp {
    let began = Instant::now();
    loop {
        let message = DeliverReq { user_id: user, message: "hello".to_owned(), ..Default::default() };
        if let Ok(answer) = node.presence().deliver(message).await
            && hears().await
        {
            return answer.into_inner();
        }
        assert!(began.elapsed() < allowed(NOTICED_WITHIN), "nobody hears it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_reach_subscribers_of_any_server_and_nobody_says_how_many_there_are() {
    let redis = RedisCluster::start().await;
    let cluster = nodes_on(&redis, 2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    one.bind(a_bind(BOB, PHONE, "c")).await;
    for server in &redis.servers {
        let gateway = tokio::sync::Mutex::new(server.subscribe(&[&format!("user:{BOB}")]).await);
        let answer = delivered_to(two, BOB, async || gateway.lock().await.next(Duration::from_secs(1)).await.is_some()).await;
        let told = answer.result.as_ref().map_or("", |result| &result.msg);
        assert!(answer.delivered && told.contains("does not say how many"), "{answer:?}");
    }
    two.query(BOB).await;
    let bound = one.bind(a_bind(BOB, PHONE, "d")).await;
    eventually("hints arrive", NOTICED_WITHIN, async || two.query(BOB).await.version == bound.version).await;
    // The servers that nodes publish and listen at are gone; others are as good.
    redis.kill(5);
    let gateway = tokio::sync::Mutex::new(redis.servers[0].subscribe(&[&format!("user:{BOB}")]).await);
    delivered_to(two, BOB, async || gateway.lock().await.next(Duration::from_secs(1)).await.is_some()).await;
    all_is_well(&cluster, NOTICED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sharded_messages_go_to_the_servers_of_their_slot_and_are_counted() {
    let redis = RedisCluster::start().await;
    let cluster = nodes_on(&redis, 1, &[("REDIS_QUEUE__SHARDED", "true")]).await;
    let node = cluster.node();
    for user in [ALICE, BOB, 3, 4, 5] {
        node.bind(a_bind(user, PHONE, "c")).await;
        let channel = format!("user:{user}");
        let server = redis.owner(&channel).await;
        let gateway = tokio::sync::Mutex::new(server.subscribe_to_shard(&channel).await);
        let hears =
            async || gateway.lock().await.next(Duration::from_secs(1)).await == Some((channel.clone(), b"hello".to_vec()));
        let answer = delivered_to(node, user, hears).await;
        assert_eq!((answer.receivers, answer.delivered), (1, true), "{answer:?}");
        assert_eq!(answer.result.map(|result| result.msg), Some(String::new()));
    }
    // A replica takes them, too, and passes them on, but counts only its own.
    let channel = format!("user:{ALICE}");
    let former = redis.owner(&channel).await.port;
    let place = redis.servers.iter().position(|server| server.port == former).expect("a server");
    let replica = &redis.servers[place + 3];
    let _gateway = replica.subscribe_to_shard(&channel).await;
    redis.promote(place + 3).await;
    eventually("it is counted where it is heard", NOTICED_WITHIN, async || {
        let message = DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
        node.presence().deliver(message).await.is_ok_and(|answer| answer.into_inner().receivers == 1)
    })
    .await;
    eventually("it is the primary", NOTICED_WITHIN, async || redis.owner(&channel).await.port == replica.port).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_reached_over_tls_with_a_certificate_of_our_own() {
    let pki = Pki::new();
    let ca = pki.ca("redis");
    let (server, own) = (ca.issue("server", &["127.0.0.1"]), ca.issue("own", &["node"]));
    let redis = RedisCluster::start_with_tls(&ca, &server).await;
    let file = |path: &std::path::Path| path.display().to_string();
    let files = [("CA_FILE", file(&ca.file)), ("CERT_FILE", file(&own.cert)), ("KEY_FILE", file(&own.key))];
    let tls = |section: &str| {
        let mut all = redis.settings(section);
        all.push((format!("{section}__TLS"), "true".to_owned()));
        all.extend(files.iter().map(|(key, value)| (format!("{section}__{key}"), value.clone())));
        all
    };
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut settings = db.settings(&[]);
    settings.extend(tls("REDIS_CACHE"));
    settings.extend(tls("REDIS_QUEUE"));
    let node = Node::start(settings).await;
    for user in 1..=20 {
        node.bind(a_bind(user, PHONE, "c")).await;
    }
    let keys = async || redis.keys("user:route:*").await.len();
    eventually("all are shown, at every primary", NOTICED_WITHIN, async || keys().await == 20).await;
    eventually("both work", NOTICED_WITHIN, async || node.degraded().await.is_empty()).await;
    // Replicas are reached in the same way.
    for place in 0..3 {
        redis.promote(place + 3).await;
    }
    let began = Instant::now();
    for user in 21..=40 {
        node.bind(a_bind(user, PHONE, "c")).await;
    }
    let names: Vec<String> = (1..=40).map(|user| format!("user:route:{user}")).collect();
    eventually("all are shown at the others", KEYS_AGREE_WITHIN, async || {
        redis.get_many(&names).await.iter().all(Option::is_some)
    })
    .await;
    eventually("both work", NOTICED_WITHIN, async || node.degraded().await.is_empty()).await;
    println!("over TLS at all six: shown at the new primaries {:?} after the third was promoted", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_keeps_two_systems_apart_on_one_cluster() {
    let redis = RedisCluster::start().await;
    let mut nodes = Vec::new();
    for prefix in ["", "eu:"] {
        let db = TestDb::mariadb(MariaDb::shared()).await;
        let mut settings = db.settings(&[("REDIS_CACHE__KEY_PREFIX", prefix)]);
        settings.extend(redis.settings("REDIS_CACHE"));
        let node = Node::start(settings).await;
        node.bind(a_bind(ALICE, PHONE, "c")).await;
        let names =
            [format!("{prefix}user:route:1"), format!("{{{prefix}user:route:1}}:record"), format!("{prefix}presence:store")];
        eventually("its keys are there", NOTICED_WITHIN, async || redis.get_many(&names).await.iter().all(Option::is_some)).await;
        nodes.push((node, db));
    }
    for (node, _) in &nodes {
        assert!(!node.log().iter().any(|line| line.contains("another store uses")), "{:?}", node.log());
        node.unbind(UnbindRouteReq {
            user_id: ALICE,
            gateway_addr: GATEWAY.to_owned(),
            device_id: PHONE.to_owned(),
            ..Default::default()
        })
        .await;
        let left = if node.data == nodes[0].0.data { vec!["eu:user:route:1".to_owned()] } else { Vec::new() };
        eventually("only its own key goes", NOTICED_WITHIN, async || redis.keys("*user:route:1").await == left).await;
    }
}
