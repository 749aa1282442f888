//! `im-presence token new`: makes a token.

use clap::Args;

use crate::security::files::Unusable;
use crate::security::tokens;
use crate::security::tokens::Tokens;

#[derive(Args)]
pub struct NewToken {
    /// What its bearer is: gateway, service, viewer, operator or node
    #[arg(long)]
    role: String,
    /// Name of its bearer, as it shows in logs and in the audit
    #[arg(long)]
    name: String,
    /// Addresses that a gateway may speak for, such as 'gw-eu-*:7000'; may be given several times
    #[arg(long, value_name = "PATTERN")]
    gateways: Vec<String>,
    /// When it ends, such as 2027-01-01T00:00:00Z
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
}

impl NewToken {
    /// The token and its entry, as text.
    ///
    /// # Errors
    /// What nodes would not accept.
    pub fn make(&self) -> Result<String, Unusable> {
        let token = tokens::generate()?;
        let mut entry =
            format!("[[token]]\nname = {:?}\nrole = {:?}\nsha256 = \"{}\"\n", self.name, self.role, tokens::to_hex(&token));
        if !self.gateways.is_empty() {
            entry.push_str(&format!("gateways = {:?}\n", self.gateways));
        }
        if let Some(expires) = &self.expires {
            entry.push_str(&format!("expires = {expires:?}\n"));
        }
        Tokens::parse(entry.as_bytes())?;
        Ok(format!("# The token, for its bearer alone; it is not shown again:\n{token}\n\n# For auth.tokens_file:\n{entry}"))
    }
}
