//! Each alert fires when what it is about happens to real nodes, and ends when that is over. Prometheus is real; the windows and
//! waits of the rules are 30 times shorter.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use im_presence::api::transport::PREFACE;
use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::DeliverReq;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::deliver::a_message;
use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::Redis;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::Gateway;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::node::settings;
use crate::harness::pki::Pki;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::prometheus::Prometheus;
use crate::harness::traffic::Traffic;

const SHORTER: u64 = 30;
const SCRAPE_INTERVAL: Duration = Duration::from_millis(500);
/// The longest window and the longest wait, shortened, one after the other, and as much again for the machine.
const FIRES_WITHIN: Duration = Duration::from_secs(180);
const ENDS_WITHIN: Duration = Duration::from_secs(180);
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
const DAY: Duration = Duration::from_secs(86_400);

/// Prometheus before nodes, and which alerts are known to fire by now.
struct Watch(Prometheus);

impl Watch {
    async fn over(nodes: &[&Node]) -> Self {
        Self(Prometheus::start(nodes, SHORTER, SCRAPE_INTERVAL).await)
    }

    async fn is_silent(&self, alert: &str) {
        assert!(!self.0.firing().await.contains(alert), "{alert} fires already: {:?}", self.0.alerts().await);
    }

    /// Goes on with `cause` until the alert fires, which it did not before.
    async fn fires(&self, alert: &str, cause: impl AsyncFnMut()) {
        self.is_silent(alert).await;
        self.fires_too(alert, cause).await;
    }

    /// The same of a cause that had begun before.
    async fn fires_too(&self, alert: &str, mut cause: impl AsyncFnMut()) {
        let began = Instant::now();
        let fired = loop {
            cause().await;
            let alerts = self.0.alerts().await;
            if let Some(fired) = alerts.iter().find(|one| one.name == alert && one.is_firing) {
                break fired.clone();
            }
            assert!(began.elapsed() < FIRES_WITHIN, "{alert} does not fire: {alerts:?}");
            sleep(LOOK_INTERVAL).await;
        };
        assert!(!fired.annotations.contains("<error"), "{fired:?}");
        println!("{alert} fires after {:?}: {} {}", began.elapsed(), fired.labels, fired.annotations);
    }

    /// The cause is gone.
    async fn ends(&self, alert: &str) {
        let began = Instant::now();
        eventually(alert, ENDS_WITHIN, async || !self.0.firing().await.contains(alert)).await;
        println!("{alert} ended after {:?}", began.elapsed());
    }

    /// What fires beside these is none of this experiment's.
    async fn only(&self, alerts: &[&str]) {
        let expected: BTreeSet<String> = alerts.iter().map(|alert| (*alert).to_owned()).collect();
        assert!(self.0.firing().await.is_subset(&expected), "{:?}", self.0.alerts().await);
    }
}

async fn nothing_more() {}

