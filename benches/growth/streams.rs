//! Gateways that are attached to one node, with a user each: what a stream costs, and whether many make one slower.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use im_presence::pb::node_frame::Body as Down;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::NO_END;
use crate::Plan;
use crate::Table;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::stream::RawStream;
use crate::harness::stream::gateways;
use crate::harness::stream::hello;
use crate::idle_percent;
use crate::load::delivering::delivered;
use crate::load::on_core;

/// Of each connection.
const STREAMS: u64 = 100;
const DELIVER: &str = "/mpim.PresenceService/Deliver";
const RECEIVED_WITHIN: Duration = Duration::from_secs(20);

pub async fn measure(plan: &Plan) {
    let mut table = Table::new(
        "streams",
        &[
            "streams, MariaDB",
            "attached and bound a second",
            "resident bytes a stream",
            "messages a second",
            "CPU when idle, of a core",
        ],
    );
    for streams in plan.streams {
        let cluster = Cluster::mariadb(1, &NO_END).await;
        let node = cluster.node();
        let (rss, began) = (node.rss_bytes(), Instant::now());
        let (received, _gateways) = attach(node, *streams).await;
        let attached = *streams as f64 / began.elapsed().as_secs_f64();
        let bytes = node.rss_bytes().saturating_sub(rss) / streams;
        deliver(node, *streams, plan.time, &received).await; // warms up
        let messages = deliver(node, *streams, plan.time, &received).await;
        let idle = idle_percent(node, plan.idle_time / 2).await;
        table.line(vec![
            streams.to_string(),
            format!("{attached:.0}"),
            bytes.to_string(),
            format!("{messages:.0}"),
            format!("{idle:.2} %"),
        ]);
    }
    table.end();
}

/// Gateways with a user each, who are numbered as they are, and who count what they get.
async fn attach(node: &Node, streams: u64) -> (Arc<AtomicU64>, JoinSet<()>) {
    let received = Arc::<AtomicU64>::default();
    let mut connections = JoinSet::new();
    for first in (1..=streams).step_by(STREAMS as usize) {
        connections.spawn(attach_some(gateways(node), first..(first + STREAMS).min(streams + 1)));
    }
    let mut tasks = JoinSet::new();
    for mut stream in connections.join_all().await.into_iter().flatten() {
        let received = received.clone();
        tasks.spawn(async move {
            while let Some(frame) = stream.wait().await {
                received.fetch_add(u64::from(matches!(frame.body, Some(Down::Delivery(_)))), Ordering::Relaxed);
            }
        });
    }
    (received, tasks)
}

/// One after the other, on one connection.
async fn attach_some(mut client: GatewayServiceClient<Channel>, gateways: Range<u64>) -> Vec<RawStream> {
    let mut attached = Vec::new();
    for n in gateways {
        let mut stream = RawStream::open(&mut client).await;
        stream.send(1, hello(&format!("gw-{n}:7000"), 0)).await;
        stream.welcome().await;
        stream.bind(n as i64, PHONE, "c").await;
        attached.push(stream);
    }
    attached
}

async fn deliver(node: &Node, users: u64, time: Duration, received: &AtomicU64) -> f64 {
    let (server, before, received_before) = (node.data, delivered(node).await, received.load(Ordering::Relaxed));
    let request = move |c: u64, n: u64| pb::DeliverReq {
        user_id: (1 + (c * 7_919 + n) % users) as i64,
        message: "dinner is ready".to_owned(),
        ..Default::default()
    };
    let done = on_core(None, move || crate::load::run(server, DELIVER, 5, 10, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    let delivered = delivered(node).await - before;
    let all = async || received.load(Ordering::Relaxed) - received_before >= delivered;
    eventually("all are received", RECEIVED_WITHIN, all).await;
    delivered as f64 / done.elapsed.as_secs_f64()
}
