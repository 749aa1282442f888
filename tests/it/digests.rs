//! Gateways and the database are compared: what either has lost is mended, and nothing else is touched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::gateway;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Options;
use im_presence::domain::digest::element;
use im_presence::domain::id::ConnId;
use im_presence::domain::id::DeviceId;
use im_presence::domain::id::UserId;
use im_presence::pb;
use im_presence::pb::Code;
use im_presence::pb::gateway_frame::Body as Up;
use im_presence::pb::node_frame::Body as Down;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Status;

use crate::harness::allowed;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::code;
use crate::harness::cluster::each_engine;
use crate::harness::eventually;
use crate::harness::gateway::a_beat;
use crate::harness::heavy;
use crate::harness::node::Node;
use crate::harness::stream::RawStream;
use crate::harness::stream::connection;

const SETTLE: Duration = Duration::from_millis(200);
const OFTEN: [(&str, &str); 2] = [("DIGEST__INTERVAL", "100"), ("DIGEST__SETTLE", "200")];
const SOON: Duration = Duration::from_secs(20);
/// Between heartbeats.
const BEAT: Duration = Duration::from_millis(50);
/// Nobody has connected more recently.
const LONG_AGO_MS: u32 = 60_000;

/// A gateway that keeps a list of its connections by itself, and does nothing unless it is told.
struct Listed {
    stream: RawStream,
    addr: String,
    epoch: u64,
    held: BTreeMap<(i64, String), String>,
    beats_with_digest: bool,
    bound_again: usize,
}

impl Listed {
    async fn attach(node: &Node, addr: &str) -> Self {
        let (stream, epoch) = RawStream::attach(node, addr, 0).await;
        let held = BTreeMap::new();
        Self { stream, addr: addr.to_owned(), epoch, held, beats_with_digest: true, bound_again: 0 }
    }

    /// Phones of all these users connect.
    async fn bind_all(&mut self, node: &Node, users: impl Iterator<Item = i64>) {
        let users: Vec<i64> = users.collect();
        for users in users.chunks(5_000) {
            node.bind_all(users.iter().copied(), &self.addr, self.epoch).await;
        }
        self.held.extend(users.iter().map(|user| ((*user, PHONE.to_owned()), format!("c-{user}"))));
    }

    async fn beat(&self) {
        let sum = self.held.iter().map(|((user, device), conn)| element_of(*user, device, conn)).fold(0, |sum, part| sum ^ part);
        let (routes_digest, routes) = match self.beats_with_digest {
            true => (Some(sum), u32::try_from(self.held.len()).expect("not so many")),
            false => (None, 0),
        };
        self.stream.send(0, Up::Heartbeat(pb::HeartbeatReq { routes_digest, routes, ..a_beat("", 0) })).await;
    }

    /// Beats until it is asked or told something.
    async fn asked(&mut self) -> (u64, pb::DigestQuery) {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < allowed(SOON), "nobody asks");
            self.beat().await;
            if let Some((seq, query)) = self.heard().await {
                return (seq, query);
            }
        }
    }

    /// The next query, if one comes before the next heartbeat is due.
    async fn heard(&mut self) -> Option<(u64, pb::DigestQuery)> {
        let until = Instant::now() + BEAT;
        while let Ok(frame) = timeout(until.saturating_duration_since(Instant::now()), self.stream.wait()).await {
            let frame = frame.expect("the stream goes on");
            match frame.body {
                Some(Down::DigestQuery(query)) => return Some((frame.seq, query)),
                Some(Down::Bound(bound)) => assert_eq!(code(&bound.result), Code::Ok, "{bound:?}"),
                _ => {}
            }
        }
        None
    }

    /// What it holds in a bucket, or its sum.
    fn bucket(&self, bucket: u32, list: bool) -> pb::BucketDigest {
        let of_bucket = || self.held.iter().filter(|((user, _), _)| *user & 255 == i64::from(bucket));
        let bound = |((user_id, device_id), conn_id): (&(i64, String), &String)| pb::Bound {
            user_id: *user_id,
            device_id: device_id.clone(),
            conn_id: conn_id.clone(),
            connected_ms_ago: LONG_AGO_MS,
        };
        let digest = of_bucket().map(|((user, device), conn)| element_of(*user, device, conn)).fold(0, |sum, part| sum ^ part);
        let routes = u32::try_from(of_bucket().count()).expect("not so many");
        pb::BucketDigest { bucket, digest, routes, bound: if list { of_bucket().map(bound).collect() } else { Vec::new() } }
    }

    /// Answers as it ought to, a frame for each bucket, and binds again what it is told.
    async fn obey(&mut self, seq: u64, query: &pb::DigestQuery) {
        for pb::Bound { user_id, device_id, conn_id, .. } in query.bind_again.clone() {
            assert_eq!(self.held.get(&(user_id, device_id.clone())), Some(&conn_id), "it is told of its own connections");
            let connected_ms_ago = LONG_AGO_MS;
            let bind = pb::BindRouteReq { user_id, device_id, conn_id, connected_ms_ago, ..Default::default() };
            self.stream.send(7, Up::Bind(bind)).await;
            self.bound_again += 1;
        }
        if seq == 0 {
            return;
        }
        let buckets = if query.buckets.is_empty() { (0..256).collect() } else { query.buckets.clone() };
        for bucket in &buckets {
            let more = Some(bucket) != buckets.last();
            let answer = pb::DigestAnswer { buckets: vec![self.bucket(*bucket, query.list)], more };
            self.stream.send(seq, Up::Digest(answer)).await;
        }
    }

    /// Does what a gateway does until it is so.
    async fn lives_until(&mut self, what: &str, mut done: impl AsyncFnMut() -> bool) {
        let began = Instant::now();
        while !done().await {
            assert!(began.elapsed() < allowed(SOON), "not within {SOON:?}: {what}");
            self.beat().await;
            while let Some((seq, query)) = self.heard().await {
                self.obey(seq, &query).await;
            }
        }
    }
}

