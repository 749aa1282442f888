//! From a credential to a caller.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;
use std::time::Duration;
use std::time::Instant;

use tokio::sync::watch;
use tonic::codegen::http::HeaderMap;
use tonic::codegen::http::HeaderValue;
use tonic::codegen::http::header::AUTHORIZATION;
use tracing::warn;

use crate::clock;
use crate::domain::caller::Caller;
use crate::metrics::Metrics;
use crate::security::allowance::Allowance;
use crate::security::allowance::Limits;
use crate::security::certificate;
use crate::security::files::Generation;
use crate::security::files::Reloaded;
use crate::security::peer::Decided;
use crate::security::peer::Peer;
use crate::security::san::SanRule;
use crate::security::tokens::Tokens;

const SCHEME: &[u8] = b"Bearer ";
/// Failures of one address within so long after which it is answered late. Nobody is locked out: behind one address there may
/// be many.
const PATIENCE: (u32, Duration) = (20, Duration::from_secs(10));
const LATE: Duration = Duration::from_secs(1);
/// Addresses whose failures are counted.
const MAX_ADDRESSES: usize = 4_096;
/// Between two log lines about failures.
const SAY_INTERVAL: Duration = Duration::from_secs(1);

/// A kind of credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Mtls,
    Token,
}

/// Why somebody was not let in: for the log. The caller learns only that no valid credential was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unknown {
    pub why: &'static str,
    /// How long to wait before that is said.
    pub late: Duration,
}

/// Who may come in, and how that is told.
pub struct Callers {
    /// The first that applies decides.
    modes: Vec<Mode>,
    tokens: Option<Arc<Reloaded<Tokens>>>,
    rules: Vec<SanRule>,
    limits: Limits,
    generation: Generation,
    allowances: Mutex<HashMap<String, Weak<Allowance>>>,
    failures: Mutex<Failures>,
    metrics: Arc<Metrics>,
}

/// A caller, and on what it rests: it can be looked up again.
#[derive(Clone)]
pub struct Identity {
    pub caller: Arc<Caller>,
    pub allowance: Arc<Allowance>,
    pub peer: Arc<Peer>,
    header: Option<HeaderValue>,
}

#[derive(Default)]
struct Failures {
    by_address: HashMap<IpAddr, (u32, Instant)>,
    said: Option<Instant>,
    unsaid: u64,
}

impl Callers {
    pub fn new(
        modes: Vec<Mode>,
        tokens: Option<Arc<Reloaded<Tokens>>>,
        rules: Vec<SanRule>,
        limits: Limits,
        generation: Generation,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (allowances, failures) = (Mutex::default(), Mutex::default());
        Self { modes, tokens, rules, limits, generation, allowances, failures, metrics }
    }

    /// What `then` makes of who calls. What was found for the connection before holds as long as nothing was read again.
    ///
    /// # Errors
    /// No valid credential is there.
    pub fn identify<T>(&self, peer: &Peer, headers: &HeaderMap, then: impl FnOnce(&Decided) -> T) -> Result<T, Unknown> {
        let header = headers.get(AUTHORIZATION);
        let generation = self.generation.now();
        let mut decided = peer.decided.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = &*decided
            && known.generation == generation
            && known.header.as_ref() == header
            && !has_expired(&known.caller)
        {
            known.allowance.count_call();
            return Ok(then(known));
        }
        match self.decide(peer, header) {
            Ok((mode, caller)) => {
                let allowance = self.allowance(mode, &caller);
                allowance.count_call();
                Ok(then(decided.insert(Decided { generation, header: header.cloned(), caller, allowance })))
            }
            Err((mode, why)) => {
                *decided = None;
                if mode == "mtls" {
                    let _ = peer.turned_away.set(Instant::now()); // the first time counts
                }
                self.metrics.security.auth_failed(mode);
                Err(Unknown { why, late: self.fail(peer.addr.ip(), why) })
            }
        }
    }

    /// Whether a caller that came in earlier would be let in now, as the same.
    pub fn still_knows(&self, identity: &Identity) -> bool {
        self.decide(&identity.peer, identity.header.as_ref()).is_ok_and(|(_, now)| {
            let before = &*identity.caller;
            (&now.name, now.role, &now.gateways) == (&before.name, before.role, &before.gateways)
        })
    }

