//! What each user's routes are at each version, as far as the answers to binds and unbinds say.

use std::collections::HashMap;

use crate::check::Bounds;
use crate::check::Violation;
use crate::history::At;
use crate::history::Bind;
use crate::history::Bound;
use crate::history::History;
use crate::history::Life;
use crate::history::Message;
use crate::history::Outcome;
use crate::history::Query;
use crate::history::Seen;
use crate::history::Unbind;

#[derive(Default)]
struct Changes<'a> {
    binds: Vec<&'a Bind>,
    unbinds: Vec<&'a Unbind>,
}

pub struct Users<'a> {
    history: &'a History,
    bounds: &'a Bounds,
    changes: HashMap<i64, Changes<'a>>,
    lives: HashMap<u64, &'a Life>,
    by_conn: HashMap<&'a str, &'a Bind>,
}

/// What removed a route.
#[derive(Clone, Copy)]
struct End {
    version: u64,
    began: At,
}

impl<'a> Users<'a> {
    pub fn of(history: &'a History, bounds: &'a Bounds) -> Self {
        let mut changes: HashMap<i64, Changes> = HashMap::new();
        for bind in &history.binds {
            changes.entry(bind.user).or_default().binds.push(bind);
        }
        for unbind in &history.unbinds {
            changes.entry(unbind.user).or_default().unbinds.push(unbind);
        }
        let lives = history.lives.iter().map(|life| (life.epoch, life)).collect();
        let by_conn = history.binds.iter().map(|bind| (bind.conn.as_str(), bind)).collect();
        Self { history, bounds, changes, lives, by_conn }
    }

    pub fn complaints(&self) -> Vec<Violation> {
        let mut complaints = Vec::new();
        for query in self.history.queries.iter().chain(&self.history.last_queries) {
            complaints.extend(self.lost(query));
            complaints.extend(query.routes.iter().filter_map(|route| self.ghost(query, route)));
        }
        complaints
    }

    /// Binds that have to be in this answer and are not.
    fn lost(&self, query: &Query) -> Vec<Violation> {
        let Some(changes) = self.changes.get(&query.user) else { return Vec::new() };
        let newest = newest_of_each_device(changes, query.version);
        let lost = newest.into_iter().filter(|(bind, bound)| {
            let is_there = query.routes.iter().any(|route| route.conn == bind.conn);
            let removed = end(changes, bind, bound).is_some_and(|end| end.version <= query.version);
            !is_there
                && !removed
                && self.lives_until(bind.epoch, query.span.ended)
                && self.is_certain(changes, bind, query.span.ended)
        });
        lost.map(|(bind, _)| violation("an acknowledged bind is gone", format!("{bind:?} is not in {query:?}"))).collect()
    }

    /// Why this route must not be in this answer.
    fn ghost(&self, query: &Query, route: &Seen) -> Option<Violation> {
        const RULE: &str = "a route that must not be there";
        let Some(bind) = self.by_conn.get(route.conn.as_str()) else {
            return Some(violation(RULE, format!("nobody has bound {route:?} in {query:?}")));
        };
        if bind.user != query.user || bind.device != route.device || bind.epoch != route.epoch {
            return Some(violation(RULE, format!("{bind:?} looks different in {query:?}")));
        }
        let changes = self.changes.get(&query.user)?;
        match &bind.outcome {
            Outcome::Refused => Some(violation(RULE, format!("{bind:?} was refused, and is in {query:?}"))),
            Outcome::Done(bound) if bound.version > query.version => {
                Some(violation(RULE, format!("{bind:?} is newer than the version of {query:?}")))
            }
            Outcome::Done(bound) => {
                let end = end(changes, bind, bound).filter(|end| end.version <= query.version)?;
                Some(violation(RULE, format!("{bind:?} ended with version {}, and is in {query:?}", end.version)))
            }
            Outcome::Unknown => {
                let end = kicked(changes, &route.key).filter(|end| end.version <= query.version)?;
                Some(violation(RULE, format!("{bind:?} was kicked with version {}, and is in {query:?}", end.version)))
            }
        }
    }

    /// The bind that makes its user reachable all the time a message was under way, if there is one.
    pub fn surely_online(&self, message: &Message) -> Option<&'a Bind> {
        let changes = self.changes.get(&message.user)?;
        let (began, ended) = (message.span.began, message.span.ended);
        changes.binds.iter().copied().find(|bind| {
            let Outcome::Done(bound) = &bind.outcome else { return false };
            bind.span.ended <= began
                && end(changes, bind, bound).is_none_or(|end| end.began >= ended)
                && self.lives_until(bind.epoch, ended)
                && self.is_certain(changes, bind, ended)
        })
    }

    /// A life is not over if it was heard later.
    fn lives_until(&self, epoch: u64, at: At) -> bool {
        self.lives.get(&epoch).is_some_and(|life| life.last_beat >= at)
    }

    /// No call without an answer can have removed the route of `bind` by `until`.
    fn is_certain(&self, changes: &Changes, bind: &Bind, until: At) -> bool {
        let Outcome::Done(bound) = &bind.outcome else { return false };
        let may_act = |began: At, ended: At| began <= until && ended + self.bounds.late >= bind.span.began;
        let binds = changes.binds.iter().filter(|other| matches!(other.outcome, Outcome::Unknown));
        let unbinds = changes.unbinds.iter().filter(|other| matches!(other.outcome, Outcome::Unknown) && other.key == bound.key);
        let mut spans = binds.map(|bind| bind.span).chain(unbinds.map(|unbind| unbind.span));
        !spans.any(|span| may_act(span.began, span.ended))
    }
}

fn newest_of_each_device<'a>(changes: &Changes<'a>, version: u64) -> Vec<(&'a Bind, &'a Bound)> {
    let mut newest: HashMap<&str, (&Bind, &Bound)> = HashMap::new();
    for bind in changes.binds.iter().copied() {
        let Outcome::Done(bound) = &bind.outcome else { continue };
        if bound.version <= version && newest.get(bind.device.as_str()).is_none_or(|(_, other)| other.version < bound.version) {
            newest.insert(&bind.device, (bind, bound));
        }
    }
    newest.into_values().collect()
}

/// What removed the route of a bind, by any answer.
fn end(changes: &Changes, bind: &Bind, bound: &Bound) -> Option<End> {
    let unbound = changes.unbinds.iter().filter_map(|unbind| match unbind.outcome {
        Outcome::Done(Some(version)) if unbind.key == bound.key => Some(End { version, began: unbind.span.began }),
        _ => None,
    });
    let replaced = changes.binds.iter().filter_map(|other| match &other.outcome {
        Outcome::Done(newer) if other.device == bind.device && newer.version > bound.version => {
            Some(End { version: newer.version, began: other.span.began })
        }
        _ => None,
    });
    unbound.chain(replaced).chain(kicked(changes, &bound.key)).min_by_key(|end| end.version)
}

fn kicked(changes: &Changes, key: &str) -> Option<End> {
    let kicks = changes.binds.iter().filter_map(|other| match &other.outcome {
        Outcome::Done(newer) if newer.kicked.iter().any(|kicked| kicked == key) => {
            Some(End { version: newer.version, began: other.span.began })
        }
        _ => None,
    });
    kicks.min_by_key(|end| end.version)
}

fn violation(rule: &'static str, what: String) -> Violation {
    Violation { rule, what }
}
