//! What gateways say of their connections, and are asked, on the wire.

use std::time::Duration;

use crate::api::convert;
use crate::domain::digest::BUCKETS;
use crate::domain::digest::Held;
use crate::domain::digest::Sum;
use crate::domain::digest::asking::Part;
use crate::domain::digest::asking::Query;
use crate::error::Error;
use crate::pb;
use crate::pb::node_frame::Body as Down;

/// Connections in one frame of an answer.
const MAX_BOUND: usize = 10_000;

/// What a heartbeat says of its gateway's connections. None: nothing.
pub fn said(beat: &pb::HeartbeatReq) -> Option<Sum> {
    beat.routes_digest.map(|digest| Sum { digest, routes: beat.routes.into() })
}

/// # Errors
/// [`Error::Invalid`] names what is wrong.
pub fn part(answer: pb::DigestAnswer) -> Result<Part, Error> {
    convert::at_most("buckets", answer.buckets.len(), BUCKETS, "buckets")?;
    convert::at_most(
        "bound",
        answer.buckets.iter().map(|bucket| bucket.bound.len()).sum(),
        MAX_BOUND,
        "connections in one frame",
    )?;
    let mut part = Part { more: answer.more, ..Part::default() };
    for of in answer.buckets {
        let reason = |_| format!("must be below {BUCKETS}, is {}", of.bucket);
        let bucket = u8::try_from(of.bucket).map_err(|error| Error::Invalid { field: "bucket", reason: reason(error) })?;
        part.sums.push((bucket, Sum { digest: of.digest, routes: of.routes.into() }));
        for bound in of.bound {
            part.held.push(held(&bound)?);
        }
    }
    Ok(part)
}

fn held(bound: &pb::Bound) -> Result<Held, Error> {
    let (user, device) = (convert::user_id(bound.user_id)?, convert::device_id(&bound.device_id)?);
    let ago = Duration::from_millis(bound.connected_ms_ago.into());
    Ok(Held::new(user, device, convert::conn_id(&bound.conn_id)?, ago))
}

pub fn query(query: Query) -> Down {
    Down::DigestQuery(match query {
        Query::Sums => pb::DigestQuery::default(),
        Query::List(buckets) => {
            pb::DigestQuery { buckets: buckets.into_iter().map(u32::from).collect(), list: true, ..Default::default() }
        }
        Query::BindAgain(held) => pb::DigestQuery { bind_again: held.iter().map(bound).collect(), ..Default::default() },
    })
}

fn bound(held: &Held) -> pb::Bound {
    pb::Bound {
        user_id: held.user.get(),
        device_id: held.device.to_string(),
        conn_id: held.conn.to_string(),
        connected_ms_ago: convert::millis(held.ago),
    }
}
