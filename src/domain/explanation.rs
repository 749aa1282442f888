//! Why a user is online, suspect or offline: what each tier holds, what each route is worth, and one sentence about it.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::Liveness;
use crate::domain::history::Cause;
use crate::domain::id::Epoch;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::time::span;
use crate::domain::user::UserRecord;

/// Where a record may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tier {
    /// Of one node.
    Memory,
    /// Redis.
    Shared,
    /// SQL.
    Durable,
}

/// What one tier holds of a user.
#[derive(Clone, Debug, PartialEq)]
pub struct TierView {
    pub tier: Tier,
    pub present: bool,
    pub version: Version,
    pub shown_version: Version,
    /// Of the caches, that the record belongs to; 0: not known, or there is no Redis.
    pub generation: u64,
    /// How far it can be behind.
    pub age: Duration,
    /// Queries may be answered from it.
    pub trusted: bool,
    /// If not, why not; or why answers from it are suspect.
    pub why: String,
    pub routes: u32,
}

/// What another node holds of a user.
#[derive(Clone, Debug, PartialEq)]
pub struct Inspected {
    pub memory: TierView,
    pub lives_age: Duration,
    pub watchers: u32,
    /// Lives that routes of its record name, and that it takes for over.
    pub ended: Vec<Epoch>,
}

/// What a route is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Live,
    /// Its gateway has missed two beats.
    Late,
    /// The same, and a hold keeps it from being declared dead.
    Held,
    /// This node does not know well enough who lives.
    Unsure,
    /// Its gateway's life is over.
    Over,
    /// Its own time to live is over.
    Expired,
}

/// A route, the life it is on, and what it is worth.
#[derive(Clone, Debug, PartialEq)]
pub struct RouteView {
    pub route: Route,
    /// None: nobody has heard of it.
    pub life: Option<Arc<Life>>,
    pub verdict: Verdict,
    /// Why it is not simply live.
    pub why: String,
}

/// What routes are judged by.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub now: Timestamp,
    /// How much longer than it says a route may last, because the clock was set forward.
    pub slack: Duration,
    pub heartbeat_interval: Duration,
    /// No gateway is declared dead now.
    pub hold: bool,
    /// How old the node's table of lives is, and whether that makes its answers suspect.
    pub lives_age: Duration,
    pub lives_are_stale: bool,
}

/// What is to be explained.
pub struct Situation<'a> {
    /// The record that everything is explained by: that of SQL, if it could be read, else the newest there is.
    pub record: &'a UserRecord,
    /// Where it stands. None: nowhere, as far as anybody can tell.
    pub source: Option<Tier>,
    pub routes: &'a [RouteView],
    pub tiers: &'a [TierView],
    /// Why what is shown has changed last, if the log says so.
    pub last: Option<Cause>,
    pub now: Timestamp,
    /// How much longer than it says a ban may last, because the clock was set forward.
    pub slack: Duration,
}

impl Tier {
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Shared => "shared",
            Self::Durable => "durable",
        }
    }

    /// As a sentence has it.
    fn said(self) -> &'static str {
        match self {
            Self::Memory => "this node's memory",
            Self::Shared => "Redis",
            Self::Durable => "SQL",
        }
    }
}

impl TierView {
    /// What the record tells. Whether it is trusted has still to be said.
    pub fn of(tier: Tier, record: Option<&UserRecord>, generation: u64) -> Self {
        let record = record.filter(|record| record.version > Version::NONE);
        Self {
            tier,
            present: record.is_some(),
            version: record.map_or(Version::NONE, |record| record.version),
            shown_version: record.map_or(Version::NONE, |record| record.shown().version),
            generation,
            age: Duration::ZERO,
            trusted: false,
            why: String::new(),
            routes: record.map_or(0, |record| u32::try_from(record.routes.len()).unwrap_or(u32::MAX)),
        }
    }

    /// It may be answered from, being so far behind.
    pub fn trusted(self, age: Duration) -> Self {
        Self { trusted: true, age, ..self }
    }

    pub fn doubted(self, age: Duration, why: impl Into<String>) -> Self {
        Self { trusted: false, age, why: why.into(), ..self }
    }
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Late => "late",
            Self::Held => "held",
            Self::Unsure => "unsure",
            Self::Over => "over",
            Self::Expired => "expired",
        }
    }
}

