//! A bare watch, which does only what it is told.

use std::collections::BTreeMap;
use std::time::Duration;

use im_presence::pb;
use im_presence::pb::Status as Shown;
use im_presence::pb::watch_resp::Body;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::Streaming;

use crate::harness::allowed;
use crate::harness::node::Node;

const TOLD_WITHIN: Duration = Duration::from_secs(5);
const QUEUE: usize = 256;

/// One `Watch` call.
pub struct Watcher {
    requests: mpsc::Sender<pb::WatchReq>,
    told: Streaming<pb::WatchResp>,
    seq: u64,
    /// The newest telling of each user, in all.
    pub known: BTreeMap<i64, pb::UserPresence>,
}

impl Watcher {
    pub async fn open(node: &Node) -> Self {
        let (requests, queue) = mpsc::channel(QUEUE);
        let told = node.presence().watch(ReceiverStream::new(queue)).await.expect("a watch").into_inner();
        Self { requests, told, seq: 0, known: BTreeMap::new() }
    }

    /// Watches users of whom nothing is known, and is told of each.
    pub async fn of(node: &Node, users: impl IntoIterator<Item = i64>) -> Self {
        let mut watcher = Self::open(node).await;
        let users: Vec<_> = users.into_iter().map(|user| (user, 0)).collect();
        let (_, done) = watcher.ask(&users, &[]).await;
        assert_eq!(code(&done), pb::Code::Ok, "{done:?}");
        watcher
    }

    /// As on another node: with the newest version that is known of each user.
    pub async fn resume(self, node: &Node) -> (Self, Vec<pb::UserPresence>) {
        let mut watcher = Self { known: self.known, ..Self::open(node).await };
        let users: Vec<_> = watcher.known.values().map(|presence| (presence.user_id, presence.version)).collect();
        let (told, done) = watcher.ask(&users, &[]).await;
        assert_eq!(code(&done), pb::Code::Ok, "{done:?}");
        (watcher, told)
    }

    /// Returns the request's number.
    pub async fn send(&mut self, add: &[(i64, u64)], remove: &[i64]) -> u64 {
        self.seq += 1;
        let add = add.iter().map(|(user_id, version)| pb::KnownUser { user_id: *user_id, version: *version }).collect();
        let _ = self.requests.send(pb::WatchReq { seq: self.seq, add, remove: remove.to_vec() }).await; // `next` tells
        self.seq
    }

    /// Asks, and returns all that it is told until that is done.
    pub async fn ask(&mut self, add: &[(i64, u64)], remove: &[i64]) -> (Vec<pb::UserPresence>, pb::WatchDone) {
        let (seq, mut told) = (self.send(add, remove).await, Vec::new());
        loop {
            match self.next().await.expect("a telling") {
                Body::Presence(presence) => told.push(presence),
                Body::Done(done) => {
                    assert_eq!(done.seq, seq);
                    return (told, done);
                }
            }
        }
    }

    pub async fn next(&mut self) -> Result<Body, Status> {
        self.within(TOLD_WITHIN).await.expect("something is told")
    }

    async fn within(&mut self, time: Duration) -> Option<Result<Body, Status>> {
        let told = timeout(allowed(time), self.told.message()).await.ok()?;
        let body = match told.map(|told| told.and_then(|told| told.body)) {
            Ok(Some(body)) => Ok(body),
            Ok(None) => Err(Status::ok("the end")),
            Err(status) => Err(status),
        };
        if let Ok(Body::Presence(presence)) = &body {
            self.note(presence);
        }
        Some(body)
    }

    /// A version never goes back.
    fn note(&mut self, presence: &pb::UserPresence) {
        if let Some(before) = self.known.insert(presence.user_id, presence.clone()) {
            assert!(before.version <= presence.version, "{presence:?} after {before:?}");
        }
    }

    /// The next telling, which is of this user.
    pub async fn tells(&mut self, user: i64) -> pb::UserPresence {
        match self.next().await {
            Ok(Body::Presence(presence)) => {
                assert_eq!(presence.user_id, user, "{presence:?}");
                presence
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next telling is that a user is shown so.
    pub async fn shows(&mut self, user: i64, status: Shown) -> pb::UserPresence {
        let presence = self.tells(user).await;
        assert_eq!(presence.status(), status, "{presence:?}");
        presence
    }

    /// Nothing is told for so long.
    pub async fn is_silent(&mut self, time: Duration) {
        let told = timeout(time, self.told.message()).await;
        assert!(told.is_err(), "{told:?}");
    }

    /// Takes in what is told for so long.
    pub async fn listen(&mut self, time: Duration) -> usize {
        let until = tokio::time::Instant::now() + time;
        let mut tellings = 0;
        while let Ok(told) = tokio::time::timeout_at(until, self.told.message()).await {
            match told.expect("it goes on").and_then(|told| told.body) {
                Some(Body::Presence(presence)) => {
                    self.note(&presence);
                    tellings += 1;
                }
                Some(Body::Done(_)) => {}
                None => panic!("the end"),
            }
        }
        tellings
    }

    /// How a user was shown last.
    pub fn status(&self, user: i64) -> Option<Shown> {
        self.known.get(&user).map(pb::UserPresence::status)
    }
}

pub fn code(done: &pb::WatchDone) -> pb::Code {
    done.result.as_ref().expect("every answer has a result").code()
}

pub fn set_status(user_id: i64, status: Shown) -> pb::SetStatusReq {
    pb::SetStatusReq { user_id, status: status.into(), ..Default::default() }
}

pub fn set_idle(user_id: i64, device: &str, idle: bool) -> pb::SetStatusReq {
    pb::SetStatusReq { user_id, device_id: device.to_owned(), idle: Some(idle), ..Default::default() }
}

impl Node {
    pub async fn try_set(&self, request: pb::SetStatusReq) -> Result<pb::SetStatusResp, Status> {
        self.presence().set_status(request).await.map(tonic::Response::into_inner)
    }

    /// Sets a status, and insists that it was done.
    pub async fn set(&self, request: pb::SetStatusReq) -> pb::SetStatusResp {
        let set = self.try_set(request).await.expect("a status");
        assert_eq!(set.result.as_ref().map(pb::Result::code), Some(pb::Code::Ok), "{set:?}");
        set
    }

    pub async fn history(&self, user_id: i64) -> Vec<pb::StatusChange> {
        let request = pb::GetStatusHistoryReq { user_id, include_hidden: true, ..Default::default() };
        self.presence().get_status_history(request).await.expect("a history").into_inner().changes
    }

    pub async fn online_time(&self, request: pb::GetOnlineTimeReq) -> pb::GetOnlineTimeResp {
        self.presence().get_online_time(request).await.expect("an answer").into_inner()
    }
}
