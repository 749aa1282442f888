//! Rules of the house that a compiler does not check.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

const MAX_FUNCTION_LINES: usize = 70;
const MAX_FILE_LINES: usize = 450;
/// Rooms of the engine, from the lowest to the highest.
const ROOMS: [&str; 6] = ["read", "write", "presence", "messages", "gateways", "overview"];

pub struct Source {
    /// Relative to the package: `src/engine/write/lane.rs`.
    pub name: String,
    pub text: String,
}

impl Source {
    /// Without the module of tests at its end.
    fn product(&self) -> &str {
        self.text.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
    }

    /// Number and text of each line of the product that is no comment.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.product().lines()).filter(|(_, line)| !line.trim_start().starts_with("//"))
    }

    fn floor(&self) -> &str {
        self.name.split('/').nth(1).unwrap_or_default().trim_end_matches(".rs")
    }
}

pub fn package() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap_or_else(|error| panic!("{directory:?}: {error}")) {
        let path = entry.expect("a directory entry").path();
        match path.is_dir() {
            true => collect(&path, files),
            false if path.extension().is_some_and(|extension| extension == "rs") => files.push(path),
            false => {}
        }
    }
}

/// The sources of the product. Tests that stand beside them are left out.
pub fn sources() -> Vec<Source> {
    let mut files = Vec::new();
    for sources in ["src", "crates/proto/src", "crates/client/src"] {
        collect(&package().join(sources), &mut files);
    }
    files.sort();
    let named = files.into_iter().map(|path| {
        let text = fs::read_to_string(&path).expect("a source file");
        Source { name: path.strip_prefix(package()).expect("a file of this package").display().to_string(), text }
    });
    let sources: Vec<_> = named.filter(|source| !is_test(&source.name)).collect();
    assert!(sources.len() > 20, "the sources are there");
    sources
}

fn is_test(name: &str) -> bool {
    name.ends_with("_tests.rs") || name.starts_with("src/store/contract")
}

/// Fails with all places at once.
#[track_caller]
pub fn none(rule: &str, places: Vec<String>) {
    assert!(places.is_empty(), "{rule}:\n{}", places.join("\n"));
}

#[test]
fn floors_import_downwards_only() {
    const LEAVES: &[&str] = &["answers", "backoff", "clock", "error", "config", "memory", "metrics", "security", "telemetry"];
    const FLOORS: [(&str, &[&str]); 4] = [
        ("domain", &[]),
        ("store", &["domain"]),
        ("engine", &["domain", "store"]),
        ("api", &["domain", "engine", "pb", "client"]),
    ];
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((floor, below)) = FLOORS.into_iter().find(|(floor, _)| *floor == source.floor()) else { continue };
        for (number, line) in source.lines() {
            for import in line.split("crate::").skip(1) {
                let module = import.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap_or_default();
                let leaf = floor != "domain" && LEAVES.contains(&module);
                if module != floor && !below.contains(&module) && !leaf {
                    wrong.push(format!("{}:{number}: `{floor}` must not use `{module}`", source.name));
                }
            }
        }
    }
    none("floors import downwards only", wrong);
}

#[test]
fn rooms_of_the_engine_import_downwards_only() {
    let height = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.floor() == "engine") {
        let Some(own) = source.name.split('/').nth(2).and_then(height) else { continue };
        for (number, line) in source.lines() {
            for import in line.split("crate::engine::").skip(1) {
                let room = import.split(':').next().unwrap_or_default();
                if height(room).is_none_or(|room| room > own) {
                    wrong.push(format!("{}:{number}: `{}` must not use `{room}`", source.name, ROOMS[own]));
                }
            }
        }
    }
    none("rooms import downwards only", wrong);
}

#[test]
fn files_of_one_room_or_floor_do_not_import_each_other_in_a_circle() {
    let sources = sources();
    let module = |name: &str| name.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
    let modules: Vec<String> = sources.iter().map(|source| module(&source.name)).collect();
    let imports = |source: &Source| -> Vec<usize> {
        let lines: Vec<&str> = source.lines().map(|(_, line)| line).filter(|line| line.contains("crate::")).collect();
        let imported = |line: &str, module: &str| line.contains(&format!("crate::{module}::"));
        // The innermost module that a path names is the one it means.
        let innermost =
            |line: &&str| (0..modules.len()).filter(|i| imported(line, &modules[*i])).max_by_key(|i| modules[*i].len());
        lines.iter().filter_map(innermost).collect()
    };
    let mut left: HashMap<usize, Vec<usize>> = (0..).zip(&sources).map(|(i, source)| (i, imports(source))).collect();
    loop {
        let free: Vec<usize> = left
            .iter()
            // A file may use its own directory: `lane/recovery.rs` is a part of `lane.rs`.
            .filter(|(i, uses)| uses.iter().all(|used| !left.contains_key(used) || is_part(&modules, **i, *used)))
            .map(|(i, _)| *i)
            .collect();
        if free.is_empty() {
            break;
        }
        free.iter().for_each(|i| drop(left.remove(i)));
    }
    none("no circles", left.keys().map(|i| sources[*i].name.clone()).collect());
}

fn is_part(modules: &[String], one: usize, other: usize) -> bool {
    let (one, other) = (&modules[one], &modules[other]);
    one == other || one.starts_with(&format!("{other}::")) || other.starts_with(&format!("{one}::"))
}

