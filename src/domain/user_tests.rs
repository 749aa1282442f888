//! What each event does to a user's record, as tables; and what no sequence of events can do to it.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::domain::event::Ban;
use crate::domain::event::ForceOffline;
use crate::domain::event::SetStatus;
use crate::domain::event::Which;
use crate::domain::gateway::End;
use crate::domain::gateway::EndReason;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::VERSION_GAP;
use crate::domain::policy::OnOverflow::KickOldest;
use crate::domain::policy::OnOverflow::RefuseNew;
use crate::domain::route::Platform;
use crate::domain::status::Status;

const NOW: Timestamp = Timestamp(1_700_000_000_000);
const BEAT: Duration = Duration::from_secs(5);
const ROUTE_TTL: Duration = Duration::from_secs(60);

// Lives of gateways: their epochs.
const HERE: u64 = 1;
const ELSEWHERE: u64 = 2;
/// Two beats missed.
const LATE: u64 = 3;
const OVER: u64 = 4;
const UNMANAGED: u64 = 5;
/// On the gateway of `HERE`.
const HERE_AGAIN: u64 = 6;
const UNHEARD_OF: u64 = 7;

/// Device, connection, life, and how many seconds ago the client connected.
type Had = (&'static str, &'static str, u64, i64);

struct World {
    policy: DevicePolicy,
    lives: LifeTable,
    now: Timestamp,
    record: UserRecord,
}

/// As many devices as anybody wants.
const ANY: DevicePolicy = DevicePolicy { max_devices: 100, per_platform: 0, on_overflow: KickOldest };

fn at_most(max_devices: usize, on_overflow: crate::domain::policy::OnOverflow) -> DevicePolicy {
    DevicePolicy { max_devices, per_platform: 0, on_overflow }
}

fn gateway(life: u64) -> GatewayAddr {
    let life = if life == HERE_AGAIN { HERE } else { life };
    GatewayAddr::parse(&format!("gw-{life}:7000")).unwrap()
}

fn life(epoch: u64) -> Life {
    let kind = if epoch == UNMANAGED { LifeKind::Unmanaged } else { LifeKind::Managed };
    let lease_until = NOW.plus(if epoch == LATE { BEAT } else { 3 * BEAT });
    let end = (epoch == OVER).then_some(End { at: NOW, reason: EndReason::Expired });
    Life { end, ..Life::begun(Epoch(epoch), gateway(epoch), kind, lease_until) }
}

fn route(had: Had, bound_version: u64) -> Route {
    let (device, conn, life, ago_s) = had;
    Route {
        device: DeviceId::parse(device).unwrap(),
        platform: Platform::Unspecified,
        epoch: Epoch(life),
        conn: ConnId::parse(conn).unwrap(),
        connected_at: Timestamp(NOW.0 - 1_000 * ago_s),
        client_ip: None,
        client_port: 0,
        bound_version: Version(bound_version),
        bound_at: NOW,
        expires_at: Default::default(),
        idle: false,
    }
}

/// A bind of a client that connected just now.
fn bind(device: &str, conn: &str) -> Bind {
    Bind {
        gateway: gateway(HERE),
        epoch: None,
        device: DeviceId::parse(device).unwrap(),
        platform: Platform::Unspecified,
        conn: ConnId::parse(conn).unwrap(),
        client_ip: None,
        client_port: 0,
        connected_ago: None,
        idle: false,
    }
}

fn ago(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

impl World {
    /// A user with these routes, bound in this order as versions 1, 2, ...
    fn with(policy: DevicePolicy, had: &[Had]) -> Self {
        let mut lives = LifeTable::default();
        (HERE..UNHEARD_OF).for_each(|epoch| lives.learn(Arc::new(life(epoch))));
        let routes: Vec<Route> = had.iter().zip(1..).map(|(had, version)| route(*had, version)).collect();
        let record = UserRecord { version: Version(routes.len() as u64), routes: routes.into(), ..UserRecord::default() };
        Self { policy, lives, now: NOW, record }
    }

    fn context(&self) -> Context<'_> {
        Context {
            policy: &self.policy,
            lives: &self.lives,
            now: self.now,
            clock: Version(self.now.0 as u64 * 1_000),
            route_ttl: ROUTE_TTL,
            clock_is_steady: true,
            slack: Duration::ZERO,
            heartbeat_interval: BEAT,
            history: Rules { session_gap: Duration::from_secs(30), clock_set_at: Timestamp(0) },
        }
    }

    fn apply(&mut self, event: &Event<'_>) -> Outcome {
        let applied = self.record.apply(event, &self.context());
        self.record = applied.next.unwrap_or_else(|| self.record.clone());
        applied.outcome
    }

    fn bind(&mut self, life: u64, bind: &Bind) -> Outcome {
        let life = self.lives.get(Epoch(life)).unwrap().clone();
        self.apply(&Event::Bind { bind, life: &life, waited: Duration::ZERO })
    }

    fn devices(&self) -> String {
        self.record.routes.iter().map(|route| format!("{}/{}", route.device, route.conn)).collect::<Vec<_>>().join(" ")
    }
}

