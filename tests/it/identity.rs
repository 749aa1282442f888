//! Who a node is, and which file it serves: names may be used twice, and a file is not its name.

use std::fs;
use std::time::Duration;

use im_presence::pb::DeliverReq;
use tonic::Code;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::TestDb;
use crate::harness::cluster::a_bind;
use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::node::Node;
use crate::harness::node::Process;
use crate::harness::node::settings;
use crate::harness::stream::RawStream;

const ENDS_WITHIN: Duration = Duration::from_secs(15);
const SEEN_WITHIN: Duration = Duration::from_secs(5);
const NAMED: (&str, &str) = ("PRESENCE_SERVICE__NODE_ID", "node-1");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_with_a_nodes_name_does_not_start_and_names_both_addresses() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let first = Node::start(db.settings(&[NAMED])).await;
    let port = free_port().to_string();
    let mut second = Process::start(&db.settings(&[NAMED, ("PRESENCE_SERVICE__PORT", &port)]));
    assert_eq!(second.ended(ENDS_WITHIN).await.code(), Some(1), "{:?}", second.log());
    let line = second.log().concat();
    assert!(line.contains("node-1") && line.contains(&first.data.to_string()) && line.contains(&port), "{line}");
    first.bind(a_bind(ALICE, PHONE, "c-1")).await;
    assert_eq!(first.degraded().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_name_starts_again_at_once_after_it_stopped_and_soon_after_it_was_killed() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut node = Node::start(db.settings(&[NAMED])).await;
    node.terminate();
    node.ended().await;
    assert_eq!(db.number("SELECT COUNT(*) FROM nodes").await, 0, "its name is free");
    node.restart().await;
    node.kill();
    node.restart().await; // within the time that a node may take to start
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_processes_with_one_name_the_one_that_lost_it_ends() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut node = Node::start(db.settings(&[NAMED])).await;
    // What a process does that took over while this one stood still.
    db.run("UPDATE nodes SET incarnation = 'another', addr = '127.0.0.1:1', seen_at = seen_at + 1000").await;
    assert_eq!(node.ended().await.code(), Some(1));
    assert!(node.log().iter().any(|line| line.contains("another process has taken node_id node-1")), "{:?}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_moved_is_called_where_it_is_now() {
    let mut cluster = Cluster::mariadb(1, &[]).await;
    let port = || free_port().to_string();
    let first = port();
    cluster.add_node(&[NAMED, ("PRESENCE_SERVICE__PORT", &first)]).await;
    let rows = "SELECT COUNT(*) FROM nodes WHERE node_id = 'node-1' AND addr LIKE '%:";
    assert_eq!(cluster.db.number(&format!("{rows}{first}'")).await, 1);
    cluster.nodes[1].kill();
    let second = port();
    cluster.add_node(&[NAMED, ("PRESENCE_SERVICE__PORT", &second)]).await;
    assert_eq!(cluster.db.number(&format!("{rows}{second}'")).await, 1, "others are told the new address");
    let moved = cluster.nodes.pop().expect("the node that moved");
    let (mut stream, _) = RawStream::attach(&moved, "gw-1:7000", 0).await;
    stream.bind(ALICE, PHONE, "c-1").await;
    eventually("a message reaches it through the other node", SEEN_WITHIN, async || {
        let message = DeliverReq { user_id: ALICE, message: "hello".to_owned(), ..Default::default() };
        cluster.node().try_deliver(message).await.is_ok_and(|answer| answer.delivered)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn binds_to_a_file_that_is_gone_are_not_acknowledged_and_the_node_ends() {
    for what in ["deleted", "replaced", "moved"] {
        let db = TestDb::sqlite();
        let mut node = Node::start(db.settings(&[])).await;
        node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let file = db.url.trim_start_matches("sqlite://").to_owned();
        match what {
            "deleted" => fs::remove_file(&file).unwrap(),
            "replaced" => {
                fs::write(format!("{file}.new"), b"").unwrap();
                fs::rename(format!("{file}.new"), &file).unwrap();
            }
            _ => fs::rename(&file, format!("{file}.old")).unwrap(),
        }
        let lost = node.try_bind(a_bind(ALICE, PHONE, "c-2")).await.expect_err("nobody will find it again");
        assert!([Code::Unavailable, Code::Unknown].contains(&lost.code()), "{what}: no answer, or no: {lost:?}");
        assert_eq!(node.ended().await.code(), Some(1), "{what}");
        let told = node.log().iter().any(|line| line.contains("the SQLite file was deleted, moved or replaced"));
        assert!(told, "{what}: {:?}", node.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_traffic_notices_too_that_its_file_is_gone_or_another_store() {
    let db = TestDb::sqlite();
    let mut node = Node::start(db.settings(&[])).await;
    fs::remove_file(db.url.trim_start_matches("sqlite://")).unwrap();
    assert_eq!(node.ended().await.code(), Some(1), "{:?}", node.log());

    let db = TestDb::mariadb(MariaDb::shared()).await;
    let mut node = Node::start(db.settings(&[])).await;
    db.run("UPDATE cluster SET store_id = 'another'").await;
    assert_eq!(node.ended().await.code(), Some(1), "{:?}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_serves_one_process_under_all_its_names() {
    let db = TestDb::sqlite();
    let node = Node::start(db.settings(&[])).await;
    let file = db.url.trim_start_matches("sqlite://").to_owned();
    let (symbolic, hard) = (format!("{file}.symbolic"), format!("{file}.hard"));
    std::os::unix::fs::symlink(&file, &symbolic).unwrap();
    fs::hard_link(&file, &hard).unwrap();
    for name in [&file, &symbolic, &hard] {
        let mut second = Process::start(&settings(&[("STORE__URL", &format!("sqlite://{name}"))]));
        assert_eq!(second.ended(ENDS_WITHIN).await.code(), Some(1), "{name}");
        assert!(second.log().concat().contains("another process uses"), "{name}: {:?}", second.log());
    }
    node.bind(a_bind(ALICE, PHONE, "c-1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_warns_if_its_address_leads_to_nobody() {
    let db = TestDb::mariadb(MariaDb::shared()).await;
    let nowhere = format!("127.0.0.1:{}", free_port());
    let node = Node::start(db.settings(&[("PRESENCE_SERVICE__ADVERTISE", &nowhere)])).await;
    eventually("it warns", SEEN_WITHIN, async || node.log().iter().any(|line| line.contains("nobody answers"))).await;
    let other = Node::start(db.settings(&[("PRESENCE_SERVICE__ADVERTISE", &node.data.to_string())])).await;
    eventually("it warns", SEEN_WITHIN, async || other.log().iter().any(|line| line.contains("another answers"))).await;
}
