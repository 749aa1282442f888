//! Who may make which call: one table. What is not in it is offered to nobody.

use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use tonic::codegen::http::Extensions;
use tonic::codegen::http::HeaderMap;
use tonic::codegen::http::Method;
use tonic::codegen::http::header::CONTENT_TYPE;

use crate::api::status::status;
use crate::domain::caller::GatewayPatterns;
use crate::domain::caller::Role;
use crate::domain::id::GatewayAddr;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::security::audit::Audit;
use crate::security::audit::Entry;
use crate::security::callers::Callers;
use crate::security::callers::Identity;
use crate::security::peer::Decided;
use crate::security::peer::Peer;

/// Sets of roles.
const GATEWAY: u8 = 1;
const SERVICE: u8 = 2;
const VIEWER: u8 = 4;
const OPERATOR: u8 = 8;
const NODE: u8 = 16;
/// Whoever reaches the port.
const ANYBODY: u8 = 32;

/// One call, and which roles may make it.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// A gRPC method, or `GET /path`. One that ends in `*` stands for all that begin so, unless a longer one fits, too.
    pub call: &'static str,
    roles: u8,
    /// Counts towards `limits.calls_per_s`. Leases, unbinds and acknowledgements do not: to refuse them would make ghosts.
    is_limited: bool,
}

const fn rule(call: &'static str, roles: u8) -> Rule {
    Rule { call, roles, is_limited: true }
}

const fn unlimited(call: &'static str, roles: u8) -> Rule {
    Rule { call, roles, is_limited: false }
}

