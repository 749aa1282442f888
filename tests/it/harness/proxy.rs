//! A TCP proxy before MariaDB that reads along, and holds or cuts a connection at a chosen statement.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::JoinSet;

use crate::harness::orders::Order;
use crate::harness::orders::Orders;

/// What only the session of a lane says, and that of the watch.
const LANE_MARK: &str = "innodb_lock_wait_timeout = 1";
const COMMIT: &str = "COMMIT";
/// When a lane says this, it has locked and written all users of its batch.
pub const LAST_BEFORE_COMMIT: &str = "INTO outbox";
const ANSWER_BYTES: usize = 64 * 1024;
// Commands of the MySQL protocol.
const COM_QUERY: u8 = 0x03;
const COM_STMT_PREPARE: u8 = 0x16;
const COM_STMT_EXECUTE: u8 = 0x17;

/// Who speaks on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// And the watch, whose session is the same.
    Lane,
    Reader,
    Anybody,
}

#[derive(Clone, Copy, Debug)]
enum Mode {
    Pass,
    /// Answers to statements that contain this text stay here until released.
    HoldAnswers(Kind, &'static str),
    /// A lane's statements that contain this text stay here until released.
    HoldRequests(&'static str),
    /// The next lane that sends a statement with this text is cut off, and the server never hears of the statement.
    CutAt(&'static str),
    /// The next COMMIT is forwarded; its answer ends here, with the connection.
    CutAfterCommit,
    /// Nothing gets through in either direction, and nobody is told.
    CutOff,
}

pub struct Proxy {
    pub port: u16,
    orders: Arc<Orders<Mode>>,
    _connections: JoinSet<()>,
}

/// What both directions of a connection know.
struct Link {
    orders: Arc<Orders<Mode>>,
    session: Mutex<Session>,
}

#[derive(Default)]
struct Session {
    is_lane: bool,
    /// The statement that the server works on.
    current: String,
    preparing: bool,
    prepared: HashMap<[u8; 4], String>,
    /// The connection ends at the next answer.
    cut_at_answer: Option<Order<Mode>>,
}

impl Proxy {
    pub async fn start(server_port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let orders = Arc::new(Orders::new(Mode::Pass));
        let mut connections = JoinSet::new();
        let link_orders = orders.clone();
        connections.spawn(async move {
            let mut links = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let link = Link { orders: link_orders.clone(), session: Mutex::default() };
                links.spawn(link.run(client, server_port));
            }
        });
        Self { port, orders, _connections: connections }
    }

    pub fn url(&self, database: &str) -> String {
        format!("mysql://root@127.0.0.1:{}/{database}", self.port)
    }

    /// From now on, answers to statements that contain `text` do not arrive.
    pub fn hold_answers(&self, kind: Kind, text: &'static str) {
        self.set(Mode::HoldAnswers(kind, text));
    }

    /// From now on, COMMIT does not arrive at the server.
    pub fn hold_commit(&self) {
        self.hold_requests(COMMIT);
    }

    /// From now on, statements of lanes that contain `text` do not arrive at the server. What was held before goes on.
    pub fn hold_requests(&self, text: &'static str) {
        self.set(Mode::HoldRequests(text));
    }

    /// From now on, nothing gets through, and connections stay open.
    pub fn cut_off(&self) {
        self.set(Mode::CutOff);
    }

    /// The next transaction loses its connection at its last statement before COMMIT.
    pub fn cut_before_commit(&self) {
        self.set(Mode::CutAt(LAST_BEFORE_COMMIT));
    }

    /// The next transaction loses its connection at COMMIT, which never arrives at the server.
    pub fn cut_at_commit(&self) {
        self.set(Mode::CutAt(COMMIT));
    }

    pub fn cut_after_commit(&self) {
        self.set(Mode::CutAfterCommit);
    }

    /// Waits until something is held, or was cut.
    pub async fn struck(&self) {
        self.orders.struck().await;
    }

    /// What was held goes on, and nothing more is held.
    pub fn release(&self) {
        self.set(Mode::Pass);
    }

    fn set(&self, mode: Mode) {
        self.orders.set(mode);
    }
}

impl Link {
    async fn run(self, client: TcpStream, server_port: u16) {
        let Ok(server) = TcpStream::connect(("127.0.0.1", server_port)).await else { return };
        let _ = (client.set_nodelay(true), server.set_nodelay(true)); // slower, not wrong, without
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::select! {
            _ = self.requests(from_client, to_server) => {}
            _ = self.answers(from_server, to_client) => {}
        }
    }

    async fn requests(&self, mut client: OwnedReadHalf, mut server: OwnedWriteHalf) -> io::Result<()> {
        loop {
            let mut packet = vec![0; 4];
            client.read_exact(&mut packet).await?;
            let length = usize::from(packet[0]) | usize::from(packet[1]) << 8 | usize::from(packet[2]) << 16;
            packet.resize(4 + length, 0);
            client.read_exact(&mut packet[4..]).await?;
            self.session().sees(&packet[4..]);
            if !self.may_pass().await {
                return Ok(());
            }
            server.write_all(&packet).await?;
        }
    }

    /// False: the connection ends here.
    async fn may_pass(&self) -> bool {
        let order = self.orders.now();
        let says = |text: &str| {
            let session = self.session();
            session.is_lane && !session.preparing && session.current.contains(text)
        };
        match order.mode {
            Mode::HoldRequests(text) if says(text) => self.orders.hold(&order).await,
            Mode::CutOff => self.orders.hold(&order).await,
            Mode::CutAt(text) if says(text) => {
                let Some(next) = self.orders.end(&order, Mode::Pass) else { return true };
                self.orders.strike(&next);
                return false;
            }
            Mode::CutAfterCommit if says(COMMIT) => self.session().cut_at_answer = self.orders.end(&order, Mode::Pass),
            _ => {}
        }
        true
    }

    async fn answers(&self, mut server: OwnedReadHalf, mut client: OwnedWriteHalf) -> io::Result<()> {
        let mut answer = vec![0; ANSWER_BYTES];
        loop {
            let bytes = server.read(&mut answer).await?;
            if bytes == 0 {
                return Ok(());
            }
            self.session().answered(&answer[..bytes]);
            let cut = self.session().cut_at_answer;
            if let Some(order) = cut {
                self.orders.strike(&order);
                return Ok(());
            }
            let order = self.orders.now();
            if self.session().is_held_by(order.mode) {
                self.orders.hold(&order).await;
            }
            client.write_all(&answer[..bytes]).await?;
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    /// Takes note of what the client sends.
    fn sees(&mut self, payload: &[u8]) {
        let Some((command, body)) = payload.split_first() else { return };
        match *command {
            COM_QUERY | COM_STMT_PREPARE => {
                self.current = String::from_utf8_lossy(body).into_owned();
                self.is_lane |= self.current.contains(LANE_MARK);
            }
            COM_STMT_EXECUTE => {
                let id = body.first_chunk::<4>();
                self.current = id.and_then(|id| self.prepared.get(id)).cloned().unwrap_or_default();
            }
            _ => self.current.clear(),
        }
        self.preparing = *command == COM_STMT_PREPARE;
    }

    fn answered(&mut self, bytes: &[u8]) {
        if self.preparing
            && let Some([0, id @ ..]) = bytes.get(4..).and_then(|rest| rest.first_chunk::<5>())
        {
            self.prepared.insert(*id, self.current.clone());
        }
    }

    /// Only answers that bring rows or changes are held, not those to PREPARE: what is held has been carried out.
    fn is_held_by(&self, mode: Mode) -> bool {
        let own = if self.is_lane { Kind::Lane } else { Kind::Reader };
        let is_meant = |kind| kind == own || kind == Kind::Anybody;
        matches!(mode, Mode::CutOff)
            || matches!(mode, Mode::HoldAnswers(kind, text) if is_meant(kind) && !self.preparing && self.current.contains(text))
    }
}
