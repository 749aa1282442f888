//! What does not change while a node runs.

use std::time::Instant;

use crate::api::report::configuration::Configuration;
use crate::api::report::shapes::TlsReport;

pub struct Facts {
    pub version: &'static str,
    pub started: Instant,
    /// Name of the database.
    pub system: String,
    pub store_id: String,
    pub has_cache: bool,
    pub has_queue: bool,
    pub configuration: Configuration,
    pub tls: TlsReport,
}
