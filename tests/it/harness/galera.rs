//! A Galera cluster of MariaDB servers. Needs `libgalera_smm.so` (Debian: galera-4) and rsync; `tests/run` installs them.

use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::AssertSqlSafe;
use sqlx::Connection;
use sqlx::Row;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::eventually;
use crate::harness::mariadb::MariaDb;
use crate::harness::mariadb::free_port;
use crate::harness::mariadb::scratch;
use crate::harness::place::Place;
use crate::harness::replicas::run;

const PROVIDERS: [&str; 2] = ["/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so"];
const JOINED_WITHIN: Duration = Duration::from_secs(30);

/// The data of a cluster that was begun and ended: members that begin with a copy need only be sent what came later.
static TEMPLATE: LazyLock<PathBuf> = LazyLock::new(|| {
    let first = MariaDb::start_with(options(&Place::default(), free_port(), ""));
    let place = scratch("galera_template");
    first.end_and_keep(&place);
    for file in ["galera.cache", "gvwstate.dat"] {
        let _ = std::fs::remove_file(place.join(file)); // each member has its own
    }
    place
});

pub struct Galera {
    pub members: Vec<MariaDb>,
    /// Where members find each other.
    ports: Vec<u16>,
    places: Vec<Place>,
}

impl Galera {
    pub async fn start(members: usize) -> Self {
        Self::start_at(vec![Place::default(); members]).await
    }

    /// A member at each of these places.
    pub async fn start_at(places: Vec<Place>) -> Self {
        let mut cluster = Self { members: Vec::new(), ports: Vec::new(), places: Vec::new() };
        for place in places {
            cluster.join_at(place).await;
        }
        cluster
    }

    /// One more member. Returns when it is ready.
    pub async fn join(&mut self) {
        self.join_at(Place::default()).await;
    }

    async fn join_at(&mut self, place: Place) {
        let port = free_port();
        let member = MariaDb::start_at(place.clone(), &TEMPLATE, options(&place, port, &self.peers_of(None)));
        eventually("the member is ready", JOINED_WITHIN, async || is_ready(&member).await).await;
        self.members.push(member);
        self.ports.push(port);
        self.places.push(place);
    }

    /// After it was killed: it comes back to the others, with what it had. False: the others cannot use it, or it not them.
    #[allow(dead_code)] // tests/nemesis needs it
    pub fn try_rejoin(&self, n: usize) -> bool {
        let mut options = options(&self.places[n], self.ports[n], &self.peers_of(Some(n)));
        // As Debian's unit does: a server that was killed does not know by itself how far it had come.
        let said = self.members[n].says(&[&options[..], &["--wsrep-recover".to_owned()]].concat());
        let position = said.lines().filter_map(|line| line.split_once("WSREP: Recovered position: ")).next_back();
        options.extend(position.map(|(_, position)| format!("--wsrep-start-position={}", position.trim())));
        self.members[n].try_restart(&options)
    }

    /// After it was killed: a new member takes its place, which the others send what was done since they began.
    #[allow(dead_code)] // tests/nemesis needs it
    pub fn try_replace(&self, n: usize) -> bool {
        self.members[n].loses_its_data(&TEMPLATE);
        self.members[n].try_restart(&options(&self.places[n], self.ports[n], &self.peers_of(Some(n))))
    }

    fn peers_of(&self, member: Option<usize>) -> String {
        let others = (0..self.ports.len()).filter(|n| Some(*n) != member);
        others.map(|n| format!("{}:{}", self.places[n].host, self.ports[n])).collect::<Vec<_>>().join(",")
    }

    /// `database` on all members, beginning with member `first`.
    pub fn url(&self, database: &str, first: usize) -> String {
        let order = (0..self.members.len()).map(|n| (first + n) % self.members.len());
        let servers: Vec<String> = order.map(|n| self.members[n].address()).collect();
        format!("mysql://root@{}/{database}", servers.join(","))
    }
}

