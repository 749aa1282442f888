//! Handing messages to gateways: down the streams of those that attach, on `user:<id>` for the others. Receivers are counted,
//! and devices may acknowledge.

use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use prost::Message as _;

use crate::domain::event::Unbind;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::engine::messages::acks::Acks;
use crate::engine::messages::acks::Answered;
use crate::engine::messages::message::Message;
use crate::engine::messages::message::Outcome;
use crate::engine::messages::outlets::Addressed;
use crate::engine::messages::outlets::Outlets;
use crate::engine::messages::parcel::Parcel;
use crate::engine::messages::parcel::Targets;
use crate::engine::messages::streams::Handed;
use crate::engine::messages::streams::Order;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::Metrics;

/// What is published with one round trip.
const PUBLISHED_TOGETHER_BYTES: usize = 4 * 1024 * 1024;
/// Routes that were refused once: remembered for a while after.
const REFUSED: u64 = 100_000;
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// How a message stands on `user:<id>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes as given.
    Raw,
    /// A protobuf `Delivery`.
    Envelope,
}

/// Messages that gateways have, as far as they took them, and why a channel could not be reached.
pub(super) struct HandedOut<'a> {
    parcels: Vec<(Parcel<'a>, Targets, Option<Error>)>,
    at: Instant,
}

pub(super) struct Dispatcher {
    outlets: Arc<Outlets>,
    acks: Arc<Acks>,
    lanes: Arc<Lanes>,
    metrics: Arc<Metrics>,
    pub format: Format,
    /// Routes of which their gateway has said once that the device is not there.
    refused: moka::sync::Cache<(UserId, Version), ()>,
}

impl Dispatcher {
    pub fn new(outlets: Arc<Outlets>, acks: Arc<Acks>, lanes: Arc<Lanes>, metrics: Arc<Metrics>, format: Format) -> Self {
        let refused = moka::sync::Cache::builder().max_capacity(REFUSED).time_to_live(REFUSED_FOR).build();
        Self { outlets, acks, lanes, metrics, format, refused }
    }

    /// Hands messages to every gateway concerned, in their order.
    pub async fn hand_out<'a>(&'a self, mut live: Vec<(Parcel<'a>, Targets)>, deadline: Instant) -> HandedOut<'a> {
        let began = Instant::now();
        for (parcel, targets) in live.iter_mut().filter(|(parcel, _)| parcel.message.ack_timeout.is_some()) {
            let devices = targets.routes.iter().map(|(device, (_, gateway))| (device.clone(), gateway.clone())).collect();
            match &parcel.expected {
                Some(expected) => expected.again(devices),
                None => parcel.expected = Some(self.acks.wait_for(&parcel.report.delivery_id, parcel.user, devices)),
            }
        }
        let (streams, channels) = tokio::join!(self.down_streams(&live, deadline), self.on_channels(&live, deadline));
        self.metrics.delivery_stage("handed", began.elapsed());
        let received = streams.into_iter().zip(channels);
        let parcels = live.into_iter().zip(received).map(|((mut parcel, targets), (taken, received))| {
            let subscribed = received.as_ref().copied().unwrap_or(Some(0));
            parcel.report.receivers = taken + subscribed.unwrap_or(1);
            parcel.report.uncounted = subscribed.is_none();
            (parcel, targets, received.err())
        });
        HandedOut { parcels: parcels.collect(), at: Instant::now() }
    }

    /// Waits for devices, where that is asked for. Says of each message also whether none of its gateways has been heard
    /// lately.
    pub async fn answers<'a>(&self, out: HandedOut<'a>, deadline: Instant) -> Vec<(Parcel<'a>, bool, Result<Outcome, Error>)> {
        let mut tried = Vec::with_capacity(out.parcels.len());
        for (mut parcel, targets, error) in out.parcels {
            let result = match (error, parcel.report.receivers) {
                (Some(_), 0) if targets.none_attaches && self.outlets.bus.is_none() => Ok(Outcome::NoWay),
                (Some(error), 0) => Err(error),
                (None, 0) => Ok(Outcome::Undelivered),
                _ => Ok(self.acknowledged(&mut parcel, &targets, out.at, deadline).await),
            };
            tried.push((parcel, targets.all_suspect, result));
        }
        tried
    }

