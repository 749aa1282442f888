//! The database's clock steps. Here it is that of the machine, which an embedded store uses.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use im_presence::pb::Code;
use im_presence::pb::DeliverReq;
use im_presence::pb::HoldGatewaysReq;
use im_presence::pb::PullInboxReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::mariadb::scratch;
use crate::harness::node::Node;

const GATEWAY: &str = "gw-1:7000";
const SEEN_WITHIN: Duration = Duration::from_secs(4);
const SHORT_LEASE: [(&str, &str); 3] =
    [("GATEWAY__LEASE", "2000"), ("GATEWAY__HEARTBEAT_INTERVAL", "500"), ("GATEWAY__STREAM_GRACE", "1000")];
/// A lease, and the time in which beats have to be recorded without a gap before a death is believed.
const DEAD_WITHIN: Duration = Duration::from_secs(7);
/// Longer than the interval in which messages that are over are looked for.
const LONG_ENOUGH_TO_LOSE_THEM: Duration = Duration::from_secs(7);

/// A node on an embedded store, and the clock of both.
struct Clocked {
    node: Node,
    db: TestDb,
    shift: PathBuf,
}

impl Clocked {
    async fn start(more: &[(&str, &str)]) -> Self {
        let (db, shift) = (TestDb::sqlite(), scratch("clock"));
        fs::write(&shift, "+0").unwrap();
        let node = Node::start_with_clock_of(&shift, db.settings(more)).await;
        Self { node: node.expect("libfaketime is installed: run tests/run"), db, shift }
    }

