//! What a request asks: its query, its body, and who asks. Whatever is wrong with it is a problem that names the field.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::FromRequest;
use axum::extract::FromRequestParts;
use axum::extract::Request;
use axum::http::Extensions;
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tonic::metadata::MetadataMap;
use utoipa::IntoParams;

use crate::api::access::Admission;
use crate::api::rest::problem::Problem;

/// Largest body.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Items of a page, if the caller does not say how many; and at most.
const PAGE: u32 = 100;
const MAX_PAGE: u32 = 1_000;

/// Who asks, for the call that does it.
pub struct Caller(Extensions);

impl Caller {
    /// The same request, as gRPC would have brought it.
    pub fn asks<T>(&self, message: T) -> tonic::Request<T> {
        tonic::Request::from_parts(MetadataMap::new(), self.0.clone(), message)
    }

    /// Whoever was let in; none, if nobody was asked.
    pub fn admission(&self) -> Option<&Admission> {
        Admission::of(&self.0)
    }

    /// The same, of somebody who waits for so long.
    pub fn asks_within<T>(&self, patience: Duration, message: T) -> tonic::Request<T> {
        let mut request = self.asks(message);
        request.set_timeout(patience);
        request
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.extensions.clone()))
    }
}

/// The query, all of whose keys are known.
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let text = parts.uri.query().unwrap_or_default();
        let query = serde_urlencoded::Deserializer::new(form_urlencoded::parse(text.as_bytes()));
        serde_path_to_error::deserialize(query).map(Self).map_err(|error| wrong(&error))
    }
}

/// A JSON body, all of whose fields are known.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::media_type("the body must be JSON, with Content-Type: application/json"));
        }
        let bytes = to_bytes(request.into_body(), MAX_BODY_BYTES).await;
        let bytes = bytes.map_err(|_| Problem::too_large(format!("the body must be at most {MAX_BODY_BYTES} bytes")))?;
        let mut json = serde_json::Deserializer::from_slice(&bytes);
        let body = serde_path_to_error::deserialize(&mut json).map_err(|error| wrong(&error))?;
        json.end().map_err(|error| Problem::unreadable(error.to_string()))?;
        Ok(Self(body))
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let given = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    given.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

fn wrong<E: std::error::Error>(error: &serde_path_to_error::Error<E>) -> Problem {
    let (path, why) = (error.path().to_string(), error.inner().to_string());
    // Of a field that is missing or unknown the path does not tell.
    let named = ["missing field `", "unknown field `", "duplicate field `"].into_iter().find_map(|head| why.strip_prefix(head));
    match named.and_then(|rest| rest.split('`').next()) {
        Some(name) => Problem::invalid(name, &why),
        None if path == "." || path == "?" => Problem::unreadable(why),
        None => Problem::invalid(&path, &why),
    }
}

/// # Errors
/// It is not from 1 to 1,000.
pub fn limit(given: Option<u32>) -> Result<u32, Problem> {
    let limit = given.unwrap_or(PAGE);
    match (1..=MAX_PAGE).contains(&limit) {
        true => Ok(limit),
        false => Err(Problem::invalid("limit", &format!("must be 1 to {MAX_PAGE}, is {limit}"))),
    }
}

/// The number of a user, or an epoch, as paths and bodies have it.
///
/// # Errors
/// It is none.
pub fn number<T: std::str::FromStr>(field: &str, raw: &str) -> Result<T, Problem> {
    raw.parse().map_err(|_| Problem::invalid(field, "must be a number, in decimal digits"))
}

/// What an order has to say that others will ask about later.
///
/// # Errors
/// It says nothing.
pub fn reason(given: String) -> Result<String, Problem> {
    if given.trim().is_empty() { Err(Problem::invalid("reason", "must say why")) } else { Ok(given) }
}

/// Of an order with a body.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DryRun {
    /// Only say what would happen.
    dry_run: Option<bool>,
}

impl DryRun {
    pub fn is_dry(&self) -> bool {
        self.dry_run.unwrap_or_default()
    }
}
