//! One thing that the doctor looks at: whether it is as it should be, and what to do if not.

use std::time::Duration;

use crate::store::examination::Steps;

/// A database's clock and a node's may differ by so much.
const MAX_OFFSET: Duration = Duration::from_secs(1);
/// A certificate that ends sooner has to be renewed now.
const RENEW_BEFORE_S: i64 = 7 * 86_400;
const DAY_S: i64 = 86_400;
/// So much of the disk has to be free.
const MIN_FREE_BYTES: u64 = 512 * 1024 * 1024;
const MIB: u64 = 1024 * 1024;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub check: &'static str,
    pub ok: bool,
    pub says: String,
    /// What to do; empty: nothing.
    pub hint: &'static str,
}

/// Files that a process may have open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimit {
    pub limit: u64,
    /// Client connections that are configured, and those that fit beside what the node needs itself.
    pub wanted: usize,
    pub fits: usize,
}

impl Check {
    pub fn well(check: &'static str, says: impl Into<String>) -> Self {
        Self { check, ok: true, says: says.into(), hint: "" }
    }

    pub fn ill(check: &'static str, says: impl Into<String>, hint: &'static str) -> Self {
        Self { check, ok: false, says: says.into(), hint }
    }
}

/// `offset_ms`: how far this machine's clock is before the database's; it may be wrong by half of `read_in`.
pub fn clock(offset_ms: i64, read_in: Duration, has_stepped: bool) -> Check {
    let says = format!("this machine's clock is {offset_ms} ms from the database's");
    if has_stepped {
        return Check::ill("clock", "the database's clock was set within the last minute", "let NTP slew the clock, not set it");
    }
    match Duration::from_millis(offset_ms.unsigned_abs()) <= MAX_OFFSET + read_in {
        true => Check::well("clock", says),
        false => Check::ill(
            "clock",
            says,
            "run NTP (chronyd) on both machines: the ends of tokens and certificates are judged by this clock",
        ),
    }
}

pub fn schema(steps: &Steps) -> Check {
    let (newest, list) = (steps.newest, |steps: &[i64]| steps.iter().map(i64::to_string).collect::<Vec<_>>().join(", "));
    match (&steps.missing[..], &steps.unknown[..]) {
        ([], []) => Check::well("schema", format!("step {newest}, as this release needs it")),
        ([], newer) => Check::well("schema", format!("a newer release has laid step {}", list(newer))),
        (missing, _) => Check::ill(
            "schema",
            format!("the tables are old: step {} is not there", list(missing)),
            "start a node of this release with a database user who may CREATE and ALTER; it lays what is missing",
        ),
    }
}

/// `ends`: where each certificate is used, and when it ends, in Unix seconds.
pub fn certificates(ends: &[(String, i64)], now_s: i64) -> Check {
    let Some((r#use, end)) = ends.iter().min_by_key(|(_, end)| *end) else {
        return Check::well("certificates", "none are used");
    };
    let left = end - now_s;
    let days = left.unsigned_abs() / DAY_S.unsigned_abs();
    let hint = "renew it and put it in place of the file: it is read again within 5 s, without a restart";
    match left {
        ..=0 => Check::ill("certificates", format!("that of {use} ended {days} days ago"), hint),
        1..RENEW_BEFORE_S => Check::ill("certificates", format!("that of {use} ends in {days} days"), hint),
        _ => Check::well("certificates", format!("{} in use; the first to end is that of {use}, in {days} days", ends.len())),
    }
}

/// `differing`: keys that the system needs to be alike, and `silent` nodes that did not say what theirs are.
pub fn configuration(differing: &[String], silent: usize) -> Check {
    let unknown = if silent > 0 { format!("; {silent} nodes did not say") } else { String::new() };
    match differing {
        [] => Check::well("configuration", format!("alike on all nodes{unknown}")),
        keys => Check::ill(
            "configuration",
            format!("the nodes differ in {}{unknown}", keys.join(", ")),
            "see `ctl config --diff`, or the page of a node: give all nodes the same and restart those that differ",
        ),
    }
}

pub fn file_limit(limit: FileLimit) -> Check {
    let FileLimit { limit, wanted, fits } = limit;
    match fits >= wanted {
        true => Check::well("file_limit", format!("{limit} files: presence_service.max_connections = {wanted} fits")),
        false => Check::ill(
            "file_limit",
            format!("{limit} files: of presence_service.max_connections = {wanted} only {fits} fit"),
            "raise the limit: ulimit -n, LimitNOFILE= of the unit, or the container's; or lower max_connections",
        ),
    }
}

/// `free`: None: no file of this node's own.
pub fn disk(free: Option<u64>) -> Check {
    match free {
        None => Check::well("disk", "the database has its own"),
        Some(free) if free >= MIN_FREE_BYTES => Check::well("disk", format!("{} MiB are free for SQLite", free / MIB)),
        Some(free) => Check::ill(
            "disk",
            format!("only {} MiB are free for SQLite", free / MIB),
            "make room: when the disk is full no change is stored, and users are answered from memory only",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_may_differ_by_what_the_question_took() {
        for (offset_ms, read_in_ms, stepped, ok) in [
            (0, 1, false, true),
            (-900, 1, false, true),
            (1_500, 10, false, false),
            (1_500, 600, false, true),
            (0, 1, true, false),
        ] {
            let check = clock(offset_ms, Duration::from_millis(read_in_ms), stepped);
            assert_eq!((check.ok, check.hint.is_empty()), (ok, ok), "{check:?}");
        }
    }

    #[test]
    fn a_newer_schema_is_no_fault_and_an_older_one_is() {
        let steps = |missing: &[i64], unknown: &[i64]| Steps { newest: 6, missing: missing.into(), unknown: unknown.into() };
        for (steps, ok) in [(steps(&[], &[]), true), (steps(&[], &[7]), true), (steps(&[5, 6], &[]), false)] {
            assert_eq!(schema(&steps).ok, ok, "{steps:?}");
        }
    }

    #[test]
    fn the_certificate_that_ends_first_counts() {
        let ends = |days: &[i64]| days.iter().map(|days| ("data".to_owned(), days * DAY_S)).collect::<Vec<_>>();
        for (days, ok) in [(&[][..], true), (&[400, 30], true), (&[400, 6], false), (&[400, -1], false)] {
            assert_eq!(certificates(&ends(days), 0).ok, ok, "{days:?}");
        }
    }

    #[test]
    fn a_full_disk_and_too_few_files_are_faults() {
        assert!(disk(None).ok && disk(Some(MIN_FREE_BYTES)).ok && !disk(Some(MIN_FREE_BYTES - 1)).ok);
        assert!(file_limit(FileLimit { limit: 20_000, wanted: 1_000, fits: 1_000 }).ok);
        assert!(!file_limit(FileLimit { limit: 256, wanted: 1_000, fits: 16 }).ok);
    }
}
