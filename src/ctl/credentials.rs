//! How `ctl` and `health` prove who they are, and which nodes they believe.

use std::fs;
use std::path::PathBuf;

use clap::Args;

use crate::client::security::Security;

#[derive(Args, Clone, Default)]
pub struct Credentials {
    /// CAs of the nodes' certificates, PEM: speak TLS
    #[arg(long, value_name = "FILE", env = "IM_PRESENCE_CA", global = true)]
    ca: Option<PathBuf>,
    /// Certificate to show, PEM; with --ca and --key
    #[arg(long, value_name = "FILE", env = "IM_PRESENCE_CERT", global = true)]
    cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", env = "IM_PRESENCE_KEY", global = true)]
    key: Option<PathBuf>,
    /// The name in the nodes' certificates, if it is not the host that is called
    #[arg(long, value_name = "NAME", env = "IM_PRESENCE_SERVER_NAME", global = true)]
    server_name: Option<String>,
}

impl Credentials {
    /// TLS is spoken, and no certificate is shown.
    pub fn shows_nothing(&self) -> bool {
        self.ca.is_some() && self.cert.is_none()
    }

    /// # Errors
    /// What is missing.
    pub fn security(&self, token_file: Option<PathBuf>) -> Result<Security, String> {
        let Self { ca, cert, key, server_name } = self.clone();
        if cert.is_some() != key.is_some() || (cert.is_some() && ca.is_none()) {
            return Err("--cert needs --key and --ca".to_owned());
        }
        if let Some(file) = &token_file {
            fs::read_to_string(file).map_err(|error| format!("--token-file: {}: {error}", file.display()))?;
        }
        Ok(Security { ca_file: ca, cert_file: cert, key_file: key, server_name, token_file })
    }
}
