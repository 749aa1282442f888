//! The way to the one server that is written to and read from.
//!
//! One primary at a time, checked. The beats, which are written once a second, decide which it is. Every other connection has to
//! lead there too, or is not used: a server that was a primary a moment ago still answers, with what was true then, and
//! writes to two members of a cluster would fail each other. A server that takes no writes is read from only while nobody
//! knows of a better one.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use arc_swap::ArcSwapOption;
use tracing::warn;

use crate::config::server_of;
use crate::store::connection::Connection;
use crate::store::connection::Opening;
use crate::store::connection::Purpose;
use crate::store::connection::SqlError;
use crate::store::server::Server;

#[derive(Default)]
pub(super) struct Way {
    /// To which the last beat was written. None: none was.
    primary: ArcSwapOption<Server>,
    /// The place in the list of the address that was right last.
    last: AtomicUsize,
    /// Another server that takes writes, to which a connection led.
    other: ArcSwapOption<Server>,
}

/// What to do with a connection that was just made.
enum Fit {
    Right,
    /// Better than none, if it is only read from.
    AtNeed(String),
    Wrong(String),
}

impl Way {
    /// Connects to the first of `urls` that leads to the right server.
    pub async fn find(&self, urls: &[String], opening: Opening) -> Result<Connection, SqlError> {
        let first = self.last.load(Ordering::Relaxed);
        let (mut at_need, mut failed) = (None, Vec::new());
        for place in (0..urls.len()).map(|n| (first + n) % urls.len()) {
            let url = &urls[place];
            let error = match Connection::open(url, opening).await {
                Err(error) => error,
                Ok(connection) => match self.fit(&connection, urls.len() == 1) {
                    Fit::Right => {
                        self.last.store(place, Ordering::Relaxed);
                        return Ok(connection);
                    }
                    Fit::AtNeed(why) => {
                        at_need = at_need.or(Some(connection));
                        SqlError::Lost(why)
                    }
                    Fit::Wrong(why) => SqlError::Lost(why),
                },
            };
            failed.push((server_of(url), error));
        }
        at_need.ok_or_else(|| told(failed))
    }

    fn fit(&self, connection: &Connection, is_only: bool) -> Fit {
        let Some(server) = connection.server() else { return Fit::Right };
        let (primary, purpose) = (self.primary.load(), connection.purpose());
        let is_primary = primary.as_ref().is_none_or(|primary| primary.is(server));
        match &*primary {
            Some(primary) if !is_primary && purpose != Purpose::Beat => {
                if !self.other.swap(Some(Arc::new(server.clone()))).is_some_and(|told| told.is(server)) {
                    warn!("a connection led to {server}, and this node writes to {primary}: all have to lead to one of them");
                }
                Fit::Wrong(format!("it is {server}, and this node writes to {primary}"))
            }
            _ if !server.is_read_only => Fit::Right,
            // A beat that cannot be written tells so itself, and reads before.
            known if is_primary && (known.is_some() || is_only) && purpose != Purpose::Lane => {
                Fit::AtNeed(format!("{server} is read-only"))
            }
            _ => Fit::Wrong(format!("{server} is read-only")),
        }
    }

    pub fn is_current(&self, connection: &Connection) -> bool {
        let Some(server) = connection.server() else { return true };
        let primary = self.primary.load();
        primary
            .as_ref()
            .is_none_or(|primary| primary.is(server) && !(primary.is_read_only && connection.purpose() == Purpose::Lane))
    }

    pub fn follow(&self, connection: &Connection) {
        let (Some(server), primary) = (connection.server(), self.primary.load()) else { return };
        // Whoever cannot be written to is no primary, unless it was before.
        let is_new = primary.as_deref() != Some(server);
        if is_new && (!server.is_read_only || primary.as_ref().is_some_and(|primary| primary.is(server))) {
            self.primary.store(Some(Arc::new(server.clone())));
        }
    }
}

/// One error from those of all servers.
fn told(mut failed: Vec<(String, SqlError)>) -> SqlError {
    if failed.len() == 1 {
        return failed.remove(0).1;
    }
    let is_denied = failed.iter().any(|(_, error)| matches!(error, SqlError::Denied(_)));
    let all = failed.iter().map(|(server, error)| format!("{server}: {}", error.cause())).collect::<Vec<_>>().join("; ");
    if is_denied { SqlError::Denied(all) } else { SqlError::Lost(all) }
}
