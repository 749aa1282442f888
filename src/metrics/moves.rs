//! What is counted of users who are moved.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use crate::domain::drain::DrainState;
use crate::metrics::ByOutcome;
use crate::metrics::ByState;
use crate::metrics::Register;

pub struct MoveMetrics {
    drains: Family<ByState, Gauge>,
    users: Family<ByOutcome, Counter>,
}

impl MoveMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            drains: r.gauges("drains", "drains of gateways that are waiting or running, on all nodes"),
            users: r.family("drain_users", "users who were to move, by what became of it on this node"),
        }
    }

    /// The drains that are active now.
    pub fn show(&self, active: impl Iterator<Item = DrainState> + Clone) {
        for state in [DrainState::Waiting, DrainState::Running] {
            let count = active.clone().filter(|known| *known == state).count();
            let state = state.name();
            self.drains.get_or_create(&ByState { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Users were told to go; of these, so many were not reached.
    pub fn asked(&self, users: u64, unheard: u64) {
        self.count("asked", users);
        self.count("unheard", unheard);
    }

    /// Users are bound elsewhere, or gone.
    pub fn moved(&self, users: u64) {
        self.count("moved", users);
    }

    /// Users have lost their routes.
    pub fn removed(&self, users: u64) {
        self.count("removed", users);
    }

    fn count(&self, outcome: &'static str, users: u64) {
        self.users.get_or_create(&ByOutcome { outcome }).inc_by(users);
    }
}
