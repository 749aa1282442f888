//! etcd: a key for each user, attached to the lease of its gateway. Asked by the same loader as the daemon: both speak gRPC.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use prost::Message;
use tonic::Request;
use tonic::Status;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

use crate::Figures;
use crate::Rival;
use crate::Shape;
use crate::VALUE;
use crate::harness::eventually;
use crate::harness::mariadb::free_port;
use crate::load;
use crate::load::contender;
use crate::load::on_core;
use crate::load::scatter;
use crate::load::server::Server;
use crate::load::server::cpu_time;
use crate::load::server::rss_bytes;

const RANGE: &str = "/etcdserverpb.KV/Range";
const PUT: &str = "/etcdserverpb.KV/Put";
const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const KEEP_ALIVE: &str = "/etcdserverpb.Lease/LeaseKeepAlive";
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);
const REVOKED_WITHIN: Duration = Duration::from_secs(120);
/// Keys of one lease. With 100,000 on one, puts were too slow to keep it, by measurement.
const LEASE_KEYS: u64 = 1_000;
/// As many times a lease's time is a beat due.
const BEATS_A_LEASE: u32 = 5;

/// What is used of etcd's `rpc.proto`.
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
    #[prost(bool, tag = "9")]
    count_only: bool,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
    #[prost(int64, tag = "3")]
    lease: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantRequest {
    #[prost(int64, tag = "1")]
    ttl: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

#[derive(Clone, PartialEq, Message)]
struct LeaseKeepAliveResponse {
    #[prost(int64, tag = "3")]
    ttl: i64,
}

pub struct Etcd {
    server: Server,
    port: u16,
}

impl Etcd {
    pub async fn start() -> Self {
        let (port, peers) = (free_port(), format!("http://127.0.0.1:{}", free_port()));
        let clients = format!("http://127.0.0.1:{port}");
        let command = |directory: &str| {
            let mut words = contender::on_core(Some(crate::SERVER), "etcd");
            let cluster = format!("default={peers}");
            let options = [
                ["--data-dir", directory],
                ["--listen-client-urls", &clients],
                ["--advertise-client-urls", &clients],
                ["--listen-peer-urls", &peers],
                ["--initial-advertise-peer-urls", &peers],
                ["--initial-cluster", &cluster],
                ["--log-level", "error"],
            ];
            words.extend(options.as_flattened().iter().map(|word| (*word).to_owned()));
            words
        };
        let this = Self { server: Server::start("etcd", port, command).await, port };
        // It listens before it has elected itself.
        let request = || RangeRequest { key: b"nobody".to_vec(), ..Default::default() };
        let elected = async || this.try_ask::<_, RangeResponse>(RANGE, request()).await.is_ok();
        eventually("etcd answers", ANSWERS_WITHIN, elected).await;
        this
    }

    fn addr(&self) -> std::net::SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    async fn client(&self) -> Grpc<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.addr())).expect("an address");
        let mut client = Grpc::new(endpoint.connect_lazy());
        client.ready().await.expect("etcd listens");
        client
    }

    async fn try_ask<Q: Message + 'static, A: Message + Default + 'static>(
        &self,
        path: &'static str,
        request: Q,
    ) -> Result<A, Status> {
        let (codec, path) = (ProstCodec::<Q, A>::default(), PathAndQuery::from_static(path));
        self.client().await.unary(Request::new(request), path, codec).await.map(tonic::Response::into_inner)
    }

    async fn ask<Q: Message + 'static, A: Message + Default + 'static>(&self, path: &'static str, request: Q) -> A {
        self.try_ask(path, request).await.expect("an answer of etcd")
    }

    /// Keys that begin so.
    async fn count(&self, prefix: &str) -> i64 {
        let (key, mut range_end) = (prefix.as_bytes().to_vec(), prefix.as_bytes().to_vec());
        *range_end.last_mut().expect("a prefix") += 1;
        self.ask::<_, RangeResponse>(RANGE, RangeRequest { key, range_end, count_only: true }).await.count
    }

    /// Puts keys, and returns when all are acknowledged. Those that belong to no lease stay.
    async fn put(&self, prefix: &'static str, first: u64, users: u64, leases: Arc<[i64]>) {
        let server = self.addr();
        let lease = move |n| leases.get((n / LEASE_KEYS) as usize).copied().unwrap_or_default();
        let request = move |_, n| put(prefix, first + n, lease(n));
        let run = move || load::run_all(server, PUT, crate::FILL_IN_FLIGHT, users, request);
        let done = on_core(None, run).await;
        assert_eq!((done.answered, done.failed), (users, 0), "puts");
    }

    /// Holds the leases for another time of theirs.
    async fn beat(client: &mut Grpc<Channel>, leases: Arc<[i64]>) {
        let codec = ProstCodec::<LeaseKeepAliveRequest, LeaseKeepAliveResponse>::default();
        let count = leases.len();
        let beats = tokio_stream::iter((0..count).map(move |n| LeaseKeepAliveRequest { id: leases[n] }));
        client.ready().await.expect("etcd listens");
        let answers = client.streaming(Request::new(beats), PathAndQuery::from_static(KEEP_ALIVE), codec).await;
        let mut answers = answers.expect("a stream").into_inner();
        for _ in 0..count {
            let answer = answers.message().await.expect("an answer of etcd");
            assert!(answer.is_some_and(|answer| answer.ttl > 0), "the lease is there");
        }
    }
}

