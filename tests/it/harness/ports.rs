//! Ports for servers that have to be told theirs.

use std::fs::File;
use std::net::TcpListener;
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

/// Below those that kernels give to clients, and to servers that ask for any: nobody takes one between here and its server.
const PORTS: Range<u16> = 10_000..32_000;
/// A process of tests has so many, which it hands out in turn.
const OWN: u16 = 1_000;

/// The first of this process's ports, and the lock that keeps others away from them: it goes with the process.
static BLOCK: LazyLock<(u16, File)> = LazyLock::new(|| {
    let blocks = PORTS.step_by(usize::from(OWN));
    let mut locked = blocks.filter_map(|first| {
        let file = std::env::temp_dir().join(format!("im-presence-ports-{first}"));
        let file = File::options().create(true).append(true).open(file).expect("open a file for a lock");
        file.try_lock().ok().map(|()| (first, file))
    });
    locked.next().expect("fewer processes than blocks of ports")
});
static NEXT: AtomicU16 = AtomicU16::new(0);

/// A port that nobody listens on.
pub fn free_port() -> u16 {
    let mut each = (0..OWN).map(|_| BLOCK.0 + NEXT.fetch_add(1, Ordering::Relaxed) % OWN);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    each.find(is_free).expect("a port that is free")
}
