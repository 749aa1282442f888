//! Ends of lives, and what is left to do after them.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;

use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::id::Epoch;
use crate::store::cluster::FUTURE_MS;
use crate::store::cluster::MAX_SILENCE;
use crate::store::codec;
use crate::store::codec::OutboxBody;
use crate::store::column::bind_epochs;
use crate::store::column::clock_millis;
use crate::store::column::duration_millis;
use crate::store::column::signed;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::connection::statement;
use crate::store::life_row::CLOSED;
use crate::store::life_row::COLUMNS;
use crate::store::life_row::read_life;
use crate::store::outbox::OutboxId;
use crate::store::statement::chunks;
use crate::store::statement::repeated;

/// Lives that ended, and the outbox row that says so until it is told.
#[derive(Debug)]
pub struct Ended {
    pub lives: Vec<Arc<Life>>,
    pub outbox: OutboxId,
}

/// On what condition lives end.
#[derive(Clone, Copy, Debug)]
pub enum Ending {
    /// Their lease is over, and nothing speaks against believing that: the database took beats without a gap for a whole
    /// lease, and no hold is on. The condition is part of the statement, because a database that stood still would run it when
    /// it comes back, before any beat.
    Expired { lease: Duration },
    /// Their lease is over, and an operator says that they are dead.
    Confirmed,
    /// Whatever their lease says.
    Unconditional(EndReason),
}

impl Connection {
    /// Ends those of `epochs` that live and for which `ending` holds, in one transaction with the outbox row
    /// that tells of it. None: there were none.
    pub async fn end_lives(&mut self, node_id: &str, epochs: &[Epoch], ending: Ending) -> Result<Option<Ended>, SqlError> {
        self.begin().await?;
        let mut epochs = epochs.to_vec();
        if let Ending::Expired { .. } = ending {
            // One that somebody holds must not keep the others alive. The next look finds it.
            let free = self.lock_lives(&epochs).await?;
            epochs.retain(|epoch| free.contains(epoch));
        }
        let ended = self.end(node_id, &epochs, ending).await?;
        if ended.is_none() {
            self.rollback().await?;
            return Ok(None);
        }
        self.commit().await?;
        Ok(ended)
    }

    pub(super) async fn end(&mut self, node_id: &str, epochs: &[Epoch], ending: Ending) -> Result<Option<Ended>, SqlError> {
        // Whoever is over already was counted and told by who ended them.
        let living = self.lives_by_epoch(epochs).await?.into_iter().filter(|life| life.is_alive());
        let epochs: Vec<Epoch> = living.map(|life| life.epoch).collect();
        let mut ended = 0;
        for (chunk, fill) in chunks(&epochs) {
            ended += self.execute(bind_epochs(end_statement(self.engine(), ending, chunk.len() + fill), chunk, fill)).await?;
        }
        if ended == 0 {
            return Ok(None);
        }
        let mut lives = self.lives_by_epoch(&epochs).await?;
        lives.retain(|life| !life.is_alive());
        let body = OutboxBody { ended: lives.iter().map(|life| life.epoch.0).collect(), ..OutboxBody::default() };
        Ok(Some(Ended { lives, outbox: self.add_outbox(node_id, &body).await? }))
    }

    /// Ends unmanaged lives that have had no route for `term`, in three steps. What a life does not know of itself is said by
    /// `last_beat`: since when it has no route, then when it was closed. No bind begins on a closed life, and those that had
    /// begun are over after `stragglers`. Nodes of the last release do not know closed lives: beside them none is closed.
    pub async fn end_unused_lives(&mut self, term: Duration, stragglers: Duration) -> Result<u64, SqlError> {
        const UNUSED: &str = "alive = 1 AND kind = 2 AND NOT EXISTS (SELECT 1 FROM routes WHERE routes.epoch = lives.epoch)";
        let now = clock_millis(self.engine());
        let used = "UPDATE lives SET last_beat = 0 WHERE alive = 1 AND kind = 2 AND draining = 0 AND last_beat > 0 \
            AND EXISTS (SELECT 1 FROM routes WHERE routes.epoch = lives.epoch)";
        self.execute(statement(used)).await?;
        let unused = format!(
            "UPDATE lives SET last_beat = {now} WHERE {UNUSED} AND draining = 0 AND (last_beat = 0 OR last_beat > {now} + {FUTURE_MS})"
        );
        self.execute(statement(unused)).await?;
        let close = format!(
            "UPDATE lives SET draining = {CLOSED}, last_beat = {now} WHERE {UNUSED} AND draining = 0 AND last_beat > 0 \
             AND last_beat < {now} - ? AND NOT EXISTS (SELECT 1 FROM nodes WHERE incarnation = '' AND seen_at > {now} - ?)"
        );
        self.execute(statement(close).bind(duration_millis(term)).bind(duration_millis(stragglers))).await?;
        let end = format!(
            "UPDATE lives SET alive = 0, ended_at = {now}, end_reason = ?, swept_at = {now} WHERE {UNUSED} \
             AND draining = {CLOSED} AND last_beat < {now} - ?"
        );
        let end = statement(end).bind(codec::end_to_i32(EndReason::Expired)).bind(duration_millis(stragglers));
        self.execute(end).await
    }

