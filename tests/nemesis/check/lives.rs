//! No epoch is given twice, and nobody is where no gateway is any more.

use std::collections::HashMap;
use std::collections::HashSet;

use crate::check::Bounds;
use crate::check::Violation;
use crate::history::At;
use crate::history::History;
use crate::history::Life;

pub fn complaints(history: &History, bounds: &Bounds) -> Vec<Violation> {
    let (mut complaints, mut epochs) = (Vec::new(), HashSet::new());
    for life in history.lives.iter().filter(|life| !epochs.insert(life.epoch)) {
        complaints.push(Violation { rule: "an epoch was given twice", what: format!("{life:?}") });
    }
    let lives: HashMap<u64, &Life> = history.lives.iter().map(|life| (life.epoch, life)).collect();
    for query in history.queries.iter().chain(&history.last_queries) {
        for route in &query.routes {
            let Some(life) = lives.get(&route.epoch) else { continue };
            let dead_at =
                if route.is_suspect { gone_at(life, history.healed, bounds) } else { dead_at(life, history.healed, bounds) };
            if let Some(at) = dead_at.filter(|at| query.span.began > *at) {
                let what = format!("{life:?}, certainly dead at {at}; {query:?}");
                complaints.push(Violation { rule: "a route of a gateway that is dead", what });
            }
        }
    }
    complaints
}

/// From when on no node may take its routes for live.
fn dead_at(life: &Life, healed: At, bounds: &Bounds) -> Option<At> {
    let over = life.over.map(|at| at + bounds.over);
    [over, gone_at(life, healed, bounds)].into_iter().flatten().min()
}

/// From when on no node may show its routes at all. Nobody is declared dead while the database or the nodes cannot be reached.
fn gone_at(life: &Life, healed: At, bounds: &Bounds) -> Option<At> {
    let ended = life.over.or(life.silent)?;
    Some(ended.max(healed) + bounds.silent)
}
