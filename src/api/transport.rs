//! How a connection begins, on either port: in plaintext or with TLS, told apart by its first byte.

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncBufReadExt;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_rustls::server::TlsStream;

use crate::metrics::Metrics;
use crate::security::files::Reloaded;
use crate::security::peer::Peer;
use crate::security::server::ServerTls;

/// What an HTTP/2 client sends first (RFC 9113, 3.4).
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What a TLS client sends first: the type of a record with a handshake (RFC 8446, 5.1).
const HANDSHAKE: u8 = 0x16;
/// How long a client may take to say what it speaks. A connection that never speaks must not hold a slot.
const FIRST_WORDS_LIMIT: Duration = Duration::from_secs(10);
/// Between looks for a preface that has come in part.
const PEEK_INTERVAL: Duration = Duration::from_millis(20);
const HTTP2: &[u8] = b"h2";

/// The way in to one port. With TLS the first words within it are waited for as well, as a part of the handshake: whoever
/// never speaks must not hold a slot.
pub struct Entrance {
    pub tls: Option<Arc<Reloaded<ServerTls>>>,
    pub handshake_timeout: Duration,
    /// With TLS: plaintext, too.
    pub accept_plain: bool,
    pub metrics: Arc<Metrics>,
}

/// A connection whose client has begun to speak.
pub struct Entered {
    pub transport: Transport,
    pub peer: Arc<Peer>,
    pub is_http2: bool,
}

/// Bytes of one connection.
pub enum Transport {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

/// A TCP stream that can be handed from one runtime to another: a handshake is done on one thread, and calls on another.
pub enum Socket {
    Here(TcpStream),
    Moving(std::net::TcpStream),
    /// Could not be moved.
    Lost,
}

impl Entrance {
    /// Waits until the client has said what it speaks, and has finished the handshake if that is TLS.
    ///
    /// # Errors
    /// It did not in time, or speaks what is not taken here.
    pub async fn enter(&self, stream: TcpStream, addr: SocketAddr) -> io::Result<Entered> {
        stream.set_nodelay(true)?;
        let mut first = [0];
        let spoke = timeout(FIRST_WORDS_LIMIT, stream.peek(&mut first)).await??;
        match &self.tls {
            Some(tls) if spoke == 1 && first[0] == HANDSHAKE => {
                let shaken = timeout(self.handshake_timeout, handshake(tls, stream, addr)).await;
                let result = match &shaken {
                    Ok(Ok(_)) => "ok",
                    Ok(Err(_)) => "failed",
                    Err(_) => "timeout",
                };
                self.metrics.security.handshake(result);
                shaken?
            }
            Some(_) if !self.accept_plain => Err(io::Error::other("plaintext, where TLS is needed")),
            _ => {
                let is_http2 = timeout(FIRST_WORDS_LIMIT, speaks_http2(&stream)).await??;
                Ok(Entered { transport: Transport::Plain(Socket::Here(stream)), peer: Peer::plain(addr), is_http2 })
            }
        }
    }
}

async fn handshake(tls: &Arc<Reloaded<ServerTls>>, stream: TcpStream, addr: SocketAddr) -> io::Result<Entered> {
    let mut stream = tls.current().acceptor().accept(Socket::Here(stream)).await?;
    if stream.fill_buf().await?.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into()); // it said nothing within
    }
    let (_, connection) = stream.get_ref();
    let peer = Peer::encrypted(addr, connection.peer_certificates().unwrap_or_default(), tls.clone());
    let is_http2 = connection.alpn_protocol() == Some(HTTP2);
    Ok(Entered { transport: Transport::Tls(Box::new(stream)), peer, is_http2 })
}

/// Whether what it sends first is the preface of HTTP/2.
async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let n = stream.peek(&mut seen).await?;
        if n == 0 || seen[..n] != PREFACE[..n] {
            return Ok(false);
        }
        if n == PREFACE.len() {
            return Ok(true);
        }
        sleep(PEEK_INTERVAL).await;
    }
}

impl Transport {
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Unties it from the runtime of the calling thread.
    pub fn detach(&mut self) -> io::Result<()> {
        let socket = self.socket();
        if let Socket::Here(stream) = mem::replace(socket, Socket::Lost) {
            *socket = Socket::Moving(stream.into_std()?);
        }
        Ok(())
    }

    /// Ties it to the runtime of the calling thread.
    pub fn attach(&mut self) -> io::Result<()> {
        let socket = self.socket();
        if let Socket::Moving(stream) = mem::replace(socket, Socket::Lost) {
            *socket = Socket::Here(TcpStream::from_std(stream)?);
        }
        Ok(())
    }

    fn socket(&mut self) -> &mut Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_mut().0,
        }
    }
}

impl Socket {
    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        match self {
            Self::Here(stream) => Ok(Pin::new(stream)),
            Self::Moving(_) | Self::Lost => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream()?.poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.stream()?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(socket) => Pin::new(socket).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(socket) => Pin::new(socket).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}
