use std::sync::Arc;

use super::*;
use crate::domain::allocation::algorithm::Algorithm;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Profile;
use crate::domain::id::Epoch;

const BEAT: Duration = Duration::from_secs(5);
const LEASE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(10);
const LOGIN_RATE: u32 = 500;

fn rooms() -> Rooms {
    let (regions, experiments) = (BTreeMap::new(), Vec::new());
    let rules = Rules { algorithm: Algorithm::TwoChoices, max_load: 0.9, bounded_load: 1.25, regions, experiments };
    Rooms {
        rules,
        default_capacity: 10_000,
        login_rate: LOGIN_RATE,
        heartbeat_interval: BEAT,
        patience: PATIENCE,
        max_retry_after: Duration::from_secs(60),
    }
}

fn life(n: u64, capacity: u32, now: Timestamp) -> Arc<Life> {
    let gateway = GatewayAddr::parse(&format!("gw-{n}:7000")).unwrap();
    let profile = Arc::new(Profile { capacity, ..Profile::default() });
    Arc::new(Life { profile, last_beat: now, ..Life::begun(Epoch(n + 1), gateway, LifeKind::Managed, now.plus(LEASE)) })
}

/// `gw-0:7000` is to be left, the others take users.
fn world(capacities: &[u32]) -> (Arc<Lives>, Arc<Life>) {
    let lives = Lives::new();
    let now = lives.clock.now();
    let all: Vec<_> = (0..).zip(capacities).map(|(n, capacity)| life(n, *capacity, now)).collect();
    lives.replace(all.clone(), true, Instant::now());
    (lives, all[0].clone())
}

fn user(n: i64) -> UserId {
    UserId::parse(n).unwrap()
}

fn target(n: u64, quota: u64, sent: u64) -> Target {
    Target { gateway: GatewayAddr::parse(&format!("gw-{n}:7000")).unwrap(), quota, sent }
}

#[test]
fn nobody_waits_much_longer_than_a_connection_is_kept_while_another_gateway_takes_log_ins() {
    const USERS: i64 = 50_000;
    let (lives, from) = world(&[100_000, 90_000, 10_000]);
    let mut destinations = Destinations::of(&lives, &rooms(), &from, &[]);
    assert_eq!(destinations.log_in_rate(), Some(2 * LOGIN_RATE));
    let mut longest = Duration::ZERO;
    for n in 1..=USERS / 4 {
        let at = Duration::from_secs_f64(n as f64 / f64::from(2 * LOGIN_RATE));
        longest = longest.max(destinations.choose_at(user(n), Sending::First(1), at).after);
    }
    assert!(longest <= PATIENCE + Duration::from_millis(10), "{longest:?}");
    assert!(longest >= PATIENCE / 2, "the larger one is preferred until then: {longest:?}");
}

#[test]
fn nobody_is_asked_to_wait_for_longer_than_a_client_may_be() {
    let (lives, from) = world(&[100_000, 100_000]);
    let mut destinations = Destinations::of(&lives, &rooms(), &from, &[]);
    let waits: Vec<_> =
        (1..=100_i64).map(|n| destinations.choose_at(user(n), Sending::First(1_000), Duration::ZERO).after.as_secs()).collect();
    assert_eq!((waits[0], waits[1], waits[99]), (0, 2, 60));
}

#[test]
fn a_quota_counts_who_were_sent_before_and_nobody_twice() {
    let (lives, from) = world(&[10_000, 10_000, 10_000]);
    let mut to = [target(1, 100, 90), target(2, 50, 50)];
    let mut destinations = Destinations::of(&lives, &rooms(), &from, &to);
    assert_eq!(destinations.room(), 10);
    for n in 1..=5 {
        assert_eq!(destinations.choose(user(n), Sending::First(1)).to[0], "gw-1:7000", "the other one has its own");
        destinations.choose(user(n), Sending::Again);
    }
    destinations.note(&mut to);
    assert_eq!((to[0].sent, to[1].sent, destinations.room()), (95, 50, 5));
}
