//! Who did what: read from SQL.

use std::sync::Arc;

use futures_util::FutureExt;

use crate::error::Error;
pub use crate::store::audit::AuditPage;
pub use crate::store::audit::AuditPlace;
pub use crate::store::audit::AuditRow;
use crate::store::database::Database;
use crate::store::readers::Readers;

/// Connections that read the audit.
pub const READERS: usize = 1;

pub struct AuditLog {
    readers: Readers,
}

impl AuditLog {
    pub fn new(database: Arc<Database>) -> Self {
        Self { readers: Readers::new(database, READERS) }
    }

    /// A page of it, the newest rows first.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if SQL cannot be read.
    pub async fn page(&self, page: AuditPage) -> Result<Vec<AuditRow>, Error> {
        let page = Arc::new(page);
        let rows = self.readers.read(move |connection| {
            let page = page.clone();
            async move { connection.read_audit(&page).await }.boxed()
        });
        rows.await.map_err(|_| Error::unavailable("the audit cannot be read now"))
    }
}
