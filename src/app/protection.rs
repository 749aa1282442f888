//! Who may come in and who is believed, from the configuration.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::info;
use tracing::warn;

use crate::api::access::Access;
use crate::api::transport::Entrance;
use crate::app::StartError;
use crate::app::assemble::Daemon;
use crate::app::audit;
use crate::client::security::Security;
use crate::config;
use crate::config::Config;
use crate::config::Credential;
use crate::config::WhoReadsMetrics;
use crate::metrics::Metrics;
use crate::security::allowance::Limits;
use crate::security::audit::Audit;
use crate::security::audit::Entry;
use crate::security::callers::Callers;
use crate::security::callers::Mode;
use crate::security::certificate;
use crate::security::files::READ_INTERVAL;
use crate::security::files::Reloader;
use crate::security::files::Unusable;
use crate::security::san::SanRule;
use crate::security::server;
use crate::security::tokens;

const GRPC: &[&[u8]] = &[b"h2"];
const GRPC_AND_HTTP: &[&[u8]] = &[b"h2", b"http/1.1"];

/// The ways in, the ways to other nodes, and what is read again.
pub struct Protection {
    pub data: Entrance,
    pub admin: Entrance,
    /// None: everybody may do everything.
    pub access: Option<Arc<Access>>,
    /// How other nodes are called.
    pub peers: Security,
    pub audit: Audit,
    /// For whoever writes them to SQL.
    pub audit_rows: Option<mpsc::Receiver<Entry>>,
    pub reloader: Arc<Reloader>,
}

impl Protection {
    /// # Errors
    /// A file of [tls], [admin_tls] or [auth] cannot be used.
    pub fn prepare(config: &Config, metrics: &Arc<Metrics>) -> Result<Self, StartError> {
        let (audit, audit_rows) = Audit::new(metrics.clone());
        let mut reloader = Reloader::new(metrics.clone(), audit.clone());
        let failed = |section| move |cause| StartError::Security { section, cause };
        let data = entrance("data", &config.tls, GRPC, metrics, &mut reloader).map_err(failed("tls"))?;
        let admin = entrance("admin", &config.admin_tls, GRPC_AND_HTTP, metrics, &mut reloader).map_err(failed("admin_tls"))?;
        let access = access(config, metrics, &audit, &mut reloader).map_err(failed("auth"))?;
        watch_ends(config, metrics, &mut reloader)?;
        let reloader = Arc::new(reloader);
        Ok(Self { data, admin, access, peers: peers(config), audit, audit_rows: Some(audit_rows), reloader })
    }

    /// Starts reading again, and writing the audit. Returns where to ask for the former; None: there is nothing to read.
    pub fn start(
        &mut self,
        config: &Config,
        engine: &Daemon,
        tasks: &mut JoinSet<()>,
        stop: &CancellationToken,
    ) -> Option<Arc<Notify>> {
        if let Some(rows) = self.audit_rows.take() {
            let keep = Duration::from_secs(24 * 3_600) * config.audit.keep_days;
            tasks.spawn(audit::keep_writing(rows, engine.database.clone(), engine.own.node_id.clone(), keep, stop.clone()));
        }
        if self.reloader.is_empty() {
            return None;
        }
        let read_again = Arc::new(Notify::new());
        tasks.spawn(keep_reading(self.reloader.clone(), read_again.clone(), stop.clone()));
        Some(read_again)
    }

    /// Says how each link is protected, and warns of what is weaker than it may look.
    pub fn announce(&self, config: &Config, is_beyond: bool) {
        let kind = |entrance: &Entrance| match (&entrance.tls, entrance.accept_plain) {
            (None, _) => "plaintext",
            (Some(_), false) => "TLS",
            (Some(_), true) => "TLS or plaintext",
        };
        let nodes = if self.peers.ca_file.is_some() { "TLS" } else { "plaintext" };
        info!(auth = %config.auth.mode, "gRPC port: {}; admin port: {}; to other nodes: {nodes}", kind(&self.data), kind(&self.admin));
        let sends_tokens = config.auth.mode.0.contains(&Credential::Token);
        if is_beyond && self.access.is_none() {
            warn!("listening beyond this machine without authentication: whoever reaches the port can bind, query and unbind");
        }
        for (port, entrance) in [("gRPC", &self.data), ("admin", &self.admin)] {
            let takes_plain = entrance.tls.is_none() || entrance.accept_plain;
            if is_beyond && sends_tokens && takes_plain {
                warn!("the {port} port takes plaintext: tokens cross the network in the clear");
            }
            if takes_plain && config.auth.mode.0 == [Credential::Mtls] {
                warn!("auth.mode is mtls, and the {port} port takes plaintext: who comes so has no credential");
            }
        }
    }
}

