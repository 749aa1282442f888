//! A user's record and the one function that changes it.

mod offline;
mod presence;
mod settling;
mod wish;

use std::time::Duration;

use crate::domain::event::Bind;
use crate::domain::event::Event;
use crate::domain::event::Outcome;
use crate::domain::event::Unbind;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::LifeTable;
use crate::domain::gateway::Liveness;
use crate::domain::history::Chronicle;
use crate::domain::history::OnlineSession;
use crate::domain::history::Rules;
use crate::domain::id::Version;
use crate::domain::inbox::Inbox;
use crate::domain::inbox::InboxChange;
use crate::domain::inbox::InboxOutcome;
use crate::domain::inbox::Limits;
use crate::domain::policy::DevicePolicy;
use crate::domain::policy::Reason;
use crate::domain::policy::Refusal;
use crate::domain::route::Route;
use crate::domain::route::Routes;
use crate::domain::status::Wish;
use crate::domain::time::CLOCK_SLACK;
use crate::domain::time::Expiry;
use crate::domain::time::Timestamp;

/// All that is known of a user. Without routes and with version 0: no such user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UserRecord {
    pub version: Version,
    /// None: as it follows from the rest, as for most users.
    pub presence: Option<Box<Presence>>,
    pub last_seen: Timestamp,
    pub routes: Routes,
    /// The greatest number that a stored message of the user ever had.
    pub inbox_seq: u64,
    /// How many messages are stored.
    pub inbox_pending: u32,
}

/// How a user wants to be seen, what others were shown last, and since when the user is online.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Presence {
    pub wish: Wish,
    pub shown: LastShown,
    pub session: OnlineSession,
    /// Nothing may be bound before.
    pub banned_until: Timestamp,
}

/// The last change that others could see. While the user is INVISIBLE nothing moves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastShown {
    /// The record's version after it. A change of the inbox alone is none.
    pub version: Version,
    /// When a device last connected or went.
    pub seen: Timestamp,
    /// When the status became what it is.
    pub since: Timestamp,
}

/// What the rules look at besides the record. All of it is read inside the transaction that holds the user's lock.
pub struct Context<'a> {
    pub policy: &'a DevicePolicy,
    pub lives: &'a LifeTable,
    pub now: Timestamp,
    /// The database's clock as a version.
    pub clock: Version,
    pub route_ttl: Duration,
    pub heartbeat_interval: Duration,
    /// How much longer than it says a route may last, because the clock was set forward.
    pub slack: Duration,
    /// Whether the clock can be believed so far that something is removed for its age.
    pub clock_is_steady: bool,
    pub history: Rules,
}

/// The outcome, and the record to store if it differs from the one before.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    pub outcome: Outcome,
    pub next: Option<UserRecord>,
    /// What goes into the user's history.
    pub chronicle: Chronicle,
}

impl Applied {
    pub fn unchanged(outcome: Outcome) -> Self {
        Self { outcome, next: None, chronicle: Chronicle::default() }
    }

    fn changed(outcome: Outcome, next: UserRecord) -> Self {
        Self { outcome, next: Some(next), chronicle: Chronicle::default() }
    }
}

impl UserRecord {
    /// Applies `event` and says what came of it. Repeating an event that was applied changes nothing; a change always
    /// carries a higher version.
    pub fn apply(&self, event: &Event<'_>, context: &Context<'_>) -> Applied {
        let applied = match event {
            Event::Bind { bind, life, waited } => self.bind(bind, life, *waited, context),
            Event::Unbind(unbind) => self.unbind(unbind, context),
            Event::Sweep => self.sweep(context),
            Event::SetStatus(set) => self.set_status(set, context),
            Event::EndStatus => self.end_status(context),
            Event::ForceOffline(force) => self.force_offline(force, context),
            Event::Forget => return self.forget(context),
        };
        self.settled(applied, event, context)
    }

