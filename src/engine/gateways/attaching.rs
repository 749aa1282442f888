//! Attaching and detaching: what the database notes of a stream, and what becomes of the lease when it ends.

use std::sync::Arc;
use std::time::Duration;

use tracing::debug;
use tracing::info;

use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::Registration;
use crate::domain::id::Epoch;
use crate::engine::gateways::registry::Registry;
use crate::engine::gateways::registry::Terms;
use crate::engine::messages::kicks::Kicks;
use crate::engine::messages::streams::Attached;
use crate::engine::messages::streams::Streams;
use crate::error::Error;
use crate::store::codec::KickedRoute;

/// Who ended a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// This node: the lease stays as it is, the gateway goes on with another node.
    Ours,
    /// The gateway, or the network between: the lease is shortened to the grace.
    Theirs,
}

pub struct Attaching {
    pub registry: Arc<Registry>,
    pub streams: Arc<Streams>,
    pub kicks: Arc<Kicks>,
    /// What is left of a lease when a stream broke.
    pub grace: Duration,
}

impl Attaching {
    pub fn terms(&self) -> Terms {
        self.registry.terms
    }

    /// Begins a life of a gateway, or goes on with the one it claims, with a stream to this node.
    pub async fn attach(&self, registration: Registration) -> Result<Result<(Arc<Life>, Attached), Fence>, Error> {
        let gateway = registration.gateway.clone();
        let epoch = match self.registry.enter(registration).await? {
            Ok(epoch) => epoch,
            Err(fence) => return Ok(Err(fence)),
        };
        let life = match self.registry.attach(gateway.clone(), epoch).await? {
            Ok(life) => life,
            Err(fence) => return Ok(Err(fence)),
        };
        info!(gateway.addr = %gateway, gateway.epoch = epoch.0, "gateway {gateway} is attached to this node");
        let attached = self.streams.attach(epoch, life.attach_no);
        Ok(Ok((life, attached)))
    }

    /// A stream has ended. If the gateway has a newer one, anywhere, nothing else happens.
    pub async fn detach(&self, epoch: Epoch, no: u64, end: End) {
        let lost = self.streams.detach(epoch, no).into_iter().map(|kick| KickedRoute::of(kick, epoch));
        self.kicks.lost(lost);
        debug!(gateway.epoch = epoch.0, ?end, "a gateway's stream has ended");
        let grace = (end == End::Theirs).then_some(self.grace);
        let _ = self.registry.detach(epoch, no, grace).await; // if it cannot be noted, its lease ends by itself
    }
}
