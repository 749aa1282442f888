//! A week of a user, on a clock that the test sets: days add up to the second.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use im_presence::domain::time::written_day;
use im_presence::pb;
use im_presence::pb::Status::Invisible;
use im_presence::pb::Status::Online;
use im_presence::pb::UnbindRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::mariadb::scratch;
use crate::harness::node::Node;
use crate::harness::watcher::set_status;

const HOUR: i64 = 3_600;
const DAY_MS: i64 = 86_400_000;
const SEEN_WITHIN: Duration = Duration::from_secs(4);
const DEAD_WITHIN: Duration = Duration::from_secs(10);
const SETTINGS: [(&str, &str); 4] = [
    ("ROUTE__ROUTE_TTL", "2592000"),
    ("GATEWAY__LEASE", "2000"),
    ("GATEWAY__HEARTBEAT_INTERVAL", "500"),
    ("GATEWAY__STREAM_GRACE", "1000"),
];

/// A node on an embedded store. Its clock, which is the store's, is set while it does not run, so no time is missing for it.
struct Week {
    node: Node,
    _db: TestDb,
    shift: PathBuf,
    seconds: i64,
}

/// Seen and hidden milliseconds of each day.
type Days = BTreeMap<i64, (i64, i64)>;

impl Week {
    async fn begin() -> Self {
        let (db, shift) = (TestDb::sqlite(), scratch("week"));
        fs::write(&shift, "+0").expect("a file");
        let node = Node::start_with_clock_of(&shift, db.settings(&SETTINGS)).await;
        Self { node: node.expect("libfaketime is installed: run tests/run"), _db: db, shift, seconds: 0 }
    }

    /// So many hours pass, and the node is away meanwhile.
    async fn passes(&mut self, hours: i64) {
        self.node.kill();
        self.sets(hours);
        self.node.restart().await;
    }

    fn sets(&mut self, hours: i64) {
        self.seconds += hours * HOUR;
        fs::write(&self.shift, format!("+{}", self.seconds)).expect("a file");
    }

    /// When a device came, by the database's clock.
    async fn comes(&self, device: &str) -> i64 {
        self.node.bind(a_bind(ALICE, device, "c")).await;
        self.event().await
    }

    async fn goes(&self, device: &str) -> i64 {
        let (gateway_addr, device_id) = (GATEWAY.to_owned(), device.to_owned());
        self.node.unbind(UnbindRouteReq { user_id: ALICE, gateway_addr, device_id, ..Default::default() }).await;
        self.event().await
    }

    /// When the newest line of the log, or the last coming or going of a device, was.
    async fn event(&self) -> i64 {
        let seen = self.node.query_sql(ALICE).await.last_seen_ms;
        let logged = self.node.history(ALICE).await.first().map_or(0, |change| change.at_ms);
        seen.max(logged)
    }

    async fn time(&self, include_hidden: bool) -> pb::GetOnlineTimeResp {
        let (from_day, to_day) = (written_day(0), written_day(399));
        let refused = pb::GetOnlineTimeReq { user_id: ALICE, from_day, to_day, include_hidden };
        self.node.online_time(refused).await; // days on which nobody was online are no error
        self.node.online_time(pb::GetOnlineTimeReq { user_id: ALICE, include_hidden, ..Default::default() }).await
    }

    async fn adds_up(&self, expected: &Days) {
        let told = self.time(true).await;
        let days: Vec<_> =
            told.days.iter().map(|day| (day.day.clone(), i64::from(day.online_s), i64::from(day.hidden_s))).collect();
        let written = |(day, (seen, hidden)): (&i64, &(i64, i64))| (written_day(*day as i32), seen / 1_000, hidden / 1_000);
        assert_eq!(days, expected.iter().map(written).collect::<Vec<_>>());
        let all: i64 = expected.values().map(|(seen, hidden)| seen + hidden).sum();
        assert_eq!(told.online_s as i64, all / 1_000);
        let others = self.time(false).await;
        let seen: i64 = expected.values().map(|(seen, _)| seen).sum();
        assert_eq!(others.online_s as i64, seen / 1_000);
        assert!(others.days.iter().all(|day| day.hidden_s == 0));
    }
}

