use super::*;
use crate::domain::gateway::End;
use crate::domain::gateway::LifeKind;
use crate::domain::history::OnlineSession;
use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::GatewayAddr;
use crate::domain::route::Platform;
use crate::domain::status::Wish;
use crate::domain::user::Presence;

const NOW: Timestamp = Timestamp(1_000_000);
const BEAT: Duration = Duration::from_secs(5);
const LOOK: Look = Look {
    now: NOW,
    slack: Duration::ZERO,
    heartbeat_interval: BEAT,
    hold: false,
    lives_age: Duration::from_millis(800),
    lives_are_stale: false,
};
const HELD: Look = Look { hold: true, ..LOOK };
const STALE: Look = Look { lives_age: Duration::from_secs(4), lives_are_stale: true, ..LOOK };

fn route(device: &str, epoch: u64) -> Route {
    Route {
        device: DeviceId::parse(device).unwrap(),
        platform: Platform::Ios,
        epoch: Epoch(epoch),
        conn: ConnId::parse("c").unwrap(),
        connected_at: Timestamp(900_000),
        client_ip: None,
        client_port: 0,
        bound_version: Version(epoch),
        bound_at: Timestamp(900_000),
        expires_at: None.into(),
        idle: false,
    }
}

fn expiring(at: i64) -> Route {
    Route { expires_at: Some(Timestamp(at)).into(), ..route("phone", 1) }
}

fn life(epoch: u64, lease_until: i64) -> Life {
    let gateway = GatewayAddr::parse(&format!("gw-{epoch}:7000")).unwrap();
    let last_beat = Timestamp(lease_until - 15_000);
    Life { last_beat, ..Life::begun(Epoch(epoch), gateway, LifeKind::Managed, Timestamp(lease_until)) }
}

fn on_time(epoch: u64) -> Life {
    life(epoch, NOW.0 + 14_000)
}

fn late(epoch: u64) -> Life {
    life(epoch, NOW.0 + 3_000)
}

fn dead(epoch: u64, reason: EndReason) -> Life {
    on_time(epoch).ended(End { at: Timestamp(NOW.0 - 700), reason })
}

fn user(routes: &[Route]) -> UserRecord {
    UserRecord { version: Version(64), last_seen: Timestamp(940_000), routes: routes.into(), ..UserRecord::default() }
}

fn wanting(status: Status, routes: &[Route]) -> UserRecord {
    let record = user(routes);
    let presence = Presence { wish: Wish { status, ..Wish::default() }, ..record.presence() };
    record.with(presence)
}

/// A record, the lives that are known, and what else there is.
struct Told {
    record: UserRecord,
    lives: Vec<Life>,
    look: Look,
    source: Option<Tier>,
    tiers: Vec<TierView>,
    last: Option<Cause>,
}

fn told(record: UserRecord, lives: Vec<Life>) -> Told {
    Told { record, lives, look: LOOK, source: Some(Tier::Durable), tiers: Vec::new(), last: None }
}

impl Told {
    fn by(self, look: Look) -> Self {
        Self { look, ..self }
    }

    fn after(self, last: Cause) -> Self {
        Self { last: Some(last), ..self }
    }

    fn from(self, source: Option<Tier>) -> Self {
        Self { source, ..self }
    }

    fn beside(self, tier: TierView) -> Self {
        Self { tiers: vec![tier], ..self }
    }
}

#[track_caller]
fn check(told: Told, verdicts: &[Verdict], shown: Status, want: &str) {
    let Told { record, lives, look, source, tiers, last } = told;
    let life = |epoch| lives.iter().find(|life| life.epoch == epoch).cloned().map(Arc::new);
    let routes: Vec<_> = record.routes.iter().map(|route| RouteView::of(route, life(route.epoch), &look)).collect();
    let Look { now, slack, .. } = look;
    let situation = Situation { record: &record, source, routes: &routes, tiers: &tiers, last, now, slack };
    assert_eq!(routes.iter().map(|view| view.verdict).collect::<Vec<_>>(), verdicts, "{routes:?}");
    assert_eq!((because(&situation).as_str(), situation.shown()), (want, shown));
}