    /// How many streams of each parcel's gateways took it.
    async fn down_streams(&self, live: &[(Parcel<'_>, Targets)], deadline: Instant) -> Vec<u64> {
        let (mut owners, mut orders) = (Vec::new(), Vec::new());
        for (i, (parcel, targets)) in live.iter().enumerate().filter(|(_, (_, targets))| !targets.streams.is_empty()) {
            let envelope = Arc::new(parcel.envelope());
            for (epoch, node) in &targets.streams {
                owners.push(i);
                orders.push(Addressed { epoch: *epoch, node: node.clone(), order: Order::Delivery(envelope.clone()) });
            }
        }
        let mut taken = vec![0; live.len()];
        for (owner, handed) in owners.into_iter().zip(self.outlets.hand(orders, deadline).await) {
            taken[owner] += u64::from(handed == Handed::Taken);
        }
        taken
    }

    /// How many subscribers each parcel had, where it has gateways without a stream. None: somebody, or nobody.
    async fn on_channels(&self, live: &[(Parcel<'_>, Targets)], deadline: Instant) -> Vec<Result<Option<u64>, Error>> {
        let mut received: Vec<Result<Option<u64>, Error>> = live.iter().map(|_| Ok(Some(0))).collect();
        // Raw bytes cannot say which device they are for.
        let says_it_all = |message: &Message| message.device_ids.is_empty() || self.format == Format::Envelope;
        let places: Vec<usize> = (0..live.len()).filter(|i| live[*i].1.channel && says_it_all(&live[*i].0.message)).collect();
        let Some(bus) = &self.outlets.bus else {
            let none = || Error::unavailable("its gateway has no stream, and no [redis_queue] is configured");
            places.into_iter().for_each(|i| received[i] = Err(none()));
            return received;
        };
        if places.is_empty() {
            return received;
        }
        // All of them at once could be as large as the message times the users.
        let together = live.first().map_or(1, |(parcel, _)| parcel.message.as_many_as(PUBLISHED_TOGETHER_BYTES));
        for places in places.chunks(together) {
            let bodies = places.iter().map(|i| (bus.channels.user(live[*i].0.user), self.body(&live[*i].0)));
            let limit = deadline.saturating_duration_since(Instant::now()).min(bus.link.timeout());
            let published = bus.send(&bodies.collect::<Vec<_>>(), limit).await;
            for (n, i) in places.iter().enumerate() {
                let unreachable = |_| Error::unavailable("the queue (redis_queue) cannot be reached");
                received[*i] = published.as_ref().map(|published| published[n]).map_err(unreachable);
            }
        }
        received
    }

    /// Waits for devices to acknowledge, if that is asked for.
    async fn acknowledged(&self, parcel: &mut Parcel<'_>, targets: &Targets, handed: Instant, deadline: Instant) -> Outcome {
        let (Some(patience), Some(expected)) = (parcel.message.ack_timeout, &parcel.expected) else { return Outcome::Delivered };
        let until = (handed + patience).min(deadline);
        // A stored message is done when one device has it.
        let answers = if parcel.inbox_seq > 0 { expected.first(until).await } else { expected.answers(until).await };
        let Answered { acked, not_here } = answers;
        self.metrics.delivery_stage("acknowledged", handed.elapsed());
        for (version, _) in not_here.iter().filter_map(|device| targets.routes.get(device)) {
            self.note_refused(parcel.user, *version).await;
        }
        parcel.report.acked.extend(acked);
        if parcel.report.acked.is_empty() { Outcome::Undelivered } else { Outcome::Delivered }
    }

    /// A gateway says that a device is not there. The second time its route is unbound: exactly this one.
    async fn note_refused(&self, user: UserId, bound_version: Version) {
        if self.refused.get(&(user, bound_version)).is_none() {
            return self.refused.insert((user, bound_version), ());
        }
        self.refused.invalidate(&(user, bound_version));
        let unbind = Change::Unbind(Unbind::Exact { bound_version, conn: None, epoch: None, by: None });
        let _ = self.lanes.submit(user, unbind).await; // if not, it will be refused again
    }

    fn body(&self, parcel: &Parcel<'_>) -> Bytes {
        let message = &parcel.message;
        match self.format {
            Format::Raw if message.binary.is_empty() => message.text.clone(),
            Format::Raw => message.binary.clone(),
            Format::Envelope => parcel.envelope().encode_to_vec().into(),
        }
    }
}
