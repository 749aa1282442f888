//! Gateways live by leases. A route names one *life* of a gateway by its epoch, so one fact ("this life is over") takes all
//! its users offline at once, on every node. That fact never changes back: it may be believed from anywhere, late or twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::NumberMap;
use crate::domain::time::Timestamp;

/// How long after two missed beats a managed life is late: room for the network and the merging of heartbeats.
const LATE_MARGIN: Duration = Duration::from_secs(1);
/// Says where clients reach a gateway, if `public_addr` does not.
const PUBLIC_ADDR_LABEL: &str = "public_addr";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifeKind {
    /// Registered: holds a lease and extends it by heartbeats.
    Managed,
    /// Never registered; its routes live for the route's time to live from their last bind.
    Unmanaged,
}

/// One life of a gateway, from its registration (or first bind) to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Life {
    pub epoch: Epoch,
    pub gateway: GatewayAddr,
    pub kind: LifeKind,
    pub lease_until: Timestamp,
    pub last_beat: Timestamp,
    /// It is asked to let its clients go.
    pub draining: bool,
    /// What it said of itself when it registered.
    pub profile: Arc<Profile>,
    /// As it said with its last beat.
    pub connections: u32,
    /// As it said with its last beat: from 0 on; 1 is a full gateway.
    pub load: f32,
    /// None: it lives.
    pub end: Option<End>,
    /// The node that has its stream, if it has one.
    pub attached: Option<Arc<str>>,
    /// Numbers its streams; only the newest counts.
    pub attach_no: u64,
}

/// What a gateway says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    pub region: String,
    /// Connections it can hold; 0: it does not say.
    pub capacity: u32,
    pub labels: BTreeMap<String, String>,
    /// How much of what is handed out it takes, next to others; 0: nobody new.
    pub weight: u32,
    /// Where clients reach it; empty: by its label of that name, or at its address.
    pub public_addr: String,
    /// Log-ins a second that it likes; 0: it does not say.
    pub login_rate: u32,
}

/// Of a gateway that says nothing of its weight.
pub const DEFAULT_WEIGHT: u32 = 100;

impl Default for Profile {
    fn default() -> Self {
        Self {
            region: String::new(),
            capacity: 0,
            labels: BTreeMap::new(),
            weight: DEFAULT_WEIGHT,
            public_addr: String::new(),
            login_rate: 0,
        }
    }
}

/// A gateway registers.
#[derive(Clone, Debug)]
pub struct Registration {
    pub gateway: GatewayAddr,
    /// The life it wants to go on with. None: it begins one.
    pub claimed: Option<Epoch>,
    pub profile: Profile,
}

/// A heartbeat.
#[derive(Clone, Debug)]
pub struct Beat {
    pub epoch: Epoch,
    pub connections: u32,
    pub load: f32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    pub at: Timestamp,
    pub reason: EndReason,
}

/// Why a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Its lease ran out.
    Expired,
    /// A process registered under its address.
    Superseded,
    Deregistered,
    Operator,
    /// Its lease ran out during a hold, or right after one: no sign of another mass expiry.
    Held,
    /// Another node has said that it is over; why, SQL will say. Never stored.
    Untold,
}

impl EndReason {
    /// As operators are told; empty: not known yet.
    pub fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Superseded => "superseded",
            Self::Deregistered => "deregistered",
            Self::Operator => "operator",
            Self::Held => "held",
            Self::Untold => "",
        }
    }
}

/// Why a gateway may not go on with an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fence {
    /// The life is over and nobody took its place: register, and bind again.
    Expired,
    /// Another process has registered under the address: stop, or wait a lease.
    Superseded,
}

/// What a route on a life is worth now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    OnTime,
    /// Two beats missed, but the lease holds: still to be tried.
    Late,
    Over,
}

impl Life {
    /// A life that has just begun.
    pub fn begun(epoch: Epoch, gateway: GatewayAddr, kind: LifeKind, lease_until: Timestamp) -> Self {
        Self {
            epoch,
            gateway,
            kind,
            lease_until,
            last_beat: Timestamp::default(),
            draining: false,
            profile: Arc::default(),
            connections: 0,
            load: 0.0,
            end: None,
            attached: None,
            attach_no: 0,
        }
    }

    /// Where clients reach its gateway: as it says, by its label, or at its own address.
    pub fn public_addr(&self) -> &str {
        let of_label = self.profile.labels.get(PUBLIC_ADDR_LABEL).map_or("", String::as_str);
        let told = [self.profile.public_addr.as_str(), of_label].into_iter().find(|addr| !addr.is_empty());
        told.unwrap_or(self.gateway.as_str())
    }

    /// Epochs are times in microseconds, unless two lives began in one.
    pub fn began(&self) -> Timestamp {
        Timestamp(i64::try_from(self.epoch.0 / 1_000).unwrap_or(i64::MAX))
    }

    pub fn is_alive(&self) -> bool {
        self.end.is_none()
    }

    pub fn is_managed(&self) -> bool {
        self.kind == LifeKind::Managed
    }

    /// Its lease has ended, and nobody has declared it dead yet.
    pub fn is_lapsed(&self, now: Timestamp) -> bool {
        self.is_managed() && self.is_alive() && self.lease_until < now
    }

    /// From when on two of its beats are missing, if none comes until then.
    pub fn late_at(&self, heartbeat_interval: Duration) -> Timestamp {
        self.lease_until.minus(late_before_end(heartbeat_interval))
    }

