//! Every name in Redis. An operator reads this page; a rename is one line.

use crate::domain::id::UserId;

/// Where a user is, for other services: the address of the gateway that was bound last. Gone with the last route.
pub fn user_route(user: UserId) -> String {
    format!("user:route:{user}")
}

/// Matches every [`user_route`].
pub const ALL_USER_ROUTES: &str = "user:route:*";

/// The user whose [`user_route`] this is.
pub fn user_of_route(key: &str) -> Option<UserId> {
    UserId::parse(key.strip_prefix("user:route:")?.parse().ok()?).ok()
}

/// `online`, `away`, `busy` or `offline`, for other services.
pub fn user_status(user: UserId) -> String {
    format!("user:status:{user}")
}

/// The whole record, for nodes of this daemon only.
pub fn user_record(user: UserId) -> String {
    format!("user:record:{user}")
}

/// The epoch a gateway lives, for other services; it ends with the lease.
pub fn gateway_heartbeat(addr: &str) -> String {
    format!("gateway:heartbeat:{addr}")
}

/// The id of the store whose nodes use this database of Redis. Ends by itself soon after the last of them.
pub const STORE: &str = "presence:store";

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
