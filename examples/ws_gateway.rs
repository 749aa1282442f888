//! A gateway that people can use: WebSockets on one side, im-presence on the other, and a page to chat on.
//!
//!     cargo run --release                                                    # a node
//!     cargo run --release --example ws_gateway -- 127.0.0.1:8001 127.0.0.1:6000
//!     cargo run --release --example ws_gateway -- 127.0.0.1:8002 127.0.0.1:6000
//!
//! Then open http://127.0.0.1:8001/?user=1 and http://127.0.0.1:8002/?user=2 and write to each other. Everything after the
//! first address is a node; with several, one may be killed.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use axum::Router;
use axum::extract::Query;
use axum::extract::State;
use axum::extract::WebSocketUpgrade;
use axum::extract::ws::Message;
use axum::extract::ws::WebSocket;
use axum::response::Html;
use axum::response::Response;
use axum::routing::get;
use im_presence::client::caller::Caller;
use im_presence::client::gateway::Connection;
use im_presence::client::gateway::Event;
use im_presence::client::gateway::Gateway;
use im_presence::client::gateway::Options;
use im_presence::pb;
use serde::Deserialize;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// A call with all its retries.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// How long a device has to acknowledge.
const ACK_TIMEOUT_MS: u32 = 2_000;
/// Messages that wait for one socket; a client that reads too slowly gets the rest from its inbox.
const SOCKET_QUEUE: usize = 256;

/// Which socket a connection is: user and connection id.
type Sockets = Arc<Mutex<HashMap<(i64, String), mpsc::Sender<ToClient>>>>;

struct Chat {
    sockets: Sockets,
    gateway: Gateway,
    caller: Caller,
}

#[derive(Deserialize)]
struct Who {
    user: i64,
}

/// What a client writes.
#[derive(Deserialize)]
struct Written {
    to: i64,
    text: String,
    /// The message's own id: sent again, it is shown once.
    id: String,
}

/// What a client is told.
#[derive(Clone, Serialize)]
struct ToClient {
    from: String,
    text: String,
    id: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(addr), nodes) = (args.next(), args.collect::<Vec<_>>()) else {
        return Err("usage: ws_gateway ADDR NODE...".into());
    };
    let listener = TcpListener::bind(addr.parse::<SocketAddr>()?).await?;
    let sockets = Sockets::default();
    let options = Options { nodes: nodes.clone(), gateway_addr: addr, ..Options::default() };
    let (told, shown) = (sockets.clone(), options.gateway_addr.clone());
    let gateway = Gateway::start(options, move |event| hear(&told, &shown, event))?;
    let nodes: Vec<&str> = nodes.iter().map(String::as_str).collect();
    let chat = Arc::new(Chat { sockets, gateway, caller: Caller::new(&nodes, CALL_LIMIT)? });
    let page = get(async || Html(include_str!("chat.html")));
    let router = Router::new().route("/", page).route("/ws", get(connect)).with_state(chat);
    Ok(axum::serve(listener, router).await?)
}

/// What the nodes say.
fn hear(sockets: &Sockets, addr: &str, event: Event) {
    match event {
        Event::Delivery(delivery, ack) => {
            let message =
                ToClient { from: delivery.message_type.clone(), text: delivery.message.clone(), id: delivery.message_id.clone() };
            let mut taken = false;
            for ((_, _), socket) in lock(sockets).iter().filter(|((user, _), _)| *user == delivery.user_id) {
                taken |= socket.try_send(message.clone()).is_ok();
            }
            if taken { ack.taken("") } else { ack.not_here("") }
        }
        Event::Kick(kick) => {
            let others = |(user, _): &(i64, String)| *user != kick.user_id;
            lock(sockets).retain(|socket, _| others(socket)); // dropping its sender closes the socket
        }
        Event::Lost(connection, _) => {
            lock(sockets).remove(&(connection.user_id, connection.conn_id));
        }
        Event::Attached { epoch } => eprintln!("{addr} is attached with epoch {epoch}"),
        Event::Detached(status) => eprintln!("{addr} is not attached: {}", status.message()),
        Event::Superseded => eprintln!("another process is {addr}"),
    }
}

async fn connect(State(chat): State<Arc<Chat>>, Query(who): Query<Who>, upgrade: WebSocketUpgrade) -> Response {
    upgrade.on_upgrade(move |socket| serve(chat, who.user, socket))
}

/// One client, from its log-in to its end.
async fn serve(chat: Arc<Chat>, user: i64, mut socket: WebSocket) {
    let conn_id = uuid::Uuid::new_v4().to_string();
    let (sender, mut messages) = mpsc::channel(SOCKET_QUEUE);
    lock(&chat.sockets).insert((user, conn_id.clone()), sender);
    let connection = Connection { user_id: user, conn_id: conn_id.clone(), ..Connection::default() };
    let bound = chat.gateway.bind(connection).await;
    if bound.is_ok_and(|bound| bound.result.unwrap_or_default().code() == pb::Code::Ok) {
        loop {
            tokio::select! {
                message = messages.recv() => {
                    let Some(Ok(text)) = message.map(|message| serde_json::to_string(&message)) else { break };
                    if socket.send(Message::Text(text.into())).await.is_err() {
                        break;
                    }
                }
                read = socket.recv() => match read {
                    Some(Ok(Message::Text(text))) => if let Ok(written) = serde_json::from_str(&text) {
                        let answer = send(&chat.caller, user, written).await;
                        if socket.send(Message::Text(answer.into())).await.is_err() {
                            break;
                        }
                    },
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_))) => {}
                    Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                },
            }
        }
    }
    lock(&chat.sockets).remove(&(user, conn_id.clone()));
    let _ = chat.gateway.unbind(user, "", &conn_id).await; // stopped: it is unbound with everybody
}

/// Hands a message over, and says what came of it.
async fn send(caller: &Caller, from: i64, written: Written) -> String {
    let request = pb::DeliverReq {
        user_id: written.to,
        message: written.text,
        message_type: format!("from-{from}"),
        message_id: written.id.clone(),
        ack_timeout_ms: ACK_TIMEOUT_MS,
        store_offline: true,
        ..Default::default()
    };
    let outcome = match caller.deliver(request).await {
        Ok(answer) if answer.delivered => "delivered",
        Ok(answer) if answer.stored => "stored",
        Ok(_) | Err(_) => "not sent",
    };
    serde_json::json!({ "id": written.id, "outcome": outcome }).to_string()
}

fn lock(sockets: &Sockets) -> std::sync::MutexGuard<'_, HashMap<(i64, String), mpsc::Sender<ToClient>>> {
    sockets.lock().unwrap_or_else(PoisonError::into_inner)
}