impl Rival for Etcd {
    fn name(&self) -> String {
        "etcd, one server".to_owned()
    }

    async fn fill(&mut self, users: u64) {
        self.put("route/", 1, users, Arc::default()).await;
    }

    async fn lookups(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let request = move |c: u64, n: u64| {
            let user = 1 + scatter(c << 32 | n) % users;
            RangeRequest { key: format!("route/{user}").into_bytes(), ..Default::default() }
        };
        crate::calls(self.addr(), RANGE, shape, time, request).await
    }

    async fn binds(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let request = move |c: u64, n: u64| put("route/", 1 + scatter(c << 32 | n) % users, 0);
        crate::calls(self.addr(), PUT, shape, time, request).await
    }

    async fn death(&mut self, users: u64, lease: Duration) -> Figures {
        let ttl = i64::try_from(lease.as_secs()).expect("a short time");
        let mut leases = Vec::new();
        for _ in 0..users.div_ceil(LEASE_KEYS) {
            leases.push(self.ask::<_, LeaseGrantResponse>(GRANT, LeaseGrantRequest { ttl }).await.id);
        }
        let leases: Arc<[i64]> = leases.into();
        let (filled, mut client) = (Arc::new(AtomicBool::new(false)), self.client().await);
        let (is_filled, held) = (filled.clone(), leases.clone());
        let beating = tokio::spawn(async move {
            while !is_filled.load(Ordering::Relaxed) {
                Self::beat(&mut client, held.clone()).await;
                tokio::time::sleep(lease / BEATS_A_LEASE).await;
            }
            client
        });
        self.put("lease/", 1, users, leases.clone()).await;
        filled.store(true, Ordering::Relaxed);
        let mut client = beating.await.expect("beats");
        let cpu = cpu_time(self.server.pid());
        Self::beat(&mut client, leases).await;
        let end = Instant::now() + lease;
        let cpu_of_a_beat = cpu_time(self.server.pid()) - cpu;
        while self.count("lease/").await > 0 {
            assert!(end.elapsed() < REVOKED_WITHIN, "keys stay");
            tokio::time::sleep(crate::LOOK).await;
        }
        Figures { beyond_the_lease: end.elapsed(), cpu_of_a_beat }
    }

    fn rss_bytes(&self) -> u64 {
        rss_bytes(self.server.pid())
    }

    async fn lost(&mut self, users: u64) -> u64 {
        self.put("lost/", 1, users, Arc::default()).await;
        self.server.is_killed_and_comes_back().await;
        users - u64::try_from(self.count("lost/").await).expect("a count")
    }
}

fn put(prefix: &str, user: u64, lease: i64) -> PutRequest {
    PutRequest { key: format!("{prefix}{user}").into_bytes(), value: VALUE.as_bytes().to_vec(), lease }
}
