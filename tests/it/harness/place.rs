//! Where a server of the tests runs: at which address others reach it, and how its program gets there.

use std::ffi::OsStr;
use std::process::Command;

#[derive(Clone, Debug)]
pub struct Place {
    pub host: String,
    /// What stands in front of its command line; empty: it runs where the tests do.
    pub entered_by: Vec<String>,
}

impl Default for Place {
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), entered_by: Vec::new() }
    }
}

impl Place {
    /// Whoever comes from another host is nobody that a fresh server knows.
    pub fn is_elsewhere(&self) -> bool {
        !self.entered_by.is_empty()
    }

    /// `program`, to be run there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((first, rest)) = self.entered_by.split_first() else { return Command::new(program) };
        let mut command = Command::new(first);
        command.args(rest).arg(program);
        command
    }
}
