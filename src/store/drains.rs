//! Drains: what operators have ordered, and how far it is. The state changes by conditional updates only, so that an order to
//! stop and the node that carries a drain out cannot undo each other's work.

use std::time::Duration;

use prost::Message;
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::drain::Drain;
use crate::domain::drain::DrainState;
use crate::domain::drain::DrainTerms;
use crate::domain::drain::Target;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::time::Timestamp;
use crate::store::codec::drain_from_i32;
use crate::store::codec::drain_to_i32;
use crate::store::column::clock_millis;
use crate::store::column::corrupt;
use crate::store::column::duration_millis;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::connection::statement;
use crate::store::online::COUNTED_AT_ONCE;

const SELECT: &str = "SELECT id, epoch, state, pass, cursor_user, users, remaining, asked, unheard, began_ms, ended_ms, node_id, body \
    FROM drains WHERE ";
const ACTIVE: &str = "state IN (1, 2)";
/// Rows that one statement removes.
const PRUNED_AT_ONCE: i64 = 1_000;

/// What the column `body` holds.
#[derive(Clone, PartialEq, Message)]
struct Body {
    #[prost(string, tag = "1")]
    gateway: String,
    #[prost(uint32, tag = "2")]
    rate: u32,
    #[prost(int64, tag = "3")]
    starts_at_ms: i64,
    /// 0: none.
    #[prost(int64, tag = "4")]
    deadline_ms: i64,
    #[prost(uint64, tag = "5")]
    settle_ms: u64,
    #[prost(double, tag = "6")]
    share: f64,
    #[prost(message, repeated, tag = "7")]
    to: Vec<Quota>,
    #[prost(bool, tag = "8")]
    force: bool,
    #[prost(string, tag = "9")]
    reason: String,
}

#[derive(Clone, PartialEq, Message)]
struct Quota {
    #[prost(string, tag = "1")]
    gateway: String,
    #[prost(uint64, tag = "2")]
    users: u64,
    #[prost(uint64, tag = "3")]
    sent: u64,
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq)]
pub enum Placed {
    /// This is active now.
    Active(Drain),
    /// This is active, moves other users, and stays as it is.
    Busy(Drain),
    /// The life of the gateway is over.
    Over,
}

impl Connection {
    /// Orders a drain, and notes with a whole one that the gateway takes nobody new. If one of the same users is active on this
    /// life, its terms change, but for when it starts; of all and a share of them, the one that was ordered before is cancelled.
    /// On a connection for transactions: a node that stands still here must not keep the gateway from beating.
    pub async fn order_drain(&mut self, drain: &Drain) -> Result<Placed, SqlError> {
        self.begin().await?;
        if !self.lock_life(drain.epoch).await? {
            self.rollback().await?;
            return Ok(Placed::Over);
        }
        let active = self.drains(statement(format!("{SELECT}epoch = ? AND {ACTIVE}")).bind(signed(drain.epoch.0))).await?;
        let (same, others): (Vec<_>, Vec<_>) =
            active.into_iter().partition(|active| active.terms.is_whole() == drain.terms.is_whole());
        let same = same.into_iter().next();
        if let Some(busy) = same.as_ref().filter(|active| !active.terms.may_become(&drain.terms)) {
            self.rollback().await?;
            return Ok(Placed::Busy(busy.clone()));
        }
        for other in &others {
            self.set_drain_state(&other.id, DrainState::Cancelled).await?;
            self.forget_drain_job(&other.id).await?;
        }
        let id = match same {
            Some(active) if self.change_terms(&active, drain).await? => active.id,
            _ => {
                self.insert_drain(drain).await?;
                drain.id.clone()
            }
        };
        if drain.terms.is_whole() || !others.is_empty() {
            self.set_draining(drain.epoch, drain.terms.is_whole()).await?;
        }
        let active = self.read_drain(&id).await?;
        self.commit().await?;
        Ok(active.map_or(Placed::Over, Placed::Active))
    }

