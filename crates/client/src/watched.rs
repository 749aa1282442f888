//! The users that nodes are asked about: what has still to be said of them, and which version was heard last.

use std::collections::BTreeSet;
use std::collections::HashMap;

use im_presence_proto as pb;
use im_presence_proto::Code;

/// Users that one message adds, and that it removes.
const MAX_USERS_PER_MESSAGE: usize = 5_000;
/// Users that one gateway, or one watch of a service, asks about at the same time: as many as nodes allow a stream, if they
/// are not told otherwise.
pub const MAX_USERS: usize = 200_000;
/// Users in the list of one client.
pub const MAX_USERS_PER_CLIENT: usize = 5_000;

/// Why users are not watched. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    #[error("user_id must be above 0, is {0}")]
    Invalid(i64),
    #[error("a client may watch {MAX_USERS_PER_CLIENT} users at most, not {0}")]
    ListTooLong(usize),
    #[error("{MAX_USERS} users at most may be watched at the same time")]
    TooMany,
    #[error("the gateway has stopped")]
    Stopped,
}

/// Whether these are users.
pub fn check_users(users: &[i64]) -> Result<(), WatchError> {
    users.iter().find(|user_id| **user_id <= 0).map_or(Ok(()), |user_id| Err(WatchError::Invalid(*user_id)))
}

#[derive(Default)]
pub struct Watched {
    users: HashMap<i64, Known>,
    /// Who has to be added.
    unsaid: BTreeSet<i64>,
    /// Who has to be removed. Somebody may stand in both: removes come first.
    gone: BTreeSet<i64>,
    /// Who was added by messages that are not done, by their `seq`.
    asked: HashMap<u64, Vec<i64>>,
}

#[derive(Default)]
struct Known {
    version: u64,
    /// The message that added the user; 0: none has yet.
    added_by: u64,
}

impl Watched {
    pub fn len(&self) -> usize {
        self.users.len()
    }

    pub fn contains(&self, user_id: i64) -> bool {
        self.users.contains_key(&user_id)
    }

    pub fn add(&mut self, user_id: i64) {
        if !self.contains(user_id) {
            self.users.insert(user_id, Known::default());
            self.unsaid.insert(user_id);
        }
    }

    pub fn remove(&mut self, user_id: i64) {
        if self.users.remove(&user_id).is_some() && !self.unsaid.remove(&user_id) {
            self.gone.insert(user_id);
        }
    }

    /// A new stream, whose node knows of nobody.
    pub fn resume(&mut self) {
        self.gone.clear();
        self.asked.clear();
        self.unsaid.extend(self.users.keys());
    }

    pub fn has_message(&self) -> bool {
        !(self.unsaid.is_empty() && self.gone.is_empty())
    }

    /// The next message to the node. None: everything is said.
    pub fn message(&mut self, seq: u64) -> Option<pb::WatchReq> {
        if !self.has_message() {
            return None;
        }
        let remove = take(&mut self.gone);
        // Who has left and come back must not be removed after being added.
        let added = if self.gone.is_empty() { take(&mut self.unsaid) } else { Vec::new() };
        let mut add = Vec::with_capacity(added.len());
        for user_id in &added {
            if let Some(known) = self.users.get_mut(user_id) {
                known.added_by = seq;
                add.push(pb::KnownUser { user_id: *user_id, version: known.version });
            }
        }
        self.asked.insert(seq, added);
        Some(pb::WatchReq { seq, add, remove })
    }

    /// The node has told something. False: of somebody who was removed meanwhile.
    pub fn heard(&mut self, told: &pb::UserPresence) -> bool {
        // A smaller version than before is that of a database that was set back: within a stream nothing is overtaken.
        self.users.get_mut(&told.user_id).map(|known| known.version = told.version).is_some()
    }

    /// A message is done. Returns who is not watched because the node refused it.
    pub fn done(&mut self, done: &pb::WatchDone) -> Vec<i64> {
        let mut added = self.asked.remove(&done.seq).unwrap_or_default();
        if done.result.as_ref().is_none_or(|result| result.code() != Code::Refused) {
            return Vec::new();
        }
        // Who has left and come back since was added by another message.
        added.retain(|user_id| self.users.get(user_id).is_some_and(|known| known.added_by == done.seq));
        added.iter().for_each(|user_id| _ = self.users.remove(user_id));
        added
    }
}

fn take(users: &mut BTreeSet<i64>) -> Vec<i64> {
    std::iter::from_fn(|| users.pop_first()).take(MAX_USERS_PER_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watching(users: impl IntoIterator<Item = i64>) -> Watched {
        let mut watched = Watched::default();
        users.into_iter().for_each(|user| watched.add(user));
        watched
    }

    fn told(user_id: i64, version: u64) -> pb::UserPresence {
        pb::UserPresence { user_id, version, ..Default::default() }
    }

    fn refused(seq: u64) -> pb::WatchDone {
        let result = Some(pb::Result { code: Code::Refused.into(), msg: "too many".to_owned() });
        pb::WatchDone { seq, result, delayed: false }
    }

    #[track_caller]
    fn check(message: Option<pb::WatchReq>, add: &[(i64, u64)], remove: &[i64]) {
        let message = message.expect("a message");
        let added: Vec<_> = message.add.iter().map(|known| (known.user_id, known.version)).collect();
        assert_eq!((&added[..], &message.remove[..]), (add, remove));
    }

    #[test]
    fn what_changes_before_it_is_said_is_said_once() {
        let mut watched = watching([1, 2, 1]);
        watched.remove(2);
        check(watched.message(1), &[(1, 0)], &[]);
        assert_eq!(watched.message(2), None);
        watched.remove(1);
        watched.add(1);
        watched.remove(1);
        watched.remove(1);
        check(watched.message(3), &[], &[1]);
    }

    #[test]
    fn who_leaves_and_comes_back_is_removed_before_being_added_also_in_many_messages() {
        let mut watched = watching(1..=6_000);
        assert_eq!(watched.message(1).map(|message| message.add.len()), Some(5_000));
        assert_eq!(watched.message(2).map(|message| message.add.len()), Some(1_000));
        (1..=6_000).for_each(|user| watched.remove(user));
        watched.add(6_000);
        let first = watched.message(3).expect("a message");
        assert_eq!((first.add.len(), first.remove.len()), (0, 5_000));
        let second = watched.message(4).expect("a message");
        assert_eq!((second.add.len(), second.remove.len(), second.remove[999]), (1, 1_000, 6_000));
    }

    #[test]
    fn a_new_stream_is_told_everything_with_the_versions_that_were_heard() {
        let mut watched = watching([1, 2, 3]);
        watched.message(1);
        assert!(watched.heard(&told(1, 17)) && watched.heard(&told(2, 9)) && watched.heard(&told(2, 4)));
        watched.remove(3);
        assert!(!watched.heard(&told(3, 5)), "it comes after the remove");
        watched.resume();
        check(watched.message(2), &[(1, 17), (2, 4)], &[]);
        assert!(!watched.has_message());
    }

    #[test]
    fn a_refused_message_is_about_those_whom_it_has_added_and_no_others() {
        let mut watched = watching([1, 2]);
        watched.message(1);
        watched.remove(2);
        watched.add(2);
        watched.message(2);
        assert_eq!(watched.done(&refused(1)), [1]);
        assert_eq!(watched.done(&refused(1)), [] as [i64; 0], "it was done before");
        assert_eq!(watched.done(&pb::WatchDone { seq: 2, ..Default::default() }), [] as [i64; 0]);
        assert!(watched.contains(2) && !watched.contains(1));
    }
}