fn element_of(user: i64, device: &str, conn: &str) -> u64 {
    let (device, conn) = (DeviceId::parse(device).expect("a name"), ConnId::parse(conn).expect("a name"));
    element(UserId::parse(user).expect("a user"), &device, &conn)
}

/// What an operator is told of the last look at a gateway.
async fn report(node: &Node, addr: &str) -> String {
    let lives = node.list_gateways(false).await.lives;
    lives.into_iter().find(|life| life.gateway_addr == addr).expect("it lives").digest
}

async fn looks(node: &Node, result: &str) -> f64 {
    of_label(node, "im_presence_digest_looks_total", result).await
}

async fn mended(node: &Node, what: &str) -> f64 {
    of_label(node, "im_presence_digest_mended_total", what).await
}

async fn of_label(node: &Node, name: &str, label: &str) -> f64 {
    let series = node.series(name).await;
    series.iter().filter(|(labels, _)| labels.contains(&format!("\"{label}\""))).map(|(_, value)| value).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_database_has_lost_is_bound_again_and_what_no_gateway_holds_is_unbound_and_nothing_else_is_touched() {
    let _turn = heavy().await;
    const ALL: i64 = 21_000;
    const ADD: &str = "INSERT INTO routes (user_id, device_id, platform, epoch, conn_id, connected_at_ms, client_ip, client_port, \
        bound_version, bound_at_ms, idle, digest) SELECT user_id + 100000, device_id, platform, epoch, conn_id, connected_at_ms, \
        client_ip, client_port, bound_version, bound_at_ms, idle, 0 FROM routes WHERE user_id > 20000";
    const VERSIONS: &str = "SELECT CAST(SUM(bound_version % 1000003 * user_id) AS SIGNED) FROM routes WHERE user_id > 1000";
    each_engine(&OFTEN, async |cluster| {
        let node = cluster.node();
        let mut gateway = Listed::attach(node, GATEWAY).await;
        gateway.bind_all(node, 1..=ALL).await;
        gateway.lives_until("both are equal", async || report(node, GATEWAY).await.starts_with("equal")).await;
        let (before, done) = (cluster.db.number(VERSIONS).await, looks(node, "mended").await);
        cluster.db.run("DELETE FROM routes WHERE user_id <= 1000").await;
        cluster.db.run(ADD).await;
        let began = Instant::now();
        gateway.lives_until("it is mended", async || looks(node, "mended").await > done).await;
        gateway.lives_until("and found equal", async || report(node, GATEWAY).await.starts_with("equal")).await;
        println!("{:?} from the damage to equality", began.elapsed());
        assert_eq!(looks(node, "mended").await - done, 1.0, "one look mends, the next finds nothing");
        assert_eq!((mended(node, "ghost").await, mended(node, "missing").await), (1_000.0, 1_000.0));
        assert_eq!(gateway.bound_again, 1_000);
        assert_eq!(cluster.db.number("SELECT COUNT(*) FROM routes").await, ALL);
        assert_eq!(cluster.db.number(VERSIONS).await, before, "all others are as they were");
    })
    .await;
}

#[tokio::test]
async fn a_gateway_that_has_lost_its_list_takes_nobody_offline() {
    let cluster = Cluster::mariadb(1, &OFTEN).await;
    let node = cluster.node();
    let mut gateway = Listed::attach(node, GATEWAY).await;
    gateway.bind_all(node, 1..=500).await;
    gateway.held.clear();
    let refused = async || report(node, GATEWAY).await.starts_with("refused: at least 100 % differ");
    gateway.lives_until("it is refused", refused).await;
    assert!(node.metric("im_presence_digest_refused_total").await >= 1.0);
    assert_eq!(mended(node, "ghost").await, 0.0);
    assert_eq!(node.online(1..=500).await, 500);
    assert!(node.log().iter().any(|line| line.contains("digest.max_share") && line.contains("WARN")));
}

#[tokio::test]
async fn a_gateway_that_gives_no_digest_is_asked_nothing_and_keeps_its_users() {
    let cluster = Cluster::mariadb(1, &OFTEN).await;
    let node = cluster.node();
    let mut silent = Listed::attach(node, GATEWAY).await;
    silent.beats_with_digest = false;
    silent.bind_all(node, [ALICE].into_iter()).await;
    silent.held.clear();
    let mut other = Listed::attach(node, OTHER_GATEWAY).await;
    other.bind_all(node, [BOB].into_iter()).await;
    other.held.clear();
    // Both hold nothing, and both beat; the one that says so is mended.
    let began = Instant::now();
    while mended(node, "ghost").await == 0.0 {
        assert!(began.elapsed() < allowed(SOON), "the other one is not mended");
        silent.beat().await;
        assert_eq!(silent.heard().await, None);
        other.beat().await;
        if let Some((seq, query)) = other.heard().await {
            other.obey(seq, &query).await;
        }
    }
    assert_eq!((node.online([ALICE]).await, node.online([BOB]).await), (1, 0));
    assert_eq!(report(node, GATEWAY).await, "");
}

#[tokio::test]
async fn who_connects_anew_between_the_two_looks_stays() {
    let cluster = Cluster::mariadb(1, &OFTEN).await;
    let node = cluster.node();
    let mut gateway = Listed::attach(node, GATEWAY).await;
    gateway.bind_all(node, [ALICE, BOB].into_iter()).await;
    gateway.held.clear();
    let mut listed = false;
    let (seq, again) = loop {
        let (seq, query) = gateway.asked().await;
        if listed && query.list {
            break (seq, query); // the second look
        }
        listed = query.list;
        gateway.obey(seq, &query).await;
    };
    assert_eq!(again.buckets, [1, 2]);
    // Alice binds before the gateway answers, and the gateway forgets her again.
    gateway.stream.bind(ALICE, PHONE, "c-new").await;
    tokio::time::sleep(2 * SETTLE).await; // that bind is no more under way
    gateway.obey(seq, &again).await;
    gateway.lives_until("the look is over", async || looks(node, "mended").await >= 1.0).await;
    let alice = node.query_sql(ALICE).await;
    assert_eq!((mended(node, "ghost").await, alice.routes.len(), &*alice.routes[0].conn_id), (1.0, 1, "c-new"));
    assert!(!node.query_sql(BOB).await.is_online);
}

#[tokio::test]
async fn a_gateway_that_gives_no_digest_any_more_is_asked_nothing_more_and_keeps_its_users() {
    let cluster = Cluster::mariadb(1, &OFTEN).await;
    let node = cluster.node();
    let mut gateway = Listed::attach(node, GATEWAY).await;
    gateway.bind_all(node, [ALICE].into_iter()).await;
    gateway.held.clear();
    tokio::time::sleep(2 * SETTLE).await; // she is no more under way
    loop {
        let (seq, query) = gateway.asked().await;
        if query.list {
            gateway.beats_with_digest = false;
            gateway.beat().await;
            gateway.obey(seq, &query).await;
            break;
        }
        gateway.obey(seq, &query).await;
    }
    let began = Instant::now();
    while looks(node, "silent").await == 0.0 {
        assert!(began.elapsed() < allowed(SOON), "the look does not end");
        gateway.beat().await;
        assert_eq!(gateway.heard().await, None);
    }
    assert_eq!((mended(node, "ghost").await, node.online([ALICE]).await), (0.0, 1));
    assert_eq!(report(node, GATEWAY).await, "");
}

#[tokio::test]
async fn with_repair_off_a_difference_is_only_shown() {
    let cluster = Cluster::mariadb(1, &[&OFTEN[..], &[("DIGEST__REPAIR", "false")]].concat()).await;
    let node = cluster.node();
    let mut gateway = Listed::attach(node, GATEWAY).await;
    gateway.bind_all(node, 1..=3).await;
    gateway.held.remove(&(ALICE, PHONE.to_owned()));
    cluster.db.run("DELETE FROM routes WHERE user_id = 2").await;
    cluster.db.run("UPDATE routes SET digest = 0 WHERE user_id = 3").await;
    let shown = async || report(node, GATEWAY).await.starts_with("1 ghosts, 1 missing");
    gateway.lives_until("it is shown", shown).await;
    assert_eq!(node.metric("im_presence_digest_mended_total").await, 0.0);
    assert_eq!(
        (gateway.bound_again, cluster.db.number("SELECT CAST(SUM(user_id) AS SIGNED) FROM routes").await),
        (0, ALICE + CAROL)
    );
    assert_eq!(cluster.db.number("SELECT digest FROM routes WHERE user_id = 3").await, 0);
}

#[tokio::test]
async fn rows_that_an_older_node_wrote_are_given_their_digests() {
    each_engine(&OFTEN, async |cluster| {
        let node = cluster.node();
        let mut gateway = Listed::attach(node, GATEWAY).await;
        gateway.bind_all(node, 1..=1_000).await;
        // It writes none, and leaves the former connection's where it writes a row anew.
        cluster
            .db
            .run("UPDATE routes SET digest = CASE WHEN user_id <= 500 THEN 0 ELSE digest + 1 END WHERE user_id <= 800")
            .await;
        gateway.lives_until("they are corrected", async || mended(node, "digest").await >= 800.0).await;
        gateway.lives_until("both are equal", async || report(node, GATEWAY).await.starts_with("equal")).await;
        let stored = cluster.db.number("SELECT digest FROM routes WHERE user_id = 7").await;
        assert_eq!(stored.cast_unsigned(), element_of(7, PHONE, "c-7"));
        assert_eq!((mended(node, "digest").await, node.metric("im_presence_digest_mended_total").await), (800.0, 800.0));
        assert_eq!((gateway.bound_again, node.online(1..=1_000).await), (0, 1_000));
    })
    .await;
}

#[tokio::test]
async fn an_answer_that_nobody_has_asked_for_ends_the_stream() {
    let cluster = Cluster::mariadb(1, &OFTEN).await;
    let node = cluster.node();
    let bound = |user_id, device_id: &str| pb::Bound { user_id, device_id: device_id.to_owned(), ..Default::default() };
    let of = |bucket, bound| vec![pb::BucketDigest { bucket, bound, ..Default::default() }];
    // An answer to the query for sums, 256 buckets of them, or to what comes after it.
    let too_many = (0..10_001).map(|n| bound(n * 256 + 256, PHONE)).collect();
    for (buckets, after, want) in [
        (vec![], 5, "nobody has asked"),
        (of(256, vec![]), 0, "bucket"),
        (of(1, vec![bound(257, PHONE)]), 0, "bucket 1 was not asked for"),
        (of(0, vec![bound(0, PHONE)]), 0, "user_id"),
        (of(0, vec![bound(256, "my phone")]), 0, "device_id"),
        (of(0, too_many), 0, "at most 10000"),
        (vec![pb::BucketDigest::default(); 257], 0, "at most 256"),
    ] {
        let mut gateway = Listed::attach(node, &format!("gw-{want}:7000").replace(' ', "-")).await;
        gateway.held.insert((ALICE, PHONE.to_owned()), "not-bound".to_owned());
        let (seq, _) = gateway.asked().await;
        gateway.stream.send(seq + after, Up::Digest(pb::DigestAnswer { buckets, more: false })).await;
        let status: Status = gateway.stream.ended().await;
        assert!(status.code() == tonic::Code::InvalidArgument && status.message().contains(want), "{want}: {status:?}");
    }
    let mut old = Listed::attach(node, OTHER_GATEWAY).await;
    old.held.insert((ALICE, PHONE.to_owned()), "not-bound".to_owned());
    let (seq, query) = old.asked().await;
    (old.stream, _) = RawStream::attach(node, OTHER_GATEWAY, old.epoch).await;
    old.obey(seq, &query).await;
    assert!(old.stream.ended().await.message().contains("nobody has asked"), "what was asked ends with the stream");
}

/// A gateway by the client library.
fn start(node: &Node, addr: &str) -> (Arc<gateway::Gateway>, Arc<Mutex<Vec<i64>>>) {
    let lost = Arc::<Mutex<Vec<i64>>>::default();
    let closed = lost.clone();
    let options = Options { nodes: vec![node.data.to_string()], gateway_addr: addr.to_owned(), ..Options::default() };
    let gateway = gateway::Gateway::start(options, move |event| {
        if let Event::Lost(connection, _) = event {
            closed.lock().expect("nobody panics").push(connection.user_id);
        }
    });
    (Arc::new(gateway.expect("addresses")), lost)
}

const BEATS: [(&str, &str); 2] = [("GATEWAY__HEARTBEAT_INTERVAL", "100"), ("GATEWAY__LEASE", "15000")];

#[tokio::test]
async fn the_client_library_binds_again_what_was_lost_and_closes_what_has_moved() {
    let cluster = Cluster::mariadb(1, &[OFTEN, BEATS].concat()).await;
    let node = cluster.node();
    let (gateway, lost) = start(node, GATEWAY);
    for user in 1..=50 {
        gateway.bind(connection(user, PHONE, &format!("c-{user}"))).await.expect("it runs");
    }
    let elsewhere = node.register(OTHER_GATEWAY).await;
    // Nobody is told of what is done here: the kick of user 2 is lost.
    let moved = format!(
        "UPDATE routes SET epoch = {elsewhere}, connected_at_ms = connected_at_ms + 600000, bound_version = bound_version + 1 \
         WHERE user_id = 2"
    );
    cluster.db.run("DELETE FROM routes WHERE user_id BETWEEN 11 AND 20").await;
    cluster.db.run(&moved).await;
    let own = "SELECT COUNT(*) FROM routes JOIN lives ON lives.epoch = routes.epoch WHERE lives.gateway_addr = 'gw-1:7000'";
    let is_mended = async || cluster.db.number(own).await == 49 && *lost.lock().expect("nobody panics") == [2];
    eventually("the database has them again, and user 2's socket is closed", SOON, is_mended).await;
    eventually("both are equal", SOON, async || report(node, GATEWAY).await.starts_with("equal")).await;
    assert_eq!(mended(node, "ghost").await, 0.0);
    assert_eq!(node.query_sql(2).await.gateway_addr, OTHER_GATEWAY);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_whose_clients_come_and_go_all_the_time_has_nothing_mended() {
    let _turn = heavy().await;
    let cluster = Cluster::mariadb(1, &[[("DIGEST__INTERVAL", "100"), ("DIGEST__SETTLE", "1000")], BEATS].concat()).await;
    let node = cluster.node();
    let (gateway, lost) = start(node, GATEWAY);
    let ended = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for client in 0..40 {
        let (gateway, ended) = (gateway.clone(), ended.clone());
        clients.spawn(async move {
            let mut binds = 0;
            while !ended.load(Ordering::Relaxed) {
                let (user, conn) = (1 + client * 50 + binds % 50, format!("c-{client}-{binds}"));
                let bound = gateway.bind(connection(user, PHONE, &conn)).await.expect("it runs");
                assert_eq!(code(&bound.result), Code::Ok, "{bound:?}");
                if binds % 2 == 0 {
                    gateway.unbind(user, PHONE, &conn).await.expect("it runs");
                }
                binds += 1;
            }
            binds
        });
    }
    let looked = async || looks(node, "under_way").await >= 10.0;
    eventually("what differs is looked at again and again", Duration::from_secs(60), looked).await;
    ended.store(true, Ordering::Relaxed);
    println!("{} binds; {:?}", clients.join_all().await.iter().sum::<i64>(), node.series("im_presence_digest_looks_total").await);
    let done = looks(node, "equal").await;
    eventually("then both are equal", SOON, async || looks(node, "equal").await > done + 1.0).await;
    assert_eq!(node.metric("im_presence_digest_mended_total").await, 0.0);
    assert!(lost.lock().expect("nobody panics").is_empty());
}
