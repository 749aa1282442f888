//! One user whom everybody watches goes on and off: what others notice who are watched, too, and whether all are told the truth in
//! the end.

use std::sync::Arc;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use serde_json::json;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;

use crate::Plan;
use crate::field::Field;
use crate::field::micros_each;
use crate::field::millis;
use crate::harness::cluster::PHONE;
use crate::harness::node::Node;
use crate::load::book::Book;
use crate::load::report;
use crate::load::report::Row;
use crate::load::watching::Watchers;

const STAR: i64 = 1;
const PAUSE: Duration = Duration::from_secs(1);
const TOLD_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// What each stream was told last of the star.
struct Crowd(Vec<AtomicI32>);

impl Crowd {
    fn offline(&self) -> usize {
        let offline = i32::from(pb::Status::Offline);
        self.0.iter().filter(|status| status.load(Ordering::Relaxed) == offline).count()
    }
}

pub async fn measure(plan: &Plan) {
    let mut lag = Row::absolute("lag_p99", "acknowledged to told of others meanwhile, p99", "ms", (1_000.0, 1_000.0));
    let mut median = Row::absolute("lag_p50", "the same, p50", "ms", (0.0, 0.0));
    let mut right = Row::new("right", ("share of the streams that know in the end", ""), (1.0, 1.0)).in_unit("");
    let mut last = Row::absolute("last", "from the last unbind until all know", "s", (0.0, 0.0));
    let mut rate = Row::new("tellings", ("tellings a second of the one user", ""), (0.0, 0.0));
    let mut cpu = Row::absolute("cpu", "CPU of the node per telling", "us", (0.0, 0.0));
    let (streams, others) = (plan.storm.all_streams(), plan.bystanders.pairs());
    let field = Field::enter(1 + others, &[]).await;
    let changes = plan.rounds as f64 * plan.storm_rate * plan.storm_seconds as f64;
    let book = Book::new(changes as u64 + 1, 2..2 + others);
    let mut counts = Vec::new();
    for _ in 0..plan.rounds {
        let crowd = Arc::new(Crowd((0..streams).map(|_| AtomicI32::new(0)).collect()));
        let (seen, heard) = (crowd.clone(), book.clone());
        let note = move |stream: u64, status| seen.0[stream as usize].store(status, Ordering::Relaxed);
        let fans = Watchers::open(field.b.data, plan.storm, move |stream, told, _| note(stream, told.status)).await;
        let bystanders = Watchers::open(field.b.data, plan.bystanders, move |_, told, now| heard.heard(told, now)).await;
        fans.watch(|_| vec![STAR]).await;
        bystanders.watch(|stream| plan.bystanders.users_of(stream).into_iter().map(|user| user + STAR).collect()).await;
        fans.quiet(PAUSE, TOLD_WITHIN).await;
        let (told, cpu_before, began) = (fans.told(), field.b.cpu_time(), Instant::now());
        let time = Duration::from_secs(plan.storm_seconds);
        let (off, numbers) = tokio::join!(flap(&field.a, plan.storm_seconds), book.change(&field.a, plan.storm_rate, time));
        rate.add_absolute((fans.told() - told) as f64 / began.elapsed().as_secs_f64());
        last.add_absolute(all_know(&crowd, off).await.as_secs_f64());
        bystanders.quiet(PAUSE, TOLD_WITHIN).await;
        right.add_absolute(crowd.offline() as f64 / streams as f64);
        cpu.add_absolute(micros_each(cpu_before, field.b.cpu_time(), fans.told() - told));
        let (_, mut lags) = book.lags(numbers.clone());
        median.add_absolute(millis(&mut lags, 0.5));
        lag.add_absolute(millis(&mut lags, 0.99));
        counts.push(json!({ "changes": numbers.end - numbers.start, "told": lags.len(), "of_the_one": fans.told() - told }));
        drop((fans, bystanders));
        field.forgets(&field.b).await;
    }
    report::print("watch storm", &[lag, median, right, last, rate, cpu], &json!({ "streams": streams, "runs": counts }));
}

/// On and off each second. Always on another gateway, or the damping would leave nothing to be told. Returns when it was off for good.
async fn flap(node: &Node, seconds: u64) -> Instant {
    let mut halves = interval(Duration::from_millis(500));
    halves.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for turn in 0..seconds {
        let gateway_addr = format!("gw-{}.example.net:7000", 1 + turn % 2);
        halves.tick().await;
        let bind = pb::BindRouteReq {
            user_id: STAR,
            gateway_addr: gateway_addr.clone(),
            device_id: PHONE.to_owned(),
            conn_id: format!("c-{turn}"),
            ..Default::default()
        };
        node.bind(bind).await;
        halves.tick().await;
        let device_id = PHONE.to_owned();
        node.unbind(pb::UnbindRouteReq { user_id: STAR, gateway_addr, device_id, ..Default::default() }).await;
    }
    Instant::now()
}

/// How long after `off` the last of them was told so, or how long that was waited for.
async fn all_know(crowd: &Crowd, off: Instant) -> Duration {
    while crowd.offline() < crowd.0.len() && off.elapsed() < TOLD_WITHIN {
        tokio::time::sleep(LOOK).await;
    }
    off.elapsed()
}
