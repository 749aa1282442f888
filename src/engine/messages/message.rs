//! A message, and what comes of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;

use crate::domain::id::DeviceId;
use crate::domain::inbox::NewMessage;
use crate::domain::time::Timestamp;
use crate::engine::messages::steps::Step;
use crate::engine::messages::steps::Steps;
use crate::telemetry::spans::Kind;
use crate::telemetry::spans::Place;
use crate::telemetry::spans::Span;

/// What an envelope may add to a message.
const ENVELOPE_BYTES: usize = 1024;

/// A message to deliver.
#[derive(Clone)]
pub struct Message {
    /// UTF-8. One copy, however many users get it.
    pub text: Bytes,
    pub binary: Bytes,
    pub message_type: String,
    /// Empty: never a repeat.
    pub message_id: String,
    /// Empty: all devices.
    pub device_ids: Vec<DeviceId>,
    /// How long devices have for an acknowledgement. None: nobody waits for one.
    pub ack_timeout: Option<Duration>,
    /// Store it for a user who cannot be reached. None: do not.
    pub store: Option<Storing>,
    /// For whoever wants to see how it goes.
    pub steps: Option<Arc<Steps>>,
    /// Where its spans begin. None: it is not traced.
    pub trace: Option<Place>,
}

/// How a message is stored.
#[derive(Clone, Copy, Debug)]
pub struct Storing {
    /// None: as long as is allowed.
    pub expires_after: Option<Duration>,
}

/// What came of a message to one user.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A gateway took it; a device acknowledged it, if that was asked for.
    Delivered,
    /// The user has no live route to the devices in question.
    Offline,
    /// There are live routes, but nobody took it, or no device acknowledged it.
    Undelivered,
    /// Its gateways have never attached, and there is no queue to reach them by: trying again will not help.
    NoWay,
    /// It waits in the user's inbox.
    Stored,
    /// It could be neither delivered nor stored: the inbox is full.
    InboxFull,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub delivery_id: String,
    pub timestamp: Timestamp,
    pub attempts: u32,
    /// Gateways that took it at the last attempt.
    pub receivers: u64,
    /// One of them stands for all who have subscribed, be it nobody: who they are is not known.
    pub uncounted: bool,
    pub acked: BTreeSet<DeviceId>,
}

impl Message {
    /// A message as it comes out of an inbox.
    pub(super) fn stored(stored: NewMessage) -> Self {
        let (text, binary) = match stored.is_binary {
            true => (Bytes::new(), stored.body),
            false => (stored.body, Bytes::new()),
        };
        let device_ids = stored.devices.into_iter().flatten().collect();
        let NewMessage { message_type, message_id, .. } = stored;
        Self { text, binary, message_type, message_id, device_ids, ack_timeout: None, store: None, steps: None, trace: None }
    }

    /// A span, if it is traced.
    pub(super) fn begin(&self, name: &'static str, kind: Kind) -> Option<Span> {
        self.trace.as_ref().map(|place| place.begin(name, kind))
    }

    /// Tells of a step that began at `since` and is over, if somebody wants to see it.
    pub(super) fn note(&self, what: &'static str, since: Instant, tell: impl FnOnce(&mut Step)) {
        if let Some(steps) = &self.steps {
            steps.note(what, since, tell);
        }
    }

    /// How many copies of it are not larger than `bytes`.
    pub(super) fn as_many_as(&self, bytes: usize) -> usize {
        (bytes / (self.text.len() + self.binary.len() + ENVELOPE_BYTES)).max(1)
    }

    pub(super) fn to_store(&self) -> NewMessage {
        let is_binary = !self.binary.is_empty();
        let body = if is_binary { self.binary.clone() } else { self.text.clone() };
        NewMessage {
            message_id: self.message_id.clone(),
            message_type: self.message_type.clone(),
            body,
            is_binary,
            devices: (!self.device_ids.is_empty()).then(|| self.device_ids.iter().cloned().collect()),
            expires_after: self.store.and_then(|store| store.expires_after),
        }
    }
}

impl Report {
    /// Whether a repeat of the message is answered with this.
    pub(super) fn is_settled(&self) -> bool {
        matches!(self.outcome, Outcome::Delivered | Outcome::Stored)
    }
}
