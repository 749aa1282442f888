//! Where a device of a user is.

use serde::Serialize;
use utoipa::ToSchema;

use crate::api::rest::words::Platform;
use crate::pb;

/// How sure it is that a route leads to a device.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RouteState {
    Live,
    /// Not confirmed lately: still worth trying.
    Suspect,
}

impl RouteState {
    /// None: nothing is said, or the route is over.
    pub fn of(state: pb::RouteState) -> Option<Self> {
        match state {
            pb::RouteState::Live => Some(Self::Live),
            pb::RouteState::Suspect => Some(Self::Suspect),
            pb::RouteState::Unspecified => None,
        }
    }
}

/// A device of a user and the gateway that holds its connection.
#[derive(Serialize, ToSchema)]
pub struct Route {
    /// Empty: the user's one unnamed device.
    device_id: String,
    platform: Platform,
    gateway_addr: String,
    gateway_epoch: String,
    /// The gateway's name for the connection.
    conn_id: String,
    /// Null: its gateway did not say.
    client_ip: Option<String>,
    client_port: i32,
    bound_at_ms: i64,
    route_key: String,
    /// Null: nothing is said of it.
    state: Option<RouteState>,
    /// Nobody has used the device for a while.
    idle: bool,
}

impl From<pb::Route> for Route {
    fn from(route: pb::Route) -> Self {
        Self {
            platform: Platform::of(route.platform()),
            state: RouteState::of(route.state()),
            device_id: route.device_id,
            gateway_addr: route.gateway_addr,
            gateway_epoch: route.gateway_epoch.to_string(),
            conn_id: route.conn_id,
            client_ip: Some(route.client_ip).filter(|ip| !ip.is_empty()),
            client_port: route.client_port,
            bound_at_ms: route.bound_at_ms,
            route_key: route.route_key,
            idle: route.idle,
        }
    }
}

/// As answers have them.
pub fn all(routes: Vec<pb::Route>) -> Vec<Route> {
    routes.into_iter().map(Route::from).collect()
}
