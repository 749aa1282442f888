//! Whom the clients of a gateway want to see. However many of them look at a user, the node is asked once.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::time::Duration;
use std::time::Instant;

use im_presence_proto as pb;

use crate::watched::MAX_USERS;
use crate::watched::MAX_USERS_PER_CLIENT;
use crate::watched::WatchError;
use crate::watched::Watched;
use crate::watched::check_users;

/// For so long a user is still watched whom no client wants to see: a page that is loaded again costs the nodes nothing.
const LINGER: Duration = Duration::from_secs(30);

/// A number that names a client among all that this gateway ever had.
pub type ClientKey = u64;

#[derive(Default)]
pub struct Contacts {
    pub watched: Watched,
    users: HashMap<i64, Seen>,
    /// The list of each client, sorted.
    clients: HashMap<ClientKey, Vec<i64>>,
    /// Whom no client wanted to see, each once, the first to leave first. Who has come back since stands here, too.
    leaving: VecDeque<(Instant, i64)>,
}

#[derive(Default)]
struct Seen {
    by: Vec<ClientKey>,
    /// When the last client has gone.
    left: Option<Instant>,
    /// Stands in the list of those who leave.
    is_leaving: bool,
    presence: Option<pb::UserPresence>,
}

impl Contacts {
    /// Replaces the list of a client. Returns what is known of those who are new in it.
    ///
    /// # Errors
    /// There are too many; then nothing is changed.
    pub fn watch(&mut self, client: ClientKey, mut list: Vec<i64>, now: Instant) -> Result<Vec<pb::UserPresence>, WatchError> {
        list.sort_unstable();
        list.dedup();
        check(&list)?;
        self.make_room(&list)?;
        let before = self.clients.remove(&client).unwrap_or_default();
        for user_id in before.iter().filter(|user_id| list.binary_search(user_id).is_err()) {
            self.is_not_seen_by(client, *user_id, now);
        }
        let mut known = Vec::new();
        for user_id in list.iter().filter(|user_id| before.binary_search(user_id).is_err()) {
            self.watched.add(*user_id);
            let seen = self.users.entry(*user_id).or_default();
            seen.by.push(client);
            seen.left = None;
            known.extend(seen.presence.clone());
        }
        if !list.is_empty() {
            self.clients.insert(client, list);
        }
        Ok(known)
    }

    /// A client has gone.
    pub fn unwatch(&mut self, client: ClientKey, now: Instant) {
        for user_id in self.clients.remove(&client).unwrap_or_default() {
            self.is_not_seen_by(client, user_id, now);
        }
    }

    /// What a node has told, as clients may see it, and who is to be told.
    pub fn told(&mut self, told: pb::UserPresence) -> Option<(&pb::UserPresence, &[ClientKey])> {
        if !self.watched.heard(&told) {
            return None;
        }
        let told = pb::UserPresence { devices: 0, platforms: Vec::new(), gateway_addr: String::new(), ..told };
        let seen = self.users.get_mut(&told.user_id)?;
        let is_new = seen.presence.as_ref().is_none_or(|before| shown(before) != shown(&told));
        let presence = seen.presence.insert(told);
        is_new.then_some((&*presence, &seen.by[..]))
    }

    /// A message to the node is done. Returns who is not watched because the node refused it, by client.
    pub fn done(&mut self, done: &pb::WatchDone) -> BTreeMap<ClientKey, Vec<i64>> {
        let mut not_watched = BTreeMap::<ClientKey, Vec<i64>>::new();
        for user_id in self.watched.done(done) {
            for client in self.users.remove(&user_id).unwrap_or_default().by {
                not_watched.entry(client).or_default().push(user_id);
            }
        }
        for (client, users) in &not_watched {
            if let Some(list) = self.clients.get_mut(client) {
                list.retain(|user_id| users.binary_search(user_id).is_err());
            }
        }
        not_watched
    }