/// Cuts a member off from the others, or joins it to them again. It goes on to talk to its clients.
pub async fn isolate(member: &MariaDb, isolated: bool) {
    run(member, &format!("SET GLOBAL wsrep_provider_options = 'gmcast.isolate={}'", u8::from(isolated))).await;
}

pub async fn is_ready(member: &MariaDb) -> bool {
    status(member, "wsrep_ready").await.as_deref() == Some("ON")
        && status(member, "wsrep_local_state_comment").await.as_deref() == Some("Synced")
}

async fn status(member: &MariaDb, name: &str) -> Option<String> {
    sqlx::any::install_default_drivers();
    let mut connection = sqlx::AnyConnection::connect(&member.url("")).await.ok()?;
    let show = AssertSqlSafe(format!("SHOW GLOBAL STATUS LIKE '{name}'"));
    sqlx::query(show).fetch_one(&mut connection).await.ok()?.try_get(1).ok()
}

/// An address that leads to a member. Whose sessions are not to wait, they do not, whatever they ask for.
pub struct Door {
    pub port: u16,
    /// Sessions that were kept from waiting.
    changed: Arc<AtomicUsize>,
    _connections: JoinSet<()>,
}

impl Door {
    pub async fn start(member: &MariaDb, waits: bool) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let (port, server_port) = (listener.local_addr().expect("an address").port(), member.port);
        let (changed, mut connections) = (Arc::<AtomicUsize>::default(), JoinSet::new());
        let count = changed.clone();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                links.spawn(pass(client, server_port, waits, count.clone()));
            }
        });
        Self { port, changed, _connections: connections }
    }

    pub fn changed(&self) -> usize {
        self.changed.load(Ordering::Relaxed)
    }
}

async fn pass(client: TcpStream, server_port: u16, waits: bool, changed: Arc<AtomicUsize>) -> io::Result<()> {
    const WAIT: &[u8] = b"wsrep_sync_wait = 7";
    let server = TcpStream::connect(("127.0.0.1", server_port)).await?;
    let _ = (client.set_nodelay(true), server.set_nodelay(true)); // slower, not wrong, without
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) = (client.into_split(), server.into_split());
    let requests = async {
        let mut chunk = vec![0; 64 * 1024];
        loop {
            let bytes = from_client.read(&mut chunk).await?;
            if bytes == 0 {
                return Ok::<_, io::Error>(());
            }
            if let Some(at) = chunk[..bytes].windows(WAIT.len()).position(|part| part == WAIT).filter(|_| !waits) {
                chunk[at + WAIT.len() - 1] = b'0';
                changed.fetch_add(1, Ordering::Relaxed);
            }
            to_server.write_all(&chunk[..bytes]).await?;
        }
    };
    tokio::select! {
        ended = requests => ended,
        ended = tokio::io::copy(&mut from_server, &mut to_client) => ended.map(|_| ()),
    }
}

fn options(place: &Place, port: u16, peers: &str) -> Vec<String> {
    let host = &place.host;
    let provider = PROVIDERS.iter().find(|file| Path::new(file).is_file());
    let provider = provider.expect("Galera is not installed: run tests/run, or apt-get install galera-4");
    let (state, changes) = (free_port(), free_port());
    let mut options = vec![
        "--binlog-format=ROW".to_owned(),
        "--innodb-autoinc-lock-mode=2".to_owned(),
        "--wsrep-on=ON".to_owned(),
        format!("--wsrep-provider={provider}"),
        "--wsrep-cluster-name=it".to_owned(),
        format!("--wsrep-cluster-address=gcomm://{peers}"),
        format!("--wsrep-node-address={host}:{port}"),
        format!("--wsrep-node-name=n{port}"),
        "--wsrep-sst-method=rsync".to_owned(),
        format!("--wsrep-sst-receive-address={host}:{state}"),
        format!(
            "--wsrep-provider-options=base_port={port};gmcast.listen_addr=tcp://{host}:{port};\
             ist.recv_addr={host}:{changes};gcache.size=128M"
        ),
    ];
    if peers.is_empty() {
        options.push("--wsrep-new-cluster".to_owned());
    }
    options
}
