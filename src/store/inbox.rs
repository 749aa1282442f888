//! Stored messages.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;

use prost::Message;
use sqlx::Row;
use sqlx::any::AnyRow;

use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::domain::inbox::Inbox;
use crate::domain::inbox::NewMessage;
use crate::domain::inbox::Stored;
use crate::domain::time::Timestamp;
use crate::store::codec::Devices;
use crate::store::column::bind_users;
use crate::store::column::corrupt;
use crate::store::column::signed;
use crate::store::column::unsigned;
use crate::store::connection::Connection;
use crate::store::connection::SqlError;
use crate::store::connection::Statement;
use crate::store::connection::statement;
use crate::store::online::COUNTED_AT_ONCE;
use crate::store::statement::chunks;
use crate::store::statement::filled;
use crate::store::statement::repeated;

/// Messages of one statement. Each may be as large as a message can be, and a statement has to fit into a packet.
const MESSAGES_AT_ONCE: usize = 32;

/// Users and message ids that are looked up with one statement.
const REPEATS_AT_ONCE: usize = 128;

/// A stored message with its text.
#[derive(Clone, Debug)]
pub struct StoredMessage {
    pub seq: u64,
    pub message: NewMessage,
    pub stored_at: Timestamp,
}

/// A stored message without its text.
#[derive(Clone, Debug)]
pub struct StoredHead {
    pub seq: u64,
    pub message_id: String,
    pub message_type: String,
    pub bytes: u64,
    pub stored_at: Timestamp,
    pub expires_at: Timestamp,
    /// None: for all of the user's devices.
    pub devices: Option<BTreeSet<DeviceId>>,
}

/// A message that is written down.
pub struct Addition<'a> {
    pub user: UserId,
    pub seq: u64,
    pub message: &'a NewMessage,
    pub expires_at: Timestamp,
}

/// Of a stored message, all but its text.
const HEADS: &str = "SELECT user_id, seq, message_id, LENGTH(body), expires_at, device_ids FROM inbox ";

type Messages = HashMap<UserId, BTreeMap<u64, Stored>>;

impl Connection {
    /// What is known of the stored messages of `users`, without their texts.
    pub async fn load_inboxes(&mut self, users: &[UserId]) -> Result<HashMap<UserId, Inbox>, SqlError> {
        let head = format!("{HEADS} /*! FORCE INDEX (PRIMARY) */ WHERE user_id IN (");
        let mut messages: Messages = users.iter().map(|user| (*user, BTreeMap::new())).collect();
        for (chunk, fill) in chunks(users) {
            let select = statement(repeated(&head, "?", chunk.len() + fill, ")"));
            self.fetch_heads(bind_users(select, chunk, fill), &mut messages).await?;
        }
        Ok(messages.into_iter().map(|(user, messages)| (user, Inbox::of(messages))).collect())
    }

    /// As much of the users' stored messages as has to be known to store these: how many and how large they are, and those
    /// with the same ids; all of them where one is over at `now`. `additions` are users and message ids, which may be empty.
    pub async fn load_inboxes_to_add(
        &mut self,
        additions: &[(UserId, &str)],
        now: Timestamp,
    ) -> Result<HashMap<UserId, Inbox>, SqlError> {
        const HEAD: &str = "SELECT user_id, COUNT(*), CAST(SUM(LENGTH(body)) AS SIGNED), MIN(expires_at) FROM inbox \
            /*! FORCE INDEX (PRIMARY) */ WHERE user_id IN (";
        let mut users: Vec<UserId> = additions.iter().map(|(user, _)| *user).collect();
        users.sort_unstable();
        users.dedup();
        let (mut sums, mut with_old): (HashMap<UserId, (u64, u64)>, Vec<UserId>) = (HashMap::new(), Vec::new());
        for (chunk, fill) in chunks(&users) {
            let select = statement(repeated(HEAD, "?", chunk.len() + fill, ") GROUP BY user_id"));
            for row in self.fetch(bind_users(select, chunk, fill)).await? {
                let user = UserId::parse(row.try_get(0)?).map_err(|error| corrupt("user_id", error))?;
                match row.try_get::<i64, _>(3)? > now.0 {
                    true => drop(sums.insert(user, (unsigned(row.try_get(1)?), unsigned(row.try_get(2)?)))),
                    false => with_old.push(user),
                }
            }
        }
        let mut same = self.messages_with_ids(additions).await?;
        let mut inboxes = self.load_inboxes(&with_old).await?;
        for user in users {
            let ((count, bytes), same) = (sums.remove(&user).unwrap_or_default(), same.remove(&user).unwrap_or_default());
            let of_same: u64 = same.values().map(|stored| stored.bytes).sum();
            let others = (count.saturating_sub(same.len() as u64), bytes.saturating_sub(of_same));
            inboxes.entry(user).or_insert_with(|| Inbox::with_others(same, others.0, others.1));
        }
        Ok(inboxes)
    }

