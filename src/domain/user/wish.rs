//! How a user wants to be seen, and which devices are idle: what SetStatus changes.

use crate::domain::caller::GatewayPatterns;
use crate::domain::event::Outcome;
use crate::domain::event::SetStatus;
use crate::domain::id::Version;
use crate::domain::policy::Reason;
use crate::domain::route::Routes;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::status::Wish;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;
use crate::domain::user::presence::ERASED;

impl UserRecord {
    /// A status that is the same again changes nothing, but that it lasts until another time.
    pub(super) fn set_status(&self, set: &SetStatus, context: &Context<'_>) -> Applied {
        let is_theirs = |by: &GatewayPatterns| {
            self.live(context).any(|route| context.lives.get(route.epoch).is_some_and(|life| by.cover(&life.gateway)))
        };
        if set.by.as_ref().is_some_and(|by| !is_theirs(by)) {
            return Applied::unchanged(Outcome::NotTheirs);
        }
        let mut routes: Routes = self.live(context).cloned().collect();
        let mut has_changed = false;
        if let Some((device, idle)) = &set.idle {
            let Some(route) = routes.iter_mut().find(|route| route.device == *device) else {
                return Applied::unchanged(Outcome::NoDevice);
            };
            has_changed |= std::mem::replace(&mut route.idle, *idle) != *idle;
        }
        let (before, mut wish) = (self.wish(), self.wish());
        wish.status = set.status.unwrap_or(wish.status);
        wish.text = set.text.clone().unwrap_or(wish.text);
        if set.status.is_some() || set.expire_after.is_some() {
            wish.until = set.expire_after.map(|after| context.now.plus(after));
        }
        has_changed |= (wish.status, &wish.text) != (before.status, &before.text);
        if !has_changed {
            return self.until(wish, context);
        }
        let version = self.version.next(context.clock);
        let shown = wish.status.shown(activity(&routes));
        let next = self.changed(version, self.last_end(context), routes).with(Presence { wish, ..self.presence() });
        Applied::changed(Outcome::StatusSet { shown, version }, next)
    }

    /// The same wish, for as long as it says. Nobody else sees that: the version stays.
    fn until(&self, wish: Wish, context: &Context<'_>) -> Applied {
        let shown = wish.status.shown(activity(self.live(context)));
        let outcome = Outcome::StatusSet { shown, version: self.version };
        if wish.until == self.wish_until() {
            return Applied::unchanged(outcome);
        }
        Applied::changed(outcome, self.clone().with(Presence { wish, ..self.presence() }))
    }

    pub(super) fn end_status(&self, context: &Context<'_>) -> Applied {
        let unchanged = Outcome::StatusSet { shown: self.wanted(), version: self.version };
        let is_over = self.wish_until().is_some_and(|until| until.plus(context.slack) <= context.now);
        if !is_over {
            return Applied::unchanged(unchanged);
        }
        let version = self.version.next(context.clock);
        let routes: Routes = self.live(context).cloned().collect();
        let shown = Status::Online.shown(activity(&routes));
        let wish = Wish::default();
        let next = self.changed(version, self.last_end(context), routes).with(Presence { wish, ..self.presence() });
        Applied::changed(Outcome::StatusSet { shown, version }, next)
    }

    /// Only the version stays, and the number of the last message: no later one may have it again.
    pub(super) fn forget(&self, context: &Context<'_>) -> Applied {
        let rows = self.routes.len() as u64;
        let outcome =
            Outcome::Forgotten { rows, kicked: self.routes.iter().cloned().map(|route| (route, Reason::Operator)).collect() };
        if self.version == Version::NONE {
            return Applied::unchanged(outcome);
        }
        let version = self.version.next(context.clock);
        let next = Self { version, inbox_seq: self.inbox_seq, ..Self::default() };
        let presence = Presence { session: ERASED, ..next.presence() };
        Applied::changed(outcome, next.with(presence))
    }
}
