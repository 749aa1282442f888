//! Watchers are never taken back, and know in the end what is true.

use std::collections::HashMap;

use crate::check::Violation;
use crate::history::History;
use crate::history::Query;
use crate::history::Told;

pub fn complaints(history: &History) -> Vec<Violation> {
    let (mut last, mut complaints) = (HashMap::<(usize, i64), &Told>::new(), Vec::new());
    for told in &history.told {
        if let Some(before) = last.insert((told.watcher, told.user), told)
            && before.version > told.version
        {
            let what = format!("{told:?} after {before:?}");
            complaints.push(Violation { rule: "a watcher was taken back", what });
        }
    }
    let truth = history.last_queries.iter().filter(|query| query.max_staleness_ms == Some(0));
    let truth: HashMap<i64, &Query> = truth.map(|query| (query.user, query)).collect();
    for (watcher, users) in history.watchers.iter().enumerate() {
        for query in users.iter().filter_map(|user| truth.get(user)) {
            let told = last.get(&(watcher, query.user));
            if told.is_none_or(|told| told.status != query.status || told.is_online != query.is_online) {
                let what = format!("watcher {watcher} knows {told:?}; {query:?}");
                complaints.push(Violation { rule: "a watcher does not know what is true", what });
            }
        }
    }
    complaints
}
