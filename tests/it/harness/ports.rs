//! Ports for servers that have to be told theirs.

use std::net::TcpListener;
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::sync::LazyLock;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

/// Below those that kernels give to clients, and to servers that ask for any: nobody takes one between here and its server.
const PORTS: Range<u16> = 10_000..32_000;
/// A process of tests has so many, which it hands out in turn.
const OWN: u16 = 1_000;

/// The first of this process's ports, and the name that keeps others away from them: it goes with the process, and it is seen
/// wherever the ports are, also by a run whose temporary directory is another.
static BLOCK: LazyLock<(u16, UnixListener)> = LazyLock::new(|| {
    let blocks = PORTS.step_by(usize::from(OWN));
    let mut taken = blocks.filter_map(|first| {
        let name = SocketAddr::from_abstract_name(format!("im-presence-ports-{first}")).expect("a short name");
        UnixListener::bind_addr(&name).ok().map(|listener| (first, listener))
    });
    taken.next().expect("fewer processes than blocks of ports")
});
static NEXT: AtomicU16 = AtomicU16::new(0);

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    let mut each = (0..OWN).map(|_| BLOCK.0 + NEXT.fetch_add(1, Ordering::Relaxed) % OWN);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    each.find(is_free).expect("a port that is free")
}