    /// When [`Contacts::look`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.leaving.front().map(|(left, _)| *left + LINGER)
    }

    /// Lets go whom no client has wanted to see for a while.
    pub fn look(&mut self, now: Instant) {
        while self.due().is_some_and(|due| due <= now) {
            if let Some((left, user_id)) = self.leaving.pop_front() {
                self.forget(left, user_id);
            }
        }
    }

    fn is_not_seen_by(&mut self, client: ClientKey, user_id: i64, now: Instant) {
        let Some(seen) = self.users.get_mut(&user_id) else { return };
        if let Some(place) = seen.by.iter().position(|by| *by == client) {
            seen.by.swap_remove(place);
        }
        if seen.by.is_empty() {
            seen.left = Some(now);
            if !std::mem::replace(&mut seen.is_leaving, true) {
                self.leaving.push_back((now, user_id));
            }
        }
    }

    /// Who lingers gives way to those who are wanted.
    fn make_room(&mut self, list: &[i64]) -> Result<(), WatchError> {
        let is_too_many =
            |users: &HashMap<i64, Seen>| users.len() + list.iter().filter(|user| !users.contains_key(user)).count() > MAX_USERS;
        if is_too_many(&self.users) {
            let (wanted, leaving) = self.leaving.drain(..).partition(|(_, user_id)| list.binary_search(user_id).is_ok());
            self.leaving = wanted;
            leaving.into_iter().for_each(|(left, user_id): (Instant, i64)| self.forget(left, user_id));
        }
        if is_too_many(&self.users) { Err(WatchError::TooMany) } else { Ok(()) }
    }

    fn forget(&mut self, left: Instant, user_id: i64) {
        let Some(seen) = self.users.get_mut(&user_id) else { return };
        match seen.left {
            Some(last) if last == left => {
                self.users.remove(&user_id);
                self.watched.remove(user_id);
            }
            Some(last) => self.leaving.push_back((last, user_id)), // has come back and left again meanwhile
            None => seen.is_leaving = false,
        }
    }
}

/// Whether a client may have this list.
pub fn check(list: &[i64]) -> Result<(), WatchError> {
    check_users(list)?;
    if list.len() > MAX_USERS_PER_CLIENT { Err(WatchError::ListTooLong(list.len())) } else { Ok(()) }
}

