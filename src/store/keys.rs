//! Every name in Redis. An operator reads this page; a rename is one line.

use xxhash_rust::xxh3::xxh3_64;

use crate::domain::id::UserId;

/// Keys. In a cluster those that one script writes are in one slot.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
    in_cluster: bool,
}

impl Keys {
    pub fn new(prefix: &str, in_cluster: bool) -> Self {
        Self { prefix: prefix.to_owned(), in_cluster }
    }

    /// Where a user is, for other services: the address of the gateway that was bound last. Gone with the last route.
    pub fn user_route(&self, user: UserId) -> String {
        format!("{}user:route:{user}", self.prefix)
    }

    /// Matches every [`Keys::user_route`].
    pub fn all_user_routes(&self) -> String {
        format!("{}user:route:*", self.prefix)
    }

    /// The user whose [`Keys::user_route`] this is.
    pub fn user_of_route(&self, key: &str) -> Option<UserId> {
        UserId::parse(key.strip_prefix(&self.prefix)?.strip_prefix("user:route:")?.parse().ok()?).ok()
    }

    /// `online`, `away`, `busy` or `offline`, for other services.
    pub fn user_status(&self, user: UserId) -> String {
        format!("{}user:status:{user}", self.prefix)
    }

    /// The whole record, for nodes of this daemon only. In a cluster beside the user's route.
    pub fn user_record(&self, user: UserId) -> String {
        match self.in_cluster {
            true => format!("{{{}}}:record", self.user_route(user)),
            false => format!("{}user:record:{user}", self.prefix),
        }
    }

    /// Of a cluster: which record the user's status is from, beside it.
    pub fn status_version(&self, user: UserId) -> String {
        format!("{{{}}}:v", self.user_status(user))
    }

    /// The epoch a gateway lives, for other services; it ends with the lease.
    pub fn gateway_heartbeat(&self, addr: &str) -> String {
        format!("{}gateway:heartbeat:{addr}", self.prefix)
    }

    /// The id of the store whose nodes use these keys. Ends by itself soon after the last of them.
    pub fn store(&self) -> String {
        format!("{}presence:store", self.prefix)
    }

    /// The prefix, as part of what identifies a server's data.
    pub fn identity(&self, server: &str) -> String {
        match &*self.prefix {
            "" => server.to_owned(),
            prefix => format!("{server}:{:016x}", xxh3_64(prefix.as_bytes())),
        }
    }
}

/// Channels. Pub/Sub ignores database numbers: the prefix separates systems that share a Redis.
#[derive(Clone, Debug)]
pub struct Channels {
    prefix: String,
}

impl Channels {
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// A user's messages, for the gateways that hold their devices.
    pub fn user(&self, user: UserId) -> String {
        format!("{}user:{user}", self.prefix)
    }

    /// Orders for a gateway: kicks.
    pub fn gateway(&self, addr: &str) -> String {
        format!("{}gateway:{addr}", self.prefix)
    }

    /// `<user_id>:<gateway_addr>` for each user that changed; an empty address is offline.
    pub fn presence_route(&self) -> String {
        format!("{}presence:route", self.prefix)
    }

    /// `<user_id>:<online|away|busy|offline>` for each change of what a user is shown as.
    pub fn presence_status(&self) -> String {
        format!("{}presence:status", self.prefix)
    }

    /// JSON for each stored message, for push services.
    pub fn presence_offline(&self) -> String {
        format!("{}presence:offline", self.prefix)
    }

    /// What nodes tell each other of gateways: who is dead.
    pub fn presence_gateway(&self) -> String {
        format!("{}presence:gateway", self.prefix)
    }

    /// What nodes tell each other: who changed, and that they are there.
    pub fn presence_hint(&self) -> String {
        format!("{}presence:hint", self.prefix)
    }
}
