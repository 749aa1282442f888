//! Calls at a fixed rate, whether answered or not: what a caller waits who cannot choose when to come. A call's time runs from
//! when it was due, so that a server that stands still is not asked less.

use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use prost::Message;

use crate::load::Connection;
use crate::load::take_frames;

/// More calls at a time a server refuses on one connection; a client holds them back, and their time runs.
const MAX_IN_FLIGHT: u64 = 1_000;
/// Between looks at what is due: sleeping for less would only burn the time of the server.
const PAUSE: Duration = Duration::from_micros(50);

/// Calls `path` `rate` times a second over `connections` for `time`, and says how long each call took.
pub fn run<M: Message>(
    server: SocketAddr,
    path: &'static str,
    connections: u64,
    rate: f64,
    time: Duration,
    request: impl Fn(u64, u64) -> M + Sync,
) -> Vec<Duration> {
    run_noting(server, path, connections, (rate, time), request, |_, _, _, _| ())
}

/// The same; `note` is told of each call as it is answered: its connection and number, when it was due, and when the answer came.
pub fn run_noting<M: Message>(
    server: SocketAddr,
    path: &'static str,
    connections: u64,
    (rate, time): (f64, Duration),
    request: impl Fn(u64, u64) -> M + Sync,
    note: impl Fn(u64, u64, Instant, Instant) + Sync,
) -> Vec<Duration> {
    let gap = Duration::from_secs_f64(connections as f64 / rate);
    let calls = (time.as_secs_f64() / gap.as_secs_f64()) as u64;
    thread::scope(|scope| {
        let (request, note) = (&request, &note);
        let noting = move |c| move |n, due, answered| note(c, n, due, answered);
        let one = |c| scope.spawn(move || one_connection(server, path, (gap, calls), |n| request(c, n), noting(c)));
        let threads: Vec<_> = (0..connections).map(one).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a loader thread panicked")).collect()
    })
}

fn one_connection<M: Message>(
    server: SocketAddr,
    path: &'static str,
    (gap, calls): (Duration, u64),
    request: impl Fn(u64) -> M + Sync,
    note: impl Fn(u64, Instant, Instant) + Sync,
) -> Vec<Duration> {
    let mut connection = Connection::open(server, path);
    let reading = connection.stream.try_clone().expect("share the socket");
    let writing = Mutex::new(connection.stream.try_clone().expect("share the socket"));
    let began = Instant::now();
    let answered = AtomicU64::new(0);
    let due = |n: u64| began + gap * u32::try_from(n).expect("not that many calls");
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(reading, &writing, calls, (due, &note), &answered));
        let mut sent = 0;
        while sent < calls {
            let room = answered.load(Ordering::Acquire) + MAX_IN_FLIGHT;
            while sent < calls.min(room) && due(sent) <= Instant::now() {
                connection.call(&request(sent));
                sent += 1;
            }
            write(&writing, &mut connection.out);
            if sent < calls {
                thread::sleep(due(sent).saturating_duration_since(Instant::now()).max(PAUSE));
            }
        }
        reader.join().expect("the reading thread panicked")
    })
}

fn read(
    mut stream: TcpStream,
    writing: &Mutex<TcpStream>,
    calls: u64,
    (due, note): (impl Fn(u64) -> Instant, impl Fn(u64, Instant, Instant)),
    answered: &AtomicU64,
) -> Vec<Duration> {
    let mut took = Vec::with_capacity(usize::try_from(calls).expect("not that many calls"));
    let (mut buffer, mut chunk, mut out) = (Vec::new(), vec![0; 1 << 16], Vec::new());
    while took.len() < took.capacity() {
        let n = stream.read(&mut chunk).expect("the daemon answers");
        assert!(n > 0, "the daemon closed the connection");
        buffer.extend_from_slice(&chunk[..n]);
        let now = Instant::now();
        take_frames(&mut buffer, &mut out, |stream| {
            let (n, due) = (u64::from(stream / 2), due(u64::from(stream / 2)));
            note(n, due, now);
            took.push(now.saturating_duration_since(due));
        });
        answered.store(took.len() as u64, Ordering::Release);
        write(writing, &mut out);
    }
    took
}

fn write(writing: &Mutex<TcpStream>, out: &mut Vec<u8>) {
    let mut stream = writing.lock().unwrap_or_else(PoisonError::into_inner);
    stream.write_all(out).expect("the daemon reads");
    out.clear();
}
