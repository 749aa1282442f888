//! A gateway that people can use: WebSockets on one side, im-presence on the other, and a page to chat on.
//!
//!     cargo run --release                                                    # a node
//!     cargo run --release -p im-presence-client --example ws_gateway -- 127.0.0.1:8001 127.0.0.1:6000
//!     cargo run --release -p im-presence-client --example ws_gateway -- 127.0.0.1:8002 127.0.0.1:6000
//!
//! Then open http://127.0.0.1:8001/?user=1 and http://127.0.0.1:8002/?user=2 and write to each other. Everything after the
//! first address is a node; with several, one may be killed. IM_PRESENCE_TOKEN_FILE, IM_PRESENCE_CA, IM_PRESENCE_CERT and
//! IM_PRESENCE_KEY say who it is, and which nodes it believes.
//!
//! A client writes `{"id": "…", "to": 2, "text": "…"}` and is told `{"id": "…", "outcome": "delivered"}`, or `stored`, or
//! `not sent`. It is told `{"delivery": "…", "id": "…", "from": 1, "text": "…"}`, says `{"got": "…"}` with the delivery once
//! it has it, and drops a message whose id it has seen. After it was cut off it writes again what had no outcome.
//!
//! It says `{"watch": [2, 3]}`, its contacts, and is told `{"user": 2, "status": "online", "text": ""}` of each, now and
//! whenever that changes. `{"status": "busy", "text": "in a meeting"}` is how its user wants to be seen. Whatever it says but
//! `got` shows that somebody is there; `{"here": true}` says nothing else. Whose clients are silent for a minute is away.
//!
//! `{"move": ["127.0.0.1:8002"], "after_ms": 300}` asks it to connect to the first of these that takes it, then, and to close
//! this connection once the other one is open. One that does not is closed after a while, with 4001, and may come back here.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::Router;
use axum::extract::Query;
use axum::extract::State;
use axum::extract::WebSocketUpgrade;
use axum::extract::ws::CloseFrame;
use axum::extract::ws::Message;
use axum::extract::ws::WebSocket;
use axum::response::Html;
use axum::response::Response;
use axum::routing::get;
use im_presence_client::caller::Caller;
use im_presence_client::gateway::Acker;
use im_presence_client::gateway::ClientKey;
use im_presence_client::gateway::Connection;
use im_presence_client::gateway::Event;
use im_presence_client::gateway::Gateway;
use im_presence_client::gateway::Options;
use im_presence_client::security::Security;
use im_presence_proto as pb;
use serde::Deserialize;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::time::interval;

/// A call with all its retries.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// How long a device has to acknowledge.
const ACK_TIMEOUT_MS: u32 = 2_000;
/// Messages that wait for one socket, or for its acknowledgement; a client that is too slow gets the rest from its inbox.
const SOCKET_QUEUE: usize = 256;
/// A client that says nothing for two of these, not even to a ping, is gone.
const PING: Duration = Duration::from_secs(20);
/// Tells a client that its place was taken: it should not come back by itself.
const CONNECTED_ELSEWHERE: u16 = 4_000;
/// Tells a client that it has to go, and may come back to whatever takes it: it was moved, and has not gone by itself.
const MOVED: u16 = 4_001;

/// User and connection.
type Place = (i64, String);
type Sockets = Arc<Mutex<BTreeMap<Place, Socket>>>;
/// Who is told of contacts.
type Watchers = Arc<Mutex<HashMap<ClientKey, Arc<News>>>>;

/// What is known of a client. Dropping it closes the client's connection.
struct Socket {
    device: String,
    to_client: mpsc::Sender<ToClient>,
    /// By delivery.
    unacknowledged: HashMap<String, Acker>,
    /// It is closed because it was to go elsewhere and has not.
    is_moved: Arc<AtomicBool>,
}

/// What a client has still to be told of its contacts, of each only the newest: however slow it is, this does not grow.
#[derive(Default)]
struct News {
    presences: Mutex<BTreeMap<i64, pb::UserPresence>>,
    arrived: Notify,
}

struct Chat {
    sockets: Sockets,
    watchers: Watchers,
    clients: AtomicU64,
    gateway: Gateway,
    caller: Caller,
}

