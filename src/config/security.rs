//! Sections that say who may come in: TLS of the ports, nodes among each other, credentials, the audit.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use serde::de::Error;

use super::forms::millis;
use super::forms::or_empty;

/// TLS of a port. It speaks TLS if it has a certificate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    #[serde(with = "or_empty")]
    pub cert_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub key_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub client_ca_file: Option<PathBuf>,
    pub require_client_cert: bool,
    #[serde(with = "millis")]
    pub handshake_timeout: Duration,
    /// Plaintext, too.
    pub accept_plain: bool,
}

/// How this node calls others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    #[serde(with = "or_empty")]
    pub ca_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub cert_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub key_file: Option<PathBuf>,
    #[serde(with = "or_empty")]
    pub server_name: Option<String>,
    #[serde(with = "or_empty")]
    pub token_file: Option<PathBuf>,
    /// In plaintext, although this node has a certificate.
    pub plain: bool,
}

/// Who may call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    pub mode: AuthMode,
    #[serde(with = "or_empty")]
    pub tokens_file: Option<PathBuf>,
    pub mtls: Vec<MtlsRule>,
    pub insecure: bool,
    pub reflection: bool,
    pub metrics: WhoReadsMetrics,
    pub gateway_may_deliver: bool,
    pub gateway_may_watch_any: bool,
}

/// Kinds of credentials, of which the first that applies decides; none: everybody may do everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuthMode(pub Vec<Credential>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Credential {
    Mtls,
    Token,
}

/// Which role a certificate's name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MtlsRule {
    pub san: String,
    pub role: String,
    #[serde(default)]
    pub gateways: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhoReadsMetrics {
    /// Whoever reaches the port.
    Open,
    /// Viewers and operators.
    Viewer,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Audit {
    /// 0: for ever.
    pub keep_days: u32,
}

impl fmt::Display for AuthMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |credential: &Credential| match credential {
            Credential::Mtls => "mtls",
            Credential::Token => "token",
        };
        match self.0.is_empty() {
            true => f.write_str("off"),
            false => f.write_str(&self.0.iter().map(name).collect::<Vec<_>>().join(",")),
        }
    }
}

impl Serialize for AuthMode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AuthMode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let credential = |name: &str| match name.trim() {
            "mtls" => Ok(Credential::Mtls),
            "token" => Ok(Credential::Token),
            _ => Err(D::Error::custom(
                "unknown mode, expected `off`, `token`, `mtls`, or several of the last two separated by commas",
            )),
        };
        match text.trim() {
            "off" => Ok(Self::default()),
            modes => Ok(Self(modes.split(',').map(credential).collect::<Result<_, _>>()?)),
        }
    }
}
