//! From the configuration to what the parts of the engine are told.

use std::sync::Arc;
use std::time::Duration;

use crate::api::rest::gate::Hosts;
use crate::config;
use crate::config::Config;
use crate::config::Digest;
use crate::config::Gateway;
use crate::config::OnOverflow;
use crate::config::Payload;
use crate::config::Watch;
use crate::domain::allocation::Rules;
use crate::domain::allocation::algorithm::Algorithm;
use crate::domain::allocation::experiment::Experiment;
use crate::domain::inbox::Limits;
use crate::domain::policy;
use crate::domain::policy::DevicePolicy;
use crate::engine::gateways::allocation;
use crate::engine::gateways::destinations::Rooms;
use crate::engine::gateways::digests;
use crate::engine::gateways::moving;
use crate::engine::gateways::registry::Terms;
use crate::engine::messages::delivery;
use crate::engine::messages::dispatch::Format;
use crate::engine::presence::watches;
use crate::engine::presence::watches::Damping;
use crate::engine::read::directory;
use crate::engine::read::directory::Announcements;
use crate::engine::read::hints::Hints;
use crate::engine::write::change;
use crate::store::connection::Engine;

pub fn terms(config: &Config) -> Terms {
    let Gateway { heartbeat_interval, lease, doubt_share, doubt_for, .. } = config.gateway;
    Terms { heartbeat_interval, lease, doubt_share, doubt_for }
}

/// The names under which the admin port may be called.
pub fn hosts(config: &Config) -> Hosts {
    let host = |addr: &String| addr.rsplit_once(':').map_or(addr.clone(), |(host, _)| host.to_owned());
    let machine = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let own = config.presence_service.advertise.as_ref().map(host).into_iter().chain(machine).chain([config.admin.host.clone()]);
    Hosts::new(own.chain(config.admin.allowed_hosts.clone()))
}

pub fn allocation(config: &Config) -> allocation::Settings {
    let config::Allocation { max_load, default_capacity, login_rate, bounded_load, max_retry_after, .. } = config.allocation;
    let experiment = |one: &config::Experiment| Experiment {
        name: one.name.clone(),
        share: one.share,
        algorithm: one.algorithm.map(algorithm),
        labels: one.labels.clone(),
    };
    let rules = Rules {
        algorithm: algorithm(config.allocation.algorithm),
        max_load,
        bounded_load,
        regions: config.allocation.regions.clone(),
        experiments: config.allocation.experiments.iter().map(experiment).collect(),
    };
    let heartbeat_interval = config.gateway.heartbeat_interval;
    allocation::Settings { rules, default_capacity, login_rate, max_retry_after, heartbeat_interval }
}

fn algorithm(configured: config::Algorithm) -> Algorithm {
    match configured {
        config::Algorithm::TwoChoices => Algorithm::TwoChoices,
        config::Algorithm::LeastLoad => Algorithm::LeastLoad,
        config::Algorithm::Rendezvous => Algorithm::Rendezvous,
    }
}

pub fn policy(config: &Config) -> DevicePolicy {
    let on_overflow = match config.route.on_overflow {
        OnOverflow::KickOldest => policy::OnOverflow::KickOldest,
        OnOverflow::RefuseNew => policy::OnOverflow::RefuseNew,
    };
    DevicePolicy { max_devices: config.route.max_devices, per_platform: config.route.per_platform, on_overflow }
}

pub fn lanes(config: &Config, engine: Engine) -> change::Settings {
    change::Settings {
        lanes: if engine == Engine::Sqlite { 1 } else { config.store.lanes },
        queue: config.store.queue,
        max_event_age: config.store.max_event_age,
        policy: policy(config),
        inbox: Limits {
            messages: config.delivery.inbox_max_messages,
            bytes: config.delivery.inbox_max_bytes,
            ttl: config.delivery.inbox_ttl,
            slack: Duration::ZERO,
            keeps_what_is_over: false,
        },
        route_ttl: config.route.route_ttl,
        heartbeat_interval: config.gateway.heartbeat_interval,
        forget_users_after: Some(config.store.forget_users_after).filter(|after| !after.is_zero()),
        keeps_history: config.history.enabled,
        session_gap: config.history.session_gap,
    }
}

pub fn watches(config: &Config) -> watches::Settings {
    let Watch { offline_delay, min_interval, max_users_per_stream, max_users, max_streams, resync_rate } = config.watch;
    let damping = Damping { offline_delay, min_interval };
    watches::Settings { damping, max_users_per_stream, max_users, max_streams, resync_rate }
}

pub fn moving(config: &Config) -> moving::Settings {
    let config::Drain { rate, settle, close_after, outstanding } = config.drain;
    let heartbeat_interval = config.gateway.heartbeat_interval;
    moving::Settings { rate, settle, close_after, outstanding, heartbeat_interval }
}

/// How gateways are chosen for users who have to go.
pub fn rooms(config: &Config) -> Rooms {
    let allocation::Settings { rules, default_capacity, login_rate, max_retry_after, heartbeat_interval } = allocation(config);
    Rooms { rules, default_capacity, login_rate, heartbeat_interval, patience: config.drain.close_after, max_retry_after }
}

pub fn digests(config: &Config) -> digests::Settings {
    let Digest { interval, settle, rows_per_s, max_share, repair } = config.digest;
    digests::Settings { interval, settle, rows_per_s, max_share, repair }
}

pub fn directory(config: &Config, engine: Engine, hints: Option<Arc<Hints>>) -> directory::Settings {
    let announcements = match (engine, hints) {
        (Engine::Sqlite, _) => Announcements::NotNeeded,
        (Engine::MySql, Some(hints)) => Announcements::Hints(hints),
        (Engine::MySql, None) => Announcements::Missing,
    };
    directory::Settings {
        announcements,
        l1_ttl: config.route.l1_ttl,
        heartbeat_interval: config.gateway.heartbeat_interval,
        patience: config.store.timeout,
    }
}

pub fn delivery(config: &Config) -> delivery::Settings {
    let format = match config.delivery.payload {
        Payload::Raw => Format::Raw,
        Payload::Envelope => Format::Envelope,
    };
    let (max_retries, retry_interval) = (config.route.max_retries, config.route.retry_interval);
    delivery::Settings { format, max_retries, retry_interval }
}
