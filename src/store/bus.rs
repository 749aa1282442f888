//! The bus: Redis Pub/Sub between nodes, and to gateways and other services. Any message may be lost, repeated or late:
//! nothing but speed may depend on it.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use redis::aio::PubSubSink;
use redis::aio::PubSubStream;
use tokio::time::timeout;
use tokio_stream::StreamExt;

use crate::config;
use crate::config::RedisMode;
use crate::domain::id::UserId;
use crate::domain::status::Status;
use crate::store::batch::Batch;
use crate::store::codec::Hint;
use crate::store::codec::LivesHint;
use crate::store::codec::status_word;
use crate::store::keys::Channels;
use crate::store::link::Link;
use crate::store::link::Server;
use crate::store::link_error::LinkError;
use crate::store::servers::Servers;

/// A subscription on which nothing was heard for this long is made again: this node's own beats come each second.
const SILENCE: Duration = Duration::from_secs(3);

pub struct Bus {
    pub link: Link,
    /// Where channels of one user or gateway have slots.
    shards: Option<Servers>,
    /// Nobody counts who has received a message of all servers.
    in_cluster: bool,
    pub channels: Channels,
    up: AtomicBool,
}

/// What nobody waits for has to be published within this time: a queue that stands still must not hold up the shared cache.
const ASIDE_LIMIT: Duration = Duration::from_millis(200);

/// What a node listens to, confirmed by the server.
pub struct Subscription {
    messages: PubSubStream,
    /// The channel on which nodes tell of lives.
    lives: String,
    _sink: PubSubSink,
}

/// What a node hears from another, or from itself.
pub enum Heard {
    Users(Hint),
    Lives(LivesHint),
}

impl Heard {
    /// The store whose node has said it.
    pub fn store_id(&self) -> &str {
        match self {
            Self::Users(hint) => &hint.store_id,
            Self::Lives(hint) => &hint.store_id,
        }
    }
}

impl Bus {
    pub fn new(queue: &config::RedisQueue) -> Result<Self, LinkError> {
        let shards = queue.sharded.then(|| Servers::new(&queue.server)).transpose()?;
        let (link, in_cluster) = (Link::new(&queue.server)?, queue.server.mode == RedisMode::Cluster);
        Ok(Self { link, shards, in_cluster, channels: Channels::new(&queue.channel_prefix), up: AtomicBool::new(true) })
    }

    /// How the server is that messages are published at. One that would not pass them on is left at once.
    ///
    /// # Errors
    /// [`LinkError::Replica`] or [`LinkError::ClusterDown`], or it does not say how it is.
    pub async fn look(&self, limit: Duration) -> Result<Server, LinkError> {
        let learn_slots = async {
            if let Some(shards) = &self.shards {
                let _ = shards.look(limit).await; // what is sent where nobody answers fails by itself
            }
        };
        let ((), looked) = tokio::join!(learn_slots, self.link.look(limit));
        match looked {
            Ok((_, server)) => Ok(server),
            Err(error @ LinkError::Redis(_)) => self.link.must_fit(limit).await.and(Err(error)),
            Err(error) => Err(error),
        }
    }

