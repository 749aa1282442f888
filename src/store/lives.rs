//! Lives of gateways: beginning, extending, ending, reading.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Row;

use crate::domain::gateway::Beat;
use crate::domain::gateway::EndReason;
use crate::domain::gateway::Life;
use crate::domain::gateway::LifeKind;
use crate::domain::gateway::Registration;
use crate::domain::id::Epoch;
use crate::domain::id::GatewayAddr;
use crate::domain::id::UserId;
use crate::store::cluster::FUTURE_MS;
use crate::store::codec;
use crate::store::column::bind_epochs;
use crate::store::column::clock_micros;
use crate::store::column::clock_millis;
use crate::store::column::duration_millis;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::Engine;
use crate::store::connection::SqlError;
use crate::store::connection::statement;
use crate::store::ended_lives::Ended;
use crate::store::ended_lives::Ending;
use crate::store::life_row::CLOSED;
use crate::store::life_row::COLUMNS;
use crate::store::life_row::PROFILE_COLUMNS;
use crate::store::life_row::bind_profile;
use crate::store::life_row::read_life;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::greatest;
use crate::store::statement::repeated;
use crate::store::users::Records;

/// Which lives an operator sees.
#[derive(Clone, Copy, Debug)]
pub enum Listed {
    Living,
    /// Those whose leases end within this time.
    Ending(Duration),
    All,
}

/// A life that began, and those that it ended.
#[derive(Debug)]
pub struct Begun {
    pub life: Arc<Life>,
    pub ended: Option<Ended>,
}

impl Connection {
    /// All lives that a route may still name (the living, and the dead whose routes are not swept yet), and those that ended
    /// within `lately`. Of living unmanaged ones, which do not change, only those that began after `known`.
    pub async fn read_lives(&mut self, lately: Duration, known: Option<Epoch>) -> Result<Vec<Arc<Life>>, SqlError> {
        let now = clock_millis(self.engine());
        let select = format!(
            "{COLUMNS}alive = 1 AND kind = 1 UNION ALL {COLUMNS}alive = 1 AND kind = 2 AND epoch > ? \
             UNION ALL {COLUMNS}alive = 0 AND (swept_at = 0 OR ended_at > {now} - ?)"
        );
        let select = statement(select).bind(signed(known.map_or(0, |known| known.0))).bind(duration_millis(lately));
        self.fetch(select).await?.iter().map(read_life).collect()
    }

    /// Gateways whose leases ran out within `lately`.
    pub async fn deaths_within(&mut self, lately: Duration) -> Result<u64, SqlError> {
        let (now, expired, held) = (clock_millis(self.engine()), EndReason::Expired, EndReason::Held);
        let sql = format!(
            "SELECT COUNT(*) FROM lives WHERE alive = 0 AND kind = 1 AND ended_at > {now} - ? AND end_reason IN ({}, {})",
            codec::end_to_i32(expired),
            codec::end_to_i32(held)
        );
        let rows = self.fetch(statement(sql).bind(duration_millis(lately))).await?;
        rows.first().map_or(Ok(0), |row| Ok(unsigned(row.try_get(0)?)))
    }

    pub async fn lives_by_epoch(&mut self, epochs: &[Epoch]) -> Result<Vec<Arc<Life>>, SqlError> {
        let mut lives = Vec::new();
        for (chunk, fill) in chunks(epochs) {
            let sql = repeated(&format!("{COLUMNS}epoch IN ("), "?", chunk.len() + fill, ")");
            for row in self.fetch(bind_epochs(statement(sql), chunk, fill)).await? {
                lives.push(read_life(&row)?);
            }
        }
        Ok(lives)
    }

    /// The lives that are not over: of one gateway, or all.
    pub async fn living(&mut self, gateway: Option<&GatewayAddr>) -> Result<Vec<Arc<Life>>, SqlError> {
        let select = match gateway {
            Some(gateway) => statement(format!("{COLUMNS}alive = 1 AND gateway_addr = ?")).bind(gateway.to_string()),
            None => statement(format!("{COLUMNS}alive = 1")),
        };
        self.fetch(select).await?.iter().map(read_life).collect()
    }

