//! The CPU of a daemon that nobody asks anything: with nobody in it, with many users in memory, with many gateways that beat.

use std::time::Duration;

use im_presence::pb;
use im_presence::pb::gateway_frame::Body as Up;
use tokio::task::JoinSet;

use crate::Plan;
use crate::Table;
use crate::harness::cluster::Cluster;
use crate::harness::node::Node;
use crate::harness::redis::RedisServer;
use crate::harness::stream::RawStream;
use crate::harness::stream::gateways;
use crate::harness::stream::hello;
use crate::idle_percent;
use crate::load::queries::is_warm;
use crate::load::seed;
use crate::mib;

/// The default of `gateway.heartbeat_interval`.
const BEAT: Duration = Duration::from_secs(5);
/// Of each connection.
const STREAMS: u64 = 100;
/// What is done once after a start is over by then.
const SETTLED: Duration = Duration::from_secs(10);

pub async fn measure(plan: &Plan) {
    let mut table = Table::new("idle", &["nobody asks, and there are", "CPU, of a core (needed: 1 %)", "resident"]);
    let mut look = async |what: String, node: &Node| {
        tokio::time::sleep(SETTLED.min(plan.idle_time)).await;
        let percent = idle_percent(node, plan.idle_time).await;
        table.line(vec![what, format!("{percent:.2} %"), mib(node.rss_bytes())]);
    };
    {
        let cluster = Cluster::sqlite(&[]).await;
        look("no users, SQLite".to_owned(), cluster.node()).await;
    }
    {
        let cluster = Cluster::with_redis(1, &[]).await;
        look("no users, MariaDB and Redis".to_owned(), cluster.node()).await;
    }
    {
        let (db, redis) = (seed::users(plan.idle_users, 16).await, RedisServer::start());
        let port = redis.port.to_string();
        let node = Node::start(db.settings(&[("REDIS_CACHE__PORT", &*port), ("REDIS_QUEUE__PORT", &*port)])).await;
        is_warm(&node).await;
        seed::everybody_is_shown(&db).await;
        look(format!("{} users in memory", plan.idle_users), &node).await;
    }
    let cluster = Cluster::with_redis(1, &[]).await;
    let _beating = attach(cluster.node(), plan.idle_gateways).await;
    look(format!("{} gateways, each beats every {} s", plan.idle_gateways, BEAT.as_secs()), cluster.node()).await;
    table.end();
}

/// Gateways on streams, which beat as they are told to by default.
async fn attach(node: &Node, count: u64) -> JoinSet<()> {
    let (mut tasks, mut client) = (JoinSet::new(), gateways(node));
    for n in 1..=count {
        if n % STREAMS == 1 {
            client = gateways(node);
        }
        let addr = format!("gw-{n}:7000");
        let mut stream = RawStream::open(&mut client).await;
        stream.send(1, hello(&addr, 0)).await;
        let gateway_epoch = stream.welcome().await.gateway_epoch;
        tasks.spawn(async move {
            let beat = || Up::Heartbeat(pb::HeartbeatReq { gateway_addr: addr.clone(), gateway_epoch, ..Default::default() });
            loop {
                tokio::time::sleep(BEAT).await;
                if !stream.send(2, beat()).await || stream.wait().await.is_none() {
                    return;
                }
            }
        });
    }
    tasks
}
