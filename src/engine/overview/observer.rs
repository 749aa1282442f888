//! Finds out what has happened: once a second it compares what this node knows with what it knew. So nothing that does things
//! has to tell anybody, and each node tells of what others have done, too.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::timeout;

use crate::domain::drain::Drain;
use crate::domain::drain::DrainState;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::domain::time::Timestamp;
use crate::domain::time::written_time;
use crate::engine::messages::peers::Peers;
use crate::engine::overview::events::Events;
use crate::engine::overview::events::Kind;
use crate::engine::overview::events::RING;
use crate::engine::overview::kept::Kept;
use crate::engine::overview::survey::Survey;
use crate::engine::read::audit_log::AuditLog;
use crate::engine::read::audit_log::AuditPage;
use crate::engine::read::audit_log::AuditPlace;
use crate::engine::read::lives::Lives;
use crate::store::cluster::Hold;

/// Between two looks.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two looks at what only SQL knows: drains, and the audit of other nodes.
const SQL_INTERVAL: Duration = Duration::from_secs(2);
/// How long such a look may keep the others waiting.
const SQL_LIMIT: Duration = Duration::from_secs(3);
/// A row of the audit that can be read so long after its time is still told: who wrote it may have waited for its commit.
const LATE_ROWS: Duration = Duration::from_secs(300);
/// Rows of one look. Of more, only the newest are told: the others would not be kept either.
const ROWS: u32 = RING as u32;
/// What may be wrong with a node.
type Degraded = dyn Fn() -> Vec<&'static str> + Send + Sync;

pub struct Observer {
    events: Arc<Events>,
    lives: Arc<Lives>,
    peers: Arc<Peers>,
    survey: Arc<Kept<Survey>>,
    audit: AuditLog,
    degraded: Box<Degraded>,
    seen: Seen,
}

/// What the last look has left. None: there was none.
#[derive(Default)]
struct Seen {
    /// Lives that are over, and whether that was told.
    ended: Option<HashMap<Epoch, bool>>,
    hold: Option<Hold>,
    /// Incarnation and whether it is about to stop, by id.
    nodes: Option<BTreeMap<String, (String, bool)>>,
    degraded: BTreeSet<&'static str>,
    drains: Option<HashMap<String, DrainState>>,
    /// Rows of the audit that were there at the last look.
    audit: Option<HashSet<AuditPlace>>,
    /// From when on it looked. That does not go back while the clock does not, or rows would be told twice.
    since: Timestamp,
}

impl Observer {
    pub fn new(
        events: Arc<Events>,
        lives: Arc<Lives>,
        peers: Arc<Peers>,
        survey: Arc<Kept<Survey>>,
        audit: AuditLog,
        degraded: impl Fn() -> Vec<&'static str> + Send + Sync + 'static,
    ) -> Self {
        Self { events, lives, peers, survey, audit, degraded: Box::new(degraded), seen: Seen::default() }
    }

    /// Looks at what this node knows.
    pub fn look(&mut self) {
        self.deaths();
        self.hold();
        self.nodes();
        self.parts();
    }

    /// Looks at what only SQL knows. Whatever cannot be read now is found later.
    pub async fn look_into_sql(&mut self) {
        let _ = timeout(SQL_LIMIT, self.ask_sql()).await;
    }

    async fn ask_sql(&mut self) {
        if let Ok(survey) = self.survey.newest(SQL_INTERVAL).await {
            self.drains(&survey.drains);
        }
        self.audit().await;
    }

    /// A death that another node has told of is told once SQL has said why: it may be none.
    fn deaths(&mut self) {
        let table = self.lives.table();
        let over = table.iter().filter(|life| life.is_managed() && !life.is_alive());
        let Some(known) = self.seen.ended.take() else {
            self.seen.ended = Some(over.map(|life| (life.epoch, true)).collect());
            return;
        };
        let mut now = HashMap::new();
        for life in over {
            let was_told = known.get(&life.epoch).copied().unwrap_or_default();
            now.insert(life.epoch, was_told || self.death(life));
        }
        self.seen.ended = Some(now);
    }

    /// False: why is not known yet.
    fn death(&self, life: &Life) -> bool {
        let Some(end) = life.end else { return false };
        let why = match end.reason {
            EndReason::Expired => "its lease ran out",
            EndReason::Held => "its lease ran out during a hold",
            EndReason::Operator => "an operator said so",
            EndReason::Superseded | EndReason::Deregistered => return true, // it lives on, or has said good-bye
            EndReason::Untold => return false,
        };
        let (gateway, connections) = (life.gateway.as_str(), life.connections);
        let says = format!("gateway {gateway} is dead: {why}; it had {connections} connections");
        let about = json!({ "gateway_addr": gateway, "epoch": life.epoch.0.to_string(), "why": why, "connections": connections });
        self.events.push(Kind::Death, end.at, says, about);
        true
    }

