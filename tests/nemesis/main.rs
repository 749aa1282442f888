//! Nemesis: three nodes with Redis Sentinel and Galera, each server on a host of its own, while callers bind, unbind, ask, send and
//! watch, and things break by chance. What the callers were told is a history; `check` says whether it keeps what is promised.
//!
//! `tests/nemesis/run` is the long form. A run is named by its seed, which it prints; what breaks, and when, follows from it, but
//! what the scheduler makes of that does not.

mod callers;
mod check;
mod edges;
mod faults;
#[allow(dead_code)] // other tests use more of it
#[path = "../it/harness/mod.rs"]
mod harness;
mod history;
mod run;
mod watchers;
mod wire;
mod world;

use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use crate::harness::long;
use crate::harness::process;
use crate::run::Plan;

/// Tells a copy of this program that it is in a network namespace of its own.
const ROLE: &str = "IM_PRESENCE_NEMESIS_INSIDE";
const SEED: &str = "IM_PRESENCE_NEMESIS_SEED";
const MINUTES: &str = "IM_PRESENCE_NEMESIS_MINUTES";
const NAME: &str = "what_is_promised_holds_while_things_break";
/// With a seed, and without `IM_PRESENCE_LONG`.
const SHORT: Duration = Duration::from_secs(15);
const MINUTE: Duration = Duration::from_secs(60);

/// Needs a machine that has time for ten servers: by itself it runs in the long form of the tests only.
#[test]
fn what_is_promised_holds_while_things_break() {
    if !long() && std::env::var_os(SEED).is_none() {
        println!("skipped: without IM_PRESENCE_LONG=1 it runs if {SEED} is set, for {SHORT:?}");
        return;
    }
    if std::env::var_os(ROLE).is_none() {
        return apart();
    }
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seed = number(SEED).unwrap_or_else(|| if long() { fastrand::u64(..1_000_000) } else { 1 });
    let time = match number(MINUTES) {
        Some(minutes) => MINUTE * u32::try_from(minutes).expect(MINUTES),
        None if long() => 10 * MINUTE,
        None => SHORT,
    };
    println!("{SEED}={seed}, for {time:?}");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().expect("a runtime");
    let violations = runtime.block_on(run::run(Plan { seed, time }));
    assert!(violations.is_empty(), "{SEED}={seed}: {} violations", violations.len());
}

/// Runs this test again where it may make networks and disks: in namespaces of its own, as root of these if it is not root anyway.
fn apart() {
    let mut command = Command::new("unshare");
    let is_root = std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0);
    if !is_root {
        command.args(["--user", "--map-root-user"]);
    }
    command
        .args(["--net", "--mount"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", NAME, "--nocapture"])
        .env(ROLE, "1");
    let mut child = process::spawn(command).expect("run unshare: apt-get install util-linux");
    let ended = child.wait().expect("wait for the run");
    assert!(ended.success(), "the run has failed; what it said stands above");
}
