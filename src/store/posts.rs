//! Messages to channels by many callers. What comes while a round trip is under way goes with the next one: commands of one
//! pipeline cost next to nothing, and a caller of its own each wakes the connection and is woken by it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::answers;
use crate::answers::Answer;
use crate::store::bus::Bus;
use crate::store::link_error::LinkError;

/// Calls that wait, 16 MiB at most; what does not fit is not published.
const QUEUE: usize = 4_096;
/// Calls whose messages go together, 1 MiB at most.
const TOGETHER: usize = 256;
/// A call with more goes by itself.
const SMALL_BYTES: usize = 4 * 1024;
/// Round trips under way.
const IN_FLIGHT: usize = 16;
/// A round trip waits for the one before it, but no longer than this: the server may take its time.
const TURN_LIMIT: Duration = Duration::from_millis(1);

/// How many received each message; None: nobody knows.
pub type Received = Vec<Option<u64>>;

/// Messages of one caller.
struct Post {
    messages: Vec<(String, Bytes)>,
    answer: Answer<Received>,
}

pub struct Posts {
    bus: Arc<Bus>,
    posts: mpsc::Sender<Post>,
}

impl Posts {
    /// They are published by one of `tasks` until `stop`.
    pub fn start(bus: Arc<Bus>, tasks: &mut JoinSet<()>, stop: &CancellationToken) -> Self {
        let (posts, posted) = mpsc::channel(QUEUE);
        tasks.spawn(keep_publishing(bus.clone(), posted, stop.clone()));
        Self { bus, posts }
    }

    /// As [`Bus::send`].
    ///
    /// # Errors
    /// They were not published, or nobody knows.
    pub async fn send(&self, messages: Vec<(String, Bytes)>, limit: Duration) -> Result<Received, LinkError> {
        let bytes = messages.iter().map(|(channel, body)| channel.len() + body.len()).sum::<usize>();
        if bytes > SMALL_BYTES || self.bus.is_sharded() {
            return self.bus.send(&messages, limit).await;
        }
        let (answer, answered) = answers::channel();
        self.posts.try_send(Post { messages, answer }).map_err(|_| LinkError::Down)?;
        match timeout(limit, answered).await {
            Ok(received) => received.map_err(|_| LinkError::Down),
            Err(_) => Err(LinkError::NoAnswer(limit)),
        }
    }
}

async fn keep_publishing(bus: Arc<Bus>, mut posted: mpsc::Receiver<Post>, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let publishing = async {
        let (mut trips, mut waiting) = (JoinSet::new(), Vec::new());
        while posted.recv_many(&mut waiting, TOGETHER).await > 0 {
            while trips.len() >= IN_FLIGHT {
                trips.join_next().await;
            }
            trips.spawn(publish(bus.clone(), waiting.drain(..).filter(|post| !post.answer.is_closed()).collect()));
            let _ = timeout(TURN_LIMIT, trips.join_next()).await;
            while trips.try_join_next().is_some() {}
        }
    };
    stop.run_until_cancelled(publishing).await; // at which nobody is left who waits
}

/// With one round trip. If it fails, so have all of them: the server has no say about one channel of a user that it has not about
/// each.
async fn publish(bus: Arc<Bus>, posts: Vec<Post>) {
    let (mut messages, mut callers) = (Vec::new(), Vec::with_capacity(posts.len()));
    for Post { messages: more, answer } in posts {
        callers.push((more.len(), answer));
        messages.extend(more);
    }
    let Ok(received) = bus.send(&messages, bus.link.timeout()).await else { return };
    let mut received = received.into_iter();
    answers::send_all(callers.into_iter().map(|(count, answer)| (answer, received.by_ref().take(count).collect())));
}