#[test]
fn a_user_with_a_route_that_is_live_is_online() {
    let (phone, pad) = (route("phone", 1), route("pad", 2));
    let two = [phone.clone(), pad.clone()];
    let one = [phone.clone()];
    check(told(user(&one), vec![on_time(1)]), &[Verdict::Live], Status::Online, "online: phone is on gw-1:7000, which lives");
    let best = "online: phone is on gw-1:7000, which lives";
    check(told(user(&two), vec![on_time(1), late(2)]), &[Verdict::Live, Verdict::Late], Status::Online, best);
    let newest = "online: pad is on gw-2:7000, which lives";
    check(told(user(&two), vec![on_time(1), on_time(2)]), &[Verdict::Live; 2], Status::Online, newest);
    let idle = user(&[Route { idle: true, ..phone }]);
    let away = "online, and shown as AWAY because nobody uses a device: phone is on gw-1:7000";
    check(told(idle, vec![on_time(1)]), &[Verdict::Live], Status::Away, away);
    let busy = "online, and shown as wanted: phone is on gw-1:7000";
    check(told(wanting(Status::Busy, &one), vec![on_time(1)]), &[Verdict::Live], Status::Busy, busy);
    let hidden = "shown as OFFLINE because INVISIBLE is wanted, though phone is on gw-1:7000";
    check(told(wanting(Status::Invisible, &one), vec![on_time(1)]), &[Verdict::Live], Status::Offline, hidden);
    let unmanaged = Life { kind: LifeKind::Unmanaged, ..on_time(1) };
    let lives = "online: phone is on gw-1:7000, which lives";
    check(told(user(&[expiring(NOW.0 + 1)]), vec![unmanaged]), &[Verdict::Live], Status::Online, lives);
}

#[test]
fn a_user_is_suspect_if_no_route_is_sure() {
    let record = || user(&[route("phone", 1)]);
    let late_only = "online, but suspect: phone is on gw-1:7000; its gateway was last heard 12 s ago";
    check(told(record(), vec![late(1)]), &[Verdict::Late], Status::Online, late_only);
    let held =
        "online, but suspect: phone is on gw-1:7000; its gateway missed beats, and a hold keeps all from being declared dead";
    check(told(record(), vec![late(1)]).by(HELD), &[Verdict::Held], Status::Online, held);
    check(
        told(record(), vec![on_time(1)]).by(HELD),
        &[Verdict::Live],
        Status::Online,
        "online: phone is on gw-1:7000, which lives",
    );
    let stale = "online, but suspect: phone is on gw-1:7000; this node knew 4 s ago who lives, and may have missed a death since";
    check(told(record(), vec![on_time(1)]).by(STALE), &[Verdict::Unsure], Status::Online, stale);
    let without_sql = format!("{stale}; SQL does not answer: so says this node's memory");
    let from_memory = told(record(), vec![late(1)]).by(STALE).from(Some(Tier::Memory));
    check(from_memory, &[Verdict::Unsure], Status::Online, &without_sql);
}

#[test]
fn a_user_whose_routes_are_over_is_offline() {
    let record = || user(&[route("phone", 1)]);
    let expired =
        "offline: phone was on gw-1:7000; its lease ran out, and it was declared dead 700 ms ago, and the route is not swept yet";
    check(told(record(), vec![dead(1, EndReason::Expired)]), &[Verdict::Over], Status::Offline, expired);
    let left = "offline: phone was on gw-1:7000; it deregistered 700 ms ago, and the route is not swept yet";
    check(told(record(), vec![dead(1, EndReason::Deregistered)]).by(STALE), &[Verdict::Over], Status::Offline, left);
    let unmanaged = Life { kind: LifeKind::Unmanaged, ..on_time(1) };
    let outlived =
        "offline: phone was on gw-1:7000, which never registered; it was not bound again, and its time to live ended 1 ms ago";
    check(told(user(&[expiring(NOW.0 - 1)]), vec![unmanaged]), &[Verdict::Expired], Status::Offline, outlived);
    let unheard = "offline: phone was on a gateway that nobody has heard of; this node has not heard of the life that it names";
    check(told(record(), Vec::new()), &[Verdict::Unsure], Status::Offline, unheard);
}

