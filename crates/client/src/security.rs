//! How a client proves who it is, and which nodes it believes.
//!
//! All files are read again by themselves, so that whatever renews them need not tell anybody: certificates and CAs whenever a
//! connection is made, the token a few seconds after its file has changed.

use std::env;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;
use std::time::Instant;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Request;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::transport::Endpoint;
use tonic::transport::Uri;

use crate::InvalidAddress;

/// A node that is gone without a word is noticed after both.
const KEEPALIVE: Duration = Duration::from_secs(5);
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(5);
/// How old a token may be before its file is read again.
const TOKEN_READ_INTERVAL: Duration = Duration::from_secs(3);

/// A connection is not given up more often than this.
const RENEW_INTERVAL: Duration = Duration::from_secs(1);

/// With nothing given: plaintext, and no credential.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// CAs that sign the nodes' certificates, PEM. Given: connections speak TLS.
    pub ca_file: Option<PathBuf>,
    /// The client's own certificate with those that signed it, PEM; needs `key_file` and `ca_file`.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// The name that the nodes' certificates have to carry. None: the host that is called.
    pub server_name: Option<String>,
    /// A token that is sent with each call.
    pub token_file: Option<PathBuf>,
}

/// A connection to a node that is made when it is needed, and made again when it breaks. Its clones share it.
#[derive(Clone)]
pub struct Link {
    security: Security,
    node: String,
    timeout: Duration,
    newest: Arc<Mutex<Newest>>,
    current: Newest,
}

#[derive(Clone)]
struct Newest {
    /// Counts the connections that were given up.
    number: u64,
    since: Instant,
    service: Authorized,
}

/// A connection in the making.
type Connecting = Pin<Box<dyn Future<Output = io::Result<TokioIo<TlsStream<TcpStream>>>> + Send>>;

/// A connection that sends the token.
pub type Authorized = InterceptedService<Channel, Bearer>;

/// Adds the token to each call.
#[derive(Clone)]
pub struct Bearer(Option<Arc<TokenFile>>);

struct TokenFile {
    path: PathBuf,
    read: Mutex<Option<(Instant, AsciiMetadataValue)>>,
}

impl Security {
    /// What the variables say that `im-presence ctl` reads, too: IM_PRESENCE_CA, IM_PRESENCE_CERT, IM_PRESENCE_KEY,
    /// IM_PRESENCE_SERVER_NAME, IM_PRESENCE_TOKEN_FILE.
    pub fn from_env() -> Self {
        let file = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            ca_file: file("IM_PRESENCE_CA"),
            cert_file: file("IM_PRESENCE_CERT"),
            key_file: file("IM_PRESENCE_KEY"),
            server_name: env::var("IM_PRESENCE_SERVER_NAME").ok().filter(|name| !name.is_empty()),
            token_file: file("IM_PRESENCE_TOKEN_FILE"),
        }
    }

    /// A lazy connection to `node`, `host:port`. `timeout` is for connecting, with the handshake.
    ///
    /// # Errors
    /// The address makes no sense.
    pub fn link(&self, node: &str, timeout: Duration) -> Result<Link, InvalidAddress> {
        let service = self.with_token(self.channel(node, timeout)?);
        Ok(Link::new(self, node, timeout, service))
    }

    fn channel(&self, node: &str, timeout: Duration) -> Result<Channel, InvalidAddress> {
        let endpoint = self.endpoint(node)?.connect_timeout(timeout);
        Ok(match &self.ca_file {
            None => endpoint.connect_lazy(),
            Some(_) => endpoint.connect_with_connector_lazy(tower::service_fn(self.connector(node))),
        })
    }

    /// The same, connected. `timeout` is also for each call.
    ///
    /// # Errors
    /// The node cannot be reached, or does not prove that it is one.
    pub async fn connect(&self, node: &str, timeout: Duration) -> Result<Link, Box<dyn std::error::Error + Send + Sync>> {
        let endpoint = self.endpoint(node)?.connect_timeout(timeout).timeout(timeout);
        let channel = match &self.ca_file {
            None => endpoint.connect().await?,
            Some(_) => endpoint.connect_with_connector(tower::service_fn(self.connector(node))).await?,
        };
        Ok(Link::new(self, node, timeout, self.with_token(channel)))
    }

    /// A TLS connection that speaks `protocol`.
    ///
    /// # Errors
    /// A file cannot be used, or the server does not prove who it is.
    pub async fn connect_tls(&self, node: &str, protocol: &[u8]) -> io::Result<TlsStream<TcpStream>> {
        let mut config = self.client_config()?;
        config.alpn_protocols = vec![protocol.to_vec()];
        let host = node.rsplit_once(':').map_or(node, |(host, _)| host).trim_matches(['[', ']']);
        let name = self.server_name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let stream = TcpStream::connect(node).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    fn endpoint(&self, node: &str) -> Result<Endpoint, InvalidAddress> {
        let endpoint = Endpoint::from_shared(format!("http://{node}"));
        let endpoint = endpoint.map_err(|_| InvalidAddress { of: "a node", address: node.to_owned() })?;
        Ok(endpoint.http2_keep_alive_interval(KEEPALIVE).keep_alive_timeout(KEEPALIVE_LIMIT).tcp_nodelay(true))
    }

    fn connector(&self, node: &str) -> impl FnMut(Uri) -> Connecting + Send + 'static {
        let (this, node) = (self.clone(), node.to_owned());
        move |_| {
            let (this, node) = (this.clone(), node.clone());
            Box::pin(async move { Ok(TokioIo::new(this.connect_tls(&node, b"h2").await?)) })
        }
    }

    fn with_token(&self, channel: Channel) -> Authorized {
        let file = self.token_file.clone().map(|path| Arc::new(TokenFile { path, read: Mutex::default() }));
        InterceptedService::new(channel, Bearer(file))
    }

    fn client_config(&self) -> io::Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let mut roots = RootCertStore::empty();
        for ca in certificates(self.ca_file.as_deref())? {
            roots.add(ca).map_err(io::Error::other)?;
        }
        let config = versions.map_err(io::Error::other)?.with_root_certificates(roots);
        match (&self.cert_file, &self.key_file) {
            (Some(_), Some(key)) => {
                // What the parser says shows the line that it stumbled over.
                let key_der = PrivateKeyDer::from_pem_slice(&read(key)?)
                    .map_err(|_| unusable(key, &"there is no private key in it, as PEM"))?;
                config.with_client_auth_cert(certificates(self.cert_file.as_deref())?, key_der).map_err(io::Error::other)
            }
            _ => Ok(config.with_no_client_auth()),
        }
    }
}

