//! Commands that belong to different keys, and may go to different servers.

use redis::Cmd;
use redis::Pipeline;
use redis::Script;

use crate::store::slot_map::slot_of;

/// Commands that do not depend on each other.
pub struct Batch {
    in_cluster: bool,
    /// Comes before them wherever they go: servers forget scripts when they restart.
    script: Option<Cmd>,
    commands: Vec<(u16, Cmd)>,
}

/// Where a search goes on. The default is the begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Its place among the cluster's primaries.
    pub server: usize,
    pub at: u64,
}

impl Batch {
    pub fn new(in_cluster: bool) -> Self {
        Self { in_cluster, script: None, commands: Vec::new() }
    }

    /// The same for commands that call this script.
    pub fn with_script(in_cluster: bool, code: &str) -> Self {
        let mut load = redis::cmd("SCRIPT");
        load.arg("LOAD").arg(code);
        Self { script: Some(load), ..Self::new(in_cluster) }
    }

    /// A command; `key` is one of its keys, all of which are in the same slot.
    pub fn add(&mut self, key: &str, command: Cmd) {
        let slot = if self.in_cluster { slot_of(key) } else { 0 };
        self.commands.push((slot, command));
    }

    /// A call of the script, to which its arguments are still to be given.
    pub fn call(script: &Script, keys: &[&str]) -> Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(script.get_hash()).arg(keys.len()).arg(keys);
        call
    }

    /// Of each command, in their order.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = u16> {
        self.commands.iter().map(|(slot, _)| *slot)
    }

    /// All of it for one server.
    pub fn into_pipeline(self) -> Pipeline {
        let mut pipe = Pipeline::with_capacity(self.commands.len() + 1);
        if let Some(script) = self.script {
            pipe.add_command(script).ignore();
        }
        for (_, command) in self.commands {
            pipe.add_command(command);
        }
        pipe
    }

    /// The commands at these places. `asking`: of slots that are on their way to the server.
    pub fn part(&self, places: &[usize], asking: bool) -> Pipeline {
        let mut pipe = Pipeline::with_capacity(places.len() + 1);
        if let Some(script) = &self.script {
            pipe.add_command(script.clone()).ignore();
        }
        for place in places {
            if asking {
                pipe.cmd("ASKING").ignore();
            }
            pipe.add_command(self.commands[*place].1.clone());
        }
        pipe
    }
}