    /// Says when credentials were read again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.generation.changes()
    }

    /// The caller, or which kind of credential failed and why.
    fn decide(&self, peer: &Peer, header: Option<&HeaderValue>) -> Result<(Mode, Arc<Caller>), (&'static str, &'static str)> {
        for mode in &self.modes {
            match mode {
                Mode::Mtls => {
                    if let Some(caller) = self.of_certificate(peer) {
                        return caller.map(|caller| (*mode, caller)).map_err(|why| ("mtls", why));
                    }
                }
                Mode::Token => {
                    if let Some(header) = header {
                        return self.of_header(header).map(|caller| (*mode, caller)).map_err(|why| ("token", why));
                    }
                }
            }
        }
        Err(("none", "no credential was given"))
    }

    /// None: no certificate was shown, or none that maps to a role.
    fn of_certificate(&self, peer: &Peer) -> Option<Result<Arc<Caller>, &'static str>> {
        let shown = peer.shown.as_ref()?;
        let leaf = shown.chain.first()?;
        let names = certificate::names(leaf);
        let ends = shown.chain.iter().map(certificate::not_after).collect::<Result<Vec<_>, _>>().ok()?;
        let expires_s = ends.into_iter().min()?;
        let caller = self.rules.iter().find_map(|rule| names.iter().find_map(|name| rule.caller(name, expires_s)))?;
        // The handshake verified it with the CAs of then.
        Some(match shown.listener.current().trusts(&shown.chain) {
            true => Ok(Arc::new(caller)),
            false => Err("the certificate has expired, or its CA is trusted no more"),
        })
    }

    fn of_header(&self, header: &HeaderValue) -> Result<Arc<Caller>, &'static str> {
        let token = header.as_bytes().strip_prefix(SCHEME).ok_or("the header authorization is no Bearer")?;
        let tokens = self.tokens.as_ref().map(|tokens| tokens.current());
        let caller = tokens.as_ref().and_then(|tokens| tokens.find(token)).ok_or("the token is unknown")?;
        if has_expired(caller) { Err("the token has expired") } else { Ok(caller.clone()) }
    }

    /// One for each name, whichever of its credentials is used.
    fn allowance(&self, mode: Mode, caller: &Caller) -> Arc<Allowance> {
        let mut allowances = lock(&self.allowances);
        let limits = Limits { calls_per_s: caller.calls_per_s.unwrap_or(self.limits.calls_per_s), ..self.limits };
        if let Some(known) = allowances.get(&*caller.name).and_then(Weak::upgrade) {
            known.set(limits); // they may have been changed meanwhile
            return known;
        }
        allowances.retain(|_, one| one.strong_count() > 0);
        // Whoever signs certificates makes up their names.
        let shown = if mode == Mode::Token { &*caller.name } else { caller.role.name() };
        let counted = self.metrics.security.calls_of(shown);
        let allowance = Allowance::new(limits, counted);
        allowances.insert(caller.name.to_string(), Arc::downgrade(&allowance));
        allowance
    }

    /// Notes a failure. Returns how late to answer.
    fn fail(&self, from: IpAddr, why: &'static str) -> Duration {
        let (mut failures, now) = (lock(&self.failures), Instant::now());
        failures.unsaid += 1;
        if failures.said.is_none_or(|said| now - said >= SAY_INTERVAL) {
            warn!(%from, "{} calls without a valid credential; of the last one: {why}", failures.unsaid);
            (failures.said, failures.unsaid) = (Some(now), 0);
        }
        failures.note(from, now)
    }
}

impl Failures {
    fn note(&mut self, from: IpAddr, now: Instant) -> Duration {
        if self.by_address.len() >= MAX_ADDRESSES && !self.by_address.contains_key(&from) {
            self.by_address.retain(|_, (_, since)| now - *since < PATIENCE.1);
            if self.by_address.len() >= MAX_ADDRESSES {
                self.by_address.clear(); // so many at once are not held up by this
            }
        }
        let (count, since) = self.by_address.entry(from).or_insert((0, now));
        if now - *since >= PATIENCE.1 {
            (*count, *since) = (0, now);
        }
        *count += 1;
        if *count > PATIENCE.0 { LATE } else { Duration::ZERO }
    }
}

impl Identity {
    pub fn of(decided: &Decided, peer: &Arc<Peer>) -> Self {
        let Decided { header, caller, allowance, .. } = decided.clone();
        Self { caller, allowance, peer: peer.clone(), header }
    }

    /// In how long the credential ends by itself.
    pub fn expires_in(&self) -> Option<Duration> {
        self.caller.expires_s.map(|at| Duration::from_secs(at.saturating_sub(clock::unix_s())))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}) from {}", self.caller.name, self.caller.role.name(), self.peer.addr)
    }
}

fn has_expired(caller: &Caller) -> bool {
    caller.expires_s.is_some_and(|at| at <= clock::unix_s())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_fails_again_and_again_is_answered_late_and_not_for_ever() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let late = |failures: &mut Failures, n, now| !failures.note(address(n), now).is_zero();
        assert_eq!((0..30).filter(|_| late(&mut failures, 1, now)).count(), 10);
        assert!(!late(&mut failures, 2, now), "others are not held up");
        assert!(!late(&mut failures, 1, now + PATIENCE.1), "nor is it, later");
        (10..20_000).for_each(|n| _ = failures.note(address(n), now));
        assert!(failures.by_address.len() <= MAX_ADDRESSES, "a crowd is not remembered");
    }
}