    /// Loads users, and then the lives their routes name: as fresh as the records.
    pub async fn load_users_with_lives(&mut self, users: &[UserId]) -> Result<(Records, Vec<Arc<Life>>), SqlError> {
        let records = self.load_users(users).await?.records;
        let mut epochs: Vec<Epoch> = records.values().flat_map(|record| &record.routes).map(|route| route.epoch).collect();
        epochs.sort_unstable();
        epochs.dedup();
        let lives = self.lives_by_epoch(&epochs).await?;
        Ok((records, lives))
    }

    /// The lives that `gateways` live now, and that may be bound to. A gateway without one is left out.
    pub async fn current_lives(&mut self, gateways: &[GatewayAddr]) -> Result<Vec<Arc<Life>>, SqlError> {
        let mut lives = Vec::new();
        for (chunk, fill) in chunks(gateways) {
            let head = format!("{COLUMNS}alive = 1 AND draining <> {CLOSED} AND gateway_addr IN (");
            let mut select = statement(repeated(&head, "?", chunk.len() + fill, ")"));
            for gateway in filled(chunk, fill) {
                select = select.bind(gateway.to_string());
            }
            for row in self.fetch(select).await? {
                lives.push(read_life(&row)?);
            }
        }
        Ok(lives)
    }

    /// Begins an unmanaged life of `gateway`, unless it has a life by now. A transaction of its own: the lock on the one row
    /// that issues epochs must not be held for the length of a batch.
    pub async fn begin_unmanaged_life(&mut self, gateway: &GatewayAddr) -> Result<(), SqlError> {
        let insert = format!(
            "INSERT INTO lives (epoch, gateway_addr, kind, alive) SELECT next_epoch, ?, ?, 1 FROM cluster WHERE id = 1 \
             AND NOT EXISTS (SELECT 1 FROM lives WHERE gateway_addr = ? AND alive = 1 AND draining <> {CLOSED})"
        );
        self.begin().await?;
        self.issue_epoch().await?;
        let kind = codec::kind_to_i32(LifeKind::Unmanaged);
        self.execute(statement(insert).bind(gateway.to_string()).bind(kind).bind(gateway.to_string())).await?;
        self.commit().await
    }

    /// Begins a life with a lease and ends whatever life the address had. None: it has begun `limit` lives within the last
    /// `lease`, so that two processes which fight over an address do not storm the database. Nothing is done if, with all
    /// locks held, it is not `wanted` any more.
    pub async fn begin_managed_life(
        &mut self,
        node_id: &str,
        registration: &Registration,
        lease: Duration,
        limit: i64,
        wanted: impl Fn() -> bool,
    ) -> Result<Option<Begun>, SqlError> {
        let (now, addr) = (clock_millis(self.engine()), || registration.gateway.to_string());
        self.begin().await?;
        self.issue_epoch().await?; // locks: registrations are made one after the other
        // Not those of a time when the clock was ahead.
        let recent = format!(
            "SELECT COUNT(*) FROM lives WHERE gateway_addr = ? AND kind = 1 AND epoch > ({now} - ?) * 1000 \
             AND (alive = 1 AND epoch < ({now} + {FUTURE_MS}) * 1000 OR alive = 0 AND ended_at > {now} - ? AND ended_at <= {now})"
        );
        let window = duration_millis(lease);
        let rows = self.fetch(statement(recent).bind(addr()).bind(window).bind(window)).await?;
        if rows.first().map_or(Ok(0), |row| row.try_get::<i64, _>(0))? >= limit {
            self.rollback().await?;
            return Ok(None);
        }
        let former: Vec<Epoch> =
            self.current_lives(std::slice::from_ref(&registration.gateway)).await?.iter().map(|life| life.epoch).collect();
        let ended = self.end(node_id, &former, Ending::Unconditional(EndReason::Superseded)).await?;
        let insert = format!(
            "INSERT INTO lives (epoch, gateway_addr, kind, alive, lease_until, last_beat, {}) \
             SELECT next_epoch, ?, 1, 1, {now} + ?, {now}, ?, ?, ?, ?, ?, ? FROM cluster WHERE id = 1",
            PROFILE_COLUMNS.join(", ")
        );
        let insert = statement(insert).bind(addr()).bind(duration_millis(lease));
        self.execute(bind_profile(insert, &registration.profile)).await?;
        let begun = self.current_lives(std::slice::from_ref(&registration.gateway)).await?;
        if !wanted() {
            self.rollback().await?;
            return Err(SqlError::Lost("its caller timed out while it was queued".to_owned()));
        }
        self.commit().await?;
        let life = begun.into_iter().next().ok_or_else(|| SqlError::Lost("a row is missing that was there".to_owned()))?;
        Ok(Some(Begun { life, ended }))
    }

