//! Where a server of the tests runs: at which address others reach it, and how its program gets there.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

#[derive(Clone, Debug)]
pub struct Place {
    pub host: String,
    /// What stands in front of its command line; empty: it runs where the tests do.
    pub entered_by: Vec<String>,
    /// How much its data may be, in MiB; that is memory then. None: as much as the disk has.
    pub disk_mib: Option<u32>,
}

impl Default for Place {
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), entered_by: Vec::new(), disk_mib: None }
    }
}

impl Place {
    /// Whoever comes from another host is nobody that a fresh server knows.
    pub fn is_elsewhere(&self) -> bool {
        !self.entered_by.is_empty()
    }

    /// Makes the directory of its data.
    pub fn make_disk(&self, directory: &Path) {
        fs::create_dir(directory).expect("make a directory for data");
        let Some(mib) = self.disk_mib else { return };
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "none"]).arg(directory).status();
        assert!(mounted.is_ok_and(|status| status.success()), "cannot mount a disk of {mib} MiB at {directory:?}");
    }

    /// `program`, to be run there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let Some((first, rest)) = self.entered_by.split_first() else { return Command::new(program) };
        let mut command = Command::new(first);
        command.args(rest).arg(program);
        command
    }
}