fn told(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Bound { kicked, .. } => {
            let kicked = kicked.iter().map(|(route, reason)| format!(", {}/{} {reason:?}", route.device, route.conn));
            format!("bound{}", kicked.collect::<String>())
        }
        Outcome::Refused(refusal) => format!("refused: {refusal:?}"),
        Outcome::NotBound { why, .. } => (*why).to_owned(),
        other => format!("{other:?}"),
    }
}

/// Binds on the life `HERE`. `want`: what the gateway is told, then the devices and connections that are left.
#[track_caller]
fn check(policy: DevicePolicy, had: &[Had], bind: Bind, want: (&str, &str)) {
    let mut world = World::with(policy, had);
    let before = world.record.clone();
    let outcome = world.bind(HERE, &bind);
    assert_eq!((told(&outcome).as_str(), world.devices().as_str()), want, "had {had:?}, bound {bind:?}");
    if let Outcome::Refused(_) = outcome {
        assert_eq!(world.record, before, "a refusal changes nothing");
    }
}

#[test]
fn a_device_has_one_route_and_the_newest_connection_has_it() {
    check(ANY, &[], bind("phone", "c1"), ("bound", "phone/c1"));
    check(ANY, &[("phone", "c1", HERE, 9)], bind("phone", "c2"), ("bound, phone/c1 Replaced", "phone/c2"));
    check(ANY, &[("phone", "c1", HERE, 9)], bind("tv", "c1"), ("bound", "phone/c1 tv/c1"));
    // The same connection on another life of its gateway is a new bind, and so is every one that does not say who it is.
    check(ANY, &[("phone", "c1", HERE_AGAIN, 9)], bind("phone", "c1"), ("bound, phone/c1 Replaced", "phone/c1"));
    check(ANY, &[("phone", "c1", ELSEWHERE, 9)], bind("phone", "c1"), ("bound, phone/c1 Replaced", "phone/c1"));
    check(ANY, &[("phone", "", HERE, 9)], bind("phone", ""), ("bound, phone/ Replaced", "phone/"));
    // The unnamed device is one like others.
    check(ANY, &[("phone", "c1", HERE, 9), ("", "c1", HERE, 9)], bind("", "c2"), ("bound, /c1 Replaced", "phone/c1 /c2"));
}

#[test]
fn an_older_connection_does_not_displace_a_newer_one() {
    let older = Bind { connected_ago: ago(60), ..bind("phone", "c2") };
    check(ANY, &[("phone", "c1", HERE, 59)], older.clone(), ("refused: Older", "phone/c1"));
    check(ANY, &[("phone", "c1", LATE, 59)], older.clone(), ("refused: Older", "phone/c1"));
    check(ANY, &[("phone", "c1", UNHEARD_OF, 59)], older.clone(), ("refused: Older", "phone/c1"));
    check(ANY, &[("phone", "c1", HERE, 60)], older.clone(), ("bound, phone/c1 Replaced", "phone/c2"));
    check(ANY, &[("phone", "c1", OVER, 59)], older, ("bound", "phone/c2"));
    // The database's clock stepped back by ten seconds since c1 was bound.
    check(ANY, &[("phone", "c1", HERE, -10)], bind("phone", "c2"), ("bound, phone/c1 Replaced", "phone/c2"));
    check(at_most(1, KickOldest), &[("tv", "c1", HERE, -10)], bind("phone", "c2"), ("bound, tv/c1 DeviceLimit", "phone/c2"));
}

#[test]
fn the_time_a_bind_waited_makes_its_connection_older() {
    let mut world = World::with(ANY, &[("phone", "c1", HERE, 5)]);
    let bind = Bind { connected_ago: ago(4), ..bind("phone", "c2") };
    let waited = Duration::from_millis(1_001);
    let outcome = world.apply(&Event::Bind { bind: &bind, life: &life(HERE), waited });
    assert_eq!(outcome, Outcome::Refused(Refusal::Older));
}