fn entrance(
    what: &'static str,
    tls: &config::Tls,
    protocols: &'static [&'static [u8]],
    metrics: &Arc<Metrics>,
    reloader: &mut Reloader,
) -> Result<Entrance, Unusable> {
    let (handshake_timeout, accept_plain, metrics) = (tls.handshake_timeout, tls.accept_plain, metrics.clone());
    let files = match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => server::Files {
            cert: cert.clone(),
            key: key.clone(),
            client_ca: tls.client_ca_file.clone(),
            require_client_cert: tls.require_client_cert,
            protocols,
        },
        _ => return Ok(Entrance { tls: None, handshake_timeout, accept_plain, metrics }),
    };
    let tls = server::load(what, files, metrics.clone())?;
    reloader.add(&tls);
    Ok(Entrance { tls: Some(tls), handshake_timeout, accept_plain, metrics })
}

/// Certificates for the links to others. Whoever makes such a link reads them by himself.
fn watch_ends(config: &Config, metrics: &Arc<Metrics>, reloader: &mut Reloader) -> Result<(), StartError> {
    let redis = |redis: &config::Redis| (redis.cert_file.clone(), redis.ca_file.clone());
    let cache = config.redis_cache.as_ref().map(|cache| redis(&cache.server)).unwrap_or_default();
    let queue = config.redis_queue.as_ref().map(|queue| redis(&queue.server)).unwrap_or_default();
    let links = [
        ("peer", (config.peer.cert_file.clone(), config.peer.ca_file.clone())),
        ("store", (config.store.cert_file.clone(), config.store.ca_file.clone())),
        ("redis_cache", cache),
        ("redis_queue", queue),
    ];
    for (r#use, (cert, ca)) in links {
        for (which, file) in [("leaf", cert), ("ca", ca)] {
            if let Some(file) = file {
                let failed = |cause| StartError::Security { section: r#use, cause };
                reloader.add(&certificate::watch(r#use, which, file, metrics.clone()).map_err(failed)?);
            }
        }
    }
    Ok(())
}

fn access(
    config: &Config,
    metrics: &Arc<Metrics>,
    audit: &Audit,
    reloader: &mut Reloader,
) -> Result<Option<Arc<Access>>, Unusable> {
    let auth = &config.auth;
    let mode = |credential: &Credential| match credential {
        Credential::Mtls => Mode::Mtls,
        Credential::Token => Mode::Token,
    };
    let modes: Vec<Mode> = auth.mode.0.iter().map(mode).collect();
    if modes.is_empty() {
        return Ok(None);
    }
    let tokens = auth.tokens_file.clone().filter(|_| modes.contains(&Mode::Token)).map(tokens::load).transpose()?;
    if let Some(tokens) = &tokens {
        reloader.add(tokens);
    }
    let rules = auth.mtls.iter().map(|rule| SanRule::new(&rule.san, &rule.role, &rule.gateways).map_err(Unusable));
    let config::Limits { calls_per_s, users_per_s, streams, .. } = config.limits;
    let limits = Limits { calls_per_s, users_per_s, streams };
    let callers = Callers::new(modes, tokens, rules.collect::<Result<_, _>>()?, limits, reloader.generation(), metrics.clone());
    Ok(Some(Arc::new(Access {
        callers: Arc::new(callers),
        audit: audit.clone(),
        metrics: metrics.clone(),
        gateway_may_deliver: auth.gateway_may_deliver,
        gateway_may_watch_any: auth.gateway_may_watch_any,
        metrics_are_open: auth.metrics == WhoReadsMetrics::Open,
    })))
}

fn peers(config: &Config) -> Security {
    let config::Peer { ca_file, cert_file, key_file, server_name, token_file, plain } = config.peer.clone();
    let speaks_tls = config.tls.cert_file.is_some() && !plain;
    if !speaks_tls {
        return Security { token_file, ..Security::default() };
    }
    Security {
        ca_file: ca_file.or_else(|| config.tls.client_ca_file.clone()).or_else(|| config.tls.cert_file.clone()),
        cert_file: cert_file.or_else(|| config.tls.cert_file.clone()),
        key_file: key_file.or_else(|| config.tls.key_file.clone()),
        server_name,
        token_file,
    }
}

/// Reads certificates and tokens again, from time to time and whenever somebody asks for it.
pub async fn keep_reading(reloader: Arc<Reloader>, asked: Arc<Notify>, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut pause = READ_INTERVAL;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
            () = asked.notified() => {}
        }
        pause = tokio::task::block_in_place(|| reloader.step());
    }
}