    /// The clock is `shift` beside the right time from here on.
    fn steps(&self, shift: &str) {
        fs::write(&self.shift, shift).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_days_ahead_for_a_moment_costs_no_message_and_no_route() {
    const MESSAGES: i64 = 100;
    let clocked = Clocked::start(&[("ROUTE__ROUTE_TTL", "3600")]).await;
    let (node, db) = (&clocked.node, &clocked.db);
    node.bind(on("never:7000", 0, a_bind(BOB, PHONE, "c"))).await;
    for n in 0..MESSAGES {
        let message = DeliverReq { user_id: ALICE, message: format!("{n}"), store_offline: true, ..Default::default() };
        assert!(node.presence().deliver(message).await.unwrap().into_inner().stored);
    }
    db.clock_was_steady().await;
    tokio::time::sleep(SEEN_WITHIN / 2).await;
    clocked.steps("+8d");
    let warned = async || node.degraded().await.contains(&"clock".to_owned());
    eventually("the step is noticed", SEEN_WITHIN, warned).await;
    tokio::time::sleep(LONG_ENOUGH_TO_LOSE_THEM).await;
    clocked.steps("+0");
    tokio::time::sleep(SEEN_WITHIN).await;
    assert_eq!(db.number("SELECT COUNT(*) FROM inbox").await, MESSAGES, "nothing was deleted for its age");
    assert!(node.query_sql(BOB).await.is_online, "he is where he was");
    assert!(node.log().iter().any(|line| line.contains("clock has stepped")), "{:?}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_goes_back_keeps_no_dead_gateway_alive_and_refuses_no_registration() {
    let clocked = Clocked::start(&SHORT_LEASE).await;
    let node = &clocked.node;
    for _ in 0..3 {
        node.register(GATEWAY).await;
    }
    let epoch = node.register(GATEWAY).await;
    node.bind(on(GATEWAY, epoch, a_bind(ALICE, PHONE, "c"))).await;
    clocked.steps("-1h");
    eventually("the dead gateway is dead", DEAD_WITHIN, async || !node.query(ALICE).await.is_online).await;
    for n in 1..=4 {
        let answer = node.try_register(GATEWAY, 0).await.unwrap_or_else(|error| panic!("registration {n}: {error:?}"));
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_and_holds_of_a_time_that_was_wrong_end_as_they_should() {
    let clocked = Clocked::start(&[("GATEWAY__DOUBT_FOR", "1000")]).await;
    let (node, db) = (&clocked.node, &clocked.db);
    let year = "until + 31536000000";
    db.run(&format!("UPDATE jobs SET node_id = 'another', until = {year}")).await;
    db.run("UPDATE cluster SET hold_until = last_beat + 31536000000, hold_reason = 'doubt: x'").await;
    let claimed = async || db.number("SELECT COUNT(*) FROM jobs WHERE node_id = 'another' AND name = 'sweep'").await == 0;
    eventually("the sweep goes on", SEEN_WITHIN, claimed).await;
    let held = async || node.degraded().await.contains(&"hold".to_owned());
    eventually("the hold ends", SEEN_WITHIN, async || {
        !held().await && db.number("SELECT hold_until < last_beat FROM cluster").await == 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_stored_and_bound_while_the_clock_was_behind_is_there_when_it_is_right_again() {
    const MESSAGES: i64 = 10;
    let mut clocked = Clocked::start(&[("ROUTE__ROUTE_TTL", "3600")]).await;
    clocked.steps("-8d");
    eventually("the step is noticed", SEEN_WITHIN, async || clocked.node.degraded().await.contains(&"clock".to_owned())).await;
    clocked.node.bind(on("never:7000", 0, a_bind(BOB, PHONE, "c"))).await;
    for n in 0..MESSAGES {
        let message = DeliverReq { user_id: ALICE, message: format!("{n}"), store_offline: true, ..Default::default() };
        assert!(clocked.node.presence().deliver(message).await.unwrap().into_inner().stored);
    }
    clocked.steps("+0");
    eventually("that too", SEEN_WITHIN, async || clocked.db.number("SELECT step_ms FROM cluster").await > 600_000_000).await;
    clocked.node.kill();
    clocked.node.restart().await; // which forgets what it saw itself
    clocked.db.clock_was_steady().await;
    tokio::time::sleep(LONG_ENOUGH_TO_LOSE_THEM).await;
    let (node, db) = (&clocked.node, &clocked.db);
    let request = PullInboxReq { user_id: ALICE, device_id: PHONE.to_owned(), ..Default::default() };
    let pulled = node.gateways().pull_inbox(request).await.unwrap().into_inner().deliveries.len();
    assert_eq!((pulled, db.number("SELECT COUNT(*) FROM inbox").await), (10, MESSAGES));
    assert!(node.query_sql(BOB).await.is_online);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_begun_while_the_clock_was_ahead_lasts_no_longer_than_it_can() {
    let clocked = Clocked::start(&[("ROUTE__ROUTE_TTL", "5")]).await;
    let (node, db) = (&clocked.node, &clocked.db);
    clocked.steps("+8d");
    eventually("the step is noticed", SEEN_WITHIN, async || node.degraded().await.contains(&"clock".to_owned())).await;
    node.bind(on("never:7000", 0, a_bind(BOB, PHONE, "c"))).await;
    let hold = HoldGatewaysReq { for_ms: 5_000, reason: "switch".to_owned() };
    node.operator().hold_gateways(hold).await.unwrap();
    clocked.steps("+0");
    let slack = || db.run("UPDATE cluster SET step_ms = 0, step_at = 0"); // of the step forward, which is not what this shows
    tokio::time::sleep(SEEN_WITHIN / 2).await;
    slack().await;
    let over = async || !node.query_sql(BOB).await.is_online && !node.list_gateways(false).await.hold;
    eventually("both end", Duration::from_secs(5) + 2 * SEEN_WITHIN, over).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_runs_too_fast_is_noticed_like_one_that_is_set() {
    let clocked = Clocked::start(&[]).await;
    tokio::time::sleep(SEEN_WITHIN / 2).await;
    clocked.steps("+0 x1.3");
    let warned = async || clocked.node.degraded().await.contains(&"clock".to_owned());
    eventually("it is noticed", 3 * SEEN_WITHIN, warned).await;
}
