//! A front before MariaDB that logs users in as MySQL 8.4 does, by `caching_sha2_password` over TLS, and then copies bytes. There
//! is no MySQL where these tests run.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use ring::digest::SHA256;
use ring::digest::digest;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::harness::pki::Pair;

const PLUGIN: &str = "caching_sha2_password";
const NATIVE: &str = "mysql_native_password";
/// Capabilities: names as in MySQL's protocol.
const CONNECT_WITH_DB: u32 = 1 << 3;
const PROTOCOL_41: u32 = 1 << 9;
const SSL: u32 = 1 << 11;
const SECURE_CONNECTION: u32 = 1 << 15;
const PLUGIN_AUTH: u32 = 1 << 19;
const PLUGIN_AUTH_LENENC: u32 = 1 << 21;
const NONCE: [u8; 20] = *b"abcdefghijklmnopqrst";
const OK: u8 = 0;
const MORE: u8 = 1;
const SWITCH: u8 = 0xfe;
const FAST: u8 = 3;
const FULL: u8 = 4;
/// A client without TLS wants to encrypt the password by itself.
const KEY_PLEASE: u8 = 2;
const PUBLIC_KEY: &[u8] = b"-----BEGIN PUBLIC KEY-----\nMFwwDQYJKoZIhvcNAQEBBQADSwAwSAJBAKj34GkxFhD90vcNLYLInFEX6Ppy1tPf\n9Cnzj4p4WGeKLs1Pt8QuKUpRKfFLfRYC9AIKjbJTWit+CqvjWYzvQwECAwEAAQ==\n-----END PUBLIC KEY-----\n";

/// Knows one user.
pub struct MySqlFront {
    pub port: u16,
    seen: Arc<Seen>,
    _connections: JoinSet<()>,
}

/// How often users were let in by which way.
#[derive(Default)]
struct Seen {
    fast: AtomicUsize,
    full: AtomicUsize,
}

struct Front {
    backend: u16,
    password: String,
    /// Greets with another plugin first, as proxies do.
    switches: bool,
    tls: TlsAcceptor,
    seen: Arc<Seen>,
}

impl MySqlFront {
    /// `backend`: the port of a MariaDB where root has no password.
    pub async fn start(backend: u16, password: &str, switches: bool, pair: &Pair) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let chain = CertificateDer::pem_file_iter(&pair.cert).expect("a file").map(|cert| cert.expect("PEM")).collect();
        let key = PrivateKeyDer::from_pem_file(&pair.key).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("versions");
        let config = builder.with_no_client_auth().with_single_cert(chain, key).expect("a pair");
        let (tls, seen) = (TlsAcceptor::from(Arc::new(config)), Arc::<Seen>::default());
        let front = Arc::new(Front { backend, password: password.to_owned(), switches, tls, seen: seen.clone() });
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let front = front.clone();
                links.spawn(async move { drop(front.serve(client).await) }); // how it ends is the client's business
            }
        });
        Self { port, seen, _connections: connections }
    }

    /// Connections that were let in without the password, because the server remembered it; and with it.
    pub fn logins(&self) -> (usize, usize) {
        (self.seen.fast.load(Ordering::Relaxed), self.seen.full.load(Ordering::Relaxed))
    }
}

impl Front {
    async fn serve(&self, mut client: TcpStream) -> io::Result<()> {
        client.set_nodelay(true)?;
        let mut backend = TcpStream::connect(("127.0.0.1", self.backend)).await?;
        backend.set_nodelay(true)?;
        let (_, greeting) = read_packet(&mut backend).await?;
        write_packet(&mut client, 0, &self.greeting(capabilities(&greeting) | SSL)).await?;
        let (_, first) = read_packet(&mut client).await?;
        if first.len() > 32 {
            return self.log_in(client, 1, first, backend, false).await;
        }
        let mut client = self.tls.accept(client).await?;
        let (seq, response) = read_packet(&mut client).await?;
        self.log_in(client, seq, response, backend, true).await
    }

    fn greeting(&self, capabilities: u32) -> Vec<u8> {
        let plugin = if self.switches { NATIVE } else { PLUGIN };
        let (low, high) = ((capabilities & 0xffff) as u16, (capabilities >> 16) as u16);
        let mut out = b"\x0a8.4.8\0\x01\0\0\0".to_vec();
        out.extend(&NONCE[..8]);
        out.push(0);
        out.extend(low.to_le_bytes());
        out.extend([45, 2, 0]);
        out.extend(high.to_le_bytes());
        out.push(21);
        out.extend([0; 10]);
        out.extend(&NONCE[8..]);
        out.push(0);
        out.extend(plugin.as_bytes());
        out.push(0);
        out
    }

