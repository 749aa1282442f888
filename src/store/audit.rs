//! The audit's rows.

use std::time::Duration;

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

impl Connection {
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