#[test]
fn routes_that_lead_nowhere_go_without_a_word_and_are_not_counted() {
    check(at_most(1, RefuseNew), &[("tv", "c1", OVER, 1)], bind("phone", "c2"), ("bound", "phone/c2"));
    check(at_most(1, RefuseNew), &[("tv", "c1", UNHEARD_OF, 1)], bind("phone", "c2"), ("refused: DeviceLimit", "tv/c1"));
    for (expires_in_ms, want) in [(0, "bound"), (1, "bound, tv/c1 DeviceLimit")] {
        let mut world = World::with(at_most(1, KickOldest), &[("tv", "c1", UNMANAGED, 1)]);
        world.record.routes[0].expires_at = Some(Timestamp(NOW.0 + expires_in_ms)).into();
        assert_eq!(told(&world.bind(HERE, &bind("phone", "c2"))), want, "expires in {expires_in_ms} ms");
        assert_eq!(world.devices(), "phone/c2");
    }
}

#[test]
fn over_the_limit_late_gateways_give_way_first_and_then_the_oldest_connection() {
    let two = at_most(2, KickOldest);
    let new = bind("phone", "c3");
    let want = ("bound, tv/c1 DeviceLimit", "web/c2 phone/c3");
    check(two, &[("tv", "c1", HERE, 9), ("web", "c2", HERE, 8)], new.clone(), want);
    check(two, &[("tv", "c1", LATE, 8), ("web", "c2", HERE, 9)], new.clone(), want);
    check(two, &[("tv", "c1", LATE, 9), ("web", "c2", LATE, 8)], new.clone(), want);
    check(two, &[("tv", "c1", HERE, 9), ("web", "c2", HERE, 9)], new.clone(), want); // a tie: the first bound goes
    check(two, &[("web", "c2", HERE, 1), ("tv", "c1", HERE, 2)], new.clone(), want);
    check(at_most(3, KickOldest), &[("tv", "c1", HERE, 9), ("web", "c2", HERE, 8)], new, ("bound", "tv/c1 web/c2 phone/c3"));
}

#[test]
fn the_device_that_is_replaced_makes_the_room() {
    let full = [("tv", "c1", HERE, 9), ("phone", "c2", HERE, 8)];
    for on_overflow in [KickOldest, RefuseNew] {
        let want = ("bound, phone/c2 Replaced", "tv/c1 phone/c3");
        check(at_most(2, on_overflow), &full, bind("phone", "c3"), want);
    }
}

#[test]
fn a_limit_that_was_lowered_is_kept_at_the_next_bind() {
    let had = [("tv", "c1", HERE, 7), ("web", "c2", HERE, 9), ("pad", "c3", HERE, 8)];
    let want = ("bound, tv/c1 DeviceLimit, web/c2 DeviceLimit, pad/c3 DeviceLimit", "phone/c4");
    check(at_most(1, KickOldest), &had, bind("phone", "c4"), want);
}

#[test]
fn a_newcomer_older_than_all_is_refused() {
    let had = [("tv", "c1", HERE, 9), ("web", "c2", HERE, 8)];
    let newcomer = |seconds| Bind { connected_ago: ago(seconds), ..bind("phone", "c3") };
    check(at_most(2, KickOldest), &had, newcomer(10), ("refused: DeviceLimit", "tv/c1 web/c2"));
    check(at_most(2, KickOldest), &had, newcomer(9), ("bound, tv/c1 DeviceLimit", "web/c2 phone/c3"));
    // A late gateway's route makes room even so: nobody is displaced who is known to be there.
    let had = [("tv", "c1", HERE, 9), ("web", "c2", LATE, 8)];
    check(at_most(2, KickOldest), &had, newcomer(10), ("bound, web/c2 DeviceLimit", "tv/c1 phone/c3"));
}

#[test]
fn refuse_new_refuses_only_for_routes_that_are_on_time() {
    let two = at_most(2, RefuseNew);
    let new = bind("phone", "c3");
    check(two, &[("tv", "c1", HERE, 9), ("web", "c2", HERE, 8)], new.clone(), ("refused: DeviceLimit", "tv/c1 web/c2"));
    let want = ("bound, web/c2 DeviceLimit", "tv/c1 phone/c3");
    check(two, &[("tv", "c1", HERE, 9), ("web", "c2", LATE, 8)], new.clone(), want);
    check(two, &[("tv", "c1", HERE, 9), ("web", "c2", OVER, 8)], new, ("bound", "tv/c1 phone/c3"));
}