/// What a client sees.
fn shown(presence: &pb::UserPresence) -> (i32, bool, &str) {
    (presence.status, presence.is_online, &presence.status_text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use im_presence_proto::Code;
    use im_presence_proto::Status;

    const ANN: ClientKey = 1;
    const BEN: ClientKey = 2;

    fn told(user_id: i64, version: u64, status: Status) -> pb::UserPresence {
        let gateway_addr = "gw-1:7000".to_owned();
        let presence = pb::UserPresence { user_id, version, is_online: true, gateway_addr, devices: 2, ..Default::default() };
        pb::UserPresence { status: status.into(), platforms: vec![1], ..presence }
    }

    fn users(known: &[pb::UserPresence]) -> Vec<i64> {
        known.iter().map(|presence| presence.user_id).collect()
    }

    /// Adds and removes of the next message.
    fn said(contacts: &mut Contacts, seq: u64) -> (Vec<i64>, Vec<i64>) {
        let message = contacts.watched.message(seq).unwrap_or_default();
        (message.add.iter().map(|known| known.user_id).collect(), message.remove)
    }

    #[test]
    fn the_node_is_asked_once_and_the_second_client_is_told_from_memory() {
        let (mut contacts, now) = (Contacts::default(), Instant::now());
        assert_eq!(contacts.watch(ANN, vec![8, 7, 7], now), Ok(vec![]));
        assert_eq!(said(&mut contacts, 1), (vec![7, 8], vec![]));
        let (presence, clients) = contacts.told(told(7, 5, Status::Busy)).expect("somebody is to be told");
        assert_eq!((presence.version, presence.devices, &*presence.gateway_addr, presence.platforms.len()), (5, 0, "", 0));
        assert_eq!(clients, [ANN]);
        assert_eq!(users(&contacts.watch(BEN, vec![7, 9], now).expect("not many")), [7]);
        assert_eq!(said(&mut contacts, 2), (vec![9], vec![]));
        assert!(contacts.told(told(7, 6, Status::Busy)).is_none(), "clients see no difference");
        assert_eq!(contacts.told(told(7, 7, Status::Away)).expect("both").1, [ANN, BEN]);
        assert_eq!(contacts.watch(BEN, vec![7, 9], now), Ok(vec![]), "nobody is new in the list");
    }

    #[test]
    fn whoever_comes_and_goes_all_the_time_waits_once_and_lingers_after_the_last_time() {
        let (mut contacts, now) = (Contacts::default(), Instant::now());
        for n in 0..1_000 {
            contacts.watch(ANN, vec![7], now + n * LINGER / 1_000).expect("not many");
            contacts.watch(ANN, vec![], now + n * LINGER / 1_000).expect("not many");
        }
        assert_eq!(contacts.leaving.len(), 1);
        contacts.look(now + LINGER);
        assert_eq!((contacts.users.len(), contacts.leaving.len()), (1, 1), "it has left later than that");
        contacts.look(now + 2 * LINGER);
        assert_eq!((contacts.users.len(), contacts.leaving.len()), (0, 0));
    }

    #[test]
    fn a_user_lingers_after_the_last_client_and_may_be_wanted_again_meanwhile() {
        let (mut contacts, now) = (Contacts::default(), Instant::now());
        contacts.watch(ANN, vec![7, 8], now).expect("not many");
        contacts.told(told(7, 5, Status::Online));
        said(&mut contacts, 1);
        contacts.unwatch(ANN, now);
        assert_eq!(contacts.told(told(7, 6, Status::Away)).expect("it is remembered").1, [] as [ClientKey; 0]);
        let known = contacts.watch(BEN, vec![7], now + LINGER / 2).expect("not many");
        assert_eq!((users(&known), known[0].version), (vec![7], 6));
        contacts.look(now + LINGER);
        assert_eq!(said(&mut contacts, 2), (vec![], vec![8]));
        contacts.unwatch(BEN, now + LINGER);
        contacts.look(now + LINGER * 3 / 2);
        assert!(!contacts.watched.has_message(), "it has left later");
        contacts.look(now + LINGER * 2);
        assert_eq!(said(&mut contacts, 3), (vec![], vec![7]));
        assert!(contacts.told(told(7, 7, Status::Online)).is_none() && contacts.due().is_none());
    }

    #[test]
    fn a_refusal_reaches_each_client_and_the_same_list_asks_again() {
        let (mut contacts, now) = (Contacts::default(), Instant::now());
        contacts.watch(ANN, vec![7, 8], now).expect("not many");
        contacts.watch(BEN, vec![8], now).expect("not many");
        said(&mut contacts, 1);
        let result = Some(pb::Result { code: Code::Refused.into(), msg: String::new() });
        let not_watched = contacts.done(&pb::WatchDone { seq: 1, result, delayed: false });
        assert_eq!(not_watched, BTreeMap::from([(ANN, vec![7, 8]), (BEN, vec![8])]));
        contacts.watch(BEN, vec![8], now).expect("not many");
        assert_eq!(said(&mut contacts, 2), (vec![8], vec![]));
    }

    #[test]
    fn what_is_too_much_names_the_limit_and_changes_nothing() {
        let (mut contacts, now) = (Contacts::default(), Instant::now());
        assert_eq!(contacts.watch(ANN, vec![0], now), Err(WatchError::Invalid(0)));
        assert_eq!(contacts.watch(ANN, (1..=5_001).collect(), now), Err(WatchError::ListTooLong(5_001)));
        for client in 0..40 {
            let first = 5_000 * i64::try_from(client).expect("small");
            contacts.watch(client, (first + 1..=first + 5_000).collect(), now).expect("as many as may be");
        }
        assert_eq!(contacts.watch(99, vec![1, 200_001], now), Err(WatchError::TooMany));
        contacts.watch(0, vec![], now).expect("none");
        contacts.watch(99, vec![1, 200_001], now).expect("who lingers gives way");
        assert_eq!(contacts.users.len(), 195_002);
        assert!(WatchError::TooMany.to_string().contains("200000"));
    }
}