    /// Whether it lives. Until the transaction ends, nobody else changes which drains there are of it.
    async fn lock_life(&mut self, epoch: Epoch) -> Result<bool, SqlError> {
        const LIFE: &str = "SELECT alive FROM lives WHERE epoch = ?";
        let tail = if self.engine() == Engine::MySql { " FOR UPDATE" } else { "" };
        let rows = self.fetch(statement(format!("{LIFE}{tail}")).bind(signed(epoch.0))).await?;
        Ok(rows.first().map_or(Ok(0), |row| row.try_get::<i32, _>(0))? == 1)
    }

    async fn set_draining(&mut self, epoch: Epoch, draining: bool) -> Result<(), SqlError> {
        const SET: &str = "UPDATE lives SET draining = ? WHERE epoch = ? AND draining <> ?";
        let draining = i32::from(draining);
        self.execute(statement(SET).bind(draining).bind(signed(epoch.0)).bind(draining)).await.map(|_| ())
    }

    /// False: it is not active any more.
    async fn change_terms(&mut self, active: &Drain, drain: &Drain) -> Result<bool, SqlError> {
        let terms = DrainTerms { starts_at: active.terms.starts_at, ..drain.terms.clone() };
        let change = statement(format!("UPDATE drains SET body = ? WHERE id = ? AND {ACTIVE}"));
        Ok(self.execute(change.bind(body(&drain.gateway, &terms)).bind(active.id.clone())).await? == 1)
    }

