//! What a gateway is asked of its connections, and which answers are legal.

use crate::domain::digest::BUCKETS;
use crate::domain::digest::Held;
use crate::domain::digest::Sum;
use crate::domain::digest::Sums;
use crate::domain::digest::bucket;

/// Connections that one answer should name in all its frames: as many buckets are asked for at once as have no more.
pub const ASKED_AT_ONCE: u64 = 50_000;
/// Of an answer that names more nothing is kept: the gateway has grown a lot since it said how many it holds, or one bucket is so
/// full.
pub const MAX_HELD: usize = 200_000;

/// What a gateway is asked, or told.
#[derive(Clone, Debug, PartialEq)]
pub enum Query {
    /// The sums of all buckets.
    Sums,
    /// The connections of these buckets.
    List(Vec<u8>),
    /// These connections have no route. There is no answer.
    BindAgain(Vec<Held>),
}

/// One frame of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    pub sums: Vec<(u8, Sum)>,
    pub held: Vec<Held>,
    /// Another frame follows.
    pub more: bool,
}

/// Why an answer ends the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Illegal {
    #[error("nobody has asked for it")]
    Unasked,
    #[error("bucket {0} was not asked for")]
    OtherBucket(u8),
}

/// A question that is not answered yet, and what is known of its answer.
#[derive(Clone, Debug)]
pub struct Asked {
    seq: u64,
    /// None: their sums are asked for, not what they hold.
    listed: Option<[bool; BUCKETS]>,
    pub sums: Sums,
    pub held: Vec<Held>,
    /// It names more than [`MAX_HELD`] connections, and nothing is kept of it.
    pub is_too_long: bool,
}

/// Buckets that may be asked for together: each group has at most [`ASKED_AT_ONCE`] connections by `sums`, or is one bucket.
pub fn groups(buckets: &[u8], sums: &Sums) -> Vec<Vec<u8>> {
    let mut groups: Vec<(u64, Vec<u8>)> = Vec::new();
    for bucket in buckets {
        let routes = sums.of(*bucket).routes;
        match groups.last_mut() {
            Some((sum, group)) if *sum + routes <= ASKED_AT_ONCE => {
                *sum += routes;
                group.push(*bucket);
            }
            _ => groups.push((routes, vec![*bucket])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

impl Asked {
    /// None: the query wants no answer.
    pub fn new(seq: u64, query: &Query) -> Option<Self> {
        let listed = match query {
            Query::Sums => None,
            Query::List(buckets) => {
                let mut listed = [false; BUCKETS];
                buckets.iter().for_each(|bucket| listed[usize::from(*bucket)] = true);
                Some(listed)
            }
            Query::BindAgain(_) => return None,
        };
        Some(Self { seq, listed, sums: Sums::default(), held: Vec::new(), is_too_long: false })
    }

    /// Takes a part of the answer. True: it is whole now.
    pub fn take(&mut self, seq: u64, part: Part) -> Result<bool, Illegal> {
        if seq != self.seq {
            return Err(Illegal::Unasked);
        }
        let was_asked = |bucket: u8| self.listed.is_none_or(|listed| listed[usize::from(bucket)]);
        let may_be_listed = |held: &Held| self.listed.is_some_and(|listed| listed[usize::from(bucket(held.user))]);
        if let Some((other, _)) = part.sums.iter().find(|(bucket, _)| !was_asked(*bucket)) {
            return Err(Illegal::OtherBucket(*other));
        }
        if let Some(held) = part.held.iter().find(|held| !may_be_listed(held)) {
            return Err(Illegal::OtherBucket(bucket(held.user)));
        }
        part.sums.into_iter().for_each(|(bucket, sum)| self.sums.set(bucket, sum));
        self.is_too_long |= self.held.len() + part.held.len() > MAX_HELD;
        match self.is_too_long {
            true => self.held = Vec::new(),
            false => self.held.extend(part.held),
        }
        Ok(!part.more)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::id::ConnId;
    use crate::domain::id::DeviceId;
    use crate::domain::id::UserId;

    fn held(id: i64) -> Held {
        let (device, conn) = (DeviceId::parse("phone").unwrap(), ConnId::parse("c").unwrap());
        Held::new(UserId::parse(id).unwrap(), device, conn, Duration::ZERO)
    }

    #[test]
    fn an_answer_comes_in_parts_and_says_what_was_asked() {
        let mut list = Asked::new(7, &Query::List(vec![1, 3])).unwrap();
        let part = |users: &[i64], more| Part { held: users.iter().map(|id| held(*id)).collect(), more, ..Part::default() };
        assert_eq!(list.take(7, part(&[1, 257], true)), Ok(false));
        assert_eq!(list.take(6, part(&[1], false)), Err(Illegal::Unasked));
        assert_eq!(list.take(7, part(&[3, 2], false)), Err(Illegal::OtherBucket(2)));
        assert_eq!(list.take(7, part(&[3], false)), Ok(true));
        assert_eq!(list.held, [held(1), held(257), held(3)]);
        assert!(Asked::new(8, &Query::BindAgain(vec![held(1)])).is_none());
    }

    #[test]
    fn an_answer_that_is_too_long_is_no_crime_and_nothing_is_kept_of_it() {
        let mut list = Asked::new(7, &Query::List(vec![1])).unwrap();
        let of_many = |more| Part { held: vec![held(1); MAX_HELD / 2], more, ..Part::default() };
        assert_eq!([list.take(7, of_many(true)), list.take(7, of_many(true))], [Ok(false); 2]);
        assert_eq!((list.held.len(), list.is_too_long), (MAX_HELD, false));
        assert_eq!(list.take(7, Part { held: vec![held(1)], more: true, ..Part::default() }), Ok(false));
        assert_eq!(list.take(7, of_many(false)), Ok(true));
        assert_eq!((list.held.len(), list.is_too_long), (0, true));
    }

    #[test]
    fn buckets_are_asked_for_together_as_long_as_they_are_not_too_many_connections() {
        let mut sums = Sums::default();
        let sizes = [(0, 20_000), (1, 20_000), (2, 10_000), (3, 1), (4, 90_000), (6, 5)];
        sizes.into_iter().for_each(|(bucket, routes)| sums.set(bucket, Sum { digest: 0, routes }));
        assert_eq!(groups(&[0, 1, 2, 3, 4, 5, 6], &sums), [vec![0, 1, 2], vec![3], vec![4], vec![5, 6]]);
        assert!(groups(&[], &sums).is_empty());
    }

    #[test]
    fn who_is_asked_for_sums_lists_nothing() {
        let mut sums = Asked::new(1, &Query::Sums).unwrap();
        let of_two = (2, Sum { digest: 5, routes: 1 });
        assert_eq!(sums.take(1, Part { held: vec![held(1)], ..Part::default() }), Err(Illegal::OtherBucket(1)));
        assert_eq!(sums.take(1, Part { sums: vec![of_two], ..Part::default() }), Ok(true));
        assert_eq!(sums.sums.total(), of_two.1);
    }
}
