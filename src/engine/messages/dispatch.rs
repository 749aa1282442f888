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
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Span;

/// What is published with one round trip. The ten parts of the largest call have one each: 4 MiB in all.
const PUBLISHED_TOGETHER_BYTES: usize = 400 * 1024;
/// A message to more users has no span for each: it would push all others out of the queue.
const TRACED_ONE_BY_ONE: usize = 16;
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
            let devices = targets.routes.iter().map(|target| (target.device.clone(), target.gateway.clone())).collect();
            match &parcel.expected {
                Some(expected) => expected.again(devices),
                None => {
                    let (id, steps) = (&parcel.report.delivery_id, parcel.message.steps.clone());
                    parcel.expected = Some(self.acks.wait_for(id, parcel.user, devices, steps));
                }
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
        let (mut owners, mut orders) = (Vec::with_capacity(live.len()), Vec::with_capacity(live.len()));
        let began = Instant::now();
        for (i, (parcel, targets)) in live.iter().enumerate().filter(|(_, (_, targets))| !targets.streams.is_empty()) {
            let envelope = Arc::new(parcel.envelope(None));
            for (epoch, node) in &targets.streams {
                let (name, kind) = match **node == *self.outlets.node_id {
                    true => ("hand over", Kind::Internal),
                    false => ("forward", Kind::Client),
                };
                let span = if live.len() <= TRACED_ONE_BY_ONE { parcel.message.begin(name, kind) } else { None };
                let envelope = if span.is_none() { envelope.clone() } else { parcel.envelope(span.as_ref()).into() };
                owners.push((i, *epoch, span));
                orders.push(Addressed { epoch: *epoch, node: node.clone(), order: Order::Delivery(envelope) });
            }
        }
        let mut taken = vec![0; live.len()];
        for ((owner, epoch, span), (handed, at)) in owners.into_iter().zip(self.outlets.hand(orders, deadline).await) {
            taken[owner] += u64::from(handed == Handed::Taken);
            let (parcel, targets) = &live[owner];
            let node = || targets.node(epoch).unwrap_or_default().to_owned();
            let gateway = || targets.gateway(epoch).map(ToString::to_string).unwrap_or_default();
            parcel.message.note(what(handed), began, |step| {
                step.took = at.saturating_duration_since(began);
                (step.node, step.gateway) = (node(), gateway());
            });
            if let Some(mut span) = span {
                span.note("im_presence.node", &*node());
                span.note("im_presence.gateway", &*gateway());
                if handed != Handed::Taken {
                    span.fail(what(handed));
                }
                span.end_at(at);
            }
        }
        taken
    }

    /// How many subscribers each parcel had, where it has gateways without a stream. None: somebody, or nobody.
    async fn on_channels(&self, live: &[(Parcel<'_>, Targets)], deadline: Instant) -> Vec<Result<Option<u64>, Error>> {
        let mut received: Vec<Result<Option<u64>, Error>> = live.iter().map(|_| Ok(Some(0))).collect();
        // Raw bytes cannot say which device they are for.
        let says_it_all = |message: &Message| message.device_ids.is_empty() || self.format == Format::Envelope;
        let places: Vec<usize> = (0..live.len()).filter(|i| live[*i].1.channel && says_it_all(&live[*i].0.message)).collect();
        if places.is_empty() {
            return received;
        }
        let began = Instant::now();
        let (Some(bus), Some(posts)) = (&self.outlets.bus, &self.outlets.posts) else {
            let none = || Error::unavailable("its gateway has no stream, and no [redis_queue] is configured");
            places.iter().for_each(|i| received[*i] = Err(none()));
            tell_published(live, &places, &received, began);
            return received;
        };
        let mut span = live.first().and_then(|(parcel, _)| parcel.message.begin("publish", Kind::Producer));
        // All of them at once could be as large as the message times the users.
        let together = live.first().map_or(1, |(parcel, _)| parcel.message.as_many_as(PUBLISHED_TOGETHER_BYTES));
        for places in places.chunks(together) {
            let bodies = places.iter().map(|i| (bus.channels.user(live[*i].0.user), self.body(&live[*i].0, span.as_ref())));
            // While it does not answer, the caller is not kept to its last moment: the refusal has to reach it in time.
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = if bus.is_up() { left } else { left / 2 }.min(bus.link.timeout());
            let published = posts.send(bodies.collect(), limit).await;
            for (n, i) in places.iter().enumerate() {
                let unreachable = |_| Error::unavailable("the queue (redis_queue) cannot be reached");
                received[*i] = published.as_ref().map(|published| published[n]).map_err(unreachable);
            }
        }
        tell_published(live, &places, &received, began);
        if let Some(span) = &mut span {
            span.note("im_presence.receivers", received.iter().flatten().flatten().sum::<u64>());
            places.iter().filter_map(|i| received[*i].as_ref().err()).for_each(|error| span.fail(error.to_string()));
        }
        received
    }

    /// Waits for devices to acknowledge, if that is asked for.
    async fn acknowledged(&self, parcel: &mut Parcel<'_>, targets: &Targets, handed: Instant, deadline: Instant) -> Outcome {
        let (Some(patience), Some(expected)) = (parcel.message.ack_timeout, &parcel.expected) else { return Outcome::Delivered };
        let until = (handed + patience).min(deadline);
        parcel.message.note("waiting", handed, |step| {
            let ms = until.saturating_duration_since(handed).as_millis();
            step.detail = format!("devices: {}, at most {ms} ms", targets.routes.len());
        });
        // A stored message is done when one device has it.
        let span = parcel.message.trace.as_ref().map(|place| place.begin_at("wait for acknowledgement", Kind::Internal, handed));
        let answers = if parcel.inbox_seq > 0 { expected.first(until).await } else { expected.answers(until).await };
        let Answered { acked, not_here } = answers;
        self.metrics.delivery_stage("acknowledged", handed.elapsed());
        if let Some(mut span) = span {
            span.note("im_presence.acked", acked.len() as u64);
            if acked.is_empty() {
                span.fail("no device acknowledged it");
            }
        }
        for target in targets.routes.iter().filter(|target| not_here.contains(&target.device)) {
            self.note_refused(parcel.user, target.bound_version).await;
        }
        let devices = targets.routes.iter().map(|target| &target.device);
        for device in devices.filter(|device| !acked.contains(*device) && !not_here.contains(*device)) {
            parcel.message.note("not_acked", handed, |step| step.device = device.to_string());
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

    fn body(&self, parcel: &Parcel<'_>, span: Option<&Span>) -> Bytes {
        let message = &parcel.message;
        match self.format {
            Format::Raw if message.binary.is_empty() => message.text.clone(),
            Format::Raw => message.binary.clone(),
            Format::Envelope => parcel.envelope(span).encode_to_vec().into(),
        }
    }
}

/// What came of handing a message over, as it is told.
pub fn what(handed: Handed) -> &'static str {
    match handed {
        Handed::Taken => "handed",
        Handed::Full => "queue_full",
        Handed::NotHere => "not_here",
    }
}

fn tell_published(live: &[(Parcel<'_>, Targets)], places: &[usize], received: &[Result<Option<u64>, Error>], began: Instant) {
    for i in places {
        let what = if received[*i].is_ok() { "published" } else { "not_published" };
        live[*i].0.message.note(what, began, |step| {
            step.detail = match &received[*i] {
                Ok(Some(receivers)) => format!("receivers: {receivers}"),
                Ok(None) => "to a cluster, where nobody counts receivers".to_owned(),
                Err(error) => error.to_string(),
            };
        });
    }
}
