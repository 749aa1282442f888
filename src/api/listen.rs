//! Accepts client connections, no more than allowed and only those that speak HTTP/2 soon, and hands each to the serving
//! thread that has the fewest.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
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
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;
use tonic::transport::server::TcpConnectInfo;

use crate::api::room::Guest;
use crate::api::room::Room;
use crate::metrics::Metrics;

/// What an HTTP/2 client sends first (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a client may take to send it. A connection that never speaks must not hold a slot.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that have not sent it yet. They take no slot of those that have.
pub const MAX_NEWCOMERS: usize = 128;
/// Between looks for a preface that has come in part.
const PEEK_INTERVAL: Duration = Duration::from_millis(20);
/// Connections handed to a serving thread and not taken by it yet.
const HANDED_QUEUE: usize = 64;
/// Out of file descriptors: accepting again at once would only spin.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where connections are handed to one serving thread.
pub struct ServingThread {
    handed: mpsc::Sender<Admitted>,
    connections: Arc<AtomicUsize>,
}

impl ServingThread {
    pub fn new() -> (Self, mpsc::Receiver<Admitted>) {
        let (handed, taken) = mpsc::channel(HANDED_QUEUE);
        (Self { handed, connections: Arc::default() }, taken)
    }
}

/// A connection on its way to the thread that will serve it; its socket belongs to no thread yet.
pub struct Admitted {
    stream: std::net::TcpStream,
    slot: ConnectionSlot,
}

/// A client's connection; dropping it frees its slot.
pub struct Connection {
    stream: TcpStream,
    _slot: ConnectionSlot,
}

/// One of `max_connections`, on one of the serving threads.
struct ConnectionSlot {
    metrics: Arc<Metrics>,
    on_thread: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

/// Accepts on `listener` until `draining`. Above `max_connections` a new connection is closed once it has begun to speak.
pub async fn accept(
    listener: TcpListener,
    max_connections: usize,
    serving: Vec<ServingThread>,
    metrics: Arc<Metrics>,
    draining: CancellationToken,
    stop: CancellationToken,
) {
    let stop_node_on_panic = stop.drop_guard();
    let (slots, serving) = (Arc::new(Semaphore::new(max_connections)), Arc::new(serving));
    let (newcomers, mut waiting) = (Room::new(MAX_NEWCOMERS), JoinSet::new());
    while let Some(accepted) = draining.run_until_cancelled(listener.accept()).await {
        while waiting.try_join_next().is_some() {}
        while waiting.len() > MAX_NEWCOMERS {
            waiting.join_next().await; // one that had to make room has not gone yet
        }
        let Ok((stream, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (newcomer, slots, metrics, serving) = (newcomers.enter(), slots.clone(), metrics.clone(), serving.clone());
        waiting.spawn(async move {
            tokio::select! {
                () = newcomer.closed() => metrics.shed("connections"),
                () = admit(stream, &newcomer, slots, metrics.clone(), serving) => {}
            }
        });
    }
    stop_node_on_panic.disarm(); // calls in progress are finished first
}

/// Lets the connection in once it has begun to speak HTTP/2, if there is a slot.
async fn admit(
    stream: TcpStream,
    newcomer: &Guest,
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    serving: Arc<Vec<ServingThread>>,
) {
    let _ = stream.set_nodelay(true); // a connection that is gone already will be noticed when it is read
    if !matches!(timeout(PREFACE_TIMEOUT, speaks_http2(&stream)).await, Ok(Ok(true))) {
        return;
    }
    newcomer.leave();
    let Ok(permit) = slots.try_acquire_owned() else { return metrics.shed("connections") };
    let least_loaded = serving.iter().min_by_key(|thread| thread.connections.load(Ordering::Relaxed));
    if let (Some(thread), Ok(stream)) = (least_loaded, stream.into_std()) {
        let slot = ConnectionSlot::take(metrics, thread, permit);
        let _ = thread.handed.send(Admitted { stream, slot }).await; // the thread has ended
    }
}

/// Whether what it sends first is the preface of HTTP/2.
pub async fn speaks_http2(stream: &TcpStream) -> io::Result<bool> {
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

impl ConnectionSlot {
    fn take(metrics: Arc<Metrics>, thread: &ServingThread, permit: OwnedSemaphorePermit) -> Self {
        metrics.connections.inc();
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Self { metrics, on_thread: thread.connections.clone(), _permit: permit }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.metrics.connections.dec();
        self.on_thread.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admitted {
    /// Ties the connection to the runtime of the calling thread.
    pub fn adopt(self) -> io::Result<Connection> {
        Ok(Connection { stream: TcpStream::from_std(self.stream)?, _slot: self.slot })
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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const THREADS: usize = 3;

    #[tokio::test]
    async fn a_connection_goes_to_the_thread_that_has_the_fewest() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let server = listener.local_addr().unwrap();
        let (serving, mut threads): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| ServingThread::new()).unzip();
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        tokio::spawn(accept(listener, 100, serving, Metrics::new(), draining.clone(), stop));
        let (mut clients, mut served): (Vec<TcpStream>, Vec<Vec<Connection>>) = (vec![], (0..THREADS).map(|_| vec![]).collect());
        let next = async |threads: &mut Vec<mpsc::Receiver<Admitted>>, clients: &mut Vec<TcpStream>| {
            let mut client = TcpStream::connect(server).await.unwrap();
            client.write_all(PREFACE).await.unwrap();
            clients.push(client);
            let [first, second, third] = &mut threads[..] else { panic!("{THREADS} threads") };
            let (thread, handed) = tokio::select! {
                handed = first.recv() => (0, handed),
                handed = second.recv() => (1, handed),
                handed = third.recv() => (2, handed),
            };
            (thread, handed.unwrap().adopt().unwrap())
        };
        for _ in 0..4 * THREADS {
            let (thread, connection) = next(&mut threads, &mut clients).await;
            served[thread].push(connection);
        }
        assert!(served.iter().all(|connections| connections.len() == 4), "as many on each");
        served[1].truncate(2);
        for _ in 0..2 {
            let (thread, connection) = next(&mut threads, &mut clients).await;
            assert_eq!(thread, 1, "its clients have gone");
            served[thread].push(connection);
        }
    }
}
