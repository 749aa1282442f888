//! Watchers: each watches all users through some node, and goes on through the next when a stream breaks.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use im_presence::pb;
use im_presence::pb::presence_service_client::PresenceServiceClient;
use im_presence::pb::watch_resp::Body;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::history::Recorder;
use crate::history::Told;

const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(200);

/// Watches `users` until `stop`.
pub async fn watch(watcher: usize, users: Vec<i64>, nodes: Vec<Channel>, recorder: Arc<Recorder>, stop: CancellationToken) {
    let (mut known, mut node) = (users.iter().map(|user| (*user, 0)).collect::<HashMap<i64, u64>>(), watcher);
    loop {
        let stream = one_stream(watcher, &mut known, nodes[node % nodes.len()].clone(), &recorder);
        tokio::select! {
            () = stream => {}
            () = stop.cancelled() => return,
        }
        node += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// Returns when the stream has ended. The channel notices by itself when nobody is there any more.
async fn one_stream(watcher: usize, known: &mut HashMap<i64, u64>, node: Channel, recorder: &Recorder) {
    let (requests, queue) = mpsc::channel(1);
    let add = known.iter().map(|(user_id, version)| pb::KnownUser { user_id: *user_id, version: *version }).collect();
    let _ = requests.try_send(pb::WatchReq { seq: 1, add, remove: Vec::new() }); // the queue is empty
    let opened = timeout(PATIENCE, PresenceServiceClient::new(node).watch(ReceiverStream::new(queue))).await;
    let Ok(Ok(opened)) = opened else { return };
    let mut told = opened.into_inner();
    while let Ok(Some(pb::WatchResp { body: Some(body) })) = told.message().await {
        if let Body::Presence(presence) = body {
            known.insert(presence.user_id, presence.version);
            recorder.write().told.push(Told {
                watcher,
                user: presence.user_id,
                version: presence.version,
                status: presence.status,
                is_online: presence.is_online,
                at: recorder.now(),
            });
        }
    }
}
