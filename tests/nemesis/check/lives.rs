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
    let dead: HashMap<u64, (&Life, At)> =
        history.lives.iter().filter_map(|life| Some((life.epoch, (life, dead_at(life, history.healed, bounds)?)))).collect();
    for query in history.queries.iter().chain(&history.last_queries) {
        for route in query.routes.iter().filter(|route| !route.is_suspect) {
            let Some((life, at)) = dead.get(&route.epoch) else { continue };
            if query.span.began > *at {
                let what = format!("{life:?}, certainly dead at {at}; {query:?}");
                complaints.push(Violation { rule: "a route of a gateway that is dead", what });
            }
        }
    }
    complaints
}

/// From when on no node may take its routes for live. Nobody is declared dead while the database or the nodes cannot be reached.
fn dead_at(life: &Life, healed: At, bounds: &Bounds) -> Option<At> {
    let over = life.over.map(|at| at + bounds.over);
    let silent = life.silent.map(|at| at.max(healed) + bounds.silent);
    [over, silent].into_iter().flatten().min()
}
