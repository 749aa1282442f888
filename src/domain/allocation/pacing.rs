//! Log-ins of one gateway, one after the other: the generic cell rate algorithm, whose whole state is one point in time.

use std::time::Duration;

/// Of a gateway that takes `rate` log-ins a second from all `nodes`, when its next one may come was said to be `next`: how long
/// this one has to wait from `now` on, and when the one after it may come. Points in time are microseconds since the same start.
pub fn paced(next: u64, now: u64, nodes: u32, rate: u32) -> (Duration, u64) {
    let begin = next.max(now);
    let apart = u64::from(nodes) * 1_000_000 / u64::from(rate.max(1));
    (Duration::from_micros(begin - now), begin + apart)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_ins_that_come_at_once_are_told_to_come_one_after_the_other() {
        let (mut next, mut waits) = (0, Vec::new());
        for _ in 0..4 {
            let (wait, then) = paced(next, 1_000_000, 2, 500);
            waits.push(wait.as_millis());
            next = then;
        }
        assert_eq!(waits, [0, 4, 8, 12], "500 a second from both nodes: each of them 250");
        assert_eq!(paced(next, 60_000_000, 2, 500).0, Duration::ZERO, "nothing is saved up, nothing is owed");
    }
}