impl RouteView {
    /// Judges a route and the life that it names.
    pub fn of(route: &Route, life: Option<Arc<Life>>, look: &Look) -> Self {
        let (verdict, why) = judge(route, life.as_deref(), look);
        Self { route: route.clone(), life, verdict, why }
    }

    /// Whether queries name it.
    pub fn is_usable(&self) -> bool {
        self.life.is_some() && !matches!(self.verdict, Verdict::Over | Verdict::Expired)
    }

    /// Until when it was good, if it is over: as [`Route::end`].
    fn end(&self) -> Option<Timestamp> {
        self.route.expires_at.at().or_else(|| self.life.as_ref().map(|life| life.last_beat))
    }

    fn gateway(&self) -> &str {
        self.life.as_ref().map_or("a gateway that nobody has heard of", |life| life.gateway.as_str())
    }

    fn device(&self) -> &str {
        if self.route.device.is_empty() { "the device" } else { self.route.device.as_str() }
    }
}

fn judge(route: &Route, life: Option<&Life>, look: &Look) -> (Verdict, String) {
    let Look { now, lives_age, .. } = *look;
    if let Some(end) = route.expires_at.at().filter(|end| end.plus(look.slack) <= now) {
        return (Verdict::Expired, format!("it was not bound again, and its time to live ended {} ago", span(now.since(end))));
    }
    let Some(life) = life else {
        return (Verdict::Unsure, "this node has not heard of the life that it names".to_owned());
    };
    if let Some(end) = life.end {
        return (Verdict::Over, format!("{} {} ago", ended(end.reason), span(now.since(end.at))));
    }
    if look.lives_are_stale {
        return (Verdict::Unsure, format!("this node knew {} ago who lives, and may have missed a death since", span(lives_age)));
    }
    match life.liveness(now, look.heartbeat_interval) {
        Liveness::Late if look.hold => {
            (Verdict::Held, "its gateway missed beats, and a hold keeps all from being declared dead".to_owned())
        }
        Liveness::Late => (Verdict::Late, format!("its gateway was last heard {} ago", span(now.since(life.last_beat)))),
        Liveness::OnTime | Liveness::Over => (Verdict::Live, String::new()),
    }
}

fn ended(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Expired => "its lease ran out, and it was declared dead",
        EndReason::Superseded => "another process registered under its address",
        EndReason::Deregistered => "it deregistered",
        EndReason::Operator => "an operator declared it dead",
        EndReason::Held => "it was silent until a hold ended, and was declared dead",
        EndReason::Untold => "its life ended (SQL has not said yet why)",
    }
}

impl Situation<'_> {
    fn usable(&self) -> impl Iterator<Item = &RouteView> {
        self.routes.iter().filter(|route| route.is_usable())
    }

    /// The route that was bound last, of the best there are: live, usable at all, or over.
    fn newest(&self) -> Option<&RouteView> {
        self.routes.iter().max_by_key(|view| (view.verdict == Verdict::Live, view.is_usable(), view.route.bound_version))
    }

    fn is_there(&self) -> bool {
        self.usable().next().is_some()
    }

    /// Routes are usable, and none of them is simply live.
    fn is_suspect(&self) -> bool {
        self.is_there() && self.usable().all(|view| view.verdict != Verdict::Live)
    }

    /// No route is usable, and this is what the newest of them is worth.
    fn ended_as(&self, verdict: Verdict) -> bool {
        !self.is_there() && self.newest().is_some_and(|view| view.verdict == verdict)
    }

    /// What others are shown.
    pub fn shown(&self) -> Status {
        self.record.wanted().shown(activity(self.usable().map(|view| &view.route)))
    }

    pub fn shown_version(&self) -> Version {
        let is_over = |view: &RouteView| view.life.as_ref().is_some_and(|life| !life.is_alive());
        self.record.shown_version(|route| self.routes.iter().any(|view| view.route.epoch == route.epoch && is_over(view)))
    }

    /// When a device last connected or went, or was good last, whether others could see it or not.
    pub fn last_seen(&self) -> Timestamp {
        let seen = self.record.last_seen;
        if self.is_there() { seen } else { self.routes.iter().filter_map(RouteView::end).fold(seen, Timestamp::max) }
    }

    fn ban(&self) -> Option<Duration> {
        self.record.banned_for(self.now, self.slack)
    }

    /// `phone is on gw-1:7000`
    fn place(&self) -> String {
        let is = if self.is_there() { "is" } else { "was" };
        self.newest().map_or_else(String::new, |view| format!("{} {is} on {}", view.device(), view.gateway()))
    }

    fn why(&self) -> &str {
        self.newest().map_or("", |view| &view.why)
    }
}

