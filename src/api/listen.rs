//! Accepts client connections: no more than allowed, and only those that speak HTTP/2 soon.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::io::ReadBuf;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::transport::server::TcpConnectInfo;

use crate::metrics::Metrics;

/// What an HTTP/2 client sends first (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a client may take to send it. A connection that never speaks must not hold a place.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between looks for a preface that has come in part.
const PEEK_INTERVAL: Duration = Duration::from_millis(20);
/// Connections accepted and not taken by the server yet.
const ACCEPTED_QUEUE: usize = 64;
/// Out of file descriptors: accepting again at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A client's connection; dropping it frees its place.
pub struct Connection {
    stream: TcpStream,
    metrics: Arc<Metrics>,
    _place: OwnedSemaphorePermit,
}

/// Accepts on `listener` until `stop`. Above `max_connections` a new connection is closed at once.
pub fn accept(
    listener: TcpListener,
    max_connections: usize,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(ACCEPTED_QUEUE);
    let places = Arc::new(Semaphore::new(max_connections));
    tokio::spawn(async move {
        while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
            let Ok((stream, _)) = accepted else {
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                metrics.shed("connections");
                continue;
            };
            tokio::spawn(admit(stream, place, metrics.clone(), ready.clone()));
        }
    });
    ReceiverStream::new(connections)
}

/// Lets the connection in once it has begun to speak HTTP/2.
async fn admit(
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    metrics: Arc<Metrics>,
    ready: mpsc::Sender<io::Result<Connection>>,
) {
    let _ = stream.set_nodelay(true); // a connection that is gone already will be noticed when it is read
    if let Ok(Ok(true)) = timeout(PREFACE_TIMEOUT, speaks_http2(&stream)).await {
        metrics.connections.inc();
        let _ = ready.send(Ok(Connection { stream, metrics, _place: place })).await; // the server has ended
    }
}

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

impl Drop for Connection {
    fn drop(&mut self) {
        self.metrics.connections.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