#[derive(Deserialize)]
struct Who {
    user: i64,
    #[serde(default)]
    device: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum FromClient {
    Message {
        id: String,
        to: i64,
        text: String,
    },
    Got {
        got: String,
    },
    Watch {
        watch: Vec<i64>,
    },
    Status {
        status: String,
        text: Option<String>,
    },
    Here {
        #[serde(rename = "here")]
        _here: bool,
    },
}

#[derive(Serialize)]
#[serde(untagged)]
enum ToClient {
    Message {
        delivery: String,
        id: String,
        #[serde(flatten)]
        said: ChatMessage,
    },
    Outcome {
        id: String,
        outcome: &'static str,
    },
    Presence {
        user: i64,
        status: String,
        text: String,
    },
    Move {
        #[serde(rename = "move")]
        to: Vec<String>,
        after_ms: u32,
    },
}

/// What travels through im-presence.
#[derive(Deserialize, Serialize)]
struct ChatMessage {
    from: i64,
    text: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(addr), nodes) = (args.next(), args.collect::<Vec<_>>()) else {
        return Err("usage: ws_gateway ADDR NODE...".into());
    };
    let listener = TcpListener::bind(addr.parse::<SocketAddr>()?).await?;
    let (sockets, watchers) = (Sockets::default(), Watchers::default());
    let security = Security::from_env(); // a token, certificates
    let options = Options { nodes: nodes.clone(), gateway_addr: addr, security: security.clone(), ..Options::default() };
    let (told, news, shown) = (sockets.clone(), watchers.clone(), options.gateway_addr.clone());
    let gateway = Gateway::start(options, move |event| hear(&told, &news, &shown, event))?;
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let (caller, clients) = (Caller::with_security(&nodes, CALL_LIMIT, &security)?, AtomicU64::new(0));
    let chat = Arc::new(Chat { sockets, watchers, clients, gateway, caller });
    let page = get(async || Html(include_str!("chat.html")));
    let router = Router::new().route("/", page).route("/ws", get(connect)).with_state(chat);
    Ok(axum::serve(listener, router).await?)
}

/// What the nodes say.
fn hear(sockets: &Sockets, watchers: &Watchers, addr: &str, event: Event) {
    match event {
        Event::Delivery(delivery, acker) => hand_over(&mut lock(sockets), &delivery, &acker),
        Event::Kick(connection, kick) => {
            if let Some(socket) = lock(sockets).remove(&(connection.user_id, connection.conn_id)) {
                let is_moved = matches!(kick.reason(), pb::Reason::Drain | pb::Reason::Migrate);
                socket.is_moved.store(is_moved, Ordering::Relaxed); // before it is dropped
            }
        }
        Event::Lost(connection, _) => _ = lock(sockets).remove(&(connection.user_id, connection.conn_id)),
        Event::Move(connection, kick) => {
            if let Some(socket) = lock(sockets).get(&(connection.user_id, connection.conn_id)) {
                let (to, after_ms) = (kick.reconnect_to, kick.reconnect_after_ms);
                let _ = socket.to_client.try_send(ToClient::Move { to, after_ms }); // full: it is closed, and comes back anywhere
            }
        }
        Event::Draining(is_drained) => eprintln!("{addr} {} clients", if is_drained { "is to lose its" } else { "may take" }),
        Event::Presence { client, presence } => {
            if let Some(news) = lock(watchers).get(&client) {
                lock(&news.presences).insert(presence.user_id, presence);
                news.arrived.notify_one();
            }
        }
        Event::NotWatched { users, why, .. } => eprintln!("{} users are not watched: {why}", users.len()),
        Event::Attached { epoch } => eprintln!("{addr} is attached with epoch {epoch}"),
        Event::Detached(status) => eprintln!("{addr} is not attached: {}", status.message()),
        Event::Superseded => eprintln!("another process is {addr}"),
    }
}

