//! For services: what a set of users is shown as, now and whenever that changes, on whichever node answers.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;
use im_presence_proto::presence_service_client::PresenceServiceClient;
use im_presence_proto::watch_resp::Body;
use tokio::sync::Notify;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::sync::DropGuard;
use tonic::Code;
use tonic::Status;
use tonic::Streaming;

use crate::pauses::Pauses;
use crate::security::Link;
use crate::tour::Tour;
pub use crate::watched::MAX_USERS;
pub use crate::watched::WatchError;
use crate::watched::Watched;
use crate::watched::check_users;

/// For connecting and for the node's consent.
const ATTACH_LIMIT: Duration = Duration::from_secs(3);
/// Tellings that wait for [`Watch::next`]. While they do the node keeps the rest, and of each user only the newest.
const QUEUE: usize = 1_024;
/// Messages that wait for the transport.
const OUTGOING: usize = 4;

/// A set of users, and what is told of them. It is there until it is dropped, whatever becomes of nodes: it goes on, on another
/// one, with what it knows.
pub struct Watch {
    set: Arc<Set>,
    told: mpsc::Receiver<Result<pb::UserPresence, Trouble>>,
    /// Ends the task.
    _running: DropGuard,
}

/// What a watch tells instead of a user.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Trouble {
    /// Nodes watch no more users: these are watched no more until they are added again. The others are.
    #[error("{} users are not watched: {why}", users.len())]
    NotWatched { users: Vec<i64>, why: String },
    /// A node refuses to be asked. It is tried again, but somebody has to do something: mend the credential, or look for a
    /// node that is not too old.
    #[error("{}", .0.message())]
    Refused(Status),
}

#[derive(Default)]
struct Set {
    watched: Mutex<Watched>,
    changed: Notify,
}

struct Task {
    nodes: Vec<Link>,
    tour: Tour,
    set: Arc<Set>,
    seq: u64,
    told: mpsc::Sender<Result<pb::UserPresence, Trouble>>,
}

impl Watch {
    /// Goes through the nodes in this order.
    pub(crate) fn start(nodes: Vec<Link>, tour: Tour, users: &[i64]) -> Result<Self, WatchError> {
        let (set, (tell, told)) = (Arc::<Set>::default(), mpsc::channel(QUEUE));
        set.add(users)?;
        let (running, mut task) = (CancellationToken::new(), Task { nodes, tour, set: set.clone(), seq: 0, told: tell });
        let ended = running.clone();
        tokio::spawn(async move { ended.run_until_cancelled(task.keep_watching()).await });
        Ok(Self { set, told, _running: running.drop_guard() })
    }

    /// Watches these, too.
    ///
    /// # Errors
    /// There are too many, or one is no user. Then none of them is added.
    pub fn add(&self, users: &[i64]) -> Result<(), WatchError> {
        self.set.add(users)
    }

    /// Watches these no more.
    pub fn remove(&self, users: &[i64]) {
        let mut watched = self.set.lock();
        users.iter().for_each(|user_id| watched.remove(*user_id));
        self.set.changed.notify_one();
    }

    /// What a user is shown as: everybody who is added is told once, and then whenever that changes. Somebody who reads slowly
    /// misses states that have passed, and never the last one. A call may be given up and made again.
    ///
    /// # Errors
    /// See [`Trouble`]; the watch goes on.
    pub async fn next(&mut self) -> Result<pb::UserPresence, Trouble> {
        loop {
            match self.told.recv().await {
                Some(Ok(told)) if !self.set.lock().contains(told.user_id) => {} // removed meanwhile
                Some(told) => return told,
                None => return Err(Trouble::Refused(Status::cancelled("the runtime ends"))),
            }
        }
    }
}

impl Set {
    fn add(&self, users: &[i64]) -> Result<(), WatchError> {
        check_users(users)?;
        let mut watched = self.lock();
        let mut new: Vec<i64> = users.iter().copied().filter(|user_id| !watched.contains(*user_id)).collect();
        new.sort_unstable();
        new.dedup();
        if watched.len() + new.len() > MAX_USERS {
            return Err(WatchError::TooMany);
        }
        new.into_iter().for_each(|user_id| watched.add(user_id));
        self.changed.notify_one();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Task {
    /// Goes on until it is dropped.
    async fn keep_watching(&mut self) {
        let mut pauses = Pauses::new();
        loop {
            let (began, link) = (Instant::now(), self.nodes[self.tour.now()].clone());
            let (frames, queue) = mpsc::channel(OUTGOING);
            self.set.lock().resume();
            if let Some(message) = self.message() {
                let _ = frames.try_send(message); // there is room for it
            }
            let mut client = PresenceServiceClient::new(link.clone());
            let status = match timeout(ATTACH_LIMIT, client.watch(ReceiverStream::new(queue))).await {
                Ok(Ok(answer)) => {
                    pauses.reset();
                    self.tour.settle();
                    self.serve(frames, answer.into_inner()).await
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded("no answer came in time"),
            };
            let is_refused = !matches!(status.code(), Code::Unauthenticated) || !link.renew();
            if is_refused && needs_somebody(&status) {
                let _ = self.told.send(Err(Trouble::Refused(status))).await; // nobody listens: this ends
            }
            self.tour.go_on();
            pauses.after(began).await;
        }
    }

    /// Until the stream ends.
    async fn serve(&mut self, frames: mpsc::Sender<pb::WatchReq>, mut answers: Streaming<pb::WatchResp>) -> Status {
        let set = self.set.clone();
        loop {
            let has_message = set.lock().has_message();
            tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => self.take(answer).await,
                    Ok(None) => return Status::unavailable("the node has ended the stream"),
                    Err(status) => return status,
                },
                place = frames.reserve(), if has_message => match place {
                    Ok(place) => {
                        if let Some(message) = self.message() {
                            place.send(message);
                        }
                    }
                    Err(_) => return Status::unavailable("the stream has ended"),
                },
                () = set.changed.notified() => {}
            }
        }
    }

    fn message(&mut self) -> Option<pb::WatchReq> {
        self.seq += 1;
        self.set.lock().message(self.seq)
    }

    async fn take(&self, answer: pb::WatchResp) {
        let told = match answer.body {
            Some(Body::Presence(told)) if self.set.lock().heard(&told) => Ok(told),
            Some(Body::Done(done)) => {
                let users = self.set.lock().done(&done);
                if users.is_empty() {
                    return;
                }
                Err(Trouble::NotWatched { users, why: done.result.unwrap_or_default().msg })
            }
            Some(Body::Presence(_)) | None => return,
        };
        let _ = self.told.send(told).await; // nobody listens: this ends
    }
}

/// Another node, or the same one a little later, will say the same.
fn needs_somebody(status: &Status) -> bool {
    let is_said_by_a_node = std::error::Error::source(status).is_none();
    let codes = [Code::Unauthenticated, Code::PermissionDenied, Code::InvalidArgument, Code::Unimplemented];
    is_said_by_a_node && codes.contains(&status.code())
}