#[test]
fn the_limit_per_platform_counts_what_is_known() {
    use Platform::Android;
    use Platform::Ios;
    use Platform::Unspecified;
    for (had, new, on_overflow, want) in [
        (Ios, Ios, KickOldest, "bound, tv/c1 PlatformLimit"),
        (Ios, Ios, RefuseNew, "refused: PlatformLimit"),
        (Ios, Android, RefuseNew, "bound"),
        (Unspecified, Unspecified, RefuseNew, "bound"),
    ] {
        let policy = DevicePolicy { max_devices: 5, per_platform: 1, on_overflow };
        let mut world = World::with(policy, &[("tv", "c1", HERE, 9)]);
        world.record.routes[0].platform = had;
        let outcome = world.bind(HERE, &Bind { platform: new, ..bind("phone", "c2") });
        assert_eq!(told(&outcome), want, "had {had:?}, bound {new:?}");
    }
    // Whoever gives way to the one limit makes room for the other.
    let policy = DevicePolicy { max_devices: 2, per_platform: 1, on_overflow: KickOldest };
    let mut world = World::with(policy, &[("tv", "c1", HERE, 9), ("pad", "c2", HERE, 8)]);
    world.record.routes[1].platform = Ios;
    let outcome = world.bind(HERE, &Bind { platform: Ios, ..bind("phone", "c3") });
    assert_eq!((told(&outcome).as_str(), world.devices().as_str()), ("bound, pad/c2 PlatformLimit", "tv/c1 phone/c3"));
}

#[test]
fn the_same_bind_again_changes_nothing() {
    let mut world = World::with(at_most(2, RefuseNew), &[("tv", "c0", HERE, 9)]);
    let first = world.bind(HERE, &bind("phone", "c1"));
    let before = world.record.clone();
    world.now = world.now.plus(BEAT);
    assert_eq!(world.bind(HERE, &bind("phone", "c1")), first, "the same version, the same route key");
    let older = Bind { connected_ago: ago(3_600), ..bind("phone", "c1") };
    assert_eq!(world.bind(HERE, &older), first, "whatever it says about its age");
    assert_eq!(world.record, before);
}

#[test]
fn binding_again_on_an_unmanaged_life_renews_the_route_and_keeps_its_version() {
    let mut world = World::with(ANY, &[]);
    let first = world.bind(UNMANAGED, &bind("phone", "c1"));
    let before = world.record.clone();
    assert_eq!(before.routes[0].expires_at.at(), Some(NOW.plus(ROUTE_TTL)));
    world.now = NOW.plus(BEAT);
    assert_eq!(world.bind(UNMANAGED, &bind("phone", "c1")), first);
    let mut want = before;
    want.routes[0].expires_at = Some(NOW.plus(BEAT + ROUTE_TTL)).into();
    assert_eq!(world.record, want);
    world.now = NOW.plus(BEAT + ROUTE_TTL);
    assert_eq!(told(&world.bind(UNMANAGED, &bind("phone", "c1"))), "bound", "too late to renew: a new route");
    assert!(world.record.version > want.version);
}

#[test]
fn a_bind_is_numbered_by_the_databases_clock_or_counts_on() {
    let mut world = World::with(ANY, &[]);
    let clock = world.context().clock;
    world.bind(HERE, &bind("phone", "c1"));
    assert_eq!((world.record.version, world.record.routes[0].bound_version), (clock, clock));
    world.bind(HERE, &bind("phone", "c2"));
    assert_eq!(
        (world.record.version, world.record.routes[0].bound_version),
        (Version(clock.0 + VERSION_GAP), Version(clock.0 + VERSION_GAP))
    );
}

const GONE: &str = "no such route: it was unbound, replaced or never bound";

/// Unbinds from a user with `phone/c1` bound as version 1 and `tv/c2` bound as version 2, both `HERE`.
#[track_caller]
fn check_unbind(unbind: Unbind, want: (&str, &str)) {
    let mut world = World::with(ANY, &[("phone", "c1", HERE, 9), ("tv", "c2", HERE, 9)]);
    let before = world.record.clone();
    let outcome = world.apply(&Event::Unbind(&unbind));
    let version = world.record.version;
    let told = if outcome == (Outcome::Unbound { version }) { "unbound".to_owned() } else { told(&outcome) };
    assert_eq!((told.as_str(), world.devices().as_str()), want, "{unbind:?}");
    assert_eq!(version > before.version, told == "unbound", "{unbind:?}");
}

