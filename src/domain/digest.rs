//! What a gateway and the database believe to be bound, as one number each: if the numbers are equal, so are the beliefs. If
//! not, 256 numbers tell where to look, and lists what differs.
//!
//! Both are asked at slightly different times, and a gateway never stands still. So a difference counts only if it is there
//! twice, in the same way, with a while between.

pub mod asking;

use std::collections::BTreeSet;
use std::collections::HashSet;
use std::time::Duration;

use ring::digest::Context;
use ring::digest::SHA256;

use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::time::Timestamp;

/// Users are divided by `user_id & 255`.
pub const BUCKETS: usize = 256;
/// So many differences are believed of any gateway, however few routes it has.
const ALWAYS_BELIEVED: u64 = 100;

/// A connection's part in a digest: the first 8 bytes of SHA-256 of `<user_id>/<device_id>/<conn_id>`, which any language has at
/// hand. Parts are joined by XOR.
pub fn element(user: UserId, device: &DeviceId, conn: &ConnId) -> u64 {
    let mut hash = Context::new(&SHA256);
    hash.update(format!("{user}/{device}/{conn}").as_bytes());
    hash.finish().as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

pub fn bucket(user: UserId) -> u8 {
    user.get().to_le_bytes()[0]
}

/// Elements, joined, and how many they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub digest: u64,
    pub routes: u64,
}

/// The same for each bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sums([Sum; BUCKETS]);

/// A connection as its gateway knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub user: UserId,
    pub device: DeviceId,
    pub conn: ConnId,
    pub element: u64,
    /// How long ago the client connected.
    pub ago: Duration,
}

/// A route as the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub user: UserId,
    pub conn: ConnId,
    pub bound_version: Version,
    pub bound_at: Timestamp,
    /// What the row ought to say.
    pub element: u64,
    /// What it says: a node of the last release writes 0, or leaves what was there.
    pub digest: u64,
}

/// Routes without a connection, and connections without a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    pub ghosts: Vec<Stored>,
    pub missing: Vec<Held>,
    /// How many of both there are besides that are too young to say anything.
    pub young: u64,
}

impl Default for Sums {
    fn default() -> Self {
        Self([Sum::default(); BUCKETS])
    }
}

impl Sum {
    pub fn add(&mut self, other: Self) {
        self.digest ^= other.digest;
        self.routes += other.routes;
    }
}

impl Sums {
    pub fn add(&mut self, user: UserId, element: u64) {
        self.0[usize::from(bucket(user))].add(Sum { digest: element, routes: 1 });
    }

    pub fn of(&self, bucket: u8) -> Sum {
        self.0[usize::from(bucket)]
    }

    pub fn set(&mut self, bucket: u8, sum: Sum) {
        self.0[usize::from(bucket)] = sum;
    }

    pub fn total(&self) -> Sum {
        let mut total = Sum::default();
        self.0.iter().for_each(|sum| total.add(*sum));
        total
    }

    /// The buckets that are not the same in both.
    pub fn differing(&self, other: &Self) -> Vec<u8> {
        (0..=u8::MAX).filter(|bucket| self.0[usize::from(*bucket)] != other.0[usize::from(*bucket)]).collect()
    }
}

impl Held {
    pub fn new(user: UserId, device: DeviceId, conn: ConnId, ago: Duration) -> Self {
        let element = element(user, &device, &conn);
        Self { user, device, conn, element, ago }
    }
}

/// Users of whom an element is only in one of both lists: who has to be looked at.
pub fn suspects(held: &[Held], stored: &[(UserId, u64)]) -> BTreeSet<UserId> {
    let mut unmatched: HashSet<(UserId, u64)> = held.iter().map(|held| (held.user, held.element)).collect();
    let of_rows = stored.iter().filter(|row| !unmatched.remove(row)).map(|(user, _)| *user).collect::<BTreeSet<_>>();
    of_rows.into_iter().chain(unmatched.into_iter().map(|(user, _)| user)).collect()
}

impl Difference {
    /// What differs, and is older than `settled` at `now`: anything younger may be under way.
    pub fn of(held: &[Held], stored: Vec<Stored>, now: Timestamp, settled: Duration) -> Self {
        let there: HashSet<u64> = held.iter().map(|held| held.element).collect();
        let routed: HashSet<u64> = stored.iter().map(|route| route.element).collect();
        let mut found = Self::default();
        for held in held.iter().filter(|held| !routed.contains(&held.element)) {
            match held.ago >= settled {
                true => found.missing.push(held.clone()),
                false => found.young += 1,
            }
        }
        for route in stored.into_iter().filter(|route| !there.contains(&route.element)) {
            match now.since(route.bound_at) >= settled {
                true => found.ghosts.push(route),
                false => found.young += 1,
            }
        }
        found
    }

    /// Takes over what differs elsewhere.
    pub fn add(&mut self, other: Self) {
        self.ghosts.extend(other.ghosts);
        self.missing.extend(other.missing);
        self.young += other.young;
    }

    /// What differs in the same way again: the very same bind, the very same connection.
    pub fn still_in(self, again: Self) -> Self {
        let ghosts: HashSet<(UserId, Version)> = self.ghosts.iter().map(|route| (route.user, route.bound_version)).collect();
        let missing: HashSet<u64> = self.missing.iter().map(|held| held.element).collect();
        let is_still_ghost = |route: &Stored| ghosts.contains(&(route.user, route.bound_version));
        Self {
            ghosts: again.ghosts.into_iter().filter(is_still_ghost).collect(),
            missing: again.missing.into_iter().filter(|held| missing.contains(&held.element)).collect(),
            young: 0,
        }
    }

