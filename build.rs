//! Which commit the program is built from, and how: what `--version` says.

use std::env;
use std::path::Path;
use std::process::Command;

/// Of a commit's hash: as many as name it in any repository.
const DIGITS: usize = 12;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=IM_PRESENCE_COMMIT");
    let profile = profile();
    let given = env::var("IM_PRESENCE_COMMIT").ok().filter(|commit| !commit.is_empty());
    // Of a debug build nobody asks, and each commit would build it anew.
    let found = || if profile == "debug" { None } else { from_git() };
    let commit: String = given.or_else(found).unwrap_or_else(|| "unknown".to_owned()).chars().take(DIGITS).collect();
    let target = env::var("TARGET").unwrap_or_default();
    println!("cargo::rustc-env=IM_PRESENCE_COMMIT={commit}");
    println!("cargo::rustc-env=IM_PRESENCE_BUILD={profile} {target}");
}

/// As given to cargo: the directory in which it builds is named so.
fn profile() -> String {
    let out = env::var("OUT_DIR").unwrap_or_default();
    let named = Path::new(&out).ancestors().nth(3).and_then(|path| path.file_name());
    named.and_then(|name| name.to_str()).unwrap_or_default().to_owned()
}

/// None without git, or in sources that are no repository of their own.
fn from_git() -> Option<String> {
    if !Path::new(".git").exists() {
        return None;
    }
    let commit = git(&["rev-parse", "HEAD"])?;
    // A path that is not there would have cargo run this each time.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name]).filter(|path| Path::new(path).exists()) {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    Some(commit)
}

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
