//! The documents agree with the product: links lead somewhere, and what can be configured, counted or answered stands there.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::path::PathBuf;

use im_presence::api::access::RULES;
use im_presence::domain::caller::Role;

use crate::tidy::metric_names;
use crate::tidy::none;
use crate::tidy::package;

const README_LINES: usize = 150;
const README_COLUMNS: usize = 120;

struct Document {
    path: PathBuf,
    text: String,
}

impl Document {
    fn read(name: &str) -> Self {
        let path = package().join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        Self { path, text }
    }

    fn all() -> Vec<Self> {
        let docs = fs::read_dir(package().join("docs")).expect("docs");
        let docs = docs.map(|entry| format!("docs/{}", entry.expect("a file").file_name().to_string_lossy()));
        let others = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benches/README.md"].map(str::to_owned);
        docs.filter(|name| name.ends_with(".md")).chain(others).map(|name| Self::read(&name)).collect()
    }

    /// Targets of links, with their lines.
    fn links(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().flat_map(|(n, line)| {
            line.split("](").skip(1).filter_map(move |rest| rest.split_once(')').map(|(target, _)| (n + 1, target)))
        })
    }

    /// What a heading can be linked by.
    fn anchors(&self) -> HashSet<String> {
        let headings = self.text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
        let anchor = |heading: &str| {
            let kept = heading.to_lowercase().replace(' ', "-");
            kept.chars().filter(|c| c.is_alphanumeric() || *c == '-').collect()
        };
        headings.map(anchor).collect()
    }
}

#[test]
fn the_table_of_who_may_make_which_call_is_the_one_that_decides() {
    const ROLES: [Role; 5] = [Role::Gateway, Role::Service, Role::Viewer, Role::Operator, Role::Node];
    let document = Document::read("docs/security.md");
    let rows: Vec<Vec<&str>> = document.text.lines().map(|line| line.split('|').map(str::trim).collect()).collect();
    let rows = || rows.iter().skip_while(|row| row.get(1) != Some(&"call")).skip(2).take_while(|row| row.len() == 8);
    let mut wrong = Vec::new();
    for rule in RULES.iter().filter(|rule| !rule.is_open()) {
        let page = format!("`{}`", rule.call.replace("GET /metrics", "/metrics"));
        let call = rule.call.rsplit_once("Service/").map_or(&*page, |(_, call)| call);
        let of: Vec<_> = rows().filter(|row| row[1].split(", ").any(|named| named == call)).collect();
        let may: Vec<bool> = ROLES.into_iter().map(|role| rule.allows(role)).collect();
        let told: Vec<Vec<bool>> = of.iter().map(|row| row[2..7].iter().map(|cell| !cell.is_empty()).collect()).collect();
        if told != [may] {
            wrong.push(format!("{call}: {of:?}"));
        }
    }
    none("docs/security.md says once of each call who may make it", wrong);
}

#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    for document in Document::all() {
        for (line, target) in document.links().filter(|(_, target)| !target.contains("://")) {
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => document.path.clone(),
                file => document.path.parent().unwrap_or(Path::new("")).join(file),
            };
            let is_there = path.exists();
            let has_anchor = anchor.is_empty()
                || fs::read_to_string(&path).is_ok_and(|text| Document { path, text }.anchors().contains(anchor));
            if !is_there || !has_anchor {
                wrong.push(format!("{}:{line}: {target}", document.path.display()));
            }
        }
    }
    none("every link leads somewhere", wrong);
}

#[test]
fn the_readme_is_short() {
    let readme = Document::read("README.md");
    let long = readme.text.lines().enumerate().filter(|(_, line)| line.chars().count() > README_COLUMNS);
    none("no line of the README is longer than 120 columns", long.map(|(n, _)| (n + 1).to_string()).collect());
    assert!(readme.text.lines().count() <= README_LINES, "{} lines", readme.text.lines().count());
}

#[test]
fn every_metric_stands_in_the_operations() {
    let operations = Document::read("docs/operations.md").text;
    let read = |name| fs::read_to_string(package().join(name)).expect("a source file");
    let names =
        metric_names(&[read("src/metrics.rs"), read("src/metrics/security.rs"), read("src/metrics/allocation.rs")].concat());
    assert!(names.len() > 15, "the metrics were found: {names:?}");
    let missing = names.into_iter().filter(|name| !operations.contains(&format!("`{name}")));
    none("every metric stands in docs/operations.md, as `name`", missing.collect());
}

#[test]
fn every_configuration_key_stands_in_the_configuration() {
    let configuration = Document::read("docs/configuration.md").text;
    let (mut section, mut missing, mut keys) = (String::new(), Vec::new(), 0);
    for line in fs::read_to_string(package().join("config/default.toml")).expect("the defaults").lines() {
        let line = line.strip_prefix('#').unwrap_or(line);
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            name.clone_into(&mut section);
        } else if let Some((key, _)) = line.split_once(" = ").filter(|(key, _)| !key.contains(' ')) {
            keys += 1;
            let row = configuration.lines().find(|row| row.starts_with(&format!("| `[{section}]` |"))).unwrap_or_default();
            if !row.contains(&format!("`{key}`")) {
                missing.push(format!("{section}.{key}"));
            }
        }
    }
    assert!(keys > 40, "the keys were found: {keys}");
    none("every configuration key stands in docs/configuration.md", missing);
}

#[test]
fn every_code_stands_with_what_to_do_about_it() {
    let (messages, mut missing) = (Document::read("docs/messages.md").text, Vec::new());
    let codes = fs::read_to_string(package().join("proto/mpim/common.proto")).expect("the codes");
    let codes = codes.lines().skip_while(|line| !line.starts_with("enum Code")).skip(1).take_while(|line| *line != "}");
    for code in codes.filter(|line| !line.contains("never sent: ")).filter_map(|line| line.trim().split_once(" = ")) {
        if !messages.lines().any(|row| row.starts_with('|') && row.split('|').nth(1).is_some_and(|cell| cell.contains(code.0))) {
            missing.push(code.0.to_owned());
        }
    }
    none("every code stands in the table of docs/messages.md", missing);
}
