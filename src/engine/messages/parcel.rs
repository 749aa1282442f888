//! One user's part of a delivery, and where it goes.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;

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

/// What came of a message, by user.
pub(super) type Done = HashMap<UserId, Result<Report, Error>>;

/// One user's part of a delivery, through all attempts.
pub(super) struct Parcel<'a> {
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
    pub routes: BTreeMap<DeviceId, (Version, GatewayAddr)>,
    pub streams: BTreeMap<Epoch, Arc<str>>,
    /// There are gateways without a stream among them.
    pub channel: bool,
    /// None of the gateways has ever had a stream.
    pub none_attaches: bool,
    /// None of the gateways has been heard lately.
    pub all_suspect: bool,
    /// Messages wait in the user's inbox: what can be stored queues up behind them.
    pub has_stored: bool,
}

impl Parcel<'_> {
    pub fn end(self, result: Result<Outcome, Error>, done: &mut Done) {
        done.insert(self.user, result.map(|outcome| Report { outcome, ..self.report }));
    }

    pub fn envelope(&self) -> Envelope {
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
        }
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
            targets.routes.insert(device.clone(), (live.route.bound_version, live.life.gateway.clone()));
            targets.all_suspect &= live.suspect;
            targets.none_attaches &= live.life.attach_no == 0;
            match Outlets::stream_of(live.life) {
                Some((epoch, node)) => {
                    targets.streams.insert(epoch, node);
                }
                None => targets.channel = true,
            }
        }
        targets
    }
}