    async fn issue_epoch(&mut self) -> Result<(), SqlError> {
        let (greatest, clock) = (greatest(self.engine()), clock_micros(self.engine()));
        let issue = format!("UPDATE cluster SET next_epoch = {greatest}(next_epoch + 1, {clock}) WHERE id = 1");
        self.execute(statement(issue)).await.map(|_| ())
    }

    /// Goes on with a life: extends its lease, and takes over what its gateway says of itself now. False: it is over.
    pub async fn resume_life(&mut self, epoch: Epoch, registration: &Registration, lease: Duration) -> Result<bool, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE lives SET lease_until = {now} + ?, last_beat = {now}, {} = ? WHERE epoch = ? AND gateway_addr = ? AND alive = 1",
            PROFILE_COLUMNS.join(" = ?, ")
        );
        let resume = bind_profile(statement(sql).bind(duration_millis(lease)), &registration.profile);
        Ok(self.execute(resume.bind(signed(epoch.0)).bind(registration.gateway.to_string())).await? == 1)
    }

    /// Notes that a gateway has a stream to this node from now on, and extends its lease. Returns the stream's number; None:
    /// the life is over.
    pub async fn attach_life(&mut self, epoch: Epoch, node_id: &str, lease: Duration) -> Result<Option<Arc<Life>>, SqlError> {
        let now = clock_millis(self.engine());
        let sql = format!(
            "UPDATE lives SET attached_node = ?, attach_no = attach_no + 1, lease_until = {now} + ?, last_beat = {now} \
             WHERE epoch = ? AND alive = 1"
        );
        self.begin().await?; // the number is read before anybody else can raise it
        let attach = statement(sql).bind(node_id.to_owned()).bind(duration_millis(lease)).bind(signed(epoch.0));
        let attached = self.execute(attach).await? == 1;
        let life = self.lives_by_epoch(&[epoch]).await?.pop().filter(|_| attached);
        self.commit().await?;
        Ok(life)
    }

    /// Notes that a stream has ended, unless the gateway has a newer one. `grace`: what is left of its lease, if the stream
    /// broke; None: this node has ended it.
    pub async fn detach_life(&mut self, epoch: Epoch, node_id: &str, no: u64, grace: Option<Duration>) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        let lease = match grace {
            Some(_) => format!(", lease_until = CASE WHEN lease_until < {now} + ? THEN lease_until ELSE {now} + ? END"),
            None => String::new(),
        };
        let sql = format!(
            "UPDATE lives SET attached_node = ''{lease} WHERE epoch = ? AND attached_node = ? AND attach_no = ? AND alive = 1"
        );
        let mut detach = statement(sql);
        if let Some(grace) = grace {
            detach = detach.bind(duration_millis(grace)).bind(duration_millis(grace));
        }
        self.execute(detach.bind(signed(epoch.0)).bind(node_id.to_owned()).bind(signed(no))).await.map(|_| ())
    }

    /// Locks those of `epochs` that nobody else holds locked, without waiting, and returns them. In a transaction.
    pub async fn lock_lives(&mut self, epochs: &[Epoch]) -> Result<HashSet<Epoch>, SqlError> {
        const LOCK: &str = "SELECT epoch FROM lives /*! FORCE INDEX (PRIMARY) */ WHERE epoch IN (";
        let tail = match self.engine() {
            Engine::MySql => ") FOR UPDATE SKIP LOCKED",
            Engine::Sqlite => ")", // the transaction holds everything
        };
        let mut locked = HashSet::new();
        for (chunk, fill) in chunks(epochs) {
            let sql = repeated(LOCK, "?", chunk.len() + fill, tail);
            for row in self.fetch(bind_epochs(statement(sql), chunk, fill)).await? {
                locked.insert(Epoch(unsigned(row.try_get(0)?)));
            }
        }
        Ok(locked)
    }

    /// Extends the leases of those that live; what is over stays over. One statement for up to 512 beats, by primary key.
    pub async fn beat_lives(&mut self, beats: &[Beat], lease: Duration) -> Result<(), SqlError> {
        let now = clock_millis(self.engine());
        for (chunk, fill) in chunks(beats) {
            let rows = chunk.len() + fill;
            let set = format!("lease_until = {now} + ?, last_beat = {now}, connections = beat.said, load_average = beat.busy");
            let sql = match self.engine() {
                Engine::MySql => {
                    let row = "SELECT CAST(? AS SIGNED) AS id, CAST(? AS SIGNED) AS said, CAST(? AS DOUBLE) AS busy";
                    let rest = format!(" UNION ALL {row}").repeat(rows - 1);
                    let join = "STRAIGHT_JOIN lives FORCE INDEX (PRIMARY) ON lives.epoch = beat.id";
                    format!("UPDATE ({row}{rest}) AS beat {join} SET {set} WHERE lives.alive = 1")
                }
                Engine::Sqlite => {
                    let beats = format!("WITH beat (id, said, busy) AS (VALUES (?,?,?){})", ",(?,?,?)".repeat(rows - 1));
                    format!("{beats} UPDATE lives SET {set} FROM beat WHERE lives.epoch = beat.id AND lives.alive = 1")
                }
            };
            let mut update = statement(sql);
            for beat in filled(chunk, fill) {
                let load = f64::from(beat.load);
                update = update.bind(signed(beat.epoch.0)).bind(i64::from(beat.connections)).bind(load);
            }
            self.execute(update.bind(duration_millis(lease))).await?;
        }
        Ok(())
    }

    /// Up to `limit` lives as an operator sees them, after `after`: by address, the newest first.
    pub async fn list_lives(
        &mut self,
        listed: Listed,
        after: Option<&(GatewayAddr, Epoch)>,
        limit: usize,
    ) -> Result<Vec<Arc<Life>>, SqlError> {
        let which = match listed {
            Listed::Living => "alive = 1".to_owned(),
            Listed::Ending(_) => format!("alive = 1 AND kind = 1 AND lease_until <= {} + ?", clock_millis(self.engine())),
            Listed::All => "1 = 1".to_owned(),
        };
        let later = if after.is_some() { " AND gateway_addr >= ? AND (gateway_addr > ? OR epoch < ?)" } else { "" };
        let mut select = statement(format!("{COLUMNS}{which}{later} ORDER BY gateway_addr, epoch DESC LIMIT ?"));
        if let Listed::Ending(within) = listed {
            select = select.bind(duration_millis(within));
        }
        if let Some((gateway, epoch)) = after {
            select = select.bind(gateway.to_string()).bind(gateway.to_string()).bind(signed(epoch.0));
        }
        let rows = self.fetch(select.bind(i64::try_from(limit).unwrap_or(i64::MAX))).await?;
        rows.iter().map(read_life).collect()
    }
}
