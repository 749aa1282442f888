//! What is counted where gateways and the database are compared.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::metrics::ByResult;
use crate::metrics::ByWhat;
use crate::metrics::Register;

pub struct DigestMetrics {
    looks: Family<ByResult, Counter>,
    mended: Family<ByWhat, Counter>,
    pub refused: Counter,
}

impl DigestMetrics {
    pub(super) fn register(r: &mut Register<'_>) -> Self {
        Self {
            looks: r.family("digest_looks", "gateways compared with the database, by what came of it"),
            mended: r.family("digest_mended", "what differed and was mended, by what it was"),
            refused: r.add("digest_refused", "gateways that differed too much to be believed", Counter::default()),
        }
    }

    pub fn look(&self, result: &'static str) {
        self.looks.get_or_create(&ByResult { result }).inc();
    }

    pub fn mended(&self, what: &'static str, number: u64) {
        if number > 0 {
            self.mended.get_or_create(&ByWhat { what }).inc_by(number);
        }
    }
}
