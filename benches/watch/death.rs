//! How long after the end of its lease all are told that the users of a gateway are offline.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use serde_json::json;
use tokio::time::sleep_until;

use crate::Plan;
use crate::field::Field;
use crate::field::query_times;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::code;
use crate::harness::node::Node;
use crate::load::gateway::Gateway;
use crate::load::gateway::LEASES;
use crate::load::report;
use crate::load::report::Row;
use crate::load::watching::Shape;
use crate::load::watching::Watchers;

/// Of one BatchBindRoute.
const BATCH: u64 = 10_000;
const PAUSE: Duration = Duration::from_secs(1);
const TOLD_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);
/// From the end of the lease: the delay before OFFLINE, and what is allowed beside it. Queries are measured so long.
const NEEDED: Duration = Duration::from_secs(7);

/// What one death was like.
struct Death {
    /// From the end of the lease until the first and the last were told. None: nobody watched.
    told: Option<(Duration, Duration)>,
    /// p50 and p99 of queries before, and from the end of the lease on.
    before: (f64, f64),
    during: (f64, f64),
}

pub async fn measure(plan: &Plan) {
    let field = Field::enter(0, &LEASES).await;
    let _healthy = Gateway::register(&field.a, "gw-healthy:7000").await; // one of two that dies is no mass expiry
    let bounds = (NEEDED.as_secs_f64(), NEEDED.as_secs_f64());
    let mut last = Row::absolute("last", "from the end of the lease until all users are told offline", "s", bounds);
    let mut first = Row::absolute("first", "until the first is", "s", (0.0, 0.0));
    let mut p99 = Row::new("p99", ("p99 of queries meanwhile", "before"), (0.0, 0.0)).less_is_better("ms");
    let mut p50 = Row::new("p50", ("p50 of queries meanwhile", "before"), (0.0, 0.0)).less_is_better("ms");
    let mut unwatched = Row::new("p99_unwatched", ("p99 meanwhile", "while nobody is watched"), (2.0, 2.0)).less_is_better("ms");
    for round in 0..plan.rounds {
        let alone = die(&field, plan, 2 * round, false).await;
        let watched = die(&field, plan, 2 * round + 1, true).await;
        if let Some((first_told, last_told)) = watched.told {
            last.add_absolute(last_told.as_secs_f64());
            first.add_absolute(first_told.as_secs_f64());
        }
        p99.add(watched.during.1, watched.before.1);
        p50.add(watched.during.0, watched.before.0);
        unwatched.add(watched.during.1, alone.during.1);
    }
    report::print("watch death", &[last, first, p99, p50, unwatched], &json!({ "users": plan.dying }));
}

async fn die(field: &Field, plan: &Plan, round: usize, is_watched: bool) -> Death {
    let shape = Shape { connections: 1, streams: 1, users: plan.dying };
    let gateway = Gateway::register(&field.a, &format!("gw-{round}:7000")).await;
    bind_all(&field.a, &gateway, round, plan.dying).await;
    let (told, began) = (Arc::new([AtomicU64::new(0), AtomicU64::new(0)]), Instant::now());
    let heard = told.clone();
    let watchers = Watchers::open(field.b.data, shape, move |_, telling, now| {
        if telling.status == i32::from(pb::Status::Offline) {
            let nanos = now.saturating_duration_since(began).as_nanos() as u64;
            let _ = heard[1].compare_exchange(0, nanos, Ordering::Relaxed, Ordering::Relaxed);
            heard[0].fetch_add(1, Ordering::Release);
        }
    })
    .await;
    if is_watched {
        watchers.watch(|_| shape.users_of(0)).await;
        watchers.quiet(PAUSE, TOLD_WITHIN).await;
        told.iter().for_each(|figure| figure.store(0, Ordering::Release)); // some may have been read before they were bound
    }
    let before = query_times(&field.b, plan.dying, plan.query_time.min(NEEDED)).await;
    let end = gateway.fall_silent().await;
    sleep_until(end.into()).await;
    let expected = if is_watched { plan.dying } else { 0 };
    let (all, during) = tokio::join!(all_told(&told[0], end, expected), query_times(&field.b, plan.dying, NEEDED));
    let first_at = began + Duration::from_nanos(told[1].load(Ordering::Relaxed));
    drop(watchers);
    field.forgets(&field.b).await;
    Death { told: is_watched.then(|| (first_at.saturating_duration_since(end), all)), before, during }
}

/// New connections of all users, on the gateway.
async fn bind_all(node: &Node, gateway: &Gateway, round: usize, users: u64) {
    for first in (0..users).step_by(BATCH as usize) {
        let bind = |n: u64| pb::BindRouteReq {
            user_id: 1 + n as i64,
            gateway_addr: format!("gw-{round}:7000"),
            gateway_epoch: gateway.epoch,
            device_id: PHONE.to_owned(),
            conn_id: format!("c-{round}"),
            ..Default::default()
        };
        let binds = (first..users.min(first + BATCH)).map(bind).collect();
        let answer = node.presence().batch_bind_route(pb::BatchBindRouteReq { binds }).await.expect("binds").into_inner();
        assert!(answer.results.iter().all(|result| code(&result.result) == pb::Code::Ok), "all are bound");
    }
}

/// How long after `end` that was so.
async fn all_told(told: &AtomicU64, end: Instant, users: u64) -> Duration {
    while told.load(Ordering::Acquire) < users {
        assert!(end.elapsed() < TOLD_WITHIN, "{} of {users} are told", told.load(Ordering::Acquire));
        tokio::time::sleep(LOOK).await;
    }
    end.elapsed()
}