    async fn insert_drain(&mut self, drain: &Drain) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "INSERT INTO drains (id, epoch, state, users, remaining, began_ms, body) SELECT ?, ?, ?, ?, ?, {now}, ? \
             FROM cluster WHERE id = 1"
        );
        let insert = statement(sql).bind(drain.id.clone()).bind(signed(drain.epoch.0)).bind(drain_to_i32(drain.state));
        let insert = insert.bind(signed(drain.users)).bind(signed(drain.users)).bind(body(&drain.gateway, &drain.terms));
        self.execute(insert).await.map(|_| ())
    }

    pub async fn read_drain(&mut self, id: &str) -> Result<Option<Drain>, SqlError> {
        let select = statement(format!("{SELECT}id = ?")).bind(id.to_owned());
        Ok(self.drains(select).await?.into_iter().next())
    }

    /// Those that are waiting or running, the oldest first.
    pub async fn active_drains(&mut self) -> Result<Vec<Drain>, SqlError> {
        self.drains(statement(format!("{SELECT}{ACTIVE} ORDER BY began_ms, id"))).await
    }

    /// The newest drain of a life that is active; or else that is done and keeps the gateway from taking anybody new.
    pub async fn drain_to_cancel(&mut self, epoch: Epoch) -> Result<Option<Drain>, SqlError> {
        let select = statement(format!("{SELECT}epoch = ? AND state IN (1, 2, 3) ORDER BY began_ms DESC")).bind(signed(epoch.0));
        Ok(self.drains(select).await?.into_iter().filter(Drain::can_be_cancelled).max_by_key(|drain| {
            let is_active = drain.state.is_active();
            (is_active, drain.began)
        }))
    }

    /// Up to `limit` drains, the newest first, of these lives (None: of all), after the one that began then with this id.
    pub async fn list_drains(
        &mut self,
        epochs: Option<&[Epoch]>,
        active_only: bool,
        after: Option<(Timestamp, String)>,
        limit: i64,
    ) -> Result<Vec<Drain>, SqlError> {
        let of = match epochs {
            Some(epochs) => format!("epoch IN ({})", vec!["?"; epochs.len().max(1)].join(",")),
            None => "1 = 1".to_owned(),
        };
        let active = if active_only { format!(" AND {ACTIVE}") } else { String::new() };
        let later = if after.is_some() { " AND began_ms <= ? AND (began_ms < ? OR id < ?)" } else { "" };
        let mut select = statement(format!("{SELECT}{of}{active}{later} ORDER BY began_ms DESC, id DESC LIMIT ?"));
        for epoch in epochs.into_iter().flatten() {
            select = select.bind(signed(epoch.0));
        }
        if epochs.is_some_and(<[Epoch]>::is_empty) {
            select = select.bind(0_i64); // no life has it
        }
        if let Some((began, id)) = after {
            select = select.bind(began.0).bind(began.0).bind(id);
        }
        self.drains(select.bind(limit)).await
    }

    /// Takes down how far an active drain is, with quotas also how many users each gateway was sent. False: it is not active any
    /// more.
    pub async fn note_drain(&mut self, drain: &Drain) -> Result<bool, SqlError> {
        let quotas = drain.terms.has_quotas(); // only then: an order must not be undone that has changed the terms meanwhile
        let sent = if quotas { ", body = ?" } else { "" };
        let sql = format!(
            "UPDATE drains SET state = ?, pass = ?, cursor_user = ?, users = ?, remaining = ?, asked = ?, unheard = ?, \
             node_id = ?{sent} WHERE id = ? AND {ACTIVE}"
        );
        let note = statement(sql).bind(drain_to_i32(drain.state)).bind(i64::from(drain.pass)).bind(drain.cursor);
        let note = note.bind(signed(drain.users)).bind(signed(drain.left)).bind(signed(drain.asked));
        let note = note.bind(signed(drain.unheard)).bind(drain.node_id.clone());
        let note = if quotas { note.bind(body(&drain.gateway, &drain.terms)) } else { note };
        Ok(self.execute(note.bind(drain.id.clone())).await? == 1)
    }

    /// Ends a drain. One that is cancelled, or ends with the life, lets the gateway take users again, unless another one empties
    /// it; one that is done does not: the gateway was to be empty. False: somebody else has ended it. On a connection for
    /// transactions.
    pub async fn end_drain(&mut self, drain: &Drain, state: DrainState) -> Result<bool, SqlError> {
        self.begin().await?;
        self.lock_life(drain.epoch).await?;
        let has_ended = self.set_drain_state(&drain.id, state).await?;
        if has_ended && drain.terms.is_whole() && state != DrainState::Done {
            let active = self.drains(statement(format!("{SELECT}epoch = ? AND {ACTIVE}")).bind(signed(drain.epoch.0))).await?;
            if !active.iter().any(|other| other.terms.is_whole()) {
                self.set_draining(drain.epoch, false).await?;
            }
        }
        self.forget_drain_job(&drain.id).await?;
        self.commit().await?;
        Ok(has_ended)
    }

    /// Nobody carries it out any more.
    pub async fn forget_drain_job(&mut self, id: &str) -> Result<(), SqlError> {
        self.execute(statement("DELETE FROM jobs WHERE name = ?").bind(job(id))).await.map(|_| ())
    }

    async fn set_drain_state(&mut self, id: &str, state: DrainState) -> Result<bool, SqlError> {
        let now = clock_millis(self.engine());
        let from = if state == DrainState::Cancelled { "state IN (1, 2, 3)" } else { ACTIVE };
        let end = statement(format!("UPDATE drains SET state = ?, ended_ms = {now} WHERE id = ? AND {from}"));
        Ok(self.execute(end.bind(drain_to_i32(state)).bind(id.to_owned())).await? == 1)
    }

    /// How many users have a route on this life, and how many of them up to `cursor`. Statement by statement: all together could
    /// take longer than one may.
    pub async fn count_users_up_to(&mut self, epoch: Epoch, cursor: i64) -> Result<(u64, u64), SqlError> {
        const SQL: &str = "SELECT COUNT(*), MAX(user_id), COUNT(CASE WHEN user_id <= ? THEN 1 END) FROM \
            (SELECT DISTINCT user_id FROM routes /*! FORCE INDEX (routes_by_life) */ \
            WHERE epoch = ? AND user_id > ? ORDER BY user_id LIMIT ?) AS page";
        let page = |after| statement(SQL).bind(cursor).bind(signed(epoch.0)).bind(after).bind(COUNTED_AT_ONCE);
        let pages = self.count_by_page(page).await?;
        let sum = |column: usize| pages.iter().map(|row| Ok(unsigned(row.try_get(column)?))).sum::<Result<u64, SqlError>>();
        Ok((sum(0)?, sum(2)?))
    }

    /// Removes drains that ended longer ago than `keep`; not those that keep a gateway closed. True: there may be more.
    pub async fn prune_drains(&mut self, keep: Duration) -> Result<bool, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "SELECT id FROM drains WHERE began_ms < {now} - ? AND ended_ms > 0 AND ended_ms < {now} - ? \
             AND NOT (state = 3 AND epoch IN (SELECT epoch FROM lives WHERE draining = 1 AND alive = 1)) LIMIT ?"
        );
        let keep = duration_millis(keep);
        let rows = self.fetch(statement(sql).bind(keep).bind(keep).bind(PRUNED_AT_ONCE)).await?;
        for row in &rows {
            self.execute(statement("DELETE FROM drains WHERE id = ?").bind(row.try_get::<String, _>(0)?)).await?;
        }
        Ok(rows.len() == PRUNED_AT_ONCE as usize)
    }

    async fn drains(&mut self, select: Statement) -> Result<Vec<Drain>, SqlError> {
        self.fetch(select).await?.iter().map(read).collect()
    }
}

