//! Connections of callers who ask nothing: what one costs, and whether many make the others' queries slower.

use std::io::Read;
use std::io::Write;
use std::net::TcpStream;

use crate::L1_TTL;
use crate::Plan;
use crate::Table;
use crate::harness::node::Node;
use crate::idle_percent;
use crate::load::on_core;
use crate::load::preface;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::seed;

const USERS: u64 = 10_000;

pub async fn measure(plan: &Plan) {
    let mut table = Table::new(
        "connections",
        &["idle connections", "resident bytes of each", "queries a second beside them", "CPU when idle, of a core"],
    );
    for connections in plan.connections {
        let db = seed::users(USERS, 16).await;
        let node = Node::start(db.settings(&[L1_TTL, ("PRESENCE_SERVICE__MAX_CONNECTIONS", "15000")])).await;
        is_warm(&node).await;
        query(&node, None, (8, 16), USERS, plan.time).await; // warms up
        let rss = node.rss_bytes();
        let (server, count) = (node.data, *connections);
        let open = on_core(None, move || (0..count).map(|_| connect(server)).collect::<Vec<_>>()).await;
        let bytes = node.rss_bytes().saturating_sub(rss) / connections;
        let queries = query(&node, None, (8, 16), USERS, plan.time).await;
        let idle = idle_percent(&node, plan.idle_time / 2).await;
        table.line(vec![connections.to_string(), bytes.to_string(), format!("{queries:.0}"), format!("{idle:.2} %")]);
        drop(open);
    }
    table.end();
}

/// A client that has said who it is, and heard the same.
fn connect(server: std::net::SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(server).expect("the daemon listens");
    stream.write_all(&preface()).expect("the daemon reads");
    let heard = stream.read(&mut [0; 256]).expect("the daemon answers");
    assert!(heard > 0, "the daemon closed the connection");
    stream
}
