//! What went wrong, as RFC 9457 has it. Everything that the REST API does not answer becomes one here, in one place: what a call
//! says of itself, what axum rejects, what stands before the handlers.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::header::CACHE_CONTROL;
use axum::http::header::CONTENT_LENGTH;
use axum::http::header::CONTENT_TYPE;
use axum::http::header::RETRY_AFTER;
use axum::http::header::WWW_AUTHENTICATE;
use axum::http::header::X_CONTENT_TYPE_OPTIONS;
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::response::Response;
use serde::Serialize;
use tonic::Code;
use tonic::Status;
use tonic_types::StatusExt;
use tracing::warn;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::pb;

const MEDIA_TYPE: HeaderValue = HeaderValue::from_static("application/problem+json");

/// What went wrong, for programs by its code, for people by its detail.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct Told<'a> {
    /// `urn:im-presence:problem:` and the code.
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    /// As that of the answer.
    status: u16,
    detail: &'a str,
    /// Names this request; the log has it, too, if it was the server's trouble.
    instance: String,
    /// One of the codes of the gRPC API.
    code: &'static str,
    /// What of the request is wrong.
    field: Option<&'a str>,
    /// After which time to repeat it.
    retry_after_ms: Option<u64>,
}

/// Why a request was not carried out.
#[derive(Clone, Debug)]
pub struct Problem {
    kind: &'static Kind,
    detail: String,
    field: Option<String>,
    retry_after: Option<Duration>,
}

/// Code, title and status of each kind of problem.
type Kind = (&'static str, &'static str, StatusCode);

const INVALID: Kind = ("INVALID_ARGUMENT", "The request is invalid", StatusCode::BAD_REQUEST);
const UNAUTHENTICATED: Kind = ("UNAUTHENTICATED", "A valid credential is needed", StatusCode::UNAUTHORIZED);
const DENIED: Kind = ("PERMISSION_DENIED", "Not allowed", StatusCode::FORBIDDEN);
const NOT_FOUND: Kind = ("NOT_FOUND", "Not there", StatusCode::NOT_FOUND);
const METHOD: Kind = ("METHOD_NOT_ALLOWED", "Not with this method", StatusCode::METHOD_NOT_ALLOWED);
const SLOW: Kind = ("REQUEST_TIMEOUT", "The request took too long to come", StatusCode::REQUEST_TIMEOUT);
const FENCED: Kind = ("CODE_FENCED", "That life is over", StatusCode::CONFLICT);
const REFUSED: Kind = ("CODE_REFUSED", "Not as things are", StatusCode::CONFLICT);
const UNDELIVERED: Kind = ("CODE_UNDELIVERED", "Nobody took it", StatusCode::CONFLICT);
const SUPERSEDED: Kind = ("CODE_SUPERSEDED", "Another process has taken its place", StatusCode::CONFLICT);
const TOO_LARGE: Kind = ("TOO_LARGE", "Too large", StatusCode::PAYLOAD_TOO_LARGE);
const MEDIA: Kind = ("UNSUPPORTED_MEDIA_TYPE", "Not in this form", StatusCode::UNSUPPORTED_MEDIA_TYPE);
const LIMITED: Kind = ("RESOURCE_EXHAUSTED", "More than this caller may", StatusCode::TOO_MANY_REQUESTS);
const UNAVAILABLE: Kind = ("UNAVAILABLE", "Not now", StatusCode::SERVICE_UNAVAILABLE);
const INTERNAL: Kind = ("INTERNAL", "A fault of the server", StatusCode::INTERNAL_SERVER_ERROR);
/// What a status alone can say.
const BY_STATUS: [&Kind; 10] =
    [&INVALID, &UNAUTHENTICATED, &DENIED, &NOT_FOUND, &METHOD, &SLOW, &TOO_LARGE, &MEDIA, &LIMITED, &UNAVAILABLE];

impl Problem {
    fn new(kind: &'static Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into(), field: None, retry_after: None }
    }

    /// A field of the request, and what is wrong with it: "must be ...".
    pub fn invalid(field: &str, reason: &str) -> Self {
        Self { field: Some(field.to_owned()), ..Self::new(&INVALID, format!("{field}: {reason}")) }
    }

    /// The request cannot be read, as the detail says.
    pub fn unreadable(detail: impl Into<String>) -> Self {
        Self::new(&INVALID, detail)
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(&NOT_FOUND, detail)
    }