/// The first is that of single queries.
pub static RULES: [Rule; 59] = [
    rule("/mpim.PresenceService/QueryRoute", GATEWAY | SERVICE | VIEWER | OPERATOR),
    rule("/mpim.PresenceService/BatchQueryRoute", GATEWAY | SERVICE | VIEWER | OPERATOR),
    rule("/mpim.PresenceService/Deliver", GATEWAY | SERVICE | OPERATOR),
    rule("/mpim.PresenceService/BatchDeliver", GATEWAY | SERVICE | OPERATOR),
    rule("/mpim.PresenceService/BindRoute", GATEWAY | OPERATOR),
    rule("/mpim.PresenceService/BatchBindRoute", GATEWAY | OPERATOR),
    unlimited("/mpim.PresenceService/UnbindRoute", GATEWAY | OPERATOR),
    rule("/mpim.PresenceService/SetStatus", GATEWAY | SERVICE | OPERATOR),
    rule("/mpim.PresenceService/Watch", GATEWAY | SERVICE | VIEWER | OPERATOR),
    rule("/mpim.PresenceService/AllocateGateway", SERVICE | OPERATOR),
    rule("/mpim.PresenceService/ListNodes", GATEWAY | SERVICE | VIEWER | OPERATOR),
    rule("/mpim.PresenceService/GetStatusHistory", SERVICE | VIEWER | OPERATOR),
    rule("/mpim.PresenceService/GetOnlineTime", SERVICE | VIEWER | OPERATOR),
    unlimited("/mpim.GatewayService/Heartbeat", GATEWAY),
    unlimited("/mpim.GatewayService/AckDelivery", GATEWAY),
    unlimited("/mpim.GatewayService/RegisterGateway", GATEWAY),
    unlimited("/mpim.GatewayService/DeregisterGateway", GATEWAY),
    unlimited("/mpim.GatewayService/Attach", GATEWAY),
    rule("/mpim.GatewayService/PullInbox", GATEWAY | SERVICE),
    unlimited("/mpim.GatewayService/AckInbox", GATEWAY | SERVICE),
    unlimited("/mpim.NodeService/Forward", NODE),
    unlimited("/mpim.NodeService/ForwardAcks", NODE),
    unlimited("/mpim.NodeService/Inspect", NODE),
    unlimited("/mpim.NodeService/InspectNode", NODE),
    unlimited("/mpim.AdminService/ListGateways", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/PurgeGateways", OPERATOR),
    unlimited("/mpim.AdminService/HoldGateways", OPERATOR),
    unlimited("/mpim.AdminService/ForgetUser", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/DrainGateway", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/CancelDrain", OPERATOR),
    unlimited("/mpim.AdminService/ListDrains", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/RebalanceGateways", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/MigrateUser", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/KickDevice", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/ForceOffline", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/ListOnline", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/CountOnline", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/PreviewPolicy", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/ListTop", VIEWER | OPERATOR),
    unlimited("/mpim.AdminService/ExplainRoute", VIEWER | OPERATOR),
    unlimited("/grpc.health.v1.Health/Check", ANYBODY),
    unlimited("/grpc.health.v1.Health/List", ANYBODY),
    unlimited("/grpc.health.v1.Health/Watch", ANYBODY),
    unlimited("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", ANYBODY),
    unlimited("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", ANYBODY),
    unlimited("GET /", ANYBODY),
    unlimited("GET /web/*", ANYBODY),
    unlimited("GET /livez", ANYBODY),
    unlimited("GET /readyz", ANYBODY),
    unlimited("GET /healthz", ANYBODY),
    unlimited(METRICS, VIEWER | OPERATOR),
    unlimited("GET /api", ANYBODY),
    unlimited("GET /api/v1/openapi.json", ANYBODY),
    unlimited("GET /api/v1/*", VIEWER | OPERATOR),
    unlimited("POST /api/v1/*", OPERATOR),
    unlimited("POST /api/v1/allocate", VIEWER | OPERATOR),
    unlimited("POST /api/v1/policy/preview", VIEWER | OPERATOR),
    unlimited("PUT /api/v1/*", OPERATOR),
    unlimited("DELETE /api/v1/*", OPERATOR),
];
const METRICS: &str = "GET /metrics";
const DELIVERIES: [&str; 2] = ["/mpim.PresenceService/Deliver", "/mpim.PresenceService/BatchDeliver"];

/// Decides about each call before its body is read.
pub struct Access {
    pub callers: Arc<Callers>,
    pub audit: Audit,
    pub metrics: Arc<Metrics>,
    pub gateway_may_deliver: bool,
    pub gateway_may_watch_any: bool,
    pub metrics_are_open: bool,
}

/// A call that was let in, for whoever serves it.
#[derive(Clone)]
pub struct Admission {
    pub access: Arc<Access>,
    pub identity: Identity,
    call: &'static str,
}

/// Why a call was not let in.
pub struct Refused {
    pub status: Status,
    /// How long to wait before that is said.
    pub late: Duration,
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self { status, late: Duration::ZERO }
    }
}

impl Rule {
    pub fn find(call: &str) -> Option<&'static Self> {
        let begins_so = |rule: &&Self| rule.call.strip_suffix('*').is_some_and(|head| call.starts_with(head));
        let exact = RULES.iter().find(|rule| rule.call == call);
        exact.or_else(|| RULES.iter().filter(begins_so).max_by_key(|rule| rule.call.len()))
    }

    /// Whether a caller with this role may make the call.
    pub fn allows(&self, role: Role) -> bool {
        let bit = match role {
            Role::Gateway => GATEWAY,
            Role::Service => SERVICE,
            Role::Viewer => VIEWER,
            Role::Operator => OPERATOR,
            Role::Node => NODE,
        };
        self.roles & (bit | ANYBODY) != 0
    }

    pub fn is_open(&self) -> bool {
        self.roles & ANYBODY != 0
    }
}

