//! Gateways live by leases. A route names one *life* of a gateway by its epoch, so one fact ("this life is over") takes all
//! its users offline at once, on every node. That fact never changes back: it may be believed from anywhere, late or twice.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::NumberMap;
use crate::domain::time::Timestamp;

/// How long after two missed beats a managed life is late: room for the network and the merging of heartbeats.
const LATE_MARGIN: Duration = Duration::from_secs(1);

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
    pub alive: bool,
    pub lease_until: Timestamp,
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
    pub fn liveness(&self, now: Timestamp, heartbeat_interval: Duration) -> Liveness {
        match (self.alive, self.kind) {
            (false, _) => Liveness::Over,
            (true, LifeKind::Unmanaged) => Liveness::OnTime,
            (true, LifeKind::Managed) if self.lease_until <= now.plus(heartbeat_interval + LATE_MARGIN) => Liveness::Late,
            (true, LifeKind::Managed) => Liveness::OnTime,
        }
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

    /// Takes `life` over, unless the table already knows that it has ended.
    pub fn learn(&mut self, life: Arc<Life>) {
        let over = self.lives.get(&life.epoch).is_some_and(|known| !known.alive);
        if !over {
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
        Life { epoch: Epoch(1), gateway, kind, alive, lease_until: Timestamp(lease_until) }
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
    fn late_news_do_not_revive_a_life() {
        let mut table = LifeTable::default();
        table.learn(Arc::new(life(LifeKind::Managed, true, 1)));
        table.learn(Arc::new(life(LifeKind::Managed, false, 1)));
        table.learn(Arc::new(life(LifeKind::Managed, true, 2)));
        assert!(!table.get(Epoch(1)).unwrap().alive);
    }
}
