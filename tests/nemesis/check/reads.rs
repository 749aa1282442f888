//! No reader is taken back in time, and no answer is further behind than it says.

use std::collections::HashMap;

use crate::check::Violation;
use crate::history::At;
use crate::history::History;
use crate::history::Outcome;
use crate::history::Query;
use crate::history::Span;

const MS: At = 1_000;

/// A version that somebody was told.
#[derive(Clone, Copy)]
struct Known {
    node: usize,
    span: Span,
    version: u64,
}

pub fn complaints(history: &History) -> Vec<Violation> {
    let mut changes: HashMap<i64, Vec<Known>> = HashMap::new();
    for (user, known) in acknowledged(history) {
        changes.entry(user).or_default().push(known);
    }
    let mut answers = changes.clone();
    for query in queries(history) {
        answers.entry(query.user).or_default().push(Known { node: query.node, span: query.span, version: query.version });
    }
    let mut complaints = order(&changes);
    for query in queries(history) {
        let changes = changes.get(&query.user).map_or(&[][..], Vec::as_slice);
        let reborn =
            history.kills.iter().filter(|(node, at)| *node == query.node && *at <= query.span.ended).map(|(_, at)| *at).max();
        let own =
            answers[&query.user].iter().filter(|known| known.node == query.node && reborn.is_none_or(|at| known.span.began > at));
        let age = At::from(query.age_ms) * MS + MS; // told in whole milliseconds
        for (known, rule) in [
            (newest(changes.iter(), query.span.began.checked_sub(age)), "an answer is further behind than it says"),
            (newest(own, Some(query.span.began)), "a node's answer is older than a former one of it"),
            (durable(query, changes), "a read of the database is older than what was acknowledged"),
        ] {
            if let Some(known) = known.filter(|known| known.version > query.version) {
                let what =
                    format!("version {} was known through node {} at {:?}; {query:?}", known.version, known.node, known.span);
                complaints.push(Violation { rule, what });
            }
        }
        if query.max_staleness_ms.is_some_and(|limit| query.age_ms > limit) {
            complaints.push(Violation { rule: "an answer is older than was asked for", what: format!("{query:?}") });
        }
    }
    complaints
}

fn queries(history: &History) -> impl Iterator<Item = &Query> {
    history.queries.iter().chain(&history.last_queries)
}

/// Changes that were carried out, with the version that each made.
fn acknowledged(history: &History) -> impl Iterator<Item = (i64, Known)> {
    let binds = history.binds.iter().filter_map(|bind| match &bind.outcome {
        Outcome::Done(bound) => Some((bind.user, Known { node: bind.node, span: bind.span, version: bound.version })),
        _ => None,
    });
    let unbinds = history.unbinds.iter().filter_map(|unbind| match unbind.outcome {
        Outcome::Done(Some(version)) => Some((unbind.user, Known { node: unbind.node, span: unbind.span, version })),
        _ => None,
    });
    binds.chain(unbinds)
}

fn newest<'a>(known: impl Iterator<Item = &'a Known>, by: Option<At>) -> Option<&'a Known> {
    let by = by?;
    known.filter(|known| known.span.ended <= by).max_by_key(|known| known.version)
}

fn durable<'a>(query: &Query, changes: &'a [Known]) -> Option<&'a Known> {
    newest(changes.iter(), (query.max_staleness_ms == Some(0)).then_some(query.span.began))
}

/// Whoever asks after an answer has a higher version, and no two changes have the same.
fn order(changes: &HashMap<i64, Vec<Known>>) -> Vec<Violation> {
    let mut complaints = Vec::new();
    for (user, changes) in changes {
        for (place, change) in changes.iter().enumerate() {
            let before = newest(changes.iter(), Some(change.span.began));
            if let Some(before) = before.filter(|before| before.version >= change.version) {
                let what = format!(
                    "user {user}: version {} at {:?}, {} at {:?}",
                    before.version, before.span, change.version, change.span
                );
                complaints.push(Violation { rule: "the version of a change is not above that of one before", what });
            }
            if changes[..place].iter().any(|other| other.version == change.version) {
                complaints
                    .push(Violation { rule: "two changes have one version", what: format!("user {user}: {}", change.version) });
            }
        }
    }
    complaints
}
