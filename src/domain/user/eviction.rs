//! Taking the routes on one life of a gateway away, because an operator wants to be rid of them.

use crate::domain::event::Outcome;
use crate::domain::id::Epoch;
use crate::domain::policy::Reason;
use crate::domain::route::Route;
use crate::domain::user::Applied;
use crate::domain::user::Context;
use crate::domain::user::UserRecord;

impl UserRecord {
    /// Removes the user's routes on this life. Repeated, it finds nothing.
    pub(super) fn evict(&self, epoch: Epoch, context: &Context<'_>) -> Applied {
        let is_leaving = |route: &&Route| route.epoch == epoch;
        let kicked: Vec<(Route, Reason)> =
            self.live(context).filter(is_leaving).cloned().map(|route| (route, Reason::Operator)).collect();
        if kicked.is_empty() {
            return Applied::unchanged(Outcome::Evicted { kicked });
        }
        let version = self.version.next(context.clock);
        let staying = self.live(context).filter(|route| !is_leaving(route)).cloned().collect();
        let next = self.changed(version, context.now, staying);
        Applied::changed(Outcome::Evicted { kicked }, next)
    }
}
