//! What operators do to a user: devices are taken off, and a ban keeps them away.

use std::time::Duration;

use crate::domain::event::Ban;
use crate::domain::event::ForceOffline;
use crate::domain::event::Outcome;
use crate::domain::event::Which;
use crate::domain::policy::Reason;
use crate::domain::policy::Refusal;
use crate::domain::route::Route;
use crate::domain::route::Routes;
use crate::domain::time::Timestamp;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;

impl UserRecord {
    /// For how long nothing may be bound yet, if that is so: as much longer than the ban says as the clock was set forward.
    pub fn banned_for(&self, now: Timestamp, slack: Duration) -> Option<Duration> {
        Some(self.banned_until().plus(slack).since(now)).filter(|left| !left.is_zero())
    }

    /// Why nothing may be bound now.
    pub(super) fn ban(&self, context: &Context<'_>) -> Option<Refusal> {
        self.banned_for(context.now, context.slack).map(|left| Refusal::Banned { until: self.banned_until(), left })
    }

    /// Removes what is meant and live; nothing happens if that is nothing, and the ban stays as it is.
    pub(super) fn force_offline(&self, force: &ForceOffline, context: &Context<'_>) -> Applied {
        let ban = match force.ban {
            Ban::Stays => self.banned_until(),
            Ban::For(length) => context.now.plus(length),
            Ban::Lifted => Timestamp::default(),
        };
        let is_on = ban.plus(context.slack) > context.now;
        let banned_until = if is_on { ban } else { Timestamp::default() };
        let reason = if let Ban::For(_) = force.ban { Reason::Banned } else { Reason::Operator };
        let is_meant = |route: &Route| match &force.which {
            _ if force.ban == Ban::Lifted => false,
            Which::All => true,
            Which::One(device) => route.device == *device,
            Which::On(epoch) => route.epoch == *epoch,
        };
        let (going, staying): (Routes, Routes) = self.live(context).cloned().partition(is_meant);
        if force.which != Which::All && going.is_empty() {
            return Applied::unchanged(Outcome::NoDevice);
        }
        let kicked: Vec<(Route, Reason)> = going.into_iter().map(|route| (route, reason)).collect();
        if force.dry_run || kicked.is_empty() && ban == self.banned_until() {
            return Applied::unchanged(Outcome::ForcedOffline { kicked, version: self.version, banned_until });
        }
        let version = self.version.next(context.clock);
        let last_seen = if kicked.is_empty() { self.last_end(context) } else { context.now };
        let next = self.changed(version, last_seen, staying).with(Presence { banned_until: ban, ..self.presence() });
        Applied::changed(Outcome::ForcedOffline { kicked, version, banned_until }, next)
    }
}
