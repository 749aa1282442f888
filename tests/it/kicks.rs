//! Kicks find their gateway through whatever happens to its streams: somebody's client believes that it is online.

use std::time::Duration;

use im_presence::pb;
use im_presence::pb::node_frame::Body as Down;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::gateway::on;
use crate::harness::node::Node;
use crate::harness::stream::RawStream;

const SOON: Duration = Duration::from_secs(5);
/// A gateway that waits before it attaches again lives on.
const LONG_GRACE: &[(&str, &str)] = &[("GATEWAY__STREAM_GRACE", "15000")];

impl RawStream {
    /// The next kick, whatever comes before.
    async fn kick(&mut self) -> pb::Kick {
        loop {
            if let Some(Down::Kick(kick)) = self.next().await.expect("a kick").body {
                return kick;
            }
        }
    }
}

/// The user's phone connects to another gateway, through this node.
async fn moves(user: i64, through: &Node) {
    let bound = through.bind(on(OTHER_GATEWAY, 0, a_bind(user, PHONE, "moved"))).await;
    assert_eq!(bound.kicked.len(), 1, "{bound:?}");
}

async fn all_are_told(cluster: &Cluster) {
    eventually("all is told", SOON, async || cluster.db.number("SELECT COUNT(*) FROM outbox").await == 0).await;
}

async fn has_no_stream(node: &Node) {
    eventually("its end was seen", SOON, async || node.metric("im_presence_streams").await < 0.5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kick_that_a_stream_took_and_lost_is_told_on_the_next_one() {
    let cluster = Cluster::mariadb(2, LONG_GRACE).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let mut user = 0;
    for end_is_seen in [false, true] {
        for (through, next_on) in [(one, one), (two, one), (one, two), (two, two)] {
            user += 1;
            let addr = format!("gw-{user}:7100");
            let (mut broken, epoch) = RawStream::attach(one, &addr, 0).await;
            let bound = broken.bind(user, PHONE, "c").await;
            moves(user, through).await;
            all_are_told(&cluster).await;
            let written = async || one.metric("im_presence_stream_queue_depth").await < 0.5;
            eventually("the stream has taken it", SOON, written).await;
            let mut unread = Some(broken); // by the gateway: whatever is in it is lost
            if end_is_seen {
                unread = None;
                has_no_stream(one).await;
            }
            let (mut next, again) = RawStream::attach(next_on, &addr, epoch).await;
            assert_eq!((again, next.kick().await.route_key), (epoch, bound.route_key), "end seen: {end_is_seen}");
            drop((unread, next));
            has_no_stream(one).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kick_between_two_streams_waits_for_the_second_also_without_redis() {
    let cluster = Cluster::mariadb(2, LONG_GRACE).await;
    let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
    let (mut first, epoch) = RawStream::attach(one, GATEWAY, 0).await;
    let alice = first.bind(ALICE, PHONE, "c").await;
    let bob = first.bind(BOB, PHONE, "c").await;
    drop(first);
    let detached = "SELECT COUNT(*) FROM lives WHERE kind = 1 AND attached_node = ''";
    eventually("it has no stream", SOON, async || cluster.db.number(detached).await == 1).await;
    for (user, through) in [(ALICE, one), (BOB, two)] {
        moves(user, through).await;
    }
    all_are_told(&cluster).await;
    let (mut second, again) = RawStream::attach(two, GATEWAY, epoch).await;
    let mut told = [second.kick().await.route_key, second.kick().await.route_key];
    told.sort_unstable();
    assert_eq!((again, told), (epoch, [alice.route_key, bob.route_key]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kicks_that_streams_of_a_stopping_node_have_lost_are_told_by_another() {
    for mut cluster in [Cluster::mariadb(2, &[]).await, Cluster::with_redis(2, &[]).await] {
        let [one, two] = &cluster.nodes[..] else { panic!("two nodes") };
        let (mut lost, epoch) = RawStream::attach(one, GATEWAY, 0).await;
        let mut bound = Vec::new();
        for (user, through) in [(ALICE, one), (BOB, two)] {
            bound.push(lost.bind(user, PHONE, "c").await.route_key);
            moves(user, through).await;
        }
        all_are_told(&cluster).await;
        one.terminate();
        assert!(cluster.nodes[0].ended().await.success());
        let (mut next, again) = RawStream::attach(&cluster.nodes[1], GATEWAY, epoch).await;
        let mut told = [next.kick().await.route_key, next.kick().await.route_key];
        told.sort_unstable();
        assert_eq!((again, told.to_vec()), (epoch, bound));
    }
}
