//! How many requests are served at once. Those that change something have places of their own, so that whoever has to act never
//! waits for those who look; and of each kind one caller has a share at most.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;

use axum::extract::Request;
use axum::extract::State;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::response::Response;
use compact_str::CompactString;

use crate::api::access::Admission;
use crate::api::access::is_order;
use crate::api::rest::problem::Problem;
use crate::security::peer::Peer;

/// Requests of a kind at once: the port has to answer probes while lists run.
const PLACES: usize = 32;
/// Of these, one caller has at most so many.
const SHARE: usize = 16;
/// When to come again who found no place.
const RETRY: Duration = Duration::from_secs(1);

/// The places of both kinds.
#[derive(Default)]
pub struct Places {
    looks: Taken,
    orders: Taken,
}

/// How many places each caller has; nobody is in it who has none.
#[derive(Default)]
struct Taken(Mutex<HashMap<Who, usize>>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Who {
    Caller(CompactString),
    /// Where nobody was asked who calls.
    Address(Option<IpAddr>),
}

/// Free again when dropped.
struct Place<'a> {
    taken: &'a Taken,
    who: Who,
}

impl Who {
    fn asks(request: &Request) -> Self {
        let address = || request.extensions().get::<Arc<Peer>>().map(|peer| peer.addr.ip().to_canonical());
        let named = Admission::of(request.extensions()).map(|admission| admission.identity.caller.name.clone());
        named.map_or_else(|| Self::Address(address()), Self::Caller)
    }
}

impl Taken {
    fn take(&self, who: Who) -> Result<Place<'_>, Problem> {
        let mut taken = self.lock();
        let (own, all) = (taken.get(&who).copied().unwrap_or_default(), taken.values().sum::<usize>());
        if own >= SHARE {
            return Err(Problem::limited(format!("{SHARE} requests of this caller are served already"), RETRY));
        }
        if all >= PLACES {
            return Err(Problem::unavailable(format!("{PLACES} requests are served already"), RETRY));
        }
        taken.insert(who.clone(), own + 1);
        Ok(Place { taken: self, who })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Who, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        match taken.get_mut(&self.who) {
            Some(own) if *own > 1 => *own -= 1,
            _ => _ = taken.remove(&self.who),
        }
    }
}

/// Serves so many at once.
pub async fn in_places(State(places): State<Arc<Places>>, request: Request, next: Next) -> Response {
    let is_order = is_order(request.method(), request.uri().path());
    let kind = if is_order { &places.orders } else { &places.looks };
    match kind.take(Who::asks(&request)) {
        Ok(_place) => next.run(request).await,
        Err(full) => full.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_free_again_and_callers_without_one_are_forgotten() {
        let (taken, who) = (Taken::default(), |name: &str| Who::Caller(name.into()));
        let mut held: Vec<_> = (0..SHARE).map(|_| taken.take(who("one")).ok().unwrap()).collect();
        assert!(taken.take(who("one")).is_err(), "its share is taken");
        held.extend((0..SHARE).map(|_| taken.take(who("two")).ok().unwrap()));
        assert!(taken.take(who("three")).is_err(), "all are taken");
        held.pop();
        drop(taken.take(who("three")).ok().unwrap());
        drop(held);
        assert!(taken.lock().is_empty());
    }
}
