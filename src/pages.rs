//! What packages ship beside the program, made by the program itself: completions of shells, and man pages.

use std::io;
use std::path::Path;

use clap::Command;
use clap_complete::Shell;

/// Its name, whatever the file is called.
const NAME: &str = "im-presence";

/// What a shell reads to complete the command line.
pub fn completions(mut command: Command, shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, NAME, &mut script);
    let script = String::from_utf8_lossy(&script);
    // For bash, clap_complete 4.6.12 writes a program's name with a dash in two ways, and then finds nothing below it.
    script.replace("im__subcmd__presence", "im__presence")
}

/// Writes a page for the program and one for each subcommand that is shown: `im-presence.1`, `im-presence-ctl-bind.1`.
///
/// # Errors
/// The directory is not there, or cannot be written to.
pub fn write_man_pages(command: Command, directory: &Path) -> io::Result<()> {
    clap_mangen::generate_to(command, directory)
}
