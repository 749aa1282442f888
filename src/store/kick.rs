//! Kicks: as they stand in the outbox, and as gateways are told.

use prost::Message;

use crate::domain::id::Epoch;

/// A route that was removed by another device's bind, or whose client is to go elsewhere: its gateway has to be told.
#[derive(Clone, PartialEq, Message)]
pub struct KickedRoute {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(string, tag = "2")]
    pub device_id: String,
    #[prost(uint64, tag = "3")]
    pub epoch: u64,
    #[prost(uint64, tag = "4")]
    pub bound_version: u64,
    #[prost(int32, tag = "5")]
    pub reason: i32,
    /// The rest as in [`KickOrder`].
    #[prost(string, repeated, tag = "6")]
    pub reconnect_to: Vec<String>,
    #[prost(uint32, tag = "7")]
    pub reconnect_after_ms: u32,
    #[prost(uint32, tag = "8")]
    pub close_after_ms: u32,
}

impl KickedRoute {
    /// What an order to the gateway that lives `epoch` is about.
    pub fn of(order: KickOrder, epoch: Epoch) -> Self {
        let bound_version = order.route_key.rsplit(':').next().and_then(|version| version.parse().ok()).unwrap_or_default();
        let KickOrder { user_id, device_id, reason, reconnect_to, reconnect_after_ms, close_after_ms, .. } = order;
        let epoch = epoch.0;
        Self { user_id, device_id, epoch, bound_version, reason, reconnect_to, reconnect_after_ms, close_after_ms }
    }

    /// The order to the gateway.
    pub fn order(&self) -> KickOrder {
        let route_key = format!("user:route:{}:{}", self.user_id, self.bound_version);
        let Self { user_id, reason, reconnect_after_ms, close_after_ms, .. } = *self;
        let (device_id, reconnect_to) = (self.device_id.clone(), self.reconnect_to.clone());
        KickOrder { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms }
    }

    /// The order to a gateway that does not attach: a `NodeFrame` with a `Kick`, as `gateway.proto` has it.
    pub fn as_frame(&self) -> KickFrame {
        KickFrame { kick: Some(self.order()) }
    }
}

/// Field for field a `mpim.NodeFrame` that holds a kick.
#[derive(Clone, PartialEq, Message)]
pub struct KickFrame {
    #[prost(message, optional, tag = "7")]
    kick: Option<KickOrder>,
}

/// Field for field a `mpim.Kick`.
#[derive(Clone, PartialEq, Message)]
pub struct KickOrder {
    #[prost(int64, tag = "1")]
    pub user_id: i64,
    #[prost(string, tag = "2")]
    pub device_id: String,
    #[prost(string, tag = "3")]
    pub route_key: String,
    #[prost(int32, tag = "4")]
    pub reason: i32,
    /// Public addresses, the best first.
    #[prost(string, repeated, tag = "5")]
    pub reconnect_to: Vec<String>,
    #[prost(uint32, tag = "6")]
    pub reconnect_after_ms: u32,
    #[prost(uint32, tag = "7")]
    pub close_after_ms: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn what_a_gateway_is_told_survives_a_repeat_and_reads_as_the_proto_says() {
        let kicked = KickedRoute {
            user_id: 7,
            device_id: "phone".to_owned(),
            epoch: 9,
            bound_version: 64,
            reason: pb::Reason::Drain.into(),
            reconnect_to: vec!["gw-2:443".to_owned(), "gw-3:443".to_owned()],
            reconnect_after_ms: 250,
            close_after_ms: 10_000,
        };
        assert_eq!(KickedRoute::of(kicked.order(), Epoch(9)), kicked, "lost with its stream, it is repeated as it was");
        let frame = pb::NodeFrame::decode(kicked.as_frame().encode_to_vec().as_slice()).unwrap();
        let Some(pb::node_frame::Body::Kick(kick)) = frame.body else { panic!("{frame:?}") };
        let pb::Kick { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms } = kick;
        let order = KickOrder { user_id, device_id, route_key, reason, reconnect_to, reconnect_after_ms, close_after_ms };
        assert_eq!(order, kicked.order());
    }
}
