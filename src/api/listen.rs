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
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::api::room::Room;
use crate::api::transport::Entered;
use crate::api::transport::Entrance;
use crate::api::transport::Transport;
use crate::metrics::Metrics;
use crate::security::peer::Peer;

/// Connections that have not begun to speak yet, or are within the handshake. They take no slot of those that have.
pub const MAX_NEWCOMERS: usize = 128;
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
    transport: Transport,
    peer: Arc<Peer>,
    slot: ConnectionSlot,
}

/// A client's connection; dropping it frees its slot.
pub struct Connection {
    transport: Transport,
    peer: Arc<Peer>,
    _slot: ConnectionSlot,
}

/// One of `max_connections`, on one of the serving threads.
struct ConnectionSlot {
    metrics: Arc<Metrics>,
    is_encrypted: bool,
    on_thread: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

/// Accepts on `listener` until `draining`. Above `max_connections` a new connection is closed once it has begun to speak.
pub async fn accept(
    listener: TcpListener,
    entrance: Entrance,
    max_connections: usize,
    serving: Vec<ServingThread>,
    draining: CancellationToken,
    stop: CancellationToken,
) {
    let stop_node_on_panic = stop.drop_guard();
    let (slots, serving) = (Arc::new(Semaphore::new(max_connections)), Arc::new(serving));
    let entrance = Arc::new(entrance);
    let (newcomers, mut waiting) = (Room::new(MAX_NEWCOMERS), JoinSet::new());
    while let Some(accepted) = draining.run_until_cancelled(listener.accept()).await {
        while waiting.try_join_next().is_some() {}
        while waiting.len() > MAX_NEWCOMERS {
            waiting.join_next().await; // one that had to make room has not gone yet
        }
        let Ok((stream, addr)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (newcomer, slots, entrance, serving) =
            (newcomers.enter_in_turn().await, slots.clone(), entrance.clone(), serving.clone());
        waiting.spawn(async move {
            let entered = tokio::select! {
                biased; // who has spoken is in
                entered = entrance.enter(stream, addr) => entered,
                () = newcomer.closed() => return entrance.metrics.shed("connections"),
            };
            drop(newcomer);
            if let Some(entered) = entered.ok().filter(|entered| entered.is_http2) {
                admit(entered, &entrance, slots, &serving).await;
            }
        });
    }
    stop_node_on_panic.disarm(); // calls in progress are finished first
}

/// Hands a connection that speaks HTTP/2 to a thread, if there is a slot.
async fn admit(entered: Entered, entrance: &Entrance, slots: Arc<Semaphore>, serving: &[ServingThread]) {
    let Entered { mut transport, peer, .. } = entered;
    let Ok(permit) = slots.try_acquire_owned() else { return entrance.metrics.shed("connections") };
    let least_loaded = serving.iter().min_by_key(|thread| thread.connections.load(Ordering::Relaxed));
    if let (Some(thread), Ok(())) = (least_loaded, transport.detach()) {
        let slot = ConnectionSlot::take(entrance.metrics.clone(), transport.is_encrypted(), thread, permit);
        let _ = thread.handed.send(Admitted { transport, peer, slot }).await; // the thread has ended
    }
}

impl ConnectionSlot {
    fn take(metrics: Arc<Metrics>, is_encrypted: bool, thread: &ServingThread, permit: OwnedSemaphorePermit) -> Self {
        metrics.connections(is_encrypted).inc();
        thread.connections.fetch_add(1, Ordering::Relaxed);
        Self { metrics, is_encrypted, on_thread: thread.connections.clone(), _permit: permit }
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.metrics.connections(self.is_encrypted).dec();
        self.on_thread.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admitted {
    /// Ties the connection to the runtime of the calling thread.
    pub fn adopt(self) -> io::Result<Connection> {
        let Self { mut transport, peer, slot } = self;
        transport.attach()?;
        Ok(Connection { transport, peer, _slot: slot })
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.peer.is_over() {
            return Poll::Ready(Ok(())); // as if the client had gone
        }
        Pin::new(&mut self.transport).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.transport).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;

    use super::*;
    use crate::api::transport::PREFACE;

    const THREADS: usize = 3;

    #[tokio::test]
    async fn a_connection_goes_to_the_thread_that_has_the_fewest() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let server = listener.local_addr().unwrap();
        let (serving, mut threads): (Vec<_>, Vec<_>) = (0..THREADS).map(|_| ServingThread::new()).unzip();
        let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
        let entrance = Entrance { tls: None, handshake_timeout: ACCEPT_PAUSE, accept_plain: false, metrics: Metrics::new() };
        tokio::spawn(accept(listener, entrance, 100, serving, draining.clone(), stop));
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
