//! Who gets into a full L1: whoever is asked for again. Of a batch that asks for everybody once nobody would stay, and to put a
//! user into moka, and another out of it, takes a quarter of such a batch's time (bench `release`).
//!
//! The doorkeeper of TinyLFU (Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy") is a Bloom
//! filter that is emptied now and then. This one forgets somebody for each that it learns, and has nothing to empty.

use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use crate::domain::id::UserId;

/// As many as L1 has, but no more than 16 MiB.
const MAX_PLACES: u64 = 1 << 22;

pub(super) struct Doorkeeper {
    /// Who came last, of the users that have this place in common: a part of their hash.
    places: Box<[AtomicU32]>,
}

impl Doorkeeper {
    pub fn new(capacity: u64) -> Self {
        let places = capacity.min(MAX_PLACES).next_power_of_two();
        Self { places: (0..places).map(|_| AtomicU32::new(0)).collect() }
    }

    /// Whether `user` has come lately; from now on they have. One time in 2^32 another user is taken for them.
    pub fn knows(&self, user: UserId) -> bool {
        let hash = user.hash();
        let (place, mark) = (hash as usize & (self.places.len() - 1), (hash >> 32) as u32);
        self.places[place].swap(mark, Ordering::Relaxed) == mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(range: std::ops::RangeInclusive<i64>) -> impl Iterator<Item = UserId> {
        range.map(|user| UserId::parse(user).unwrap())
    }

    #[test]
    fn whoever_comes_again_soon_is_known_and_whoever_comes_after_many_others_is_not() {
        const PLACES: i64 = 1_000;
        let doorkeeper = Doorkeeper::new(PLACES as u64);
        let known = |range| users(range).filter(|user| doorkeeper.knows(*user)).count();
        assert_eq!(known(1..=10), 0);
        assert_eq!(known(1..=10), 10);
        assert_eq!(known(11..=20 * PLACES), 0);
        assert_eq!(known(1..=10), 0);
    }
}
