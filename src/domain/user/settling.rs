//! What every change of a user has in common: it is shown to others or hidden from them, and goes into the history.

use crate::domain::event::Event;
use crate::domain::event::SetStatus;
use crate::domain::history::Cause;
use crate::domain::history::Standing;
use crate::domain::history::Step;
use crate::domain::id::Version;
use crate::domain::route::Route;
use crate::domain::status::Activity;
use crate::domain::time::Timestamp;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::UserRecord;

impl UserRecord {
    /// What is shown of the user if all routes are live: the next change finds out which of them are not.
    pub fn standing(&self) -> Standing {
        let activity = Activity::of(self.routes.iter().map(|route| route.idle));
        let newest = self.routes.iter().max_by_key(|route| route.bound_version);
        let devices = u32::try_from(self.routes.len()).unwrap_or(u32::MAX);
        Standing { wanted: self.wanted(), activity, devices, epoch: newest.map(|route| route.epoch) }
    }

    /// Completes a change.
    pub(super) fn settled(&self, mut applied: Applied, event: &Event<'_>, context: &Context<'_>) -> Applied {
        let Some(next) = applied.next.take_if(|next| next.version > self.version) else { return applied };
        let (before, after, mut presence) = (self.standing(), next.standing(), next.presence());
        if !(before.is_hidden() && after.is_hidden()) {
            presence.shown.version = next.version;
            // Who comes out while offline was last seen before they hid.
            let comes_out = before.is_hidden() != after.is_hidden() && after.devices > 0;
            let has_moved = next.last_seen != self.last_seen;
            presence.shown.seen = match (comes_out, has_moved) {
                (true, _) => context.now,
                (false, true) => next.last_seen,
                (false, false) => presence.shown.seen,
            };
        }
        let (chronicle, session) = (&mut applied.chronicle, &mut presence.session);
        let mut step = Step { before, after, at: context.now, version: next.version, cause: cause(event) };
        if let Some(at) = self.death(context) {
            // The user was offline in between, also if nobody has noted it: readers saw that by the gateway's life.
            let version = Version(next.version.0 - 1); // free: versions leave a gap
            let died = Step { before, after: before.gone(), at, version, cause: Cause::Expired };
            chronicle.step(&died, session, self.last_seen, &context.history);
            step.before = before.gone();
        }
        chronicle.step(&step, session, self.last_end(context), &context.history);
        if let Some(line) = chronicle.log.iter().rfind(|line| !line.hidden) {
            presence.shown.since = line.at;
        }
        applied.next = Some(next.with(presence));
        applied
    }

    /// When the last route ended, if none of them is live.
    fn death(&self, context: &Context<'_>) -> Option<Timestamp> {
        let is_dead = !self.routes.is_empty() && self.live(context).next().is_none();
        is_dead.then(|| self.last_end(context).max(self.session().since))
    }

    /// How many routes are on lives that are over: each has changed what is shown without a new version.
    pub fn dead_routes(&self, is_over: impl Fn(&Route) -> bool) -> u64 {
        self.routes.iter().filter(|route| is_over(route)).count() as u64
    }
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
        Event::Forget => Cause::Operator,
    }
}
