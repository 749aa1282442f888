//! Of which users, and on which gateways, a lane changes most. The lane counts for itself, and shows others how far it has come
//! now and then: nothing is locked where every change passes.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use arc_swap::ArcSwap;

use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::top::Tally;
use crate::domain::top::Top;
use crate::engine::write::change::Change;
use crate::engine::write::change::Pending;

/// What was counted earlier counts half.
const HALF_LIFE: Duration = Duration::from_secs(60);
/// How old what is shown may be while there are changes.
const SHOWN_EVERY: Duration = Duration::from_secs(1);

/// What a lane has counted.
#[derive(Debug, Default)]
pub struct Busiest {
    /// Binds, unbinds, statuses and kicks that callers asked for, also those that changed nothing. Messages are none.
    pub changes: Tally<UserId>,
    pub binds: Tally<GatewayAddr>,
    /// How long that took: what is halved counts half.
    pub window: Duration,
}

/// Counts.
pub(super) struct Counter {
    changes: Top<UserId>,
    binds: Top<GatewayAddr>,
    /// Of what was halved.
    window: Duration,
    halved: Instant,
    shown_at: Instant,
    shown: Arc<ArcSwap<Busiest>>,
}

impl Counter {
    pub fn new(shown: Arc<ArcSwap<Busiest>>) -> Self {
        let now = Instant::now();
        Self { changes: Top::default(), binds: Top::default(), window: Duration::ZERO, halved: now, shown_at: now, shown }
    }

    pub fn note(&mut self, batch: &[Pending]) {
        for event in batch {
            if let Change::Bind(bind) = &event.change {
                self.binds.count(&bind.gateway);
            }
            let is_asked_for = match &event.change {
                Change::Bind(_) | Change::Unbind(_) | Change::SetStatus(_) => true,
                Change::ForceOffline(force) => !force.dry_run,
                Change::Sweep | Change::Inbox(_) | Change::EndStatus | Change::Forget => false,
            };
            if is_asked_for {
                self.changes.count(&event.user);
            }
        }
    }

    /// Shows what was counted, if it is time for that.
    pub fn show(&mut self) {
        let now = Instant::now();
        if now - self.shown_at < SHOWN_EVERY {
            return;
        }
        self.shown_at = now;
        while now - self.halved >= HALF_LIFE {
            self.changes.halve();
            self.binds.halve();
            self.halved += HALF_LIFE;
            self.window = (self.window + HALF_LIFE) / 2;
        }
        let window = self.window + (now - self.halved);
        self.shown.store(Arc::new(Busiest { changes: self.changes.tally(), binds: self.binds.tally(), window }));
    }
}
