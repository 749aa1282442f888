//! Who is connected to a gateway: what a new life of it binds again, and which connection a kick means.

use std::collections::BTreeMap;
use std::time::Instant;

use im_presence_proto as pb;

use crate::digest::Digest;
use crate::digest::element;
use crate::digest::is_asked;
use crate::event::Connection;
use crate::event::ms_ago;
use crate::event::request;

/// User, device, connection.
type Key = (i64, String, String);

struct Held {
    connection: Connection,
    since: Instant,
    /// Nobody uses the device now.
    idle: bool,
    /// Empty: no node has said that it is bound.
    route_key: String,
    /// Its part in the digest.
    element: u64,
}

#[derive(Default)]
pub struct Connections {
    held: BTreeMap<Key, Held>,
    /// Of all that are held: changed together with the map, and nowhere else.
    digest: Digest,
    /// Kicks that have overtaken the answer to their bind.
    early: Vec<pb::Kick>,
}

impl Connections {
    pub fn len(&self) -> usize {
        self.held.len()
    }

    pub fn all(&self) -> impl Iterator<Item = &Connection> {
        self.held.values().map(|held| &held.connection)
    }

    pub fn insert(&mut self, connection: &Connection) {
        let (since, idle) = (Instant::now(), connection.idle);
        let key = key(connection);
        let element = element(key.0, &key.1, &key.2);
        self.remove(&key);
        self.digest.add(key.0, element);
        let held = Held { connection: connection.clone(), since, idle, route_key: String::new(), element };
        self.held.insert(key, held);
    }

    fn remove(&mut self, key: &Key) -> Option<Held> {
        let held = self.held.remove(key)?;
        self.digest.remove(key.0, held.element);
        Some(held)
    }

    /// The digest of all connections, and their number.
    pub fn digest(&self) -> (u64, u32) {
        self.digest.total()
    }

    /// What a node is answered that asks what is held.
    pub fn answer(&self, query: &pb::DigestQuery) -> Vec<pb::DigestAnswer> {
        let asked = self.held.iter().filter(|((user_id, ..), _)| is_asked(query, *user_id));
        self.digest.answer(query, asked.map(|(_, held)| held.bound()))
    }

    /// The connection that a node means.
    pub fn named(&self, bound: &pb::Bound) -> Option<&Connection> {
        let key = (bound.user_id, bound.device_id.clone(), bound.conn_id.clone());
        self.held.get(&key).map(|held| &held.connection)
    }

    /// What to say of a connection. None: it has ended.
    pub fn bind_request(&self, connection: &Connection) -> Option<pb::BindRouteReq> {
        let held = self.held.get(&key(connection))?;
        Some(pb::BindRouteReq { idle: held.idle, ..request(&held.connection, held.since) })
    }

    /// Whether nobody uses a device. None: it is not connected.
    pub fn is_idle(&self, user_id: i64, device_id: &str) -> Option<bool> {
        let newest = self.of_device(user_id, device_id).max_by_key(|held| held.since)?;
        Some(newest.idle)
    }

    pub fn set_idle(&mut self, user_id: i64, device_id: &str, idle: bool) {
        let of_device = self.held.range_mut((user_id, device_id.to_owned(), String::new())..);
        let of_device = of_device.take_while(|(key, _)| key.0 == user_id && key.1 == device_id);
        of_device.for_each(|(_, held)| held.idle = idle);
    }

    /// A node has bound it. Returns the kick that was there before.
    pub fn bound(&mut self, connection: &Connection, route_key: &str) -> Option<pb::Kick> {
        self.held.get_mut(&key(connection))?.route_key = route_key.to_owned();
        let early = self.early.iter().position(|kick| kick.route_key == route_key)?;
        Some(self.early.swap_remove(early))
    }

    pub fn refused(&mut self, connection: &Connection) {
        self.remove(&key(connection));
    }

    /// It has ended. True: its bind was not answered, and may still be carried out.
    pub fn ended(&mut self, user_id: i64, device_id: &str, conn_id: &str) -> bool {
        let held = self.remove(&(user_id, device_id.to_owned(), conn_id.to_owned()));
        held.is_some_and(|held| held.route_key.is_empty())
    }

    /// Which connection is to be closed. None: it has ended, or that was said before.
    pub fn kicked(&mut self, kick: &pb::Kick) -> Option<Connection> {
        let meant = self.meant(kick)?;
        self.remove(&key(&meant));
        Some(meant)
    }

    /// Which connection a kick means. None: it has ended, or is not bound yet; then the kick waits for that.
    pub fn meant(&mut self, kick: &pb::Kick) -> Option<Connection> {
        let (mut meant, mut unanswered) = (None, false);
        for held in self.of_device(kick.user_id, &kick.device_id) {
            unanswered |= held.route_key.is_empty();
            if held.route_key == kick.route_key {
                meant = Some(held.connection.clone());
            }
        }
        if meant.is_none() && unanswered {
            self.early.push(kick.clone());
        }
        meant
    }