/// Asks for nothing, and answers pings: whoever does not is closed, on a slow machine before the alert has fired.
async fn stays(mut stream: TcpStream) -> io::Result<()> {
    const PING: u8 = 6;
    const ACK: u8 = 1;
    stream.write_all(&[&PREFACE[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat()).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let [high, middle, low, kind, flags, ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, high, middle, low]) as usize];
        stream.read_exact(&mut payload).await?;
        if kind == PING && flags & ACK == 0 {
            head[4] = ACK;
            stream.write_all(&[&head[..], &payload].concat()).await?;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_gone_and_one_that_runs_out_of_files_are_noticed() {
    const FILES: usize = 2_048;
    let _turn = heavy().await;
    let mut cluster = Cluster::mariadb(2, &[("GATEWAY__DOUBT_SHARE", "1")]).await;
    let watch = Watch::over(&cluster.nodes.iter().collect::<Vec<_>>()).await;
    watch.only(&[]).await;
    cluster.nodes[1].kill();
    watch.fires("ImPresenceDown", nothing_more).await;
    watch.fires_too("ImPresenceManyDown", nothing_more).await;
    cluster.nodes[1].restart().await;
    watch.ends("ImPresenceDown").await;
    watch.ends("ImPresenceManyDown").await;
    drop(watch);

    let program = ["prlimit", &format!("--nofile={FILES}:{FILES}"), PROGRAM].map(str::to_owned).to_vec();
    let node = Node::start_as(program, cluster.db.settings(&[("PRESENCE_SERVICE__MAX_CONNECTIONS", "2000")])).await;
    let watch = Watch::over(&[&node]).await;
    let mut open = JoinSet::new();
    for _ in 0..FILES {
        let stream = TcpStream::connect(node.data).await.expect("connect");
        open.spawn(stays(stream)); // one too many is closed
    }
    watch.fires("ImPresenceOpenFilesHigh", nothing_more).await;
    open.shutdown().await;
    watch.ends("ImPresenceOpenFilesHigh").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_to_the_database_and_to_redis_is_noticed() {
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let server = MariaDb::start();
    let cluster = Cluster::on_all(&server, Redis::two(), 2, &[("STORE__TIMEOUT", "1000")]).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let watch = Watch::over(&[node, other]).await;
    watch.only(&[]).await;

    let traffic = Traffic::start(&cluster, 1_000);
    traffic.goes_on(200).await;
    cluster.cache().kill();
    watch.fires("ImPresenceOutboxGrows", nothing_more).await;
    watch.fires_too("ImPresenceRedisDown", nothing_more).await;
    watch.fires_too("ImPresenceGenerationRaised", nothing_more).await; // what waited is given up
    cluster.cache().restart();
    watch.ends("ImPresenceRedisDown").await;
    traffic.stop().await;
    watch.ends("ImPresenceOutboxGrows").await;
    watch.ends("ImPresenceGenerationRaised").await;

    cluster.queue().kill();
    watch.fires("ImPresenceNodesDeaf", nothing_more).await;
    cluster.queue().restart();
    watch.ends("ImPresenceNodesDeaf").await;
    watch.ends("ImPresenceRedisDown").await;

    node.bind(a_bind(ALICE, PHONE, "backed-up")).await;
    cluster.db.run("CREATE TABLE old_users AS SELECT * FROM users; CREATE TABLE old_routes AS SELECT * FROM routes").await;
    let lost = node.bind(a_bind(ALICE, PHONE, "lost")).await;
    assert_eq!(node.query(ALICE).await.version, lost.version);
    let back = "BEGIN; REPLACE INTO users SELECT * FROM old_users; REPLACE INTO routes SELECT * FROM old_routes; COMMIT";
    cluster.db.run(back).await;
    let ask = async || _ = node.try_query(ALICE, Some(0)).await; // what SQL says
    watch.fires("ImPresenceSqlWentBack", ask).await;
    watch.ends("ImPresenceSqlWentBack").await;

    server.stop();
    watch.fires("ImPresenceDatabaseDown", nothing_more).await;
    server.cont();
    watch.ends("ImPresenceDatabaseDown").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_happens_to_gateways_is_noticed() {
    const USERS: i64 = 200;
    const BEAT: Duration = Duration::from_millis(300);
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let more = [("GATEWAY__HEARTBEAT_INTERVAL", "1000"), ("GATEWAY__LEASE", "5000"), ("GATEWAY__DOUBT_FOR", "20000")];
    let cluster = Cluster::mariadb(2, &more).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut gateways = Vec::new();
    for n in 0..6 {
        gateways.push(Gateway::start(&format!("gw-{n}:7000"), &[node, other], BEAT).await);
    }
    let watch = Watch::over(&[node, other]).await;
    watch.only(&[]).await;
    gateways.pop().expect("one of six").falls_silent();
    watch.fires("ImPresenceGatewayDeaths", nothing_more).await;
    watch.only(&["ImPresenceGatewayDeaths"]).await;
    watch.ends("ImPresenceGatewayDeaths").await;

    gateways[1..].iter().for_each(Gateway::falls_silent);
    watch.fires("ImPresenceHold", nothing_more).await;
    watch.fires("ImPresenceGatewayDeaths", nothing_more).await; // at the end of the hold
    watch.ends("ImPresenceHold").await;

    let (addr, epoch) = (gateways[0].addr.clone(), gateways[0].epoch);
    node.bind_all(1..=USERS, &addr, epoch).await;
    let mut connection = cluster.db.connect().await;
    for sql in ["BEGIN", "SELECT user_id FROM users FOR UPDATE"] {
        sqlx::query(sql).fetch_all(&mut connection).await.expect("locks");
    }
    assert_eq!(node.ctl(&["gateways", "purge", &epoch.to_string()]).0, 0);
    watch.fires("ImPresenceSweepBacklog", nothing_more).await;
    sqlx::query("ROLLBACK").fetch_all(&mut connection).await.expect("no locks");
    watch.ends("ImPresenceSweepBacklog").await;
}

/// A server that stands still for `time` while `call` is under way.
async fn slowed(stop: impl Fn(), cont: impl Fn(), time: Duration, call: impl Future<Output = ()> + Send + 'static) {
    stop();
    let under_way = tokio::spawn(call);
    sleep(time).await;
    cont();
    under_way.await.expect("no panic");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_callers_meet_is_noticed() {
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let server = MariaDb::start();
    let more = [("ROUTE__MAX_RETRIES", "0"), ("DELIVERY__INBOX_TTL", "30")];
    let cluster = Cluster::on_all(&server, Redis::two(), 2, &more).await;
    let [node, other] = &cluster.nodes[..] else { panic!("two nodes") };
    let stored = DeliverReq { store_offline: true, ..a_message(CAROL, "for later") };
    assert!(node.deliver(stored).await.stored);
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let watch = Watch::over(&[node, other]).await;
    watch.only(&["ImPresenceInboxOld"]).await;

    watch
        .fires("ImPresenceQueriesSlow", async || {
            let mut presence = node.presence();
            let query = im_presence::pb::QueryRouteReq { user_id: BOB, max_staleness_ms: Some(0) };
            let call = async move { _ = presence.query_route(query).await.expect("an answer") };
            slowed(|| server.stop(), || server.cont(), Duration::from_millis(100), call).await;
        })
        .await;
    let queue = cluster.queue();
    let subscriber = queue.subscribe_to_all().await;
    watch
        .fires("ImPresenceDeliverySlow", async || {
            let mut presence = node.presence();
            let call = async move { _ = presence.deliver(a_message(ALICE, "hello")).await.expect("an answer") };
            slowed(|| queue.stop(), || queue.cont(), Duration::from_millis(300), call).await;
        })
        .await;
    watch.ends("ImPresenceQueriesSlow").await;
    drop(subscriber); // now nobody hears
    watch.fires("ImPresenceDeliveryFailing", async || _ = node.deliver(a_message(ALICE, "hello")).await).await;
    watch.ends("ImPresenceDeliveryFailing").await;
    watch.fires("ImPresenceInboxOld", nothing_more).await;

    server.stop();
    watch.fires("ImPresenceBindsRefused", async || _ = node.try_bind(a_bind(BOB, PHONE, "c-1")).await).await;
    server.cont();
    watch.ends("ImPresenceBindsRefused").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lanes_and_memory_that_fill_up_are_noticed() {
    if !long() {
        return;
    }
    let _turn = heavy().await;
    let server = MariaDb::start();
    let patient = [
        ("STORE__LANES", "1"),
        ("STORE__QUEUE", "1024"),
        ("STORE__TIMEOUT", "60000"),
        ("STORE__MAX_EVENT_AGE", "60000"),
        ("LIMITS__MEMORY_BYTES", "67108864"),
    ];
    let cluster = Cluster::on(&server, 1, &patient).await;
    let node = cluster.node();
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
    let watch = Watch::over(&[node]).await;
    watch.only(&[]).await;
    server.stop();
    let mut calls = JoinSet::new();
    for user in 1..=700 {
        let mut presence = node.presence();
        calls.spawn(async move { _ = presence.bind_route(a_bind(user, PHONE, "c-2")).await });
    }
    watch.fires("ImPresenceLaneQueueHigh", nothing_more).await;
    let names = Arc::new("n".repeat(120));
    for call in 0..30 {
        let (mut presence, names) = (node.new_connection().max_encoding_message_size(8 << 20), names.clone());
        calls.spawn(async move {
            let bind = |user| BindRouteReq { client_ip: String::new(), ..a_bind(user, &names, &names) };
            let binds = (0..10_000).map(|n| bind(1_000 + call * 10_000 + n)).collect();
            let _ = presence.batch_bind_route(BatchBindRouteReq { binds }).await; // more than there is room for
        });
    }
    watch.fires("ImPresenceMemoryHigh", nothing_more).await;
    server.cont();
    watch.ends("ImPresenceMemoryHigh").await;
    watch.ends("ImPresenceLaneQueueHigh").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_credentials_that_need_somebody_are_noticed() {
    let _turn = heavy().await;
    let (pki, db) = (Pki::new(), TestDb::sqlite());
    let ca = pki.ca("ca");
    let pair = ca.issue_for("node", &["127.0.0.1"], 30 * DAY);
    let (_, entry) = token("viewer", "viewer", "");
    let tokens = pki.write("tokens.toml", &entry);
    let node = Node::start(settings(&[
        ("STORE__URL", &db.url),
        ("TLS__CERT_FILE", text(&pair.cert)),
        ("TLS__KEY_FILE", text(&pair.key)),
        ("TLS__ACCEPT_PLAIN", "true"),
        ("AUTH__MODE", "token"),
        ("AUTH__TOKENS_FILE", text(&tokens)),
    ]))
    .await;
    let watch = Watch::over(&[&node]).await;
    watch.only(&[]).await;
    ca.issue_for("node", &["127.0.0.1"], 3 * DAY);
    watch.fires("ImPresenceCertificateExpires", nothing_more).await;
    watch.is_silent("ImPresenceCertificateExpiresToday").await;
    ca.issue_for("node", &["127.0.0.1"], DAY / 2);
    watch.fires("ImPresenceCertificateExpiresToday", nothing_more).await;
    ca.issue_for("node", &["127.0.0.1"], 30 * DAY);
    watch.ends("ImPresenceCertificateExpires").await;
    watch.ends("ImPresenceCertificateExpiresToday").await;

    pki.write("tokens.toml", "no tokens at all");
    watch.fires("ImPresenceReloadFailing", nothing_more).await;
    pki.write("tokens.toml", &entry);
    let guess = async || _ = node.try_query(ALICE, None).await.expect_err("no credential");
    watch.fires("ImPresenceAuthFailures", guess).await;
    watch.ends("ImPresenceAuthFailures").await;
    watch.ends("ImPresenceReloadFailing").await;
}

/// Beside those that the names above stand for there is the one that always fires, and without which none of this begins.
#[test]
fn every_alert_has_an_experiment() {
    let own = include_str!("alerts.rs");
    let rules = include_str!("../../deploy/prometheus/rules.yml");
    let names = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let has_one = |name: &str| ["fires", "fires_too"].iter().any(|fires| own.contains(&format!(".{fires}(\"{name}\"")));
    let missing: Vec<&str> = names.filter(|name| *name != "ImPresenceWatchdog" && !has_one(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
