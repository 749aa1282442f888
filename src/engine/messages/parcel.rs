//! One user's part of a delivery, and where it goes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use smallvec::SmallVec;

use crate::domain::id::DeviceId;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::engine::messages::acks::Expected;
use crate::engine::messages::message::Message;
use crate::engine::messages::message::Outcome;
use crate::engine::messages::message::Report;
use crate::engine::messages::outlets::Outlets;
use crate::engine::read::directory::Answer;
use crate::error::Error;
use crate::store::codec::Envelope;
use crate::telemetry::spans::Span;

/// What came of a message, by the places of its parcels. None: not known yet.
pub(super) type Done = Vec<Option<Result<Report, Error>>>;

/// One user's part of a delivery, through all attempts.
pub(super) struct Parcel<'a> {
    /// Among those of one attempt.
    pub place: usize,
    pub user: UserId,
    pub message: Arc<Message>,
    /// Its number in the user's inbox; 0: it does not come from there.
    pub inbox_seq: u64,
    pub report: Report,
    pub expected: Option<Expected<'a>>,
}

/// Where a parcel goes.
#[derive(Default)]
pub(super) struct Targets {
    /// Live routes to the devices in question that have not acknowledged.
    pub routes: SmallVec<[Target; 1]>,
    /// Lives that have a stream, each once, and on which node.
    pub streams: SmallVec<[(Epoch, Arc<str>); 1]>,
    /// There are gateways without a stream among them.
    pub channel: bool,
    /// None of the gateways has ever had a stream.
    pub none_attaches: bool,
    /// None of the gateways has been heard lately.
    pub all_suspect: bool,
    /// Messages wait in the user's inbox: what can be stored queues up behind them.
    pub has_stored: bool,
}

/// A route that a parcel takes.
pub(super) struct Target {
    pub device: DeviceId,
    pub bound_version: Version,
    pub epoch: Epoch,
    pub gateway: GatewayAddr,
}

impl Parcel<'_> {
    pub fn end(self, result: Result<Outcome, Error>, done: &mut Done) {
        done[self.place] = Some(result.map(|outcome| Report { outcome, ..self.report }));
    }

    /// As a gateway gets it, as a part of `span`.
    pub fn envelope(&self, span: Option<&Span>) -> Envelope {
        let message = &self.message;
        Envelope {
            delivery_id: self.report.delivery_id.clone(),
            user_id: self.user.get(),
            message: message.text.clone(),
            message_type: message.message_type.clone(),
            payload: message.binary.clone(),
            timestamp: self.report.timestamp.0,
            device_ids: message.device_ids.iter().map(DeviceId::to_string).collect(),
            wants_ack: message.ack_timeout.is_some(),
            message_id: message.message_id.clone(),
            inbox_seq: self.inbox_seq,
            traceparent: span.map(|span| span.place().traceparent()).unwrap_or_default(),
        }
    }

    /// Where it goes, by what was found out since `began`.
    pub fn targets(&self, answer: &Answer, began: Instant) -> Targets {
        let targets = Targets::of(answer, &self.message, &self.report.acked);
        targets.tell(&self.message, answer, began);
        targets
    }

    /// Why it is tried again, after a pause, for whoever wants to see it.
    pub fn tell_retry(&self, result: &Result<Outcome, Error>, pause: Duration) {
        self.message.note("retried", Instant::now(), |step| {
            let why = match result {
                Err(error) => error.to_string(),
                Ok(_) if self.report.receivers > 0 => "no device acknowledged it in time".to_owned(),
                Ok(_) => "no gateway took it".to_owned(),
            };
            step.detail = format!("{why}: again in {} ms, past every cache", pause.as_millis());
        });
    }

    pub fn is_acknowledged(&mut self) -> bool {
        self.report.acked.extend(self.expected.iter().flat_map(Expected::acked));
        !self.report.acked.is_empty()
    }
}

impl Targets {
    pub fn of(answer: &Answer, message: &Message, acked: &BTreeSet<DeviceId>) -> Self {
        let mut targets =
            Self { all_suspect: true, none_attaches: true, has_stored: answer.has_stored_messages(), ..Self::default() };
        for live in answer.live_routes() {
            let device = &live.route.device;
            if acked.contains(device) || !(message.device_ids.is_empty() || message.device_ids.contains(device)) {
                continue;
            }
            let (bound_version, epoch, gateway) = (live.route.bound_version, live.life.epoch, live.life.gateway.clone());
            targets.routes.push(Target { device: device.clone(), bound_version, epoch, gateway });
            targets.all_suspect &= live.suspect;
            targets.none_attaches &= live.life.attach_no == 0;
            match Outlets::stream_of(live.life) {
                Some(stream) if targets.streams.contains(&stream) => {}
                Some(stream) => targets.streams.push(stream),
                None => targets.channel = true,
            }
        }
        targets
    }

    /// Where a parcel goes by what was found out since `began`, for whoever wants to see it.
    pub fn tell(&self, message: &Message, answer: &Answer, began: Instant) {
        if message.steps.is_none() {
            return;
        }
        message.note("looked_up", began, |step| {
            let (tier, count) = (answer.source.name(), self.routes.len());
            step.detail = format!("version {} from {tier}, live routes: {count}", answer.version().0);
        });
        for Target { device, epoch, gateway, .. } in &self.routes {
            message.note("route", Instant::now(), |step| {
                (step.device, step.gateway) = (device.to_string(), gateway.to_string());
                match self.node(*epoch) {
                    Some(node) => node.clone_into(&mut step.node),
                    None => "without a stream: on its channel".clone_into(&mut step.detail),
                }
            });
        }
    }

    /// The gateway of one of the lives.
    pub fn gateway(&self, epoch: Epoch) -> Option<&GatewayAddr> {
        self.routes.iter().find(|target| target.epoch == epoch).map(|target| &target.gateway)
    }

    /// The node that has the stream of one of the lives.
    pub fn node(&self, epoch: Epoch) -> Option<&str> {
        self.streams.iter().find(|(life, _)| *life == epoch).map(|(_, node)| &**node)
    }
}
