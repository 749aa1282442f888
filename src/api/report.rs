//! What a node says of itself to operators, and what all nodes say together. Each question is answered by the same bytes whether
//! an operator or another node asks it: [`shapes`] has their types.
//!
//! What only one node knows is asked of each at the same time, and nobody waits for a silent one longer than a second.

pub mod configuration;
pub mod diagnosis;
pub mod facts;
pub mod others;
pub mod own;
pub mod sampler;
pub mod shapes;
pub mod summary;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;

use crate::api::http::Operator;
use crate::api::report::configuration::Differences;
use crate::api::report::facts::Facts;
use crate::api::report::others::Colleagues;
use crate::api::report::sampler::Sampler;
use crate::api::report::shapes::Overview;
use crate::engine::messages::peers::Peers;
use crate::engine::messages::peers::Question;
use crate::engine::overview::check::Check;
use crate::engine::overview::doctor::Doctor;
use crate::engine::overview::kept::Kept;
use crate::engine::overview::survey::Survey;
use crate::error::Error;

/// How long a node that is asked to call another waits: less than it is waited for.
const REACH_LIMIT: Duration = Duration::from_millis(700);

/// Answers what operators and other nodes ask of this one.
pub struct Reporter {
    pub operator: Operator,
    pub peers: Arc<Peers>,
    pub survey: Arc<Kept<Survey>>,
    pub sampler: Arc<Sampler>,
    pub facts: Facts,
    pub heartbeat_interval: Duration,
    colleagues: Kept<Colleagues>,
    doctor: Kept<Vec<Check>>,
    differences: Kept<Differences>,
}

impl Reporter {
    pub fn new(
        operator: Operator,
        peers: Arc<Peers>,
        survey: Arc<Kept<Survey>>,
        facts: Facts,
        doctor: Doctor,
        heartbeat_interval: Duration,
    ) -> Arc<Self> {
        let (sampler, doctor) = (Arc::new(Sampler::new(operator.clone())), Arc::new(doctor));
        let doctor = Kept::new(move || {
            let doctor = doctor.clone();
            async move { Ok(doctor.examine().await) }.boxed()
        });
        let asked = (peers.clone(), survey.clone());
        let colleagues = Kept::new(move || {
            let (peers, survey) = asked.clone();
            async move { Ok(Colleagues::ask(&peers, &survey).await) }.boxed()
        });
        let asked = (peers.clone(), facts.configuration.clone(), operator.lives.clone());
        let differences = Kept::new(move || {
            let (peers, own, lives) = asked.clone();
            async move { Ok(Differences::ask(&peers, &own, &lives).await) }.boxed()
        });
        Arc::new(Self { operator, peers, survey, sampler, facts, heartbeat_interval, colleagues, doctor, differences })
    }

    /// Answers another node, as JSON. `about` is another node's id, for `reach`.
    ///
    /// # Errors
    /// [`Error::Invalid`]: there is no such question.
    pub async fn answer(&self, what: &str, about: &str) -> Result<Vec<u8>, Error> {
        match what {
            "hello" => json(&self.peers.own.incarnation),
            "overview" => json(&Overview { report: self.own_report(), metrics: self.sampler.metrics(&self.peers.own.node_id) }),
            "configuration" => json(&self.facts.configuration),
            "streams" => json(&self.own_streams()),
            "reach" => json(&self.reaches(about).await),
            _ => Err(Error::Invalid { field: "what", reason: format!("{what:?} is no question that this node knows") }),
        }
    }

    /// Why this node does not reach another. None: it does.
    async fn reaches(&self, node_id: &str) -> Option<String> {
        let Some(addr) = self.peers.addr_of(node_id) else { return Some("it does not know that node".to_owned()) };
        let hello = Question { what: "hello", about: String::new() };
        self.peers.ask(&addr, hello, REACH_LIMIT).await.err()
    }
}

fn json(answer: &impl Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(answer).map_err(|_| Error::internal("an answer that is no JSON"))
}