    async fn log_in<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        mut client: S,
        mut seq: u8,
        response: Vec<u8>,
        mut backend: TcpStream,
        is_encrypted: bool,
    ) -> io::Result<()> {
        let login = Login::read(&response);
        let mut scramble = login.scramble.clone();
        if self.switches {
            let ask = [&[SWITCH][..], PLUGIN.as_bytes(), b"\0", &NONCE, b"\0"].concat();
            write_packet(&mut client, seq + 1, &ask).await?;
            (seq, scramble) = read_packet(&mut client).await?;
        }
        let remembered = self.seen.full.load(Ordering::Relaxed) > 0;
        if remembered && scramble == self.expected() {
            write_packet(&mut client, seq + 1, &[MORE, FAST]).await?;
            self.seen.fast.fetch_add(1, Ordering::Relaxed);
            seq += 1;
        } else {
            write_packet(&mut client, seq + 1, &[MORE, FULL]).await?;
            let (mut at, mut password) = read_packet(&mut client).await?;
            if password == [KEY_PLEASE] {
                write_packet(&mut client, at + 1, &[&[MORE], PUBLIC_KEY].concat()).await?;
                (at, password) = read_packet(&mut client).await?;
            }
            seq = at;
            if !is_encrypted || password.strip_suffix(&[0]) != Some(self.password.as_bytes()) {
                return write_packet(&mut client, seq + 1, b"\xff\x15\x04#28000Access denied for user").await;
            }
            self.seen.full.fetch_add(1, Ordering::Relaxed);
        }
        write_packet(&mut backend, 1, &login.for_backend()).await?;
        let (_, answer) = read_packet(&mut backend).await?;
        assert_eq!(answer[0], OK, "MariaDB lets root in: {}", String::from_utf8_lossy(&answer));
        write_packet(&mut client, seq + 1, &answer).await?;
        tokio::io::copy_bidirectional(&mut client, &mut backend).await.map(|_| ())
    }

    fn expected(&self) -> Vec<u8> {
        let once = digest(&SHA256, self.password.as_bytes());
        let twice = digest(&SHA256, once.as_ref());
        let mask = digest(&SHA256, &[twice.as_ref(), &NONCE].concat());
        once.as_ref().iter().zip(mask.as_ref()).map(|(a, b)| a ^ b).collect()
    }
}

/// What a client asks for.
struct Login {
    head: Vec<u8>,
    capabilities: u32,
    scramble: Vec<u8>,
    database: Vec<u8>,
}

impl Login {
    fn read(response: &[u8]) -> Self {
        let capabilities = u32::from_le_bytes(response[..4].try_into().expect("four bytes"));
        assert!(capabilities & PROTOCOL_41 != 0, "a client of this century");
        let rest = &response[32..];
        let user_end = rest.iter().position(|byte| *byte == 0).expect("a user");
        let rest = &rest[user_end + 1..];
        let (length, rest) = (usize::from(rest[0]), &rest[1..]);
        let (scramble, rest) = rest.split_at(length);
        let database = rest.split(|byte| *byte == 0).next().unwrap_or_default();
        let database = if capabilities & CONNECT_WITH_DB != 0 { database } else { &[] };
        Self { head: response[4..32].to_vec(), capabilities, scramble: scramble.to_vec(), database: database.to_vec() }
    }

    /// As root, who has no password.
    fn for_backend(&self) -> Vec<u8> {
        let capabilities = self.capabilities & !(SSL | PLUGIN_AUTH_LENENC) | SECURE_CONNECTION | PLUGIN_AUTH;
        let mut out = capabilities.to_le_bytes().to_vec();
        out.extend(&self.head);
        out.extend(b"root\0\0");
        if capabilities & CONNECT_WITH_DB != 0 {
            out.extend(&self.database);
            out.push(0);
        }
        out.extend(NATIVE.as_bytes());
        out.push(0);
        out
    }
}

fn capabilities(greeting: &[u8]) -> u32 {
    let version_end = greeting.iter().position(|byte| *byte == 0).expect("a version");
    let at = version_end + 1 + 4 + 8 + 1;
    let number = |at: usize| u32::from(u16::from_le_bytes([greeting[at], greeting[at + 1]]));
    number(at) | number(at + 5) << 16
}

async fn read_packet(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let mut payload = vec![0; u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize];
    stream.read_exact(&mut payload).await?;
    Ok((head[3], payload))
}

async fn write_packet(stream: &mut (impl AsyncWrite + Unpin), seq: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).expect("a short packet").to_le_bytes();
    stream.write_all(&[&length[..3], &[seq], payload].concat()).await?;
    stream.flush().await
}
