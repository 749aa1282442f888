//! A row of the table of lives.

use std::sync::Arc;

use prost::Message;
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::gateway::End;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::Profile;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::time::Timestamp;
use crate::store::codec;
use crate::store::codec::Labels;
use crate::store::column::corrupt;
use crate::store::column::unsigned;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;

pub(super) const COLUMNS: &str = "SELECT epoch, gateway_addr, kind, alive, lease_until, last_beat, draining, connections, ended_at, end_reason, attach_no, \
    attached_node, region, capacity, labels, load_average, weight, public_addr, login_rate FROM lives WHERE ";

/// Columns of what a gateway says of itself, in the order in which they are bound.
pub(super) const PROFILE_COLUMNS: [&str; 6] = ["region", "capacity", "labels", "weight", "public_addr", "login_rate"];

/// In `draining` of an unmanaged life: no bind begins on it any more.
pub(super) const CLOSED: i32 = 2;

pub(super) fn bind_profile(change: Statement, profile: &Profile) -> Statement {
    change
        .bind(profile.region.clone())
        .bind(i64::from(profile.capacity))
        .bind(Labels { labels: profile.labels.clone() }.encode_to_vec())
        .bind(i64::from(profile.weight))
        .bind(profile.public_addr.clone())
        .bind(i64::from(profile.login_rate))
}

pub(super) fn read_life(row: &AnyRow) -> Result<Arc<Life>, SqlError> {
    let alive = row.try_get::<i32, _>(3)? == 1;
    let at = Timestamp(row.try_get(8)?);
    let reason = codec::end_from_i32(row.try_get(9)?).unwrap_or(EndReason::Expired);
    Ok(Arc::new(Life {
        epoch: Epoch(unsigned(row.try_get(0)?)),
        gateway: GatewayAddr::parse(row.try_get(1)?).map_err(|error| corrupt("gateway_addr", error))?,
        kind: codec::kind_from_i32(row.try_get(2)?).ok_or_else(|| corrupt("kind", "is none we know"))?,
        lease_until: Timestamp(row.try_get(4)?),
        last_beat: Timestamp(row.try_get(5)?),
        draining: row.try_get::<i32, _>(6)? == 1,
        profile: Arc::new(read_profile(row)?),
        connections: small(row.try_get(7)?),
        load: row.try_get::<f64, _>(15)? as f32,
        end: (!alive).then_some(End { at, reason }),
        attach_no: unsigned(row.try_get(10)?),
        attached: Some(row.try_get::<&str, _>(11)?).filter(|node| !node.is_empty()).map(Arc::from),
    }))
}

fn read_profile(row: &AnyRow) -> Result<Profile, SqlError> {
    let labels = row.try_get::<Option<Vec<u8>>, _>(14)?.unwrap_or_default();
    Ok(Profile {
        region: row.try_get(12)?,
        capacity: small(row.try_get(13)?),
        labels: Labels::decode(labels.as_slice()).map_err(|error| corrupt("labels", error))?.labels,
        weight: small(row.try_get(16)?),
        public_addr: row.try_get(17)?,
        login_rate: small(row.try_get(18)?),
    })
}

fn small(number: i64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
