//! Messages stored for a user until a device acknowledges them, and the rules of that. Everything here happens under the
//! user's row lock, so numbers become visible in their order, and no message is stored between a bind and its drain unseen.
//!
//! An inbox is bounded by count and bytes. A full one takes no further message: dropping the oldest would lose what its
//! sender was told is stored. Messages end with their time to live.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;

use crate::domain::id::DeviceId;
use crate::domain::id::Version;
use crate::domain::time::Timestamp;

/// What one user's inbox may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub messages: u64,
    pub bytes: u64,
    /// How long a message is kept at most.
    pub ttl: Duration,
    /// How much longer than it says a message may last, because the clock was set forward.
    pub slack: Duration,
    /// The clock may be wrong: nothing is removed for its age.
    pub keeps_what_is_over: bool,
}

/// A message to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMessage {
    /// A repeat of one that is stored is not stored again. Empty: never a repeat.
    pub message_id: String,
    pub message_type: String,
    /// Shared by all users it is stored for.
    pub body: Bytes,
    /// `body` is a payload, not text.
    pub is_binary: bool,
    /// None: any device.
    pub devices: Option<BTreeSet<DeviceId>>,
    /// None: the longest that is allowed.
    pub expires_after: Option<Duration>,
}

/// What is known of a stored message besides its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub message_id: String,
    pub bytes: u64,
    pub expires_at: Timestamp,
    pub devices: Option<BTreeSet<DeviceId>>,
}

/// Whether a message for `devices`, or for any, is for this one.
pub fn is_for(devices: &Option<BTreeSet<DeviceId>>, device: &DeviceId) -> bool {
    devices.as_ref().is_none_or(|devices| devices.contains(device))
}

/// A change of an inbox.
#[derive(Clone, Debug)]
pub enum InboxChange {
    Store(NewMessage),
    /// These were acknowledged, each by a device it is for.
    Acknowledged(Vec<u64>),
    /// A device has read everything up to here.
    ReadUpTo {
        seq: u64,
        device: DeviceId,
    },
    /// Remove what is over.
    Expire,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InboxOutcome {
    /// Under this number; now, or by an earlier call with the same message id.
    Stored {
        seq: u64,
        again: bool,
    },
    Full,
    Removed {
        messages: usize,
    },
}

/// One user's stored messages by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inbox {
    messages: BTreeMap<u64, Stored>,
    /// How many there are besides, and their bytes: enough to store one more, if none of them is over or the same message.
    others: (u64, u64),
    /// Numbers added and removed by changes, for whoever writes them down.
    pub added: Vec<u64>,
    pub removed: Vec<u64>,
}

impl Inbox {
    pub fn of(messages: BTreeMap<u64, Stored>) -> Self {
        Self { messages, ..Self::default() }
    }

    /// Of a user who has `others` besides, with so many bytes, of which none is over.
    pub fn with_others(messages: BTreeMap<u64, Stored>, others: u64, bytes: u64) -> Self {
        Self { others: (others, bytes), ..Self::of(messages) }
    }