#[test]
fn an_unbind_removes_what_fits_all_that_it_says() {
    let conn = |conn: &str| Some(ConnId::parse(conn).unwrap());
    let exact = |version, conn, epoch: Option<u64>| Unbind::Exact {
        bound_version: Version(version),
        conn,
        epoch: epoch.map(Epoch),
        by: None,
    };
    let device = |device: &str, life, conn, epoch: Option<u64>| Unbind::Device {
        device: DeviceId::parse(device).unwrap(),
        gateway: gateway(life),
        conn,
        epoch: epoch.map(Epoch),
    };
    let both = "phone/c1 tv/c2";
    check_unbind(exact(1, None, None), ("unbound", "tv/c2"));
    check_unbind(exact(1, conn("c1"), Some(HERE)), ("unbound", "tv/c2"));
    check_unbind(exact(1, conn("c2"), None), ("another connection holds the device", both));
    check_unbind(exact(1, None, Some(HERE_AGAIN)), ("another life of the gateway holds the device", both));
    check_unbind(exact(3, None, None), (GONE, both));
    check_unbind(device("tv", HERE, None, None), ("unbound", "phone/c1"));
    check_unbind(device("tv", HERE, conn("c2"), Some(HERE)), ("unbound", "phone/c1"));
    check_unbind(device("tv", HERE, conn("c1"), None), ("another connection holds the device", both));
    check_unbind(device("tv", HERE, None, Some(HERE_AGAIN)), ("another life of the gateway holds the device", both));
    check_unbind(device("tv", ELSEWHERE, None, None), ("the device is on another gateway", both));
    check_unbind(device("pad", HERE, None, None), (GONE, both));
}

#[test]
fn a_sweep_removes_what_leads_nowhere_and_nothing_else() {
    let mut world = World::with(ANY, &[("tv", "c1", OVER, 9), ("phone", "c2", LATE, 9), ("web", "c3", UNMANAGED, 9)]);
    world.record.last_seen = Timestamp(5);
    world.record.routes[2].expires_at = Some(NOW).into();
    assert_eq!(world.apply(&Event::Sweep), Outcome::Swept { routes: 2 });
    assert_eq!((world.devices().as_str(), world.record.last_seen), ("phone/c2", NOW));
    let before = world.record.clone();
    assert_eq!(world.apply(&Event::Sweep), Outcome::Swept { routes: 0 });
    assert_eq!(world.record, before);
}

#[test]
fn nobody_was_last_seen_in_the_future() {
    let mut world = World::with(ANY, &[("tv", "c1", OVER, 9)]);
    world.record.routes[0].expires_at = Some(NOW.plus(ROUTE_TTL)).into(); // its gateway registered: the unmanaged life is over
    world.apply(&Event::Sweep);
    assert!(world.record.last_seen <= NOW, "{:?}", world.record.last_seen);
}

fn wants(status: Status) -> SetStatus {
    SetStatus { status: Some(status), ..SetStatus::default() }
}

#[test]
fn what_a_hidden_user_does_and_what_one_who_is_away_wants_moves_nothing_that_others_see() {
    let mut away = World::with(ANY, &[]);
    away.record.version = Version(9);
    let before = away.record.shown();
    for status in [Status::Busy, Status::Invisible, Status::Online] {
        away.apply(&Event::SetStatus(&wants(status)));
        assert_eq!(away.record.shown(), before, "{status:?}");
    }

    let mut hidden = World::with(ANY, &[("phone", "c1", HERE, 5)]);
    hidden.apply(&Event::SetStatus(&wants(Status::Invisible)));
    let before = hidden.record.shown();
    assert_eq!(before.version, hidden.record.version, "that they went is seen");
    hidden.now = NOW.plus(Duration::from_secs(1));
    hidden.bind(ELSEWHERE, &bind("laptop", "c2"));
    hidden.bind(HERE, &bind("phone", "c3"));
    assert_eq!(hidden.record.shown(), before);
    hidden.apply(&Event::SetStatus(&wants(Status::Busy)));
    assert_eq!(hidden.record.shown().version, hidden.record.version, "that they came out is seen");
}

