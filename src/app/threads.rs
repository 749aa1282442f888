//! The threads that serve the data port: one runtime each, so that a call is answered by the thread that read it, without
//! waking another. SQL, Redis and everything in the background run elsewhere.

use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread;

use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tracing::error;

use crate::answers::with_desk;
use crate::api::listen::Admitted;
use crate::api::listen::ServingThread;
use crate::api::listen::accept;
use crate::api::transport::Entrance;
use crate::app::serve;
use crate::app::serve::DataService;
use crate::metrics::threads::BusyThreads;
use crate::pb::presence_service_server::PresenceService;

/// The serving threads, as long as one of them runs.
pub struct Threads {
    alive: Option<mpsc::Sender<()>>,
    running: mpsc::Receiver<()>,
    busy: Arc<BusyThreads>,
}

impl Threads {
    /// Starts `count` threads that serve the connections handed to them; 0 is one per core. From `draining` on they finish
    /// the calls in progress and end; at `stop` they end at once. One that ends otherwise stops the node.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn start<P: PresenceService>(
        count: usize,
        service: &DataService<P>,
        busy: &Arc<BusyThreads>,
        draining: &CancellationToken,
        stop: &CancellationToken,
    ) -> io::Result<(Self, Vec<ServingThread>)> {
        let count = if count == 0 { thread::available_parallelism().map_or(1, NonZeroUsize::get) } else { count };
        busy.watch("background".to_owned(), Handle::current().metrics());
        let (alive, running) = mpsc::channel(1);
        let mut serving = Vec::with_capacity(count);
        for number in 0..count {
            let (queue, handed) = ServingThread::new();
            serving.push(queue);
            let (name, runtime) = (format!("serve-{number}"), Builder::new_current_thread().enable_all().build()?);
            busy.watch(name.clone(), runtime.handle().metrics());
            let service = service.for_another_thread();
            let (draining, stop, alive) = (draining.clone(), stop.clone(), alive.clone());
            let work = move || {
                let _alive = alive;
                let stop_node = stop.clone().drop_guard();
                runtime.block_on(stop.run_until_cancelled(with_desk(serve_handed(service, handed, draining.clone()))));
                if draining.is_cancelled() {
                    stop_node.disarm(); // others may still have calls in progress
                }
            };
            thread::Builder::new().name(name).spawn(work)?;
        }
        Ok((Self { alive: Some(alive), running, busy: busy.clone() }, serving))
    }

    /// Accepts connections on a thread of its own: handshakes are work, and must hold up neither calls nor the lanes.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub fn accept(
        &self,
        listener: TcpListener,
        entrance: Entrance,
        max_connections: usize,
        serving: Vec<ServingThread>,
        draining: CancellationToken,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let (runtime, alive) = (Builder::new_current_thread().enable_all().build()?, self.alive.clone());
        self.busy.watch("accept".to_owned(), runtime.handle().metrics());
        let listener = listener.into_std()?;
        let work = move || {
            let _alive = alive;
            let stop_node = stop.clone().drop_guard();
            let accepted = runtime.block_on(async {
                let listener = TcpListener::from_std(listener)?;
                accept(listener, entrance, max_connections, serving, draining, stop.clone()).await;
                io::Result::Ok(())
            });
            match accepted {
                Ok(()) => drop(stop_node.disarm()), // calls in progress are finished first
                Err(error) => error!(%error, "cannot accept connections"),
            }
        };
        thread::Builder::new().name("accept".to_owned()).spawn(work).map(|_| ())
    }

    /// Waits until all of them have ended.
    pub async fn ended(&mut self) {
        self.alive = None;
        while self.running.recv().await.is_some() {}
    }
}

async fn serve_handed<P: PresenceService>(
    service: DataService<P>,
    handed: mpsc::Receiver<Admitted>,
    draining: CancellationToken,
) {
    let connections = ReceiverStream::new(handed).map(Admitted::adopt);
    let served = serve::data_server().serve_with_incoming_shutdown(service, connections, draining.cancelled_owned()).await;
    if let Err(error) = served {
        error!(%error, "the gRPC server ended");
    }
}
