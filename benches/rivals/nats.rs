//! NATS JetStream KV: a bucket with a key for each user, in a file. Its protocol is text, so the client is written here: it costs
//! no more than the loader of gRPC, and the bench needs no crate of a client for one bench.

use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;
use std::time::Instant;

use crate::Figures;
use crate::Rival;
use crate::Shape;
use crate::VALUE;
use crate::harness::mariadb::free_port;
use crate::load::Done;
use crate::load::contender;
use crate::load::on_core;
use crate::load::scatter;
use crate::load::server::Server;
use crate::load::server::cpu_time;
use crate::load::server::rss_bytes;

const LISTS_WITHIN: Duration = Duration::from_secs(60);

pub struct Nats {
    server: Server,
    port: u16,
}

impl Nats {
    pub async fn start() -> Self {
        let port = free_port();
        let command = |directory: &str| {
            let mut words = contender::on_core(Some(crate::SERVER), "nats-server");
            let options = ["-a", "127.0.0.1", "-p", &port.to_string(), "-js", "-sd", directory].map(str::to_owned);
            words.extend(options);
            words
        };
        let server = Server::start("nats", port, command).await;
        let this = Self { server, port };
        this.make_bucket("routes", Duration::ZERO).await;
        this
    }

    /// As a client's `create_key_value` does it: one value for each key, direct answers. No age: for good.
    async fn make_bucket(&self, bucket: &str, age: Duration) {
        let request = format!(
            r#"{{"name":"KV_{bucket}","subjects":["$KV.{bucket}.>"],"storage":"file","num_replicas":1,"max_msgs_per_subject":1,"discard":"new","allow_rollup_hdrs":true,"deny_delete":true,"allow_direct":true,"max_age":{},"duplicate_window":{}}}"#,
            age.as_nanos(),
            if age.is_zero() { 120_000_000_000 } else { age.as_nanos() },
        );
        let answer = self.ask(format!("$JS.API.STREAM.CREATE.KV_{bucket}"), request).await;
        assert!(!answer.contains("\"error\""), "{answer}");
    }

    async fn ask(&self, subject: String, body: String) -> String {
        let port = self.port;
        on_core(None, move || Connection::open(port).ask(&subject, body.as_bytes())).await
    }

    /// Keys in the bucket.
    async fn count(&self, bucket: &str) -> u64 {
        let answer = self.ask(format!("$JS.API.STREAM.INFO.KV_{bucket}"), String::new()).await;
        let messages = answer.split("\"messages\":").nth(1).and_then(|rest| rest.split(',').next()?.parse().ok());
        messages.unwrap_or_else(|| panic!("NATS says {answer}"))
    }

    /// Puts the keys from `first` on, and returns when all are acknowledged.
    async fn put(&self, bucket: &'static str, first: u64, users: u64) {
        let port = self.port;
        let call = move |n| (put_subject(bucket, first + n), VALUE.as_bytes());
        let done = on_core(None, move || Connection::open(port).run(crate::FILL_IN_FLIGHT, |n| n < users, call)).await;
        assert_eq!((done.answered, done.failed), (users, 0), "puts");
    }
}

impl Rival for Nats {
    fn name(&self) -> String {
        "NATS JetStream KV, a file".to_owned()
    }

    async fn fill(&mut self, users: u64) {
        self.put("routes", 1, users).await;
    }

    async fn lookups(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let direct = move |c: u64, n: u64| {
            let user = 1 + scatter(c << 32 | n) % users;
            (format!("$JS.API.DIRECT.GET.KV_routes.$KV.routes.{user}"), &b""[..])
        };
        run(self.port, shape, time, direct).await
    }

    async fn binds(&mut self, shape: Shape, users: u64, time: Duration) -> f64 {
        let put = move |c: u64, n: u64| (put_subject("routes", 1 + scatter(c << 32 | n) % users), VALUE.as_bytes());
        run(self.port, shape, time, put).await
    }

    async fn death(&mut self, users: u64, lease: Duration) -> Figures {
        self.make_bucket("leases", lease).await;
        self.put("leases", 1, users).await;
        let cpu = cpu_time(self.server.pid());
        self.put("leases", 1, users).await;
        let end = Instant::now() + lease;
        let cpu_of_a_beat = cpu_time(self.server.pid()) - cpu;
        while self.count("leases").await > 0 {
            assert!(end.elapsed() < LISTS_WITHIN, "keys stay");
            tokio::time::sleep(crate::LOOK).await;
        }
        Figures { beyond_the_lease: end.elapsed(), cpu_of_a_beat }
    }

    fn rss_bytes(&self) -> u64 {
        rss_bytes(self.server.pid())
    }

    async fn lost(&mut self, users: u64) -> u64 {
        self.put("routes", crate::FIRST_LOST, users).await;
        let before = self.count("routes").await;
        self.server.is_killed_and_comes_back().await;
        before - self.count("routes").await
    }
}

