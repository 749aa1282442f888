//! What this node can tell operators of itself and of the others, and the tasks that keep it up to date.

use std::sync::Arc;
use std::time::Instant;

use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use crate::api::http::Operator;
use crate::api::report::Reporter;
use crate::api::report::configuration;
use crate::api::report::facts::Facts;
use crate::api::report::sampler::SAMPLE_INTERVAL;
use crate::api::report::sampler::Sampler;
use crate::api::report::shapes::TlsReport;
use crate::api::rest::events::Listening;
use crate::app::assemble::Daemon;
use crate::app::files;
use crate::app::protection::Protection;
use crate::config;
use crate::config::Config;
use crate::engine::overview::doctor::Doctor;
use crate::engine::overview::events::Events;
use crate::engine::overview::observer;
use crate::engine::overview::observer::Observer;
use crate::engine::overview::survey::Survey;
use crate::engine::read::audit_log::AuditLog;
use crate::store::connection::Purpose;
use crate::store::database::Database;

/// What operators' requests are answered from.
pub struct Reporting {
    pub reporter: Arc<Reporter>,
    pub listening: Listening,
}

/// Starts the tasks, too.
pub async fn start(
    config: &Config,
    engine: &Daemon,
    operator: &Operator,
    protection: &Protection,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
) -> Reporting {
    let facts = Facts {
        version: env!("CARGO_PKG_VERSION"),
        started: Instant::now(),
        system: system(config),
        store_id: engine.database.store_id.clone(),
        has_cache: config.redis_cache.is_some(),
        has_queue: config.redis_queue.is_some(),
        configuration: configuration::shown(config),
        tls: TlsReport { store: to_store(&engine.database).await.to_owned(), ..links(config, protection) },
    };
    let (survey, heartbeat_interval) = (Arc::new(Survey::kept(engine.database.clone())), config.gateway.heartbeat_interval);
    let doctor = Doctor {
        database: engine.database.clone(),
        lives: engine.lives.clone(),
        peers: engine.peers.clone(),
        hints: engine.hints.clone(),
        cache: engine.explaining.inspection.l2(),
        queue: engine.drains.mover.outlets.bus.clone(),
        audit: AuditLog::new(engine.database.clone()),
        files: files::limit(config),
    };
    let peers = engine.peers.clone();
    let reporter = Reporter::new(operator.clone(), peers, survey.clone(), facts, doctor, heartbeat_interval);
    tasks.spawn(keep_sampling(reporter.sampler.clone(), stop.clone()));
    let events = Events::new(&engine.own.incarnation);
    let (lives, peers, audit) = (engine.lives.clone(), engine.peers.clone(), AuditLog::new(engine.database.clone()));
    let looked_at = operator.clone();
    let degraded = move || looked_at.why_not_ready().into_iter().chain(looked_at.degraded()).collect();
    let observer = Observer::new(events.clone(), lives, peers, survey, audit, degraded);
    tasks.spawn(keep_observing(observer, stop.clone()));
    Reporting { reporter, listening: Listening::new(events, operator.draining.clone()) }
}

async fn keep_observing(mut observer: Observer, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(observer::LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        observer.look();
        stop.run_until_cancelled(observer.look_into_sql()).await;
    }
}

async fn keep_sampling(sampler: Arc<Sampler>, stop: CancellationToken) {
    let _stop_node_on_panic = stop.clone().drop_guard();
    let mut ticks = interval(SAMPLE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await; // the first is at once
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        sampler.step();
    }
}

/// Name of the database: tells the systems of one company apart.
fn system(config: &Config) -> String {
    let urls = config.store.connect_urls().unwrap_or_default();
    let path = urls.first().map_or("", String::as_str).split('?').next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().trim_end_matches(".db").to_owned()
}

fn links(config: &Config, protection: &Protection) -> TlsReport {
    let on = |is_on: bool| if is_on { "on" } else { "off" }.to_owned();
    let speaks = |redis: Option<&config::Redis>| on(redis.is_some_and(config::Redis::speaks_tls));
    TlsReport {
        data: on(protection.data.tls.is_some()),
        admin: on(protection.admin.tls.is_some()),
        peer: on(protection.peers.ca_file.is_some()),
        store: String::new(),
        redis_cache: speaks(config.redis_cache.as_ref().map(|cache| &cache.server)),
        redis_queue: speaks(config.redis_queue.as_ref().map(|queue| &queue.server)),
    }
}

async fn to_store(database: &Database) -> &'static str {
    let Ok(mut connection) = database.connect(Purpose::General).await else { return "off" };
    match database.protection(&mut connection).await {
        Ok(Some((cipher, _))) if cipher.is_empty() => "off",
        Ok(Some((_, true))) => "on",
        Ok(Some((_, false))) => "unverified",
        Ok(None) | Err(_) => "off",
    }
}
