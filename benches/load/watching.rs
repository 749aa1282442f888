//! Many `Watch` streams on few connections. One task reads a connection and decodes no more of a telling than is measured.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use im_presence::pb;
use prost::Message;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::harness;
use crate::load::ACK;
use crate::load::DATA;
use crate::load::END_HEADERS;
use crate::load::END_STREAM;
use crate::load::GOAWAY;
use crate::load::HEADERS;
use crate::load::PING;
use crate::load::RST_STREAM;
use crate::load::SETTINGS;
use crate::load::frame;
use crate::load::header_block;
use crate::load::preface;
use crate::load::write_message;

const PATH: &str = "/mpim.PresenceService/Watch";
/// Users in one message, as many as a node takes. A stream has one message under way, so nobody's window gets full.
const AT_ONCE: usize = 5_000;
/// Connections that are opened before their streams are waited for: a node has few places for newcomers.
const OPENED_AT_ONCE: u64 = 16;
const OPENED_WITHIN: Duration = Duration::from_secs(60);
const TAKEN_UP_WITHIN: Duration = Duration::from_secs(300);

/// How many connections, streams on each, and users of each stream: all of them different ones.
#[derive(Clone, Copy)]
pub struct Shape {
    pub connections: u64,
    pub streams: u64,
    pub users: u64,
}

impl Shape {
    pub fn all_streams(&self) -> u64 {
        self.connections * self.streams
    }

    pub fn pairs(&self) -> u64 {
        self.all_streams() * self.users
    }

    /// The users of a stream, of 1 to [`Shape::pairs`].
    pub fn users_of(&self, stream: u64) -> Vec<i64> {
        (stream * self.users..(stream + 1) * self.users).map(|n| 1 + n as i64).collect()
    }
}

/// What is looked at of a telling.
#[derive(Clone, PartialEq, Message)]
pub struct Telling {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(enumeration = "pb::Status", tag = "2")]
    pub status: i32,
    #[prost(string, tag = "4")]
    pub status_text: String,
}

#[derive(Clone, PartialEq, Message)]
struct Told {
    #[prost(message, optional, tag = "1")]
    presence: Option<Telling>,
    #[prost(message, optional, tag = "2")]
    done: Option<pb::WatchDone>,
}

type Listener = Box<dyn Fn(u64, &Telling, Instant) + Send + Sync>;

/// Streams that watch, until they are dropped.
pub struct Watchers {
    shape: Shape,
    shared: Arc<Shared>,
    links: Vec<mpsc::UnboundedSender<Add>>,
    _tasks: JoinSet<()>,
}

struct Shared {
    /// Hears each telling, with the number of its stream.
    listener: Listener,
    opened: AtomicU64,
    /// Messages that are not answered by `done`.
    unanswered: AtomicU64,
    told: AtomicU64,
    /// What should not have happened.
    trouble: Mutex<Option<String>>,
}

struct Add {
    /// Of the connection's.
    stream: u64,
    users: Vec<i64>,
}

impl Watchers {
    /// Opens the streams, which watch nobody yet. All are there when this returns.
    pub async fn open(
        server: SocketAddr,
        shape: Shape,
        listener: impl Fn(u64, &Telling, Instant) + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            listener: Box::new(listener),
            opened: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
            told: AtomicU64::new(0),
            trouble: Mutex::default(),
        });
        let (mut links, mut tasks) = (Vec::new(), JoinSet::new());
        for n in 0..shape.connections {
            let stream = TcpStream::connect(server).await.expect("the daemon listens");
            stream.set_nodelay(true).expect("TCP_NODELAY");
            let (orders, inbox) = mpsc::unbounded_channel();
            let link = Link::new(shared.clone(), n * shape.streams, shape.streams, stream);
            let told_of = shared.clone();
            tasks.spawn(async move {
                if let Err(trouble) = link.run(inbox, server).await {
                    told_of.trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(trouble);
                }
            });
            links.push(orders);
            if (n + 1) % OPENED_AT_ONCE == 0 || n + 1 == shape.connections {
                let all = || shared_count(&shared.opened) == (n + 1) * shape.streams;
                shared.until("the streams are open", OPENED_WITHIN, all).await;
            }
        }
        Self { shape, shared, links, _tasks: tasks }
    }

    /// Has each stream watch `users` of it, and returns when the node has taken up all of them.
    pub async fn watch(&self, users: impl Fn(u64) -> Vec<i64>) {
        for stream in 0..self.shape.all_streams() {
            let users = users(stream);
            self.shared.unanswered.fetch_add(users.len().div_ceil(AT_ONCE) as u64, Ordering::Relaxed);
            let add = Add { stream: stream % self.shape.streams, users };
            let _ = self.links[(stream / self.shape.streams) as usize].send(add); // the trouble is told below
        }
        let all = || shared_count(&self.shared.unanswered) == 0;
        self.shared.until("everybody is watched", TAKEN_UP_WITHIN, all).await;
    }

    /// Tellings so far.
    pub fn told(&self) -> u64 {
        self.shared.check();
        shared_count(&self.shared.told)
    }

    /// Waits until nothing has been told for `pause`, or that is so for too long.
    pub async fn quiet(&self, pause: Duration, limit: Duration) {
        let (began, mut before) = (Instant::now(), self.told());
        loop {
            tokio::time::sleep(pause).await;
            let told = self.told();
            if told == before || began.elapsed() > limit {
                return;
            }
            before = told;
        }
    }
}

