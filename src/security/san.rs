//! Which role a certificate's name stands for.

use std::sync::Arc;

use compact_str::CompactString;

use crate::domain::caller::Caller;
use crate::domain::caller::GatewayPatterns;
use crate::domain::caller::Role;

/// The part of a name that is the gateway's address, without its port.
const GATEWAY: &str = "{gateway}";

/// `san` of [`Rule`], taken apart: text, and between each two pieces of it something that varies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SanRule {
    pieces: Vec<String>,
    /// Which gap is the gateway's address.
    gateway_gap: Option<usize>,
    role: Role,
    gateways: Arc<GatewayPatterns>,
}

impl SanRule {
    /// `san` is a URI as it stands in certificates, or `dns:NAME`. `*` stands for a part without `/`, `.` and `:`; `{gateway}`
    /// for the gateway's address.
    ///
    /// # Errors
    /// What is wrong, to be read after its field.
    pub fn new(san: &str, role: &str, gateways: &[String]) -> Result<Self, String> {
        let roles = || Role::ALL.map(Role::name).join(", ");
        let role = Role::parse(role).ok_or_else(|| format!("role must be one of {}", roles()))?;
        let gateways = GatewayPatterns::parse(gateways).map_err(|why| format!("gateways {why}"))?;
        let marked = san.replace(GATEWAY, "\0");
        let gateway_gap = marked.chars().filter(|c| matches!(c, '*' | '\0')).position(|c| c == '\0');
        let names_gateways = gateway_gap.is_some() || !gateways.is_empty();
        if !san.starts_with("dns:") && !san.contains("://") {
            return Err("san must be a URI such as spiffe://im/gateway/{gateway}, or dns:NAME".to_owned());
        }
        if names_gateways != (role == Role::Gateway) {
            return Err(format!("a rule of the role gateway, and no other, needs {GATEWAY} in san, or gateways"));
        }
        if marked.matches('\0').count() > 1 {
            return Err(format!("san must have {GATEWAY} once"));
        }
        Ok(Self {
            pieces: marked.split(['*', '\0']).map(str::to_owned).collect(),
            gateway_gap,
            role,
            gateways: Arc::new(gateways),
        })
    }

    /// Who this is. None: the rule is not about such a name.
    pub fn caller(&self, name: &str, expires_s: u64) -> Option<Caller> {
        let gaps = self.gaps(name)?;
        let gateways = match self.gateway_gap {
            Some(gap) => Arc::new(GatewayPatterns::host(gaps.get(gap)?)),
            None => self.gateways.clone(),
        };
        Some(Caller { name: CompactString::new(name), role: self.role, gateways, expires_s: Some(expires_s), calls_per_s: None })
    }

    /// What stands between the pieces.
    fn gaps<'a>(&self, name: &'a str) -> Option<Vec<&'a str>> {
        let (first, others) = self.pieces.split_first()?;
        let mut left = name.strip_prefix(&**first)?;
        let mut gaps = Vec::with_capacity(others.len());
        for (i, piece) in others.iter().enumerate() {
            let end = if i + 1 == others.len() { left.len().checked_sub(piece.len())? } else { left.find(&**piece)? };
            let (gap, rest) = (left.get(..end)?, left.get(end..)?);
            left = rest.strip_prefix(&**piece)?;
            gaps.push(gap);
        }
        // A `*` in a certificate must not become a wildcard of ours.
        let is_host = |gap: &str| gap.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        let is_part = |gap: &str| gap.bytes().all(|byte| byte.is_ascii_graphic() && !b"/.:*".contains(&byte));
        let fits =
            |(i, gap): (usize, &&str)| !gap.is_empty() && if self.gateway_gap == Some(i) { is_host(gap) } else { is_part(gap) };
        (left.is_empty() && gaps.iter().enumerate().all(fits)).then_some(gaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::id::GatewayAddr;

    fn rule(san: &str, role: &str, gateways: &[&str]) -> Result<SanRule, String> {
        SanRule::new(san, role, &gateways.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_name_gives_a_role_and_the_gateway_that_it_may_speak_for() {
        let speaks_for = |san: &str, name: &str, gateway: &str| {
            let caller = rule(san, "gateway", &[]).unwrap().caller(name, 0)?;
            Some(caller.may_speak_for(&GatewayAddr::parse(gateway).unwrap()))
        };
        let spiffe = "spiffe://im/gateway/{gateway}";
        for (san, name, gateway, want) in [
            (spiffe, "spiffe://im/gateway/gw-1", "gw-1:7000", Some(true)),
            (spiffe, "spiffe://im/gateway/gw-1", "gw-2:7000", Some(false)),
            (spiffe, "spiffe://im/gateway/gw-1.eu.im", "gw-1.eu.im:7000", Some(true)),
            (spiffe, "spiffe://im/gateway/*", "gw-2:7000", None),
            (spiffe, "spiffe://im/gateway/", "gw-2:7000", None),
            (spiffe, "spiffe://im/gateway/a/b", "gw-2:7000", None),
            (spiffe, "spiffe://im/gateways/gw-1", "gw-1:7000", None),
            ("spiffe://*/gw/{gateway}/sock", "spiffe://im/gw/gw-1/sock", "gw-1:1", Some(true)),
            ("spiffe://*/gw/{gateway}/sock", "spiffe://im/x/gw/gw-1/sock", "gw-1:1", None),
            ("dns:{gateway}", "dns:gw-1.im", "gw-1.im:1", Some(true)),
            ("dns:{gateway}", "dns:*.im", "gw-1.im:1", None),
        ] {
            assert_eq!(speaks_for(san, name, gateway), want, "{san} {name} {gateway}");
        }
        let nodes = rule("dns:*.nodes.im", "node", &[]).unwrap();
        assert!(nodes.caller("dns:a.nodes.im", 0).is_some());
        assert!(nodes.caller("dns:a.b.nodes.im", 0).is_none());
        assert!(nodes.caller("dns:nodes.im", 0).is_none());
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        for (san, role, gateways) in [
            ("spiffe://im/x", "king", &[][..]),
            ("spiffe://im/x", "gateway", &[]),
            ("spiffe://im/{gateway}", "service", &[]),
            ("spiffe://im/x", "service", &["gw-1:7"]),
            ("spiffe://{gateway}/{gateway}", "gateway", &[]),
            ("gw-1", "service", &[]),
            ("spiffe://im/x", "gateway", &["gw 1"]),
        ] {
            assert!(rule(san, role, gateways).is_err(), "{san} {role} {gateways:?}");
        }
        assert!(rule("spiffe://im/x", "gateway", &["gw-*:7"]).is_ok());
    }
}
