//! For gateways: one stream to any of the nodes, which is made again when it breaks.
//!
//! The gateway says who is connected to it ([`Gateway::bind`], [`Gateway::unbind`]) and is told what to hand over
//! ([`Event`]). It keeps its sockets whatever happens here: a node that stops, a broken network, a database that stands still.
//! With its epoch it goes on with its life on another node. If that life is over it begins a new one and binds everybody again,
//! with the age of each connection, so that nobody who has moved on meanwhile is taken back.
//!
//! Its clients see how others are shown ([`Gateway::watch`]), and say how they want to be seen ([`Gateway::set_status`],
//! [`Gateway::active`]).

use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::Code;
use tokio::sync::mpsc;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;
use tonic::Status;

use crate::InvalidAddress;
use crate::contacts;
use crate::dialogue::Dialogue;
use crate::dialogue::Usage;
pub use crate::event::Acker;
use crate::event::Call;
pub use crate::event::ClientKey;
pub use crate::event::Connection;
pub use crate::event::Event;
pub use crate::event::Options;
use crate::event::QUEUE;
use crate::event::not_set;
use crate::event::refusal;
use crate::event::request;
use crate::event::result;
use crate::fields;
use crate::life::Life;
pub use crate::watched::MAX_USERS;
pub use crate::watched::MAX_USERS_PER_CLIENT;
pub use crate::watched::WatchError;

/// The gateway's own end. Dropping it ends the stream, and the lease soon after; see [`Gateway::stop`].
pub struct Gateway {
    addr: String,
    calls: mpsc::Sender<Call>,
    usage: Usage,
    task: JoinHandle<Life>,
    /// Ends the task, whoever else still holds an end of its queue.
    running: DropGuard,
}

/// The node's side is gone for good: the gateway was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the gateway has stopped")]
pub struct Stopped;

impl Gateway {
    /// Attaches in the background, and keeps attached. `on_event` must not block.
    ///
    /// # Errors
    /// The gateway's address or that of a node makes no sense, or there is no node.
    pub fn start(options: Options, on_event: impl Fn(Event) + Send + Sync + 'static) -> Result<Self, InvalidAddress> {
        let addr = options.gateway_addr.clone();
        fields::check_addr("gateway_addr", &addr).map_err(|_| InvalidAddress { of: "a gateway", address: addr.clone() })?;
        let (calls, mut queue) = mpsc::channel(QUEUE);
        let usage = Usage::new(options.idle_after);
        let dialogue = Dialogue::new(calls.downgrade(), usage.clone(), Box::new(on_event));
        let mut life = Life::new(options, dialogue, usage.clone())?;
        let running = CancellationToken::new();
        let ended = running.clone();
        let task = tokio::spawn(async move {
            ended.run_until_cancelled(life.keep_attached(&mut queue)).await;
            life
        });
        Ok(Self { addr, calls, usage, task, running: running.drop_guard() })
    }

    /// Says that a client is connected. Waits until a node has said what came of it, however long that takes; if the client
    /// goes away meanwhile, call [`Gateway::unbind`] without waiting for this. What no node would take is INVALID at once.
    pub async fn bind(&self, connection: Connection) -> Result<pb::BindRouteResp, Stopped> {
        if let Err(invalid) = fields::check_bind(&request(&connection, Instant::now())) {
            return Ok(refusal(Code::Invalid, invalid));
        }
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Bind(connection, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Says that a client's connection has ended.
    pub async fn unbind(&self, user_id: i64, device_id: &str, conn_id: &str) -> Result<pb::UnbindRouteResp, Stopped> {
        let (device_id, conn_id, gateway_addr) = (device_id.to_owned(), conn_id.to_owned(), self.addr.clone());
        let request = pb::UnbindRouteReq { user_id, device_id, conn_id, gateway_addr, ..Default::default() };
        if let Err(invalid) = fields::check_unbind(&request) {
            return Ok(pb::UnbindRouteResp { result: result(Code::Invalid, invalid), ..Default::default() });
        }
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Unbind(request, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Says how a user wants to be seen, or whether a device is idle. Waits as [`Gateway::bind`] does; what is said of a user
    /// while something else has no answer yet waits for that. What no node would take is INVALID at once.
    pub async fn set_status(&self, request: pb::SetStatusReq) -> Result<pb::SetStatusResp, Stopped> {
        if let Err(invalid) = fields::check_status(&request) {
            return Ok(not_set(Code::Invalid, invalid));
        }
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::SetStatus(request, answer)).await.map_err(|_| Stopped)?;
        answered.await.map_err(|_| Stopped)
    }

    /// Says that somebody uses a device. Call it for whatever the client does: it is cheap. The device is idle when this was not
    /// called for [`Options::idle_after`], and active again with the next call; nodes are told of one change in 10 s.
    pub fn active(&self, user_id: i64, device_id: &str) {
        self.usage.used(user_id, device_id);
    }

    /// Replaces the list of users that a client wants to see. It is told of each by [`Event::Presence`]: what is known here at
    /// once, the rest when a node has said it, and then whenever that changes.
    ///
    /// # Errors
    /// There are too many users, or one is none. The client's list is what it was.
    pub async fn watch(&self, client: ClientKey, users: impl IntoIterator<Item = i64>) -> Result<(), WatchError> {
        let users: Vec<i64> = users.into_iter().collect();
        contacts::check(&users)?;
        let (answer, answered) = oneshot::channel();
        self.calls.send(Call::Watch(client, users, answer)).await.map_err(|_| WatchError::Stopped)?;
        answered.await.unwrap_or(Err(WatchError::Stopped))
    }

    /// A client wants to see nobody any more, or has gone. It may still be told what was under way.
    pub async fn unwatch(&self, client: ClientKey) -> Result<(), Stopped> {
        self.calls.send(Call::Unwatch(client)).await.map_err(|_| Stopped)
    }

    /// Deregisters: all users of this gateway are offline at once.
    ///
    /// # Errors
    /// No node could be told; they are offline when the lease ends.
    pub async fn stop(self) -> Result<(), Status> {
        drop(self.running);
        let Ok(mut life) = self.task.await else { return Ok(()) };
        life.deregister().await
    }
}