    /// Whether the last hint could be sent. While it could not, only beats are tried.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    pub async fn hint(&self, hint: &Hint) -> Result<(), LinkError> {
        let mut publish = redis::pipe();
        publish.cmd("PUBLISH").arg(self.channels.presence_hint()).arg(hint.encode_to_vec());
        let sent = self.link.run::<(i64,)>(&publish, ASIDE_LIMIT).await;
        self.up.store(sent.is_ok(), Ordering::Relaxed);
        sent.map(|_| ())
    }

    /// Tells anyone where users are now; None is offline.
    pub async fn routes_changed<'a>(&self, changes: impl Iterator<Item = (UserId, Option<&'a str>)>) -> Result<(), LinkError> {
        if !self.is_up() {
            return Err(LinkError::Down);
        }
        let channel = self.channels.presence_route();
        let mut publish = redis::pipe();
        for (user, gateway) in changes {
            publish.cmd("PUBLISH").arg(&channel).arg(format!("{user}:{}", gateway.unwrap_or_default()));
        }
        self.link.run::<Vec<i64>>(&publish, ASIDE_LIMIT).await.map(|_| ())
    }

    /// Tells anyone what users are shown as now.
    pub async fn statuses_changed(&self, changes: impl Iterator<Item = (UserId, Status)>) -> Result<(), LinkError> {
        if !self.is_up() {
            return Err(LinkError::Down);
        }
        let channel = self.channels.presence_status();
        let mut publish = redis::pipe();
        for (user, status) in changes {
            publish.cmd("PUBLISH").arg(&channel).arg(format!("{user}:{}", status_word(status)));
        }
        self.link.run::<Vec<i64>>(&publish, ASIDE_LIMIT).await.map(|_| ())
    }

    /// Tells the other nodes of lives that are over.
    pub async fn lives_ended(&self, hint: &LivesHint) -> Result<(), LinkError> {
        let mut publish = redis::pipe();
        publish.cmd("PUBLISH").arg(self.channels.presence_gateway()).arg(hint.encode_to_vec());
        self.link.run::<(i64,)>(&publish, ASIDE_LIMIT).await.map(|_| ())
    }

    /// Whether what is sent to one channel can fail alone, with the server that has its slot.
    pub fn is_sharded(&self) -> bool {
        self.shards.is_some()
    }

    /// Publishes each message on the channel of one user or one gateway and says how many received it; None: nobody knows.
    pub async fn send(&self, messages: &[(String, Bytes)], limit: Duration) -> Result<Vec<Option<u64>>, LinkError> {
        let Some(shards) = &self.shards else {
            let received = self.publish(messages, limit).await?.into_iter();
            return Ok(received.map(|received| (!self.in_cluster).then_some(received)).collect());
        };
        let mut batch = Batch::new(true);
        for (channel, body) in messages {
            let mut publish = redis::cmd("SPUBLISH");
            publish.arg(channel).arg(&body[..]);
            batch.add(channel, publish);
        }
        let (_, received) = shards.run::<u64>(batch, limit).await?;
        Ok(received.into_iter().map(Some).collect())
    }

    /// Publishes each message on its channel and says how many received it, as far as its server knows.
    pub async fn publish(&self, messages: &[(String, Bytes)], limit: Duration) -> Result<Vec<u64>, LinkError> {
        let mut publish = redis::pipe();
        for (channel, body) in messages {
            publish.cmd("PUBLISH").arg(channel).arg(&body[..]);
        }
        self.link.run(&publish, limit).await
    }

    /// Subscribes to hints; when this returns, the server has confirmed it.
    pub async fn listen(&self) -> Result<Subscription, LinkError> {
        let (mut sink, messages) = self.link.subscriber().await?.split();
        let limit = self.link.timeout();
        let channels = [self.channels.presence_hint(), self.channels.presence_gateway()];
        timeout(limit, sink.subscribe(&channels)).await.map_err(|_| LinkError::NoAnswer(limit))??;
        let [_, lives] = channels;
        Ok(Subscription { messages, lives, _sink: sink })
    }
}

impl Subscription {
    /// The next message. None: the subscription has ended, or has been silent for too long.
    pub async fn next(&mut self) -> Option<Heard> {
        loop {
            let message = timeout(SILENCE, self.messages.next()).await.ok()??;
            let bytes = message.get_payload_bytes();
            let heard = if message.get_channel_name() == self.lives {
                LivesHint::decode(bytes).map(Heard::Lives)
            } else {
                Hint::decode(bytes).map(Heard::Users)
            };
            if let Ok(heard) = heard {
                return Some(heard);
            }
        }
    }
}
