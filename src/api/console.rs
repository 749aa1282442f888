//! The console: files for browsers, compiled in. They are for anybody who reaches the port, because they hold nothing: what a
//! page shows it asks of the REST API, with the credential of whoever looks at it.

use std::sync::LazyLock;

use axum::Router;
use axum::http::HeaderMap;
use axum::http::HeaderValue;
use axum::http::StatusCode;
use axum::http::Uri;
use axum::http::header::CACHE_CONTROL;
use axum::http::header::CONTENT_SECURITY_POLICY;
use axum::http::header::CONTENT_TYPE;
use axum::http::header::ETAG;
use axum::http::header::HeaderName;
use axum::http::header::IF_NONE_MATCH;
use axum::http::header::REFERRER_POLICY;
use axum::http::header::X_CONTENT_TYPE_OPTIONS;
use axum::response::IntoResponse;
use axum::response::Response;
use axum::routing::get;
use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";
const TEXT: &str = "text/plain; charset=utf-8";

/// Nothing but its own files runs, and nobody shows it in a frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
    frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
const HEADERS: [(HeaderName, &str); 5] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    // It is asked each time whether the file is still the same: a console that is older than its node would mislead.
    (CACHE_CONTROL, "no-cache"),
];

/// One file.
struct Asset {
    path: &'static str,
    bytes: &'static [u8],
    kind: &'static str,
}

macro_rules! assets {
    ($($file:literal: $kind:expr,)*) => {
        [$(Asset { path: concat!("/web/", $file), bytes: include_bytes!(concat!("../../web/", $file)), kind: $kind }),*]
    };
}

static INDEX: Asset = Asset { path: "/", bytes: include_bytes!("../../web/index.html"), kind: HTML };
static ASSETS: [Asset; 23] = assets! {
    "actions.js": SCRIPT,
    "api.js": SCRIPT,
    "app.css": CSS,
    "app.js": SCRIPT,
    "chart.js": SCRIPT,
    "dialog.js": SCRIPT,
    "dom.js": SCRIPT,
    "favicon.svg": SVG,
    "format.js": SCRIPT,
    "live.js": SCRIPT,
    "pages/doctor.js": SCRIPT,
    "pages/drains.js": SCRIPT,
    "pages/events.js": SCRIPT,
    "pages/gateway.js": SCRIPT,
    "pages/gateways.js": SCRIPT,
    "pages/nodes.js": SCRIPT,
    "pages/overview.js": SCRIPT,
    "pages/settings.js": SCRIPT,
    "pages/user.js": SCRIPT,
    "pages/users.js": SCRIPT,
    "vendor/uplot.LICENSE": TEXT,
    "vendor/uplot.css": CSS,
    "vendor/uplot.js": SCRIPT,
};

/// Of each file, the index first; a file that has not changed is not sent again.
static ETAGS: LazyLock<Vec<HeaderValue>> = LazyLock::new(|| {
    let tag = |asset: &Asset| HeaderValue::from_str(&format!("\"{:016x}\"", xxh3_64(asset.bytes)));
    assets().map(|asset| tag(asset).unwrap_or(HeaderValue::from_static("\"\""))).collect()
});

fn assets() -> impl Iterator<Item = &'static Asset> {
    std::iter::once(&INDEX).chain(&ASSETS)
}

/// Its files, at `/` and `/web/`.
pub fn router() -> Router {
    Router::new().route("/", get(file)).route("/web/{*file}", get(file))
}

async fn file(uri: Uri, headers: HeaderMap) -> Response {
    let found = assets().zip(&*ETAGS).find(|(asset, _)| asset.path == uri.path());
    let Some((asset, etag)) = found else { return (StatusCode::NOT_FOUND, HEADERS, "there is no such file\n").into_response() };
    let own = [(CONTENT_TYPE, HeaderValue::from_static(asset.kind)), (ETAG, etag.clone())];
    if let Some(bytes) = from_disk(asset) {
        return (HEADERS, [own[0].clone()], bytes).into_response();
    }
    if headers.get(IF_NONE_MATCH) == Some(etag) {
        return (StatusCode::NOT_MODIFIED, HEADERS, own).into_response();
    }
    (HEADERS, own, Bytes::from_static(asset.bytes)).into_response()
}

/// For who writes the console: in debug builds the files are read anew from the directory that IM_PRESENCE_WEB_DIR names.
fn from_disk(asset: &Asset) -> Option<Vec<u8>> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let directory = std::env::var_os("IM_PRESENCE_WEB_DIR")?;
    let file = asset.path.strip_prefix("/web/").unwrap_or("index.html");
    std::fs::read(std::path::Path::new(&directory).join(file)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the console may have of its own, so that it stays a page and does not become a product.
    const MAX_LINES: usize = 2_000;

    fn text(asset: &Asset) -> &'static str {
        std::str::from_utf8(asset.bytes).expect("text")
    }

    fn own() -> impl Iterator<Item = &'static Asset> {
        assets().filter(|asset| !asset.path.starts_with("/web/vendor/"))
    }

    #[test]
    fn the_console_is_at_most_2000_lines_of_javascript_and_css() {
        let lines: usize =
            own().filter(|asset| [SCRIPT, CSS].contains(&asset.kind)).map(|asset| text(asset).lines().count()).sum();
        assert!((1_000..=MAX_LINES).contains(&lines), "{lines} lines");
    }

    #[test]
    fn every_file_of_the_console_is_served_and_is_used() {
        let mut directories = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/web"))];
        let mut files = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).expect("a directory") {
                let path = entry.expect("an entry").path();
                if path.is_dir() { directories.push(path) } else { files.push(path) }
            }
        }
        assert_eq!(files.len(), assets().count());
        for asset in assets().filter(|asset| asset.kind != TEXT && asset.path != "/") {
            let name = asset.path.rsplit('/').next().expect("a name");
            assert!(
                assets().any(|other| text(other).contains(&format!("{name}\"")) || text(other).contains(&format!("{name}'"))),
                "{name}"
            );
        }
    }

    #[test]
    fn nothing_that_came_over_the_wire_is_parsed_as_html_or_run() {
        const FORBIDDEN: [&str; 9] = [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "new Function",
            "javascript:",
            "style=",
        ];
        for asset in own() {
            for word in FORBIDDEN {
                assert!(!text(asset).contains(word), "{}: {word}", asset.path);
            }
        }
    }

    #[test]
    fn the_console_asks_nobody_but_its_own_server() {
        for asset in own() {
            let foreign =
                text(asset).split(['\'', '"', '`', '(']).filter(|word| word.starts_with("http") && word.contains("://"));
            let foreign: Vec<&str> = foreign.filter(|word| *word != "http://www.w3.org/2000/svg").collect();
            assert!(foreign.is_empty(), "{}: {foreign:?}", asset.path);
            assert!(
                !["href=\"/", "src=\"/", "fetch('/", "from '/"].iter().any(|word| text(asset).contains(word)),
                "{}: links are relative",
                asset.path
            );
        }
    }
}