impl Link {
    fn new(security: &Security, node: &str, timeout: Duration, service: Authorized) -> Self {
        let current = Newest { number: 0, since: Instant::now(), service };
        let newest = Arc::new(Mutex::new(current.clone()));
        Self { security: security.clone(), node: node.to_owned(), timeout, newest, current }
    }

    /// The node takes the credential no more: from the next call on there is another connection, with what the files say then.
    /// False: this one was made a moment ago, and the next would be refused as well.
    pub fn renew(&self) -> bool {
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.number != self.current.number {
            return true; // somebody else did
        }
        if newest.since.elapsed() < RENEW_INTERVAL {
            return false;
        }
        let Ok(channel) = self.security.channel(&self.node, self.timeout) else { return false };
        let (number, service) = (newest.number + 1, self.security.with_token(channel));
        *newest = Newest { number, since: Instant::now(), service };
        true
    }
}

impl Service<http::Request<Body>> for Link {
    type Response = <Authorized as Service<http::Request<Body>>>::Response;
    type Error = <Authorized as Service<http::Request<Body>>>::Error;
    type Future = <Authorized as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        let newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if newest.number != self.current.number {
            self.current = newest.clone();
        }
        drop(newest);
        self.current.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        self.current.service.call(request)
    }
}

fn certificates(file: Option<&Path>) -> io::Result<Vec<CertificateDer<'static>>> {
    let Some(path) = file else { return Ok(Vec::new()) };
    let found = CertificateDer::pem_slice_iter(&read(path)?).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|_| unusable(path, &"is no PEM"))?;
    if found.is_empty() { Err(unusable(path, &"there is no certificate in it")) } else { Ok(found) }
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    fs::read(path).map_err(|error| unusable(path, &error))
}

fn unusable(path: &Path, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {why}", path.display()))
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(file) = &self.0 {
            let value = file.value().map_err(|error| Status::unauthenticated(error.to_string()))?;
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

impl TokenFile {
    /// What the file says; what it said before, if it cannot be read now.
    fn value(&self) -> io::Result<AsciiMetadataValue> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, value)) = &*read
            && at.elapsed() < TOKEN_READ_INTERVAL
        {
            return Ok(value.clone());
        }
        let value = match (self.read_file(), &*read) {
            (Ok(value), _) => value,
            (Err(_), Some((_, before))) => before.clone(),
            (Err(error), None) => return Err(error),
        };
        *read = Some((Instant::now(), value.clone()));
        Ok(value)
    }

    fn read_file(&self) -> io::Result<AsciiMetadataValue> {
        let text = fs::read_to_string(&self.path).map_err(|error| unusable(&self.path, &error))?;
        let value = AsciiMetadataValue::try_from(format!("Bearer {}", text.trim_end()));
        let mut value = value.map_err(|_| unusable(&self.path, &"a token is one line of printable ASCII"))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The innermost reason, without the number of the operating system.
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let text = cause.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}
