//! The unary calls of a connection: so many under way, each answer makes room for the next call.

use std::io::Read;
use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

use nix::sys::epoll::Epoll;
use nix::sys::epoll::EpollCreateFlags;
use nix::sys::epoll::EpollEvent;
use nix::sys::epoll::EpollFlags;
use nix::sys::epoll::EpollTimeout;
use prost::Message;

use crate::load::Connection;
use crate::load::Done;
use crate::load::take_frames;

const CHUNK_BYTES: usize = 1 << 16;
const EVENTS: usize = 64;

pub struct Calls<S, F> {
    connection: Connection<S>,
    request: F,
    /// How many calls at most, and until when.
    limit: (u64, Instant),
    sent: u64,
    ended: u64,
    done: Done,
    /// Bytes that are no whole frame yet.
    buffer: Vec<u8>,
}

impl<S: Read + Write, M: Message, F: Fn(u64) -> M> Calls<S, F> {
    /// Sends the first `in_flight`.
    pub fn begin(connection: Connection<S>, in_flight: u64, limit: (u64, Instant), request: F) -> Self {
        let mut this = Self { connection, request, limit, sent: 0, ended: 0, done: Done::default(), buffer: Vec::new() };
        this.call(in_flight);
        this
    }

    fn call(&mut self, count: u64) {
        for _ in 0..count {
            self.connection.call(&(self.request)(self.sent));
            self.sent += 1;
        }
        let Connection { stream, out, .. } = &mut self.connection;
        stream.write_all(out).and_then(|()| stream.flush()).expect("the daemon reads");
        out.clear();
    }

    /// Takes what is there, or waits for something. Whether calls are still under way.
    fn go_on(&mut self, chunk: &mut [u8]) -> bool {
        let n = self.connection.stream.read(chunk).expect("the daemon answers");
        assert!(n > 0, "the daemon closed the connection");
        self.buffer.extend_from_slice(&chunk[..n]);
        let mut ended = 0;
        self.done.answered += take_frames(&mut self.buffer, &mut self.connection.out, |_| ended += 1);
        self.ended += ended;
        let (most, until) = self.limit;
        self.call(if Instant::now() < until { ended.min(most - self.sent) } else { 0 });
        self.ended < self.sent
    }

    pub fn until_all_end(mut self) -> Done {
        let mut chunk = vec![0; CHUNK_BYTES];
        while self.go_on(&mut chunk) {}
        self.result()
    }

    fn result(self) -> Done {
        Done { failed: self.ended - self.done.answered, ..self.done }
    }
}

/// All until they end, by one thread. What one of them has to write is small, so none holds up the others.
pub fn together<M: Message, F: Fn(u64) -> M>(calls: impl Iterator<Item = Calls<TcpStream, F>>) -> Done {
    let (mut all, mut chunk): (Vec<_>, _) = (calls.collect(), vec![0; CHUNK_BYTES]);
    if all.len() == 1 {
        return all.remove(0).until_all_end(); // which asks the system for one thing less
    }
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    for (n, calls) in (0..).zip(&all) {
        epoll.add(&calls.connection.stream, EpollEvent::new(EpollFlags::EPOLLIN, n)).expect("epoll");
    }
    let (mut under_way, mut events) = (all.len(), [EpollEvent::empty(); EVENTS]);
    while under_way > 0 {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE).expect("epoll");
        for event in &events[..ready] {
            let calls = &mut all[event.data() as usize];
            if !calls.go_on(&mut chunk) {
                epoll.delete(&calls.connection.stream).expect("epoll");
                under_way -= 1;
            }
        }
    }
    all.into_iter().map(Calls::result).sum()
}