#[derive(Clone, Debug)]
enum Step {
    Bind {
        device: u8,
        conn: u8,
        life: u64,
        platform: Platform,
        ago_ms: Option<u64>,
        waited_ms: u64,
    },
    UnbindDevice {
        device: u8,
        life: u64,
        conn: Option<u8>,
    },
    /// The one bound n-th, whether it is still there or not.
    UnbindExact(usize),
    Sweep,
    /// The database's clock moves on, or steps back.
    Clock(i64),
    Heartbeat(u64),
    Dies(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let platform = prop_oneof![Just(Platform::Unspecified), Just(Platform::Ios), Just(Platform::Web)];
    let ago_ms = proptest::option::of(0..20_000_u64);
    let bind = (0..4_u8, 0..3_u8, 1..7_u64, platform, ago_ms, 0..2_000_u64).prop_map(
        |(device, conn, life, platform, ago_ms, waited_ms)| Step::Bind { device, conn, life, platform, ago_ms, waited_ms },
    );
    let unbind = (0..4_u8, 1..7_u64, proptest::option::of(0..3_u8));
    prop_oneof![
        8 => bind,
        2 => unbind.prop_map(|(device, life, conn)| Step::UnbindDevice { device, life, conn }),
        2 => (0..20_usize).prop_map(Step::UnbindExact),
        1 => Just(Step::Sweep),
        3 => (-3_000..30_000_i64).prop_map(Step::Clock),
        2 => (1..7_u64).prop_map(Step::Heartbeat),
        1 => (1..7_u64).prop_map(Step::Dies),
    ]
}

/// The connection 0 does not say who it is.
fn conn(number: u8) -> ConnId {
    ConnId::parse(if number == 0 { "" } else { ["c1", "c2"][usize::from(number) - 1] }).unwrap()
}

fn device(number: u8) -> DeviceId {
    DeviceId::parse(["", "phone", "tv", "web"][usize::from(number)]).unwrap()
}

impl World {
    fn take(&mut self, step: &Step, bound: &mut Vec<Version>) {
        match step {
            Step::Bind { device: name, conn: name_of_conn, life, platform, ago_ms, waited_ms } => {
                let life = self.lives.get(Epoch(*life)).unwrap().clone();
                let bind = Bind {
                    device: device(*name),
                    platform: *platform,
                    conn: conn(*name_of_conn),
                    connected_ago: ago_ms.map(Duration::from_millis),
                    ..bind("", "")
                };
                let event = Event::Bind { bind: &bind, life: &life, waited: Duration::from_millis(*waited_ms) };
                if life.is_alive() {
                    let before = self.record.clone();
                    let outcome = self.judged(&event);
                    self.judge_bind(&event, &before, &outcome);
                    bound.extend(if let Outcome::Bound { bound_version, .. } = outcome { Some(bound_version) } else { None });
                }
            }
            Step::UnbindDevice { device: name, life, conn: name_of_conn } => {
                let unbind =
                    Unbind::Device { device: device(*name), gateway: gateway(*life), conn: name_of_conn.map(conn), epoch: None };
                self.judged_unbind(&unbind);
            }
            Step::UnbindExact(nth) => {
                let Some(bound_version) = bound.get(*nth).copied() else { return };
                let there = self.record.routes.iter().any(|route| route.bound_version == bound_version);
                let unbound = self.judged_unbind(&Unbind::Exact { bound_version, conn: None, epoch: None, by: None });
                assert_eq!(unbound, there, "a route key names one bind and no later one");
            }
            Step::Sweep => self.judge_sweep(),
            Step::Clock(by) => self.now.0 += by,
            Step::Heartbeat(epoch) => self.change_life(*epoch, |life, now| life.lease_until = now.plus(3 * BEAT)),
            Step::Dies(epoch) => {
                self.change_life(*epoch, |life, now| life.end = Some(End { at: now, reason: EndReason::Expired }))
            }
        }
    }

    fn change_life(&mut self, epoch: u64, change: impl Fn(&mut Life, Timestamp)) {
        let mut life = Life::clone(self.lives.get(Epoch(epoch)).unwrap());
        change(&mut life, self.now);
        self.lives.learn(Arc::new(life));
    }

    /// Applies `event` under the laws that hold for every event.
    fn judged(&mut self, event: &Event<'_>) -> Outcome {
        let before = self.record.clone();
        let applied = before.apply(event, &self.context());
        if let Some(next) = &applied.next {
            let renewed = before.version == next.version;
            let mut same = next.clone();
            same.routes.iter_mut().zip(&before.routes).for_each(|(new, old)| new.expires_at = old.expires_at);
            assert_eq!(renewed, same == before, "a new version means a change, and a change means a new version");
            assert!(next.version >= before.version && *next != before);
            self.record = next.clone();
        }
        let devices: std::collections::BTreeSet<_> = self.record.routes.iter().map(|route| &route.device).collect();
        assert_eq!(devices.len(), self.record.routes.len(), "a device has one route");
        assert!(self.record.routes.len() <= self.policy.max_devices);
        applied.outcome
    }