    fn bind(&self, bind: &Bind, life: &Life, waited: Duration, context: &Context<'_>) -> Applied {
        if let Some(refusal) = self.ban(context) {
            return Applied::unchanged(Outcome::Refused(refusal));
        }
        let holder = self.routes.iter().find(|route| route.device == bind.device && context.is_live(route));
        if let Some(holder) = holder
            && holder.epoch == life.epoch
            && holder.conn == bind.conn
            && !bind.conn.is_empty()
        {
            return self.renew(holder, life, context);
        }
        let version = self.version.next(context.clock);
        let connected_at = match bind.connected_ago {
            Some(ago) => context.now.minus(ago + waited),
            // "Just now" is never older than what came before, whatever the database's clock did meanwhile.
            None => self.live(context).map(|route| route.connected_at).fold(context.now, Timestamp::max),
        };
        if holder.is_some_and(|holder| connected_at < holder.connected_at) {
            return Applied::unchanged(Outcome::Refused(Refusal::Older));
        }
        let new = Route {
            device: bind.device.clone(),
            platform: bind.platform,
            epoch: life.epoch,
            conn: bind.conn.clone(),
            connected_at,
            client_ip: bind.client_ip,
            client_port: bind.client_port,
            bound_version: version,
            bound_at: context.now,
            expires_at: context.expiry(life),
            idle: bind.idle,
        };
        self.seat(new, holder, version, context)
    }

    /// Gives `new` its place: dead routes go, the holder of the device goes, and the policy makes room.
    fn seat(&self, new: Route, holder: Option<&Route>, version: Version, context: &Context<'_>) -> Applied {
        let others: Vec<Route> = self.live(context).filter(|route| route.device != new.device).cloned().collect();
        let leaving = match context.policy.make_room(&new, &others, |route| context.liveness(route)) {
            Ok(leaving) => leaving,
            Err(refusal) => return Applied::unchanged(Outcome::Refused(refusal)),
        };
        let mut kicked: Vec<(Route, Reason)> = holder.map(|holder| (holder.clone(), Reason::Replaced)).into_iter().collect();
        let mut routes = Routes::with_capacity(others.len() + 1 - leaving.len());
        for (i, route) in others.into_iter().enumerate() {
            match leaving.iter().find(|(leaver, _)| *leaver == i) {
                Some((_, reason)) => kicked.push((route, *reason)),
                None => routes.push(route),
            }
        }
        let epoch = new.epoch;
        routes.push(new);
        let next = self.changed(version, context.now, routes);
        Applied::changed(Outcome::Bound { bound_version: version, version, epoch, kicked }, next)
    }

    /// The same bind again: nothing changes but the time to live of a route on an unmanaged life.
    fn renew(&self, holder: &Route, life: &Life, context: &Context<'_>) -> Applied {
        let (bound_version, epoch) = (holder.bound_version, holder.epoch);
        let outcome = Outcome::Bound { bound_version, version: self.version, epoch, kicked: Vec::new() };
        let expires_at = context.expiry(life);
        if expires_at == holder.expires_at {
            return Applied::unchanged(outcome);
        }
        let mut next = self.clone();
        for route in next.routes.iter_mut().filter(|route| route.bound_version == bound_version) {
            route.expires_at = expires_at;
        }
        Applied::changed(outcome, next)
    }

    fn unbind(&self, unbind: &Unbind, context: &Context<'_>) -> Applied {
        let found = match unbind {
            Unbind::Exact { bound_version, .. } => self.routes.iter().find(|route| route.bound_version == *bound_version),
            Unbind::Device { device, .. } => self.routes.iter().find(|route| route.device == *device),
        };
        let route = match found {
            Some(route) => route,
            None => return self.not_bound("no such route: it was unbound, replaced or never bound"),
        };
        let (conn, epoch) = match unbind {
            Unbind::Exact { conn, epoch, .. } | Unbind::Device { conn, epoch, .. } => (conn, epoch),
        };
        if conn.as_ref().is_some_and(|conn| *conn != route.conn) {
            return self.not_bound("another connection holds the device");
        }
        if epoch.is_some_and(|epoch| epoch != route.epoch) {
            return self.not_bound("another life of the gateway holds the device");
        }
        if let Unbind::Device { gateway, .. } = unbind {
            let here = context.lives.get(route.epoch).is_some_and(|life| life.gateway == *gateway);
            if !here {
                return self.not_bound("the device is on another gateway");
            }
        }
        if let Unbind::Exact { by: Some(caller), .. } = unbind {
            let is_own = context.lives.get(route.epoch).is_some_and(|life| caller.may_speak_for(&life.gateway));
            if !is_own {
                return self.not_bound("the device is on a gateway that the caller may not speak for");
            }
        }
        let gone = route.bound_version;
        let last_seen = if context.is_live(route) { context.now } else { self.last_end(context) };
        let version = self.version.next(context.clock);
        let routes = self.live(context).filter(|route| route.bound_version != gone).cloned().collect();
        let next = self.changed(version, last_seen, routes);
        Applied::changed(Outcome::Unbound { version }, next)
    }