    fn hold(&mut self) {
        let Some(cluster) = self.lives.cluster() else { return };
        let now = self.lives.clock.now();
        let hold = if cluster.hold.is_on(now) { cluster.hold.clone() } else { Hold::default() };
        let before = self.seen.hold.replace(hold.clone());
        let Some(before) = before.or_else(|| (hold != Hold::default()).then(Hold::default)) else { return };
        let was_on = before != Hold::default();
        let (state, says) = match (was_on, hold != Hold::default()) {
            (false, true) => {
                ("began", format!("no gateway is declared dead until {}: {}", written_time(hold.until), hold.reason))
            }
            (true, true) if hold.until != before.until || hold.reason != before.reason => {
                ("changed", format!("no gateway is declared dead until {} now: {}", written_time(hold.until), hold.reason))
            }
            (true, false) => ("ended", "the hold is over: gateways whose lease is over are declared dead".to_owned()),
            _ => return,
        };
        let about = json!({ "state": state, "until_ms": hold.until.0, "reason": hold.reason });
        self.events.push(Kind::Hold, now, says, about);
    }

    fn nodes(&mut self) {
        let listed = self.peers.listed();
        if listed.is_empty() {
            return; // the database was not read yet
        }
        let nodes: BTreeMap<_, _> =
            listed.iter().map(|node| (node.name.node_id.clone(), (node.name.incarnation.clone(), node.draining))).collect();
        let before = self.seen.nodes.replace(nodes.clone()).unwrap_or_default();
        let (now, own) = (self.lives.clock.now(), &self.peers.own.node_id);
        let tell = |id: &str, state: &str, words: &str| {
            let says = format!("node {id}{} {words}", if id == own { " (this one)" } else { "" });
            self.events.push(Kind::Node, now, says, json!({ "node_id": id, "state": state }));
        };
        for (id, (incarnation, draining)) in &nodes {
            match before.get(id) {
                None => tell(id, "came", "is there"),
                Some((other, _)) if other != incarnation => tell(id, "restarted", "is there again, as another process"),
                Some((_, false)) if *draining => tell(id, "draining", "is about to stop"),
                Some(_) => {}
            }
        }
        before.keys().filter(|id| !nodes.contains_key(*id)).for_each(|id| tell(id, "gone", "is gone"));
    }

    fn parts(&mut self) {
        let parts: BTreeSet<&'static str> = (self.degraded)().into_iter().collect();
        let (now, node_id) = (self.lives.clock.now(), &self.peers.own.node_id);
        let tell = |part: &str, state: &str, words: &str| {
            let about = json!({ "node_id": node_id, "part": part, "state": state });
            self.events.push(Kind::Degraded, now, format!("node {node_id} {words}: {part}"), about);
        };
        parts.difference(&self.seen.degraded).for_each(|part| tell(part, "began", "is degraded"));
        self.seen.degraded.difference(&parts).for_each(|part| tell(part, "ended", "is well again"));
        self.seen.degraded = parts;
    }

    fn drains(&mut self, drains: &[Drain]) {
        let now = self.lives.clock.now();
        let states = drains.iter().map(|drain| (drain.id.clone(), drain.state)).collect();
        let Some(before) = self.seen.drains.replace(states) else { return };
        for drain in drains.iter().filter(|drain| before.get(&drain.id) != Some(&drain.state)) {
            let (gateway, state) = (drain.gateway.as_str(), drain.state.name());
            let says = format!("drain of {gateway}: {state}, {} of {} users are left", drain.left, drain.users);
            let about = json!({
                "id": drain.id, "gateway_addr": gateway, "epoch": drain.epoch.0.to_string(), "state": state,
                "users": drain.users, "left": drain.left, "reason": drain.terms.reason,
            });
            self.events.push(Kind::Drain, now, says, about);
        }
    }

    async fn audit(&mut self) {
        let now = self.lives.clock.now();
        let mut from = now.minus(LATE_ROWS);
        // Whatever is there at the first look is past, and so it is when the database's clock was set back.
        let begins = self.seen.audit.is_none() || from.plus(SQL_LIMIT) < self.seen.since;
        if !begins {
            from = from.max(self.seen.since);
        }
        // Who may do nothing must not push deaths out of the ring.
        let page = AuditPage { who: None, action: None, with_denied: false, from, before: None, limit: ROWS };
        let Ok(rows) = self.audit.page(page).await else { return };
        let there = rows.iter().map(|row| row.place.clone()).collect();
        let before = self.seen.audit.replace(there).unwrap_or_default();
        self.seen.since = from;
        let past = now.minus(SQL_INTERVAL);
        for row in rows.iter().rev() {
            let place = &row.place;
            if before.contains(place) || begins && place.at < past {
                continue;
            }
            let on = prefixed(" on ", &row.target);
            let who = match (row.who.as_str(), row.from_addr.as_str()) {
                ("", "") => place.node_id.as_str(), // what nobody has asked for
                ("", _) => "somebody",
                (who, _) => who,
            };
            let says = format!(
                "{who}: {}{on}{}: {}{}",
                row.action,
                prefixed(", ", &row.args),
                row.outcome,
                prefixed("; reason: ", &row.reason)
            );
            let about = json!({
                "node_id": place.node_id, "who": row.who, "role": row.role, "from_addr": row.from_addr, "action": row.action,
                "target": row.target, "args": row.args, "outcome": row.outcome, "reason": row.reason,
            });
            self.events.push(Kind::Audit, place.at, says, about);
        }
    }
}

/// Nothing, if there is no text.
fn prefixed(prefix: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{prefix}{text}") }
}
