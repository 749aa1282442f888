//! What SQL says of the system as a whole, read at most every few seconds however many ask.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;

use crate::domain::drain::Drain;
use crate::engine::overview::kept::Kept;
use crate::error::Error;
use crate::store::cluster::NodeRow;
use crate::store::database::Database;
use crate::store::readers::Readers;

/// Connections that such looks share.
const READERS: usize = 1;
/// Over which gateways that died are counted.
const DEATHS_WITHIN: Duration = Duration::from_secs(3_600);
/// Drains that are looked at, the newest first.
const DRAINS: i64 = 100;

/// What it says.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// Also those that were killed within the last hour.
    pub nodes: Vec<NodeRow>,
    /// Gateways that were declared dead within the last hour.
    pub deaths_last_hour: u64,
    pub drains: Vec<Drain>,
}

impl Survey {
    /// Reads it for those who ask.
    pub fn kept(database: Arc<Database>) -> Kept<Self> {
        let readers = Arc::new(Readers::new(database, READERS));
        Kept::new(move || {
            let readers = readers.clone();
            async move {
                let read = readers.read(|connection| {
                    async move {
                        Ok(Self {
                            nodes: connection.list_nodes().await?,
                            deaths_last_hour: connection.deaths_within(DEATHS_WITHIN).await?,
                            drains: connection.list_drains(None, false, None, DRAINS).await?,
                        })
                    }
                    .boxed()
                });
                read.await.map_err(|_| Error::unavailable("the database cannot be read now"))
            }
            .boxed()
        })
    }
}
