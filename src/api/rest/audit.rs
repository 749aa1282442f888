//! Who did what.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::cursor::Cursor;
use crate::api::rest::problem::Problem;
use crate::api::status::status;
use crate::domain::id::check_ascii;
use crate::domain::time::Timestamp;
use crate::engine::read::audit_log::AuditPage;
use crate::engine::read::audit_log::AuditPlace;
use crate::engine::read::audit_log::AuditRow;

const MAX_ACTION_BYTES: usize = 128;
/// Of a caller's name.
const MAX_WHO_BYTES: usize = 255;

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only of this caller.
    #[param(max_length = 255)]
    who: Option<String>,
    /// Only this, as in `DrainGateway`.
    #[param(pattern = "^[!-~]{1,128}$", example = "DrainGateway")]
    action: Option<String>,
    /// Only from this time on, in milliseconds since 1970.
    from: Option<i64>,
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

/// A page of the audit.
#[derive(Serialize, ToSchema)]
struct Audit {
    /// The newest first.
    items: Vec<AuditEntry>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
}

/// What was done, or denied.
#[derive(Serialize, ToSchema)]
struct AuditEntry {
    at_ms: i64,
    /// Where it was asked.
    node_id: String,
    /// Tells entries of one time and node apart.
    seq: String,
    /// Empty: nobody was asked who they are, or the node itself.
    who: String,
    role: String,
    from_addr: String,
    action: String,
    target: String,
    args: String,
    /// ok, failed or denied.
    outcome: String,
    reason: String,
}

impl From<AuditRow> for AuditEntry {
    fn from(row: AuditRow) -> Self {
        let AuditRow { place, who, role, from_addr, action, target, args, outcome, reason } = row;
        let (at_ms, node_id, seq) = (place.at.0, place.node_id, place.seq.to_string());
        Self { at_ms, node_id, seq, who, role, from_addr, action, target, args, outcome, reason }
    }
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_audit))
}

/// Who did what as an operator, who was denied what, and which secrets were read again.
#[utoipa::path(get, path = "/api/v1/audit", tag = "audit", params(Which), responses((status = 200, body = Audit)))]
async fn list_audit(State(rest): State<Arc<Rest>>, Query(which): Query<Which>) -> Answer<Audit> {
    let cursor = Cursor::of("audit", &(&which.who, &which.action, which.from));
    let limit = limit(which.limit)?;
    if let Some(Err(error)) = which.action.as_deref().map(|action| check_ascii(action, 1, MAX_ACTION_BYTES)) {
        return Err(Problem::invalid("action", &error.to_string()));
    }
    if which.who.as_ref().is_some_and(|who| who.len() > MAX_WHO_BYTES) {
        return Err(Problem::invalid("who", &format!("must be at most {MAX_WHO_BYTES} bytes")));
    }
    let before = place(&cursor.read(which.cursor.as_deref())?)?;
    let from = Timestamp(which.from.unwrap_or_default());
    let page = AuditPage { who: which.who, action: which.action, with_denied: true, from, before, limit };
    let rows = rest.audit_log.page(page).await.map_err(|error| status(&error))?;
    let last = rows.last().filter(|_| rows.len() == limit as usize);
    let last = last.map(|AuditRow { place, .. }| format!("{} {} {}", place.at.0, place.seq, place.node_id)).unwrap_or_default();
    let items = rows.into_iter().map(AuditEntry::from).collect();
    Ok(Json(Audit { items, next_cursor: cursor.next(&last), as_of_ms: rest.now_ms() }))
}

/// Where the page before ended.
fn place(token: &str) -> Result<Option<AuditPlace>, Problem> {
    if token.is_empty() {
        return Ok(None);
    }
    let mut parts = token.splitn(3, ' ');
    let mut part = || parts.next().unwrap_or_default();
    let (at, seq, node_id) = (part().parse(), part().parse(), part().to_owned());
    match (at, seq) {
        (Ok(at), Ok(seq)) => Ok(Some(AuditPlace { at: Timestamp(at), node_id, seq })),
        _ => Err(Problem::invalid("cursor", "must be the next_cursor of a page")),
    }
}
