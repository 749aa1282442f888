//! Child processes that cannot outlive the tests.

use std::fs::DirEntry;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::mpsc;
use std::time::Duration;
use std::time::Instant;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;

const STANDS_WITHIN: Duration = Duration::from_secs(20);

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// The kernel kills a child when the thread that made it ends. A test's own thread ends with the test; this one never does.
static SPAWNER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
    let (orders, inbox) = mpsc::channel::<Order>();
    let work = move || {
        for (mut command, answer) in inbox {
            answer.send(command.spawn()).expect("whoever orders a process waits for it");
        }
    };
    std::thread::Builder::new().name("spawner".to_owned()).spawn(work).expect("start a thread");
    orders
});

/// Starts `command`; it is killed when the test process ends.
pub fn spawn(mut command: Command) -> io::Result<Child> {
    let with_parent = || set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from);
    // SAFETY: between fork and exec this makes one system call, and touches no memory of the parent.
    unsafe { command.pre_exec(with_parent) };
    let (answer, started) = mpsc::channel();
    SPAWNER.send((command, answer)).expect("the spawner never ends");
    started.recv().expect("the spawner never ends")
}

/// Returns when none of its threads runs any more: the signal stops them only when one of them has been scheduled and takes it.
pub fn stand_still(child: &Child) {
    signal(child, Signal::SIGSTOP);
    let state = |task: DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next() // after the name, which may hold anything
    };
    let stands = || {
        let mut tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).expect("the process is there");
        tasks.all(|task| task.ok().and_then(state).is_none_or(|state| matches!(state, 'T' | 'Z' | 'X')))
    };
    let began = Instant::now();
    while !stands() {
        assert!(began.elapsed() < STANDS_WITHIN, "process {} goes on", child.id());
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    kill(pid, signal).expect("signal a child that was not waited for");
}
