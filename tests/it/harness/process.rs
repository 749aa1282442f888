//! Child processes that cannot outlive the tests.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Child;
use std::process::Command;
use std::sync::LazyLock;
use std::sync::mpsc;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::unistd::Pid;

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

pub fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a process id"));
    kill(pid, signal).expect("signal a child that was not waited for");
}