fn shared_count(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Acquire)
}

impl Shared {
    fn check(&self) {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert!(trouble.is_none(), "a watcher: {}", trouble.unwrap_or_default());
    }

    async fn until(&self, what: &str, limit: Duration, is_so: impl Fn() -> bool) {
        harness::eventually(what, limit, async || {
            self.check();
            is_so()
        })
        .await;
    }
}

/// One connection.
struct Link {
    shared: Arc<Shared>,
    /// The number of its first stream.
    first: u64,
    streams: Vec<Open>,
    stream: TcpStream,
    input: Vec<u8>,
    out: Vec<u8>,
}

#[derive(Default)]
struct Open {
    /// The begin of a message.
    partial: Vec<u8>,
    sent: u64,
    to_send: VecDeque<Vec<i64>>,
    is_asking: bool,
}

impl Link {
    fn new(shared: Arc<Shared>, first: u64, streams: u64, stream: TcpStream) -> Self {
        let streams = (0..streams).map(|_| Open::default()).collect();
        Self { shared, first, streams, stream, input: Vec::with_capacity(1 << 16), out: preface() }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Add>, server: SocketAddr) -> Result<(), String> {
        let headers = header_block(PATH, &server.to_string());
        for id in (1..).step_by(2).take(self.streams.len()) {
            frame(&mut self.out, HEADERS, END_HEADERS, id, &headers);
        }
        loop {
            self.stream.write_all(&self.out).await.map_err(|error| format!("writing: {error}"))?;
            self.out.clear();
            tokio::select! {
                order = orders.recv() => match order {
                    Some(Add { stream, users }) => {
                        self.streams[stream as usize].to_send.extend(users.chunks(AT_ONCE).map(<[i64]>::to_vec));
                        self.ask(stream);
                    }
                    None => return Ok(()),
                },
                read = self.stream.read_buf(&mut self.input) => match read {
                    Ok(0) => return Err("the node closed the connection".to_owned()),
                    Ok(_) => self.take_frames()?,
                    Err(error) => return Err(format!("reading: {error}")),
                },
            }
        }
    }

    /// Sends the stream's next message, unless one is under way.
    fn ask(&mut self, stream: u64) {
        let open = &mut self.streams[stream as usize];
        if open.is_asking {
            return;
        }
        let Some(users) = open.to_send.pop_front() else { return };
        (open.is_asking, open.sent) = (true, open.sent + 1);
        let add = users.into_iter().map(|user_id| pb::KnownUser { user_id, version: 0 }).collect();
        let message = pb::WatchReq { seq: open.sent, add, ..Default::default() };
        write_message(&mut self.out, 1 + 2 * stream as u32, &message, 0);
    }

    fn take_frames(&mut self) -> Result<(), String> {
        let (mut input, now, mut at) = (std::mem::take(&mut self.input), Instant::now(), 0);
        while let Some(head) = input.get(at..at + 9) {
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, flags) = (head[3], head[4]);
            let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let Some(payload) = input.get(at + 9..at + 9 + len) else { break };
            match kind {
                DATA => self.take_data(u64::from(id / 2), payload, now)?,
                HEADERS if flags & END_STREAM != 0 => return Err(format!("the node ended a stream: {payload:?}")),
                HEADERS => _ = self.shared.opened.fetch_add(1, Ordering::Release),
                SETTINGS if flags & ACK == 0 => frame(&mut self.out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => frame(&mut self.out, PING, ACK, 0, payload),
                RST_STREAM => return Err(format!("the node reset a stream: {payload:?}")),
                GOAWAY => return Err(format!("the node said goodbye: {payload:?}")),
                _ => {}
            }
            at += 9 + len;
        }
        input.drain(..at);
        self.input = input;
        Ok(())
    }

    /// Messages need not begin or end with a frame, though they mostly do.
    fn take_data(&mut self, stream: u64, payload: &[u8], now: Instant) -> Result<(), String> {
        let mut joined = std::mem::take(&mut self.streams[stream as usize].partial);
        let is_joined = !joined.is_empty();
        if is_joined {
            joined.extend_from_slice(payload);
        }
        let mut rest = if is_joined { &joined[..] } else { payload };
        while let Some(head) = rest.get(..5) {
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let Some(message) = rest.get(5..5 + len) else { break };
            let told = Told::decode(message).map_err(|error| format!("decoding: {error}"))?;
            self.take(stream, told, now)?;
            rest = &rest[5 + len..];
        }
        self.streams[stream as usize].partial = rest.to_vec();
        Ok(())
    }

    fn take(&mut self, stream: u64, told: Told, now: Instant) -> Result<(), String> {
        if let Some(telling) = told.presence {
            (self.shared.listener)(self.first + stream, &telling, now);
            self.shared.told.fetch_add(1, Ordering::Release);
        }
        if let Some(done) = told.done {
            let result = done.result.unwrap_or_default();
            if result.code() != pb::Code::Ok {
                return Err(format!("done, but {result:?}"));
            }
            self.streams[stream as usize].is_asking = false;
            self.ask(stream);
            self.shared.unanswered.fetch_sub(1, Ordering::Release);
        }
        Ok(())
    }
}
