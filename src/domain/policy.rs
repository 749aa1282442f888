//! How many devices a user may have online, and who has to go.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::domain::gateway::Liveness;
use crate::domain::route::Route;
use crate::domain::time::Timestamp;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnOverflow {
    KickOldest,
    RefuseNew,
}

#[derive(Clone, Copy, Debug)]
pub struct DevicePolicy {
    /// Devices one user may have online.
    pub max_devices: usize,
    /// Devices of one platform one user may have online; 0: no limit. Devices of unknown platform are not counted.
    pub per_platform: usize,
    pub on_overflow: OnOverflow,
}

/// Why a route was removed by others than its gateway, or is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    Replaced,
    DeviceLimit,
    PlatformLimit,
    Operator,
    /// The route stays: its gateway is drained, and the client has to go elsewhere.
    Drain,
    /// The same, without a drain.
    Migrate,
    /// The user may not be bound for a while.
    Banned,
}

/// Why a bind was refused. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A newer connection holds the device.
    Older,
    /// The user has as many devices online as allowed.
    DeviceLimit,
    PlatformLimit,
    /// Nothing may be bound before.
    Banned {
        until: Timestamp,
        left: Duration,
    },
}

impl DevicePolicy {
    /// Which of `others` have to go so that `new` fits, or why it does not. Under `kick_oldest` routes of late gateways go
    /// first, then the oldest connection; a newcomer that is itself the oldest is refused, because a gateway that comes
    /// back must not displace newer connections. Under `refuse_new` only routes of late gateways give way.
    pub fn make_room(
        &self,
        new: &Route,
        others: &[Route],
        liveness: impl Fn(&Route) -> Liveness,
    ) -> Result<Vec<(usize, Reason)>, Refusal> {
        let mut staying: BTreeSet<usize> = (0..others.len()).collect();
        let mut leaving = Vec::new();
        let platform_limit = if new.platform.is_counted() { self.per_platform } else { 0 };
        let limits = [
            (platform_limit, Reason::PlatformLimit, Refusal::PlatformLimit),
            (self.max_devices, Reason::DeviceLimit, Refusal::DeviceLimit),
        ];
        for (limit, reason, refusal) in limits.into_iter().filter(|(limit, ..)| *limit > 0) {
            let counts = |other: &Route| reason == Reason::DeviceLimit || other.platform == new.platform;
            loop {
                let counted: Vec<usize> = staying.iter().copied().filter(|i| counts(&others[*i])).collect();
                if counted.len() < limit {
                    break;
                }
                let evicted = self.weakest(new, others, &counted, &liveness).ok_or(refusal)?;
                staying.remove(&evicted);
                leaving.push((evicted, reason));
            }
        }
        Ok(leaving)
    }

    /// How many of a user's live routes this policy leaves no room for: those that are gone, or were not let in, after all of
    /// them have connected anew, in their order.
    pub fn surplus(&self, routes: &[Route], liveness: impl Fn(&Route) -> Liveness) -> usize {
        let mut in_order: Vec<&Route> = routes.iter().collect();
        in_order.sort_by_key(|route| (route.connected_at, route.bound_version));
        let mut seated: Vec<Route> = Vec::new();
        for route in in_order {
            if let Ok(leaving) = self.make_room(route, &seated, &liveness) {
                let leaves = |i: usize| leaving.iter().any(|(leaver, _)| *leaver == i);
                seated = seated.into_iter().enumerate().filter(|(i, _)| !leaves(*i)).map(|(_, route)| route).collect();
                seated.push(route.clone());
            }
        }
        routes.len() - seated.len()
    }

    /// The route among `counted` that gives way to `new`, if any does.
    fn weakest(&self, new: &Route, others: &[Route], counted: &[usize], liveness: impl Fn(&Route) -> Liveness) -> Option<usize> {
        let late = |route: &Route| liveness(route) != Liveness::OnTime;
        let weakest = counted.iter().copied().min_by_key(|i| {
            let route = &others[*i];
            (!late(route), route.connected_at, route.bound_version)
        })?;
        let route = &others[weakest];
        let gives_way = late(route) || (self.on_overflow == OnOverflow::KickOldest && route.connected_at <= new.connected_at);
        gives_way.then_some(weakest)
    }
}
