//! What came of a look at what a gateway holds: as a label to count by, and as words for an operator.

use std::fmt;

use crate::domain::digest::Difference;
use crate::domain::digest::asking::MAX_HELD;

pub enum Verdict {
    Equal,
    /// What differed is too young to be judged, or was gone, or another thing, at the second look.
    UnderWay,
    Differs(Difference),
    /// Routes that were unbound, connections whose gateway was told.
    Mended {
        ghosts: u64,
        missing: u64,
    },
    /// The same, but the database did not do all of it. The next look finds the rest.
    Failed {
        ghosts: u64,
        missing: u64,
    },
    /// `differ` of them at least.
    Refused {
        differ: u64,
        routes: u64,
    },
    /// The gateway did not answer, or gives no digest any more.
    Silent,
    /// The gateway named more than [`MAX_HELD`] connections in one answer.
    TooLong,
}

impl Verdict {
    pub fn label(&self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::UnderWay => "under_way",
            Self::Differs(_) => "differs",
            Self::Mended { .. } => "mended",
            Self::Failed { .. } => "failed",
            Self::Refused { .. } => "refused",
            Self::Silent => "silent",
            Self::TooLong => "too_long",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equal => f.write_str("equal"),
            Self::UnderWay => f.write_str("under way"),
            Self::Differs(found) => write!(f, "{} ghosts, {} missing", found.ghosts.len(), found.missing.len()),
            Self::Mended { ghosts, missing } => write!(f, "mended: {ghosts} ghosts, {missing} missing"),
            Self::Failed { ghosts, missing } => write!(f, "failed, mended: {ghosts} ghosts, {missing} missing"),
            Self::Refused { differ, routes } => {
                write!(f, "refused: at least {} % differ", (differ * 100 / (*routes).max(1)).min(100))
            }
            Self::Silent => f.write_str("no answer"),
            Self::TooLong => write!(f, "not compared: more than {MAX_HELD} connections in one answer"),
        }
    }
}
