//! AllocateGateway and ListNodes: between wire types and the engine.

use std::sync::Arc;

use crate::api::convert;
use crate::domain::allocation::Ask;
use crate::domain::allocation::CANDIDATES;
use crate::domain::id::MAX_ADDR_BYTES;
use crate::engine::gateways::allocation::Allocated;
use crate::engine::gateways::allocation::Allocator;
use crate::engine::gateways::allocation::Offer;
use crate::engine::messages::peers::Peers;
use crate::engine::read::lives::Lives;
use crate::error::Error;
use crate::pb;

/// Regions, addresses or labels of one question.
const MAX_NAMED: usize = 64;
const MAX_CANDIDATES: usize = 10;

#[derive(Clone)]
pub struct AllocationCalls {
    pub allocator: Arc<Allocator>,
    pub peers: Arc<Peers>,
    pub lives: Arc<Lives>,
}

impl AllocationCalls {
    /// # Errors
    /// The request is invalid.
    pub fn allocate(&self, request: pb::AllocateGatewayReq) -> Result<pb::AllocateGatewayResp, Error> {
        Ok(answer(self.allocator.allocate(&ask(request)?)))
    }

    /// The same, of which nothing is counted.
    ///
    /// # Errors
    /// The request is invalid.
    pub fn try_out(&self, request: pb::AllocateGatewayReq) -> Result<pb::AllocateGatewayResp, Error> {
        Ok(answer(self.allocator.try_out(&ask(request)?)))
    }

    pub fn nodes(&self) -> pb::ListNodesResp {
        let now = self.lives.clock.now();
        let listed = self.peers.listed();
        let nodes = listed.iter().map(|node| pb::Node {
            node_id: node.name.node_id.clone(),
            addr: node.name.addr.clone(),
            zone: node.name.zone.clone(),
            seen_ms_ago: convert::millis(now.since(node.seen_at)),
            draining: node.draining,
        });
        pb::ListNodesResp { result: convert::result(pb::Code::Ok, ""), nodes: nodes.collect() }
    }
}

fn ask(request: pb::AllocateGatewayReq) -> Result<Ask, Error> {
    let user = convert::user_id(request.user_id)?;
    convert::at_most("region", request.region.len(), convert::MAX_REGION_BYTES, "bytes")?;
    convert::at_most("latency_ms", request.latency_ms.len(), MAX_NAMED, "regions")?;
    for region in request.latency_ms.keys() {
        convert::at_most("latency_ms", region.len(), convert::MAX_REGION_BYTES, "bytes in a region")?;
    }
    convert::at_most("count", request.count as usize, MAX_CANDIDATES, "candidates")?;
    convert::at_most("exclude", request.exclude.len(), MAX_NAMED, "addresses")?;
    for addr in &request.exclude {
        convert::at_most("exclude", addr.len(), MAX_ADDR_BYTES, "bytes in an address")?;
    }
    convert::check_labels(&request.labels, MAX_NAMED)?;
    convert::platform(request.platform)?;
    Ok(Ask {
        region: request.region,
        latency_ms: request.latency_ms.into_iter().collect(),
        count: if request.count == 0 { CANDIDATES } else { request.count as usize },
        exclude: request.exclude,
        labels: request.labels.into_iter().collect(),
        ..Ask::of(user)
    })
}

fn answer(allocated: Allocated) -> pb::AllocateGatewayResp {
    let Allocated { offers, retry_after, algorithm, experiment } = allocated;
    let result = match offers.is_empty() {
        true => convert::result(pb::Code::NotFound, "no gateway takes users now"),
        false => convert::result(pb::Code::Ok, ""),
    };
    let (retry_after_ms, algorithm) = (convert::millis(retry_after), algorithm.name().to_owned());
    let candidates = offers.iter().map(candidate).collect();
    pb::AllocateGatewayResp { result, candidates, retry_after_ms, algorithm, experiment }
}

fn candidate(offer: &Offer) -> pb::Candidate {
    pb::Candidate {
        gateway_addr: offer.life.gateway.to_string(),
        public_addr: offer.life.public_addr().to_owned(),
        region: offer.life.profile.region.clone(),
        load: offer.load as f32,
        why: offer.why.name().to_owned(),
    }
}
