//! A network of this test's own: namespaces with one interface each, whose packets all pass through this process. So a packet
//! can be dropped or delayed by its way, which kernels without netem and packet filters cannot do. Everything is gone with the
//! process.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::RwLock;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use nix::libc;
use nix::sched::CloneFlags;
use nix::sched::unshare;

use crate::harness::place::Place;

const NETWORK: &str = "10.77.0";
const INTERFACE: &str = "wire0";
/// Larger packets are fewer packets.
const LARGEST_PACKET: usize = 9_000;
/// Where source and destination end in an IPv4 header.
const SOURCE: usize = 15;
const DESTINATION: usize = 19;

/// The last number of a host's address.
pub type Host = u8;

/// Where the test itself is.
pub const HERE: Host = 1;

/// What happens to packets on one way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    Cut,
    Slow { delay: Duration, loss: f64 },
}

type Ways = Arc<RwLock<HashMap<(Host, Host), Way>>>;

pub struct Wire {
    ways: Ways,
    spaces: HashMap<Host, File>,
}

/// A packet that is under way, ordered by its time.
struct Late {
    due: Instant,
    number: u64,
    to: Host,
    packet: Vec<u8>,
}

impl Wire {
    /// Lays it between these hosts and the test, which has to be in a network namespace of its own.
    pub fn lay(hosts: &[Host], seed: u64) -> Self {
        let (ways, mut spaces, mut ends) = (Ways::default(), HashMap::new(), HashMap::new());
        for host in std::iter::once(HERE).chain(hosts.iter().copied()) {
            let (end, space) = std::thread::spawn(move || enter_and_plug_in(host)).join().expect("a namespace");
            ends.insert(host, end);
            spaces.insert(host, space);
        }
        let (ends, (late, queue)) = (Arc::new(ends), mpsc::channel());
        for host in ends.keys().copied() {
            let (ends, ways, late) = (ends.clone(), ways.clone(), late.clone());
            let random = fastrand::Rng::with_seed(seed ^ u64::from(host));
            start(format!("wire {host}"), move || carry(&ends, host, &ways, &late, random));
        }
        start("wire late".to_owned(), move || bring_late(&ends, &queue));
        Self { ways, spaces }
    }

    /// Where programs of this host run.
    pub fn place(&self, host: Host) -> Place {
        let space = format!("--net=/proc/{}/fd/{}", std::process::id(), self.spaces[&host].as_raw_fd());
        Place { host: address(host), entered_by: vec!["nsenter".to_owned(), space], disk_mib: None }
    }

    /// What leaves one of `from` for one of `to`, from now on.
    pub fn set(&self, from: &[Host], to: &[Host], way: Option<Way>) {
        let mut ways = self.ways.write().expect("nobody panics with it");
        for pair in from.iter().flat_map(|from| to.iter().map(|to| (*from, *to))).filter(|(from, to)| from != to) {
            match way {
                Some(way) => ways.insert(pair, way),
                None => ways.remove(&pair),
            };
        }
    }

    /// From now on everything arrives.
    pub fn heal(&self) {
        self.ways.write().expect("nobody panics with it").clear();
    }
}

pub fn address(host: Host) -> String {
    format!("{NETWORK}.{host}")
}

fn start(name: String, work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().name(name).spawn(work).expect("start a thread");
}

/// The calling thread is in a namespace of its own afterwards, unless it is the test's.
fn enter_and_plug_in(host: Host) -> (File, File) {
    if host != HERE {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    }
    let end = File::options().read(true).write(true).open("/dev/net/tun").expect("open /dev/net/tun");
    attach(&end);
    let (own, size) = (format!("{}/24", address(host)), LARGEST_PACKET.to_string());
    run(&["link", "set", "lo", "up"]);
    run(&["addr", "add", &own, "dev", INTERFACE]);
    run(&["link", "set", INTERFACE, "mtu", &size, "up"]);
    (end, File::open("/proc/thread-self/ns/net").expect("open the namespace"))
}

fn attach(end: &File) {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads and writes this structure, which outlives the call.
    let done = unsafe { libc::ioctl(end.as_raw_fd(), libc::TUNSETIFF, &mut request) };
    assert_eq!(done, 0, "attach an interface: {}", std::io::Error::last_os_error());
}

/// `ip`, in the namespace of the calling thread.
fn run(words: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new("ip").args(words).env("PATH", path).output().expect("run ip: apt-get install iproute2");
    assert!(output.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Takes what one host sends, and gives it to whom it is for.
fn carry(ends: &HashMap<Host, File>, from: Host, ways: &Ways, late: &mpsc::Sender<Late>, mut random: fastrand::Rng) {
    let (mut buffer, mut number) = (vec![0; LARGEST_PACKET], 0);
    loop {
        let Ok(length) = (&ends[&from]).read(&mut buffer) else { return };
        let packet = &buffer[..length];
        if length <= DESTINATION || packet[0] >> 4 != 4 || packet[SOURCE] != from {
            continue; // IPv6 looks for routers
        }
        let to = packet[DESTINATION];
        let way = ways.read().expect("nobody panics with it").get(&(from, to)).copied();
        match way {
            Some(Way::Cut) => {}
            Some(Way::Slow { loss, .. }) if random.f64() < loss => {}
            Some(Way::Slow { delay, .. }) => {
                number += 1;
                let _ = late.send(Late { due: Instant::now() + delay, number, to, packet: packet.to_vec() }); // at the end
            }
            None => give(ends, to, packet),
        }
    }
}

fn give(ends: &HashMap<Host, File>, to: Host, packet: &[u8]) {
    if let Some(mut end) = ends.get(&to) {
        let _ = end.write(packet); // a full queue drops packets, as anywhere
    }
}

fn bring_late(ends: &HashMap<Host, File>, queue: &mpsc::Receiver<Late>) {
    let mut waiting = BinaryHeap::<Reverse<Late>>::new();
    loop {
        let next = waiting.peek().map(|Reverse(late)| late.due.saturating_duration_since(Instant::now()));
        match queue.recv_timeout(next.unwrap_or(Duration::from_secs(1))) {
            Ok(late) => waiting.push(Reverse(late)),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        while waiting.peek().is_some_and(|Reverse(late)| late.due <= Instant::now()) {
            let Some(Reverse(late)) = waiting.pop() else { break };
            give(ends, late.to, &late.packet);
        }
    }
}

impl Late {
    fn order(&self) -> (Instant, u64) {
        (self.due, self.number)
    }
}

impl PartialEq for Late {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Late {}

impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Late {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}