impl Access {
    /// Lets a call in, or not. None: anybody may make it, and nobody was asked.
    ///
    /// # Errors
    /// The call is not offered, or not to this caller, or not now.
    pub fn admit(
        self: &Arc<Self>,
        call: &str,
        peer: Option<&Arc<Peer>>,
        headers: &HeaderMap,
    ) -> Result<Option<Admission>, Refused> {
        let rule = Rule::find(call).ok_or_else(|| Status::unimplemented("there is no such call"))?;
        if rule.is_open() || (rule.call == METRICS && self.metrics_are_open) {
            return Ok(None);
        }
        let peer = peer.ok_or_else(|| Status::internal("a connection without its other end"))?;
        // Cloning counts references that all threads share; single queries come by the hundred thousand, and need none.
        let is_let_in = |known: &Decided| {
            std::ptr::eq(rule, &RULES[0]) && rule.allows(known.caller.role) && known.allowance.take_call().is_ok()
        };
        let known = |known: &Decided| if is_let_in(known) { None } else { Some(Identity::of(known, peer)) };
        let identity = self.callers.identify(peer, headers, known).map_err(|unknown| {
            let status = Status::unauthenticated(
                "a valid credential is needed: a token in the header authorization, or a client certificate",
            );
            Refused { status, late: unknown.late }
        })?;
        let Some(identity) = identity else { return Ok(None) };
        let admission = Admission { access: self.clone(), identity, call: rule.call };
        let caller = &*admission.identity.caller;
        let may_not_deliver = caller.role == Role::Gateway && !self.gateway_may_deliver && DELIVERIES.contains(&rule.call);
        if !rule.allows(caller.role) || may_not_deliver {
            return Err(admission.denied_on(call, "the role may not make this call").into());
        }
        if rule.is_limited {
            admission.take_call().map_err(|error| status(&error))?;
        }
        Ok(Some(admission))
    }
}

impl Admission {
    /// What was let in with a request.
    pub fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// # Errors
    /// The caller is a gateway, and this is not one of its addresses.
    pub fn check_gateway(&self, gateway: &GatewayAddr) -> Result<(), Status> {
        match self.identity.caller.may_speak_for(gateway) {
            true => Ok(()),
            false => Err(self.denied(&format!("it may not speak for {gateway}"))),
        }
    }

    pub fn is_gateway(&self) -> bool {
        self.identity.caller.role == Role::Gateway
    }

    /// For which gateways the users have to be bound whom the caller watches. None: it may watch anybody.
    pub fn watches_only(&self) -> Option<Arc<GatewayPatterns>> {
        (self.is_gateway() && !self.access.gateway_may_watch_any).then(|| self.identity.caller.gateways.clone())
    }

    /// One more call, as those that come by themselves.
    ///
    /// # Errors
    /// The caller has made more than it may.
    pub fn take_call(&self) -> Result<(), Error> {
        self.limited(self.identity.allowance.take_call(), "this caller makes more calls than it may (calls_per_s)")
    }

    /// # Errors
    /// The caller has named more users than it may.
    pub fn take_users(&self, users: usize) -> Result<(), Error> {
        self.limited(self.identity.allowance.take_users(users), "this caller names more users than it may (users_per_s)")
    }

    fn limited(&self, taken: Result<(), Duration>, what: &'static str) -> Result<(), Error> {
        taken.map_err(|retry_after| {
            self.access.metrics.shed("caller");
            Error::Limited { what, retry_after }
        })
    }

    /// What a caller with a valid credential is told who may not do something. It is taken down.
    pub fn denied(&self, why: &str) -> Status {
        self.denied_on(self.call, why)
    }

    fn denied_on(&self, call: &str, why: &str) -> Status {
        let Identity { caller, allowance, .. } = &self.identity;
        let role = caller.role.name();
        self.access.metrics.security.denied(role);
        if allowance.take_denial() {
            let (action, reason) = (self.call.to_owned(), why.to_owned());
            let target = if call == self.call { String::new() } else { call.to_owned() };
            let entry = Entry { action, target, outcome: "denied", reason, ..self.actor() };
            self.access.audit.note(entry);
        }
        Status::permission_denied(format!("{call} as {role}: {why}"))
    }

    fn actor(&self) -> Entry {
        let Identity { caller, peer, .. } = &self.identity;
        Entry { who: caller.name.to_string(), role: caller.role.name(), from_addr: peer.addr.to_string(), ..Entry::default() }
    }
}