    fn not_bound(&self, why: &'static str) -> Applied {
        Applied::unchanged(Outcome::NotBound { version: self.version, why })
    }

    /// Removes what is over for good. A route that ends later than any can was bound when the clock was ahead: it has a whole
    /// time to live from now on.
    fn sweep(&self, context: &Context<'_>) -> Applied {
        let mut routes: Routes = self.routes.iter().filter(|route| !context.is_to_go(route)).cloned().collect();
        let (swept, latest) = (self.routes.len() - routes.len(), context.now.plus(context.route_ttl));
        let too_late = |route: &&mut Route| route.expires_at.at().is_some_and(|end| end > latest.plus(CLOCK_SLACK));
        let mut has_changed = swept > 0;
        for route in routes.iter_mut().filter(too_late) {
            (route.expires_at, has_changed) = (Some(latest).into(), true);
        }
        if !has_changed {
            return Applied::unchanged(Outcome::Swept { routes: 0 });
        }
        let version = self.version.next(context.clock);
        // The user was last seen when the route was still good, not when somebody tidied up.
        let next = self.changed(version, self.last_end(context), routes);
        Applied::changed(Outcome::Swept { routes: swept }, next)
    }

    fn changed(&self, version: Version, last_seen: Timestamp, routes: Routes) -> Self {
        let Self { inbox_seq, inbox_pending, .. } = *self;
        Self { version, presence: None, last_seen, routes, inbox_seq, inbox_pending }.with(self.presence())
    }

    /// When the last of the routes that are over ended, or the user was seen after that.
    fn last_end(&self, context: &Context<'_>) -> Timestamp {
        let ends = self.routes.iter().filter(|route| !context.is_live(route)).filter_map(|route| route.end(context.lives));
        ends.max().unwrap_or_default().min(context.now).max(self.last_seen)
    }

    /// Changes the inbox, and notes in the record that it has changed: readers have to know whether messages wait.
    pub fn change_inbox(&self, change: &InboxChange, inbox: &mut Inbox, limits: &Limits, context: &Context<'_>) -> Applied {
        let outcome = inbox.apply(change, self.inbox_seq, context.clock, context.now, limits);
        let inbox_seq = match outcome {
            InboxOutcome::Stored { seq, .. } => seq.max(self.inbox_seq),
            InboxOutcome::Full | InboxOutcome::Removed { .. } => self.inbox_seq,
        };
        let pending = u32::try_from(inbox.len()).unwrap_or(u32::MAX);
        let has_changed = (inbox_seq, pending) != (self.inbox_seq, self.inbox_pending);
        let next = has_changed.then(|| {
            let version = self.version.next(context.clock);
            Self { version, inbox_seq, inbox_pending: pending, ..self.clone() }.with(self.presence())
        });
        Applied { outcome: Outcome::Inbox(outcome), next, chronicle: Chronicle::default() }
    }

    fn live<'a>(&'a self, context: &'a Context<'_>) -> impl Iterator<Item = &'a Route> + Clone {
        self.routes.iter().filter(|route| context.is_live(route))
    }
}

impl Context<'_> {
    fn liveness(&self, route: &Route) -> Liveness {
        route.liveness(self.lives, self.now, self.slack, self.heartbeat_interval)
    }

    fn is_live(&self, route: &Route) -> bool {
        self.liveness(route) != Liveness::Over
    }

    /// Whether the route is over for good. Its age alone says so only if the clock can be believed.
    fn is_to_go(&self, route: &Route) -> bool {
        let lives_on = || self.lives.get(route.epoch).is_none_or(|life| life.is_alive());
        !self.is_live(route) && (self.clock_is_steady || !lives_on())
    }

    fn expiry(&self, life: &Life) -> Expiry {
        (life.kind == LifeKind::Unmanaged).then(|| self.now.plus(self.route_ttl)).into()
    }
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "week_tests.rs"]
mod week_tests;
