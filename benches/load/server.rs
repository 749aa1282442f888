//! A server that is no part of the product: started on a disk of its own, looked at, killed, and started again.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use crate::harness::eventually;
use crate::harness::mariadb::scratch;
use crate::harness::process;

const LISTENS_WITHIN: Duration = Duration::from_secs(30);

pub struct Server {
    command: Vec<String>,
    port: u16,
    child: Child,
    directory: PathBuf,
}

impl Server {
    /// Runs what `command` says of a directory, and waits until it listens on `port`.
    pub async fn start(name: &str, port: u16, command: impl Fn(&str) -> Vec<String>) -> Self {
        let directory = scratch(name);
        fs::create_dir_all(&directory).expect("make a directory");
        let command = command(&directory.display().to_string());
        let this = Self { child: spawn(&command), command, port, directory };
        this.listens().await;
        this
    }

    async fn listens(&self) {
        eventually("the server listens", LISTENS_WITHIN, async || TcpStream::connect(("127.0.0.1", self.port)).is_ok()).await;
    }

    /// SIGKILL, and the same again on the same disk.
    pub async fn is_killed_and_comes_back(&mut self) {
        self.kill();
        self.child = spawn(&self.command);
        self.listens().await;
    }

    fn kill(&mut self) {
        self.child.kill().expect("kill the server");
        self.child.wait().expect("wait for the server");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory); // the next run removes what is left
    }
}

fn spawn(command: &[String]) -> Child {
    let mut process = Command::new(&command[0]);
    process.args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    process::spawn(process).expect("start the server")
}

/// Whether this program can be run, by its name.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// What a process has in memory.
pub fn rss_bytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("a running process");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}

/// What all its threads have used so far.
pub fn cpu_time(pid: u32) -> Duration {
    const TICK: Duration = Duration::from_millis(10); // USER_HZ is 100 on every Linux
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let (_, after_name) = text.rsplit_once(") ").expect("a name in parentheses");
    let numbers = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u32>().expect("a number"));
    TICK * numbers.sum()
}