/// Takes down what an operator has changed by a call that others make, too.
pub fn note_operator<T>(
    extensions: &Extensions,
    action: &'static str,
    target: impl FnOnce() -> String,
    done: &Result<T, Status>,
) {
    let Some(admission) = Admission::of(extensions) else { return };
    if admission.identity.caller.role == Role::Operator {
        let (outcome, reason) = match done {
            Ok(_) => ("ok", String::new()),
            Err(status) => ("failed", status.message().to_owned()),
        };
        let action = action.to_owned();
        admission.access.audit.note(Entry { action, target: target(), outcome, reason, ..admission.actor() });
    }
}

/// Whether a call says that it is gRPC, as every client does. A web page cannot, unless it asks first and somebody agrees, which
/// nobody here does: so no page gives orders in the name of the operator who looks at it.
pub fn says_grpc(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// How [`RULES`] have a request by HTTP: whatever else is asked is asked as GET, and has no effect.
pub fn asked(method: &Method, path: &str) -> String {
    let rights = if [Method::POST, Method::PUT, Method::DELETE].contains(method) { method } else { &Method::GET };
    format!("{rights} {path}")
}

/// Whether a request changes something: who only looks may not make it.
pub fn is_order(method: &Method, path: &str) -> bool {
    Rule::find(&asked(method, path)).is_some_and(|rule| !rule.is_open() && !rule.allows(Role::Viewer))
}

/// Who makes a call, for the audit. Without [auth] that is only an address.
pub fn actor(extensions: &Extensions) -> Entry {
    let from = || extensions.get::<Arc<Peer>>().map(|peer| peer.addr.to_string()).unwrap_or_default();
    Admission::of(extensions).map_or_else(|| Entry { from_addr: from(), ..Entry::default() }, Admission::actor)
}

/// What changes something is for operators; viewers only see what it would do.
///
/// # Errors
/// The caller is no operator.
pub fn check_operator(extensions: &Extensions) -> Result<(), Status> {
    match Admission::of(extensions) {
        Some(admission) if admission.identity.caller.role != Role::Operator => Err(admission.denied("only with dry_run")),
        _ => Ok(()),
    }
}

/// The same for a call with a body that names a gateway; without [auth] anybody speaks for any.
///
/// # Errors
/// The caller is a gateway, and this is not one of its addresses.
pub fn check_gateway(extensions: &Extensions, gateway: &GatewayAddr) -> Result<(), Status> {
    Admission::of(extensions).map_or(Ok(()), |admission| admission.check_gateway(gateway))
}

/// A batch that names so many users.
///
/// # Errors
/// The caller has named more users than it may.
pub fn take_users(extensions: &Extensions, users: usize) -> Result<(), Status> {
    Admission::of(extensions).map_or(Ok(()), |admission| admission.take_users(users).map_err(|error| status(&error)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost_reflect::DescriptorPool;

    use super::*;
    use crate::pb;

    #[test]
    fn every_call_of_ours_is_in_the_table_and_nothing_else() {
        let pool = DescriptorPool::decode(pb::DESCRIPTORS).expect("compiled in");
        let methods = pool.services().flat_map(|service| service.methods().collect::<Vec<_>>());
        let ours: BTreeSet<String> =
            methods.map(|method| format!("/{}/{}", method.parent_service().full_name(), method.name())).collect();
        let listed = RULES.iter().map(|rule| rule.call.to_owned()).filter(|call| call.starts_with("/mpim."));
        assert_eq!(listed.collect::<BTreeSet<_>>(), ours);
        assert!(RULES.iter().filter(|rule| rule.call.starts_with("/mpim.")).all(|rule| !rule.is_open()));
        let distinct: BTreeSet<&str> = RULES.iter().map(|rule| rule.call).collect();
        assert_eq!(distinct.len(), RULES.len(), "each once");
    }
}
