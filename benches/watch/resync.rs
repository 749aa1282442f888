//! How long a node looks at everybody after hints were lost, and what those who query it notice.

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

const LOOK: Duration = Duration::from_millis(50);
/// No user was looked at for so long: a resync has ended.
const ENDED: Duration = Duration::from_millis(500);
const RESYNCED_WITHIN: Duration = Duration::from_secs(300);
const NOTICED_WITHIN: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(2);

pub async fn measure(plan: &Plan) {
    let shape = plan.many[1];
    let field = Field::enter(shape.pairs(), &[]).await;
    let what = |key, what, against, bounds| Row::new(key, (what, against), bounds).less_is_better("ms");
    let mut took = Row::absolute("took", "from a gap until every watched user was looked at", "s", (0.0, 0.0));
    let mut p50 = what("p50", "p50 of queries from the gap on", "before", (0.0, 0.0));
    let mut p99 = what("p99", "p99 of queries from the gap on", "before", (2.0, 2.0));
    let mut unwatched = what("unwatched_p99", "the same while nobody is watched", "before", (0.0, 0.0));
    let mut resyncs = Vec::new();
    for _ in 0..plan.rounds {
        let before = query_times(&field.b, shape.pairs(), plan.query_time).await;
        tear(&field).await;
        let after = query_times(&field.b, shape.pairs(), plan.query_time).await;
        unwatched.add(after.1, before.1);

        let watchers = Watchers::open(field.b.data, shape, |_, _, _| ()).await;
        watchers.watch(|stream| shape.users_of(stream)).await;
        watchers.quiet(PAUSE, RESYNCED_WITHIN).await;
        let before = query_times(&field.b, shape.pairs(), plan.query_time).await;
        let begun = begun(&field.b).await;
        let (time, during) = tokio::join!(resync(&field, shape), query_times(&field.b, shape.pairs(), plan.query_time));
        took.add_absolute(time.as_secs_f64());
        p50.add(during.0, before.0);
        p99.add(during.1, before.1);
        resyncs.push(self::begun(&field.b).await - begun);
        drop(watchers);
        field.forgets(&field.b).await;
    }
    let more = json!({ "pairs": shape.pairs(), "resyncs": resyncs });
    report::print("watch resync", &[took, p50, p99, unwatched], &more);
}

/// Ends the subscriptions of both nodes: they cannot know what they have missed.
async fn tear(field: &Field) {
    let cut: i64 = field.redis.client().await.run(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    assert!(cut > 0, "nodes hear each other");
}

async fn begun(node: &Node) -> f64 {
    node.metric("im_presence_watch_resyncs_total").await
}

/// How long it took until all were looked at. The metrics tell of each look that found nothing new, and nobody changes here.
async fn resync(field: &Field, shape: Shape) -> Duration {
    let node = &field.b;
    let looks = async || node.metric("im_presence_watch_same_total").await;
    let (before, resyncs) = (looks().await, begun(node).await);
    tear(field).await;
    let torn = Instant::now();
    eventually("the gap is noticed", NOTICED_WITHIN, async || begun(node).await > resyncs).await;
    let (mut seen, mut last) = (before, Instant::now());
    loop {
        tokio::time::sleep(LOOK).await;
        let (now, is_clean) = (looks().await, node.metric("im_presence_watch_dirty").await == 0.0);
        if now > seen {
            (seen, last) = (now, Instant::now());
        }
        if is_clean && seen - before >= shape.pairs() as f64 && last.elapsed() > ENDED {
            return last - torn;
        }
        assert!(torn.elapsed() < RESYNCED_WITHIN, "{} of {} users were looked at", seen - before, shape.pairs());
    }
}
