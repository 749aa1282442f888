//! `GatewayService`: leases and streams. Every call answers UNIMPLEMENTED yet; gateways bind without registering.

use crate::pb::gateway_service_server::GatewayService;

pub struct Gateways;

#[tonic::async_trait]
impl GatewayService for Gateways {
    type AttachStream = tonic::codegen::BoxStream<crate::pb::NodeFrame>;
}