    pub fn len(&self) -> u64 {
        self.messages.len() as u64 + self.others.0
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn get(&self, seq: u64) -> Option<&Stored> {
        self.messages.get(&seq)
    }

    /// Applies `change`. `last` is the greatest number the user ever had; a new message is above it, at the database's clock
    /// or later, so a number never comes back.
    pub fn apply(&mut self, change: &InboxChange, last: u64, clock: Version, now: Timestamp, limits: &Limits) -> InboxOutcome {
        let is_over = |stored: &Stored| stored.expires_at.plus(limits.slack) <= now && !limits.keeps_what_is_over;
        match change {
            InboxChange::Store(message) => {
                self.remove(|_, stored| is_over(stored)); // what is over takes no room and is nobody's repeat
                self.store(message, (last + 1).max(clock.0), now, limits)
            }
            InboxChange::Acknowledged(seqs) => self.remove(|seq, _| seqs.contains(&seq)),
            InboxChange::ReadUpTo { seq: up_to, device } => {
                self.remove(|seq, stored| seq <= *up_to && is_for(&stored.devices, device))
            }
            InboxChange::Expire => self.remove(|_, stored| is_over(stored)),
        }
    }

    fn store(&mut self, message: &NewMessage, seq: u64, now: Timestamp, limits: &Limits) -> InboxOutcome {
        let known =
            self.messages.iter().find(|(_, stored)| !message.message_id.is_empty() && stored.message_id == message.message_id);
        if let Some((seq, _)) = known {
            return InboxOutcome::Stored { seq: *seq, again: true };
        }
        let bytes = message.body.len() as u64;
        let held = self.messages.values().map(|stored| stored.bytes).sum::<u64>() + self.others.1;
        if self.len() >= limits.messages || held + bytes > limits.bytes {
            return InboxOutcome::Full;
        }
        let expires_at = now.plus(message.expires_after.unwrap_or(limits.ttl).min(limits.ttl));
        let (message_id, devices) = (message.message_id.clone(), message.devices.clone());
        self.messages.insert(seq, Stored { message_id, bytes, expires_at, devices });
        self.added.push(seq);
        InboxOutcome::Stored { seq, again: false }
    }

    fn remove(&mut self, goes: impl Fn(u64, &Stored) -> bool) -> InboxOutcome {
        let gone: Vec<u64> = self.messages.iter().filter(|(seq, stored)| goes(**seq, stored)).map(|(seq, _)| *seq).collect();
        for seq in &gone {
            self.messages.remove(seq);
            // What this transaction has only just added was never written down.
            match self.added.iter().position(|added| added == seq) {
                Some(place) => drop(self.added.remove(place)),
                None => self.removed.push(*seq),
            }
        }
        InboxOutcome::Removed { messages: gone.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);
    const LIMITS: Limits =
        Limits { messages: 3, bytes: 10, ttl: Duration::from_secs(60), slack: Duration::ZERO, keeps_what_is_over: false };

    fn message(id: &str, body: &str) -> NewMessage {
        NewMessage {
            message_id: id.to_owned(),
            message_type: String::new(),
            body: Bytes::copy_from_slice(body.as_bytes()),
            is_binary: false,
            devices: None,
            expires_after: None,
        }
    }

    fn device(name: &str) -> DeviceId {
        DeviceId::parse(name).unwrap()
    }

    fn store(inbox: &mut Inbox, message: NewMessage, last: u64) -> InboxOutcome {
        inbox.apply(&InboxChange::Store(message), last, Version(0), NOW, &LIMITS)
    }

    #[test]
    fn numbers_grow_and_never_come_back() {
        let mut inbox = Inbox::default();
        assert_eq!(store(&mut inbox, message("a", ""), 7), InboxOutcome::Stored { seq: 8, again: false });
        let late = inbox.apply(&InboxChange::Store(message("b", "")), 8, Version(100), NOW, &LIMITS);
        assert_eq!(late, InboxOutcome::Stored { seq: 100, again: false });
        inbox.apply(&InboxChange::Acknowledged(vec![8, 100]), 100, Version(0), NOW, &LIMITS);
        assert!(inbox.is_empty());
        assert_eq!(store(&mut inbox, message("c", ""), 100), InboxOutcome::Stored { seq: 101, again: false });
    }

    #[test]
    fn a_repeat_is_not_stored_twice_and_a_full_inbox_takes_nothing() {
        let mut inbox = Inbox::default();
        assert_eq!(store(&mut inbox, message("a", "12345678"), 0), InboxOutcome::Stored { seq: 1, again: false });
        assert_eq!(store(&mut inbox, message("a", "12345678"), 1), InboxOutcome::Stored { seq: 1, again: true });
        assert_eq!(store(&mut inbox, message("b", "123"), 1), InboxOutcome::Full, "too many bytes");
        assert_eq!(store(&mut inbox, message("", "1"), 1), InboxOutcome::Stored { seq: 2, again: false });
        assert_eq!(store(&mut inbox, message("", "1"), 2), InboxOutcome::Stored { seq: 3, again: false }, "without an id");
        assert_eq!(store(&mut inbox, message("c", ""), 3), InboxOutcome::Full, "too many messages");
        assert_eq!(inbox.len(), 3);
    }

    #[test]
    fn a_message_is_done_when_a_device_it_is_for_has_it() {
        let mut inbox = Inbox::default();
        let for_pad = NewMessage { devices: Some(BTreeSet::from([device("pad")])), ..message("a", "") };
        store(&mut inbox, for_pad, 0);
        store(&mut inbox, message("b", ""), 1);
        let read = |name: &str, seq| InboxChange::ReadUpTo { seq, device: device(name) };
        let mut apply = |change: InboxChange| inbox.apply(&change, 2, Version(0), NOW, &LIMITS);
        assert_eq!(apply(read("phone", 1)), InboxOutcome::Removed { messages: 0 });
        assert_eq!(apply(read("phone", 2)), InboxOutcome::Removed { messages: 1 }, "the one for any device");
        assert_eq!(apply(read("pad", 9)), InboxOutcome::Removed { messages: 1 });
    }

    #[test]
    fn messages_end_with_their_time_which_nobody_can_prolong() {
        let mut inbox = Inbox::default();
        let after = |seconds| NewMessage { expires_after: Some(Duration::from_secs(seconds)), ..message("", "") };
        for (last, seconds) in [(0, 1), (1, 1_000)] {
            store(&mut inbox, after(seconds), last);
        }
        let mut expire = |now| inbox.apply(&InboxChange::Expire, 2, Version(0), now, &LIMITS);
        assert_eq!(expire(NOW), InboxOutcome::Removed { messages: 0 });
        assert_eq!(expire(NOW.plus(Duration::from_secs(1))), InboxOutcome::Removed { messages: 1 });
        assert_eq!(expire(NOW.plus(LIMITS.ttl)), InboxOutcome::Removed { messages: 1 });
    }

    #[test]
    fn what_was_stored_before_the_clock_was_set_forward_lasts_as_much_longer() {
        let mut inbox = Inbox::default();
        store(&mut inbox, message("a", ""), 0);
        let set_forward = Limits { slack: Duration::from_secs(3600), ..LIMITS };
        let mut expire = |now| inbox.apply(&InboxChange::Expire, 1, Version(0), now, &set_forward);
        assert_eq!(expire(NOW.plus(Duration::from_secs(3659))), InboxOutcome::Removed { messages: 0 });
        assert_eq!(expire(NOW.plus(Duration::from_secs(3660))), InboxOutcome::Removed { messages: 1 });
    }

    #[test]
    fn nothing_is_removed_for_its_age_while_the_clock_may_be_wrong() {
        let mut inbox = Inbox::default();
        store(&mut inbox, message("a", ""), 0);
        let (later, unsure) = (NOW.plus(LIMITS.ttl), Limits { keeps_what_is_over: true, ..LIMITS });
        let again = inbox.apply(&InboxChange::Store(message("a", "")), 1, Version(0), later, &unsure);
        assert_eq!(again, InboxOutcome::Stored { seq: 1, again: true });
        let expired = inbox.apply(&InboxChange::Expire, 1, Version(0), later, &unsure);
        assert_eq!((expired, inbox.len()), (InboxOutcome::Removed { messages: 0 }, 1));
    }

    #[test]
    fn messages_that_are_only_counted_take_room() {
        let stores = |others, bytes| {
            let mut inbox = Inbox::with_others(BTreeMap::new(), others, bytes);
            (store(&mut inbox, message("a", "12345"), 9), inbox.len())
        };
        assert_eq!(stores(2, 5), (InboxOutcome::Stored { seq: 10, again: false }, 3));
        assert_eq!(stores(3, 0), (InboxOutcome::Full, 3));
        assert_eq!(stores(1, 6), (InboxOutcome::Full, 1));
    }

    #[test]
    fn what_is_over_takes_no_room_and_a_repeat_of_it_is_a_new_message() {
        let mut inbox = Inbox::default();
        for (last, id) in [(0, "a"), (1, "b"), (2, "c")] {
            store(&mut inbox, message(id, ""), last);
        }
        let later = NOW.plus(LIMITS.ttl);
        let again = inbox.apply(&InboxChange::Store(message("b", "")), 3, Version(0), later, &LIMITS);
        assert_eq!((again, inbox.len()), (InboxOutcome::Stored { seq: 4, again: false }, 1));
    }

    #[test]
    fn what_comes_and_goes_in_one_transaction_is_not_written_down() {
        let mut inbox = Inbox::of(BTreeMap::from([(
            1,
            Stored { message_id: "a".to_owned(), bytes: 1, expires_at: NOW.plus(LIMITS.ttl), devices: None },
        )]));
        store(&mut inbox, message("b", ""), 1);
        let gone = inbox.apply(&InboxChange::Acknowledged(vec![1, 2]), 2, Version(0), NOW, &LIMITS);
        assert_eq!((gone, inbox.added, inbox.removed), (InboxOutcome::Removed { messages: 2 }, vec![], vec![1]));
    }
}