    /// Lives that are over and whose routes may still be there, oldest end first.
    pub async fn unswept_lives(&mut self) -> Result<Vec<Arc<Life>>, SqlError> {
        let rows = self.fetch(statement(format!("{COLUMNS}alive = 0 AND swept_at = 0 ORDER BY ended_at"))).await?;
        rows.iter().map(read_life).collect()
    }

    /// No route names the life any more, and none will.
    pub async fn mark_swept(&mut self, epoch: Epoch) -> Result<(), SqlError> {
        let sql = format!("UPDATE lives SET swept_at = {} WHERE epoch = ? AND alive = 0", clock_millis(self.engine()));
        self.execute(statement(sql).bind(signed(epoch.0))).await.map(|_| ())
    }

    /// Cuts leases, and ends, of the future down to what they can be: the clock was ahead when they were written.
    pub async fn clamp_lives(&mut self, lease: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let lease = duration_millis(lease);
        let leases = format!("UPDATE lives SET lease_until = {now} + ? WHERE alive = 1 AND lease_until > {now} + ?");
        self.execute(statement(leases).bind(lease).bind(lease + FUTURE_MS)).await?;
        let ends = format!("UPDATE lives SET ended_at = {now} WHERE alive = 0 AND ended_at > {now} + {FUTURE_MS}");
        self.execute(statement(ends)).await.map(|_| ())
    }

    /// Forgets lives that were swept longer than `term` ago.
    pub async fn forget_lives(&mut self, term: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let ahead = format!("UPDATE lives SET swept_at = {now} WHERE swept_at > {now} + {FUTURE_MS}");
        self.execute(statement(ahead)).await?;
        let delete = format!("DELETE FROM lives WHERE alive = 0 AND swept_at > 0 AND swept_at < {now} - ?");
        self.execute(statement(delete).bind(duration_millis(term))).await.map(|_| ())
    }

    /// Puts lives back on the sweep's list that routes name although nobody expects it: they were swept, or are unknown.
    /// That takes a database that was tampered with or set back. Returns how many.
    pub async fn reopen_orphaned_lives(&mut self) -> Result<u64, SqlError> {
        const REOPEN: &str = "UPDATE lives SET swept_at = 0 WHERE alive = 0 AND swept_at > 0 \
            AND EXISTS (SELECT 1 FROM routes WHERE routes.epoch = lives.epoch)";
        const MISSING: &str = "SELECT named.epoch FROM (SELECT DISTINCT epoch FROM routes) AS named \
            LEFT JOIN lives ON lives.epoch = named.epoch WHERE lives.epoch IS NULL LIMIT 100";
        let mut reopened = self.execute(statement(REOPEN)).await?;
        for row in self.fetch(statement(MISSING)).await? {
            let now = clock_millis(self.engine());
            let insert = format!(
                "INSERT INTO lives (epoch, gateway_addr, kind, alive, ended_at, end_reason) VALUES (?, 'unknown', 1, 0, {now}, 4)"
            );
            reopened += self.execute(statement(insert).bind(row.try_get::<i64, _>(0)?)).await?;
        }
        Ok(reopened)
    }
}

/// Beats could be written without a gap for one lease, lately too, and no hold is on.
const GUARD: &str = "AND kind = 1 AND lease_until < {now} AND EXISTS (SELECT 1 FROM cluster WHERE id = 1 \
    AND last_beat > {now} - ? AND continuous_since < {now} - ? AND hold_until < {now})";

fn end_statement(engine: Engine, ending: Ending, epochs: usize) -> Statement {
    let (reason, condition) = match ending {
        Ending::Expired { .. } => ("CASE WHEN (SELECT hold_rearm FROM cluster WHERE id = 1) > {now} THEN 5 ELSE 1 END", GUARD),
        Ending::Confirmed => ("4", "AND kind = 1 AND lease_until < {now}"),
        Ending::Unconditional(_) => ("?", ""),
    };
    let head = format!(
        "UPDATE lives /*! FORCE INDEX (PRIMARY) */ SET alive = 0, ended_at = {{now}}, end_reason = {reason} \
         WHERE alive = 1 {condition} AND epoch IN ("
    );
    let update = statement(repeated(&head.replace("{now}", clock_millis(engine)), "?", epochs, ")"));
    match ending {
        Ending::Expired { lease } => update.bind(duration_millis(MAX_SILENCE)).bind(duration_millis(lease)),
        Ending::Unconditional(reason) => update.bind(codec::end_to_i32(reason)),
        Ending::Confirmed => update,
    }
}
