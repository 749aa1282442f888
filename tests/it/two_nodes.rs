//! Several nodes on one database are one service.

use std::collections::HashMap;
use std::collections::HashSet;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use tokio::task::JoinSet;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::devices;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;

/// What another node knows may be this old; the rest is for the machine.
const SEEN_ELSEWHERE: Duration = Duration::from_millis(1_500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_who_never_existed_are_bound_through_both_nodes_at_once_and_keep_both_devices() {
    const USERS: i64 = 1_000;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, &[]).await;
    let mut binds = JoinSet::new();
    for user in 1..=USERS {
        for (node, device) in cluster.nodes.iter().zip([PHONE, LAPTOP]) {
            let mut client = node.presence();
            binds.spawn(async move { client.bind_route(a_bind(user, device, "c")).await });
        }
    }
    for bind in binds.join_all().await {
        let bind = bind.expect("a bind").into_inner();
        assert_eq!((code(&bind.result), bind.kicked.len()), (Code::Ok, 0), "{bind:?}");
    }
    assert_eq!(cluster.db.number("SELECT COUNT(*) FROM lives").await, 1, "both agree on the gateway's life");
    for user in 1..=USERS {
        for node in &cluster.nodes {
            assert_eq!(devices(&node.query_sql(user).await), [LAPTOP, PHONE], "user {user}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_binds_at_once_the_five_devices_bound_last_remain_and_each_other_bind_is_told_to_exactly_one_caller() {
    const BINDS: usize = 64;
    const DEVICES: usize = 16;
    const MAX_DEVICES: usize = 5;
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(2, &[("ROUTE__MAX_DEVICES", "5")]).await;
    let mut binds = JoinSet::new();
    for i in 0..BINDS {
        let mut client = cluster.nodes[i % 2].presence();
        let device = i / 2 % DEVICES;
        let request = a_bind(ALICE, &format!("device-{device}"), &format!("c-{i}"));
        binds.spawn(async move { (device, client.bind_route(request).await.expect("a bind").into_inner()) });
    }
    let answers = binds.join_all().await;
    assert!(answers.iter().all(|(_, answer)| code(&answer.result) == Code::Ok), "{answers:?}");

    // A bind of a device that is online takes that device's own place, so what remains is the last bind of five devices.
    let mut newest: Vec<_> = answers.iter().map(|(device, answer)| (answer.version, device, &answer.route_key)).collect();
    newest.sort_unstable_by(|one, other| other.cmp(one));
    let mut devices = HashSet::new();
    let (mut remain, over): (Vec<(u64, &usize, &String)>, Vec<_>) =
        newest.iter().partition(|(_, device, _)| devices.insert(**device) && devices.len() <= MAX_DEVICES);
    let answer = cluster.node().query_sql(ALICE).await;
    let mut routes: Vec<_> = answer.routes.iter().map(|route| &route.route_key).collect();
    routes.sort_unstable();
    remain.sort_unstable_by_key(|(.., key)| *key);
    assert_eq!(routes, remain.iter().map(|(.., key)| *key).collect::<Vec<_>>(), "the last binds of the last five devices");

    let mut told: HashMap<&String, usize> = HashMap::new();
    for kicked in answers.iter().flat_map(|(_, answer)| &answer.kicked) {
        *told.entry(&kicked.route_key).or_default() += 1;
    }
    assert_eq!(told.len(), BINDS - MAX_DEVICES, "nobody else is named");
    for (.., key) in over {
        assert_eq!(told.get(key), Some(&1), "{key} is named once");
    }
}

#[tokio::test]
async fn two_nodes_started_at_once_on_an_empty_database_both_come_up() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let (one, two) = tokio::join!(Node::start(db.settings(&[])), Node::start(db.settings(&[])));
    let bound = one.bind(a_bind(ALICE, PHONE, "c")).await;
    assert_eq!(two.query_sql(ALICE).await.version, bound.version);
    assert_eq!(db.number("SELECT COUNT(*) FROM cluster").await, 1, "they agree on one store");
}

#[tokio::test]
async fn a_bind_through_one_node_shows_through_the_other_within_a_second() {
    let cluster = Cluster::mariadb(2, &[]).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    // The other node remembers that one user is not there, and where the other one was.
    assert!(!two.query(ALICE).await.is_online);
    one.bind(a_bind(BOB, PHONE, "c-1")).await;
    assert_eq!(two.query_sql(BOB).await.routes[0].conn_id, "c-1");
    for user in [ALICE, BOB] {
        let bound = one.bind(BindRouteReq { ..a_bind(user, PHONE, "c-2") }).await;
        let began = Instant::now();
        assert_eq!(two.query_sql(user).await.version, bound.version, "with max_staleness_ms = 0 it shows at once");
        eventually("it shows", SEEN_ELSEWHERE, async || two.query(user).await.version == bound.version).await;
        println!("user {user}: seen by the other node after {:?}", began.elapsed());
    }
    // Once more without the read of SQL in between, which refreshes the memory.
    let bound = one.bind(a_bind(BOB, PHONE, "c-3")).await;
    eventually("it shows", SEEN_ELSEWHERE, async || two.query(BOB).await.version == bound.version).await;
}
