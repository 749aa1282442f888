//! Identifiers, parsed once at the edge. Behind it no string is checked again.

use std::collections::HashMap;
use std::collections::HashSet;
use std::fmt;
use std::hash::BuildHasherDefault;
use std::hash::Hasher;

use compact_str::CompactString;

use crate::domain::time::Timestamp;

/// Longest device id, connection id and message id.
pub const MAX_NAME_BYTES: usize = 128;
/// Longest gateway address.
pub const MAX_ADDR_BYTES: usize = 255;

/// Why a text is no identifier. Reads after the name of the field: "must be ...".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidId(String);

impl InvalidId {
    pub fn new(reason: String) -> Self {
        Self(reason)
    }
}

/// A user, as the account service numbers them: above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UserId(i64);

impl UserId {
    pub fn parse(raw: i64) -> Result<Self, InvalidId> {
        if raw > 0 { Ok(Self(raw)) } else { Err(InvalidId(format!("must be above 0, is {raw}"))) }
    }

    pub fn get(self) -> i64 {
        self.0
    }

    /// The same number on every node and in every build: it decides lanes and shards.
    pub fn hash(self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&self.0.to_le_bytes())
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether `raw` is `min` to `max` bytes of printable ASCII without spaces.
pub fn check_ascii(raw: &str, min: usize, max: usize) -> Result<(), InvalidId> {
    if raw.len() < min || raw.len() > max {
        return Err(InvalidId(format!("must be {min} to {max} bytes, is {}", raw.len())));
    }
    if !raw.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(InvalidId("must be printable ASCII without spaces".to_owned()));
    }
    Ok(())
}

macro_rules! ascii_id {
    ($(#[$doc:meta])* $name:ident, $min:expr, $max:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(CompactString);

        impl $name {
            pub fn parse(raw: &str) -> Result<Self, InvalidId> {
                check_ascii(raw, $min, $max).map(|()| Self(CompactString::new(raw)))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }

            pub fn is_empty(&self) -> bool {
                self.0.is_empty()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

ascii_id!(
    /// Where a gateway is reached, `host:port` by custom: 1 to 255 bytes of printable ASCII without spaces.
    GatewayAddr, 1, MAX_ADDR_BYTES
);
ascii_id!(
    /// One login of a user; empty is the user's one unnamed device.
    DeviceId, 0, MAX_NAME_BYTES
);
ascii_id!(
    /// The gateway's name for one client connection; empty says nothing and equals nothing.
    ConnId, 0, MAX_NAME_BYTES
);

/// Between a version and the next one. What is shown of a user also changes without a change of the record, when gateways die:
/// these numbers are for it.
pub const VERSION_GAP: u64 = 64;

/// The number of a user's newest change. Grows with every committed change and never repeats, not even after the user was
/// erased and made again, or the database was set back: it is the larger of the former version + [`VERSION_GAP`] and the
/// database's clock in microseconds. Below 2^53, so scripts and browsers read it exactly. 0: no such user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl Version {
    pub const NONE: Version = Version(0);
    /// Greater than any that there is.
    pub const MAX: Version = Version(1 << 53);

    /// Changes made before `time` have smaller versions, as far as the database's clock was right.
    pub fn at(time: Timestamp) -> Self {
        Self(u64::try_from(time.0).unwrap_or(0).saturating_mul(1_000))
    }

    /// The version after this one, at `clock` or later.
    pub fn next(self, clock: Version) -> Version {
        Version((self.0 + VERSION_GAP).max(clock.0))
    }
}

/// One life of a gateway, unique over all gateways, issued by SQL and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// A map by users or epochs. They are numbers that this system issues, so nobody can choose them to collide.
pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// A set of lives.
pub type Epochs = HashSet<Epoch, BuildHasherDefault<NumberHasher>>;

/// Mixes one number well, in a few cycles.
#[derive(Clone, Copy, Default)]
pub struct NumberHasher(u64);

/// Odd, and about half of their bits are set.
const FIRST: u64 = 0x9e37_79b9_7f4a_7c15;
const SECOND: u64 = 0xd6e8_feb8_6659_fd93;

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = u128::from(self.0 ^ number ^ FIRST).wrapping_mul(u128::from(SECOND));
        self.0 = (mixed >> 64) as u64 ^ mixed as u64;
    }

    fn write_i64(&mut self, number: i64) {
        self.write_u64(number.cast_unsigned());
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, want: Result<(), &str>) {
        let got = DeviceId::parse(raw).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(got, want.map_err(str::to_owned), "device id {raw:?}");
    }

    #[test]
    fn identifiers_are_short_printable_ascii() {
        check("", Ok(()));
        check("007", Ok(()));
        check(&"x".repeat(128), Ok(()));
        check(&"x".repeat(129), Err("must be 0 to 128 bytes, is 129"));
        check("my phone", Err("must be printable ASCII without spaces"));
        check("tab\t", Err("must be printable ASCII without spaces"));
        check("é", Err("must be printable ASCII without spaces"));
        assert!(GatewayAddr::parse("").is_err());
        assert!(GatewayAddr::parse(&"g".repeat(256)).is_err());
    }

    #[test]
    fn users_are_numbered_from_one() {
        assert!(UserId::parse(1).is_ok());
        for raw in [0, -1, i64::MIN] {
            assert!(UserId::parse(raw).is_err(), "{raw}");
        }
    }

    #[test]
    fn neighbours_are_spread_over_all_bits_of_their_hash() {
        let hash = |number: i64| {
            let mut hasher = NumberHasher::default();
            hasher.write_i64(number);
            hasher.finish()
        };
        // Maps take shards and slots from the low bits and tags from the high ones.
        for stride in [1, 2, 16, 1_000, 1 << 20, 1 << 40] {
            for shift in [0, 8, 32, 52, 56] {
                let mut seen = [0_u32; 256];
                (1..=25_600).for_each(|n| seen[(hash(n * stride) >> shift) as usize % 256] += 1);
                let (least, most) = (seen.iter().min().unwrap(), seen.iter().max().unwrap());
                assert!(*least > 40 && *most < 180, "stride {stride}, bits from {shift}: {least} to {most} of about 100");
            }
        }
    }

    #[test]
    fn a_version_follows_the_clock_but_never_stands_still() {
        assert_eq!(Version(5).next(Version(100)), Version(100));
        assert_eq!(Version(100).next(Version(100)), Version(164));
        assert_eq!(Version(100).next(Version(7)), Version(164));
        assert_eq!(Version(100).next(Version(163)), Version(164));
    }
}
