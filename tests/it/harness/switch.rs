//! One address for a primary and its replica, as a DNS name or a balancer is: it leads new connections to whoever is said.

use std::sync::Arc;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering;

use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

pub struct Switch {
    pub port: u16,
    target: Arc<AtomicU16>,
    _connections: JoinSet<()>,
}

impl Switch {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let (target, mut connections) = (Arc::new(AtomicU16::new(server_port)), JoinSet::new());
        let current = target.clone();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                links.spawn(link(client, current.load(Ordering::Relaxed)));
            }
        });
        Self { port, target, _connections: connections }
    }

    /// From now on. Connections that are there stay where they are.
    pub fn lead_to(&self, server_port: u16) {
        self.target.store(server_port, Ordering::Relaxed);
    }

    pub fn url(&self, database: &str) -> String {
        format!("mysql://root@127.0.0.1:{}/{database}", self.port)
    }
}

async fn link(mut client: TcpStream, server_port: u16) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", server_port)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true)); // slower, not wrong, without
    let _ = copy_bidirectional(&mut client, &mut server).await; // until one of them ends
}
