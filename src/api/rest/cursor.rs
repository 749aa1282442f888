//! Where a page ended. Nobody has to understand it, and it fits only the list and the filters that it came with.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use xxhash_rust::xxh3::xxh3_64;

use crate::api::rest::problem::Problem;

/// One list with its filters.
pub struct Cursor(u64);

impl Cursor {
    pub fn of(list: &str, filters: &impl std::fmt::Debug) -> Self {
        Self(xxh3_64(format!("{list} {filters:?}").as_bytes()))
    }

    /// The page token to go on with; empty: from the beginning.
    ///
    /// # Errors
    /// It is of another list, or of other filters, or was tampered with.
    pub fn read(&self, given: Option<&str>) -> Result<String, Problem> {
        let Some(given) = given else { return Ok(String::new()) };
        let decoded = URL_SAFE_NO_PAD.decode(given).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let fitting = decoded.as_deref().and_then(|text| text.strip_prefix(&format!("{:016x} ", self.0)));
        let token = fitting.filter(|token| !token.is_empty());
        token
            .map(str::to_owned)
            .ok_or_else(|| Problem::invalid("cursor", "must be the next_cursor of a page with the same filters"))
    }

    /// None: there are no more pages.
    pub fn next(&self, page_token: &str) -> Option<String> {
        (!page_token.is_empty()).then(|| URL_SAFE_NO_PAD.encode(format!("{:016x} {page_token}", self.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_fits_the_list_and_the_filters_it_came_with() {
        let (own, others) =
            (Cursor::of("users", &Some("eu")), [Cursor::of("users", &Some("us")), Cursor::of("audit", &Some("eu"))]);
        let next = own.next("42@gw-1:7000").unwrap();
        assert_eq!(own.read(Some(&next)).unwrap(), "42@gw-1:7000");
        assert!(others.iter().all(|other| other.read(Some(&next)).is_err()));
        assert!(["", "x", "!", &next[1..]].iter().all(|wrong| own.read(Some(wrong)).is_err()));
        assert_eq!((own.next(""), own.read(None).unwrap()), (None, String::new()));
    }
}