    /// A new stream: what was not answered is asked again.
    pub fn forget_early_kicks(&mut self) {
        self.early.clear();
    }

    fn of_device(&self, user_id: i64, device_id: &str) -> impl Iterator<Item = &Held> {
        let first = (user_id, device_id.to_owned(), String::new());
        self.held.range(first..).take_while(move |(key, _)| key.0 == user_id && key.1 == device_id).map(|(_, held)| held)
    }
}

impl Held {
    fn bound(&self) -> pb::Bound {
        let (user_id, device_id, conn_id) = key(&self.connection);
        pb::Bound { user_id, device_id, conn_id, connected_ms_ago: ms_ago(self.since) }
    }
}

fn key(connection: &Connection) -> Key {
    (connection.user_id, connection.device_id.clone(), connection.conn_id.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_alice(conn_id: &str) -> Connection {
        Connection { user_id: 1, device_id: "phone".to_owned(), conn_id: conn_id.to_owned(), ..Connection::default() }
    }

    fn kick(route_key: &str) -> pb::Kick {
        let (device_id, route_key) = ("phone".to_owned(), route_key.to_owned());
        pb::Kick { user_id: 1, device_id, route_key, ..Default::default() }
    }

    #[test]
    fn a_kick_means_the_connection_whose_bind_it_names_and_once() {
        let mut connections = Connections::default();
        for conn in ["a", "b"] {
            connections.insert(&of_alice(conn));
            assert_eq!(connections.bound(&of_alice(conn), conn), None);
        }
        assert_eq!(connections.kicked(&kick("a")), Some(of_alice("a")));
        assert_eq!(connections.kicked(&kick("a")), None);
        assert_eq!(connections.all().collect::<Vec<_>>(), [&of_alice("b")]);
    }

    #[test]
    fn a_kick_that_overtakes_the_answer_to_its_bind_waits_for_it() {
        let mut connections = Connections::default();
        connections.insert(&of_alice("a"));
        assert_eq!(connections.kicked(&kick("key")), None);
        let waited = connections.bound(&of_alice("a"), "key").expect("it waited");
        assert_eq!(connections.kicked(&waited), Some(of_alice("a")));
    }

    #[test]
    fn a_device_that_connects_anew_is_as_idle_as_it_says_and_is_bound_again_as_it_is_now() {
        let mut connections = Connections::default();
        connections.insert(&of_alice("a"));
        connections.set_idle(1, "phone", true);
        let idle = |connections: &Connections, conn| connections.bind_request(&of_alice(conn)).map(|request| request.idle);
        assert_eq!((connections.is_idle(1, "phone"), idle(&connections, "a")), (Some(true), Some(true)));
        connections.insert(&of_alice("b"));
        assert_eq!((connections.is_idle(1, "phone"), idle(&connections, "b")), (Some(false), Some(false)));
        connections.set_idle(1, "laptop", true);
        assert_eq!((connections.is_idle(1, "phone"), connections.is_idle(1, "laptop")), (Some(false), None));
    }

    #[test]
    fn the_digest_is_of_who_is_held_however_they_came_and_went() {
        let mut connections = Connections::default();
        for conn in ["a", "b", "b", "c", "d", "e"] {
            connections.insert(&of_alice(conn));
            connections.bound(&of_alice(conn), conn);
        }
        assert_eq!(connections.digest().1, 5);
        connections.refused(&of_alice("a"));
        connections.ended(1, "phone", "b");
        connections.kicked(&kick("c"));
        connections.kicked(&kick("c"));
        connections.ended(1, "phone", "d");
        assert_eq!(connections.digest(), (element(1, "phone", "e"), 1));
        let named = |conn_id: &str| pb::Bound {
            user_id: 1,
            device_id: "phone".to_owned(),
            conn_id: conn_id.to_owned(),
            ..Default::default()
        };
        assert_eq!((connections.named(&named("e")), connections.named(&named("a"))), (Some(&of_alice("e")), None));
    }

    #[test]
    fn only_a_connection_whose_bind_was_not_answered_may_still_be_bound() {
        let mut connections = Connections::default();
        connections.insert(&of_alice("a"));
        connections.insert(&of_alice("b"));
        connections.bound(&of_alice("b"), "key");
        assert!(connections.ended(1, "phone", "a"));
        assert!(!connections.ended(1, "phone", "b"));
        assert!(!connections.ended(1, "phone", "b"), "it has ended before");
        assert_eq!(connections.bind_request(&of_alice("b")), None);
    }
}
