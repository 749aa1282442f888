//! What a batch has done so far, in memory.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::sync::Arc;

use crate::domain::event::Bind;
use crate::domain::event::Outcome;
use crate::domain::event::Unbind;
use crate::domain::gateway::Fence;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeTable;
use crate::domain::history::Chronicle;
use crate::domain::history::DayShare;
use crate::domain::history::LogLine;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::domain::inbox::Inbox;
use crate::domain::inbox::InboxOutcome;
use crate::domain::inbox::NewMessage;
use crate::domain::status::Status;
use crate::domain::user::Applied;
use crate::domain::user::UserRecord;
use crate::store::codec::KickedRoute;
use crate::store::codec::reason_to_i32;
use crate::store::users::Records;

/// The records, messages, kicks and history that a batch leaves behind.
pub(super) struct Work<'a> {
    pub current: HashMap<GatewayAddr, Arc<Life>>,
    pub before: &'a Records,
    pub after: Records,
    pub kicks: Vec<KickedRoute>,
    pub inboxes: HashMap<UserId, Inbox>,
    /// Messages that were stored, with their numbers.
    pub messages: Vec<(UserId, u64, &'a NewMessage)>,
    /// Of whom others are shown something new.
    pub seen: BTreeSet<UserId>,
    /// Lines of the log, with the gateway's address, and time online.
    pub log: Vec<(UserId, LogLine, String)>,
    pub days: Vec<(UserId, DayShare)>,
    /// Times online of unknown length.
    pub skipped: u64,
    /// Users of whom everything is erased that was written before.
    pub forgotten: Vec<UserId>,
}

impl<'a> Work<'a> {
    /// On these records, and gateways' current lives.
    pub fn new(before: &'a Records, current: HashMap<GatewayAddr, Arc<Life>>, inboxes: HashMap<UserId, Inbox>) -> Self {
        Self {
            current,
            before,
            after: Records::default(),
            kicks: Vec::new(),
            inboxes,
            messages: Vec::new(),
            seen: BTreeSet::new(),
            log: Vec::new(),
            days: Vec::new(),
            skipped: 0,
            forgotten: Vec::new(),
        }
    }

    pub fn note_stored(&mut self, user: UserId, message: &'a NewMessage, outcome: &Outcome) {
        if let Outcome::Inbox(InboxOutcome::Stored { seq, again: false }) = outcome {
            self.messages.push((user, *seq, message));
        }
    }

    pub fn record(&self, user: UserId) -> UserRecord {
        self.after.get(&user).or_else(|| self.before.get(&user)).cloned().unwrap_or_default()
    }

    /// The life a bind belongs to. None: the one it claims is over, or another gateway's.
    pub fn life_of(&self, bind: &Bind, table: &LifeTable) -> Option<Arc<Life>> {
        match bind.epoch {
            None => self.current.get(&bind.gateway).cloned(),
            Some(epoch) => table.get(epoch).filter(|life| life.is_alive() && life.gateway == bind.gateway).cloned(),
        }
    }

    /// An unbind that found nothing is fenced if the life it claims is over: its gateway has to know.
    pub fn fenced_unbind(&self, unbind: &Unbind, applied: Applied, table: &LifeTable) -> Applied {
        let over = unbind.epoch().map(|epoch| table.get(epoch)).filter(|life| life.is_none_or(|life| !life.is_alive()));
        match (over, &applied.outcome) {
            (Some(life), Outcome::NotBound { .. }) => {
                let current = life.and_then(|life| self.current.get(&life.gateway));
                Applied::unchanged(Outcome::Fenced(Fence::of(current.into_iter().map(|life| &**life))))
            }
            _ => applied,
        }
    }

    pub fn fenced(&self, gateway: &GatewayAddr) -> Outcome {
        Outcome::Fenced(Fence::of(self.current.get(gateway).into_iter().map(|life| &**life)))
    }

    /// Whether there is nothing to commit.
    pub fn changes_nothing(&self) -> bool {
        self.after.is_empty() && self.forgotten.is_empty()
    }

    /// What the batch was to write of a user is dropped, too.
    pub fn forget(&mut self, user: UserId, record: &UserRecord) {
        if record.standing().shown() != Status::Offline {
            self.seen.insert(user);
        }
        self.messages.retain(|(of, ..)| *of != user);
        self.log.retain(|(of, ..)| *of != user);
        self.days.retain(|(of, _)| *of != user);
        self.inboxes.insert(user, Inbox::default());
        self.forgotten.push(user);
    }

    pub fn keep(&mut self, user: UserId, applied: Applied, table: &LifeTable) -> Outcome {
        self.note_history(user, &applied.chronicle, table);
        if let (
            Outcome::Bound { kicked, .. } | Outcome::ForcedOffline { kicked, .. } | Outcome::Forgotten { kicked, .. },
            Some(_),
        ) = (&applied.outcome, &applied.next)
        {
            self.kicks.extend(kicked.iter().map(|(route, reason)| KickedRoute {
                user_id: user.get(),
                device_id: route.device.to_string(),
                epoch: route.epoch.0,
                bound_version: route.bound_version.0,
                reason: reason_to_i32(*reason),
                ..KickedRoute::default()
            }));
        }
        if let Some(next) = applied.next {
            self.after.insert(user, next);
        }
        applied.outcome
    }

    fn note_history(&mut self, user: UserId, chronicle: &Chronicle, table: &LifeTable) {
        let address = |epoch| table.get(epoch).map(|life| life.gateway.to_string());
        for line in &chronicle.log {
            self.log.push((user, *line, line.epoch.and_then(address).unwrap_or_default()));
        }
        if chronicle.log.iter().any(|line| !line.hidden) {
            self.seen.insert(user);
        }
        self.days.extend(chronicle.days.iter().map(|share| (user, *share)));
        self.skipped += u64::from(chronicle.skipped);
    }
}
