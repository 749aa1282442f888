//! What of a user's presence is kept apart from the record. For most users there is nothing: they have one device, and everything
//! follows from when it came or went.

use crate::domain::history::OnlineSession;
use crate::domain::status::Status;
use crate::domain::status::Wish;
use crate::domain::time::Timestamp;
use crate::domain::user::LastShown;
use crate::domain::user::Presence;
use crate::domain::user::UserRecord;

/// Stands where no session is: nobody has a counted one that is not there.
pub(super) const ERASED: OnlineSession = OnlineSession { since: Timestamp(0), is_counted: true };

impl UserRecord {
    /// The same record with this presence.
    pub fn with(mut self, presence: Presence) -> Self {
        let is_usual = presence.wish == Wish::default()
            && presence.shown == self.usual()
            && presence.session == self.usual_session()
            && presence.banned_until == Timestamp::default();
        self.presence = (!is_usual).then(|| Box::new(presence));
        self
    }

    pub fn presence(&self) -> Presence {
        Presence { wish: self.wish(), shown: self.shown(), session: self.session(), banned_until: self.banned_until() }
    }

    pub fn wish(&self) -> Wish {
        self.presence.as_ref().map_or_else(Wish::default, |apart| apart.wish.clone())
    }

    /// What others were shown last.
    pub fn shown(&self) -> LastShown {
        self.presence.as_ref().map_or_else(|| self.usual(), |apart| apart.shown)
    }

    pub fn session(&self) -> OnlineSession {
        self.presence.as_ref().map_or_else(|| self.usual_session(), |apart| apart.session)
    }

    fn usual(&self) -> LastShown {
        LastShown { version: self.version, seen: self.last_seen, since: self.last_seen }
    }

    fn usual_session(&self) -> OnlineSession {
        let since = if self.routes.is_empty() { Timestamp::default() } else { self.last_seen };
        OnlineSession { since, is_counted: false }
    }

    /// As the user wants to be seen.
    pub fn wanted(&self) -> Status {
        self.presence.as_ref().map_or(Status::Online, |apart| apart.wish.status)
    }

    /// When the wish returns to the default. None: it stays.
    pub fn wish_until(&self) -> Option<Timestamp> {
        self.presence.as_ref().and_then(|apart| apart.wish.until)
    }

    /// Until when nothing may be bound; long ago, if nobody has said so.
    pub fn banned_until(&self) -> Timestamp {
        self.presence.as_ref().map_or_else(Timestamp::default, |apart| apart.banned_until)
    }

    /// Whether the user is INVISIBLE.
    pub fn is_hidden(&self) -> bool {
        self.wanted() == Status::Invisible
    }

    /// What the user says of themselves.
    pub fn text(&self) -> &str {
        self.presence.as_ref().map_or("", |apart| apart.wish.text.as_str())
    }

    /// The user was erased, and has not come back.
    pub fn is_erased(&self) -> bool {
        self.session() == ERASED
    }
}
