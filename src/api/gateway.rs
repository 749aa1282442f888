//! `GatewayService`: leases and streams. Every call answers UNIMPLEMENTED yet; gateways bind without registering.

use crate::pb::gateway_service_server::GatewayService;

pub struct Gateways;

impl GatewayService for Gateways {}
