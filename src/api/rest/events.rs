//! What happens, as it happens: Server-Sent Events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::IntoResponse;
use axum::response::Response;
use axum::response::sse;
use axum::response::sse::KeepAlive;
use axum::response::sse::Sse;
use futures_util::FutureExt;
use futures_util::stream;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::credential::Credential;
use crate::api::credential::revoked;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::problem::Problem;
use crate::api::status::status;
use crate::engine::overview::events::Event;
use crate::engine::overview::events::Events;
use crate::engine::overview::events::Kind;
use crate::engine::overview::events::Next;
use crate::engine::overview::events::RING;
use crate::engine::overview::events::Since;

/// Those who listen at once.
const MAX_LISTENERS: usize = 64;
/// A comment is sent after so long, so that whoever stands between does not take the connection for dead.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// Past events that come first, if the caller does not say how many.
const LAST: usize = 100;
/// When to come again who found no place.
const RETRY: Duration = Duration::from_secs(5);
const LAST_EVENT_ID: &str = "last-event-id";

/// Where listeners find what happens.
pub struct Listening {
    pub events: Arc<Events>,
    places: Arc<Semaphore>,
    /// This node stops.
    draining: CancellationToken,
}

impl Listening {
    pub fn new(events: Arc<Events>, draining: CancellationToken) -> Self {
        Self { events, places: Arc::new(Semaphore::new(MAX_LISTENERS)), draining }
    }
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct How {
    /// Only these, separated by commas: death, hold, drain, degraded, node, audit. Not given: all.
    kinds: Option<String>,
    /// Past events that come first; 100, if not given. The header Last-Event-ID is stronger.
    #[param(minimum = 0, maximum = 1000)]
    last: Option<u32>,
    /// Whether to go on with what happens from now on; true, if not given.
    follow: Option<bool>,
}

/// One who listens.
struct Listener {
    events: Arc<Events>,
    kinds: Vec<Kind>,
    follow: bool,
    /// What is still to be sent.
    pending: VecDeque<sse::Event>,
    /// The number of the last that was looked at.
    last: u64,
    newest: watch::Receiver<u64>,
    draining: CancellationToken,
    revoked: Pin<Box<dyn Future<Output = ()> + Send>>,
    _credential: Option<Credential>,
    _place: OwnedSemaphorePermit,
}

/// One event of the stream.
#[derive(ToSchema)]
#[allow(dead_code)] // only described
struct Told {
    /// Names it, for Last-Event-ID.
    id: Option<String>,
    /// death, hold, drain, degraded, node, audit or gap.
    event: String,
    /// JSON: when it was, what it says, and what it is about.
    data: String,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(listen))
}

/// What has happened lately and what happens, as Server-Sent Events: deaths of gateways, holds, drains, what is degraded on this
/// node, nodes that come and go, the audit of all nodes. `id` names an event; with it in Last-Event-ID a listener goes on where
/// it was, or is told by an event `gap` that some are missing. It ends with the credential, and when the node stops.
#[utoipa::path(
    get, path = "/api/v1/events", tag = "nodes",
    params(How, ("Last-Event-ID" = Option<String>, Header, description = "The id of the last event that was seen.")),
    responses((status = 200, body = Told, content_type = "text/event-stream"))
)]
async fn listen(
    State(rest): State<Arc<Rest>>,
    caller: Caller,
    headers: HeaderMap,
    Query(how): Query<How>,
) -> Result<Response, Problem> {
    let (listening, kinds) = (&rest.listening, kinds(how.kinds.as_deref())?);
    let last = how.last.map_or(LAST, |last| last as usize);
    if last > RING {
        return Err(Problem::invalid("last", &format!("must be 0 to {RING}, is {last}")));
    }
    let place = listening.places.clone().try_acquire_owned();
    let place = place.map_err(|_| Problem::unavailable(format!("{MAX_LISTENERS} listen already"), RETRY))?;
    let admission = caller.admission().cloned();
    let credential = admission.as_ref().map(Credential::new).transpose().map_err(|error| status(&error))?;
    let newest = listening.events.watch(); // before looking, so that nothing is missed
    let seen = headers.get(LAST_EVENT_ID).and_then(|id| id.to_str().ok());
    let next = match seen.map(|id| listening.events.number(id)) {
        Some(Some(number)) => listening.events.next(Since::After(number)),
        Some(None) => listening.events.after_a_gap(),
        None => listening.events.next(Since::Last(last)),
    };
    let mut listener = Listener {
        events: listening.events.clone(),
        kinds,
        follow: how.follow.unwrap_or(true),
        pending: VecDeque::new(),
        last: 0,
        newest,
        draining: listening.draining.clone(),
        revoked: Box::pin(revoked(admission)),
        _credential: credential,
        _place: place,
    };
    listener.take(next);
    let events = stream::unfold(listener, |mut listener| async {
        let event = listener.next().await?;
        Some((Ok::<_, Infallible>(event), listener))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(COMMENT_INTERVAL)).into_response())
}

fn kinds(given: Option<&str>) -> Result<Vec<Kind>, Problem> {
    let Some(given) = given else { return Ok(Kind::ALL.to_vec()) };
    let known = |name: &str| Kind::ALL.into_iter().find(|kind| kind.name() == name.trim());
    let wrong = || Problem::invalid("kinds", "must be death, hold, drain, degraded, node or audit, separated by commas");
    given.split(',').map(|name| known(name).ok_or_else(wrong)).collect()
}

impl Listener {
    /// The next event. None: that was all.
    async fn next(&mut self) -> Option<sse::Event> {
        loop {
            if self.draining.is_cancelled() || self.revoked.as_mut().now_or_never().is_some() {
                return None;
            }
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            if !self.follow {
                return None;
            }
            tokio::select! {
                () = &mut self.revoked => return None,
                () = self.draining.cancelled() => return None,
                changed = self.newest.changed() => changed.ok()?,
            }
            let next = self.events.next(Since::After(self.last));
            self.take(next);
        }
    }

    fn take(&mut self, next: Next) {
        if let Some(before) = next.gap {
            let says = "events before this one are missing: too many have happened, or the node was started again";
            let data = json!({ "says": says }).to_string();
            self.pending.push_back(sse::Event::default().event("gap").id(self.events.id(before)).data(data));
        }
        let wanted = next.events.iter().filter(|event| self.kinds.contains(&event.kind));
        let shown: Vec<sse::Event> = wanted.map(|event| shown(&self.events, event)).collect();
        self.pending.extend(shown);
        self.last = next.last;
    }
}

fn shown(events: &Events, event: &Event) -> sse::Event {
    sse::Event::default().id(events.id(event.number)).event(event.kind.name()).data(event.data.to_string())
}