/// Puts a message into the queue of each device that it is for. One that has no place gets it later: nobody acknowledges it.
fn hand_over(sockets: &mut BTreeMap<Place, Socket>, delivery: &pb::Delivery, acker: &Acker) {
    let user = delivery.user_id;
    for (_, socket) in sockets.range_mut((user, String::new())..).take_while(|((of, _), _)| *of == user) {
        let is_for_it = delivery.device_ids.is_empty() || delivery.device_ids.contains(&socket.device);
        if !is_for_it || socket.unacknowledged.len() >= SOCKET_QUEUE {
            continue;
        }
        let said =
            serde_json::from_str(&delivery.message).unwrap_or_else(|_| ChatMessage { from: 0, text: delivery.message.clone() });
        let named = [&delivery.message_id, &delivery.delivery_id].into_iter().find(|id| !id.is_empty());
        let (delivery, id) = (delivery.delivery_id.clone(), named.cloned().unwrap_or_default());
        if socket.to_client.try_send(ToClient::Message { delivery: delivery.clone(), id, said }).is_ok() {
            socket.unacknowledged.insert(delivery, acker.clone());
        }
    }
}

async fn connect(State(chat): State<Arc<Chat>>, Query(who): Query<Who>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |socket| serve(chat, who, socket))
}

/// One client, from its log-in to its end.
async fn serve(chat: Arc<Chat>, Who { user, device }: Who, mut socket: WebSocket) {
    let conn_id = uuid::Uuid::new_v4().to_string();
    let place = (user, conn_id.clone());
    let (to_client, messages) = mpsc::channel(SOCKET_QUEUE);
    let is_moved = Arc::<AtomicBool>::default();
    let known = Socket { device: device.clone(), to_client, unacknowledged: HashMap::new(), is_moved: is_moved.clone() };
    lock(&chat.sockets).insert(place.clone(), known);
    let client = Client { key: chat.clients.fetch_add(1, Ordering::Relaxed), place: place.clone(), device: device.clone() };
    let news = Arc::<News>::default();
    lock(&chat.watchers).insert(client.key, news.clone());
    if talk(&chat, &client, messages, &news, &mut socket).await == End::Elsewhere {
        let frame = match is_moved.load(Ordering::Relaxed) {
            true => CloseFrame { code: MOVED, reason: "moved".into() },
            false => CloseFrame { code: CONNECTED_ELSEWHERE, reason: "connected elsewhere".into() },
        };
        let _ = socket.send(Message::Close(Some(frame))).await; // it may be gone
    }
    drop(socket);
    lock(&chat.sockets).remove(&place);
    lock(&chat.watchers).remove(&client.key);
    let _ = chat.gateway.unwatch(client.key).await; // stopped: nobody watches
    let _ = chat.gateway.unbind(user, &device, &conn_id).await; // stopped: it is unbound with everybody
}

/// Who talks.
struct Client {
    key: ClientKey,
    place: Place,
    device: String,
}

#[derive(PartialEq)]
enum End {
    Gone,
    /// Another connection has the client's place, or there is none for it.
    Elsewhere,
}

/// Until the client is gone. It may write before its bind is answered: the database may be away.
async fn talk(
    chat: &Arc<Chat>,
    client: &Client,
    mut messages: mpsc::Receiver<ToClient>,
    news: &News,
    socket: &mut WebSocket,
) -> End {
    let (user_id, device_id, conn_id) = (client.place.0, client.device.clone(), client.place.1.clone());
    let mut binding = pin!(chat.gateway.bind(Connection { user_id, device_id, conn_id, ..Connection::default() }));
    let (mut is_bound, mut is_heard, mut pings) = (false, true, interval(PING));
    let (written, to_send) = mpsc::channel(SOCKET_QUEUE);
    let (done, mut outcomes) = mpsc::channel(SOCKET_QUEUE);
    tokio::spawn(send_all(chat.clone(), user_id, to_send, done));
    let (statuses, to_set) = mpsc::channel(SOCKET_QUEUE);
    tokio::spawn(set_all(chat.clone(), user_id, to_set));
    loop {
        let to_client = tokio::select! {
            bound = &mut binding, if !is_bound => {
                is_bound = bound.is_ok_and(|bound| bound.result.unwrap_or_default().code() == pb::Code::Ok);
                if !is_bound {
                    return End::Elsewhere;
                }
                chat.gateway.active(user_id, &client.device);
                continue;
            }
            message = messages.recv() => match message {
                Some(message) => written_down(&message),
                None => return End::Elsewhere,
            },
            Some(outcome) = outcomes.recv() => written_down(&outcome),
            presence = news.next() => written_down(&presence),
            _ = pings.tick() => {
                if !std::mem::take(&mut is_heard) {
                    return End::Gone;
                }
                Message::Ping(Vec::new().into())
            }
            read = socket.recv(), if written.capacity() > 0 => {
                is_heard = true;
                match read {
                    Some(Ok(Message::Text(text))) => take(chat, client, &text, &written, &statuses).await,
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_))) => {}
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return End::Gone,
                }
                continue;
            }
        };
        if socket.send(to_client).await.is_err() {
            return End::Gone;
        }
    }
}