/// The claim of whoever carries a drain out.
pub fn job(id: &str) -> String {
    format!("drain {id}")
}

fn body(gateway: &GatewayAddr, terms: &DrainTerms) -> Vec<u8> {
    let to = terms.to.iter().map(|target| {
        let Target { gateway, quota, sent } = target;
        Quota { gateway: gateway.to_string(), users: *quota, sent: *sent }
    });
    let body = Body {
        gateway: gateway.to_string(),
        rate: terms.rate,
        starts_at_ms: terms.starts_at.0,
        deadline_ms: terms.deadline.map_or(0, |deadline| deadline.0),
        settle_ms: u64::try_from(terms.settle.as_millis()).unwrap_or(u64::MAX),
        share: terms.share,
        to: to.collect(),
        force: terms.force,
        reason: terms.reason.clone(),
    };
    body.encode_to_vec()
}

fn read(row: &AnyRow) -> Result<Drain, SqlError> {
    let bytes: Vec<u8> = row.try_get(12)?;
    let body = Body::decode(bytes.as_slice()).map_err(|error| corrupt("body", error))?;
    let gateway = |addr: &str| GatewayAddr::parse(addr).map_err(|error| corrupt("body", error));
    let target = |to: &Quota| Ok::<_, SqlError>(Target { gateway: gateway(&to.gateway)?, quota: to.users, sent: to.sent });
    let terms = DrainTerms {
        rate: body.rate,
        starts_at: Timestamp(body.starts_at_ms),
        deadline: (body.deadline_ms > 0).then_some(Timestamp(body.deadline_ms)),
        settle: Duration::from_millis(body.settle_ms),
        share: body.share,
        to: body.to.iter().map(target).collect::<Result<_, _>>()?,
        force: body.force,
        reason: body.reason,
    };
    let count = |column: usize| Ok::<_, SqlError>(unsigned(row.try_get(column)?));
    Ok(Drain {
        id: row.try_get(0)?,
        gateway: gateway(&body.gateway)?,
        epoch: Epoch(count(1)?),
        state: drain_from_i32(row.try_get(2)?).ok_or_else(|| corrupt("state", "is none we know"))?,
        pass: u32::try_from(row.try_get::<i32, _>(3)?).unwrap_or(0),
        cursor: row.try_get(4)?,
        users: count(5)?,
        left: count(6)?,
        asked: count(7)?,
        unheard: count(8)?,
        began: Timestamp(row.try_get(9)?),
        ended: Timestamp(row.try_get(10)?),
        node_id: row.try_get(11)?,
        terms,
    })
}
