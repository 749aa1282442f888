//! What packages ship beside the program, and what the program says of itself.

use std::fs;
use std::process::Command;
use std::process::Output;

use crate::harness::node::PROGRAM;

fn run(words: &[&str]) -> Output {
    Command::new(PROGRAM).args(words).output().expect("run im-presence")
}

#[test]
fn the_program_says_its_version_its_commit_and_how_it_was_built() {
    let said = String::from_utf8(run(&["--version"]).stdout).expect("text");
    let rest = said.trim().strip_prefix(concat!("im-presence ", env!("CARGO_PKG_VERSION"), " (commit "));
    let (commit, build) = rest.and_then(|rest| rest.strip_suffix(')')?.split_once(", ")).unwrap_or_else(|| panic!("{said}"));
    assert!(commit == "unknown" || commit.len() >= 7 && commit.bytes().all(|byte| byte.is_ascii_hexdigit()), "{said}");
    let (profile, target) = build.split_once(' ').unwrap_or_else(|| panic!("{said}"));
    assert!(!profile.is_empty() && target.contains("linux"), "{said}");
}

#[test]
fn bash_completes_what_the_program_takes() {
    let directory = tempfile::tempdir().expect("a directory");
    let script = directory.path().join("completions");
    let made = run(&["completions", "bash"]);
    assert!(made.status.success());
    fs::write(&script, made.stdout).expect("write");
    let complete = "source $0; set -- $(complete -p im-presence); COMP_WORDS=(im-presence ctl que); COMP_CWORD=2; ${@: -2:1} im-presence que ctl; echo $COMPREPLY";
    let bash = Command::new("bash").arg("-c").arg(complete).arg(&script).output().expect("run bash");
    assert_eq!(String::from_utf8_lossy(&bash.stdout), "query\n", "{bash:?}");
    for shell in ["zsh", "fish", "elvish", "powershell"] {
        let made = run(&["completions", shell]);
        assert!(made.status.success() && String::from_utf8_lossy(&made.stdout).contains("explain"), "{shell}");
    }
}

#[test]
fn there_is_a_man_page_for_each_command_that_is_shown() {
    let directory = tempfile::tempdir().expect("a directory");
    assert!(run(&["man", directory.path().to_str().expect("a path")]).status.success());
    let mut pages = fs::read_dir(directory.path()).expect("the directory").map(|entry| entry.expect("a page").file_name());
    let pages: Vec<String> = pages.by_ref().filter_map(|name| name.into_string().ok()).collect();
    for page in ["im-presence.1", "im-presence-health.1", "im-presence-ctl.1", "im-presence-ctl-bench.1"] {
        assert!(pages.iter().any(|name| name == page), "{page}: {pages:?}");
    }
    for page in &pages {
        assert!(!page.contains("completions") && page != "im-presence-man.1", "{page}");
        let text = fs::read_to_string(directory.path().join(page)).expect("a page");
        assert!(text.contains(".TH im-presence"), "{page}");
    }
    let nowhere = run(&["man", "/nowhere"]);
    assert!(nowhere.status.code() == Some(1) && String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere"), "{nowhere:?}");
}