fn put_subject(bucket: &str, user: u64) -> String {
    format!("$KV.{bucket}.{user}")
}

/// Requests a second, as the loader of gRPC makes them: a thread for each connection, so many under way.
async fn run(
    port: u16,
    (connections, in_flight): Shape,
    time: Duration,
    request: impl Fn(u64, u64) -> (String, &'static [u8]) + Sync + Send + 'static,
) -> f64 {
    let began = Instant::now();
    let done: Vec<Done> = on_core(Some(crate::LOADER), move || {
        std::thread::scope(|scope| {
            let request = &request;
            let one = |c| move || Connection::open(port).run(in_flight, |_| began.elapsed() < time, |n| request(c, n));
            let threads: Vec<_> = (0..connections).map(|c| scope.spawn(one(c))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a loader thread panicked")).collect()
        })
    })
    .await;
    assert_eq!(done.iter().map(|done| done.failed).sum::<u64>(), 0, "failed requests");
    done.iter().map(|done| done.answered).sum::<u64>() as f64 / began.elapsed().as_secs_f64()
}

/// One client, whose answers all come to one inbox.
struct Connection {
    stream: TcpStream,
    /// Its number: that of its port, which nobody else has.
    inbox: u16,
    buffer: Vec<u8>,
    out: Vec<u8>,
}

impl Connection {
    fn open(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("NATS listens");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let inbox = stream.local_addr().expect("an address").port();
        let options = r#"{"verbose":false,"headers":true,"no_responders":true}"#;
        let out = format!("CONNECT {options}\r\nSUB _INBOX.{inbox} 1\r\n").into_bytes();
        Self { stream, inbox, buffer: Vec::new(), out }
    }

    fn ask(mut self, subject: &str, body: &[u8]) -> String {
        self.publish(subject, body);
        let mut answer = None;
        while answer.is_none() {
            self.exchange(|head, body| answer = Some(format!("{head}{}", String::from_utf8_lossy(body))));
        }
        answer.unwrap_or_default()
    }

    /// Keeps `in_flight` requests under way while `go_on`, which is asked with the number of the next one.
    fn run(mut self, in_flight: u64, go_on: impl Fn(u64) -> bool, request: impl Fn(u64) -> (String, &'static [u8])) -> Done {
        let (began, mut sent, mut ended, mut done) = (Instant::now(), 0, 0, Done::default());
        loop {
            while sent - ended < in_flight && go_on(sent) {
                let (subject, body) = request(sent);
                self.publish(&subject, body);
                sent += 1;
            }
            if sent == ended {
                done.elapsed = began.elapsed();
                return done;
            }
            self.exchange(|head, body| {
                // An answer without a value has a status in its headers, an error of JetStream says so in its text.
                let is_bad = head.starts_with("NATS/1.0 ") || body.windows(7).any(|word| word == b"\"error\"");
                ended += 1;
                done.answered += u64::from(!is_bad);
                done.failed += u64::from(is_bad);
            });
        }
    }

    fn publish(&mut self, subject: &str, body: &[u8]) {
        write!(self.out, "PUB {subject} _INBOX.{} {}\r\n", self.inbox, body.len()).expect("a Vec grows");
        self.out.extend_from_slice(body);
        self.out.extend_from_slice(b"\r\n");
    }

    /// Sends what is to be sent, and reads what is there; `answered` is told the headers and the body of each answer.
    fn exchange(&mut self, mut answered: impl FnMut(&str, &[u8])) {
        self.stream.write_all(&self.out).expect("NATS reads");
        self.out.clear();
        let mut chunk = [0; 1 << 16];
        let n = self.stream.read(&mut chunk).expect("NATS answers");
        assert!(n > 0, "NATS closed the connection");
        self.buffer.extend_from_slice(&chunk[..n]);
        let mut at = 0;
        while let Some(end) = self.buffer[at..].windows(2).position(|two| two == b"\r\n") {
            let line = String::from_utf8_lossy(&self.buffer[at..at + end]).into_owned();
            let body_at = at + end + 2;
            let mut words = line.split(' ');
            let (kind, sizes) = (words.next().unwrap_or_default(), words.collect::<Vec<_>>());
            let number = |from_end: usize| sizes[sizes.len() - from_end].parse::<usize>().expect("a length");
            let (headers, all) = match kind {
                "MSG" => (0, number(1)),
                "HMSG" => (number(2), number(1)),
                "PING" => {
                    self.out.extend_from_slice(b"PONG\r\n");
                    at = body_at;
                    continue;
                }
                "-ERR" => panic!("NATS says {line}"),
                _ => {
                    at = body_at; // INFO, PONG, +OK
                    continue;
                }
            };
            let Some(message) = self.buffer.get(body_at..body_at + all) else { break };
            if self.buffer.len() < body_at + all + 2 {
                break;
            }
            let head = std::str::from_utf8(&message[..headers]).expect("headers are text");
            answered(head, &message[headers..]);
            at = body_at + all + 2;
        }
        self.buffer.drain(..at);
    }
}
