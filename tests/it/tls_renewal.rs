//! Certificates, CAs and tokens that are renewed under traffic.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::client::caller::Caller;
use im_presence::client::security::Security;
use im_presence::pb;
use im_presence::pb::presence_service_client::PresenceServiceClient;
use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;

use crate::harness::cluster::TestDb;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::node::Node;
use crate::harness::node::settings;
use crate::harness::pki::Ca;
use crate::harness::pki::Pair;
use crate::harness::pki::Pki;
use crate::harness::pki::ROLES;
use crate::harness::pki::link;
use crate::harness::pki::shows;
use crate::harness::pki::text;
use crate::harness::pki::token;
use crate::harness::stream::Devices;
use crate::harness::stream::TestGateway;

/// What is promised, and a little more for a machine that does other things, too.
const RENEWED_WITHIN: Duration = Duration::from_secs(10);
const GATEWAYS: usize = 100;
const CALLERS: u64 = 20;
const CALLS_PER_CALLER_AND_SECOND: u32 = 100;

/// A node with mutual TLS and tokens, whose files stand in one directory.
struct Renewed {
    pki: Pki,
    ca: Ca,
    node: Node,
    _db: TestDb,
}

impl Renewed {
    async fn start(tokens: &str) -> Self {
        let (pki, db) = (Pki::new(), TestDb::sqlite());
        let ca = pki.ca("ca");
        let Pair { cert, key } = ca.issue("node", &["127.0.0.1"]);
        let client_ca = pki.write("clients.pem", &ca.pem);
        let tokens = pki.write("tokens.toml", tokens);
        let all = settings(&[
            ("STORE__URL", &db.url),
            ("TLS__CERT_FILE", text(&cert)),
            ("TLS__KEY_FILE", text(&key)),
            ("TLS__CLIENT_CA_FILE", text(&client_ca)),
            ("TLS__REQUIRE_CLIENT_CERT", "false"),
            ("AUTH__MODE", "mtls,token"),
            ("AUTH__MTLS", ROLES),
            ("AUTH__TOKENS_FILE", text(&tokens)),
        ]);
        Self { pki, ca, node: Node::start(all).await, _db: db }
    }

    async fn reloads(&self, result: &str) -> f64 {
        let all = self.node.series("im_presence_reloads_total").await;
        let of_result = all.iter().filter(|(labels, _)| labels.contains(&format!("result=\"{result}\"")));
        of_result.map(|(_, value)| value).sum()
    }

    async fn until_reloaded(&self, times: f64) {
        eventually("the files are read again", RENEWED_WITHIN, async || self.reloads("ok").await >= times).await;
    }
}

/// Callers at a steady rate until it is dropped, on connections that are made anew from time to time.
struct Traffic {
    calls: Arc<AtomicU64>,
    failures: Arc<std::sync::Mutex<Vec<tonic::Status>>>,
    _callers: JoinSet<()>,
}

