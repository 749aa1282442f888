//! How late tellings are, on the node where the user changed and on the other one.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::Plan;
use crate::field::Field;
use crate::field::micros_each;
use crate::field::millis;
use crate::harness::node::Node;
use crate::load::book::Book;
use crate::load::report;
use crate::load::report::Row;
use crate::load::watching::Watchers;

/// For the last tellings, and until users may be told again after they were added.
const PAUSE: Duration = Duration::from_secs(1);
const TOLD_WITHIN: Duration = Duration::from_secs(20);

/// Of one node, round by round.
struct Rows([Row; 5]);

struct Run {
    /// p50 and p99 from the acknowledgement, and from when the change was due.
    from_ack: (f64, f64),
    from_due: (f64, f64),
    cpu: f64,
    changes: u64,
    told: u64,
}

pub async fn measure(plan: &Plan) {
    let field = Field::enter(plan.crowd.pairs(), &[]).await;
    let changes = plan.rounds as f64 * 2.0 * plan.change_rate * plan.change_time.as_secs_f64();
    let book = Book::new(changes as u64 + 1, 1..plan.crowd.pairs() + 1);
    let (mut here, mut elsewhere, mut counts) = (Rows::here(), Rows::elsewhere(), Vec::new());
    for _ in 0..plan.rounds {
        for (node, rows) in [(&field.b, &mut elsewhere), (&field.a, &mut here)] {
            let run = run(plan, &field, node, &book).await;
            rows.add(&run);
            counts.push(json!({ "changes": run.changes, "told": run.told }));
        }
    }
    let rows: Vec<Row> = elsewhere.0.into_iter().chain(here.0).collect();
    let (pairs, rate) = (plan.crowd.pairs(), plan.change_rate);
    report::print("watch latency", &rows, &json!({ "pairs": pairs, "changes_per_second": rate, "runs": counts }));
}

/// Users change through A, and streams on `node` watch them.
async fn run(plan: &Plan, field: &Field, node: &Node, book: &Arc<Book>) -> Run {
    let heard = book.clone();
    let watchers = Watchers::open(node.data, plan.crowd, move |_, telling, now| heard.heard(telling, now)).await;
    watchers.watch(|stream| plan.crowd.users_of(stream)).await;
    watchers.quiet(PAUSE, TOLD_WITHIN).await;
    let (told_before, cpu_before) = (watchers.told(), node.cpu_time());
    let numbers = book.change(&field.a, plan.change_rate, plan.change_time).await;
    watchers.quiet(PAUSE, TOLD_WITHIN).await;
    let cpu = micros_each(cpu_before, node.cpu_time(), watchers.told() - told_before);
    let (mut due, mut acknowledged) = book.lags(numbers.clone());
    let run = Run {
        from_ack: (millis(&mut acknowledged, 0.5), millis(&mut acknowledged, 0.99)),
        from_due: (millis(&mut due, 0.5), millis(&mut due, 0.99)),
        cpu,
        changes: numbers.end - numbers.start,
        told: book.told(numbers),
    };
    drop(watchers);
    field.forgets(node).await;
    run
}

impl Rows {
    fn elsewhere() -> Self {
        Self([
            Row::absolute("b_p50", "acknowledged to told on the other node, p50", "ms", (0.0, 0.0)),
            Row::absolute("b_p99", "the same, p99", "ms", (0.0, 0.0)),
            Row::absolute("b_due_p50", "due to told on the other node, p50", "ms", (0.0, 0.0)),
            Row::absolute("b_due_p99", "the same, p99", "ms", (0.0, 0.0)),
            Row::absolute("b_cpu", "CPU of the other node per telling", "us", (0.0, 0.0)),
        ])
    }

    fn here() -> Self {
        Self([
            Row::absolute("a_p50", "acknowledged to told on the same node, p50", "ms", (0.0, 0.0)),
            Row::absolute("a_p99", "the same, p99", "ms", (0.0, 0.0)),
            Row::absolute("a_due_p50", "due to told on the same node, p50", "ms", (0.0, 0.0)),
            Row::absolute("a_due_p99", "the same, p99", "ms", (0.0, 0.0)),
            Row::absolute("a_cpu", "CPU of the same node per telling and change", "us", (0.0, 0.0)),
        ])
    }

    fn add(&mut self, run: &Run) {
        let Run { from_ack, from_due, cpu, .. } = run;
        for (row, figure) in self.0.iter_mut().zip([from_ack.0, from_ack.1, from_due.0, from_due.1, *cpu]) {
            row.add_absolute(figure);
        }
    }
}
