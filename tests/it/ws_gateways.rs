//! The example gateway as people run it: WebSocket clients on two of them chat through two nodes, while all of these are killed.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::HashSet;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use futures_util::SinkExt;
use serde_json::Value;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_stream::StreamExt;
use tokio_tungstenite::MaybeTlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;

use crate::harness::cluster::Cluster;
use crate::harness::eventually;
use crate::harness::heavy;
use crate::harness::long;
use crate::harness::mariadb::free_port;
use crate::harness::node::Node;
use crate::harness::node::PROGRAM;
use crate::harness::process;

const USERS: usize = 8;
/// Between two messages of a client, and between two attempts to connect.
const PACE: Duration = Duration::from_millis(20);
const RECONNECT: Duration = Duration::from_millis(100);
/// What a client writes without having heard of what came of it.
const AHEAD: usize = 8;
const ANSWERED_WITHIN: Duration = Duration::from_secs(120);
/// By then the regular look at the inboxes has been.
const ARRIVED_WITHIN: Duration = Duration::from_secs(25);

/// `ws_gateway`, a process.
struct WsGateway {
    addr: String,
    nodes: Vec<String>,
    child: Child,
}

impl WsGateway {
    async fn start(nodes: &[Node]) -> Self {
        let addr = format!("127.0.0.1:{}", free_port());
        let nodes: Vec<String> = nodes.iter().map(|node| node.data.to_string()).collect();
        let this = Self { child: Self::spawn(&addr, &nodes), addr, nodes };
        this.listens().await;
        this
    }

    fn spawn(addr: &str, nodes: &[String]) -> Child {
        let program = Path::new(PROGRAM).with_file_name("examples").join("ws_gateway");
        let mut command = Command::new(&program);
        command.arg(addr).args(nodes).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        process::spawn(command).unwrap_or_else(|error| panic!("{program:?}: {error}; `cargo build --examples` makes it"))
    }

    async fn listens(&self) {
        eventually("the gateway listens", ARRIVED_WITHIN, async || TcpStream::connect(&self.addr).await.is_ok()).await;
    }

    fn kill(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        self.child.wait().expect("wait for the gateway");
    }

    async fn restart(&mut self) {
        self.child = Self::spawn(&self.addr, &self.nodes);
        self.listens().await;
    }
}

