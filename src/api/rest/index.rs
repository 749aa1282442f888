//! What API there is.

use axum::Extension;
use axum::Json;
use axum::body::Bytes;
use axum::http::HeaderName;
use axum::http::header::CONTENT_TYPE;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::rest::Routes;

const DOCUMENT: &str = "/api/v1/openapi.json";

/// The description of the API, as it is served.
#[derive(Clone)]
pub struct Document(pub Bytes);

/// The versions of the API that this node speaks.
#[derive(Serialize, ToSchema)]
struct Versions {
    versions: Vec<ApiVersion>,
}

#[derive(Serialize, ToSchema)]
struct ApiVersion {
    version: &'static str,
    /// Where it is described.
    openapi: &'static str,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_versions)).routes(routes!(describe))
}

/// The versions of the API.
#[utoipa::path(get, path = "/api", tag = "api", security(()), responses((status = 200, body = Versions)))]
async fn list_versions() -> Json<Versions> {
    Json(Versions { versions: vec![ApiVersion { version: "v1", openapi: DOCUMENT }] })
}

/// This document.
#[utoipa::path(get, path = "/api/v1/openapi.json", tag = "api", security(()), responses((status = 200, body = serde_json::Value)))]
async fn describe(Extension(Document(bytes)): Extension<Document>) -> ([(HeaderName, &'static str); 1], Bytes) {
    ([(CONTENT_TYPE, "application/json")], bytes)
}
