//! Who calls, and for which gateways a caller may speak.

use std::fmt;
use std::sync::Arc;

use compact_str::CompactString;

use crate::domain::id::GatewayAddr;
use crate::domain::id::InvalidId;
use crate::domain::id::MAX_ADDR_BYTES;
use crate::domain::id::check_ascii;

/// Patterns that one caller may have.
pub const MAX_PATTERNS: usize = 100;
/// Wildcards in one pattern: each multiplies the ways to match.
const MAX_WILDCARDS: usize = 8;
/// Where a wildcard ends: it stands for a part of one label of a host's name, or of one number.
const ENDS: [u8; 4] = *b".:[]";

/// What a caller is; it decides which calls it may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Holds clients' sockets; speaks for its own addresses only.
    Gateway,
    /// Asks where users are, and delivers to them.
    Service,
    /// An operator who only looks.
    Viewer,
    Operator,
    /// Another node of the same store.
    Node,
}

impl Role {
    pub const ALL: [Self; 5] = [Self::Gateway, Self::Service, Self::Viewer, Self::Operator, Self::Node];

    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Service => "service",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Node => "node",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }
}

/// Somebody with a valid credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Shows in logs and in the audit.
    pub name: CompactString,
    pub role: Role,
    /// Only of the role gateway.
    pub gateways: Arc<GatewayPatterns>,
    /// From then on the credential is worth nothing: Unix seconds on this machine's clock, as for certificates.
    pub expires_s: Option<u64>,
    /// Calls per second, instead of `limits.calls_per_s`.
    pub calls_per_s: Option<u32>,
}

impl Caller {
    /// Whether it may say anything about this gateway. Only gateways are bound to addresses.
    pub fn may_speak_for(&self, gateway: &GatewayAddr) -> bool {
        self.role != Role::Gateway || self.gateways.cover(gateway)
    }
}

/// Addresses of gateways, such as `gw-eu-*:7000`. `*` stands for one or more characters within one label of a host's name, or
/// within one number; alone it stands for every address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GatewayPatterns(Vec<CompactString>);

impl GatewayPatterns {
    /// # Errors
    /// What is wrong with one of them, to be read after its field.
    pub fn parse(patterns: &[String]) -> Result<Self, InvalidId> {
        if patterns.len() > MAX_PATTERNS {
            return Err(InvalidId::new(format!("must be at most {MAX_PATTERNS} patterns, is {}", patterns.len())));
        }
        for pattern in patterns {
            check_ascii(pattern, 1, MAX_ADDR_BYTES)?;
            if pattern.matches('*').count() > MAX_WILDCARDS || pattern.contains("**") {
                return Err(InvalidId::new(format!("{pattern}: must have at most {MAX_WILDCARDS} `*`, and none beside another")));
            }
        }
        Ok(Self(patterns.iter().map(CompactString::from).collect()))
    }

    /// Every port of this host.
    pub fn host(host: &str) -> Self {
        Self(vec![CompactString::from(host), compact_str::format_compact!("{host}:*")])
    }

    /// This address alone. If it contains a `*`, whoever was let in under it has a pattern that stands for as much.
    pub fn exactly(gateway: &GatewayAddr) -> Self {
        Self(vec![CompactString::from(gateway.as_str())])
    }

    /// What [`fmt::Display`] has written.
    pub fn read(text: &str) -> Self {
        Self(text.split(' ').map(CompactString::from).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn cover(&self, gateway: &GatewayAddr) -> bool {
        self.0.iter().any(|pattern| pattern == "*" || matches(pattern.as_bytes(), gateway.as_str().as_bytes()))
    }
}

/// Separated by spaces.
impl fmt::Display for GatewayPatterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => {
            let longest = text.iter().position(|byte| ENDS.contains(byte)).unwrap_or(text.len());
            (1..=longest).any(|length| matches(rest, &text[length..]))
        }
        Some((byte, rest)) => text.first() == Some(byte) && matches(rest, &text[1..]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn covers(pattern: &str, gateway: &str) -> bool {
        GatewayPatterns::parse(&[pattern.to_owned()]).unwrap().cover(&GatewayAddr::parse(gateway).unwrap())
    }

    #[test]
    fn a_wildcard_stays_within_one_label_or_number() {
        for (pattern, gateway, want) in [
            ("gw-1:7000", "gw-1:7000", true),
            ("gw-1:7000", "gw-1:70000", false),
            ("gw-1:7000", "gw-11:7000", false),
            ("gw-1:*", "gw-1:7000", true),
            ("gw-1:*", "gw-1:", false),
            ("gw-1:*", "gw-1", false),
            ("gw-*:7000", "gw-eu-7:7000", true),
            ("gw-*:7000", "gw-:7000", false),
            ("gw-*:7000", "gw-eu.evil.example:7000", false),
            ("gw-*:7000", "gw-eu:1:7000", false),
            ("*.gw.im:7000", "a.gw.im:7000", true),
            ("*.gw.im:7000", "a.b.gw.im:7000", false),
            ("10.0.*.*:7000", "10.0.3.14:7000", true),
            ("10.0.*.*:7000", "10.0.3:7000", false),
            ("[::1]:*", "[::1]:7000", true),
            ("*", "anything.at.all:1", true),
            ("*:7000", "gw:7000", true),
            ("*:7000", "gw.im:7000", false),
            ("g*w*:7", "gww1:7", true),
        ] {
            assert_eq!(covers(pattern, gateway), want, "{pattern} {gateway}");
        }
    }

    #[test]
    fn patterns_that_cost_too_much_are_refused() {
        let parse = |pattern: String| GatewayPatterns::parse(&[pattern]).is_ok();
        assert!(parse("a*".repeat(MAX_WILDCARDS)) && !parse("a*".repeat(MAX_WILDCARDS + 1)));
        assert!(!parse("a**".to_owned()) && !parse(String::new()) && !parse("a b".to_owned()));
        let many = vec!["a".to_owned(); MAX_PATTERNS + 1];
        assert!(GatewayPatterns::parse(&many).is_err());
    }

    #[test]
    fn only_gateways_are_bound_to_addresses() {
        let gateway = GatewayAddr::parse("gw-2:7000").unwrap();
        for role in Role::ALL {
            let gateways = Arc::new(GatewayPatterns::host("gw-1"));
            let caller = Caller { name: "x".into(), role, gateways, expires_s: None, calls_per_s: None };
            assert_eq!(caller.may_speak_for(&gateway), role != Role::Gateway);
        }
    }
}
