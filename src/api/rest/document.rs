//! The description of the API, made from what the routes say of themselves.

use axum::body::Bytes;
use utoipa::PartialSchema;
use utoipa::ToSchema;
use utoipa::openapi::Components;
use utoipa::openapi::ContentBuilder;
use utoipa::openapi::Info;
use utoipa::openapi::OpenApi;
use utoipa::openapi::Ref;
use utoipa::openapi::RefOr;
use utoipa::openapi::ResponseBuilder;
use utoipa::openapi::path::Operation;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::security::Http;
use utoipa::openapi::security::HttpAuthScheme;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::security::SecurityScheme;

use crate::api::rest::problem::Told;

const TITLE: &str = "im-presence";
const DESCRIPTION: &str = "What operators ask of a system of im-presence nodes, and order. Any node answers for all. Ids, epochs \
    and versions are strings, times are milliseconds since 1970.";

/// As it is served.
pub fn text(mut api: OpenApi) -> Bytes {
    let mut info = Info::new(TITLE, env!("CARGO_PKG_VERSION"));
    info.description = Some(DESCRIPTION.to_owned());
    api.info = info;
    let components = api.components.get_or_insert_with(Components::new);
    components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    components.schemas.insert(Told::name().into_owned(), Told::schema());
    api.security = Some(vec![SecurityRequirement::new::<_, [&str; 0], &str>("token", [])]);
    api.paths.paths.values_mut().flat_map(operations).for_each(complete);
    serde_json::to_vec(&api).unwrap_or_default().into()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten()
}

/// Any of them may end with a problem.
fn complete(operation: &mut Operation) {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(Told::name()))).build();
    let problem =
        ResponseBuilder::new().description("A problem, as its status says.").content("application/problem+json", content);
    for response in operation.responses.responses.values_mut() {
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            response.description = "It is done, or was found.".to_owned();
        }
    }
    operation.responses.responses.insert("default".to_owned(), problem.build().into());
}