    pub fn len(&self) -> u64 {
        (self.ghosts.len() + self.missing.len()) as u64
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What may be believed of a gateway with so many routes: the larger of `share` of them and a few.
    pub fn credible(share: f64, routes: u64) -> u64 {
        ((routes as f64 * share) as u64).max(ALWAYS_BELIEVED)
    }

    /// Where it is.
    pub fn buckets(&self) -> Vec<u8> {
        let users = self.ghosts.iter().map(|route| route.user).chain(self.missing.iter().map(|held| held.user));
        users.map(bucket).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_000_000);
    const SETTLED: Duration = Duration::from_secs(10);

    fn user(id: i64) -> UserId {
        UserId::parse(id).unwrap()
    }

    fn held(id: i64, conn: &str, ago_s: u64) -> Held {
        let (device, conn) = (DeviceId::parse("phone").unwrap(), ConnId::parse(conn).unwrap());
        Held::new(user(id), device, conn, Duration::from_secs(ago_s))
    }

    fn stored(id: i64, conn: &str, version: u64, ago_s: u64) -> Stored {
        let Held { user, conn, element, .. } = held(id, conn, 0);
        let bound_at = NOW.minus(Duration::from_secs(ago_s));
        Stored { user, conn, bound_version: Version(version), bound_at, element, digest: element }
    }

    fn differ(held: &[Held], stored: &[Stored]) -> Difference {
        Difference::of(held, stored.to_vec(), NOW, SETTLED)
    }

    #[test]
    fn an_element_is_what_other_languages_compute() {
        let (device, conn) = (DeviceId::parse("phone").unwrap(), ConnId::parse("c-1").unwrap());
        // python3 -c 'import hashlib; print(hashlib.sha256(b"7/phone/c-1").hexdigest()[:16])'
        assert_eq!(format!("{:016x}", element(user(7), &device, &conn)), "8efa2907bdda15e9");
    }

    #[test]
    fn sums_are_equal_whatever_the_order_and_tell_where_they_are_not() {
        let sums = |elements: &[(i64, u64)]| {
            let mut sums = Sums::default();
            elements.iter().for_each(|(id, element)| sums.add(user(*id), *element));
            sums
        };
        let (one, other) = (sums(&[(1, 5), (2, 6), (257, 7)]), sums(&[(257, 7), (2, 6), (1, 5)]));
        assert_eq!((one.differing(&other), one.total()), (vec![], Sum { digest: 5 ^ 6 ^ 7, routes: 3 }));
        assert_eq!(one.differing(&sums(&[(1, 5), (2, 6)])), [1]);
        assert_eq!(one.differing(&sums(&[(1, 5), (2, 6), (257, 7), (3, 9), (259, 9)])), [3], "an element twice is counted");
    }

    #[test]
    fn only_users_with_an_element_on_one_side_are_looked_at() {
        let rows = [stored(1, "a", 1, 60), stored(2, "b", 2, 60), stored(4, "d", 4, 60)].map(|row| (row.user, row.element));
        let list = [held(1, "a", 60), held(2, "new", 60), held(3, "c", 60)];
        let found: Vec<i64> = suspects(&list, &rows).into_iter().map(UserId::get).collect();
        assert_eq!(found, [2, 3, 4]);
        assert!(suspects(&list[..1], &[(user(1), 0)]).contains(&user(1)), "a row without a digest");
    }

    #[test]
    fn what_differs_is_what_one_side_has_for_a_while() {
        let (both, ghost, missing) = (stored(1, "a", 1, 60), stored(2, "b", 2, 60), held(3, "c", 60));
        let young = (stored(4, "d", 4, 9), held(5, "e", 9));
        let found = differ(&[held(1, "a", 60), missing.clone(), young.1], &[both, ghost.clone(), young.0]);
        assert_eq!(found, Difference { ghosts: vec![ghost], missing: vec![missing], young: 2 });
        assert_eq!((found.len(), found.buckets()), (2, vec![2, 3]));
    }

    #[test]
    fn a_difference_counts_if_it_is_the_same_twice() {
        let first = differ(&[held(3, "c", 60), held(4, "d", 60)], &[stored(1, "a", 1, 60), stored(2, "b", 2, 60)]);
        // User 1 was bound anew, user 4 has another connection.
        let again = differ(&[held(3, "c", 70), held(4, "e", 70)], &[stored(1, "a", 11, 60), stored(2, "b", 2, 70)]);
        let sure = first.still_in(again);
        assert_eq!(sure, Difference { ghosts: vec![stored(2, "b", 2, 70)], missing: vec![held(3, "c", 70)], young: 0 });
    }

    #[test]
    fn a_few_differences_are_believed_of_any_gateway_and_a_share_of_a_large_one() {
        for (share, routes, want) in [(0.1, 0, 100), (0.1, 1_000, 100), (0.1, 2_009, 200), (0.0, 1_000_000, 100), (1.0, 101, 101)]
        {
            assert_eq!(Difference::credible(share, routes), want, "{share} of {routes}");
        }
    }
}
