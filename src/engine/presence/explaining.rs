//! Why a user is online, suspect or offline, as this node sees it: all that decides, looked at together, for operators.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use crate::domain::explanation::Inspected;
use crate::domain::explanation::Look;
use crate::domain::explanation::RouteView;
use crate::domain::explanation::Situation;
use crate::domain::explanation::Tier;
use crate::domain::explanation::TierView;
use crate::domain::explanation::because;
use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::user::UserRecord;
use crate::engine::presence::watches::Watches;
use crate::engine::read::inspection::Durable;
use crate::engine::read::inspection::Held;
use crate::engine::read::inspection::Inspection;
use crate::engine::read::lives::SUSPECT_AFTER;
use crate::store::history::LoggedLine;

pub struct Explaining {
    pub inspection: Inspection,
    pub watches: Arc<Watches>,
    pub heartbeat_interval: Duration,
}

/// Everything that decides where a user is.
pub struct Explanation {
    pub because: String,
    /// What everything is explained by: SQL's, if it can be read, else the newest there is.
    pub record: UserRecord,
    /// What others are shown, by the routes that are usable.
    pub shown: Status,
    pub shown_version: Version,
    /// When a device last connected or went, whether others saw it or not.
    pub last_seen: Timestamp,
    pub routes: Vec<RouteView>,
    /// Of this node first, then those of others.
    pub tiers: Vec<TierView>,
    pub watchers: u32,
    pub recent: Vec<LoggedLine>,
    /// What the routes were judged by.
    pub look: Look,
}

impl Explaining {
    /// What this node's memory holds of a user.
    pub fn inspect(&self, user: UserId) -> Inspected {
        let (memory, record) = self.memory(user);
        let table = self.watches.lives.glance();
        let is_over = |epoch: &Epoch| table.get(*epoch).is_some_and(|life| !life.is_alive());
        let named = record.iter().flat_map(|record| &record.routes).map(|route| route.epoch);
        Inspected { memory, lives_age: self.lives_age(), watchers: self.watchers(user), ended: named.filter(is_over).collect() }
    }

    /// Looks at every tier. One that does not answer is left out, and says why.
    pub async fn explain(&self, user: UserId) -> Explanation {
        let memory = self.memory(user); // before anything is awaited
        let look = self.look();
        let (shared, (durable_view, durable)) = tokio::join!(self.inspection.shared(user), self.inspection.durable(user));
        let (source, Durable { record, lives, recent, hold }) = match durable {
            Some(durable) => (Some(Tier::Durable), durable),
            None => {
                let (source, record) = newest([(Tier::Memory, memory.1), (Tier::Shared, shared.1)]);
                (source, Durable { record, lives: Vec::new(), recent: Vec::new(), hold: look.hold })
            }
        };
        let look = Look { hold, ..look };
        let judged = record.routes.iter().map(|route| RouteView::of(route, self.life(route.epoch, &lives), &look));
        let (routes, tiers) = (judged.collect::<Vec<_>>(), vec![memory.0, shared.0, durable_view]);
        let last = recent.first().map(|line| line.cause);
        let Look { now, slack, .. } = look;
        let situation = Situation { record: &record, source, routes: &routes, tiers: &tiers, last, now, slack };
        Explanation {
            because: because(&situation),
            shown: situation.shown(),
            shown_version: situation.shown_version(),
            last_seen: situation.last_seen(),
            watchers: self.watchers(user),
            record,
            routes,
            tiers,
            recent,
            look,
        }
    }

    /// What this node's memory holds, and that its answers are suspect, if they are.
    fn memory(&self, user: UserId) -> Held {
        let (mut view, record) = self.inspection.memory(user);
        let lives_age = self.lives_age();
        if view.trusted && lives_age > SUSPECT_AFTER {
            view.why = format!("its answers are SUSPECT: it knew {} ms ago who lives", lives_age.as_millis());
        }
        (view, record)
    }

    /// How this node judges now; whether a hold is on, as it saw last.
    fn look(&self) -> Look {
        let (lives_age, lives) = (self.lives_age(), &self.watches.lives);
        let now = lives.clock.now();
        Look {
            now,
            slack: lives.clock.slack(now),
            heartbeat_interval: self.heartbeat_interval,
            hold: self.watches.metrics.hold.get() == 1,
            lives_age,
            lives_are_stale: lives_age > SUSPECT_AFTER,
        }
    }

    /// The life as SQL has just told of it, or as this node knows it; over, if either says so. Why, SQL knows best.
    fn life(&self, epoch: Epoch, read: &[Arc<Life>]) -> Option<Arc<Life>> {
        let table = self.watches.lives.glance();
        let known = table.get(epoch);
        let read = read.iter().find(|life| life.epoch == epoch);
        let is_over = |life: &&Arc<Life>| !life.is_alive();
        read.filter(is_over).or(known.filter(is_over)).or(read).or(known).cloned()
    }

    fn lives_age(&self) -> Duration {
        self.watches.lives.age(Instant::now())
    }

    fn watchers(&self, user: UserId) -> u32 {
        u32::try_from(self.watches.interest.watchers(user).len()).unwrap_or(u32::MAX)
    }
}

/// The newest record there is, and where it stands.
fn newest<const N: usize>(held: [(Tier, Option<UserRecord>); N]) -> (Option<Tier>, UserRecord) {
    let present = held.into_iter().filter_map(|(tier, record)| Some((Some(tier), record?)));
    // Of two that are the same, the first.
    let newer = |one: (Option<Tier>, UserRecord), other: (Option<Tier>, UserRecord)| {
        if other.1.version > one.1.version { other } else { one }
    };
    present.reduce(newer).unwrap_or_default()
}
