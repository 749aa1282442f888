//! How many tellings a second one node makes: all streams watch the same users, so that one change is many tellings.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use serde_json::Value;
use serde_json::json;

use crate::Plan;
use crate::field::Field;
use crate::field::micros_each;
use crate::load::book::Book;
use crate::load::report;
use crate::load::report::Row;
use crate::load::watching::Watchers;
use crate::publish::Subscribers;

const PAUSE: Duration = Duration::from_secs(1);
const TOLD_WITHIN: Duration = Duration::from_secs(60);

/// What came of one rate.
struct Rung {
    rate: f64,
    per_second: f64,
    /// Microseconds of the node for each.
    cpu: f64,
    /// Of those that there would be if nothing were damped or overtaken.
    share: f64,
}

pub async fn measure(plan: &Plan) {
    let field = Field::enter(plan.fans.users, &[]).await;
    let all: f64 = plan.fan_rates.iter().sum();
    let changes = plan.rounds as f64 * all * plan.fan_time.as_secs_f64();
    let book = Book::new(changes as u64 + 1, 1..plan.fans.users + 1);
    let watchers = Watchers::open(field.b.data, plan.fans, |_, _, _| ()).await;
    watchers.watch(|_| plan.fans.users_of(0)).await;
    watchers.quiet(PAUSE, TOLD_WITHIN).await;
    let redis = Subscribers::open(plan.fans.all_streams()).await;
    let publish = "PUBLISH of Redis to as many subscribers";
    let mut most = Row::new("tellings", ("tellings a second of one node, at the best rate", publish), (1.0, 3.0));
    let alike = "that of Redis, as many messages a second to publish";
    let mut cpu = Row::new("cpu", ("its CPU per telling then", alike), (0.0, 0.0)).less_is_better("us");
    let mut rungs: Vec<Value> = Vec::new();
    for _ in 0..plan.rounds {
        let mut best = Rung { rate: 0.0, per_second: 0.0, cpu: 0.0, share: 0.0 };
        for rate in plan.fan_rates {
            let rung = climb(plan, &field, &watchers, &book, *rate).await;
            let (told, micros) = (rung.per_second.round(), (rung.cpu * 100.0).round() / 100.0);
            rungs.push(json!({ "changes": rung.rate, "told": told, "share": rung.share, "cpu_us": micros }));
            best = if rung.per_second > best.per_second { rung } else { best };
        }
        most.add(best.per_second, redis.most_per_second(plan.published).await);
        cpu.add(best.cpu, redis.micros_each(best.rate, plan.fan_time).await);
    }
    let (streams, users) = (plan.fans.all_streams(), plan.fans.users);
    report::print("watch tellings", &[most, cpu], &json!({ "streams": streams, "users": users, "rates": rungs }));
}

/// Users change at this rate. Counted is what was told meanwhile; the rest is waited for.
async fn climb(plan: &Plan, field: &Field, watchers: &Watchers, book: &Arc<Book>, rate: f64) -> Rung {
    let (before, cpu_before, began) = (watchers.told(), field.b.cpu_time(), Instant::now());
    let numbers = book.change(&field.a, rate, plan.fan_time).await;
    let per_second = (watchers.told() - before) as f64 / began.elapsed().as_secs_f64();
    watchers.quiet(PAUSE, TOLD_WITHIN).await;
    let told = watchers.told() - before;
    let wanted = (numbers.end - numbers.start) * plan.fans.all_streams();
    let share = (told as f64 / wanted as f64 * 1e3).round() / 1e3;
    Rung { rate, per_second, cpu: micros_each(cpu_before, field.b.cpu_time(), told), share }
}
