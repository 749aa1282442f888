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
/// Times as long as that of the others is etcd's lease: while keys are put, it answers beats late, or refuses them.
const FILL_LEASES: u32 = 6;
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

    /// Puts keys, and returns when all are acknowledged.
    async fn put(&self, prefix: &'static str, first: u64, users: u64, lease: i64) {
        let server = self.addr();
        let request = move |_, n| put(prefix, first + n, lease);
        let run = move || load::run_all(server, PUT, crate::FILL_IN_FLIGHT, users, request);
        let done = on_core(None, run).await;
        assert_eq!((done.answered, done.failed), (users, 0), "puts");
    }

    /// Holds the lease for another time of it, unless etcd is too busy.
    async fn beat(client: &mut Grpc<Channel>, id: i64) -> Result<(), Status> {
        let codec = ProstCodec::<LeaseKeepAliveRequest, LeaseKeepAliveResponse>::default();
        let beats = tokio_stream::once(LeaseKeepAliveRequest { id });
        client.ready().await.expect("etcd listens");
        let request = Request::new(beats);
        let answers = client.streaming(request, PathAndQuery::from_static(KEEP_ALIVE), codec).await?;
        let answer = answers.into_inner().message().await?;
        assert!(answer.is_some_and(|answer| answer.ttl > 0), "the lease is there");
        Ok(())
    }
}

impl Rival for Etcd {
    fn name(&self) -> String {
        "etcd, one server".to_owned()
    }

    async fn fill(&mut self, users: u64) {
        self.put("route/", 1, users, 0).await;
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
        let lease = lease * FILL_LEASES;
        let ttl = i64::try_from(lease.as_secs()).expect("a short time");
        let id = self.ask::<_, LeaseGrantResponse>(GRANT, LeaseGrantRequest { ttl }).await.id;
        let (filled, mut client) = (Arc::new(AtomicBool::new(false)), self.client().await);
        let is_filled = filled.clone();
        let beating = tokio::spawn(async move {
            while !is_filled.load(Ordering::Relaxed) {
                let _ = Self::beat(&mut client, id).await; // the next one is as good
                tokio::time::sleep(lease / BEATS_A_LEASE).await;
            }
            client
        });
        self.put("lease/", 1, users, id).await;
        filled.store(true, Ordering::Relaxed);
        let mut client = beating.await.expect("beats");
        let cpu = cpu_time(self.server.pid());
        Self::beat(&mut client, id).await.expect("the last beat");
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
        self.put("lost/", 1, users, 0).await;
        self.server.is_killed_and_comes_back().await;
        users - u64::try_from(self.count("lost/").await).expect("a count")
    }
}

fn put(prefix: &str, user: u64, lease: i64) -> PutRequest {
    PutRequest { key: format!("{prefix}{user}").into_bytes(), value: VALUE.as_bytes().to_vec(), lease }
}