impl Drop for WsGateway {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A user's client: writes to the others in turn, and whenever it was cut off comes back and writes again what had no answer.
struct Client {
    user: usize,
    gateway: String,
    messages: usize,
    ledger: Arc<Mutex<Ledger>>,
}

/// Sender and number of a message.
type Id = (usize, usize);

/// What all clients have seen.
#[derive(Default)]
struct Ledger {
    outcomes: HashMap<Id, String>,
    /// By receiver, in their order, with repetitions.
    received: BTreeMap<usize, Vec<Id>>,
    connected: usize,
}

impl Client {
    async fn run(self) {
        let (mut written, mut unanswered) = (0, BTreeMap::new());
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let url = format!("ws://{}/ws?user={}&device=phone", self.gateway, self.user);
            if let Ok((mut socket, _)) = connect_async(url).await {
                lock(&self.ledger).connected += 1;
                let mut is_there = true;
                for text in unanswered.values() {
                    is_there &= say(&mut socket, text).await;
                }
                while is_there {
                    is_there = tokio::select! {
                        _ = pace.tick(), if written < self.messages && unanswered.len() < AHEAD => {
                            let text = self.message(written);
                            unanswered.insert(written, text.clone());
                            written += 1;
                            say(&mut socket, &text).await
                        }
                        read = socket.next() => match read {
                            Some(Ok(Message::Text(text))) => self.take(&mut socket, &text, &mut unanswered).await,
                            Some(Ok(_)) => true,
                            Some(Err(_)) | None => false,
                        },
                    };
                }
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    fn message(&self, number: usize) -> Value {
        let to = (self.user - 1 + 1 + number % (USERS - 1)) % USERS + 1; // everybody else in turn
        json!({ "id": format!("{}-{number}", self.user), "to": to, "text": "hello" })
    }

    /// False: the connection has ended.
    async fn take(
        &self,
        socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>,
        text: &str,
        unanswered: &mut BTreeMap<usize, Value>,
    ) -> bool {
        let told: Value = serde_json::from_str(text).expect("JSON");
        let id = id(told["id"].as_str().expect("an id"));
        if let Some(outcome) = told["outcome"].as_str() {
            if unanswered.remove(&id.1).is_some() {
                lock(&self.ledger).outcomes.insert(id, outcome.to_owned());
            }
            return true;
        }
        assert_eq!((told["from"].as_u64(), told["text"].as_str()), (u64::try_from(id.0).ok(), Some("hello")));
        lock(&self.ledger).received.entry(self.user).or_default().push(id);
        say(socket, &json!({ "got": told["delivery"] })).await
    }
}

async fn say(socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>, what: &Value) -> bool {
    socket.send(Message::text(what.to_string())).await.is_ok()
}

fn id(text: &str) -> Id {
    let (user, number) = text.split_once('-').expect("one of ours");
    (user.parse().expect("a user"), number.parse().expect("a number"))
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    fn has_arrived(&self, id: &Id) -> bool {
        self.received.values().any(|received| received.contains(id))
    }

    /// What was promised and has not arrived.
    fn missing(&self) -> Vec<Id> {
        let received: HashSet<&Id> = self.received.values().flatten().collect();
        let promised = self.outcomes.iter().filter(|(_, outcome)| *outcome != "not sent");
        promised.map(|(id, _)| *id).filter(|id| !received.contains(id)).collect()
    }

    /// Prints what became of all messages, and insists on the order of those that were answered well.
    fn check(&self, messages: usize) {
        let count = |what: &str| self.outcomes.values().filter(|outcome| *outcome == what).count();
        let (delivered, stored, errors) = (count("delivered"), count("stored"), count("not sent"));
        let refused = self.outcomes.iter().filter(|(_, outcome)| *outcome == "not sent");
        let arrived_anyway = refused.filter(|(id, _)| self.has_arrived(id)).count();
        let (mut twice, mut seen, mut last) = (0, HashSet::new(), HashMap::new());
        for (receiver, received) in &self.received {
            for id in received {
                if !seen.insert((receiver, id)) {
                    twice += 1;
                } else if self.outcomes[id] != "not sent" {
                    let before = last.insert((receiver, id.0), id.1);
                    assert!(before < Some(id.1), "user {receiver} got {id:?} after number {before:?}");
                }
            }
        }
        println!(
            "{messages} sent: {delivered} delivered, {stored} stored and received later, {errors} answered with an error (of \
            which {arrived_anyway} arrived); {twice} came twice; clients connected {} times",
            self.connected
        );
        assert_eq!(delivered + stored + errors, messages);
        assert_eq!(seen.len(), delivered + stored + arrived_anyway, "each went to one user");
        assert!(errors <= messages / 20, "most of it went well");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_of_two_websocket_gateways_lose_no_message_while_gateways_and_nodes_are_killed() {
    let _turn = heavy().await;
    let each = if long() { 1_000 } else { 80 };
    let messages = each * USERS;
    let mut cluster = Cluster::with_redis(2, &[("ROUTE__RETRY_INTERVAL", "200")]).await;
    let mut gateways = [WsGateway::start(&cluster.nodes).await, WsGateway::start(&cluster.nodes).await];
    let (ledger, mut clients, began) = (Arc::<Mutex<Ledger>>::default(), JoinSet::new(), Instant::now());
    for user in 1..=USERS {
        let gateway = gateways[user % 2].addr.clone();
        clients.spawn(Client { user, gateway, messages: each, ledger: ledger.clone() }.run());
    }
    let answered = || lock(&ledger).outcomes.len();
    let share = async |percent: usize| {
        eventually("messages are answered", ANSWERED_WITHIN, async || answered() >= messages * percent / 100).await;
        println!("{percent} % are answered after {:?}", began.elapsed());
    };
    share(20).await;
    gateways[0].kill();
    share(30).await;
    gateways[0].restart().await;
    share(50).await;
    cluster.nodes[1].kill();
    share(60).await;
    cluster.nodes[1].restart().await;
    share(70).await;
    gateways[1].kill();
    cluster.nodes[0].kill();
    gateways[1].restart().await;
    share(80).await;
    cluster.nodes[0].restart().await;
    share(100).await;
    eventually("what was promised has arrived", ARRIVED_WITHIN, async || lock(&ledger).missing().is_empty()).await;
    println!("everything has arrived after {:?}", began.elapsed());
    lock(&ledger).check(messages);
    let left = "SELECT COUNT(*) FROM inbox";
    eventually("nothing is left behind", ARRIVED_WITHIN, async || cluster.db.number(left).await == 0).await;
    assert!(clients.try_join_next().is_none(), "no client has failed");
}

/// Waits until a client is told this of a contact.
async fn is_told(socket: &mut WebSocketStream<MaybeTlsStream<TcpStream>>, user: usize, status: &str, text: &str) {
    let want = json!({ "user": user, "status": status, "text": text });
    let told = async {
        while let Some(Ok(message)) = socket.next().await {
            if message.to_text().is_ok_and(|text| serde_json::from_str::<Value>(text).is_ok_and(|told| told == want)) {
                return;
            }
        }
        panic!("the connection has ended before {want}");
    };
    tokio::time::timeout(ARRIVED_WITHIN, told).await.unwrap_or_else(|_| panic!("it is told {want}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_a_websocket_gateway_sees_its_contacts_come_and_go_and_what_they_say_of_themselves() {
    let cluster = Cluster::with_redis(2, &[]).await;
    let gateways = [WsGateway::start(&cluster.nodes).await, WsGateway::start(&cluster.nodes).await];
    let connect = async |user: usize, gateway: &WsGateway| {
        let url = format!("ws://{}/ws?user={user}&device=phone", gateway.addr);
        connect_async(url).await.expect("it listens").0
    };
    let mut alice = connect(1, &gateways[0]).await;
    assert!(say(&mut alice, &json!({ "watch": [2, 3] })).await);
    is_told(&mut alice, 2, "offline", "").await;
    let mut bob = connect(2, &gateways[1]).await;
    is_told(&mut alice, 2, "online", "").await;
    assert!(say(&mut bob, &json!({ "status": "busy", "text": "in a meeting" })).await);
    is_told(&mut alice, 2, "busy", "in a meeting").await;
    let mut page = connect(1, &gateways[0]).await; // takes the place of the other one
    assert!(say(&mut page, &json!({ "watch": [2] })).await);
    is_told(&mut page, 2, "busy", "in a meeting").await;
    drop(bob);
    is_told(&mut page, 2, "offline", "").await;
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What a client of user 1 has seen.
#[derive(Default)]
struct Moved {
    got: HashSet<String>,
    /// Where it is, once its former connection has ended.
    to: Option<String>,
}

/// A client that does what the page does: it goes where it is sent, and takes what comes on either connection.
async fn follow(mut socket: Socket, moved: Arc<Mutex<Moved>>) {
    let (mut former, mut host, mut code) = (None::<Socket>, String::new(), None);
    loop {
        let (message, on_former) = match &mut former {
            Some(former) => tokio::select! {
                message = former.next() => (message, true),
                message = socket.next() => (message, false),
            },
            None => (socket.next().await, false),
        };
        let text = match message {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(frame))) => {
                assert!(on_former, "the new connection stays: {frame:?}");
                code = frame.map(|frame| u16::from(frame.code));
                continue;
            }
            Some(Ok(_)) => continue,
            Some(Err(_)) | None => {
                assert!(on_former, "the new connection stays");
                assert_eq!(code, Some(4_000), "the old one is told that another has its place");
                (former, moved.lock().unwrap_or_else(PoisonError::into_inner).to) = (None, Some(host.clone()));
                continue;
            }
        };
        let told: Value = serde_json::from_str(&text).expect("JSON");
        if let Some(to) = told["move"].as_array() {
            tokio::time::sleep(Duration::from_millis(told["after_ms"].as_u64().expect("a number"))).await;
            host = to[0].as_str().expect("a host").to_owned();
            let url = format!("ws://{host}/ws?user=1&device=phone");
            former = Some(std::mem::replace(&mut socket, connect_async(url).await.expect("it listens").0));
        } else if told["delivery"].is_string() {
            let id = told["id"].as_str().expect("an id").to_owned();
            moved.lock().unwrap_or_else(PoisonError::into_inner).got.insert(id);
            let on = if on_former { former.as_mut() } else { Some(&mut socket) };
            assert!(say(on.expect("it is there"), &json!({ "got": told["delivery"] })).await);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_websocket_gateway_that_is_drained_move_to_the_other_one_and_lose_no_message() {
    let cluster = Cluster::with_redis(2, &[("DRAIN__SETTLE", "1")]).await;
    let gateways = [WsGateway::start(&cluster.nodes).await, WsGateway::start(&cluster.nodes).await];
    let connect = async |user: usize, gateway: &WsGateway| {
        let url = format!("ws://{}/ws?user={user}&device=phone", gateway.addr);
        connect_async(url).await.expect("it listens").0
    };
    let (moved, phone) = (Arc::<Mutex<Moved>>::default(), connect(1, &gateways[0]).await);
    let following = tokio::spawn(follow(phone, moved.clone()));
    let mut bob = connect(2, &gateways[1]).await;
    assert!(say(&mut bob, &json!({ "watch": [1] })).await);
    is_told(&mut bob, 1, "online", "").await;
    let request = im_presence::pb::DrainGatewayReq { gateway_addr: gateways[0].addr.clone(), ..Default::default() };
    cluster.node().operator().drain_gateway(request).await.expect("a drain");
    let (mut sent, mut outcomes, mut more, mut pace) = (0, HashSet::new(), 20, interval(PACE));
    let is_moved = || moved.lock().unwrap_or_else(PoisonError::into_inner).to.is_some();
    while more > 0 || outcomes.len() < sent {
        tokio::select! {
            _ = pace.tick(), if more > 0 => {
                assert!(say(&mut bob, &json!({ "id": format!("2-{sent}"), "to": 1, "text": "hello" })).await);
                sent += 1;
                more -= usize::from(is_moved()); // some more, where it is now
                assert!(sent < 10_000, "it does not move");
            }
            read = bob.next() => {
                let read = read.expect("it stays").expect("a frame");
                let Ok(told) = serde_json::from_str::<Value>(read.to_text().unwrap_or_default()) else { continue };
                assert_ne!(told["status"], "offline", "nobody sees that it moves");
                if let Some(outcome) = told["outcome"].as_str() {
                    assert_ne!(outcome, "not sent");
                    outcomes.insert(told["id"].as_str().expect("an id").to_owned());
                }
            }
        }
    }
    let seen = || moved.lock().unwrap_or_else(PoisonError::into_inner).got.len();
    eventually("each message has arrived", ARRIVED_WITHIN, async || seen() == sent).await;
    println!("{sent} messages were sent, all arrived");
    assert_eq!(moved.lock().unwrap_or_else(PoisonError::into_inner).to, Some(gateways[1].addr.clone()));
    assert!(!following.is_finished(), "the client has not failed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_of_a_websocket_gateway_that_does_not_move_is_closed_in_time_and_may_come_back() {
    let cluster = Cluster::sqlite(&[("DRAIN__CLOSE_AFTER", "1")]).await;
    let gateways = [WsGateway::start(&cluster.nodes).await, WsGateway::start(&cluster.nodes).await];
    let url = format!("ws://{}/ws?user=1&device=phone", gateways[0].addr);
    let mut phone = connect_async(&url).await.expect("it listens").0;
    let request = im_presence::pb::MigrateUserReq { user_id: 1, ..Default::default() };
    let asked = async || {
        let answer = cluster.node().operator().migrate_user(request.clone()).await;
        answer.is_ok_and(|answer| answer.into_inner().routes == 1)
    };
    eventually("it is asked to go", ARRIVED_WITHIN, asked).await;
    let (mut is_told, mut code) = (false, None);
    while let Some(Ok(message)) = tokio::time::timeout(ARRIVED_WITHIN, phone.next()).await.expect("it is closed") {
        is_told |= message.to_text().is_ok_and(|text| text.starts_with("{\"move\""));
        if let Message::Close(frame) = message {
            code = frame.map(|frame| u16::from(frame.code));
        }
    }
    assert_eq!((is_told, code), (true, Some(4_001)), "the page gives up only after 4000");
}
