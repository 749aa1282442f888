//! `ctl bench`: it loads the system, and leaves it as it was.

use std::process::Child;
use std::process::Command;
use std::process::Output;
use std::process::Stdio;
use std::time::Duration;

use im_presence::ctl::bench::FIRST_USER;
use im_presence::ctl::bench::GATEWAY;
use im_presence::pb::AllocateGatewayReq;
use im_presence::pb::Code;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::cluster::Cluster;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::process;

const SOON: Duration = Duration::from_secs(20);

fn bench(node: &Node, words: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(["ctl", "--json", "bench"]).args(words).env("IM_PRESENCE_ADDR", node.data.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    process::spawn(command).expect("run ctl bench")
}

async fn ended(bench: Child) -> Output {
    tokio::task::spawn_blocking(move || bench.wait_with_output()).await.expect("the task").expect("its output")
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_says_what_the_system_did_and_leaves_nobody_behind() {
    let cluster = Cluster::mariadb(1, &[]).await;
    let node = cluster.node();
    let audited = async || cluster.db.number("SELECT COUNT(*) FROM audit").await;
    let start_is_audited = async || audited().await == 1;
    eventually("the start is audited", SOON, start_is_audited).await;

    let output = ended(bench(node, &["--users", "50", "--calls", "300", "--seconds", "60"])).await;
    assert!(output.status.success(), "{output:?}");
    let report = report(&output);
    for (part, calls) in [("binds", 50), ("queries", 300), ("deliveries", 300)] {
        let figures = &report[part];
        assert!(figures["calls"] == calls && figures["errors"] == 0, "{part}: {figures}");
        let [p50, p99, max] = ["p50_ms", "p99_ms", "max_ms"].map(|key| figures[key].as_f64().expect("a number"));
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{part}: {figures}");
    }
    assert_eq!((&report["clean"], &report["interrupted"]), (&Value::Bool(true), &Value::Bool(false)));

    assert_eq!(node.metric("im_presence_binds_total").await, 50.0);
    assert_eq!(node.online((0..50).map(|n| FIRST_USER + n)).await, 0);
    assert!(!node.ctl(&["gateways"]).1.contains(GATEWAY), "its gateway lives no more");
    assert_eq!(audited().await, 1, "nothing was done that an operator does");
    let again = ended(bench(node, &["--users", "50", "--calls", "1"])).await;
    assert!(again.status.success(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_that_is_interrupted_takes_its_users_offline() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let bench = bench(node, &["--users", "20", "--calls", "1000000", "--seconds", "60"]);
        let all_are_bound = async || node.online((0..20).map(|n| FIRST_USER + n)).await == 20;
        eventually("its users are bound", SOON, all_are_bound).await;
        let sent_to = node.presence().allocate_gateway(AllocateGatewayReq { user_id: 1, ..Default::default() }).await;
        assert_eq!(code(&sent_to.expect("an answer").into_inner().result), Code::NotFound, "nobody is sent to its gateway");
        process::signal(&bench, signal);
        let output = ended(bench).await;
        assert_eq!(output.status.code(), Some(1), "its report is not whole: {output:?}");
        let report = report(&output);
        assert_eq!((&report["clean"], &report["interrupted"]), (&Value::Bool(true), &Value::Bool(true)));
        assert_eq!(node.online((0..20).map(|n| FIRST_USER + n)).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_lets_alone_whoever_is_online_already() {
    let cluster = Cluster::sqlite(&[]).await;
    let node = cluster.node();
    node.bind(a_bind(FIRST_USER + 7, PHONE, "c")).await;
    let before = node.query_sql(FIRST_USER + 7).await;
    let output = ended(bench(node, &["--users", "20"])).await;
    let why = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(why.contains(&(FIRST_USER + 7).to_string()) && why.contains(&before.gateway_addr), "{why}");
    assert_eq!(node.query_sql(FIRST_USER + 7).await.version, before.version);
    assert_eq!(node.metric("im_presence_binds_total").await, 1.0);
}
