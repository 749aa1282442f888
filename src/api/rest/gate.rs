//! What stands before the handlers: by which name the port may be called, and how long a request may take.

use std::collections::HashSet;
use std::net::IpAddr;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::extract::State;
use axum::http::Version;
use axum::http::header::HOST;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::response::Response;
use tokio::time::timeout;

use crate::api::rest::problem::Problem;

/// How long a request may take.
pub const MAX_TIME: Duration = Duration::from_secs(10);
/// When to come again whom it took too long.
const RETRY: Duration = Duration::from_secs(1);
/// Probes, which may know the node by any name. They tell strangers little.
const FOR_ALL: [&str; 3] = ["/livez", "/readyz", "/healthz"];

/// Names under which the port may be called: a browser that was led here under another name obeys a stranger's page.
pub struct Hosts(HashSet<String>);

impl Hosts {
    /// These, besides IP addresses and localhost.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| plain(&name)).filter(|name| !name.is_empty()).collect())
    }

    /// `host`, or `host:port`.
    fn allow(&self, authority: &str) -> bool {
        if let Some((bracketed, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            return bracketed.parse::<Ipv6Addr>().is_ok();
        }
        let host = plain(authority.rsplit_once(':').map_or(authority, |(host, _)| host));
        host == "localhost" || host.parse::<IpAddr>().is_ok() || self.0.contains(&host)
    }
}

fn plain(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Turns away who calls the port by a name that is not its own. Not probes; and not gRPC over HTTP/2, which no browser speaks
/// without a certificate that fits the name.
pub async fn check_host(State(hosts): State<Arc<Hosts>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_exempt = FOR_ALL.contains(&path) || (path.starts_with("/mpim.") && request.version() == Version::HTTP_2);
    let header = || request.headers().get(HOST).and_then(|host| host.to_str().ok());
    let named = request.uri().authority().map(|authority| authority.as_str()).or_else(header).unwrap_or_default();
    if is_exempt || hosts.allow(named) {
        return next.run(request).await;
    }
    Problem::denied("the header Host names none of this node's names: admin.allowed_hosts").into_response()
}

/// Gives up what takes too long. An order that was begun goes on to its end.
pub async fn in_time(request: Request, next: Next) -> Response {
    match timeout(MAX_TIME, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::unavailable(format!("it took longer than {} s", MAX_TIME.as_secs()), RETRY).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_answers_to_addresses_and_to_its_own_names() {
        let hosts = Hosts::new(["Node-1.internal".to_owned(), String::new()]);
        for host in ["127.0.0.1", "10.0.0.1:6001", "[::1]:6001", "[::1]", "localhost:6001", "LOCALHOST", "node-1.internal.:1"] {
            assert!(hosts.allow(host), "{host}");
        }
        for host in
            ["", ":6001", "evil.example", "evil.example:6001", "[evil]:6001", "127.0.0.1.evil.example", "[::1", "internal"]
        {
            assert!(!hosts.allow(host), "{host}");
        }
    }
}