    async fn messages_with_ids(&mut self, wanted: &[(UserId, &str)]) -> Result<Messages, SqlError> {
        let (named, mut messages): (Vec<_>, _) = (wanted.iter().filter(|(_, id)| !id.is_empty()).collect(), Messages::new());
        for chunk in named.chunks(REPEATS_AT_ONCE) {
            let each = vec!["user_id = ? AND message_id = ?"; chunk.len()].join(" OR ");
            let mut select = statement(format!("{HEADS} WHERE {each}"));
            for (user, id) in chunk {
                select = select.bind(user.get()).bind((*id).to_owned());
            }
            self.fetch_heads(select, &mut messages).await?;
        }
        Ok(messages)
    }

    async fn fetch_heads(&mut self, select: Statement, messages: &mut Messages) -> Result<(), SqlError> {
        for row in self.fetch(select).await? {
            let user = UserId::parse(row.try_get(0)?).map_err(|error| corrupt("user_id", error))?;
            let stored = Stored {
                message_id: given_id(row.try_get(2)?),
                bytes: unsigned(row.try_get(3)?),
                expires_at: Timestamp(row.try_get(4)?),
                devices: read_devices(&row, 5)?,
            };
            messages.entry(user).or_default().insert(unsigned(row.try_get(1)?), stored);
        }
        Ok(())
    }