    fn judge_bind(&self, event: &Event<'_>, before: &UserRecord, outcome: &Outcome) {
        let Event::Bind { bind, .. } = event else { unreachable!() };
        let context = self.context();
        if let (Outcome::Bound { bound_version, .. }, false) = (outcome, bind.conn.is_empty()) {
            let again = self.record.apply(event, &context);
            assert_eq!(again.next, None, "the same bind again changes nothing");
            assert!(matches!(again.outcome, Outcome::Bound { bound_version: again, .. } if again == *bound_version));
        }
        let Outcome::Bound { bound_version, kicked, .. } = outcome else {
            assert_eq!(self.record, *before, "a refusal changes nothing");
            return;
        };
        let of_platform = |route: &&Route| bind.platform.is_counted() && route.platform == bind.platform;
        if *bound_version > before.version && self.policy.per_platform > 0 {
            assert!(self.record.routes.iter().filter(of_platform).count() <= self.policy.per_platform);
        }
        let new = self.record.routes.iter().find(|route| route.bound_version == *bound_version).unwrap();
        for (route, reason) in kicked {
            let gave_way = *reason != Reason::Replaced && context.liveness(route) == Liveness::Late;
            assert!(gave_way || route.connected_at <= new.connected_at, "{route:?} was newer than {new:?}");
        }
        for route in &before.routes {
            let kicked = kicked.iter().filter(|(kicked, _)| kicked == route).count();
            let stayed = self.record.routes.iter().filter(|stayed| stayed.bound_version == route.bound_version).count();
            let dead = *bound_version > before.version && !context.is_live(route);
            assert_eq!(kicked + stayed + usize::from(dead), 1, "kicked, stayed or was dead: {route:?}");
        }
    }

    fn judged_unbind(&mut self, unbind: &Unbind) -> bool {
        let before = self.record.clone();
        let unbound = matches!(self.judged(&Event::Unbind(unbind)), Outcome::Unbound { .. });
        let gone: Vec<_> = before.routes.iter().filter(|route| !self.record.routes.contains(route)).collect();
        let live = gone.iter().filter(|route| self.context().is_live(route)).count();
        assert!(live <= usize::from(unbound) && (unbound || gone.is_empty()), "one route goes, and what is over: {gone:?}");
        unbound
    }

