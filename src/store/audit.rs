//! The audit's rows.

use std::time::Duration;

use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::time::Timestamp;
use crate::security::audit::Entry;
use crate::store::column::clock_millis;
use crate::store::column::duration_millis;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::statement::repeated;

/// Rows removed by one statement: others must not wait for long.
const PRUNED_AT_ONCE: u64 = 1_000;

/// Which rows are asked for.
#[derive(Clone, Debug)]
pub struct AuditPage {
    pub who: Option<String>,
    pub action: Option<String>,
    /// Also what was denied.
    pub with_denied: bool,
    pub from: Timestamp,
    /// The row after which the page begins: the newest come first.
    pub before: Option<AuditPlace>,
    pub limit: u32,
}

/// Names a row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AuditPlace {
    pub at: Timestamp,
    pub node_id: String,
    pub seq: i64,
}

/// What was done, or denied.
#[derive(Clone, Debug)]
pub struct AuditRow {
    pub place: AuditPlace,
    pub who: String,
    pub role: String,
    pub from_addr: String,
    pub action: String,
    pub target: String,
    pub args: String,
    pub outcome: String,
    pub reason: String,
}

impl Connection {
    /// Rows of the audit, the newest first.
    pub async fn read_audit(&mut self, page: &AuditPage) -> Result<Vec<AuditRow>, SqlError> {
        let given = |clause: &'static str, is_given: bool| if is_given { clause } else { "" };
        let (who, action) = (given(" AND who = ?", page.who.is_some()), given(" AND action = ?", page.action.is_some()));
        let before = " AND at_ms <= ? AND (at_ms < ? OR node_id < ? OR (node_id = ? AND seq < ?))";
        let before = given(before, page.before.is_some());
        let denied = given(" AND outcome <> 'denied'", !page.with_denied);
        let mut select = statement(format!(
            "SELECT at_ms, node_id, seq, who, role, from_addr, action, target, args, outcome, reason FROM audit \
             WHERE at_ms >= ?{before}{who}{action}{denied} ORDER BY at_ms DESC, node_id DESC, seq DESC LIMIT ?"
        ));
        select = select.bind(page.from.0);
        if let Some(AuditPlace { at, node_id, seq }) = &page.before {
            select = select.bind(at.0).bind(at.0).bind(node_id.clone()).bind(node_id.clone()).bind(*seq);
        }
        for text in [&page.who, &page.action].into_iter().flatten() {
            select = select.bind(text.clone());
        }
        self.fetch(select.bind(i64::from(page.limit))).await?.iter().map(read_row).collect()
    }

    /// Adds rows, which are numbered from `seq` on.
    pub async fn add_audit(&mut self, node_id: &str, seq: i64, entries: &[Entry]) -> Result<(), SqlError> {
        const HEAD: &str =
            "INSERT INTO audit (at_ms, node_id, seq, who, role, from_addr, action, target, args, outcome, reason) VALUES ";
        if entries.is_empty() {
            return Ok(());
        }
        let row = format!("({},?,?,?,?,?,?,?,?,?,?)", clock_millis(self.engine()));
        let mut insert = statement(repeated(HEAD, &row, entries.len(), ""));
        for (seq, entry) in (seq..).zip(entries) {
            let texts = [&entry.who, entry.role, &entry.from_addr, &entry.action, &entry.target, &entry.args, entry.outcome];
            insert = insert.bind(node_id.to_owned()).bind(seq);
            insert = texts.into_iter().chain([&*entry.reason]).fold(insert, |insert, text| insert.bind(text.to_owned()));
        }
        self.execute(insert).await.map(|_| ())
    }

    /// Removes some of what is older than `keep`. True: there may be more.
    pub async fn prune_audit(&mut self, keep: Duration) -> Result<bool, SqlError> {
        let too_old = format!("at_ms < {} - ? LIMIT {PRUNED_AT_ONCE}", clock_millis(self.engine()));
        let sql = match self.engine() {
            Engine::MySql => format!("DELETE FROM audit WHERE {too_old}"),
            Engine::Sqlite => format!("DELETE FROM audit WHERE rowid IN (SELECT rowid FROM audit WHERE {too_old})"),
        };
        Ok(self.execute(statement(sql).bind(duration_millis(keep))).await? == PRUNED_AT_ONCE)
    }
}

fn read_row(row: &AnyRow) -> Result<AuditRow, SqlError> {
    let place = AuditPlace { at: Timestamp(row.try_get(0)?), node_id: row.try_get(1)?, seq: row.try_get(2)? };
    Ok(AuditRow {
        place,
        who: row.try_get(3)?,
        role: row.try_get(4)?,
        from_addr: row.try_get(5)?,
        action: row.try_get(6)?,
        target: row.try_get(7)?,
        args: row.try_get(8)?,
        outcome: row.try_get(9)?,
        reason: row.try_get(10)?,
    })
}