fn add(days: &mut Days, from: i64, to: i64, hidden: bool) {
    let mut from = from;
    while from < to {
        let until = to.min((from.div_euclid(DAY_MS) + 1) * DAY_MS);
        let day = days.entry(from.div_euclid(DAY_MS)).or_insert((0, 0));
        if hidden {
            day.1 += until - from
        } else {
            day.0 += until - from
        }
        from = until;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_week_adds_up_to_the_second() {
    let (mut week, mut days) = (Week::begin().await, Days::new());
    let came = week.comes(PHONE).await;
    week.passes(20).await;
    week.comes(LAPTOP).await;
    week.passes(10).await;
    week.goes(PHONE).await;
    week.passes(20).await;
    let went = week.goes(LAPTOP).await;
    add(&mut days, came, went, false);
    week.adds_up(&days).await;
    assert_eq!(week.time(false).await.sessions, 1, "over two midnights, with two devices");

    week.passes(9).await;
    week.node.set(set_status(ALICE, Invisible)).await;
    let came = week.comes(PHONE).await;
    let came = came.max(week.node.history(ALICE).await[0].at_ms);
    week.passes(3).await;
    week.node.set(set_status(ALICE, Online)).await;
    let shown = week.node.history(ALICE).await[0].at_ms;
    add(&mut days, came, shown, true);
    week.passes(1).await;
    let went = week.goes(PHONE).await;
    add(&mut days, shown, went, false);
    week.adds_up(&days).await;
    assert_eq!(week.time(false).await.sessions, 2);

    week.passes(30).await;
    let epoch = week.node.register("gw-5:7000").await;
    week.node.bind(on("gw-5:7000", epoch, a_bind(ALICE, PHONE, "c"))).await;
    let came = week.event().await;
    tokio::time::sleep(Duration::from_millis(1_100)).await; // more than a second: the day has to show it
    week.node.beat("gw-5:7000", epoch).await;
    week.passes(5).await;
    eventually("its gateway is dead", DEAD_WITHIN, async || !week.node.query(ALICE).await.is_online).await;
    let died = week.node.history(ALICE).await[0].clone();
    assert!(died.cause == "expired" && died.at_ms >= came && died.at_ms < came + 5_000, "when it was heard last: {died:?}");
    add(&mut days, came, died.at_ms, false);
    week.adds_up(&days).await;

    let began = week.comes(PHONE).await;
    week.sets(1); // while the node runs
    eventually("the step is noticed", SEEN_WITHIN, async || week.node.degraded().await.contains(&"clock".to_owned())).await;
    week.goes(PHONE).await;
    assert_eq!(week.node.metric("im_presence_history_skipped_total").await, 1.0, "nobody knows how long that was");
    days.entry(began.div_euclid(DAY_MS)).or_insert((0, 0)); // the session counts, its time does not
    week.adds_up(&days).await;
    let came = week.comes(LAPTOP).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    let running = week.time(false).await;
    assert!(running.online_now);
    let went = week.goes(LAPTOP).await;
    add(&mut days, came, went, false);
    week.adds_up(&days).await;
    assert!((1..=100).contains(&week.time(false).await.activity_score));
}

#[tokio::test]
async fn days_that_make_no_sense_are_refused_by_name() {
    let cluster = Cluster::sqlite(&[]).await;
    for (from_day, to_day, why) in [
        ("2026-02-30", "", "from_day: must be a day as in 2026-11-26"),
        ("", "yesterday", "to_day: must be a day as in 2026-11-26"),
        ("2026-11-26", "2026-11-25", "from_day: must not be after to_day"),
        ("2025-01-01", "2026-02-05", "from_day: must be at most 400 days to to_day"),
    ] {
        let (from_day, to_day) = (from_day.to_owned(), to_day.to_owned());
        let request = pb::GetOnlineTimeReq { user_id: ALICE, from_day, to_day, ..Default::default() };
        let refused = cluster.node().presence().get_online_time(request).await.expect_err(why);
        assert_eq!((refused.code(), refused.message()), (tonic::Code::InvalidArgument, why));
    }
    let nobody = cluster.node().online_time(pb::GetOnlineTimeReq { user_id: ALICE, ..Default::default() }).await;
    assert_eq!((nobody.days.len(), nobody.activity_score, nobody.online_now), (0, 0, false));
}