    fn judge_sweep(&mut self) {
        let before = self.record.clone();
        let outcome = self.judged(&Event::Sweep);
        let dead = before.routes.iter().filter(|route| !self.context().is_live(route)).count();
        assert_eq!(outcome, Outcome::Swept { routes: dead });
        assert!(self.record.routes.iter().all(|route| self.context().is_live(route)));
        assert_eq!(before.routes.len() - self.record.routes.len(), dead);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn no_sequence_of_events_breaks_a_law(
        max_devices in 1..4_usize,
        per_platform in 0..3_usize,
        refuse_new in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let on_overflow = if refuse_new { RefuseNew } else { KickOldest };
        let mut world = World::with(DevicePolicy { max_devices, per_platform, on_overflow }, &[]);
        let mut bound = Vec::new();
        for step in &steps {
            world.take(step, &mut bound);
        }
    }
}

fn force(ban: Ban) -> ForceOffline {
    ForceOffline { ban, ..ForceOffline::default() }
}

const DAY: Duration = Duration::from_secs(86_400);

impl World {
    /// Who had to go and why, and how long a ban lasts from now.
    fn forced(&mut self, force: &ForceOffline) -> (Vec<(String, Reason)>, Duration) {
        let Outcome::ForcedOffline { kicked, version, banned_until } = self.apply(&Event::ForceOffline(force)) else { panic!() };
        assert_eq!(version, self.record.version);
        (kicked.iter().map(|(route, reason)| (route.device.to_string(), *reason)).collect(), banned_until.since(self.now))
    }
}

#[test]
fn a_ban_takes_all_devices_off_and_keeps_them_away_until_it_is_over_or_lifted() {
    let had = [("phone", "c1", HERE, 9), ("tv", "c1", LATE, 9), ("car", "c1", OVER, 9)];
    let mut world = World::with(ANY, &had);
    let before = world.record.version;
    let gone = ["phone", "tv"].map(|device| (device.to_owned(), Reason::Banned)).to_vec();
    assert_eq!(world.forced(&ForceOffline { dry_run: true, ..force(Ban::For(DAY)) }), (gone.clone(), DAY));
    assert_eq!((world.record.version, world.record.routes.len()), (before, 3), "it was only asked what would be");
    assert_eq!(world.forced(&force(Ban::For(DAY))), (gone, DAY));
    assert_eq!(world.devices(), "");
    let refused = |world: &mut World| match world.bind(HERE, &bind("phone", "c1")) {
        Outcome::Refused(Refusal::Banned { until, left }) => {
            assert_eq!(until.since(world.now), left);
            Some(left)
        }
        _ => None,
    };
    assert_eq!(refused(&mut world), Some(DAY));
    assert_eq!(world.forced(&force(Ban::Stays)), (vec![], DAY), "nothing is there, and the ban stays");
    world.now = NOW.plus(DAY).minus(Duration::from_millis(1));
    assert_eq!(refused(&mut world), Some(Duration::from_millis(1)));
    world.now = NOW.plus(DAY);
    assert_eq!(refused(&mut world), None, "it is over");
    assert_eq!(world.forced(&force(Ban::Stays)), (vec![("phone".to_owned(), Reason::Operator)], Duration::ZERO));
    world.forced(&force(Ban::For(DAY)));
    assert_eq!(world.forced(&force(Ban::For(2 * DAY))), (vec![], 2 * DAY), "the last word counts");
    world.forced(&force(Ban::Lifted));
    assert_eq!(refused(&mut world), None);
    assert_eq!(world.forced(&force(Ban::Lifted)), (vec![], Duration::ZERO));
    assert_eq!(world.devices(), "phone/c1", "to lift a ban removes nothing");
    world.forced(&force(Ban::For(DAY)));
    world.apply(&Event::Forget);
    assert_eq!(refused(&mut world), None, "who is forgotten is not banned");
}

#[test]
fn a_ban_lasts_as_much_longer_as_the_clock_was_set_forward() {
    let mut world = World::with(ANY, &[]);
    world.forced(&force(Ban::For(DAY)));
    world.now = NOW.plus(DAY);
    let context = Context { slack: Duration::from_secs(3_600), ..world.context() };
    let (bind, life) = (bind("phone", "c1"), life(HERE));
    let event = Event::Bind { bind: &bind, life: &life, waited: Duration::ZERO };
    let until = NOW.plus(DAY);
    let refusal = Refusal::Banned { until, left: Duration::from_secs(3_600) };
    assert_eq!(world.record.apply(&event, &context).outcome, Outcome::Refused(refusal));
}

#[test]
fn one_device_is_kicked_and_the_others_stay() {
    let mut world = World::with(ANY, &[("phone", "c1", HERE, 9), ("tv", "c1", HERE, 9), ("car", "c1", OVER, 9)]);
    let kick = |device: &str| ForceOffline { which: Which::One(DeviceId::parse(device).unwrap()), ..ForceOffline::default() };
    for device in ["car", "watch"] {
        assert_eq!(world.apply(&Event::ForceOffline(&kick(device))), Outcome::NoDevice, "{device}");
    }
    assert_eq!(world.forced(&kick("tv")), (vec![("tv".to_owned(), Reason::Operator)], Duration::ZERO));
    assert_eq!(world.devices(), "phone/c1");
    assert!(matches!(world.bind(HERE, &bind("tv", "c2")), Outcome::Bound { .. }), "it may come back");
    let on = |epoch| ForceOffline { which: Which::On(Epoch(epoch)), ..ForceOffline::default() };
    assert_eq!(world.apply(&Event::ForceOffline(&on(OVER))), Outcome::NoDevice);
    assert_eq!(world.forced(&on(HERE)).0.len(), 2, "all on one gateway");
}

#[test]
fn nobody_sees_that_somebody_is_banned_who_hides_or_is_not_there() {
    let mut hidden = World::with(ANY, &[("phone", "c1", HERE, 9)]);
    hidden.apply(&Event::SetStatus(&wants(Status::Invisible)));
    for mut world in [hidden, World::with(ANY, &[])] {
        let before = (world.record.shown(), world.record.standing().shown());
        let applied = world.record.apply(&Event::ForceOffline(&force(Ban::For(DAY))), &world.context());
        assert!(applied.chronicle.log.iter().all(|line| line.hidden), "{applied:?}");
        world.record = applied.next.unwrap();
        assert_eq!((world.record.shown(), world.record.standing().shown()), before);
    }
}

#[test]
fn another_policy_leaves_no_room_for_as_many_devices_as_it_removes_when_they_come_again() {
    let had = [("a", "c1", HERE, 9), ("b", "c1", HERE, 8), ("c", "c1", LATE, 7), ("d", "c1", HERE, 6)];
    let platforms = [Platform::Ios, Platform::Ios, Platform::Web, Platform::Ios];
    for (max_devices, per_platform, want) in [(0, 0, 0), (4, 0, 0), (3, 0, 1), (1, 0, 3), (0, 1, 2), (2, 2, 2), (0, 2, 1)] {
        for on_overflow in [KickOldest, RefuseNew] {
            let policy = DevicePolicy { max_devices, per_platform, on_overflow };
            let world = World::with(policy, &had);
            let mut routes = world.record.routes.to_vec();
            routes.iter_mut().zip(platforms).for_each(|(route, platform)| route.platform = platform);
            let surplus = policy.surplus(&routes, |route| world.context().liveness(route));
            let mut anew = World::with(policy, &[]);
            for route in &routes {
                let life = route.epoch.0;
                let bind = Bind { platform: route.platform, gateway: gateway(life), ..bind(route.device.as_str(), "c2") };
                anew.bind(life, &bind);
            }
            assert_eq!((surplus, routes.len() - anew.record.routes.len()), (want, want), "{policy:?}");
        }
    }
}
