//! Benches of several parts: which of them are wanted, and how many files they may open.

use nix::sys::resource::Resource;
use nix::sys::resource::getrlimit;
use nix::sys::resource::setrlimit;

/// The parts that the environment names, by commas, in that order; all of them if it names none.
pub fn wanted(variable: &str, all: &[&'static str]) -> Vec<&'static str> {
    let Ok(named) = std::env::var(variable) else { return all.to_vec() };
    let known = |part: &str| all.iter().find(|known| **known == part).copied();
    named.split(',').map(|part| known(part.trim()).unwrap_or_else(|| panic!("{variable}: {part:?} is none of {all:?}"))).collect()
}

/// Lets this process, and those that it starts, open as many files as they may.
pub fn raise_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of open files");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("raise it as far as it may go");
}
