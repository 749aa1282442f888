//! What a watched user takes of memory, and how fast a node takes them up: many small sets, and few large ones.

use std::time::Duration;
use std::time::Instant;

use serde_json::json;

use crate::Plan;
use crate::field::Field;
use crate::field::query_times;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::load::report;
use crate::load::report::Row;
use crate::load::watching::Shape;
use crate::load::watching::Watchers;

/// Memory of users stays as it is while memory of watches is measured.
const L1_TTL: (&str, &str) = ("ROUTE__L1_TTL", "3600");
/// Between two looks at a process whose memory settles, and what is no change.
const LOOK: Duration = Duration::from_secs(1);
const SETTLED: u64 = 1 << 20;
const QUIET_LOOKS: u32 = 3;
const REHEARSAL: Duration = Duration::from_secs(2);
const SETTLED_WITHIN: Duration = Duration::from_secs(30);

/// Of one shape, round by round.
struct Rows([Row; 5]);

pub async fn measure(plan: &Plan) {
    let users = plan.many.iter().map(Shape::pairs).max().unwrap_or_default();
    let mut field = Field::enter(users, &[L1_TTL]).await;
    let (mut many, mut few) = (Rows::many(), Rows::few());
    for _ in 0..plan.rounds {
        for (shape, rows) in plan.many.iter().zip([&mut many, &mut few]) {
            field.renew_b().await;
            rows.add(take_up(&field.b, *shape).await);
        }
    }
    let rows: Vec<Row> = many.0.into_iter().chain(few.0).collect();
    let shapes: Vec<_> =
        plan.many.iter().map(|shape| json!({ "streams": shape.all_streams(), "users_each": shape.users })).collect();
    report::print("watch pairs", &rows, &json!({ "shapes": shapes }));
}

/// In the order of [`Rows`].
async fn take_up(node: &Node, shape: Shape) -> [f64; 5] {
    let (pairs, streams) = (shape.pairs() as f64, shape.all_streams() as f64);
    query_times(node, shape.pairs(), REHEARSAL).await; // threads give back what the start has left with them
    let bare = settled(node).await;
    let watchers = Watchers::open(node.data, shape, |_, _, _| ()).await;
    let open = settled(node).await;
    let began = Instant::now();
    watchers.watch(|stream| shape.users_of(stream)).await;
    let took = began.elapsed();
    let full = node.rss_bytes() as f64;
    let counted = async || node.metric("im_presence_watch_pairs").await == pairs;
    eventually("the metric tells of all pairs", SETTLED_WITHIN, counted).await;
    assert!(watchers.told() >= shape.pairs(), "everybody is told once");
    let at_rest = settled(node).await;
    [
        (at_rest - open) / pairs,
        (full - open) / pairs,
        (at_rest - bare) / pairs,
        (open - bare) / streams,
        pairs / took.as_secs_f64(),
    ]
}

/// Resident bytes when they do not change any more: what is freed goes back to the system a little later.
async fn settled(node: &Node) -> f64 {
    let (began, mut before, mut quiet) = (Instant::now(), node.rss_bytes(), 0);
    loop {
        tokio::time::sleep(LOOK).await;
        let now = node.rss_bytes();
        quiet = if now.abs_diff(before) < SETTLED { quiet + 1 } else { 0 };
        if quiet == QUIET_LOOKS || began.elapsed() > SETTLED_WITHIN {
            return now as f64;
        }
        before = now;
    }
}

impl Rows {
    fn many() -> Self {
        Self([
            Row::absolute("many", "resident bytes per watched user, many small sets, without their streams", "B", (300.0, 300.0)),
            Row::absolute("many_at_once", "the same, just after they were taken up", "B", (0.0, 0.0)),
            Row::absolute("many_with_streams", "the same at rest, with their streams", "B", (0.0, 0.0)),
            Row::absolute("many_stream", "resident bytes per stream that watches nobody", "B", (0.0, 0.0)),
            Row::new("many_adds", ("users taken up", ""), (0.0, 0.0)),
        ])
    }

    fn few() -> Self {
        Self([
            Row::absolute("few", "resident bytes per watched user, few large sets, without their streams", "B", (300.0, 300.0)),
            Row::absolute("few_at_once", "the same, just after they were taken up", "B", (0.0, 0.0)),
            Row::absolute("few_with_streams", "the same at rest, with their streams", "B", (0.0, 0.0)),
            Row::absolute("few_stream", "resident bytes per stream that watches nobody", "B", (0.0, 0.0)),
            Row::new("few_adds", ("users taken up", ""), (0.0, 0.0)),
        ])
    }

    fn add(&mut self, figures: [f64; 5]) {
        self.0.iter_mut().zip(figures).for_each(|(row, figure)| row.add_absolute(figure));
    }
}
