//! A private MariaDB server, started by the first test that needs one and killed with the process.

use std::fs;
use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::Opening;
use crate::store::connection::Purpose;
use crate::store::connection::statement;

const START_DEADLINE: Duration = Duration::from_secs(60);
/// Another process may take the port between the choice and the start.
const START_ATTEMPTS: usize = 3;
/// Where Debian has the server; not on everybody's PATH.
const SYSTEM_BINARIES: &str = "/usr/sbin";
/// The default fills a disk that many runs share.
const SMALL: &str = "--innodb-log-file-size=8M";
const SCRATCH_PREFIX: &str = "im-presence-contract-";

static PORT: LazyLock<u16> = LazyLock::new(start);
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// The URL of a database that is empty.
pub async fn fresh_database() -> String {
    let server = format!("mysql://root@127.0.0.1:{}/", *PORT);
    let name = format!("contract_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let (engine, purpose) = (Engine::MySql, Purpose::General);
    let opening = Opening { engine, purpose, limit: START_DEADLINE, deadline: START_DEADLINE };
    let mut connection = Connection::open(&server, opening).await.unwrap();
    connection.execute(statement(format!("CREATE DATABASE {name}"))).await.unwrap();
    server + &name
}

/// The server dies with the thread that started it, so this one never ends before the process does.
fn start() -> u16 {
    sqlx::any::install_default_drivers();
    let (told, port) = mpsc::channel();
    let keep = move || {
        let server = start_here();
        told.send(server.1).expect("somebody waits for the server");
        loop {
            std::thread::park();
        }
    };
    std::thread::Builder::new().name("mariadb".to_owned()).spawn(keep).expect("start a thread");
    port.recv().expect("MariaDB does not start; the reason is above")
}

fn start_here() -> (Child, u16) {
    let directory = scratch();
    let data = directory.join("data");
    let mut installer = Command::new(installed("mariadb-install-db"));
    installer.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db", SMALL]);
    let done = installer.arg(format!("--datadir={}", data.display())).output().expect("run mariadb-install-db");
    assert!(done.status.success(), "mariadb-install-db failed:\n{}", String::from_utf8_lossy(&done.stderr));
    for _ in 0..START_ATTEMPTS {
        let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|free| free.local_addr()).expect("a free port").port();
        let mut server = launch(&directory, &data, port);
        if answers(&mut server, port) {
            return (server, port);
        }
    }
    panic!("mariadbd does not start:\n{}", fs::read_to_string(directory.join("log")).unwrap_or_default());
}

fn launch(directory: &Path, data: &Path, port: u16) -> Child {
    let mut server = Command::new(installed("mariadbd"));
    server.args(["--no-defaults", "--user=root", "--bind-address=127.0.0.1", SMALL]).arg(format!("--port={port}"));
    server.arg(format!("--datadir={}", data.display())).arg(format!("--socket={}", directory.join("s").display()));
    server.stderr(File::create(directory.join("log")).expect("write the server's log"));
    let end_with_parent = || set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: between fork and exec this makes one system call, and touches no memory of the parent.
    unsafe { server.pre_exec(end_with_parent) };
    server.spawn().expect("start mariadbd")
}

/// Waits until the server greets whoever connects. False: it has ended.
fn answers(server: &mut Child, port: u16) -> bool {
    let began = Instant::now();
    while began.elapsed() < START_DEADLINE {
        if server.try_wait().expect("look after mariadbd").is_some() {
            return false;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok_and(|mut stream| stream.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 4))
        {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("mariadbd does not answer within {START_DEADLINE:?}");
}

fn installed(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain([PathBuf::from(SYSTEM_BINARIES)]);
    let found = places.map(|place| place.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("{program} is not installed; on Debian it is in the package mariadb-server"))
}

/// A directory of this process. Removes those of processes that have ended.
fn scratch() -> PathBuf {
    let parent = std::env::temp_dir();
    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(SCRATCH_PREFIX));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir_all(entry.path()); // another process may be doing the same
        }
    }
    let directory = parent.join(format!("{SCRATCH_PREFIX}{}", std::process::id()));
    fs::create_dir_all(&directory).expect("make a directory");
    directory
}
