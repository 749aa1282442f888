//! A TCP proxy before Redis that reads along. It holds requests, and does to what a subscriber hears whatever a network or a
//! slow server may do: single hints get lost, repeated or overtaken, or nothing arrives any more.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use im_presence::store::codec::Hint;
use prost::Message;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::JoinSet;

use crate::harness::orders::Orders;

const CHUNK_BYTES: usize = 64 * 1024;
const HINT_CHANNEL: &[u8] = b"presence:hint";

/// What is done to hints. Beats, which name no users, pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Lost,
    Repeated,
    /// It arrives behind the next one.
    Overtaken,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Pass,
    /// Requests that contain this text stay here until released, and those of the same connection behind them.
    Hold(&'static str),
    /// This befalls the next hint, and no other.
    Next(Fault),
    /// Subscribers hear nothing; their connections stay open.
    Swallow,
}

pub struct RedisProxy {
    pub port: u16,
    orders: Arc<Orders<Mode>>,
    _connections: JoinSet<()>,
}

struct Link {
    orders: Arc<Orders<Mode>>,
    subscribes: AtomicBool,
}

impl RedisProxy {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let orders = Arc::new(Orders::new(Mode::Pass));
        let link_orders = orders.clone();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let link = Link { orders: link_orders.clone(), subscribes: AtomicBool::new(false) };
                links.spawn(link.run(client, server_port));
            }
        });
        Self { port, orders, _connections: connections }
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// From now on, requests that contain `text` do not arrive.
    pub fn hold(&self, text: &'static str) {
        self.set(Mode::Hold(text));
    }

    /// The next hint meets this.
    pub fn next_hint_is(&self, fault: Fault) {
        self.set(Mode::Next(fault));
    }

    pub fn swallow(&self) {
        self.set(Mode::Swallow);
    }

    /// Waits until the mode has done something.
    pub async fn struck(&self) {
        self.orders.struck().await;
    }

    /// What was held goes on, and everything passes.
    pub fn release(&self) {
        self.set(Mode::Pass);
    }

    fn set(&self, mode: Mode) {
        self.orders.set(mode);
    }
}

impl Link {
    async fn run(self, client: TcpStream, server_port: u16) {
        let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true)); // slower, not wrong, without
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            _ = self.requests(from_client, to_server) => {}
            _ = self.answers(from_server, to_client) => {}
        }
    }

    async fn requests(&self, mut client: OwnedReadHalf, mut server: OwnedWriteHalf) -> io::Result<()> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let bytes = client.read(&mut chunk).await?;
            if bytes == 0 {
                return Ok(());
            }
            let request = &chunk[..bytes];
            if contains(request, b"SUBSCRIBE") {
                self.subscribes.store(true, Ordering::Relaxed);
            }
            let order = self.orders.now();
            if matches!(order.mode, Mode::Hold(text) if contains(request, text.as_bytes())) {
                self.orders.hold(&order).await;
            }
            server.write_all(request).await?;
        }
    }

    async fn answers(&self, mut server: OwnedReadHalf, mut client: OwnedWriteHalf) -> io::Result<()> {
        let (mut chunk, mut received, mut overtaken) = (vec![0; CHUNK_BYTES], Vec::new(), None);
        loop {
            let bytes = server.read(&mut chunk).await?;
            if bytes == 0 {
                return Ok(());
            }
            received.extend_from_slice(&chunk[..bytes]);
            while let Some(end) = end_of_value(&received) {
                let value: Vec<u8> = received.drain(..end).collect();
                for value in self.let_pass(value, &mut overtaken) {
                    client.write_all(&value).await?;
                }
            }
        }
    }

    /// What arrives in place of `value`.
    fn let_pass(&self, value: Vec<u8>, overtaken: &mut Option<Vec<u8>>) -> Vec<Vec<u8>> {
        let order = self.orders.now();
        if matches!(order.mode, Mode::Swallow) && self.subscribes.load(Ordering::Relaxed) {
            self.orders.strike(&order);
            return Vec::new();
        }
        if !names_users(&value) {
            return vec![value];
        }
        if let Some(former) = overtaken.take() {
            self.orders.strike(&order);
            return vec![value, former];
        }
        let Mode::Next(fault) = order.mode else { return vec![value] };
        let Some(next) = self.orders.end(&order, Mode::Pass) else { return vec![value] };
        match fault {
            Fault::Lost => {
                self.orders.strike(&next);
                Vec::new()
            }
            Fault::Repeated => {
                self.orders.strike(&next);
                vec![value.clone(), value]
            }
            Fault::Overtaken => {
                *overtaken = Some(value);
                Vec::new()
            }
        }
    }
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Whether this is a hint that arrives at a subscriber and says that somebody has changed.
fn names_users(value: &[u8]) -> bool {
    let fields = texts(value);
    let [b"message", channel, body] = fields[..] else { return false };
    channel.ends_with(HINT_CHANNEL) && Hint::decode(body).is_ok_and(|hint| !hint.users.is_empty())
}

/// Where the first value in `bytes` ends, if it is there whole. Lines, texts, and lists of both are all that Redis sends.
fn end_of_value(bytes: &[u8]) -> Option<usize> {
    let line = line_end(bytes)?;
    let number = || std::str::from_utf8(&bytes[1..line - 2]).ok()?.parse::<i64>().ok();
    match bytes[0] {
        b'$' => {
            let end = line + usize::try_from(number()?).map_or(0, |length| length + 2);
            (bytes.len() >= end).then_some(end)
        }
        b'*' => (0..number()?).try_fold(line, |at, _| Some(at + end_of_value(&bytes[at..])?)),
        _ => Some(line),
    }
}

/// The texts of a list.
fn texts(value: &[u8]) -> Vec<&[u8]> {
    let mut texts = Vec::new();
    let mut at = line_end(value).filter(|_| value[0] == b'*').unwrap_or(value.len());
    while let Some(end) = value.get(at..).filter(|rest| !rest.is_empty()).and_then(end_of_value) {
        let field = &value[at..at + end];
        texts.push(line_end(field).and_then(|line| field.get(line..end - 2)).unwrap_or_default());
        at += end;
    }
    texts
}

/// Behind the end of the first line.
fn line_end(bytes: &[u8]) -> Option<usize> {
    Some(bytes.windows(2).position(|two| two == b"\r\n")? + 2)
}

#[test]
fn what_redis_says_is_taken_apart() {
    let message = b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\n\r\n\r\n+OK\r\n";
    assert_eq!(end_of_value(message), Some(message.len() - 5));
    assert_eq!(texts(&message[..message.len() - 5]), [b"message".as_slice(), b"c", b"\r\n"]);
    for cut in 0..message.len() - 5 {
        assert_eq!(end_of_value(&message[..cut]), None, "{cut}");
    }
    for whole in [b"$-1\r\n".as_slice(), b":12\r\n", b"*0\r\n", b"*2\r\n:1\r\n*1\r\n$0\r\n\r\n"] {
        assert_eq!(end_of_value(whole), Some(whole.len()));
    }
}