impl Traffic {
    fn start(node: &Node, security: &Security) -> Self {
        let (calls, failures, mut callers) = (Arc::default(), Arc::default(), JoinSet::new());
        for n in 0..CALLERS {
            let (addr, security) = (node.data.to_string(), security.clone());
            let (calls, failures): (Arc<AtomicU64>, Arc<std::sync::Mutex<Vec<_>>>) = (Arc::clone(&calls), Arc::clone(&failures));
            callers.spawn(async move {
                let mut ticks = interval(Duration::from_secs(1) / CALLS_PER_CALLER_AND_SECOND);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
                let mut caller = None;
                for call in n.. {
                    ticks.tick().await;
                    if call % u64::from(5 * CALLS_PER_CALLER_AND_SECOND) == 0 {
                        caller = None; // a new connection, with what its files say now
                    }
                    let caller = caller.get_or_insert_with(|| {
                        Caller::with_security(&[&addr], Duration::from_secs(5), &security).expect("an address")
                    });
                    let query = pb::QueryRouteReq { user_id: 1, max_staleness_ms: None };
                    if let Err(status) = caller.query(query).await {
                        failures.lock().expect("no panic").push(status);
                    }
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self { calls, failures, _callers: callers }
    }

    #[track_caller]
    fn none_failed(&self) {
        let failures = self.failures.lock().expect("no panic");
        assert!(failures.is_empty(), "{} of {}: {:?}", failures.len(), self.calls.load(Ordering::Relaxed), failures.first());
        assert!(self.calls.load(Ordering::Relaxed) > 0);
    }
}

/// A complete rotation: a new certificate of the node, then a second CA of clients beside the first, then without it.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_cas_are_renewed_under_traffic() {
    let _turn = heavy().await;
    let renewed = Renewed::start("").await;
    let Renewed { pki, ca, node, .. } = &renewed;
    let service = ca.issue("service", &["spiffe://im/service"]);
    let traffic = Traffic::start(node, &shows(ca, Some(&service), None));
    let mut gateways = Vec::new();
    let second = pki.ca("second");
    for n in 0..GATEWAYS {
        let (name, uri) = (format!("gw-{n}"), format!("spiffe://im/gateway/gw-{n}"));
        let pair = ca.issue(&name, &[&uri]);
        let nodes = vec![node.data.to_string()];
        gateways.push(
            TestGateway::showing(&shows(ca, Some(&pair), None), nodes, &format!("gw-{n}:7000"), Devices::Acknowledge).await,
        );
    }
    let before = node.metric("im_presence_certificate_not_after_seconds{use=\"data\",which=\"leaf\"}").await;
    ca.issue_until("node", &["127.0.0.1"], Some(2090));
    renewed.until_reloaded(1.0).await;
    let after = node.metric("im_presence_certificate_not_after_seconds{use=\"data\",which=\"leaf\"}").await;
    assert!(after != before && after > 0.0, "{before} {after}");

    pki.write("clients.pem", &format!("{}{}", ca.pem, second.pem));
    renewed.until_reloaded(2.0).await;
    // Whoever calls is given a certificate of the second CA, but the last of the gateways is forgotten.
    let renewed_service = second.issue("service", &["spiffe://im/service"]);
    assert_eq!(renewed_service.cert, service.cert);
    for n in 0..GATEWAYS - 1 {
        second.issue(&format!("gw-{n}"), &[&format!("spiffe://im/gateway/gw-{n}")]);
    }
    assert!(gateways.iter().all(|gateway| gateway.detached().is_empty()), "streams stay while both CAs are good");
    tokio::time::sleep(Duration::from_secs(6)).await; // callers make new connections
    traffic.none_failed();

    pki.write("clients.pem", &second.pem);
    let began = Instant::now();
    renewed.until_reloaded(3.0).await;
    eventually("streams of the first CA end", RENEWED_WITHIN, async || {
        gateways.iter().all(|gateway| gateway.detached().iter().any(|why| why.contains("Unauthenticated")))
    })
    .await;
    println!("revoked after {:?}, {} calls", began.elapsed(), traffic.calls.load(Ordering::Relaxed));
    eventually("the others have come back with their new certificates", RENEWED_WITHIN, async || {
        gateways[..GATEWAYS - 1].iter().all(|gateway| gateway.epochs().len() == 2)
    })
    .await;
    let one_life = |gateway: &TestGateway| gateway.epochs().iter().all(|epoch| *epoch == gateway.epochs()[0]);
    assert!(gateways.iter().all(one_life), "leases were not shortened");
    assert_eq!(gateways[GATEWAYS - 1].epochs().len(), 1, "who was forgotten stays out");
    traffic.none_failed();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_renewed_under_traffic() {
    let _turn = heavy().await;
    let (old, old_entry) = token("service", "service", "");
    let (new, new_entry) = token("service", "service", "");
    let renewed = Renewed::start(&old_entry).await;
    let Renewed { pki, ca, node, .. } = &renewed;
    let file = pki.write("token", &old);
    let traffic = Traffic::start(node, &shows(ca, None, Some(&file)));
    pki.write("tokens.toml", &format!("{old_entry}{new_entry}"));
    renewed.until_reloaded(1.0).await;
    pki.write("token", &new);
    tokio::time::sleep(Duration::from_secs(5)).await; // the client reads its file again within 3 s
    pki.write("tokens.toml", &new_entry);
    renewed.until_reloaded(2.0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    traffic.none_failed();
    let stale = pki.write("stale", &old);
    let mut presence = PresenceServiceClient::new(link(&shows(ca, None, Some(&stale)), node.data));
    let query = pb::QueryRouteReq { user_id: 1, max_staleness_ms: None };
    let refused = presence.query_route(query).await.expect_err("the old token is worth nothing");
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
}

#[tokio::test]
async fn what_cannot_be_used_is_kept_out_and_said_and_a_signal_is_as_good_as_waiting() {
    let (_, entry) = token("service", "service", "");
    let renewed = Renewed::start(&entry).await;
    let Renewed { pki, ca, node, .. } = &renewed;
    let service = ca.issue("service", &["spiffe://im/service"]);
    let mut presence = PresenceServiceClient::new(link(&shows(ca, Some(&service), None), node.data));
    let query = pb::QueryRouteReq { user_id: 1, max_staleness_ms: None };
    presence.query_route(query).await.expect("a query");
    let good = fs::read_to_string(pki.path("node.crt")).expect("a certificate");
    let foreign = fs::read_to_string(ca.issue("foreign", &["127.0.0.1"]).cert).expect("a certificate");
    let old = fs::read_to_string(ca.issue_until("old", &["127.0.0.1"], Some(2020)).cert).expect("a certificate");
    for (times, (file, bad)) in
        [("node.crt", &*foreign), ("node.crt", "nothing"), ("tokens.toml", "[[token]"), ("node.crt", &old)]
            .into_iter()
            .enumerate()
    {
        let before = fs::read_to_string(pki.path(file)).expect("a file");
        pki.write(file, bad);
        eventually("it is said", RENEWED_WITHIN, async || renewed.reloads("failed").await > times as f64).await;
        let mut anew = PresenceServiceClient::new(link(&shows(ca, Some(&service), None), node.data));
        anew.query_route(query).await.expect("what was read before stays in force");
        pki.write(file, &before);
    }
    let said = node.log().join("\n");
    assert!(said.contains("cannot be used, what was read before stays in force"), "{said}");
    assert_eq!(fs::read_to_string(pki.path("node.crt")).expect("a certificate"), good);
    assert_eq!(renewed.reloads("ok").await, 0.0);

    tokio::time::sleep(Duration::from_millis(1_500)).await; // nothing is bad any more: the next look is far away
    ca.issue("node", &["127.0.0.1"]);
    node.signal(Signal::SIGHUP);
    eventually("SIGHUP reads at once", Duration::from_millis(500), async || renewed.reloads("ok").await == 1.0).await;
}