#[test]
fn a_user_without_routes_is_offline() {
    let check = |told: Told, want: &str| check(told, &[], Status::Offline, want);
    check(told(UserRecord::default(), Vec::new()), "offline: never seen");
    for (cause, how) in [
        (Cause::Logout, "the last device logged out"),
        (Cause::Expired, "the last device's gateway died, or its route was not renewed"),
        (Cause::Kicked, "the last device was kicked"),
        (Cause::Operator, "an operator ended the last session"),
        (Cause::Set, "the last device went"),
    ] {
        check(told(user(&[]), Vec::new()).after(cause), &format!("offline: {how} 60 s ago"));
    }
    let never = UserRecord { last_seen: Timestamp(0), ..user(&[]) };
    check(told(never, Vec::new()), "offline: no device was ever bound");
    let record = user(&[]);
    let banned = Presence { banned_until: Timestamp(NOW.0 + 90_000), ..record.presence() };
    check(told(record.with(banned), Vec::new()).after(Cause::Operator), "offline: banned for 90 s more");
    let record = UserRecord { last_seen: Timestamp(0), ..user(&[]) };
    let lifted = Presence { banned_until: NOW, ..record.presence() };
    check(told(record.with(lifted), Vec::new()), "offline: no device was ever bound");
    let set_forward = Look { slack: Duration::from_secs(30), ..LOOK };
    let record = user(&[]);
    let over = Presence { banned_until: NOW, ..record.presence() };
    check(told(record.with(over), Vec::new()).by(set_forward), "offline: banned for 30 s more");
    let record = user(&[]);
    let erased = Presence { session: OnlineSession { since: Timestamp(0), is_counted: true }, ..record.presence() };
    check(told(record.with(erased), Vec::new()).after(Cause::Operator), "offline: erased by an operator, and not back since");
    check(told(UserRecord::default(), Vec::new()).from(None), "unknown: SQL does not answer, and nothing else has a record");
}

#[test]
fn a_tier_that_has_another_record_is_named() {
    let online = || told(user(&[route("phone", 1)]), vec![on_time(1)]);
    let sentence = |more: &str| format!("online: phone is on gw-1:7000, which lives{more}");
    let with = |version| UserRecord { version: Version(version), ..user(&[]) };
    let old = |tier| TierView::of(tier, Some(&with(63)), 4);
    let check = |told: Told, more: &str| check(told, &[Verdict::Live], Status::Online, &sentence(more));
    let outdated = old(Tier::Shared).doubted(Duration::ZERO, "it is of generation 4, and the caches are in 5");
    let not_used = "; Redis has an older record, which is not used: it is of generation 4, and the caches are in 5";
    check(online().beside(outdated), not_used);
    let used = "; this node's memory has an older record, and queries of this node may be answered from it";
    check(online().beside(old(Tier::Memory).trusted(Duration::ZERO)), used);
    check(online().beside(TierView::of(Tier::Memory, Some(&with(64)), 4).trusted(Duration::ZERO)), "");
    check(online().beside(TierView::of(Tier::Shared, None, 0).doubted(Duration::ZERO, "it does not answer")), "");
    let newer = TierView::of(Tier::Shared, Some(&with(65)), 4).doubted(Duration::ZERO, "it does not answer");
    check(online().beside(newer), "; Redis has a newer record, which is not used: it does not answer");
}

#[test]
fn with_lives_that_are_over_what_is_shown_has_a_version_of_its_own() {
    let check = |record: &UserRecord, life: Life, want: u64| {
        let routes = [RouteView::of(&record.routes[0], Some(Arc::new(life)), &LOOK)];
        let (source, now, slack) = (Some(Tier::Durable), NOW, Duration::ZERO);
        let situation = Situation { record, source, routes: &routes, tiers: &[], last: None, now, slack };
        assert_eq!(situation.shown_version(), Version(want));
    };
    let record = user(&[route("phone", 1)]);
    check(&record, late(1), 64);
    check(&record, dead(1, EndReason::Expired), 65);
    check(&wanting(Status::Invisible, &[route("phone", 1)]), dead(1, EndReason::Expired), 64);
}

#[test]
fn who_is_offline_was_last_seen_when_their_gateway_was() {
    let check = |life: Life, want: i64| {
        let record = user(&[route("phone", 1)]);
        let routes = [RouteView::of(&record.routes[0], Some(Arc::new(life)), &LOOK)];
        let (source, now, slack) = (Some(Tier::Durable), NOW, Duration::ZERO);
        let situation = Situation { record: &record, source, routes: &routes, tiers: &[], last: None, now, slack };
        assert_eq!(situation.last_seen(), Timestamp(want));
    };
    check(on_time(1), 940_000);
    check(dead(1, EndReason::Expired), NOW.0 - 1_000);
}
