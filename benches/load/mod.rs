//! A loader for gRPC, unary calls and one stream, that costs next to nothing: it shares the machine with what it measures. HTTP/2 by hand,
//! just enough of it: one request header block for all calls, no flow control to speak of, answers counted by their frames.

pub mod binds;
pub mod book;
pub mod calls;
pub mod contender;
pub mod delivering;
pub mod gateway;
pub mod nginx;
pub mod paced;
pub mod parts;
pub mod queries;
pub mod report;
pub mod seed;
pub mod server;
pub mod stores;
pub mod watching;

use std::io::Read;
use std::io::Write;
use std::iter::Sum;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use nix::sched::CpuSet;
use nix::sched::sched_setaffinity;
use nix::unistd::Pid;
use prost::Message;
use rustls::ClientConfig;
use rustls::ClientConnection;
use rustls::StreamOwned;
use rustls::pki_types::ServerName;

use crate::load::calls::Calls;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const DATA: u8 = 0;
const NO_ERROR: [u8; 4] = [0; 4];
/// The largest frame a peer has to take.
const MAX_FRAME: usize = 16_384;
/// As large as the protocol allows, so that nothing has to be granted later.
const LARGEST_WINDOW: u32 = (1 << 31) - 1;
/// More connections share one thread and its event loop, as those of redis-benchmark do: threads would measure the scheduler.
const MOST_THREADS: u64 = 8;
/// A number of calls takes as long as it takes, but no server that hangs is waited for.
const ALL_WITHIN: Duration = Duration::from_secs(600);

/// What a run of calls came to.
#[derive(Debug, Default)]
pub struct Done {
    pub answered: u64,
    /// Calls that ended with an error.
    pub failed: u64,
    pub elapsed: Duration,
}

impl Done {
    pub fn per_second(&self) -> f64 {
        self.answered as f64 / self.elapsed.as_secs_f64()
    }
}

/// Calls `path` over `connections`, each with `in_flight` calls at a time, for `time`. `request(connection, n)` is the message
/// of the connection's n-th call.
pub fn run<M: Message>(
    server: SocketAddr,
    path: &'static str,
    connections: u64,
    in_flight: u64,
    time: Duration,
    request: impl Fn(u64, u64) -> M + Sync,
) -> Done {
    run_on(&Target { server, tls: None, token: None }, path, (connections, in_flight), time, request)
}

/// Makes exactly so many calls over one connection.
pub fn run_all<M: Message>(
    server: SocketAddr,
    path: &'static str,
    in_flight: u64,
    calls: u64,
    request: impl Fn(u64, u64) -> M,
) -> Done {
    let began = Instant::now();
    let connection = Connection::open(server, path);
    let calls = Calls::begin(connection, in_flight.min(calls), (calls, began + ALL_WITHIN), |n| request(0, n));
    Done { elapsed: began.elapsed(), ..calls.until_all_end() }
}

/// How a server is reached, and what is shown to it.
#[derive(Clone)]
pub struct Target {
    pub server: SocketAddr,
    /// None: in plaintext.
    pub tls: Option<Arc<ClientConfig>>,
    pub token: Option<String>,
}

/// [`run`] of a server that wants more than a connection.
pub fn run_on<M: Message>(
    target: &Target,
    path: &'static str,
    (connections, in_flight): (u64, u64),
    time: Duration,
    request: impl Fn(u64, u64) -> M + Sync,
) -> Done {
    let (Target { server, tls, token }, request) = (target, &request);
    let headers = header_block(path, &server.to_string());
    let began = Instant::now();
    let limit = (u64::MAX, began + time);
    let run = |connections: Range<u64>| match tls {
        None => calls::together(connections.map(|c| {
            let connection = Connection::with(plain(*server), headers.clone()).showing(token.as_deref());
            Calls::begin(connection, in_flight, limit, move |n| request(c, n))
        })),
        Some(config) => {
            let c = connections.start;
            let connection = Connection::with(encrypted(*server, config), headers.clone()).showing(token.as_deref());
            Calls::begin(connection, in_flight, limit, |n| request(c, n)).until_all_end()
        }
    };
    // Encrypted connections hide from the system what they have read, so no event loop can wait for them.
    let of_a_thread = if connections <= MOST_THREADS || tls.is_some() { 1 } else { connections };
    let results: Vec<Done> = std::thread::scope(|scope| {
        let run = &run;
        let shares = (0..connections).step_by(of_a_thread as usize);
        let threads: Vec<_> = shares.map(|c| scope.spawn(move || run(c..c + of_a_thread))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a loader thread panicked")).collect()
    });
    Done { elapsed: began.elapsed(), ..results.into_iter().sum() }
}

impl Sum for Done {
    /// Of the calls, not of the time.
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let add = |sum: Self, one: Self| Self { answered: sum.answered + one.answered, failed: sum.failed + one.failed, ..sum };
        all.fold(Self::default(), add)
    }
}