/// What a client says.
async fn take(
    chat: &Chat,
    client: &Client,
    text: &str,
    written: &mpsc::Sender<FromClient>,
    statuses: &mpsc::Sender<pb::SetStatusReq>,
) {
    let Ok(said) = serde_json::from_str(text) else { return }; // it does not speak our language
    if let FromClient::Got { got } = said {
        let acker = lock(&chat.sockets).get_mut(&client.place).and_then(|socket| socket.unacknowledged.remove(&got));
        acker.iter().for_each(|acker| acker.taken(&client.device));
        return; // nobody need be there for that
    }
    chat.gateway.active(client.place.0, &client.device);
    match said {
        FromClient::Watch { watch } => {
            if let Err(why) = chat.gateway.watch(client.key, watch).await {
                eprintln!("contacts of user {}: {why}", client.place.0);
            }
        }
        FromClient::Status { status, text } => {
            let status = pb::Status::from_str_name(&format!("STATUS_{}", status.to_uppercase())).unwrap_or_default();
            let request = pb::SetStatusReq { user_id: client.place.0, status: status.into(), text, ..Default::default() };
            let _ = statuses.try_send(request); // full: nobody changes their mind so often
        }
        message => _ = written.try_send(message), // there was a place for it
    }
}

/// Says how a user wants to be seen, one wish after the other. Goes on when the client is gone.
async fn set_all(chat: Arc<Chat>, user: i64, mut statuses: mpsc::Receiver<pb::SetStatusReq>) {
    while let Some(request) = statuses.recv().await {
        let Ok(set) = chat.gateway.set_status(request).await else { return };
        let result = set.result.unwrap_or_default();
        if result.code() != pb::Code::Ok {
            eprintln!("the status of user {user} was not set: {}", result.msg);
        }
    }
}

impl News {
    async fn next(&self) -> ToClient {
        loop {
            if let Some((user, presence)) = lock(&self.presences).pop_first() {
                let status = presence.status().as_str_name().trim_start_matches("STATUS_").to_lowercase();
                return ToClient::Presence { user, status, text: presence.status_text };
            }
            self.arrived.notified().await;
        }
    }
}

fn written_down(what: &ToClient) -> Message {
    Message::Text(serde_json::to_string(what).unwrap_or_default().into()) // numbers and texts are always written
}

/// Hands over what a client writes, one after the other, and says what came of it. Goes on when the client is gone.
async fn send_all(chat: Arc<Chat>, from: i64, mut to_send: mpsc::Receiver<FromClient>, done: mpsc::Sender<ToClient>) {
    while let Some(written) = to_send.recv().await {
        let FromClient::Message { id, to, text } = written else { continue };
        let request = pb::DeliverReq {
            user_id: to,
            message: serde_json::to_string(&ChatMessage { from, text }).unwrap_or_default(),
            message_type: "chat".to_owned(),
            message_id: id.clone(),
            ack_timeout_ms: ACK_TIMEOUT_MS,
            store_offline: true,
            ..Default::default()
        };
        let outcome = match chat.caller.deliver(request).await {
            Ok(answer) if answer.delivered => "delivered",
            Ok(answer) if answer.stored => "stored",
            Ok(_) | Err(_) => "not sent",
        };
        let _ = done.send(ToClient::Outcome { id, outcome }).await; // a client that is gone asks again
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
