//! Users, on one node: what it takes to start with them, to keep a million of them in memory, to ask, bind, list and remove them.
//! Beside MariaDB it has a Redis for hints, without which it would believe its memory for a second only; nothing is cached there.

use std::time::Duration;
use std::time::Instant;

use im_presence::pb;

use crate::L1_TTL;
use crate::NO_END;
use crate::Plan;
use crate::Table;
use crate::binds;
use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::node::Node;
use crate::harness::percentile;
use crate::harness::redis::RedisServer;
use crate::load::queries::is_warm;
use crate::load::queries::query;
use crate::load::seed;
use crate::load::stores;
use crate::mib;

const GATEWAYS: u64 = 16;
const PAGE: u32 = 1_000;
const PAGES: usize = 20;
const SWEPT_WITHIN: Duration = Duration::from_secs(600);
/// So that MariaDB has users and routes in memory, and need not write what it has just written: bytes for each user (8 and 4 GiB for
/// ten million) and what it comes with, below which it is not made. The log is on disk at once, whether it is used or not.
const ROOM: [(&str, u64, u64); 2] = [("innodb_buffer_pool_size", 860, 128 << 20), ("innodb_log_file_size", 430, 96 << 20)];

pub async fn measure(plan: &Plan) {
    let mut table = Table::new(
        "users",
        &[
            "users",
            "start to first answer",
            "start to warm memory",
            "resident, l1_capacity 1,000,000",
            "queries a second, all users uniformly",
            "of them from memory",
            "binds a second",
            "a page of 1,000 online users",
            "routes of a dead gateway removed a second",
        ],
    );
    let redis = RedisServer::start();
    let port = redis.port.to_string();
    for users in &plan.users {
        for is_sqlite in [true, false] {
            let (engine, db, hints) = match is_sqlite {
                true => ("SQLite", TestDb::sqlite(), None),
                false => ("MariaDB", roomy_mariadb(plan).await, Some(("REDIS_QUEUE__PORT", &*port))),
            };
            seed::fill(&db, *users, GATEWAYS).await;
            table.line([vec![format!("{users}, {engine}")], cells(plan, &db, hints.as_slice(), *users).await].concat());
            if !is_sqlite {
                db.run(&format!("DROP DATABASE {}", db.name())).await; // the next one needs the room
            }
        }
    }
    table.end();
}

async fn roomy_mariadb(plan: &Plan) -> TestDb {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let most = plan.users.iter().max().expect("users are counted");
    for (variable, bytes_per_user, least) in ROOM {
        db.run(&format!("SET GLOBAL {variable} = {}", least.max(most * bytes_per_user))).await;
    }
    db
}

async fn cells(plan: &Plan, db: &TestDb, hints: &[(&str, &str)], users: u64) -> Vec<String> {
    let began = Instant::now();
    let node = Node::start(db.settings(&[&[L1_TTL], &NO_END[..], hints].concat())).await;
    node.query(1).await;
    let answered = began.elapsed();
    is_warm(&node).await;
    let (warm, rss) = (began.elapsed(), node.rss_bytes());
    query(&node, None, (8, 16), users, plan.time).await; // warms up
    let queries = query(&node, None, (8, 16), users, plan.time).await;
    let local = stores::share_of(&node, "im_presence_queries_total", "local").await;
    let bound = binds(&node, users, GATEWAYS, 0, plan.time).await;
    let page = page_time(&node).await;
    let swept = swept_per_second(&node, db, plan.swept.min(users)).await;
    vec![
        format!("{:.2} s", answered.as_secs_f64()),
        format!("{:.1} s", warm.as_secs_f64()),
        mib(rss),
        format!("{queries:.0}"),
        format!("{:.0} %", local * 100.0),
        format!("{bound:.0}"),
        format!("{:.1} ms", page.as_secs_f64() * 1e3),
        format!("{swept:.0}"),
    ]
}

/// The median of some pages, one after the other.
async fn page_time(node: &Node) -> Duration {
    let (mut client, mut page_token, mut took) = (node.operator(), String::new(), Vec::new());
    for _ in 0..PAGES {
        let began = Instant::now();
        let request = pb::ListOnlineReq { page_size: PAGE, page_token, ..Default::default() };
        let answer = client.list_online(request).await.expect("a page").into_inner();
        took.push(began.elapsed());
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    percentile(&mut took, 0.5)
}

/// A gateway with so many users says that it ends.
async fn swept_per_second(node: &Node, db: &TestDb, users: u64) -> f64 {
    const DYING: &str = "gw-dying:7000";
    let epoch = node.register(DYING).await;
    db.run(&format!("UPDATE routes SET epoch = {epoch}, expires_at_ms = NULL WHERE user_id <= {users}")).await;
    let left = format!("SELECT COUNT(*) FROM (SELECT 1 FROM routes WHERE epoch = {epoch} LIMIT 1) AS some");
    assert_eq!(db.number(&left).await, 1, "the gateway has users");
    node.deregister(DYING, epoch).await;
    let began = Instant::now();
    eventually("the routes are removed", SWEPT_WITHIN, async || db.number(&left).await == 0).await;
    users as f64 / began.elapsed().as_secs_f64()
}