    /// Writes messages down. Their users have to be locked.
    pub async fn add_messages(&mut self, additions: &[Addition<'_>], now: Timestamp) -> Result<(), SqlError> {
        const HEAD: &str = "INSERT INTO inbox (user_id, seq, message_id, message_type, stored_at, expires_at, device_ids, \
            is_binary, body) VALUES ";
        for additions in additions.chunks(MESSAGES_AT_ONCE) {
            let mut insert = statement(repeated(HEAD, "(?,?,?,?,?,?,?,?,?)", additions.len(), ""));
            for Addition { user, seq, message, expires_at } in additions {
                insert = insert.bind(user.get()).bind(signed(*seq)).bind(unique_id(message, *seq));
                insert = insert.bind(message.message_type.clone()).bind(now.0).bind(expires_at.0);
                insert = insert.bind(devices(message)).bind(i32::from(message.is_binary)).bind(message.body.to_vec());
            }
            self.execute(insert).await?;
        }
        Ok(())
    }

    /// Deletes messages. Their users have to be locked.
    pub async fn remove_messages(&mut self, user: UserId, seqs: &[u64]) -> Result<(), SqlError> {
        for (chunk, fill) in chunks(seqs) {
            let sql = repeated("DELETE FROM inbox WHERE user_id = ? AND seq IN (", "?", chunk.len() + fill, ")");
            let mut delete = statement(sql).bind(user.get());
            for seq in filled(chunk, fill) {
                delete = delete.bind(signed(*seq));
            }
            self.execute(delete).await?;
        }
        Ok(())
    }

    /// Up to `limit` messages of a user after number `after` that are not over, in their order.
    pub async fn read_inbox(
        &mut self,
        user: UserId,
        after: u64,
        now: Timestamp,
        limit: i64,
    ) -> Result<Vec<StoredMessage>, SqlError> {
        const SQL: &str = "SELECT seq, message_id, message_type, body, is_binary, device_ids, stored_at FROM inbox \
            WHERE user_id = ? AND seq > ? AND expires_at > ? ORDER BY seq LIMIT ?";
        let rows = self.fetch(statement(SQL).bind(user.get()).bind(signed(after)).bind(now.0).bind(limit)).await?;
        rows.iter().map(read_message).collect()
    }

    /// The same without their texts.
    pub async fn read_inbox_heads(
        &mut self,
        user: UserId,
        after: u64,
        now: Timestamp,
        limit: i64,
    ) -> Result<Vec<StoredHead>, SqlError> {
        const SQL: &str = "SELECT seq, message_id, message_type, LENGTH(body), stored_at, device_ids, expires_at FROM inbox \
            WHERE user_id = ? AND seq > ? AND expires_at > ? ORDER BY seq LIMIT ?";
        let rows = self.fetch(statement(SQL).bind(user.get()).bind(signed(after)).bind(now.0).bind(limit)).await?;
        let head = |row: &AnyRow| {
            Ok(StoredHead {
                seq: unsigned(row.try_get(0)?),
                message_id: given_id(row.try_get(1)?),
                message_type: row.try_get(2)?,
                bytes: unsigned(row.try_get(3)?),
                stored_at: Timestamp(row.try_get(4)?),
                expires_at: Timestamp(row.try_get(6)?),
                devices: read_devices(row, 5)?,
            })
        };
        rows.iter().map(head).collect()
    }

    /// Up to `limit` users who have both messages and a route, by number, after `after`.
    pub async fn reachable_users_with_messages(&mut self, after: i64, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT DISTINCT inbox.user_id FROM inbox JOIN routes ON routes.user_id = inbox.user_id \
            WHERE inbox.user_id > ? ORDER BY inbox.user_id LIMIT ?";
        self.users_of(statement(SQL).bind(after).bind(limit)).await
    }

    /// Up to `limit` users with messages whose time is over.
    pub async fn users_with_old_messages(&mut self, now: Timestamp, limit: i64) -> Result<Vec<UserId>, SqlError> {
        const SQL: &str = "SELECT DISTINCT user_id FROM inbox WHERE expires_at <= ? LIMIT ?";
        self.users_of(statement(SQL).bind(now.0).bind(limit)).await
    }

    /// How many messages are stored, and when the oldest was. Statement by statement, as users are counted.
    pub async fn count_messages(&mut self) -> Result<(i64, Option<Timestamp>), SqlError> {
        const SQL: &str = "SELECT COUNT(*), MIN(stored_at), MAX(user_id) FROM (SELECT user_id, stored_at FROM inbox WHERE user_id > ? \
            AND user_id <= (SELECT MAX(user_id) FROM (SELECT user_id FROM inbox WHERE user_id > ? ORDER BY user_id LIMIT ?) AS next)) \
            AS page";
        let (mut counted, mut oldest, mut after) = (0, None, 0);
        loop {
            let rows = self.fetch(statement(SQL).bind(after).bind(after).bind(COUNTED_AT_ONCE)).await?;
            let Some(row) = rows.first() else { return Ok((counted, oldest)) };
            let Some(last) = row.try_get::<Option<i64>, _>(2)? else { return Ok((counted, oldest)) };
            counted += row.try_get::<i64, _>(0)?;
            let here = row.try_get::<Option<i64>, _>(1)?.map(Timestamp);
            oldest = oldest.into_iter().chain(here).min();
            after = last;
        }
    }
}

/// Messages without an id are no repeats of each other: each has a name that no caller can give.
fn unique_id(message: &NewMessage, seq: u64) -> String {
    if message.message_id.is_empty() { format!(" {seq}") } else { message.message_id.clone() }
}

fn given_id(unique: &str) -> String {
    if unique.starts_with(' ') { String::new() } else { unique.to_owned() }
}

fn devices(message: &NewMessage) -> Option<Vec<u8>> {
    let devices = message.devices.as_ref()?;
    Some(Devices { ids: devices.iter().map(DeviceId::to_string).collect() }.encode_to_vec())
}

fn read_devices(row: &AnyRow, column: usize) -> Result<Option<BTreeSet<DeviceId>>, SqlError> {
    let Some(bytes) = row.try_get::<Option<Vec<u8>>, _>(column)? else { return Ok(None) };
    let devices = Devices::decode(bytes.as_slice()).map_err(|error| corrupt("device_ids", error))?;
    let ids = devices.ids.iter().map(|id| DeviceId::parse(id));
    ids.collect::<Result<_, _>>().map(Some).map_err(|error| corrupt("device_ids", error))
}

fn read_message(row: &AnyRow) -> Result<StoredMessage, SqlError> {
    let message = NewMessage {
        message_id: given_id(row.try_get(1)?),
        message_type: row.try_get(2)?,
        body: row.try_get::<Vec<u8>, _>(3)?.into(),
        is_binary: row.try_get::<i32, _>(4)? == 1,
        devices: read_devices(row, 5)?,
        expires_after: None,
    };
    Ok(StoredMessage { seq: unsigned(row.try_get(0)?), message, stored_at: Timestamp(row.try_get(6)?) })
}