    pub fn denied(detail: impl Into<String>) -> Self {
        Self::new(&DENIED, detail)
    }

    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new(&TOO_LARGE, detail)
    }

    pub fn media_type(detail: impl Into<String>) -> Self {
        Self::new(&MEDIA, detail)
    }

    /// The caller asks for more than it may.
    pub fn limited(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(&LIMITED, detail) }
    }

    pub fn unavailable(detail: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(&UNAVAILABLE, detail) }
    }

    /// The same, with REST's name of a field that the gRPC API calls otherwise.
    pub fn renamed(mut self, from: &str, to: &str) -> Self {
        if self.field.as_deref() == Some(from) {
            self.field = Some(to.to_owned());
            self.detail = self.detail.replacen(from, to, 1);
        }
        self
    }

    /// What an answer to `asked` means that has a status and nothing else.
    fn of(status: StatusCode, asked: &str) -> Self {
        let kind = BY_STATUS.into_iter().find(|(.., known)| *known == status).unwrap_or(&INTERNAL);
        Self::new(kind, asked)
    }

    /// As the caller is told it.
    fn told(&self, status: StatusCode, instance: String) -> Told<'_> {
        let (code, title, _) = *self.kind;
        Told {
            kind: format!("urn:im-presence:problem:{code}"),
            title,
            status: status.as_u16(),
            detail: &self.detail,
            instance,
            code,
            field: self.field.as_deref(),
            retry_after_ms: self.retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
        }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        let details = status.get_error_details();
        let kind = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => &INVALID,
            Code::Unauthenticated => &UNAUTHENTICATED,
            Code::PermissionDenied => &DENIED,
            Code::NotFound | Code::Unimplemented => &NOT_FOUND,
            // More than this node takes at once is no fault of who happens to ask now.
            Code::ResourceExhausted if details.quota_failure().is_some() => &LIMITED,
            Code::ResourceExhausted | Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => &UNAVAILABLE,
            Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => &REFUSED,
            Code::Ok | Code::Unknown | Code::Internal | Code::DataLoss => &INTERNAL,
        };
        let wrong = details.bad_request().and_then(|request| request.field_violations.first());
        Self {
            field: wrong.map(|violation| violation.field.clone()),
            retry_after: details.retry_info().and_then(|info| info.retry_delay),
            ..Self::new(kind, status.message())
        }
    }
}

/// What a call says of its outcome: a note for people, if it was done.
///
/// # Errors
/// It was not.
pub fn done(result: Option<pb::Result>) -> Result<Option<String>, Problem> {
    let pb::Result { code, msg } = result.unwrap_or_default();
    let kind = match pb::Code::try_from(code) {
        Ok(pb::Code::Ok) => return Ok((!msg.is_empty()).then_some(msg)),
        Ok(pb::Code::Invalid) => &INVALID,
        Ok(pb::Code::NotFound) => &NOT_FOUND,
        Ok(pb::Code::Fenced) => &FENCED,
        Ok(pb::Code::Refused) => &REFUSED,
        Ok(pb::Code::Undelivered) => &UNDELIVERED,
        Ok(pb::Code::Unavailable) => &UNAVAILABLE,
        Ok(pb::Code::Superseded) => &SUPERSEDED,
        Ok(pb::Code::TooLarge) => &TOO_LARGE,
        Ok(pb::Code::Internal) | Err(_) => &INTERNAL,
    };
    Err(Problem::new(kind, msg))
}

impl IntoResponse for Problem {
    /// Text, for those who ask for no JSON; [`dress`] makes JSON of it for all others.
    fn into_response(self) -> Response {
        let status = self.kind.2;
        let mut response = (status, format!("{}\n", self.detail)).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

/// Whether a path is the REST API's.
fn is_rest(path: &str) -> bool {
    path == "/api" || path.starts_with("/api/")
}

/// Makes every failure of the REST API a problem, whoever it comes from, and keeps answers out of caches.
pub async fn dress(request: Request, next: Next) -> Response {
    if !is_rest(request.uri().path()) {
        return next.run(request).await;
    }
    let asked = format!("{} {}", request.method(), request.uri().path());
    let (mut head, body) = next.run(request).await.into_parts();
    head.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    head.headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !head.status.is_client_error() && !head.status.is_server_error() {
        return Response::from_parts(head, body);
    }
    let problem = head.extensions.remove::<Problem>().unwrap_or_else(|| Problem::of(head.status, &asked));
    let told = problem.told(head.status, Uuid::now_v7().urn().to_string());
    if head.status.is_server_error() {
        warn!(request.id = told.instance, "{asked}: {}", told.detail);
    }
    head.headers.insert(CONTENT_TYPE, MEDIA_TYPE);
    head.headers.remove(CONTENT_LENGTH);
    Response::from_parts(head, Body::from(serde_json::to_vec(&told).unwrap_or_default()))
}