fn plain(server: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(server).expect("the daemon listens");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    stream
}

pub fn encrypted(server: SocketAddr, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    let name = ServerName::IpAddress(server.ip().into());
    let mut tls = StreamOwned::new(ClientConnection::new(config.clone(), name).expect("a client"), plain(server));
    while tls.conn.is_handshaking() {
        tls.conn.complete_io(&mut tls.sock).expect("a handshake");
    }
    tls
}

/// Runs `work` on a thread of its own, whose threads all run on `core`, if one is given.
pub async fn on_core<T: Send + 'static>(core: Option<usize>, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        if let Some(core) = core {
            let mut cores = CpuSet::new();
            cores.set(core).and_then(|()| sched_setaffinity(Pid::from_raw(0), &cores)).expect("a core to run on");
        }
        done.send(work()).ok().expect("the result is waited for");
    });
    result.await.expect("the loader")
}

/// The n-th of numbers that look random and are the same in each run.
pub fn scatter(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One gRPC stream on a connection of its own, whose every message is answered.
pub struct Stream {
    connection: Connection,
    /// Bytes that are no whole frame yet, and bytes of the stream that are no whole message yet.
    buffer: Vec<u8>,
    unread: Vec<u8>,
    sent: u64,
}

impl Stream {
    /// Opens it and waits until `first` is answered.
    pub fn open(server: SocketAddr, path: &str, first: &impl Message) -> Self {
        let mut connection = Connection::open(server, path);
        frame(&mut connection.out, HEADERS, END_HEADERS, 1, &connection.headers);
        let mut this = Self { connection, buffer: Vec::new(), unread: Vec::new(), sent: 0 };
        this.send(first);
        while this.receive() == 0 {}
        this
    }

    /// Keeps `in_flight` messages under way for `time`. `request(n)` is the n-th of this stream.
    pub fn run<M: Message>(&mut self, in_flight: u64, time: Duration, request: impl Fn(u64) -> M) -> Done {
        let (began, mut done, mut under_way) = (Instant::now(), Done::default(), 0);
        while under_way > 0 || began.elapsed() < time {
            while under_way < in_flight && began.elapsed() < time {
                self.send(&request(self.sent));
                under_way += 1;
            }
            let answered = self.receive();
            (under_way, done.answered) = (under_way - answered, done.answered + answered);
        }
        done.elapsed = began.elapsed();
        done
    }

    fn send(&mut self, message: &impl Message) {
        self.sent += 1;
        write_message(&mut self.connection.out, 1, message, 0);
    }

    /// Sends what is to be sent, reads what is there, and says how many messages that completes.
    fn receive(&mut self) -> u64 {
        let connection = &mut self.connection;
        connection.stream.write_all(&connection.out).expect("the daemon reads");
        connection.out.clear();
        let mut chunk = [0; 1 << 16];
        let n = connection.stream.read(&mut chunk).expect("the daemon answers");
        assert!(n > 0, "the daemon closed the connection");
        self.buffer.extend_from_slice(&chunk[..n]);
        let unread = &mut self.unread;
        read_frames(
            &mut self.buffer,
            &mut connection.out,
            |_| panic!("the daemon ended the stream"),
            |data| unread.extend_from_slice(data),
        );
        let (mut at, mut messages) = (0, 0);
        while let Some(head) = self.unread.get(at + 1..at + 5) {
            let next = at + 5 + u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
            if self.unread.len() < next {
                break;
            }
            (at, messages) = (next, messages + 1);
        }
        self.unread.drain(..at);
        messages
    }
}

pub struct Connection<S = TcpStream> {
    stream: S,
    /// Of the first call, if it says more than the others.
    first_headers: Option<Vec<u8>>,
    headers: Vec<u8>,
    out: Vec<u8>,
    next_stream: u32,
}

impl Connection {
    fn open(server: SocketAddr, path: &str) -> Self {
        Self::with(plain(server), header_block(path, &server.to_string()))
    }
}

impl<S: Read + Write> Connection<S> {
    fn with(stream: S, headers: Vec<u8>) -> Self {
        Self { stream, first_headers: None, headers, out: preface(), next_stream: 1 }
    }

    /// Shows a token: the first call spells it out, the others name it by its number, as clients do.
    fn showing(mut self, token: Option<&str>) -> Self {
        const WITH_INDEXING: u8 = 0x40;
        const FIRST_DYNAMIC: u8 = 0x80 | 62;
        if let Some(token) = token {
            let mut first = self.headers.clone();
            let at = first.len();
            literal(&mut first, "authorization", &format!("Bearer {token}"));
            first[at] = WITH_INDEXING;
            self.first_headers = Some(first);
            self.headers.push(FIRST_DYNAMIC);
        }
        self
    }

    fn call(&mut self, message: &impl Message) {
        let id = self.next_stream;
        self.next_stream += 2;
        let headers = self.first_headers.take();
        frame(&mut self.out, HEADERS, END_HEADERS, id, headers.as_ref().unwrap_or(&self.headers));
        write_message(&mut self.out, id, message, END_STREAM);
    }
}

/// What a client says first.
pub fn preface() -> Vec<u8> {
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut settings = 4u16.to_be_bytes().to_vec(); // SETTINGS_INITIAL_WINDOW_SIZE
    settings.extend(LARGEST_WINDOW.to_be_bytes());
    frame(&mut out, SETTINGS, 0, 0, &settings);
    frame(&mut out, 8, 0, 0, &(LARGEST_WINDOW - 65_535).to_be_bytes()); // WINDOW_UPDATE of the connection
    out
}

fn write_message(out: &mut Vec<u8>, stream: u32, message: &impl Message, last: u8) {
    let mut body = vec![0];
    body.extend((message.encoded_len() as u32).to_be_bytes());
    message.encode(&mut body).expect("a Vec grows");
    let mut pieces = body.chunks(MAX_FRAME).peekable();
    while let Some(piece) = pieces.next() {
        frame(out, DATA, if pieces.peek().is_none() { last } else { 0 }, stream, piece);
    }
}

/// Works off the whole frames in `buffer` and says how many calls were answered. `ended` is told each stream that ended.
fn take_frames(buffer: &mut Vec<u8>, out: &mut Vec<u8>, ended: impl FnMut(u32)) -> u64 {
    read_frames(buffer, out, ended, |_| ())
}

/// The same; `data` is told what the answers contain.
fn read_frames(buffer: &mut Vec<u8>, out: &mut Vec<u8>, mut ended: impl FnMut(u32), mut data: impl FnMut(&[u8])) -> u64 {
    let (mut at, mut answered) = (0, 0);
    while buffer.len() >= at + 9 {
        let head = &buffer[at..at + 9];
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if buffer.len() < at + 9 + len {
            break;
        }
        let payload = &buffer[at + 9..at + 9 + len];
        match kind {
            HEADERS if flags & END_STREAM != 0 => ended(stream),
            HEADERS => answered += 1, // an answer that failed has trailers only
            SETTINGS if flags & ACK == 0 => frame(out, SETTINGS, ACK, 0, &[]),
            PING if flags & ACK == 0 => frame(out, PING, ACK, 0, payload),
            RST_STREAM if payload == NO_ERROR => {} // nginx has answered before it reads what it was sent
            RST_STREAM => panic!("the daemon refused a call: {payload:?}"),
            GOAWAY => panic!("the daemon said goodbye: {payload:?}"),
            DATA => {
                data(payload);
                if flags & END_STREAM != 0 {
                    ended(stream); // nginx has no trailers
                }
            }
            _ => {}
        }
        at += 9 + len;
    }
    buffer.drain(..at);
    answered
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
}

/// HPACK without indexing, so that every call has the same block: `:method POST`, `:scheme http`, then literals.
fn header_block(path: &str, authority: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    for (name, value) in [(":path", path), (":authority", authority), ("content-type", "application/grpc"), ("te", "trailers")] {
        literal(&mut block, name, value);
    }
    block
}

fn literal(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0);
    for text in [name, value] {
        let length = u8::try_from(text.len()).ok().filter(|length| *length < 127);
        block.push(length.expect("short"));
        block.extend(text.as_bytes());
    }
}