/// What may be, and what is said then.
struct Case {
    holds: fn(&Situation<'_>) -> bool,
    says: fn(&Situation<'_>) -> String,
}

/// The first that holds is the one.
const CASES: [Case; 13] = [
    Case { holds: |it| it.source.is_none(), says: |_| "unknown: SQL does not answer, and nothing else has a record".to_owned() },
    Case { holds: |it| it.record.version == Version::NONE, says: |_| "offline: never seen".to_owned() },
    Case {
        holds: |it| !it.is_there() && it.ban().is_some(),
        says: |it| format!("offline: banned for {} more", span(it.ban().unwrap_or_default())),
    },
    Case {
        holds: |it| it.record.routes.is_empty() && it.record.is_erased(),
        says: |_| "offline: erased by an operator, and not back since".to_owned(),
    },
    Case {
        holds: |it| it.is_there() && it.record.is_hidden(),
        says: |it| format!("shown as OFFLINE because INVISIBLE is wanted, though {}", it.place()),
    },
    Case { holds: |it| it.is_suspect(), says: |it| format!("online, but suspect: {}; {}", it.place(), it.why()) },
    Case {
        holds: |it| it.is_there() && it.record.wanted() != it.shown(),
        says: |it| format!("online, and shown as AWAY because nobody uses a device: {}", it.place()),
    },
    Case {
        holds: |it| it.is_there() && it.record.wanted() != Status::Online,
        says: |it| format!("online, and shown as wanted: {}", it.place()),
    },
    Case { holds: |it| it.is_there(), says: |it| format!("online: {}, which lives", it.place()) },
    Case {
        holds: |it| it.ended_as(Verdict::Over),
        says: |it| format!("offline: {}; {}, and the route is not swept yet", it.place(), it.why()),
    },
    Case {
        holds: |it| it.ended_as(Verdict::Expired),
        says: |it| format!("offline: {}, which never registered; {}", it.place(), it.why()),
    },
    Case { holds: |it| it.newest().is_some(), says: |it| format!("offline: {}; {}", it.place(), it.why()) },
    Case { holds: |_| true, says: gone },
];

/// Why a user is online, suspect or offline, in one sentence.
pub fn because(situation: &Situation<'_>) -> String {
    let case = CASES.iter().find(|case| (case.holds)(situation));
    let sentence = case.map_or_else(String::new, |case| (case.says)(situation));
    let source = situation.source.filter(|source| *source != Tier::Durable);
    let without_sql = source.map(|source| format!("; SQL does not answer: so says {}", source.said()));
    [Some(sentence), without_sql]
        .into_iter()
        .flatten()
        .chain(situation.tiers.iter().filter_map(|it| differs(it, situation)))
        .collect()
}

fn gone(it: &Situation<'_>) -> String {
    let how = match it.last {
        _ if it.last_seen() == Timestamp::default() => return "offline: no device was ever bound".to_owned(),
        Some(Cause::Logout) => "the last device logged out",
        Some(Cause::Expired) => "the last device's gateway died, or its route was not renewed",
        Some(Cause::Kicked) => "the last device was kicked",
        Some(Cause::Operator) => "an operator ended the last session",
        _ => "the last device went",
    };
    format!("offline: {how} {} ago", span(it.now.since(it.last_seen())))
}

/// What a tier that has another record than the one that decides means for queries.
fn differs(view: &TierView, it: &Situation<'_>) -> Option<String> {
    if !view.present || it.source == Some(view.tier) || view.version == it.record.version {
        return None;
    }
    let (tier, older) = (view.tier.said(), if view.version < it.record.version { "an older" } else { "a newer" });
    Some(match view.trusted {
        true => format!("; {tier} has {older} record, and queries of this node may be answered from it"),
        false => format!("; {tier} has {older} record, which is not used: {}", view.why),
    })
}

#[cfg(test)]
#[path = "explanation_tests.rs"]
mod tests;