    pub fn liveness(&self, now: Timestamp, heartbeat_interval: Duration) -> Liveness {
        match (self.is_alive(), self.kind) {
            (false, _) => Liveness::Over,
            (true, LifeKind::Unmanaged) => Liveness::OnTime,
            (true, LifeKind::Managed) if self.late_at(heartbeat_interval) <= now => Liveness::Late,
            (true, LifeKind::Managed) => Liveness::OnTime,
        }
    }

    /// The same life, over. The first end counts.
    pub fn ended(&self, end: End) -> Self {
        Self { end: self.end.or(Some(end)), ..self.clone() }
    }
}

/// How long before the end of its lease a life is late.
pub fn late_before_end(heartbeat_interval: Duration) -> Duration {
    heartbeat_interval + LATE_MARGIN
}

impl Fence {
    /// Why a life of a gateway that lives `lives` now may not go on.
    pub fn of<'a>(mut lives: impl Iterator<Item = &'a Life>) -> Self {
        let taken = lives.any(|life| life.is_alive() && life.is_managed());
        if taken { Self::Superseded } else { Self::Expired }
    }
}

/// Lives by epoch. Merging knows that "over" is for good.
#[derive(Clone, Debug, Default)]
pub struct LifeTable {
    lives: NumberMap<Epoch, Arc<Life>>,
}

impl LifeTable {
    pub fn get(&self, epoch: Epoch) -> Option<&Arc<Life>> {
        self.lives.get(&epoch)
    }

    /// Whether `life` tells more than that a lease was extended: it is unknown here, has ended, or its stream has changed.
    pub fn is_news(&self, life: &Life) -> bool {
        self.lives.get(&life.epoch).is_none_or(|known| {
            let stream = life.attach_no >= known.attach_no && life.attached != known.attached;
            known.is_alive() && (!life.is_alive() || stream || life.attach_no > known.attach_no)
        })
    }

    /// Takes `life` over, unless the table already knows that it has ended, or of a newer stream.
    pub fn learn(&mut self, life: Arc<Life>) {
        let outdated = self
            .lives
            .get(&life.epoch)
            .is_some_and(|known| !known.is_alive() || (life.is_alive() && known.attach_no > life.attach_no));
        if !outdated {
            self.lives.insert(life.epoch, life);
        }
    }

    /// Forgets every life that `keep` does not want.
    pub fn retain(&mut self, keep: impl Fn(&Life) -> bool) {
        self.lives.retain(|_, life| keep(life));
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Life>> {
        self.lives.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = Duration::from_secs(5);

    fn life(kind: LifeKind, alive: bool, lease_until: i64) -> Life {
        let gateway = GatewayAddr::parse("gw-1:7000").unwrap();
        let end = (!alive).then_some(End { at: Timestamp(1), reason: EndReason::Expired });
        Life { end, ..Life::begun(Epoch(1), gateway, kind, Timestamp(lease_until)) }
    }

    #[test]
    fn a_life_is_judged_by_its_lease_and_is_over_for_good() {
        let now = Timestamp(100_000);
        for (kind, alive, lease_until, want) in [
            (LifeKind::Managed, true, 115_000, Liveness::OnTime),
            (LifeKind::Managed, true, 106_001, Liveness::OnTime),
            (LifeKind::Managed, true, 106_000, Liveness::Late),
            (LifeKind::Managed, true, 90_000, Liveness::Late), // nobody has declared it dead yet
            (LifeKind::Managed, false, 115_000, Liveness::Over),
            (LifeKind::Unmanaged, true, 0, Liveness::OnTime),
            (LifeKind::Unmanaged, false, 0, Liveness::Over),
        ] {
            let life = life(kind, alive, lease_until);
            assert_eq!(life.liveness(now, BEAT), want, "{life:?}");
        }
    }

    #[test]
    fn clients_reach_a_gateway_where_it_says_or_by_its_label_or_at_its_own_address() {
        for (said, label, want) in [("wss://a", "wss://b", "wss://a"), ("", "wss://b", "wss://b"), ("", "", "gw-1:7000")] {
            let labels = [(PUBLIC_ADDR_LABEL.to_owned(), label.to_owned())].into();
            let profile = Arc::new(Profile { public_addr: said.to_owned(), labels, ..Profile::default() });
            assert_eq!(Life { profile, ..life(LifeKind::Managed, true, 1) }.public_addr(), want);
        }
    }

    #[test]
    fn only_a_living_registered_life_has_taken_the_place_of_another() {
        for (lives, want) in [
            (vec![], Fence::Expired),
            (vec![life(LifeKind::Managed, false, 1)], Fence::Expired),
            (vec![life(LifeKind::Unmanaged, true, 1)], Fence::Expired), // somebody bound without an epoch
            (vec![life(LifeKind::Managed, false, 1), life(LifeKind::Managed, true, 1)], Fence::Superseded),
        ] {
            assert_eq!(Fence::of(lives.iter()), want, "{lives:?}");
        }
    }

    #[test]
    fn the_first_end_of_a_life_counts() {
        let (first, second) = (EndReason::Superseded, EndReason::Expired);
        let end = |at, reason| End { at: Timestamp(at), reason };
        let ended = life(LifeKind::Managed, true, 1).ended(end(5, first)).ended(end(6, second));
        assert_eq!(ended.end, Some(end(5, first)));
    }

    #[test]
    fn late_news_do_not_revive_a_life() {
        let mut table = LifeTable::default();
        table.learn(Arc::new(life(LifeKind::Managed, true, 1)));
        table.learn(Arc::new(life(LifeKind::Managed, false, 1)));
        table.learn(Arc::new(life(LifeKind::Managed, true, 2)));
        assert!(!table.get(Epoch(1)).unwrap().is_alive());
    }
}
