//! What a gateway holds, as numbers that nodes compare with the database's, and as lists of it. See `routes_digest` in
//! `proto/mpim/gateway.proto`.

use std::collections::BTreeMap;

use im_presence_proto as pb;
use ring::digest::SHA256;
use ring::digest::digest;

const BUCKETS: usize = 256;
/// Connections in one frame of an answer, at most.
const PER_FRAME: usize = 10_000;

/// A connection's part in a digest.
pub fn element(user_id: i64, device_id: &str, conn_id: &str) -> u64 {
    let hash = digest(&SHA256, format!("{user_id}/{device_id}/{conn_id}").as_bytes());
    hash.as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn bucket(user_id: i64) -> u8 {
    user_id.to_le_bytes()[0]
}

/// Whether a query wants to know of this user.
pub fn is_asked(query: &pb::DigestQuery, user_id: i64) -> bool {
    query.buckets.is_empty() || query.buckets.contains(&bucket(user_id).into())
}

/// The parts of all connections, joined by bucket of users.
pub struct Digest([(u64, u32); BUCKETS]);

impl Default for Digest {
    fn default() -> Self {
        Self([(0, 0); BUCKETS])
    }
}

impl Digest {
    pub fn add(&mut self, user_id: i64, element: u64) {
        let (digest, routes) = &mut self.0[usize::from(bucket(user_id))];
        (*digest, *routes) = (*digest ^ element, *routes + 1);
    }

    pub fn remove(&mut self, user_id: i64, element: u64) {
        let (digest, routes) = &mut self.0[usize::from(bucket(user_id))];
        (*digest, *routes) = (*digest ^ element, *routes - 1);
    }

    /// Of all, and how many they are.
    pub fn total(&self) -> (u64, u32) {
        self.0.iter().fold((0, 0), |(digest, routes), (more, count)| (digest ^ more, routes + count))
    }

    /// What answers a query; `bound` are all connections, or those that are asked for.
    pub fn answer(&self, query: &pb::DigestQuery, bound: impl Iterator<Item = pb::Bound>) -> Vec<pb::DigestAnswer> {
        if !query.list {
            let of = |(bucket, (digest, routes))| pb::BucketDigest { bucket, digest, routes, bound: Vec::new() };
            let buckets = (0..).zip(self.0).map(of).filter(|of| is_asked(query, of.bucket.into())).collect();
            return vec![pb::DigestAnswer { buckets, more: false }];
        }
        let mut listed = bound.filter(|bound| is_asked(query, bound.user_id)).peekable();
        let mut frames = Vec::new();
        while frames.is_empty() || listed.peek().is_some() {
            let mut buckets = BTreeMap::<u32, Vec<pb::Bound>>::new();
            for bound in listed.by_ref().take(PER_FRAME) {
                buckets.entry(bucket(bound.user_id).into()).or_default().push(bound);
            }
            let buckets = buckets.into_iter().map(|(bucket, bound)| pb::BucketDigest { bucket, bound, ..self.of(bucket) });
            frames.push(pb::DigestAnswer { buckets: buckets.collect(), more: listed.peek().is_some() });
        }
        frames
    }

    fn of(&self, bucket: u32) -> pb::BucketDigest {
        let (digest, routes) = usize::try_from(bucket).ok().and_then(|bucket| self.0.get(bucket)).copied().unwrap_or_default();
        pb::BucketDigest { bucket, digest, routes, bound: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(user_id: i64) -> pb::Bound {
        pb::Bound { user_id, device_id: "phone".to_owned(), conn_id: "c".to_owned(), connected_ms_ago: 1 }
    }

    fn holding(users: &[i64]) -> Digest {
        let mut digest = Digest::default();
        users.iter().for_each(|user| digest.add(*user, element(*user, "phone", "c")));
        digest
    }

    #[test]
    fn an_element_is_what_nodes_compute() {
        // python3 -c 'import hashlib; print(hashlib.sha256(b"7/phone/c-1").hexdigest()[:16])'
        assert_eq!(format!("{:016x}", element(7, "phone", "c-1")), "8efa2907bdda15e9");
    }

    #[test]
    fn what_comes_and_goes_leaves_nothing_behind() {
        let mut digest = holding(&[1, 2, 257]);
        assert_eq!(digest.total().1, 3);
        [1, 257, 2].iter().for_each(|user| digest.remove(*user, element(*user, "phone", "c")));
        assert_eq!(digest.total(), (0, 0));
    }

    #[test]
    fn lists_name_the_connections_of_the_buckets_that_were_asked_for_in_frames_of_bounded_size() {
        let users = [1, 2, 3, 257];
        let digest = holding(&users);
        let sums = digest.answer(&pb::DigestQuery::default(), std::iter::empty());
        let [pb::DigestAnswer { buckets, more: false }] = &sums[..] else { panic!("{sums:?}") };
        assert_eq!((buckets.len(), buckets[1].routes, buckets[4].routes), (256, 2, 0));
        let query = |buckets: &[u32]| pb::DigestQuery { buckets: buckets.to_vec(), list: true, ..Default::default() };
        let frames = digest.answer(&query(&[1, 9]), users.into_iter().map(bound));
        let [pb::DigestAnswer { buckets, more: false }] = &frames[..] else { panic!("{frames:?}") };
        assert_eq!((buckets.len(), &buckets[0].bound), (1, &vec![bound(1), bound(257)]));
        assert_eq!(digest.answer(&query(&[9]), users.into_iter().map(bound)), [pb::DigestAnswer::default()]);
        let many = digest.answer(&query(&[]), (1..=PER_FRAME as i64 + 1).map(bound));
        let shape = |frame: &pb::DigestAnswer| (frame.buckets.iter().map(|of| of.bound.len()).sum::<usize>(), frame.more);
        assert_eq!(many.iter().map(shape).collect::<Vec<_>>(), [(PER_FRAME, true), (1, false)]);
    }
}