#[test]
fn the_picture_of_the_rooms_is_right() {
    let text = fs::read_to_string(package().join("docs/architecture.md")).expect("docs/architecture.md");
    let drawn: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    engine/")?.split_whitespace().next()).collect();
    let lowest_last: Vec<&str> = ROOMS.iter().rev().copied().collect();
    assert_eq!(drawn, lowest_last, "the rooms in docs/architecture.md, the highest first");
    let map = fs::read_to_string(package().join("src/engine/mod.rs")).expect("src/engine/mod.rs");
    let listed: Vec<&str> = map.lines().filter_map(|line| line.strip_prefix("//! | [`")?.split('`').next()).collect();
    assert_eq!(listed, ROOMS, "the rooms in src/engine/mod.rs");
}

#[test]
fn a_file_holds_one_idea() {
    let long = |source: &&Source| source.text.lines().count() > MAX_FILE_LINES;
    let wrong = sources().iter().filter(long).map(|source| format!("{}: {}", source.name, source.text.lines().count())).collect();
    none("no file is longer than 450 lines", wrong);
}

#[test]
fn each_floor_keeps_to_its_own_outside_world() {
    const FOREIGN: [(&str, &[&str]); 4] = [
        ("domain", &["tonic", "axum", "sqlx", "tokio", "pb::", "serde"]),
        ("store", &["tonic", "axum", "pb::"]),
        ("engine", &["tonic", "axum", "sqlx", "pb::", "\"SELECT ", "\"INSERT ", "\"UPDATE ", "\"DELETE "]),
        ("api", &["sqlx", "crate::store"]),
    ];
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((floor, foreign)) = FOREIGN.into_iter().find(|(floor, _)| *floor == source.floor()) else { continue };
        for (number, line) in source.lines() {
            for word in foreign.iter().filter(|word| line.contains(*word)) {
                wrong.push(format!("{}:{number}: `{word}` has no place in `{floor}`", source.name));
            }
        }
    }
    none("each floor keeps to its own", wrong);
}

#[test]
fn nothing_in_the_product_unwraps() {
    let mut wrong = Vec::new();
    for source in sources() {
        // What is compiled into the program cannot be wrong on one machine and right on another: a test has seen it.
        let unwraps = |line: &str| line.contains(".unwrap()") || line.contains(".expect(") && !line.contains("\"compiled in: ");
        for (number, line) in source.lines().filter(|(_, line)| unwraps(line)) {
            wrong.push(format!("{}:{number}: {}", source.name, line.trim()));
        }
    }
    none("an error is handled or passed on", wrong);
}

#[test]
fn nothing_in_the_product_panics_when_its_output_is_closed() {
    let mut wrong = Vec::new();
    for source in sources() {
        let prints = |line: &str| ["print!(", "println!(", "dbg!("].iter().any(|word| line.contains(word));
        for (number, line) in source.lines().filter(|(_, line)| prints(line)) {
            wrong.push(format!("{}:{number}: {}", source.name, line.trim()));
        }
    }
    none("output is written by `write!`, and may be closed", wrong);
}

#[test]
fn only_the_clock_asks_for_the_time_of_day() {
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| source.name != "src/clock.rs") {
        for (number, _) in source.lines().filter(|(_, line)| line.contains("SystemTime")) {
            wrong.push(format!("{}:{number}", source.name));
        }
    }
    none("`now` is an argument", wrong);
}

#[test]
fn a_function_fits_a_screen() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.text.lines().collect();
        for (start, line) in lines.iter().enumerate().filter(|(_, line)| is_function(line)) {
            // rustfmt puts the closing brace under the first word of the function.
            let indent = &line[..line.len() - line.trim_start().len()];
            let end = lines[start..].iter().position(|line| *line == format!("{indent}}}"));
            let length = end.unwrap_or_else(|| panic!("{}:{}: no end", source.name, start + 1));
            if length > MAX_FUNCTION_LINES {
                wrong.push(format!("{}:{}: {length} lines", source.name, start + 1));
            }
        }
    }
    none("a function fits a screen", wrong);
}

fn is_function(line: &str) -> bool {
    let line = line.trim_start();
    let bare = line.trim_start_matches("pub ").trim_start_matches("pub(super) ").trim_start_matches("pub(crate) ");
    let bare = bare.trim_start_matches("const ").trim_start_matches("async ");
    bare.starts_with("fn ") && !line.ends_with(['}', ';'])
}

/// Names as they are exposed: a counter ends in `_total`.
pub fn metric_names(source: &str) -> Vec<String> {
    let flat = source.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut names = Vec::new();
    for (call, is_family) in [("r.family(", true), ("r.add(", false), ("r.gauges(", false)] {
        for registered in flat.split(call).skip(1) {
            let registered = registered.split(" r.").next().unwrap_or_default();
            let name = registered.split('"').nth(1).unwrap_or_default();
            let total = if is_family || registered.contains("Counter::default()") { "_total" } else { "" };
            names.push(format!("im_presence_{name}{total}"));
        }
    }
    names
}

#[test]
fn metrics_are_named_as_they_are_exposed() {
    let source = r#"Self { a: r.family("binds", "x"), b: r.add( "hits", "y", Counter::default(), ), c: r.add("up", "z", Gauge::default()) }"#;
    assert_eq!(metric_names(source), ["im_presence_binds_total", "im_presence_hits_total", "im_presence_up"]);
}
