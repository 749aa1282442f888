//! Private MariaDB servers at default durability. Needs `mariadbd` and `mariadb-install-db`; `tests/run` installs them.

use std::fs;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::LazyLock;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;

pub use crate::harness::ports::free_port;
use crate::harness::process;

const START_DEADLINE: Duration = Duration::from_secs(60);
const START_ATTEMPTS: u32 = 3;
/// Where Debian has it; not on everybody's PATH.
const SERVER: &[&str] = &["mariadbd", "/usr/sbin/mariadbd"];
const INSTALLER: &[&str] = &["mariadb-install-db", "/usr/bin/mariadb-install-db"];
const SCRATCH_PREFIX: &str = "im-presence-it-";

static SHARED: LazyLock<MariaDb> = LazyLock::new(MariaDb::start);
/// An empty data directory, made once and copied for each server.
static TEMPLATE: LazyLock<PathBuf> = LazyLock::new(make_template);
/// Everything that this run leaves on disk.
static SCRATCH: LazyLock<PathBuf> = LazyLock::new(make_scratch);
static NEXT_NAME: AtomicU32 = AtomicU32::new(1);

/// A server of one test, or the one that most tests share.
pub struct MariaDb {
    child: Mutex<Child>,
    directory: PathBuf,
    /// Beyond what every server is started with.
    options: Vec<String>,
    pub port: u16,
}

impl MariaDb {
    /// The server of all tests that do not disturb it. Each of them has a database of its own there.
    pub fn shared() -> &'static MariaDb {
        &SHARED
    }

    pub fn start() -> Self {
        Self::start_with(Vec::new())
    }

    pub fn start_with(options: Vec<String>) -> Self {
        Self::start_on(&TEMPLATE, options)
    }

    /// The same on a copy of the data in `template`.
    pub fn start_on(template: &Path, options: Vec<String>) -> Self {
        let directory = scratch("mariadb");
        let copied = Command::new("cp").args(["-r", "--sparse=always"]).arg(template).arg(&directory).status();
        assert!(copied.is_ok_and(|status| status.success()), "cannot copy {template:?} to {directory:?}");
        // Galera's scripts write there as nobody in particular.
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).expect("open the directory to all");
        for _ in 0..START_ATTEMPTS {
            let port = free_port();
            let mut child = launch(&directory, port, &options);
            if answers(&mut child, port) {
                return Self { child: Mutex::new(child), directory, options, port };
            }
        }
        panic!("mariadbd does not start; its last words:\n{}", last_words(&directory));
    }

    pub fn url(&self, database: &str) -> String {
        format!("mysql://root@127.0.0.1:{}/{database}", self.port)
    }

    /// It stands still: connections stay open, nothing is answered.
    pub fn stop(&self) {
        process::stand_still(&self.child());
    }

    pub fn cont(&self) {
        process::signal(&self.child(), Signal::SIGCONT);
    }

    /// As if the power had failed, but for what the operating system has not written yet.
    pub fn kill(&self) {
        let mut child = self.child();
        let _ = child.kill(); // it may have ended
        child.wait().expect("wait for mariadbd");
    }

    /// Ends it in order, and moves its data to `place`.
    pub fn end_and_keep(self, place: &Path) {
        process::signal(&self.child(), Signal::SIGTERM);
        self.child().wait().expect("wait for mariadbd");
        fs::rename(&self.directory, place).expect("move the data");
    }

    /// After [`MariaDb::kill`]: the same data, the same port.
    pub fn restart(&self) {
        let mut child = self.child();
        *child = launch(&self.directory, self.port, &self.options);
        assert!(answers(&mut child, self.port), "mariadbd does not come back:\n{}", last_words(&self.directory));
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for MariaDb {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}

/// A name that no other test of this run has.
pub fn unique(what: &str) -> String {
    format!("{what}_{}", NEXT_NAME.fetch_add(1, Ordering::Relaxed))
}

/// A path of its own on this run's disk space; nothing is there yet.
pub fn scratch(what: &str) -> PathBuf {
    SCRATCH.join(unique(what))
}

/// Also removes what earlier runs have left, whose processes are gone.
fn make_scratch() -> PathBuf {
    let parent = std::env::temp_dir();
    for entry in fs::read_dir(&parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(SCRATCH_PREFIX)).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_err()) {
            let _ = fs::remove_dir_all(entry.path()); // another run may be doing the same
        }
    }
    let directory = parent.join(format!("{SCRATCH_PREFIX}{}", std::process::id()));
    fs::create_dir_all(&directory).expect("make a directory for the tests");
    directory
}

fn make_template() -> PathBuf {
    let directory = scratch("mariadb_template");
    let output = Command::new(find(INSTALLER))
        .args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"])
        .arg(format!("--datadir={}", directory.display()))
        .arg(format!("--tmpdir={}", directory.display()))
        .output()
        .expect("run mariadb-install-db");
    let said = || format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "mariadb-install-db failed:\n{}", said());
    directory
}

fn launch(directory: &Path, port: u16, options: &[String]) -> Child {
    let log = File::options().create(true).append(true).open(directory.join("stderr.log")).expect("open the server's log");
    let mut command = Command::new(find(SERVER));
    command
        .args(["--no-defaults", "--user=root", "--bind-address=127.0.0.1", "--max-connections=500"])
        .arg(format!("--datadir={}", directory.display()))
        .arg(format!("--tmpdir={}", directory.display())) // a server that starts removes what others have in the same one
        .arg(format!("--socket={}", directory.join("s").display()))
        .arg(format!("--port={port}"))
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    process::spawn(command).expect("start mariadbd")
}

/// Whether the server greets whoever connects. False: it has ended.
fn answers(child: &mut Child, port: u16) -> bool {
    let began = Instant::now();
    while began.elapsed() < START_DEADLINE {
        if child.try_wait().expect("look after mariadbd").is_some() {
            return false;
        }
        if greeted(port) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("mariadbd did not answer within {START_DEADLINE:?}");
}

fn greeted(port: u16) -> bool {
    use std::io::Read;
    let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok() && stream.read(&mut [0; 64]).is_ok_and(|bytes| bytes > 4)
}

fn find(candidates: &[&str]) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let found = candidates.iter().flat_map(|name| directories.iter().map(move |directory| directory.join(name)));
    let mut found = found.filter(|file| file.is_file());
    found.next().unwrap_or_else(|| panic!("{} is not installed: run tests/run, or apt-get install mariadb-server", candidates[0]))
}

fn last_words(directory: &Path) -> String {
    let text = fs::read_to_string(directory.join("stderr.log")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
