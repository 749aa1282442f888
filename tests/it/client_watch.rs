//! The client library, as clients of gateways and services see others by it: statuses, idleness, watch.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use im_presence::client::caller::Caller;
use im_presence::client::fields;
use im_presence::client::gateway::ClientKey;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Gateway;
use im_presence::client::gateway::Options;
use im_presence::client::gateway::WatchError;
use im_presence::client::watch::Watch;
use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::SetStatusReq;
use im_presence::pb::Status;
use tokio::time::timeout;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::stream::connection;

const SOON: Duration = Duration::from_secs(10);
/// Longer than anything is held back before it is told.
const SETTLED: Duration = Duration::from_secs(3);
/// The library lets a device change so often, and then it has to be told.
const NEXT_CHANGE: Duration = Duration::from_secs(15);
const IDLE_AFTER: Duration = Duration::from_secs(1);
const PAGE: ClientKey = 1;
const OTHER_PAGE: ClientKey = 2;

/// A gateway whose clients look at users.
struct Program {
    gateway: Gateway,
    told: Arc<Mutex<Told>>,
}

#[derive(Default)]
struct Told {
    presences: Vec<(ClientKey, pb::UserPresence)>,
    not_watched: Vec<(ClientKey, Vec<i64>, String)>,
    epochs: Vec<u64>,
}

impl Program {
    async fn start(addr: &str, nodes: &[Node], idle_after: Duration) -> Self {
        let nodes = nodes.iter().map(|node| node.data.to_string()).collect();
        let options = Options { nodes, gateway_addr: addr.to_owned(), idle_after, ..Options::default() };
        let told = Arc::<Mutex<Told>>::default();
        let tell = told.clone();
        let gateway = Gateway::start(options, move |event| match event {
            Event::Presence { client, presence } => lock(&tell).presences.push((client, presence)),
            Event::NotWatched { client, users, why } => lock(&tell).not_watched.push((client, users, why)),
            Event::Attached { epoch } => lock(&tell).epochs.push(epoch),
            Event::Delivery(..) | Event::Kick(..) | Event::Move(..) | Event::Draining(_) => {}
            Event::Lost(..) | Event::Detached(_) | Event::Superseded => {}
        });
        let this = Self { gateway: gateway.expect("addresses"), told };
        eventually("it is attached", SOON, async || !lock(&this.told).epochs.is_empty()).await;
        this
    }

    async fn log_in(&self, user: i64) {
        let bound = self.gateway.bind(connection(user, PHONE, &format!("c-{user}"))).await.expect("it runs");
        assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
    }

    async fn set(&self, request: SetStatusReq) {
        let set = self.gateway.set_status(request).await.expect("it runs");
        assert_eq!(code(&set.result), Code::Ok, "{set:?}");
    }

    /// All that a client was told of a user.
    fn told(&self, client: ClientKey, user: i64) -> Vec<(Status, String)> {
        let told = lock(&self.told);
        let of_user = told.presences.iter().filter(|(to, presence)| *to == client && presence.user_id == user);
        of_user.map(|(_, presence)| (presence.status(), presence.status_text.clone())).collect()
    }

