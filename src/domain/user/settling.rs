//! What every change of a user has in common: it is shown to others or hidden from them, and goes into the history.

use crate::domain::event::Event;
use crate::domain::event::SetStatus;
use crate::domain::history::Cause;
use crate::domain::history::LastSeen;
use crate::domain::history::Standing;
use crate::domain::history::Step;
use crate::domain::id::VERSION_GAP;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::UserRecord;

impl UserRecord {
    /// What is shown of the user if all routes are live: the next change finds out which of them are not.
    pub fn standing(&self) -> Standing {
        standing(self.wanted(), self.routes.iter())
    }

    /// Completes a change.
    pub(super) fn settled(&self, mut applied: Applied, event: &Event<'_>, context: &Context<'_>) -> Applied {
        let Some(next) = applied.next.take_if(|next| next.version > self.version) else { return applied };
        let (before, mut presence) = (self.standing(), next.presence());
        let after = standing(next.wanted(), next.live(context));
        let is_away = self.routes.is_empty() && next.routes.is_empty(); // then a wish is nobody's business
        if !(is_away || before.is_hidden() && after.is_hidden()) {
            presence.shown.version = next.version;
            // Who comes out while offline was last seen before they hid.
            let comes_out = before.is_hidden() != after.is_hidden() && after.devices > 0;
            let has_moved = next.last_seen != self.last_seen;
            presence.shown.seen = match (comes_out, has_moved && !before.is_hidden()) {
                (true, _) => context.now,
                (false, true) => next.last_seen,
                (false, false) => presence.shown.seen,
            };
        }
        let mut seen = LastSeen { really: self.last_end(context), by_others: self.shown().seen };
        let (chronicle, session) = (&mut applied.chronicle, &mut presence.session);
        let mut step = Step { before, after, at: context.now, version: next.version, cause: cause(event) };
        if let Some(at) = self.death(context) {
            // The user was offline in between, also if nobody has noted it: readers saw that by the gateway's life.
            let version = Version(next.version.0 - 1); // free: versions leave a gap
            let died = Step { before, after: before.gone(), at, version, cause: Cause::Expired };
            chronicle.step(&died, session, seen, &context.history);
            step.before = before.gone();
            if !before.is_hidden() {
                seen.by_others = at;
            }
        }
        chronicle.step(&step, session, seen, &context.history);
        if let Some(line) = chronicle.log.iter().rfind(|line| !line.hidden) {
            presence.shown.since = line.at;
        }
        applied.next = Some(next.with(presence));
        applied
    }

    /// When the last route ended, if none of them is live.
    fn death(&self, context: &Context<'_>) -> Option<Timestamp> {
        let is_dead = !self.routes.is_empty() && self.live(context).next().is_none();
        is_dead.then(|| self.last_end(context).max(self.session().since).max(self.shown().since))
    }

    /// The version of what is shown, with which of its routes are on lives that are over: each has changed what is shown without
    /// a new version of the record.
    pub fn shown_version(&self, is_over: impl Fn(&Route) -> bool) -> Version {
        let ended = if self.is_hidden() { 0 } else { self.routes.iter().filter(|route| is_over(route)).count() as u64 };
        Version(self.shown().version.0 + ended.min(VERSION_GAP - 1))
    }
}

fn standing<'a>(wanted: Status, routes: impl Iterator<Item = &'a Route> + Clone) -> Standing {
    let activity = activity(routes.clone());
    let devices = u32::try_from(routes.clone().count()).unwrap_or(u32::MAX);
    Standing { wanted, activity, devices, epoch: routes.max_by_key(|route| route.bound_version).map(|route| route.epoch) }
}

fn cause(event: &Event<'_>) -> Cause {
    match event {
        Event::Bind { .. } => Cause::Login,
        Event::Unbind(_) => Cause::Logout,
        Event::Sweep => Cause::Expired,
        Event::SetStatus(SetStatus { status: None, text: None, idle: Some((_, true)), .. }) => Cause::Idle,
        Event::SetStatus(SetStatus { status: None, text: None, idle: Some((_, false)), .. }) => Cause::Active,
        Event::SetStatus(_) => Cause::Set,
        Event::EndStatus => Cause::StatusEnded,
        Event::ForceOffline(_) | Event::Forget => Cause::Operator,
    }
}