    async fn shows(&self, client: ClientKey, user: i64, status: Status, within: Duration) {
        let last = || self.told(client, user).last().map(|(status, _)| *status);
        eventually(&format!("client {client} sees user {user} as {status:?}"), within, async || last() == Some(status)).await;
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wants(user_id: i64, status: Status, text: &str) -> SetStatusReq {
    SetStatusReq { user_id, status: status.into(), text: Some(text.to_owned()), ..Default::default() }
}

fn caller(nodes: &[Node]) -> Caller {
    let nodes: Vec<String> = nodes.iter().map(|node| node.data.to_string()).collect();
    Caller::new(&nodes.iter().map(String::as_str).collect::<Vec<_>>(), allowed(SOON)).expect("addresses")
}

/// Waits until a watch tells this of a user, and returns its version. Others may be told meanwhile.
async fn tells(watch: &mut Watch, user: i64, status: Status) -> u64 {
    loop {
        let told = timeout(allowed(SOON), watch.next()).await.unwrap_or_else(|_| panic!("user {user} is {status:?}"));
        let told = told.expect("no trouble");
        if told.user_id == user && told.status() == status {
            return told.version;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_gateway_see_their_contacts_change_and_nothing_of_gateways() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let here = Program::start(GATEWAY, &cluster.nodes[..1], Duration::ZERO).await;
    let there = Program::start(OTHER_GATEWAY, &cluster.nodes[1..], Duration::ZERO).await;
    here.gateway.watch(PAGE, [BOB, CAROL]).await.expect("not many");
    here.shows(PAGE, BOB, Status::Offline, SOON).await;
    here.shows(PAGE, CAROL, Status::Offline, SOON).await;
    there.log_in(BOB).await;
    here.shows(PAGE, BOB, Status::Online, SOON).await;
    there.set(wants(BOB, Status::Busy, "in a meeting")).await;
    here.shows(PAGE, BOB, Status::Busy, SOON).await;
    assert_eq!(here.told(PAGE, BOB).last().map(|(_, text)| text.as_str()), Some("in a meeting"));

    here.gateway.watch(OTHER_PAGE, [BOB]).await.expect("not many");
    assert_eq!(here.told(OTHER_PAGE, BOB), [(Status::Busy, "in a meeting".to_owned())], "from memory, at once");
    here.gateway.watch(PAGE, [CAROL]).await.expect("not many");
    there.set(wants(BOB, Status::Invisible, "")).await;
    here.shows(OTHER_PAGE, BOB, Status::Offline, SOON).await;
    assert_eq!(here.told(PAGE, BOB).last().map(|(status, _)| *status), Some(Status::Busy), "it looks no more");
    assert_eq!(here.told(PAGE, CAROL).len(), 1, "nothing has changed");
    let told = lock(&here.told);
    assert!(told.presences.iter().all(|(_, one)| one.devices == 0 && one.platforms.is_empty() && one.gateway_addr.is_empty()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_attaches_to_another_node_is_told_only_what_differs() {
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let program = Program::start(GATEWAY, &cluster.nodes, Duration::ZERO).await;
    for user in [BOB, CAROL] {
        cluster.node().bind(a_bind(user, PHONE, "c")).await;
    }
    program.gateway.watch(PAGE, [BOB, CAROL]).await.expect("not many");
    program.shows(PAGE, BOB, Status::Online, SOON).await;
    program.shows(PAGE, CAROL, Status::Online, SOON).await;
    let has_stream = cluster.nodes[0].metric("im_presence_streams").await > 0.0;
    let (attached, other) = if has_stream { (0, 1) } else { (1, 0) };
    cluster.nodes[attached].kill();
    let set = cluster.nodes[other].presence().set_status(wants(BOB, Status::Away, "")).await.expect("an answer").into_inner();
    assert_eq!(code(&set.result), Code::Ok, "{set:?}");
    program.shows(PAGE, BOB, Status::Away, SOON).await;
    tokio::time::sleep(SETTLED).await;
    assert_eq!(program.told(PAGE, CAROL).len(), 1, "{:?}", program.told(PAGE, CAROL));
    let epochs = lock(&program.told).epochs.clone();
    assert!(epochs.len() == 2 && epochs[0] == epochs[1], "{epochs:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_nobody_uses_is_away_until_somebody_does_and_so_it_is_in_a_new_life() {
    let cluster = Cluster::with_redis(1, &[]).await;
    let program = Program::start(GATEWAY, &cluster.nodes, IDLE_AFTER).await;
    program.gateway.watch(PAGE, [BOB, CAROL]).await.expect("not many");
    for user in [BOB, CAROL] {
        program.log_in(user).await;
    }
    program.gateway.active(BOB, PHONE);
    program.shows(PAGE, BOB, Status::Away, SOON).await;
    assert!(cluster.node().query(BOB).await.routes[0].idle);

    let purge = pb::PurgeGatewaysReq { epochs: vec![lock(&program.told).epochs[0]], held: false, ..Default::default() };
    cluster.node().operator().purge_gateways(purge).await.expect("purged");
    eventually("there is a new life", SOON, async || lock(&program.told).epochs.len() == 2).await;
    eventually("everybody is bound again", SOON, async || cluster.node().online([BOB, CAROL]).await == 2).await;
    let bob = cluster.node().query_sql(BOB).await;
    assert!(bob.routes[0].idle && bob.status() == Status::Away, "{bob:?}");
    assert!(!cluster.node().query_sql(CAROL).await.routes[0].idle, "nobody says when it is used");

    let is_online = || program.told(PAGE, BOB).last().map(|(status, _)| *status) == Some(Status::Online);
    eventually("Bob is seen to use it", NEXT_CHANGE, async || {
        program.gateway.active(BOB, PHONE);
        is_online()
    })
    .await;
    assert!(program.told(PAGE, CAROL).iter().all(|(status, _)| *status != Status::Away));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_wishes_of_a_user_the_last_one_holds_also_where_they_are_too_many() {
    let cluster = Cluster::with_redis(1, &[("STATUS__BURST", "2"), ("STATUS__RATE", "1")]).await;
    let program = Program::start(GATEWAY, &cluster.nodes, Duration::ZERO).await;
    program.log_in(BOB).await;
    let texts: Vec<String> = (0..6).map(|n| format!("text {n}")).collect();
    let [a, b, c, d, e, f] = &texts[..] else { panic!("six") };
    tokio::join!(
        program.set(wants(BOB, Status::Busy, a)),
        program.set(wants(BOB, Status::Away, b)),
        program.set(wants(BOB, Status::Busy, c)),
        program.set(wants(BOB, Status::Away, d)),
        program.set(wants(BOB, Status::Busy, e)),
        program.set(wants(BOB, Status::Away, f)),
    );
    let bob = cluster.node().query_sql(BOB).await;
    assert_eq!((bob.status(), bob.status_text.as_str()), (Status::Away, "text 5"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_not_watched_is_named_and_may_be_asked_for_again() {
    let cluster = Cluster::with_redis(1, &[("WATCH__MAX_USERS_PER_STREAM", "10")]).await;
    let program = Program::start(GATEWAY, &cluster.nodes, Duration::ZERO).await;
    program.gateway.watch(PAGE, 1..=10).await.expect("not many");
    program.shows(PAGE, 10, Status::Offline, SOON).await;
    for times in 1..=2 {
        program.gateway.watch(OTHER_PAGE, [10, 11]).await.expect("not many");
        eventually("it is refused", SOON, async || lock(&program.told).not_watched.len() == times).await;
        let (client, users, why) = lock(&program.told).not_watched[times - 1].clone();
        assert!(client == OTHER_PAGE && users == [11] && !why.is_empty(), "{client} {users:?} {why}");
    }
    assert_eq!(program.told(OTHER_PAGE, 10).len(), 1, "it is watched");
    let too_long = program.gateway.watch(PAGE, 1..=5_001).await;
    assert_eq!(too_long, Err(WatchError::ListTooLong(5_001)));
    assert_eq!(program.gateway.watch(PAGE, [0]).await, Err(WatchError::Invalid(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_of_a_service_outlives_its_nodes_and_its_users_come_and_go() {
    let mut cluster = Cluster::with_redis(2, &[]).await;
    let caller = caller(&cluster.nodes);
    let mut watch = caller.watch([BOB, CAROL]).expect("not many");
    for user in [BOB, CAROL] {
        cluster.node().bind(a_bind(user, PHONE, "c")).await;
    }
    let mut last = tells(&mut watch, BOB, Status::Online).await;
    for (round, status) in [Status::Busy, Status::Away, Status::Online].into_iter().enumerate() {
        cluster.nodes[round % 2].kill();
        let set = caller.set_status(wants(BOB, status, "")).await.expect("an answer");
        assert_eq!((code(&set.result), set.shown()), (Code::Ok, status), "{set:?}");
        let version = tells(&mut watch, BOB, status).await;
        assert!(version > last, "{version} after {last}");
        last = version;
        cluster.nodes[round % 2].restart().await;
    }
    watch.add(&[ALICE]).expect("not many");
    tells(&mut watch, ALICE, Status::Offline).await;
    watch.remove(&[BOB]);
    caller.set_status(wants(BOB, Status::Busy, "")).await.expect("an answer");
    caller.set_status(wants(CAROL, Status::Busy, "")).await.expect("an answer");
    loop {
        let told = timeout(allowed(SOON), watch.next()).await.expect("in time").expect("no trouble");
        assert_ne!(told.user_id, BOB, "nobody looks");
        if told.user_id == CAROL && told.status() == Status::Busy {
            break;
        }
    }
    assert_eq!(watch.add(&[0]), Err(WatchError::Invalid(0)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_and_a_shell_see_how_a_user_is_and_was_shown() {
    let cluster = Cluster::sqlite(&[]).await;
    let (node, caller) = (cluster.node(), caller(&cluster.nodes));
    node.bind(a_bind(ALICE, PHONE, "c")).await;
    let ctl = |words: &str| {
        let (exit, text) = node.ctl(&words.split(' ').collect::<Vec<_>>());
        println!("{words}\n{text}");
        (exit, text)
    };
    assert_eq!(ctl("status 1 busy --text meeting --for 3600").0, 0);
    assert!(ctl("status 1").1.contains("user 1 is shown as BUSY \"meeting\" since "));
    assert!(ctl("query 1").1.contains("user 1 is online (BUSY \"meeting\" since "));
    assert_eq!(ctl("status 1 --device phone --idle true").0, 0);
    assert_eq!(ctl("status 1 --device laptop --idle true").0, 3, "there is no such device");
    let request = pb::GetStatusHistoryReq { user_id: ALICE, page_size: 1, ..Default::default() };
    let newest = caller.status_history(request).await.expect("an answer");
    assert_eq!((newest.changes[0].shown(), newest.changes[0].cause.as_str()), (Status::Busy, "set"), "{newest:?}");
    let (exit, history) = ctl("history 1");
    assert!(exit == 0 && history.contains("login") && history.contains("BUSY"), "{history}");
    let time = caller.online_time(pb::GetOnlineTimeReq { user_id: ALICE, ..Default::default() }).await.expect("an answer");
    assert!(time.online_now && time.sessions == 1, "{time:?}");
    assert!(ctl("online-time 1").1.contains("1 session, online now"));
    assert_eq!(ctl("forget-user 1").0, 2, "nobody has said that it is meant");
    assert_eq!(ctl("forget-user 1 --dry-run").0, 0);
    assert_eq!(ctl("forget-user 1 --yes").0, 0);
    assert_eq!(ctl("status 1").0, 3);
    assert!(ctl("history 1").1.starts_with("0 changes of user 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_client_refuses_the_statuses_that_nodes_refuse_and_no_others() {
    let cluster = Cluster::sqlite(&[("STATUS__RATE", "0")]).await;
    let good = SetStatusReq { expire_after_s: 60, ..wants(ALICE, Status::Busy, "in a meeting") };
    let mut requests = vec![good.clone(), SetStatusReq { user_id: 0, ..good.clone() }];
    requests.extend([-1, 0, 1, 4, 5, 6].map(|status| SetStatusReq { status, ..good.clone() }));
    requests.extend([0, 1, 2_678_400, 2_678_401].map(|expire_after_s| SetStatusReq { expire_after_s, ..good.clone() }));
    for text in ["", "\n", "grüß dich", "\u{7f}", &"x".repeat(256), &"x".repeat(257), &"ü".repeat(129)] {
        requests.push(SetStatusReq { text: Some(text.to_owned()), ..good.clone() });
    }
    for device_id in ["", "a b", &"x".repeat(128), &"x".repeat(129)] {
        requests.push(SetStatusReq { device_id: device_id.to_owned(), idle: Some(true), ..good.clone() });
    }
    requests.push(SetStatusReq { user_id: ALICE, ..Default::default() });
    requests.push(SetStatusReq { user_id: ALICE, expire_after_s: 60, ..Default::default() });
    requests.push(SetStatusReq { device_id: PHONE.to_owned(), ..good.clone() });
    for request in requests {
        let answer = cluster.node().presence().set_status(request.clone()).await;
        let node_takes = !matches!(answer, Err(status) if status.code() == tonic::Code::InvalidArgument);
        assert_eq!(fields::check_status(&request).is_ok(), node_takes, "{request:?}");
    }
}
